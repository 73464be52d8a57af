"""Answers to the exercise of 10_doctor, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def slope(f, x, step):
    return (f(x + step) - f(x - step)) / (2 * step)

# %% wrong: from one side
def slope(f, x, step):
    return (f(x + step) - f(x)) / step

# %% wrong: two steps, divided by one
def slope(f, x, step):
    return (f(x + step) - f(x - step)) / step

# %% wrong: the other way round
def slope(f, x, step):
    return (f(x - step) - f(x + step)) / (2 * step)

# %% wrong: a growth, and no slope
def slope(f, x, step):
    return f(x + step) - f(x - step)
