"""Answers to the exercises of 60_speed, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * position
    return batch * bandwidth / (width * (config.n_params + batch * cache))

# %% wrong: one text gets the tokens of all
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * position
    return bandwidth / (width * (config.n_params + batch * cache))

# %% wrong: every text reads the weights for itself
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * position
    return bandwidth / (width * (config.n_params + cache))

# %% wrong: there is no cache
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    return batch * bandwidth / (width * config.n_params)

# %% wrong: keys without values
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    cache = config.n_layers * config.n_kv_heads * config.head_dim * position
    return batch * bandwidth / (width * (config.n_params + batch * cache))

# %% wrong: every query head has keys of its own
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    cache = 2 * config.n_layers * config.n_heads * config.head_dim * position
    return batch * bandwidth / (width * (config.n_params + batch * cache))

# %% wrong: float32, whatever was asked for
def tokens_per_second_at_most(config, position, batch, bandwidth, width=2):
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * position
    return batch * bandwidth / (4 * (config.n_params + batch * cache))

# %% right
def rows_until_computing(i, o, rate, bandwidth, width=2):
    each = 2 * i * o / rate - width * (i + o) / bandwidth  # what a row takes longer to compute than to fetch and write
    return width * i * o / bandwidth / each if each > 0 else math.inf

# %% right: the other way round
def rows_until_computing(i, o, rate, bandwidth, width=2):
    balance = rate / bandwidth
    if 2 * i * o <= width * balance * (i + o): return float("inf")
    return width * balance * i * o / (2 * i * o - width * balance * (i + o))

# %% wrong: the matrix is all that moves
def rows_until_computing(i, o, rate, bandwidth, width=2):
    return width * rate / bandwidth / 2

# %% wrong: results are not written
def rows_until_computing(i, o, rate, bandwidth, width=2):
    each = 2 * i * o / rate - width * i / bandwidth
    return width * i * o / bandwidth / each if each > 0 else math.inf

# %% wrong: a multiplication and its addition are one operation
def rows_until_computing(i, o, rate, bandwidth, width=2):
    each = i * o / rate - width * (i + o) / bandwidth
    return width * i * o / bandwidth / each if each > 0 else math.inf

# %% wrong: fewer rows than none
def rows_until_computing(i, o, rate, bandwidth, width=2):
    return width * i * o / bandwidth / (2 * i * o / rate - width * (i + o) / bandwidth)

# %% right
def compute_optimal(operations):
    params = math.sqrt(operations / 120)
    return params, 20 * params

# %% wrong: writing, where it should be training
def compute_optimal(operations):
    params = math.sqrt(operations / 40)
    return params, 20 * params

# %% wrong: tokens first
def compute_optimal(operations):
    params = math.sqrt(operations / 120)
    return 20 * params, params

# %% wrong: a token a parameter
def compute_optimal(operations):
    params = math.sqrt(operations / 6)
    return params, params

# %% wrong: no root
def compute_optimal(operations):
    params = operations / 120
    return params, 20 * params
