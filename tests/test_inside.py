"""Looking inside: what is shown is what the model computes, whatever its shape, and nothing that is changed stays changed."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.config import ModelConfig
from llm_course.decoding import fast_engine, has_hooks
from llm_course.files import UserError
from llm_course.generation import PlainEngine, generate
from llm_course.gpt import GPT
from llm_course.interpret import (
    attention_weights,
    hook_points,
    logit_lens,
    ov_logits,
    patched,
    run_with_cache,
)


def built(config: ModelConfig, seed: int = 0) -> GPT:
    "A model at random, the gains of its norms as well."
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 2)
    return model


@st.composite
def models(draw):
    "Small ones of every kind: grouped queries, heads wider than the stream over their number, tied tables or two."
    n_kv_heads, group, head_dim = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        2 * draw(st.integers(1, 4)),
    )
    return built(
        ModelConfig(
            draw(st.integers(1, 3)),
            12,
            n_kv_heads * group,
            n_kv_heads,
            20,
            31,
            24,
            head_dim=head_dim,
            tie_embeddings=draw(st.booleans()),
        ),
        seed=draw(st.integers(0, 9)),
    )


def some_ids(T: int, B: int = 2) -> torch.Tensor:
    return torch.randint(0, 31, (B, T), generator=torch.Generator().manual_seed(T))


@given(models(), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_stream_is_the_sum_of_what_was_recorded(model, T):
    "Every block adds, and the lens at the end reads what the model says; with looking, the logits are to the bit what they are without."
    ids, L = some_ids(T), model.config.n_layers
    record = run_with_cache(model, ids)
    for l in range(L):
        after = record[f"stream.{l}"] + record[f"attention.{l}"] + record[f"mlp.{l}"]
        torch.testing.assert_close(record[f"stream.{l + 1}"], after)
    torch.testing.assert_close(logit_lens(model, record[f"stream.{L}"]), record["logits"])
    with torch.no_grad():
        assert torch.equal(model(ids), record["logits"])
    assert set(record) == {*hook_points(model), "logits"} and set(
        run_with_cache(model, ids, "mlp.0")
    ) == {"mlp.0", "logits"}


@given(models(), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_weights_are_those_that_the_heads_use(model, T):
    "With the values they give what the heads have taken, also where several query heads share a key head."
    ids, c = some_ids(T), model.config
    for layer, block in enumerate(model.model.layers):
        record, weights = run_with_cache(model, ids), attention_weights(model, ids, layer)
        assert weights.shape == (2, c.n_heads, T, T) and not weights.triu(1).any()
        with torch.no_grad():
            v = block.self_attn.v_proj(block.input_layernorm(record[f"stream.{layer}"]))
        v = (
            v.unflatten(-1, (-1, c.head_dim))
            .transpose(1, 2)
            .repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
        )
        torch.testing.assert_close(
            (weights @ v).transpose(1, 2).flatten(2), record[f"heads.{layer}"]
        )


@given(models())
@settings(max_examples=40, deadline=None)
def test_what_heads_write_adds_up_to_what_attention_adds(model):
    "A text of one token leaves attention nothing else to look at, so its first block adds what the heads write for that token."
    ids = torch.arange(31)
    written = sum(ov_logits(model, 0, head, ids) for head in range(model.config.n_heads))
    added = run_with_cache(model, ids[:, None], "attention.0")["attention.0"][:, 0]
    with torch.no_grad():
        torch.testing.assert_close(
            written, F.linear(added * model.model.norm.weight, model.head), atol=1e-5, rtol=1e-4
        )


def a_model() -> GPT:
    return built(ModelConfig(2, 12, 2, 1, 20, 31, 24))


def test_every_place_decides_something():
    "A change at any of them changes what the model says; and the changes end with the block, an error inside included."
    model, ids = a_model(), some_ids(6)
    with torch.no_grad():
        before = model(ids)
    for place in hook_points(model):
        with patched(model, {place: lambda x: x.flip(-1) + 1}), torch.no_grad():
            assert not torch.allclose(model(ids), before), place
        with pytest.raises(ZeroDivisionError), patched(model, {place: torch.zeros_like}):
            1 / 0
        with torch.no_grad():
            assert torch.equal(model(ids), before)


def test_changes_can_be_laid_over_each_other():
    "Two at a time, and one inside the other, which sees what the outer one has made."
    model, ids = a_model(), some_ids(6)
    ends = f"stream.{model.config.n_layers}"
    with (
        patched(model, {ends: lambda x: x + 1}),
        patched(model, {ends: lambda x: 2 * x, "mlp.0": torch.zeros_like}),
    ):
        inner = run_with_cache(model, ids)
    with patched(model, {"mlp.0": torch.zeros_like}):
        plain = run_with_cache(model, ids)
    torch.testing.assert_close(inner[ends], 2 * (plain[ends] + 1))


def test_a_change_holds_for_writing():
    "With a cache as without: no packed copy goes past it."
    model, without_cache = a_model(), partial(PlainEngine, use_cache=False)
    before = generate(model, [1, 2, 3], 12, temperature=0, engine=fast_engine)
    with patched(model, {"stream.1": lambda x: x.flip(-1)}):
        texts = [
            generate(model, [1, 2, 3], 12, temperature=0, engine=engine)
            for engine in (fast_engine, PlainEngine, without_cache)
        ]
    assert (
        texts[0]
        == texts[1]
        == texts[2]
        != before
        == generate(model, [1, 2, 3], 12, temperature=0, engine=fast_engine)
    )


def test_a_change_may_work_in_place():
    "What it writes over is gone for the model, and for no record of before."
    model, ids = a_model(), some_ids(6)
    before = run_with_cache(model, ids)
    with patched(model, {"mlp.0": lambda x: x.zero_()}):
        after = run_with_cache(model, ids)
    assert before["mlp.0"].any() and torch.equal(
        after["stream.1"], before["stream.0"] + before["attention.0"]
    )


def test_every_place_has_all_positions():
    "Also behind the last block, where only the last one is wanted: a change that counts positions counts right."
    model, ids, seen = a_model(), some_ids(6), {}
    with (
        patched(
            model,
            {
                place: lambda x, place=place: seen.setdefault(place, x)
                for place in hook_points(model)
            },
        ),
        torch.no_grad(),
    ):
        model(ids, last_only=True)
    assert set(seen) == set(hook_points(model)) and {x.shape[:2] for x in seen.values()} == {(2, 6)}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stream.3": torch.relu}, "no hook point 'stream.3'.*stream.2"),
        ({"mlp.0": lambda x: None}, "mlp.0 gives back NoneType"),
        (
            {"stream.0": lambda x: x[:1]},
            r"gives back \(1, 6, 12\), and should give a tensor of shape \(2, 6, 12\)",
        ),
    ],
)
def test_a_mistake_is_a_sentence(changes, said):
    "And leaves no hook behind."
    model, ids = a_model(), some_ids(6)
    with (
        pytest.raises(UserError, match=said),
        patched(model, {"mlp.1": torch.zeros_like, **changes}),
    ):
        model(ids)
    with torch.no_grad():
        assert torch.equal(model(ids), run_with_cache(model, ids)["logits"])
    assert not has_hooks(model)
