"""Answers to the exercises of 22_heads, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def window_mask(T, W):
    query, key = torch.arange(T)[:, None], torch.arange(T)
    return (key <= query) & (query - key < W)

# %% right: two triangles
def window_mask(T, W):
    return torch.ones(T, T, dtype=torch.bool).tril().triu(1 - W)

# %% wrong: W positions before its own
def window_mask(T, W):
    query, key = torch.arange(T)[:, None], torch.arange(T)
    return (key <= query) & (query - key <= W)

# %% wrong: queries in columns
def window_mask(T, W):
    query, key = torch.arange(T), torch.arange(T)[:, None]
    return (key <= query) & (query - key < W)

# %% wrong: the future as well
def window_mask(T, W):
    query, key = torch.arange(T)[:, None], torch.arange(T)
    return (query - key).abs() < W

# %% wrong: all of the past
def window_mask(T, W):
    return torch.ones(T, T, dtype=torch.bool).tril()

# %% wrong: True where a key is hidden
def window_mask(T, W):
    return ~torch.ones(T, T, dtype=torch.bool).tril().triu(1 - W)
