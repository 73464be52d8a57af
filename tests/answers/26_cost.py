"""Answers to the exercise of 26_cost, for tests/test_exercises.py: right ones, and wrong ones that people give."""

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
