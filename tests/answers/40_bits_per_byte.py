"""Answers to the exercise of 40_bits_per_byte, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def bits_per_byte_of(losses, text):
    return sum(losses) / math.log(2) / len(text.encode())

# %% right: in another order
def bits_per_byte_of(losses, text):
    bits = [nats * math.log2(math.e) for nats in losses]
    return sum(bits) / len(text.encode())

# %% wrong: nats per byte
def bits_per_byte_of(losses, text):
    return sum(losses) / len(text.encode())

# %% wrong: bits per token
def bits_per_byte_of(losses, text):
    return sum(losses) / math.log(2) / len(losses)

# %% wrong: bits per character
def bits_per_byte_of(losses, text):
    return sum(losses) / math.log(2) / len(text)

# %% wrong: the mean loss, and then a byte's share
def bits_per_byte_of(losses, text):
    return sum(losses) / len(losses) / math.log(2) / len(text.encode())

# %% wrong: times ln 2
def bits_per_byte_of(losses, text):
    return sum(losses) * math.log(2) / len(text.encode())
