"""Answers to the exercises of 23_attention, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    group = n_heads // len(k)
    scores = q @ k.repeat_interleave(group, dim=0).mT / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(2) @ v.repeat_interleave(group, dim=0)

# %% right: in loops
def attention_by_hand(q, k, v):
    out = torch.zeros_like(q)
    for head in range(len(q)):
        keys, values = k[head * len(k) // len(q)], v[head * len(k) // len(q)]
        for now in range(q.shape[1]):
            weights = (keys[: now + 1] @ q[head, now] / math.sqrt(q.shape[2])).exp()
            out[head, now] = weights @ values[: now + 1] / weights.sum()
    return out

# %% wrong: not scaled
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat_interleave(n_heads // len(z), dim=0) for z in (k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(future, -math.inf).softmax(-1) @ v

# %% wrong: scaled by D
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat_interleave(n_heads // len(z), dim=0) for z in (k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (q @ k.mT / D).masked_fill(future, -math.inf).softmax(-1) @ v

# %% wrong: the next position is seen as well
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat_interleave(n_heads // len(z), dim=0) for z in (k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(2)
    return (q @ k.mT / math.sqrt(D)).masked_fill(future, -math.inf).softmax(-1) @ v

# %% wrong: the future scores 0, which is a score like others
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat_interleave(n_heads // len(z), dim=0) for z in (k, v))
    return (q @ k.mT / math.sqrt(D)).tril().softmax(-1) @ v

# %% wrong: hidden after the softmax, so that the weights no longer add up to 1
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat_interleave(n_heads // len(z), dim=0) for z in (k, v))
    return (q @ k.mT / math.sqrt(D)).softmax(-1).tril() @ v

# %% wrong: query heads take turns at the key heads
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat(n_heads // len(z), 1, 1) for z in (k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (q @ k.mT / math.sqrt(D)).masked_fill(future, -math.inf).softmax(-1) @ v

# %% wrong: softmax over the queries
def attention_by_hand(q, k, v):
    n_heads, T, D = q.shape
    k, v = (z.repeat_interleave(n_heads // len(z), dim=0) for z in (k, v))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (q @ k.mT / math.sqrt(D)).masked_fill(future, -math.inf).softmax(-2) @ v
