"""Answers to the exercise of 12_entropy, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def grammar_entropy(node):
    if isinstance(node, str): return 0.0
    if isinstance(node, tuple): return sum(grammar_entropy(part) for part in node)
    total = sum(n for n, _ in node)
    return sum(n / total * (grammar_entropy(part) - math.log2(n / total)) for n, part in node)

# %% wrong: what is chosen holds no surprise of its own
def grammar_entropy(node):
    if isinstance(node, str): return 0.0
    if isinstance(node, tuple): return sum(grammar_entropy(part) for part in node)
    total = sum(n for n, _ in node)
    return sum(-n / total * math.log2(n / total) for n, _ in node)

# %% wrong: all choices are equally likely
def grammar_entropy(node):
    if isinstance(node, str): return 0.0
    if isinstance(node, tuple): return sum(grammar_entropy(part) for part in node)
    return math.log2(len(node)) + sum(grammar_entropy(part) for _, part in node) / len(node)

# %% wrong: what is rarely chosen surprises as often
def grammar_entropy(node):
    if isinstance(node, str): return 0.0
    if isinstance(node, tuple): return sum(grammar_entropy(part) for part in node)
    total = sum(n for n, _ in node)
    return sum(grammar_entropy(part) - n / total * math.log2(n / total) for n, part in node)

# %% wrong: nats
def grammar_entropy(node):
    if isinstance(node, str): return 0.0
    if isinstance(node, tuple): return sum(grammar_entropy(part) for part in node)
    total = sum(n for n, _ in node)
    return sum(n / total * (grammar_entropy(part) - math.log(n / total)) for n, part in node)
