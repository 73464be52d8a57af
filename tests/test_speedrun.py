"""The benchmark of the time to a loss compares what it says it compares: the documented reference, the same text, the same sum."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from llm_course.config import load_config
from llm_course.gpt import GPT
from llm_course.shards import write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = "\n".join(sample_tales(0, 20)) + " Zürich 東京 "
QUIET = dict(log=lambda line: None)


@pytest.fixture(scope="module")
def bench():
    "The benchmark as a module."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import time_to_loss

        yield time_to_loss
    for name in ("time_to_loss", "common"):
        sys.modules.pop(name, None)


def test_the_reference_is_the_documented_one(bench):
    "Shape, batch, schedule and AdamW of nanoGPT's recipe for a CPU; its published size, and its rates at a few steps."
    pytest.importorskip("transformers")
    recipe = bench.REFERENCE
    assert (
        recipe.layers,
        recipe.heads,
        recipe.width,
        recipe.context,
        recipe.batch,
        recipe.steps,
    ) == (4, 4, 128, 64, 12, 2000)
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.clip) == (0.9, 0.99, 0.1, 1.0)
    model, width = bench.reference_model(65), 128
    per_block = 12 * width**2 + 13 * width  # attention 4, MLP 8; biases 9, two norms with biases 4
    assert (
        sum(p.numel() for p in model.parameters()) == (65 + 64) * width + 4 * per_block + 2 * width
    )
    rates = [bench.reference_rate(step) for step in (0, 50, 100, 1050, 2000)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5.5e-4, 1e-4])
    (adamw,) = bench.reference_optimizers(model, recipe, load_config("speedrun").training)
    decays, rest = adamw.param_groups
    assert (decays["weight_decay"], rest["weight_decay"], decays["betas"]) == (
        0.1,
        0.0,
        (0.9, 0.99),
    )
    assert {p.ndim for p in decays["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("vocab_size", [0, 400])
def test_nats_per_character(bench, vocab_size):
    "What a text costs is the sum over its tokens, each predicted once, divided by its characters, however many tokens these are."
    tokenizer = train_tokenizer(
        [TEXT[:-15]], vocab_size, **QUIET
    )  # so that some characters are several bytes
    config = load_config(
        "speedrun",
        {
            "vocab_size": tokenizer.vocab_size,
            "n_layers": 1,
            "d_model": 32,
            "d_ff": 64,
            "seq_len": 16,
        },
    )
    torch.manual_seed(0)
    model = GPT(config.model)
    trainer = bench.Trainer(lambda: None, model, tokenizer.encode, 16, 1)
    before, text = TEXT[:1000], TEXT[1000:1300] + TEXT[-15:]
    tokens = tokenizer.encode(before)[-1:] + tokenizer.encode(text)
    nats, done, end = 0.0, 0, 16
    while done < len(tokens) - 1:  # by hand: a window of 16, then 8 tokens further each
        end = min(end, len(tokens) - 1)
        start = max(0, end - 16)
        ids = torch.tensor(tokens[start : end + 1])
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        nats += losses[done - start :].sum().item()
        done, end = end, end + 8
    assert bench.nats_per_character(trainer, before, text) == pytest.approx(
        nats / len(text), rel=1e-5
    )


def test_both_sides_learn_from_the_same_text_and_are_judged_by_the_same(bench, tmp_path):
    "Nine tenths and one tenth, in order; the shards of ours hold the characters that the reference learns from."
    train, val = bench.split(TEXT)
    assert train + val == TEXT and abs(len(val) / len(TEXT) - 0.1) < 1e-3
    write_shards(
        [train], train_tokenizer([train], 0, **QUIET), tmp_path, val_documents=[val], seq_len=64
    )
    ours = bench.ours(tmp_path, 0, 3, {})
    assert Tokenizer.load(tmp_path).decode(ours.encode(val)) == val
    assert math.isfinite(ours.step())


def test_every_ingredient_of_the_table_is_one_that_there_is(bench):
    "Rows set fields that the reference and the config have, to values that differ from theirs."
    for name, recipe in bench.ADDED.items():
        changed = bench.replace(bench.REFERENCE, **recipe)
        assert (changed == bench.REFERENCE) == (name == "nothing")
    for name, settings in {**bench.LEFT_OUT, **bench.TAKEN_OUT}.items():
        if "plain" not in settings:
            assert (load_config("speedrun", settings) == load_config("speedrun")) == (
                name == "nothing"
            )
