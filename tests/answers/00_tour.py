"""Answers to the exercise of 00_tour, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def perplexity(P, tokens):
    return np.exp(-np.log(P[tokens[:-1], tokens[1:]]).mean())

# %% right: without logarithms
def perplexity(P, tokens):
    given = [P[now, then] for now, then in zip(tokens, tokens[1:])]
    return math.prod(given) ** (-1 / len(given))

# %% wrong: the loss itself
def perplexity(P, tokens):
    return -np.log(P[tokens[:-1], tokens[1:]]).mean()

# %% wrong: from the next character to the one before
def perplexity(P, tokens):
    return np.exp(-np.log(P[tokens[1:], tokens[:-1]]).mean())

# %% wrong: the mean of the probabilities
def perplexity(P, tokens):
    return 1 / P[tokens[:-1], tokens[1:]].mean()

# %% wrong: the mean of what each is worth
def perplexity(P, tokens):
    return (1 / P[tokens[:-1], tokens[1:]]).mean()

# %% wrong: nats, to the power of two
def perplexity(P, tokens):
    return 2 ** -np.log(P[tokens[:-1], tokens[1:]]).mean()

# %% wrong: the first character counts, though nothing said it
def perplexity(P, tokens):
    return np.exp(-np.log(P[tokens[:-1], tokens[1:]]).sum() / len(tokens))
