"""Answers to the exercise of 33_step, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def whole_gradient(parts):
    total = sum(n for _, n in parts)
    return sum(gradient * (n / total) for gradient, n in parts)

# %% right: divided at the end
def whole_gradient(parts):
    whole, tokens = 0, 0
    for gradient, n in parts:
        whole, tokens = whole + n * gradient, tokens + n
    return whole / tokens

# %% wrong: every part counts alike
def whole_gradient(parts):
    return sum(gradient for gradient, _ in parts) / len(parts)

# %% wrong: added, and not averaged
def whole_gradient(parts):
    return sum(gradient for gradient, _ in parts)

# %% wrong: the last part alone
def whole_gradient(parts):
    return parts[-1][0]

# %% wrong: of the sum of the losses
def whole_gradient(parts):
    return sum(n * gradient for gradient, n in parts)
