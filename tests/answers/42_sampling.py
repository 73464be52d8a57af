"""Answers to the exercise of 42_sampling, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def gumbel_draw(logits, temperature, generator):
    waits = -torch.rand(logits.shape, generator=generator).log()  # either
    return (logits / temperature - waits.log()).argmax(1)

# %% right: who is first, when each waits with a rate of its probability
def gumbel_draw(logits, temperature, generator):
    waits = torch.empty_like(logits).exponential_(generator=generator)
    return (waits / (logits / temperature).softmax(1)).argmin(1)

# %% wrong: the noise is even
def gumbel_draw(logits, temperature, generator):
    return (logits / temperature + torch.rand(logits.shape, generator=generator)).argmax(1)

# %% wrong: the noise is normal
def gumbel_draw(logits, temperature, generator):
    return (logits / temperature + torch.randn(logits.shape, generator=generator)).argmax(1)

# %% wrong: one logarithm
def gumbel_draw(logits, temperature, generator):
    return (logits / temperature - torch.rand(logits.shape, generator=generator).log()).argmax(1)

# %% wrong: one draw for all rows
def gumbel_draw(logits, temperature, generator):
    waits = -torch.rand(logits.shape[-1:], generator=generator).log()
    return (logits / temperature - waits.log()).argmax(1)

# %% wrong: no temperature
def gumbel_draw(logits, temperature, generator):
    waits = -torch.rand(logits.shape, generator=generator).log()
    return (logits - waits.log()).argmax(1)

# %% wrong: the noise is cooled as well
def gumbel_draw(logits, temperature, generator):
    waits = -torch.rand(logits.shape, generator=generator).log()
    return ((logits - waits.log()) / temperature).argmax(1)

# %% wrong: the likeliest
def gumbel_draw(logits, temperature, generator):
    return (logits / temperature).softmax(-1).argmax(1)
