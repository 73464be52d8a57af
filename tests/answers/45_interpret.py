"""Answers to the exercise of 45_interpret, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def induction_score(weights):
    n_heads, length, _ = weights.shape
    return weights.diagonal(1 - length // 2, 1, 2)[:, 1:].mean(1)

# %% right: in a loop
def induction_score(weights):
    n_heads, length, _ = weights.shape
    return torch.stack([weights[:, length // 2 + i, i + 1] for i in range(length // 2)]).mean(0)

# %% right: picked by two lists of positions
def induction_score(weights):
    n_heads, length, _ = weights.shape
    asks = torch.arange(length // 2, length)
    return weights[:, asks, asks - length // 2 + 1].mean(1)

# %% wrong: the same token, and not the one behind it
def induction_score(weights):
    half = weights.shape[-1] // 2
    return weights.diagonal(-half, -2, -1).mean(-1)

# %% wrong: with the last position of the first half, which repeats nothing
def induction_score(weights):
    half = weights.shape[-1] // 2
    return weights.diagonal(1 - half, -2, -1).mean(-1)

# %% wrong: the token in front of it
def induction_score(weights):
    half = weights.shape[-1] // 2
    return weights.diagonal(-half - 1, -2, -1).mean(-1)

# %% wrong: queries and keys exchanged
def induction_score(weights):
    half = weights.shape[-1] // 2
    return weights.mT.diagonal(1 - half, -2, -1)[:, 1:].mean(-1)

# %% wrong: one number for all heads
def induction_score(weights):
    half = weights.shape[-1] // 2
    return weights.diagonal(1 - half, -2, -1)[:, 1:].mean()

# %% wrong: the sum
def induction_score(weights):
    half = weights.shape[-1] // 2
    return weights.diagonal(1 - half, -2, -1)[:, 1:].sum(-1)
