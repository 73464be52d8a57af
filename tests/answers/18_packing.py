"""Answers to the exercise of 18_packing, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def rows_of_step(n, batch_size, seed, step):
    rows = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        order = np.random.default_rng((seed, place // n)).permutation(n)
        rows.append(int(order[place % n]))
    return rows

# %% wrong: every epoch has the same order
def rows_of_step(n, batch_size, seed, step):
    order = np.random.default_rng(seed).permutation(n)
    return [int(order[place % n]) for place in range(step * batch_size, (step + 1) * batch_size)]

# %% wrong: what was asked before changes the answer
def rows_of_step(n, batch_size, seed, step):
    global generator
    if step == 0: generator = np.random.default_rng(seed)
    return [int(row) for row in generator.permutation(n)[:batch_size]]

# %% wrong: drawn with replacement
def rows_of_step(n, batch_size, seed, step):
    return [int(row) for row in np.random.default_rng((seed, step)).integers(n, size=batch_size)]

# %% wrong: every step begins an order of its own
def rows_of_step(n, batch_size, seed, step):
    return [int(row) for row in np.random.default_rng((seed, step)).permutation(n)[:batch_size]]

# %% wrong: the rest of an epoch is left out
def rows_of_step(n, batch_size, seed, step):
    epoch, step = divmod(step, n // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return [int(row) for row in order[step * batch_size : (step + 1) * batch_size]]

# %% wrong: seed and epoch are added
def rows_of_step(n, batch_size, seed, step):
    rows = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        order = np.random.default_rng(seed + place // n).permutation(n)
        rows.append(int(order[place % n]))
    return rows

# %% wrong: no chance at all
def rows_of_step(n, batch_size, seed, step):
    return [(place + seed) % n for place in range(step * batch_size, (step + 1) * batch_size)]
