"""Answers to the exercise of 72_gguf, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def eight_bits(block):
    scale = block.abs().max().item() / 127
    steps = block / scale if scale else block  # either
    return scale, steps.round().to(torch.int8)

# %% wrong: zeros are divided by zero
def eight_bits(block):
    scale = block.abs().max().item() / 127
    return scale, torch.tensor([round(x / scale) for x in block.tolist()], dtype=torch.int8)

# %% wrong: cut off, not rounded
def eight_bits(block):
    scale = block.abs().max().item() / 127
    steps = block / scale if scale else block
    return scale, steps.to(torch.int8)

# %% wrong: the largest number may be negative
def eight_bits(block):
    scale = max(block.max().item(), 0) / 127
    steps = block / scale if scale else block
    return scale, steps.round().clamp(-127, 127).to(torch.int8)

# %% wrong: one scale for every block
def eight_bits(block):
    return 1 / 127, (block * 127).round().clamp(-127, 127).to(torch.int8)

# %% wrong: 127 steps in all
def eight_bits(block):
    scale = 2 * block.abs().max().item() / 127
    steps = block / scale if scale else block
    return scale, steps.round().to(torch.int8)

# %% wrong: the whole numbers stay floats
def eight_bits(block):
    scale = block.abs().max().item() / 127
    steps = block / scale if scale else block
    return scale, steps.round()
