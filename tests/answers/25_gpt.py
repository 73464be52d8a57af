"""Answers to the exercise of 25_gpt, for tests/test_exercise.py: right ones, and wrong ones that people give."""

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
