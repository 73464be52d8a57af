"Sampling and generation: the filters against naive references, every engine against the plain one, and every promise of `generate`."

import copy
import gc
import math
from functools import partial
from itertools import combinations_with_replacement

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_course import decoding
from llm_course.config import ModelConfig
from llm_course.decoding import PRECISIONS, GraphEngine, PackedEngine, can_pack, fast_engine
from llm_course.files import UserError
from llm_course.generation import PlainEngine, TextSession, generate, generate_text, stream_text
from llm_course.gpt import GPT
from llm_course.kernels import accelerate
from llm_course.sampling import (
    SamplingParams,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    multinomial,
    penalize_repeats,
)
from llm_course.shapes import ShapeError
from llm_course.tales import sample_tales
from llm_course.tokenizer import train_tokenizer

CONTEXT = 24
PROMPT = [1, 50, 60]
WITHOUT_CACHE = partial(PlainEngine, use_cache=False)
ENGINES = {"plain": PlainEngine, "without a cache": WITHOUT_CACHE, "fast": fast_engine}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sample_tales(7, 20), vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            n_layers=2,
            d_model=32,
            n_heads=4,
            n_kv_heads=2,
            d_ff=48,
            vocab_size=tokenizer.vocab_size,
            seq_len=CONTEXT,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim == 2 else 1)
    return model.eval()


class Scripted(torch.nn.Module):
    "A model that is certain: after token n comes n + 1, and after the last one the first."

    def __init__(self, vocab_size: int = 10, seq_len: int = 8):
        super().__init__()
        self.config = ModelConfig(
            n_layers=1,
            d_model=8,
            n_heads=1,
            n_kv_heads=1,
            d_ff=8,
            vocab_size=vocab_size,
            seq_len=seq_len,
        )
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, ids, targets=None, cache=None, last_only=False):
        self.seen.append(ids.tolist())
        return (
            50.0
            * torch.nn.functional.one_hot(
                (ids + 1) % self.config.vocab_size, self.config.vocab_size
            ).float()
        )


# ---- the filters


def rows(width: int = 6) -> st.SearchStrategy:
    "Logits (B, V): finite float32, ties and all."
    number = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -1.0])
    return st.integers(1, 3).flatmap(
        lambda b: st.integers(1, width).flatmap(
            lambda v: st.lists(
                st.lists(number, min_size=v, max_size=v), min_size=b, max_size=b
            ).map(torch.tensor)
        )
    )


@given(rows(), st.integers(1, 8))
def test_top_k_keeps_the_k_largest(logits, k):
    for row, kept in zip(logits, keep_top_k(logits, k)):
        kth = sorted(row.tolist(), reverse=True)[: max(k, 1)][-1]
        assert kept.tolist() == [x if x >= kth else -math.inf for x in row.tolist()]


@given(rows(), st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    for row, cut in zip(logits, keep_top_p(logits, p)):
        kept = cut.isfinite()
        probs = row.double().softmax(0)
        assert torch.equal(cut[kept], row[kept]) and kept.any()
        assert probs[kept].sum() >= p - 1e-5  # it reaches p …
        assert probs[kept].sum() - probs[kept].min() < p + 1e-5  # … and no smaller set does:
        if not kept.all():  # nothing that was cut is likelier than anything kept
            assert row[~kept].max() <= row[kept].min()


@given(rows(), st.floats(0.001, 1.0))
def test_min_p_keeps_what_is_not_much_less_likely_than_the_best(logits, p):
    probs = logits.double().softmax(-1)
    share = probs / probs.amax(-1, keepdim=True)
    kept = keep_min_p(logits, p).isfinite()
    assert kept[share > p * (1 + 1e-4)].all() and not kept[share < p * (1 - 1e-4)].any()
    assert kept.gather(1, logits.argmax(-1, keepdim=True)).all()


@given(rows(), st.floats(1.0, 5.0), st.data())
def test_a_repeated_token_never_gains(logits, penalty, data):
    seen = torch.tensor([[data.draw(st.booleans()) for _ in row] for row in logits])
    found = penalize_repeats(logits, seen, penalty)
    assert torch.equal(found[~seen], logits[~seen]) and (found[seen] <= logits[seen]).all()


@settings(deadline=None)
@given(rows(), st.floats(1e-6, 100))
def test_temperature_divides_logits(logits, temperature):
    found = apply_temperature(logits, temperature).softmax(-1)
    torch.testing.assert_close(
        found, (logits.double() / temperature).softmax(-1).float(), rtol=2e-3, atol=1e-5
    )


SETTINGS = {  # every parameter of a sampler, over all that it admits
    "temperature": st.floats(0, allow_infinity=False),
    "top_k": st.integers(0, 2**70),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, exclude_min=True, allow_infinity=False),
}
EXTREMES = [
    *(dict(temperature=t) for t in (5e-324, 1e-300, 1e-46, 1e-38, 1.7e308)),
    *(dict(top_p=p) for p in (5e-324, 1e-300, 1e-46, math.nextafter(1, 0))),
    *(dict(min_p=p) for p in (5e-324, 1e-300, 1.0)),
    *(dict(repetition_penalty=p) for p in (5e-324, 1e-300, 1e-46, 1e46, 1.7e308)),
    *(dict(top_k=k) for k in (1, 2**31, 2**70)),
]


def logits_of_any_size() -> st.SearchStrategy:
    "Logits (B, V) that are ordinary, huge, tiny, or all equal."
    sizes = {
        "ordinary": 30,
        "huge": torch.finfo(torch.float32).max,
        "tiny": torch.finfo(torch.float32).tiny,
    }
    number = st.sampled_from(sorted(sizes)).flatmap(
        lambda size: st.floats(-sizes[size], sizes[size], width=32, allow_subnormal=True)
    )
    row = st.integers(1, 8).flatmap(
        lambda v: st.lists(number, min_size=v, max_size=v) | number.map(lambda x: [x] * v)
    )
    return row.map(lambda row: torch.tensor([row, row[::-1]]))


def check_probabilities(logits: torch.Tensor, seen: torch.Tensor, options: dict) -> torch.Tensor:
    "What holds of every sampler: finite numbers that sum to 1, a token at least, and greedy's choice is among the likeliest."
    probs = SamplingParams(**options).probabilities(logits, seen)
    assert (
        probs.shape == logits.shape
        and probs.dtype == logits.dtype
        and probs.isfinite().all()
        and (probs >= 0).all()
    )
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits)), atol=1e-5, rtol=0)
    best = (
        SamplingParams(temperature=0, repetition_penalty=options.get("repetition_penalty", 1))
        .probabilities(logits, seen)
        .argmax(-1)
    )
    assert torch.equal(probs[range(len(probs)), best], probs.amax(-1))
    assert (
        probs[range(len(probs)), multinomial(probs, torch.full((len(probs),), 1 - 2**-24))] > 0
    ).all()
    return probs


@settings(deadline=None, max_examples=200)
@given(
    logits_of_any_size(),
    st.sets(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=2),
    st.data(),
)
def test_whatever_is_admitted_leaves_probabilities(logits, names, data):
    "Each parameter over its whole range, alone and in pairs."
    seen = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=logits.numel(), max_size=logits.numel()))
    ).view(logits.shape)
    check_probabilities(
        logits, seen, {name: data.draw(SETTINGS[name], name) for name in sorted(names)}
    )


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(
    "logits",
    [[1.0, 3.0, -2.0, 2.0], [0.0] * 4, [3e38, -3e38, 0, 1.0], [1e-45, 3e-45, -1e-45, 0]],
    ids=str,
)
def test_the_extremes_in_pairs(logits, seen):
    "What underflows or overflows a float32 or a float64, with each other."
    logits = torch.tensor([logits])
    for one, other in combinations_with_replacement(EXTREMES, 2):
        check_probabilities(logits, torch.full_like(logits, seen, dtype=torch.bool), one | other)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=5e-324),
        dict(temperature=1e-46),
        dict(top_p=5e-324),
        dict(top_p=1e-300),
        dict(min_p=1.0),
        dict(top_k=1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "logits", [[1.0, 3.0, -2.0, 2.0], [3e38, 3.1e38, 0, -3e38], [1e-38, 2e-38, 0, -1e-38]], ids=str
)
def test_where_one_token_may_come_it_is_greedys(logits, options):
    probs = check_probabilities(
        torch.tensor([logits]), torch.zeros(1, 4, dtype=torch.bool), options
    )
    assert probs.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    "cut",
    [
        lambda z: apply_temperature(z, 1e-46),
        lambda z: keep_top_p(z, 1e-300),
        lambda z: keep_min_p(z, 5e-324),
        lambda z: keep_top_k(z, 2**70),
        lambda z: penalize_repeats(z, z > -9, 1e-300),
        lambda z: penalize_repeats(z, z > -9, 1e300),
    ],
)
def test_each_filter_alone_leaves_a_token(cut):
    "In float32 too, where 1e-300 is 0."
    found = cut(torch.tensor([[1.0, 3.0, 0.0, 2.0]]))
    assert found.argmax() == 1 and found.amax().isfinite() and found.softmax(-1).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_said(bad):
    "Not the token to which a NaN happens to lead. What a caller has masked is no fault."
    logits, nothing = torch.tensor([[0.0, bad, 1.0]]), torch.zeros(1, 3, dtype=torch.bool)
    for options in dict(temperature=0), dict(), dict(top_p=0.5):
        with pytest.raises(UserError, match="NaN or infinity"):
            SamplingParams(**options).probabilities(logits, nothing)
    assert (
        SamplingParams(repetition_penalty=2).probabilities(
            torch.tensor([[0.0, -math.inf, 1.0]]), ~nothing
        )[0, 1]
        == 0
    )


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 10**30])
def test_any_whole_number_is_a_seed(model, seed):
    "Each sample has the seed after that of the one before, beyond the generator's range too."
    both = generate(model, PROMPT, 5, seed=seed, n_samples=2)
    assert both == [generate(model, PROMPT, 5, seed=seed + row)[0] for row in range(2)]


def test_equal_logits_lose_no_more_than_they_must():
    "Ties: top-p takes as many as are needed, top-k all that tie, min-p all."
    even = torch.zeros(1, 8)
    assert keep_top_p(even, 0.5).isfinite().sum() == 4
    assert keep_top_k(even, 3).isfinite().all() and keep_min_p(even, 1.0).isfinite().all()


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda p: sum(p) > 0.1),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_what_has_no_probability_is_never_drawn(weights, u):
    probs = torch.tensor([weights]) / sum(weights)
    assert probs[0, multinomial(probs, torch.tensor([u]))[0]] > 0


def test_draws_are_as_frequent_as_they_are_likely():
    probs = torch.tensor([[0.05, 0.6, 0.0, 0.35]])
    hits = multinomial(
        probs.expand(40_000, -1), torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    ).bincount(minlength=4)
    torch.testing.assert_close(hits / 40_000, probs[0], atol=0.01, rtol=0)


def test_a_wrong_shape_is_named():
    with pytest.raises(ShapeError, match="logits"):
        keep_top_p(torch.zeros(5), 0.9)


# ---- engines


@pytest.mark.parametrize("n", [5, CONTEXT, 3 * CONTEXT])
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0),
        dict(seed=3),
        dict(seed=4, temperature=0.7, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    ],
)
def test_no_engine_changes_a_token(model, n, options):
    "Also past the context, where all keep the newest half."
    cached, *others = (
        generate(model, PROMPT, n, n_samples=3, engine=engine, **options)
        for engine in ENGINES.values()
    )
    assert others == [cached] * 2
    assert [len(sample) for sample in cached] == [n] * 3


def test_greedy_is_argmax_step_by_step(model):
    ids = list(PROMPT)
    for _ in range(15):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, PROMPT, 15, temperature=0) == [ids[3:]]


class Counting:
    "An engine that counts the tokens of a row, each time that it reads."

    def __init__(self, inner, read: list[int]):
        self.inner, self.counts, self.reset = inner, read, inner.reset

    def read(self, ids):
        self.counts.append(ids.shape[1])
        return self.inner.read(ids)


def counting(engine, read: list[int]):
    "A maker of engines that count into `read`."
    return lambda model, batch: Counting(engine(model, batch), read)


@pytest.mark.parametrize("engine", [PlainEngine, fast_engine])
def test_the_cache_reads_each_token_once(model, engine):
    read = []
    generate(model, PROMPT, 10, temperature=0, engine=counting(engine, read))
    assert read == [3] + [1] * 9


def test_past_the_context_the_newest_half_is_read_again():
    model, told = Scripted(), []
    assert generate(model, [0], 20, temperature=0, engine=WITHOUT_CACHE, log=told.append) == [
        [n % 10 for n in range(1, 21)]
    ]
    assert max(len(ids[0]) for ids in model.seen) == 8
    assert model.seen[7:9] == [[[0, 1, 2, 3, 4, 5, 6, 7]], [[5, 6, 7, 8]]]
    assert len(told) == 1 and "context of 8" in told[0]


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_prompt_longer_than_the_context_keeps_its_newest_tokens(model, engine):
    told = []
    prompt = [1, *range(100, 160)]
    found = generate(model, prompt, 30, temperature=0, engine=engine, log=told.append)
    assert found == generate(model, prompt[-CONTEXT:], 30, temperature=0)
    assert len(told) == 1 and "61 tokens" in told[0] and "37" in told[0]


def test_a_context_of_one_token_still_writes():
    assert generate(Scripted(seq_len=1), [0], 5, temperature=0, engine=WITHOUT_CACHE) == [
        [1, 2, 3, 4, 5]
    ]


# ---- packed for generation

SHAPES = {
    "grouped": dict(n_layers=2, d_model=24, n_heads=6, n_kv_heads=2, d_ff=40),
    "wide heads": dict(n_layers=1, d_model=16, n_heads=3, n_kv_heads=3, d_ff=20, head_dim=10),
    "one key head": dict(
        n_layers=3,
        d_model=32,
        n_heads=4,
        n_kv_heads=1,
        d_ff=48,
        tie_embeddings=False,
        rope_theta=500.0,
    ),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.005}  # root mean square, of the logits' spread


def random_model(shape: str, seed: int = 0, seq_len: int = CONTEXT) -> GPT:
    "Of weights so large that logits differ, gains included."
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**SHAPES[shape], vocab_size=97, seq_len=seq_len)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5) if weight.ndim == 2 else weight.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 9),
    pieces=st.lists(st.integers(1, 8), min_size=1, max_size=6).filter(lambda p: sum(p) <= CONTEXT),
    seed=st.integers(0, 2**16),
    intel=st.booleans(),
)
@example(batch=1, pieces=[5, 1, 2], seed=0, intel=False)
@example(batch=1, pieces=[5, 1, 2], seed=0, intel=True)
def test_a_packed_engine_gives_the_logits_of_the_model(
    shape, precision, batch, pieces, seed, intel
):
    "However the text is cut into pieces, for every shape of model and number of samples, on whatever processor."
    if not can_pack(precision):
        pytest.skip(f"no library for {precision} here")
    model = random_model(shape)
    ids = torch.randint(97, (batch, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "on_intel", lambda: intel)
        decoder = PackedEngine(model, batch, precision)
    for piece in ids.split(pieces, dim=1):
        found = decoder.read(piece)
    with torch.no_grad():
        exact = model(ids)[:, -1]
    assert found.dtype == torch.float32 and decoder.cache.length == sum(pieces)
    assert (found - exact).pow(2).mean().sqrt() <= TOLERANCE[precision] * exact.std()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_engine_reads_a_long_prompt_as_the_model_does(shape, precision):
    "Of several blocks of attention, the last one short; and goes on where it ends, with one token and with many."
    if not can_pack(precision):
        pytest.skip(f"no library for {precision} here")
    model, ids = (
        random_model(shape, seq_len=600),
        torch.randint(97, (2, 600), generator=torch.Generator().manual_seed(1)),
    )
    decoder, end = PackedEngine(model, 2, precision), 0
    for piece in ids.split([450, 1, 149], dim=1):
        found, end = decoder.read(piece), end + piece.shape[1]
        with torch.no_grad():
            exact = model(ids[:, :end])[:, -1]
        assert (found - exact).pow(2).mean().sqrt() <= TOLERANCE[precision] * exact.std()
    with pytest.raises(
        ValueError, match="holds 600 positions: 600 are filled and 1 more do not fit"
    ):
        decoder.read(ids[:, :1])


class Played(GraphEngine):
    "A GraphEngine for a machine without a GPU: what would be recorded is computed each time, into the same tensor."

    def record(self, seen):
        logits = self.one_token(seen).clone()
        return lambda: logits.copy_(self.one_token(seen)), logits


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_gpu_records_is_the_model(shape, compiled, monkeypatch):
    "At every position from a prompt on, over three recordings, and again from the beginning; the blocks compiled, or not."
    monkeypatch.setattr(
        decoding,
        "packed",
        lambda precision, batch, *weights: partial(F.linear, weight=torch.cat(weights).detach()),
    )
    model, text = (
        random_model(shape, seq_len=600),
        torch.randint(97, (2, 600), generator=torch.Generator().manual_seed(1)),
    )
    if compiled:
        accelerate(model, compile=True)
    compile = (
        torch.compile
    )  # without C++: its compiler does not find a torch whose path has a space
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **_: compile(function, dynamic=False, backend="aot_eager"),
    )
    decoder = Played(model, 2)
    for ids in (text, text.roll(7, 1)):
        decoder.reset()
        decoder.read(ids[:, :240])
        with torch.no_grad():
            exact = model(ids)
        for at in range(240, 600):
            found = decoder.read(ids[:, at : at + 1])
            if at in (240, 255, 256, 257, 511, 512, 599):
                assert (found - exact[:, at]).abs().max() <= 1e-4 * exact.std(), at
    assert list(decoder.recorded) == [256, 512, 600]
    with pytest.raises(ValueError, match="1 more do not fit"):
        decoder.read(text[:, :1])


@pytest.mark.parametrize("shape", SHAPES)
def test_all_engines_write_the_same_text(shape):
    "Packed, plain with a cache, plain without one: also past the context, and for several samples."
    model = random_model(shape)
    with torch.no_grad():
        model.head.mul_(0.2)  # less certain: many tokens may come
    options = dict(seed=3, n_samples=3, top_p=0.95)
    texts = [
        generate(model, PROMPT, 3 * CONTEXT, engine=engine, **options)
        for engine in ENGINES.values()
    ]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0][0])) > 9


@pytest.mark.parametrize("change", ["step", "load", "data", "swap"])
def test_a_changed_weight_is_a_changed_text(change):
    "Packed weights are kept, but never longer than they are true."
    model = random_model("grouped")
    before = generate(model, PROMPT, 15, temperature=0, engine=fast_engine)
    table = model.model.embed_tokens.weight
    if change == "step":
        model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
    elif change == "load":
        model.load_state_dict(random_model("grouped", seed=1).state_dict())
    elif change == "data":
        table.data[:50] += 1
    else:
        with torch.no_grad():
            table.copy_(table.flip(0))
    after = generate(model, PROMPT, 15, temperature=0, engine=fast_engine)
    assert (
        after == generate(model, PROMPT, 15, temperature=0, engine=WITHOUT_CACHE)
        and after != before
    )


def test_packed_weights_are_kept_and_go_with_their_model():
    "A model that writes twice is packed once, one in training never keeps a copy, and a model that is gone leaves none."
    model = random_model("grouped")
    first, second = (PackedEngine(model, 1).weights for _ in range(2))
    assert first is second and PackedEngine(model.train(), 1).weights is first
    other = random_model("grouped", seed=1).train()
    assert PackedEngine(other, 1).weights is not PackedEngine(other, 1).weights
    kept = len(decoding._packed)
    del model, first, second
    gc.collect()
    assert len(decoding._packed) == kept - 1


def test_what_cannot_be_packed_is_read_as_it_is(model, monkeypatch):
    "Other dtypes and other classes take the plain engine; another precision is then refused in a sentence."
    assert isinstance(fast_engine(model, 1), PackedEngine)
    for plain in (copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()):
        assert isinstance(fast_engine(plain, 1), PlainEngine)
        with pytest.raises(UserError, match="precision is bf16"):
            fast_engine(plain, 1, "bf16")
    with pytest.raises(UserError, match="one of fp32, bf16, fp16"):
        fast_engine(model, 1, "int3")
    monkeypatch.setattr(decoding, "can_pack", lambda precision: False)
    assert isinstance(fast_engine(model, 1), PlainEngine)
    with pytest.raises(UserError, match="choose fp32"):
        fast_engine(model, 1, "fp16")


def test_a_hook_is_not_gone_past(model):
    "Who changes what flows in a model gets the text of the changed model from every engine; and the old one when the hook is gone."
    write = partial(generate, model, PROMPT, 15, temperature=0)
    before = write(engine=fast_engine)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: -9 * out)
    texts = [write(engine=engine) for engine in ENGINES.values()]
    assert texts[0] == texts[1] == texts[2] != before
    with pytest.raises(UserError, match="no hooks"):
        fast_engine(model, 1, "bf16")
    hook.remove()
    assert write(engine=fast_engine) == before


# ---- samples, seeds, stopping


def test_a_seed_decides_everything(model):
    assert generate(model, PROMPT, 20, seed=1) == generate(model, PROMPT, 20, seed=1)
    assert generate(model, PROMPT, 20, seed=1) != generate(model, PROMPT, 20, seed=2)
    assert generate(model, PROMPT, 20) != generate(model, PROMPT, 20)


def test_generation_leaves_the_global_random_state_alone(model):
    before = torch.get_rng_state()
    generate(model, PROMPT, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_sample_i_depends_on_seed_plus_i_alone(model):
    many = generate(model, PROMPT, 15, seed=10, n_samples=4)
    assert many == [generate(model, PROMPT, 15, seed=10 + i)[0] for i in range(4)]
    assert len({tuple(sample) for sample in many}) == 4


def test_each_sample_stops_on_its_own(model):
    free = generate(model, PROMPT, 60, seed=0, n_samples=6)
    stop = free[0][7]
    stopped = generate(model, PROMPT, 60, seed=0, n_samples=6, stop_id=stop)
    for long, short in zip(free, stopped):
        end = long.index(stop) + 1 if stop in long else len(long)
        assert short == long[:end]
    assert len({len(sample) for sample in stopped}) > 1


def test_work_ends_with_the_last_sample():
    model = Scripted()
    assert (
        generate(model, [0], 1000, temperature=0, stop_id=4, engine=WITHOUT_CACHE, n_samples=2)
        == [[1, 2, 3, 4]] * 2
    )
    assert len(model.seen) == 4


def test_on_token_hears_each_token_of_each_running_sample(model):
    heard = [[], []]
    samples = generate(
        model, PROMPT, 12, seed=0, n_samples=2, on_token=lambda row, token: heard[row].append(token)
    )
    assert heard == samples


def test_the_repetition_penalty_keeps_tokens_from_coming_again_but_not_the_end():
    model = Scripted(vocab_size=4)
    assert generate(model, [0], 4, temperature=0, engine=WITHOUT_CACHE) == [[1, 2, 3, 0]]
    assert generate(
        model, [1], 3, temperature=0, engine=WITHOUT_CACHE, stop_id=0, repetition_penalty=1e6
    ) == [[2, 3, 0]]


def test_generation_under_autocast_and_without_grad(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(generate(model, PROMPT, 10, seed=0)[0]) == 10
    assert torch.is_grad_enabled()


# ---- texts


def test_texts_begin_with_the_prompt_and_do_not_show_the_end(model, tokenizer):
    texts = generate_text(model, tokenizer, "Once upon a time", 30, seed=0, n_samples=3)
    assert len(texts) == 3 and all(
        text.startswith("Once upon a time") and "</s>" not in text for text in texts
    )


def test_an_empty_prompt_begins_a_document(model, tokenizer):
    [text] = generate_text(model, tokenizer, "", 10, seed=0)
    [ids] = generate(model, [tokenizer.eos_id], 10, seed=0, stop_id=tokenizer.eos_id)
    assert text == tokenizer.decode([i for i in ids if i != tokenizer.eos_id])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_streamed_pieces_are_the_written_text(model, tokenizer, seed):
    "Random weights write random bytes: the hardest case for whole characters."
    pieces = list(stream_text(model, tokenizer, "Once", 20, seed=seed))
    assert "Once" + "".join(pieces) == generate_text(model, tokenizer, "Once", 20, seed=seed)[0]


@pytest.mark.parametrize("engine", [PlainEngine, fast_engine])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_session_that_pauses_writes_the_same_text(model, tokenizer, engine, seed):
    "In parts of any size, characters of several bytes among them; then it has ended, or goes on."
    session = TextSession(model, tokenizer, "Once", seed=seed, engine=engine)
    pieces = [piece for size in (1, 5, 0, 14) for piece in session.generate(size)]
    whole = generate_text(model, tokenizer, "Once", 20, seed=seed)[0]
    assert session.text == "Once" + "".join(pieces) and whole.startswith(session.text)
    assert (
        session.text == whole or whole.removeprefix(session.text) == "\ufffd"
    )  # bytes of a character that is not whole yet


def test_a_stream_is_lazy(model, tokenizer):
    read = []
    next(
        iter(
            stream_text(
                model, tokenizer, "Once", 10_000, temperature=0, engine=counting(PlainEngine, read)
            )
        )
    )
    assert 1 <= len(read) <= 5


@pytest.mark.parametrize(
    "mistake, words",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=-5), "max_new_tokens is -5"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_p=1.01), "top_p is 1.01"),
        (dict(min_p=-0.1), "min_p is -0.1"),
        (dict(min_p=2), "min_p is 2"),
        (dict(repetition_penalty=0), "repetition_penalty is 0"),
    ],
)
def test_mistakes_name_the_option(model, tokenizer, mistake, words):
    "At once, also for a stream: before anything is written."
    with pytest.raises(UserError, match=words) as caught:
        generate_text(model, tokenizer, "Once", **mistake)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=words):
        stream_text(model, tokenizer, "Once", **mistake)


def test_other_mistakes_are_sentences(model, tokenizer):
    with pytest.raises(UserError, match="n_samples is 0"):
        generate_text(model, tokenizer, "Once", n_samples=0)
    with pytest.raises(UserError, match="no tokens"):
        generate(model, [], 5)
    with pytest.raises(UserError, match="tokenizer"):
        generate(model, [1, 100_000], 5)
