"""Counts against PyTorch's own and real tensors; the planner's memory against that of a process; `plan` and its mistakes."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, course, fine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llm_course import planner
from llm_course.config import ModelConfig, config_names, load_config
from llm_course.device import best_time, matrices
from llm_course.files import UserError
from llm_course.gpt import GPT
from llm_course.kernels import accelerate
from llm_course.optim import Muon, make_optimizers
from llm_course.planner import DEVICES, MemoryTrace, largest_batch, plan, simulate_step
from llm_course.step import forward_backward

ODD = ModelConfig(
    n_layers=3, d_model=40, n_heads=6, n_kv_heads=2, d_ff=56, vocab_size=99, seq_len=24, head_dim=10
)
sys.path.insert(0, str(ROOT / "benchmarks"))


def small(**fields: object) -> object:
    "The config `tiny`, and in it other fields."
    return load_config("tiny", {"precision": "fp32", **fields})


@pytest.mark.parametrize("tied", [True, False])
def test_the_matrices_are_those_of_the_model(tied: bool):
    "Names and sizes are read from a model, so a change of its shape is noticed here."
    shape = replace(ODD, tie_embeddings=tied)
    found = {
        name.split(".")[-2]: tuple(p.shape)[::-1]
        for name, p in GPT(shape).named_parameters()
        if "_proj" in name
    }
    assert {**found, "head": (shape.d_model, shape.vocab_size)} == matrices(shape)
    assert shape.matrix_params == shape.n_layers * sum(
        i * o for name, (i, o) in matrices(shape).items() if name != "head"
    )


@pytest.mark.parametrize("muon_lr_scale", [0.0, 7.0])
def test_what_an_optimizer_reads_and_writes_is_its_state(muon_lr_scale: float):
    "Weights, gradients and moments, as they are there after a step: the estimate knows all of them."
    config = small(muon_lr_scale=muon_lr_scale)
    model = GPT(config.model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = make_optimizers(model, config.training)
    for optimizer in optimizers:
        optimizer.step()
    state = sum(
        t.nbytes for o in optimizers for s in o.state.values() for t in s.values() if t.ndim
    )
    assert simulate_step(config).memory["optimizer"] >= state


def test_the_products_of_muon_are_those_that_torch_counts():
    config = small(muon_lr_scale=7.0)
    model = GPT(config.model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    [muon] = [
        optimizer
        for optimizer in make_optimizers(model, config.training)
        if isinstance(optimizer, Muon)
    ]
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert (
        0
        < counter.get_total_flops()
        == simulate_step(config).operations - simulate_step(small()).operations
    )


def test_a_ledger_knows_what_is_there():
    "On real tensors: shared memory counts once, what is freed is struck out, a view moves nothing, and the peak is the peak."
    with MemoryTrace("first") as ledger:
        a = torch.ones(1000)
        b = a.view(10, 100).T
        assert ledger.now.total() == 4000
        ledger.tag = "second"
        c = a + 1
        del a
        assert ledger.now == Counter(first=4000, second=4000)  # b still needs the memory of a
        del b
        assert ledger.now.total() == 4000
        c.add_(1)
    assert ledger.peak == Counter(first=4000, second=4000)
    assert {name: moved for name, _, moved in ledger.calls} == {
        "ones": 4000,
        "add": 8000,
        "add_": 4000,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"checkpoint_activations": True},
        {"precision": "bf16"},
        {"muon_lr_scale": 7.0},
        {"micro_batch_size": 2},
        {"tie_embeddings": False},
    ],
    ids=str,
)
def test_a_rehearsal_is_the_step_itself(fields: dict):
    "Real tensors under the same ledger come to the same peak."
    config = small(batch_size=4, **fields)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    played, ledger = simulate_step(config, dtype), MemoryTrace()
    model = accelerate(GPT(config.model))
    model.checkpoint_activations = config.training.checkpoint_activations
    optimizers = make_optimizers(model, config.training, dtype)
    ids = torch.randint(config.model.vocab_size, (4, config.model.seq_len))
    size = config.training.micro_batch_size or 4
    forward_backward(model, ids, ids, size, dtype)
    for optimizer in optimizers:
        optimizer.step()
    if size == 4:
        model.zero_grad()
    state = [
        t for optimizer in optimizers for means in optimizer.state.values() for t in means.values()
    ]
    for t in [
        *model.parameters(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        *state,
    ]:
        ledger.enter(t, "held")
    with ledger:
        forward_backward(model, ids[:size], ids[:size], size, dtype)
    assert ledger.peak.total() == pytest.approx(sum(played.memory.values()), abs=2000 + ids.nbytes)
    assert (
        played.memory["weights"]
        == sum(p.nbytes for p in model.parameters())
        == 4 * config.model.n_params
    )


def test_a_rehearsal_changes_nothing():
    "The caller's random numbers, and what torch computes afterwards, stay the caller's."
    before = torch.get_rng_state()
    simulate_step(small())
    assert torch.equal(before, torch.get_rng_state()) and torch.ones(2).sum().item() == 2


def test_a_rehearsal_counts_the_operations_of_a_step():
    "Those on paper, to the last one; what checkpointing computes again comes on top."
    config = small(batch_size=4, micro_batch_size=2)
    assert (
        simulate_step(config).operations
        == config.model.flops_per_token() * 4 * config.model.seq_len
    )
    assert (
        simulate_step(small(batch_size=4, checkpoint_activations=True)).operations
        > simulate_step(config).operations
    )


@pytest.mark.parametrize("name", config_names())
def test_more_of_anything_takes_more(name: str):
    "More sequences, tokens and layers take more memory and operations, in every config; checkpointing saves memory."
    config = load_config(
        name,
        {
            "n_layers": 2,
            "vocab_size": 500,
            "batch_size": 2,
            "micro_batch_size": 0,
            "checkpoint_activations": False,
        },
    )
    base = simulate_step(config)
    for field in ("batch_size", "seq_len", "n_layers", "d_ff", "vocab_size"):
        part = "training" if field == "batch_size" else "model"
        more = replace(
            config,
            **{
                part: replace(
                    getattr(config, part), **{field: 2 * getattr(getattr(config, part), field)}
                )
            },
        )
        grown = simulate_step(more)
        assert (
            sum(grown.memory.values()) > sum(base.memory.values())
            and grown.operations > base.operations
        ), field
    twice = simulate_step(
        replace(config, training=replace(config.training, checkpoint_activations=True))
    )
    assert sum(twice.memory.values()) < sum(base.memory.values())


@settings(max_examples=200)
@given(
    lines=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), min_size=1, max_size=4),
    limit=st.integers(0, 5000),
    most=st.integers(1, 64),
)
def test_the_largest_batch_fits(lines: list, limit: int, most: int):
    "Whatever the straight lines of which memory is the highest: what is found fits, and something is found if anything fits."
    need = lambda size: max(start + slope * size for start, slope in lines)
    found = largest_batch(need, limit, most)
    true = max([size for size in range(1, most + 1) if need(size) <= limit], default=0)
    assert found <= true and (found > 0) == (true > 0)
    assert len(set(lines)) > 1 or found == true


@settings(max_examples=10, deadline=None)
@given(
    layers=st.integers(1, 2),
    heads=st.integers(1, 3),
    rows=st.integers(1, 3),
    length=st.integers(1, 16),
    recompute=st.booleans(),
)
def test_any_small_shape_can_be_planned(
    layers: int, heads: int, rows: int, length: int, recompute: bool
):
    "A plan has positive figures that fit each other, whatever the shape."
    config = small(
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=1,
        d_model=8 * heads,
        seq_len=length,
        checkpoint_activations=recompute,
    )
    made = plan(config, batch=rows, device="h100", tokens=10**9)
    assert (
        made.fits
        and made.largest == rows
        and made.peak == sum(made.memory.values()) > 12 * config.model.n_params
    )
    assert made.days == pytest.approx(10**9 / made.tokens_per_second / 86_400) and made.seconds > 0


@pytest.mark.parametrize("seq_len", [256, 2048])
def test_the_time_on_a_device_is_its_sheet_times_the_share(seq_len: int):
    "Operations over the dense peak at the assumed share, attention in full, as a GPU does it; twice the devices, half the days."
    config = load_config(
        "125m",
        {
            "n_layers": 2,
            "batch_size": 8,
            "seq_len": seq_len,
            "checkpoint_activations": False,
            "muon_lr_scale": 0.0,
        },
    )
    made = plan(config, batch=4, device="h100")
    played = simulate_step(planner.with_batch(config, 4, 1), torch.bfloat16, on_cpu=False)
    assert (
        made.seconds == pytest.approx(played.operations / (989.4e12 * 0.4))
        and made.tokens == 20 * config.model.n_params
    )
    assert plan(config, batch=4, device="h100", devices=2).days == pytest.approx(made.days / 2)
    shared = plan(config, batch=4, device="h100", devices=2).memory
    assert shared["buckets"] == 4 * config.model.n_params
    assert config.model.flops_per_token() * made.tokens_per_second / 989.4e12 == pytest.approx(
        0.4
    )  # model FLOPs utilisation


def test_what_does_not_fit_is_told_what_does(monkeypatch: pytest.MonkeyPatch):
    "The advice is true: what it names fits, and it names checkpointing, or nothing, only where the rest fails."
    config = small(batch_size=8, n_layers=6, vocab_size=3000)
    need = lambda **how: plan(with_fields(config, **how), device="card").peak
    cases = {
        need(micro_batch_size=5): "--batch",
        need(micro_batch_size=1) - 1: "--checkpoint_activations true",
        10**6: "not one",
    }
    for limit, word in cases.items():
        monkeypatch.setitem(DEVICES, "card", replace(DEVICES["h100"], memory=limit))
        made = plan(config, device="card")
        assert not made.fits and word in made.advice
        if made.largest or made.recomputing:
            again = with_fields(config, checkpoint_activations=not made.largest)
            assert plan(again, batch=made.largest or made.recomputing, device="card").fits


@pytest.fixture(autouse=True)
def a_card(monkeypatch: pytest.MonkeyPatch):
    "A device with room for everything, and nothing of its own in it."
    monkeypatch.setattr(planner, "CONTEXT", 0)
    monkeypatch.setitem(DEVICES, "card", replace(DEVICES["h100"], memory=10**15))


def with_fields(config: object, **fields: object) -> object:
    return replace(config, training=replace(config.training, **fields))


@pytest.mark.parametrize(
    "wrong, names",
    [
        ({"device": "h10"}, "h100"),
        ({"device": ""}, "auto"),
        ({"batch": 0}, "batch"),
        ({"devices": 0}, "devices"),
        ({"tokens": -1}, "tokens"),
        ({"devices": 3}, "batch_size"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_made_is_a_sentence(wrong: dict, names: str):
    with pytest.raises(UserError, match=names):
        plan(small(), **{"device": "h100", **wrong})


def test_a_batch_that_is_larger_than_the_step_makes_the_step_larger():
    assert (
        plan(small(batch_size=8), batch=5, device="h100", devices=3).config.training.batch_size
        == 15
    )


def test_the_time_of_nothing_is_short():
    "The stopwatch tries at least twice, and gives the shortest."
    tries = []
    assert 0 <= best_time(lambda: tries.append(1), 0.0) < 1 and len(tries) == 3


def point(config: str, **fields: object) -> dict:
    return {"config": config, "precision": "fp32", "checkpoint_activations": False, **fields}


def memory_of(size: dict) -> tuple[int, int]:
    "Bytes foretold of a training process, and those that one has held."
    from common import in_process

    script, words = ROOT / "benchmarks" / "growth.py", ("--threads", 1, "--steps", 3)
    (foretold,) = in_process(script, "--foretell", json.dumps([size]), *words)
    return foretold["bytes"], in_process(script, "--run", json.dumps(size), *words)["bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has held")
@pytest.mark.parametrize(
    "fields", [{"checkpoint_activations": True}, {"precision": "bf16"}], ids=str
)
def test_the_memory_of_a_process_is_foretold(fields: dict):
    "Within 10 % of what a process that trains has held at the most: the config `lesson` at half its length."
    guess, found = memory_of(point("lesson", seq_len=256, **fields))
    assert guess == pytest.approx(found, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has held")
def test_the_memory_of_four_sizes_is_foretold():
    "Within 10 %: four sizes, both precisions, with and without checkpointing."
    import growth

    for each in (each for each in growth.points() if "size" in each):
        guess, found = memory_of(each["point"])
        assert guess == pytest.approx(found, rel=0.1), each


def test_plan_on_the_command_line(tmp_path: Path):
    "A table, and a sentence at its end; it writes nothing."
    words = [
        "plan",
        "--config",
        "125m",
        "--n_layers",
        2,
        "--batch",
        4,
        "--device",
        "h100",
        "--devices",
        2,
    ]
    out = fine(course(*words, cwd=tmp_path))
    lines = out.splitlines()
    assert lines[-1].startswith("It fits: ") and not list(tmp_path.iterdir())
    for word in (
        "NVIDIA H100 SXM",
        "989.4 TFLOP/s",
        "4 at a time",
        "weights",
        "activations",
        "40% of the rate",
        "\n  time ",
    ):
        assert word in out


def test_plan_for_this_machine(tmp_path: Path):
    out = fine(course("plan", "--config", "tiny", "--device", "cpu", cwd=tmp_path))
    assert "Python and torch" in out and "measured" in out and "It fits" in out


@pytest.mark.parametrize(
    "args, word",
    [
        (["--device", "h10"], "'h100'"),
        (["--config", "125"], "'125m'"),
        (["--batch", "0"], "--batch"),
        (["--batch", "many"], "--batch"),
        (["--tokens", "-5"], "--tokens"),
        (["--devices", "7"], "batch_size"),
        (["--n_layer", "2"], "--n_layers"),
        (["--d_model", "7"], "n_heads"),
        (["--seq_len"], "--seq_len"),
        (["--device", "mps:1"], "mps"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_one_line(args: list[str], word: str, tmp_path: Path):
    outcome = course("plan", *args, cwd=tmp_path)
    assert (
        outcome.code == 2
        and len(outcome.lines) == 1
        and word in outcome.err
        and "Traceback" not in outcome.err
    )


def test_what_is_said_of_no_batch_that_fits(tmp_path: Path):
    "1.5 billion parameters with all they need do not fit into 24 GB, whatever is done: an answer, and not a failure."
    out = fine(
        course(
            "plan",
            "--config",
            "1.3b",
            "--n_layers",
            28,
            "--batch",
            1,
            "--device",
            "l4",
            cwd=tmp_path,
        )
    )
    assert "does not fit" in out and "smaller --seq_len or --config" in out


@pytest.mark.parametrize(
    "typed", [["demo", "--batch", 4096], ["350m", "--batch", 32, "--seq_len", 4096]]
)
def test_what_is_advised_is_the_same_training(typed: list, tmp_path: Path):
    "The words that the sentence names, typed after the config, fit, in steps of as many sequences as were planned before."
    before = fine(course("plan", "--device", "l4", "--config", *typed, cwd=tmp_path))
    words = re.search(r"does not fit: .+; (--.+) does, and gives the same result", before)[
        1
    ].split()
    after = fine(
        course("plan", "--device", "l4", "--config", *typed[:1], *typed[3:], *words, cwd=tmp_path)
    )
    assert "It fits" in after
    assert len({re.search(r"step +([\d,]+) sequences", text)[1] for text in (before, after)}) == 1
