"""Attention: causality, agreement with its definition, the cache, the shape checks and their sentences."""

import math
import re
from typing import NamedTuple

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float
from torch import Tensor

from llm_course.attention import (
    Attention,
    KVCache,
    RMSNorm,
    apply_rope,
    causal_attention,
    rope_table,
)
from llm_course.shapes import ShapeError, shape_checked


class Sizes(NamedTuple):
    d_model: int = 7
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 8
    norm_eps: float = 1e-6


@st.composite
def problems(draw):
    """An attention of random sizes, its input (B, T, C), and a random number generator's seed."""
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = Sizes(
        draw(st.integers(1, 9)), n_kv_heads * group, n_kv_heads, 2 * draw(st.integers(1, 4))
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return (
        Attention(sizes),
        sizes,
        torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 9)), sizes.d_model),
    )


def table(start: int, end: int, sizes: Sizes = Sizes()):
    return rope_table(torch.arange(start, end), sizes.head_dim)


def by_definition(module: Attention, sizes: Sizes, x: Tensor) -> Tensor:
    """The whole module in float64, one number at a time where it matters; shares no code with the package."""
    B, T, D = *x.shape[:2], sizes.head_dim
    weight = {name: p.detach().double() for name, p in module.named_parameters()}

    def head(name: str, h: int, row: Tensor, position: int, norm: bool) -> Tensor:
        vector = weight[f"{name}_proj.weight"][h * D : (h + 1) * D] @ row.double()
        if not norm:
            return vector
        vector = (
            vector
            / math.sqrt((vector**2).mean().item() + sizes.norm_eps)
            * weight[f"{name}_norm.weight"]
        )
        turned = vector.clone()
        for i in range(D // 2):
            angle = position / 10_000 ** (2 * i / D)
            a, b = vector[i].item(), vector[i + D // 2].item()
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    out = torch.zeros(B, T, sizes.n_heads * D, dtype=torch.float64)
    for b in range(B):
        for h in range(sizes.n_heads):
            g = h // (sizes.n_heads // sizes.n_kv_heads)
            keys = [head("k", g, x[b, s], s, True) for s in range(T)]
            values = [head("v", g, x[b, s], s, False) for s in range(T)]
            for t in range(T):
                query = head("q", h, x[b, t], t, True)
                interest = [math.exp(query @ keys[s] / math.sqrt(D)) for s in range(t + 1)]
                out[b, t, h * D : (h + 1) * D] = sum(
                    w / sum(interest) * values[s] for s, w in enumerate(interest)
                )
    return out @ weight["o_proj.weight"].T


@given(problems(), st.data())
@settings(max_examples=60, deadline=None)
def test_no_position_sees_the_future_and_the_last_sees_all(problem, data):
    """A change at one position changes nothing before it, and something at it."""
    module, sizes, x = problem
    s = data.draw(st.integers(0, x.shape[1] - 1))
    changed = x.clone()
    changed[:, s] += torch.randn(sizes.d_model) + 1
    before, after = (module(z, *table(0, x.shape[1], sizes)) for z in (x, changed))
    assert torch.allclose(before[:, :s], after[:, :s], atol=1e-6)
    assert not torch.equal(before[:, s], after[:, s])


@given(problems())
@settings(max_examples=25, deadline=None)
def test_the_module_is_the_definition(problem):
    """Projections, norms, rotation, grouping, softmax and the way back agree with a loop in float64."""
    module, sizes, x = problem
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
        out = module(x, *table(0, x.shape[1], sizes))
    assert torch.allclose(out.double(), by_definition(module, sizes, x), atol=2e-5)


@given(problems(), st.data())
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_the_cache_changes_nothing_however_the_row_is_cut(problem, data):
    """Any chunks give what the whole row gives."""
    module, sizes, x = problem
    T = x.shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1)))) if T > 1 else []
    cache, outs = KVCache(1, len(x), sizes.n_kv_heads, T + 1, sizes.head_dim), []
    for start, end in zip([0, *cuts], [*cuts, T]):
        outs.append(module(x[:, start:end], *table(start, end, sizes), cache))
        cache.advance(end - start)
    assert cache.length == T
    assert torch.allclose(torch.cat(outs, dim=1), module(x, *table(0, T, sizes)), atol=1e-5)


def test_layers_keep_their_own_keys_and_the_cache_can_begin_again():
    """Layer 1 does not read layer 0; length = 0 forgets everything."""
    cache, (k, v) = KVCache(2, 1, 2, 4, 8), torch.randn(2, 1, 2, 3, 8)
    cache.update(0, k, v)
    assert torch.equal(cache.update(1, v, k)[0], v) and torch.equal(cache.update(0, k, v)[0], k)
    cache.advance(3)
    cache.length = 0
    assert cache.update(0, v[:, :, :1], k[:, :, :1])[0].shape == (1, 2, 1, 8)


def test_a_full_cache_says_so_and_keeps_what_it_has():
    """Overflow is one sentence with the numbers in it, and writes nothing."""
    cache, k = KVCache(1, 1, 2, 4, 8), torch.ones(1, 2, 3, 8)
    cache.update(0, k, k)
    cache.advance(3)
    before = cache.k.clone()
    with pytest.raises(
        ValueError, match=r"The cache holds 4 positions: 3 are filled and 3 more do not fit\."
    ):
        cache.update(0, 2 * k, 2 * k)
    assert torch.equal(cache.k, before) and cache.length == 3


def test_the_cache_holds_no_graph():
    """Generating without no_grad must not keep every step alive."""
    module, cache = Attention(Sizes()), KVCache(1, 1, 2, 4, 8)
    for t in range(3):
        module(torch.randn(1, 1, 7), *table(t, t + 1), cache)
        cache.advance(1)
    assert not cache.k.requires_grad and not cache.v.requires_grad


@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_queries_stand_at_the_end_of_the_keys(T):
    """T queries against S keys are the last T rows of the whole, whatever sdpa's is_causal means then."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 6, 8, 3), *torch.randn(2, 4, 2, 8, 3)
    assert torch.allclose(
        causal_attention(q[:, :, -T:], k, v), causal_attention(q, k, v)[:, :, -T:], atol=1e-6
    )


# The wrong masks. `attention` is the function that users of a mask would write.


@shape_checked
def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    mask: Bool[Tensor, "T T"] | None = None,
    per_row: Bool[Tensor, "#B #H T T"] | None = None,
) -> Float[Tensor, "B H T D"]:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if mask is not None else per_row)


WRONG = {  # the axes of a mask, by their place in (B, H, T)
    "(B, T, T)": (0, 2, 2),
    "(H, T, T)": (1, 2, 2),
    "(B, T)": (0, 2),
    "(T, B)": (2, 0),
    "(T,)": (2,),
    "five axes": (1, 0, 2, 2, 2),
}


@pytest.mark.parametrize(
    "B, H, T", [(4, 6, 5), (6, 6, 5), (5, 6, 5), (4, 5, 5), (2, 2, 6), (3, 3, 3)]
)
@pytest.mark.parametrize("shape", WRONG.values(), ids=WRONG)
def test_every_wrong_mask_is_caught(B, H, T, shape):
    """Also where PyTorch takes it without a word: B = H, B = T."""
    sizes = (B, H, T)
    q, mask = torch.randn(B, H, T, 4), torch.ones([sizes[i] for i in shape], dtype=torch.bool)
    has = f"has shape {tuple(mask.shape)}, but should be"
    with pytest.raises(
        ShapeError,
        match=re.escape(f"per_row {has} (1 or B, 1 or H, T, T) = (1 or {B}, 1 or {H}, {T}, {T})"),
    ):
        attention(q, q, q, per_row=mask)
    if mask.shape != (T, T):
        with pytest.raises(ShapeError, match=re.escape(f"mask {has} (T, T) = ({T}, {T})")):
            attention(q, q, q, mask)


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (4, 1, 5, 5), (1, 6, 5, 5), (4, 6, 5, 5)])
def test_right_masks_pass(shape):
    """#B is B or 1."""
    q = torch.randn(4, 6, 5, 8)
    assert attention(q, q, q, per_row=torch.ones(shape, dtype=torch.bool)).shape == q.shape
    assert attention(q, q, q, torch.ones(5, 5, dtype=torch.bool)).shape == q.shape


# The sentences.


def sentence(f, *args, **kwargs) -> str:
    with pytest.raises(TypeError) as caught:
        f(*args, **kwargs)
    return str(caught.value)


def test_sentences():
    """Each names the argument, what it is, and what it should be with the letters resolved."""
    q, mask = torch.randn(2, 3, 6, 4), torch.ones(2, 6, 6, dtype=torch.bool)
    say = lambda *args, **kwargs: sentence(attention, *args, **kwargs)
    assert (
        say(q, q, q, mask) == "attention(): mask has shape (2, 6, 6), but should be (T, T) = (6, 6)"
    )
    assert say(q, q, q, mask=mask) == say(q, q, q, mask)
    assert (
        say(q, q[:1], q)
        == "attention(): k has shape (1, 3, 6, 4), but should be (B, H, T, D) = (2, 3, 6, 4)"
    )
    assert say(q[0], q, q) == "attention(): q has shape (3, 6, 4), but should be (B, H, T, D)"
    assert (
        say(q, q, q, mask[0].float())
        == "attention(): mask has dtype float32, but should have dtype bool"
    )
    assert say(q, None, q) == "attention(): k is None, but should be a tensor of shape (B, H, T, D)"
    assert (
        say(q, [q], q)
        == "attention(): k is of type list, but should be a tensor of shape (B, H, T, D)"
    )


def test_other_type_errors_stay_as_they_are():
    """Too few, too many, unknown arguments, and errors raised inside keep Python's words."""
    q = torch.randn(2, 3, 6, 4)
    assert (
        sentence(attention, q) == "attention() missing 2 required positional arguments: 'k' and 'v'"
    )
    assert "takes from 3 to 5 positional arguments but 6 were given" in sentence(
        attention, q, q, q, None, None, None
    )
    assert "unexpected keyword argument 'maks'" in sentence(attention, q, q, q, maks=None)

    @shape_checked
    def inner(x: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
        return x + "a"

    assert not isinstance(pytest.raises(TypeError, inner, q[0, 0, 0]).value, ShapeError)


def test_results_are_checked():
    """One result, a part of a pair, and a broadcast that nobody asked for."""

    @shape_checked
    def last(x: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return x[:, -1]

    @shape_checked
    def pair(x: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], Float[Tensor, "T B"]]:
        return x, x

    @shape_checked
    def either(
        x: Float[Tensor, "T"] | Float[Tensor, "B T"], n: int
    ) -> Float[Tensor, ""] | Float[Tensor, "B"]:
        return torch.zeros([3] * n)

    x = torch.randn(2, 3)
    assert either(x[0], 0).shape == either(x, 0).shape == ()
    assert sentence(either, x, 1).endswith(
        "either(): the result has shape (3,), but should be () or (B,) = () or (2,)"
    )
    assert sentence(last, x).endswith(
        "last(): the result has shape (2,), but should be (B, T) = (2, 3)"
    )
    assert sentence(pair, x).endswith(
        "pair(): the result[1] has shape (2, 3), but should be (T, B) = (3, 2)"
    )
    assert "the result has shape (2, 4), but should be (*batch, C) = (2, 1)" in sentence(
        RMSNorm(4), x[:, :1]
    )
    cache, k = KVCache(1, 2, 3, 4, 8), torch.randn(1, 3, 1, 8)
    assert "the result[0] has shape (2, 3, 1, 8)" in sentence(cache.update, 0, k, k)


def test_what_passed_once_does_not_let_another_call_pass():
    """Checked shapes are remembered by name, shape and dtype: a new combination is checked anew."""
    q, mask = torch.randn(2, 3, 6, 4), torch.ones(6, 6, dtype=torch.bool)
    attention(q, q, q, mask)
    attention(q, q, q, mask=mask)
    attention(q[:, :, :5], q[:, :, :5], q[:, :, :5], mask[:5, :5])
    for bad in (mask[:5, :5], mask.float(), mask.int()):
        with pytest.raises(ShapeError):
            attention(q, q, q, bad)
    with pytest.raises(ShapeError):
        attention(q, q, q, per_row=mask)


def test_checks_can_be_switched_off():
    """As jaxtyping does it, and on again."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert RMSNorm(4)(torch.ones(2, 1)).shape == (2, 4)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(ShapeError):
        RMSNorm(4)(torch.ones(2, 1))


# Compilers, dtypes, and the ecosystem's arithmetic.


def test_compiles_in_one_piece_without_false_errors():
    """No graph break and no ShapeError under torch.compile, also when sizes change and with gradients."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = Attention(Sizes())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for B, T in ((4, 5), (3, 9)):
        x = torch.randn(B, T, 7)
        out = compiled(x, *table(0, T))
        assert torch.allclose(out, module(x, *table(0, T)), atol=1e-6)
        out.sum().backward()


def test_a_compiled_function_runs_no_check():
    """The decorator leaves nothing behind in a compiled graph: a wrong shape is then not our business."""
    torch._dynamo.reset()

    @shape_checked
    def head(x: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return x[0] * 2

    assert torch.compile(head, backend="eager", fullgraph=True)(torch.ones(2, 3)).shape == (3,)
    with pytest.raises(ShapeError):
        head(torch.ones(2, 3))


def test_bf16_autocast_and_bf16_weights():
    """Both run, stay near float32, and give the dtype that their matrix products have."""
    torch.manual_seed(0)
    module, x = Attention(Sizes()), torch.randn(4, 5, 7)
    want = module(x, *table(0, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(x, *table(0, 5))
        cache = KVCache(1, 4, 2, 5, 8, dtype=torch.bfloat16)
        first = module(x[:, :3], *table(0, 3), cache)
        cache.advance(3)
        second = module(x[:, 3:], *table(3, 5), cache)
    pure = module.bfloat16()(x.bfloat16(), *table(0, 5))
    assert mixed.dtype == pure.dtype == torch.bfloat16
    for out in (mixed, pure, torch.cat((first, second), dim=1)):
        assert torch.allclose(out.float(), want, atol=0.05)


def test_rmsnorm_is_done_in_float32():
    """Squares of large bf16 numbers neither overflow nor lose their digits; the dtype that came in goes out."""
    norm = RMSNorm(64).to(torch.float16)
    x = 1000 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    assert norm(x).dtype == torch.float16
    assert torch.allclose(norm(x).float(), F.rms_norm(x.float(), (64,), eps=1e-6), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_the_ecosystems_bit_for_bit(dtype):
    """The formula of the Qwen3 and Llama files, written out: frequencies, cat(freqs, freqs), rotate_half, in this order."""
    torch.manual_seed(0)
    D, theta, positions, x = (
        8,
        1_000_000.0,
        torch.arange(3, 300),
        torch.randn(4, 6, 297, 8).to(dtype),
    )
    frequencies = 1.0 / (theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D))
    angles = (frequencies[None, :, None] @ positions[None, None].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)
    assert torch.equal(apply_rope(x, *rope_table(positions, D, theta)), (x * cos) + (half * sin))


def test_parameter_names_are_those_of_qwen3():
    """So a saved model needs no conversion."""
    assert [name for name, _ in Attention(Sizes()).named_parameters()] == [
        f"{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ]


def test_one_token_at_a_time_needs_no_mask_and_no_copy_of_the_cache():
    """The keys that come back are a view of the cache's own memory."""
    cache = KVCache(1, 1, 2, 4, 8)
    k, _ = cache.update(0, *torch.randn(2, 1, 2, 3, 8))
    assert k.data_ptr() == cache.k.data_ptr()
