"""Answers to the exercises of 25_gpt, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def block_parameters(config):
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = 2 * config.d_model * (q + kv) + 2 * config.head_dim
    return attention + 3 * config.d_model * config.d_ff + 2 * config.d_model

# %% wrong: every query head has keys of its own
def block_parameters(config):
    q = config.n_heads * config.head_dim
    attention = 4 * config.d_model * q + 2 * config.head_dim
    return attention + 3 * config.d_model * config.d_ff + 2 * config.d_model

# %% wrong: the heads are as wide as the stream
def block_parameters(config):
    kv = config.n_kv_heads * config.d_model // config.n_heads
    attention = 2 * config.d_model * (config.d_model + kv) + 2 * config.head_dim
    return attention + 3 * config.d_model * config.d_ff + 2 * config.d_model

# %% wrong: an MLP without a gate
def block_parameters(config):
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = 2 * config.d_model * (q + kv) + 2 * config.head_dim
    return attention + 2 * config.d_model * config.d_ff + 2 * config.d_model

# %% wrong: no norms
def block_parameters(config):
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return 2 * config.d_model * (q + kv) + 3 * config.d_model * config.d_ff

# %% wrong: no output projection
def block_parameters(config):
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = config.d_model * (q + 2 * kv) + 2 * config.head_dim
    return attention + 3 * config.d_model * config.d_ff + 2 * config.d_model

# %% right
def gradient_of_loss(logits, targets):
    counts = targets != -100
    gradient = logits.softmax(1)
    gradient[counts, targets[counts]] -= 1
    return gradient * counts[:, None] / counts.sum()

# %% right: with the targets as rows of a table
def gradient_of_loss(logits, targets):
    counts = (targets != -100)[:, None]
    hot = F.one_hot(targets.clamp(min=0), logits.shape[1])
    return torch.where(counts, logits.softmax(1) - hot, 0) / counts.sum()

# %% wrong: the other sign
def gradient_of_loss(logits, targets):
    counts = (targets != -100)[:, None]
    return counts * (F.one_hot(targets.clamp(min=0), logits.shape[1]) - logits.softmax(1)) / counts.sum()

# %% wrong: of the sum
def gradient_of_loss(logits, targets):
    counts = (targets != -100)[:, None]
    return counts * (logits.softmax(1) - F.one_hot(targets.clamp(min=0), logits.shape[1]))

# %% wrong: the mean over all rows
def gradient_of_loss(logits, targets):
    counts = (targets != -100)[:, None]
    return counts * (logits.softmax(1) - F.one_hot(targets.clamp(min=0), logits.shape[1])) / len(logits)

# %% wrong: a row that does not count has a gradient
def gradient_of_loss(logits, targets):
    return (logits.softmax(1) - F.one_hot(targets.clamp(min=0), logits.shape[1])) / (targets != -100).sum()

# %% wrong: logits are no probabilities
def gradient_of_loss(logits, targets):
    counts = (targets != -100)[:, None]
    return counts * (logits - F.one_hot(targets.clamp(min=0), logits.shape[1])) / counts.sum()

# %% wrong: large logits overflow
def gradient_of_loss(logits, targets):
    counts = (targets != -100)[:, None]
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    return counts * (probabilities - F.one_hot(targets.clamp(min=0), logits.shape[1])) / counts.sum()
