"""Training: what a run writes, that it resumes bit for bit, and that several processes are one run."""

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE
from safetensors.torch import load_file

from llm_course import checkpoint, demo, pipeline, resilience, training
from llm_course.checkpoint import json_bytes, torch_bytes, trainer_state
from llm_course.config import load_config
from llm_course.demo import time_needed, train_on_tales
from llm_course.device import World, memory_of, pick_device, pick_precision
from llm_course.files import STOPPING, UserError, folder_lock, with_checksum
from llm_course.gpt import GPT
from llm_course.integrity import FORMAT_BEFORE, RENAMED_FIELDS, RENAMED_STATE, load_verified
from llm_course.kernels import accelerate, is_compiled
from llm_course.optim import Muon, clip_gradients, learning_rate, newton_schulz, set_learning_rate
from llm_course.packing import batch_indices
from llm_course.pipeline import config_changes, resume_run, start_run, train
from llm_course.resilience import (
    SPARE,
    TimeLimit,
    first_nonfinite,
    suggest_micro_batch,
    update_loss_stats,
)
from llm_course.runs import (
    CHECKPOINT_FILES,
    find_checkpoint,
    newest_checkpoint,
    point_latest,
    prune,
    read_log,
    step_folders,
)
from llm_course.shards import TokenDataset, write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer
from llm_course.training import Callback, Trainer, TrainState, fit

CPU = torch.device("cpu")


def quiet(text: object) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A small folder of shards, of tales."""
    tales = sample_tales(0, 400)
    return pack(tales[:380], tales[380:], tmp_path_factory.mktemp("shards") / "shards")


def pack(train_documents: list[str], val_documents: list[str], folder: Path) -> Path:
    """Documents to shards, with a tokenizer of their own."""
    write_shards(
        train_documents,
        train_tokenizer(train_documents, 400),
        folder,
        val_documents=val_documents,
        seq_len=64,
    )
    return folder


def tiny(shards: Path, **fields):
    """The tiny config, in fp32 unless told otherwise, with the vocabulary of the shards."""
    vocab = Tokenizer.load(shards).vocab_size
    return load_config("tiny", {"vocab_size": vocab, "precision": "fp32", "log_every": 1, **fields})


def run_quietly(config, shards, out, **kwargs):
    """`train`, without bar and sentences."""
    return train(
        config, shards, out, device="cpu", progress=False, log=kwargs.pop("log", quiet), **kwargs
    )


def begin(shards: Path, **fields) -> Trainer:
    """The tiny run at step 0."""
    return start_run(tiny(shards, **fields), shards, CPU, log=quiet).trainer


class PowerCut(Exception):
    """Stands for whatever ends a run at once."""


def cut(model, tokenizer) -> str:
    """A sampler that ends the run at the first sample, which comes right after a save."""
    raise PowerCut


def same_files(a: Path, b: Path) -> None:
    """Assert that two checkpoints hold the same bits."""
    for name in CHECKPOINT_FILES:
        if name == "trainer.pt":
            first, second = (torch.load(folder / name, weights_only=True) for folder in (a, b))
            assert equal(first, second), name
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def equal(a, b) -> bool:
    """Whether two nests of dictionaries, lists and tensors are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def told(path: Path) -> list[dict]:
    """A log without what a clock decides."""
    return [
        {k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(path)
    ]


# The plain loop


@pytest.mark.parametrize(
    "fields", [{}, {"muon_lr_scale": 7.0, "micro_batch_size": 3, "document_aligned": True}], ids=str
)
def test_the_plain_loop_learns_what_a_whole_run_learns(fields, shards, tmp_path):
    """`fit` by itself, with no callback but one that listens: on the kernels of `train` the same weights to the bit, and on the plain
    model the same losses but for rounding."""
    config = tiny(shards, max_steps=8, **fields)
    heard = []

    class Listen(Callback):
        on_log = lambda self, trainer, entry: heard.append(entry)

    def trained(prepare: Callable[[GPT], GPT]) -> tuple[GPT, list[float]]:
        heard.clear()
        torch.manual_seed(config.training.seed)
        model, data = (
            prepare(GPT(config.model)),
            TokenDataset(
                shards,
                seq_len=config.model.seq_len,
                document_aligned=config.training.document_aligned,
            ),
        )
        assert fit(model, data, config.training, callbacks=[Listen()]).state.step == 8
        return model, [entry["loss"] for entry in heard if "loss" in entry]

    whole = load_file(run_quietly(config, shards, tmp_path).checkpoint / "model.safetensors")
    losses = [entry["loss"] for entry in read_log(tmp_path) if "loss" in entry]
    (same, its), (_, nearly) = trained(accelerate), trained(lambda model: model)
    assert (
        its == losses
        and len(losses) == 8
        and all(torch.equal(p, whole[name]) for name, p in same.named_parameters())
    )
    assert nearly == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "raises, ends",
    [
        (False, ["start", "log", "step", "step", "log", "step", "end"]),
        (True, ["start", "log", "step", "step", "exception", "end"]),
    ],
)
def test_callbacks_are_told(raises, ends, shards):
    """In this order, whatever ends the run; and the exception goes on its way."""
    events = []

    class Record(Callback):
        on_fit_start = lambda self, trainer: events.append("start")
        on_log = lambda self, trainer, entry: events.append("log")
        on_exception = lambda self, trainer, error: events.append("exception")
        on_fit_end = lambda self, trainer: events.append("end")

        def on_step_end(self, trainer: Trainer) -> None:
            events.append("step")
            if raises and trainer.state.step == 2:
                raise PowerCut

    run = begin(shards, max_steps=3, log_every=3)
    with pytest.raises(PowerCut) if raises else contextlib.nullcontext():
        fit(run.model, run.data, run.config, callbacks=[Record()])
    assert events == ends


# Resume


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "fp32", "micro_batch_size": 3},
        {"precision": "bf16", "micro_batch_size": 2, "checkpoint_activations": True},
        {"precision": "fp32", "checkpoint_activations": True, "log_every": 3, "eval_every": 4},
        {"precision": "fp32", "muon_lr_scale": 7.0},
        {
            "precision": "bf16",
            "muon_lr_scale": 7.0,
            "embedding_lr_scale": 3.0,
            "micro_batch_size": 2,
        },
        {"precision": "fp32", "document_aligned": True},
    ],
    ids=str,
)
def test_twenty_steps_are_ten_and_ten(fields, shards, tmp_path):
    """A run that dies after step 10 and is resumed ends with the weights, optimizer, random state and log of one that did not."""
    config = tiny(
        shards, max_steps=20, save_every=10, sample_every=10, keep_checkpoints=2, **fields
    )
    sample = lambda model, tokenizer: str(
        torch.rand(()).item()
    )  # draws from the random state, as a real sampler does
    whole = run_quietly(config, shards, tmp_path / "whole", sampler=sample)
    with pytest.raises(PowerCut):
        run_quietly(config, shards, tmp_path / "cut", sampler=cut)
    assert newest_checkpoint(tmp_path / "cut").name == "step-000010"
    resumed = run_quietly(config, shards, tmp_path / "cut", resume=True, sampler=sample)
    assert (resumed.steps, resumed.loss, resumed.val_loss) == (
        whole.steps,
        whole.loss,
        whole.val_loss,
    )
    same_files(resumed.checkpoint, whole.checkpoint)
    assert told(tmp_path / "cut") == told(tmp_path / "whole")


@pytest.mark.parametrize(
    "micro, room, advice",
    [
        (8, {False: 4}, "--micro_batch_size 2 does"),
        (8, {True: 8}, "--micro_batch_size 4 --checkpoint_activations true does"),
        (1, {True: 1}, "--micro_batch_size 1 --checkpoint_activations true does"),
        (1, {}, "not even one"),
        (8, {False: 1, True: 8}, "--micro_batch_size 1 does"),
    ],
)
def test_what_fits_is_searched_to_the_end(micro, room, advice, shards, monkeypatch):
    """Smaller micro batches, then computing activations twice, from the size that was asked for down to one sequence."""
    run = begin(shards, batch_size=8, micro_batch_size=micro)
    monkeypatch.setattr(
        resilience,
        "fits_in_memory",
        lambda model, optimizers, size, rows, dtype: (
            size <= room.get(model.checkpoint_activations, 0)
        ),
    )
    assert suggest_micro_batch(run).startswith(advice)


def test_resume_begins_where_there_is_nothing(shards, tmp_path):
    """The same command line works for the first start and for every later one."""
    said = []
    config = tiny(shards, max_steps=2)
    first = run_quietly(config, shards, tmp_path, resume=True, log=said.append)
    assert first.steps == 2 and any("afresh" in line for line in said)
    again = run_quietly(config, shards, tmp_path, resume=True, log=said.append)
    assert again.steps == 2 and again.loss == first.loss and again.val_loss == first.val_loss


def test_resume_says_what_has_changed(shards, tmp_path):
    """A longer run may go on from a shorter one; one line names every changed setting."""
    run_quietly(tiny(shards, max_steps=2), shards, tmp_path)
    said = []
    result = run_quietly(
        tiny(shards, max_steps=4, lr=1e-4), shards, tmp_path, resume=True, log=said.append
    )
    assert result.steps == 4
    assert [line for line in said if "max_steps 2 → 4" in line and "lr 0.003 → 0.0001" in line]


def without_progress(folder: Path) -> None:
    """Make a checkpoint what it was before there was a record of what was consumed."""
    state = torch.load(folder / "trainer.pt", weights_only=True)
    data = torch_bytes(
        {name: value for name, value in state.items() if name not in ("sequences", "tokens")}
    )
    (folder / "trainer.pt").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer.pt"] = {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    del manifest["run"]["sequences"]
    (folder / "manifest.json").write_bytes(json_bytes(with_checksum(manifest)))


@pytest.mark.parametrize("older", [False, True], ids=["", "an older checkpoint"])
@pytest.mark.parametrize(
    "changed, position, tokens",
    [
        ({}, 24, 3 * 512),
        ({"batch_size": 2}, 24, 3 * 128),
        ({"batch_size": 32}, 24, 3 * 2048),
        ({"seq_len": 16}, 96, 3 * 128),
        ({"seq_len": 16, "batch_size": 24}, 96, 3 * 384),
    ],
    ids=str,
)
def test_progress_is_what_was_consumed(changed, position, tokens, older, shards, tmp_path):
    """Three steps of 8 × 64 tokens, then three in another way: no token counts twice, no sequence comes twice, wherever one looks."""
    run_quietly(tiny(shards, max_steps=3, batch_size=8, seq_len=64), shards, tmp_path)
    if older:
        without_progress(tmp_path / "step-000003")
    config = tiny(shards, **{"max_steps": 6, "batch_size": 8, "seq_len": 64, **changed})
    start = start_run(config, shards, CPU, log=quiet)
    resume_run(start.trainer, start.tokenizer, tmp_path / "step-000003", quiet)
    data = start.trainer.data
    order = np.concatenate(
        [batch_indices(len(data), 1, 0, position + i) for i in range(config.training.batch_size)]
    )
    np.testing.assert_array_equal(
        start.trainer.batch()[0], np.stack([data[int(i)][:-1] for i in order])
    )
    result = run_quietly(config, shards, tmp_path, resume=True)
    noted = json.loads((result.checkpoint / "manifest.json").read_text())["run"]
    state = torch.load(result.checkpoint / "trainer.pt", weights_only=True)
    consumed = (position + 3 * config.training.batch_size, 3 * 512 + tokens)
    assert (
        consumed == (noted["sequences"], noted["tokens"]) == (state["sequences"], state["tokens"])
    )
    counted = [entry["tokens"] for entry in read_log(tmp_path) if "tokens" in entry]
    assert result.tokens == consumed[1] and counted == [
        512,
        1024,
        1536,
        *(1536 + tokens * i // 3 for i in (1, 2, 3)),
    ]


def test_a_run_that_has_more_steps_than_it_should(shards, tmp_path):
    """It is left as it is, which one sentence says, and its last validation loss is still known."""
    whole = run_quietly(tiny(shards, max_steps=4), shards, tmp_path)
    before, said = (tmp_path / "log.jsonl").read_bytes(), []
    result = run_quietly(tiny(shards, max_steps=2), shards, tmp_path, resume=True, log=said.append)
    assert any(
        "has 4 steps behind it, and max_steps is 2: there is nothing left to train" in line
        for line in said
    )
    assert (result.steps, result.tokens, result.loss, result.val_loss) == (
        4,
        whole.tokens,
        whole.loss,
        whole.val_loss,
    )
    assert (tmp_path / "log.jsonl").read_bytes() == before and result.checkpoint == whole.checkpoint


def test_resume_says_that_the_text_is_another(shards, tmp_path):
    """More text may come in the middle of a run, and a run that goes on with it is told so; one that has the same text is not."""
    run_quietly(tiny(shards, max_steps=1), shards, tmp_path / "out")
    write_shards(
        sample_tales(0, 390),
        Tokenizer.load(shards),
        tmp_path / "more",
        val_documents=sample_tales(2, 10),
        seq_len=64,
    )
    for folder, n in ((shards, 0), (tmp_path / "more", 1)):
        said = []
        run_quietly(
            tiny(shards, max_steps=2 + n), folder, tmp_path / "out", resume=True, log=said.append
        )
        assert sum("another text than before: documents 380 → 390" in line for line in said) == n, (
            said
        )


def as_before(folder: Path) -> None:
    """Make a checkpoint what the format before would have saved: fields under the names that they had."""
    names = {today: before for before, today in {**RENAMED_FIELDS, **RENAMED_STATE}.items()}
    back = lambda values: {names.get(name, name): value for name, value in values.items()}
    data = torch_bytes(back(torch.load(folder / "trainer.pt", weights_only=True)))
    (folder / "trainer.pt").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer.pt"] = {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    manifest |= {
        "format": FORMAT_BEFORE,
        "config": {part: back(values) for part, values in manifest["config"].items()},
    }
    (folder / "manifest.json").write_bytes(json_bytes(with_checksum(manifest)))


def test_a_checkpoint_of_the_format_before_opens_and_goes_on(shards, tmp_path):
    """Under today's names, with nothing said to have changed, and to the same bits."""
    config = tiny(
        shards,
        max_steps=4,
        save_every=2,
        muon_lr_scale=7.0,
        embedding_lr_scale=3.0,
        document_aligned=True,
    )
    whole = run_quietly(config, shards, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "older", symlinks=True)
    shutil.rmtree(tmp_path / "older" / "step-000004")
    as_before(tmp_path / "older" / "step-000002")
    assert load_verified(tmp_path / "older").config == config
    said = []
    resumed = run_quietly(config, shards, tmp_path / "older", resume=True, log=said.append)
    same_files(resumed.checkpoint, whole.checkpoint)
    assert not any("Changed since" in line for line in said)


def test_resume_refuses_another_model(shards, tmp_path):
    """Weights of another shape are refused with a sentence, not with a traceback of PyTorch."""
    run_quietly(tiny(shards, max_steps=1), shards, tmp_path)
    with pytest.raises(UserError, match="do not fit"):
        run_quietly(tiny(shards, max_steps=1, d_ff=128), shards, tmp_path, resume=True)
    with pytest.raises(UserError, match="do not fit"):
        run_quietly(tiny(shards, max_steps=1, n_layers=3), shards, tmp_path, resume=True)


def test_resume_refuses_another_optimizer(shards, tmp_path):
    """What AdamW remembers is of no use to Muon: a sentence, not a run that forgets."""
    run_quietly(tiny(shards, max_steps=2), shards, tmp_path)
    with pytest.raises(UserError, match="muon_lr_scale"):
        run_quietly(tiny(shards, max_steps=4, muon_lr_scale=7.0), shards, tmp_path, resume=True)


def test_resume_refuses_another_tokenizer(shards, tmp_path):
    """Shards made with another tokenizer would train on noise: both are named."""
    run_quietly(tiny(shards, max_steps=1), shards, tmp_path / "out")
    others = pack(
        [tale.upper() for tale in sample_tales(1, 100)], sample_tales(2, 10), tmp_path / "others"
    )
    with pytest.raises(UserError, match="tokenizer"):
        run_quietly(tiny(others, max_steps=1), others, tmp_path / "out", resume=True)


def test_an_earlier_run_is_never_lost(shards, tmp_path):
    """A new run in the folder of an old one moves that aside, whole, and says where it is."""
    old = run_quietly(tiny(shards, max_steps=2), shards, tmp_path)
    weights = load_file(old.checkpoint / "model.safetensors")
    said = []
    new = run_quietly(tiny(shards, max_steps=1, seed=1), shards, tmp_path, log=said.append)
    assert [path.name for path in step_folders(tmp_path)] == ["step-000001"] and new.steps == 1
    assert any("earlier-1" in line and "resume=True" in line for line in said)
    kept = load_verified(tmp_path / "earlier-1" / "latest")
    assert kept.step == 2 and len(read_log(tmp_path / "earlier-1")) > 1
    assert all(torch.equal(p, weights[name]) for name, p in kept.model.named_parameters())


# Checkpoints


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """The folder of a run of three steps."""
    out = tmp_path_factory.mktemp("run")
    run_quietly(tiny(shards, max_steps=3, save_every=1, keep_checkpoints=3), shards, out)
    return out


def test_a_checkpoint_is_what_the_design_says(finished):
    """Files, names of the weights, a tied matrix once, and a manifest that seals them."""
    folder = finished / "step-000003"
    assert {path.name for path in folder.iterdir()} == {*CHECKPOINT_FILES, "manifest.json"}
    weights = load_file(folder / "model.safetensors")
    assert (
        "model.embed_tokens.weight" in weights
        and "model.layers.0.self_attn.q_proj.weight" in weights
    )
    assert "lm_head.weight" not in weights
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["architectures"] == ["Qwen3ForCausalLM"]
        and config["tie_word_embeddings"] is True
        and config["eos_token_id"] == 1
    )
    assert os.readlink(finished / "latest") == "step-000003"
    assert not list(finished.glob(".*.tmp"))


def test_a_loaded_model_is_the_saved_one(finished, shards):
    """`latest`, the step's folder and the run's folder are all the same checkpoint, and its model gives the loss it was saved with."""
    found = [
        load_verified(path) for path in (finished, finished / "latest", finished / "step-000003")
    ]
    assert {checkpoint.step for checkpoint in found} == {3} and {
        checkpoint.path.name for checkpoint in found
    } == {"step-000003"}
    assert found[0].tokenizer.sha256 == Tokenizer.load(shards).sha256
    found[0].check_tokenizer(Tokenizer.load(shards))
    with pytest.raises(UserError, match="mine.model"):
        found[0].check_tokenizer(train_tokenizer(["abc " * 50], 300), "mine.model")
    assert load_verified(finished / "step-000001").step == 1


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, "manifest.json"])
@pytest.mark.parametrize("fault", ["flipped bit", "cut short", "longer", "deleted", "empty"])
def test_every_fault_is_found_and_the_file_named(name, fault, finished, tmp_path):
    """One bit in any file is enough."""
    folder = tmp_path / "step-000003"
    shutil.copytree(finished / "step-000003", folder)
    path, data = folder / name, bytearray((finished / "step-000003" / name).read_bytes())
    if fault == "flipped bit":
        data[len(data) // 2] ^= 1
    if fault == "cut short":
        data.pop()
    if fault == "longer":
        data.append(0)
    if fault == "longer" and name == "manifest.json":
        return  # a blank more at the end of JSON is no change
    path.unlink() if fault == "deleted" else path.write_bytes(b"" if fault == "empty" else data)
    if name == "manifest.json" and fault == "cut short":
        path.write_bytes(data[:-2])
    with pytest.raises(UserError, match=name):
        load_verified(folder)


def test_what_is_no_checkpoint(tmp_path):
    """Nothing there, a folder of other things, a file: a sentence each."""
    with pytest.raises(UserError, match="llm-course train"):
        load_verified(tmp_path / "nowhere" / "latest")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="manifest.json"):
        load_verified(tmp_path)
    with pytest.raises(UserError):
        load_verified(tmp_path / "notes.txt")


def test_keep_and_latest(shards, tmp_path):
    """Only the newest N stay; `latest` may be lost without harm."""
    run_quietly(tiny(shards, max_steps=5, save_every=1, keep_checkpoints=2), shards, tmp_path)
    assert [path.name for path in step_folders(tmp_path)] == ["step-000004", "step-000005"]
    (tmp_path / "latest").unlink()
    assert (
        find_checkpoint(tmp_path / "latest")
        == find_checkpoint(tmp_path)
        == tmp_path / "step-000005"
    )


def test_latest_is_a_copy_where_links_are_refused(finished, tmp_path, monkeypatch):
    """As on Windows without the right to make links; and a link takes the place of a copy again."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    with monkeypatch.context() as patched:

        def refuse(*args, **kwargs):
            raise OSError("no links here")

        patched.setattr(Path, "symlink_to", refuse)
        for step in (1, 2):
            point_latest(tmp_path / "run" / f"step-00000{step}")
        assert (
            not (tmp_path / "run" / "latest").is_symlink()
            and load_verified(tmp_path / "run" / "latest").step == 2
        )
    point_latest(tmp_path / "run" / "step-000003")
    assert (tmp_path / "run" / "latest").is_symlink() and not list(
        (tmp_path / "run").glob(".*.tmp")
    )


def test_leftovers_are_swept(shards, finished, tmp_path):
    """What a crash in the middle of a save has left is gone after the next start, and was never taken for a checkpoint."""
    for name in (".step-000009.tmp", ".step-000003.old.tmp", "..latest.tmp.old.tmp"):
        shutil.copytree(finished / "step-000001", tmp_path / name)
    (tmp_path / ".latest.tmp").symlink_to("nowhere")
    (tmp_path / ".log.jsonl.123.tmp").write_text("half a l")
    assert newest_checkpoint(tmp_path) is None
    run_quietly(tiny(shards, max_steps=1), shards, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "latest",
        "log.jsonl",
        "step-000001",
    ]


def test_what_others_have_in_the_folder_of_a_run_stays(shards, tmp_path):
    """Whatever it is called: hidden, temporary, like a checkpoint of ours, or inside one; also when checkpoints are pruned, twice."""
    theirs = {
        ".env": "1",
        ".gitkeep": "",
        "notes.tmp": "2",
        ".notes.tmp": "3",
        ".vim.swp.tmp/a": "4",
        ".step-000009.tmp/notes.txt": "5",
        "step-1/notes.txt": "6",
        "step-old/notes.txt": "7",
        "log.jsonl": "theirs\n",
        ".latest.notes.tmp": "8",
    }
    for name, text in theirs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    config, said = tiny(shards, max_steps=4, save_every=1, keep_checkpoints=1), []
    spoil = lambda model, tokenizer: (
        (tmp_path / "step-000002/mine.txt").write_text("9") and "a sample"
        if (tmp_path / "step-000002").exists()
        else ""
    )
    run_quietly(
        replace(config, training=replace(config.training, sample_every=2)),
        shards,
        tmp_path,
        sampler=spoil,
        log=said.append,
    )
    assert (tmp_path / "earlier-1/log.jsonl").read_text() == theirs.pop("log.jsonl") and any(
        "earlier-1" in line for line in said
    )
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs and (
        tmp_path / "step-000002/mine.txt"
    ).read_text() == "9"
    assert [path.name for path in step_folders(tmp_path)] == ["step-000002", "step-000004"]
    run_quietly(config, shards, tmp_path)
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: (path.mkdir(), (path / "a.txt").write_text("mine")),
    ],
    ids=["a file", "a folder"],
)
def test_a_latest_of_somebody_else(make, shards, tmp_path):
    """The newest checkpoint takes that name, so the run is refused before its first step."""
    make(tmp_path / "latest")
    with pytest.raises(UserError, match="latest is no checkpoint of ours"):
        run_quietly(tiny(shards, max_steps=1), shards, tmp_path)
    assert (
        not step_folders(tmp_path) and "mine" in (tmp_path / "latest").read_text()
        if (tmp_path / "latest").is_file()
        else True
    )


@pytest.mark.parametrize(
    "start", [lambda: train(load_config("tiny"), "nowhere", ""), lambda: train_on_tales("tiny", "")]
)
def test_a_folder_without_a_name(start, tmp_path, monkeypatch):
    """It would be the one in which one stands."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no name"):
        start()
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_last_one(shards, tmp_path, monkeypatch):
    """A disk that is full during a save costs a sentence; the checkpoint before it still loads, nothing half-written stays."""
    calls, real = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 14:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        run_quietly(tiny(shards, max_steps=3, save_every=1), shards, tmp_path)
    assert load_verified(tmp_path).step == 1 and not list(tmp_path.glob(".*.tmp"))


def test_two_runs_do_not_share_a_folder(shards, tmp_path):
    """The second is refused while the first one writes."""
    with folder_lock(tmp_path):
        with pytest.raises(UserError, match="Another run"):
            run_quietly(tiny(shards, max_steps=1), shards, tmp_path)
    assert run_quietly(tiny(shards, max_steps=1), shards, tmp_path).steps == 1


# What goes in


def test_what_cannot_be_trained_on(shards, tmp_path):
    """No shards, too little text, shards whose tokenizer was exchanged, a folder that cannot be made: a sentence each, nothing written."""
    with pytest.raises(UserError):
        run_quietly(tiny(shards), tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="seq_len"):
        run_quietly(tiny(shards, seq_len=1_000_000), shards, tmp_path / "out")
    mixed = tmp_path / "mixed"
    shutil.copytree(shards, mixed)
    train_tokenizer(["another text " * 50], 300).save(mixed / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer"):
        run_quietly(tiny(shards), mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run_quietly(tiny(shards), shards, tmp_path / "file" / "out")


def test_the_tokenizer_decides_the_vocabulary(shards, tmp_path):
    """A config with another vocabulary is adapted, and one line says so."""
    said = []
    config = load_config("tiny", {"vocab_size": 9_999, "max_steps": 1})
    result = run_quietly(config, shards, tmp_path, log=said.append)
    assert (
        load_verified(result.checkpoint).config.model.vocab_size
        == Tokenizer.load(shards).vocab_size
    )
    assert any("9,999" in line for line in said)


def test_validation_may_be_short_or_missing(tmp_path):
    """A validation split shorter than one sequence is used whole; without one there is no validation loss."""
    tales = sample_tales(0, 200)
    short = pack(tales[1:], [tales[0][:60]], tmp_path / "short")
    assert np.isfinite(run_quietly(tiny(short, max_steps=1), short, tmp_path / "a").val_loss)
    none = pack(tales, [], tmp_path / "none")
    assert np.isnan(run_quietly(tiny(none, max_steps=1), none, tmp_path / "b").val_loss)


# Numbers


def losses(out: Path) -> np.ndarray:
    """The losses in a log."""
    return np.array([entry["loss"] for entry in read_log(out) if "loss" in entry])


@pytest.mark.parametrize(
    "fields", [{}, {"muon_lr_scale": 7.0}, {"document_aligned": True}], ids=str
)
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_are_one_batch(micro, fields, shards, tmp_path):
    """k micro batches give the losses of one batch, also when the last is smaller, or sequences differ in length."""
    one = run_quietly(tiny(shards, batch_size=8, max_steps=20, **fields), shards, tmp_path / "one")
    many = run_quietly(
        tiny(shards, batch_size=8, max_steps=20, micro_batch_size=micro, **fields),
        shards,
        tmp_path / "many",
    )
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-5)
    assert many.val_loss == pytest.approx(one.val_loss, rel=1e-5)


def test_activation_checkpointing_changes_nothing(shards, tmp_path):
    """The same losses, bit for bit."""
    run_quietly(tiny(shards, max_steps=5), shards, tmp_path / "kept")
    run_quietly(
        tiny(shards, max_steps=5, checkpoint_activations=True), shards, tmp_path / "computed"
    )
    assert (losses(tmp_path / "kept") == losses(tmp_path / "computed")).all()


def test_it_learns(shards, tmp_path):
    """Twenty steps take the loss well below that of a model that knows nothing."""
    run_quietly(tiny(shards, max_steps=20), shards, tmp_path)
    vocab = Tokenizer.load(shards).vocab_size
    assert abs(losses(tmp_path)[0] - np.log(vocab)) < 0.2 and losses(tmp_path)[-1] < 0.8 * np.log(
        vocab
    )


def overflow(model) -> None:
    """A weight so large that what is computed from it is infinite."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 3e38


@pytest.mark.parametrize("compile", [False, True])
def test_the_config_says_whether_blocks_are_compiled(shards, compile: bool):
    """The flag reaches the model that a run trains; nothing is compiled before its first step."""
    assert is_compiled(begin(shards, compile=compile).model) == compile


def test_a_step_whose_loss_is_not_finite_is_skipped(shards):
    """Nothing is learned from it, it is counted, and its batch does not come again."""
    run = begin(shards)
    run.step()
    weight = run.model.model.norm.weight
    with torch.no_grad():
        sound, weight[0] = weight[0].item(), float("nan")
    before = [p.clone() for p in run.model.parameters()]
    state = copy.deepcopy([optimizer.state_dict() for optimizer in run.optimizers])
    run.step()
    assert all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(before, run.model.parameters())
    )
    rates = lambda states: [{**one, "param_groups": None} for one in states]
    assert equal(rates(state), rates([optimizer.state_dict() for optimizer in run.optimizers]))
    assert (run.state.step, run.state.skipped, run.state.consecutive_skips) == (2, 1, 1)
    with torch.no_grad():
        weight[0] = sound
    run.step()
    assert math.isfinite(run.loss) and (
        run.state.step,
        run.state.skipped,
        run.state.consecutive_skips,
    ) == (3, 1, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"muon_lr_scale": 7.0},
        {"precision": "bf16", "checkpoint_activations": "true", "micro_batch_size": 2},
    ],
)
def test_a_run_of_bad_steps_stops_and_says_where(fields, shards, tmp_path):
    """The step, the part of the model, the documents of the batch, and the checkpoint to go on from: the last before the loss went bad."""
    config, seen = tiny(shards, max_steps=20, save_every=3, sample_every=4, **fields), []
    spoil = lambda model, tokenizer: overflow(model) or "spoiled"
    with pytest.raises(UserError) as error:
        run_quietly(config, shards, tmp_path, sampler=spoil, log=seen.append)
    assert "up to step 7" in str(error.value) and "output of model.layers.1.mlp.up_proj" in str(
        error.value
    )
    last = newest_checkpoint(tmp_path)
    assert last.name == "step-000003" and f"{last}: go on from it" in str(error.value)
    assert sum("is skipped" in line for line in seen) == 3
    assert [entry["skipped"] for entry in read_log(tmp_path) if "skipped" in entry] == [1, 2, 3]
    split = TokenDataset(shards, seq_len=config.model.seq_len)
    rows = batch_indices(len(split), config.training.batch_size, config.training.seed, 6)
    tokens = {int(j) for i in rows for j in split.documents_in(int(i))}
    assert f"documents {', '.join(map(str, sorted(tokens)[:10]))}" in str(error.value)


@pytest.mark.parametrize("longest", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(longest, shards):
    """To the bit, with less work where nothing is to be clipped."""
    run = begin(shards)
    lengths, gradients = [], []
    for clip in (
        clip_gradients,
        lambda model, longest: torch.nn.utils.clip_grad_norm_(
            model.parameters(), longest or math.inf
        ),
    ):
        run.model(*run.batch()).backward()
        lengths.append(clip(run.model, longest).item())
        gradients.append([p.grad.clone() for p in run.model.parameters()])
        run.model.zero_grad()
    assert lengths[0] == lengths[1] and 0.5 < lengths[0] < 100
    assert all(map(torch.equal, *gradients))


def test_a_gradient_that_is_not_finite_is_named(shards):
    """Where every output is finite: the gradient nearest to the loss."""
    run = begin(shards)
    where = lambda: first_nonfinite(run.model, *run.batch(), run.micro_batch_size)
    assert where() is None
    run.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.inf)
    assert where() == "the gradient of model.layers.0.mlp.up_proj.weight"
    assert all(p.grad is None for p in run.model.parameters())


def test_a_spike_stands_in_the_log(shards, tmp_path):
    """And what is usual is part of the checkpoint, so that a resumed run sees the same spikes."""
    state = TrainState()
    assert (
        not any(update_loss_stats(state, 2 + 0.1 * math.sin(i)) for i in range(100))
        and 1.9 < state.loss_ema < 2.1
    )
    state.step = 101
    assert update_loss_stats(state, 3.0) and not update_loss_stats(state, 2.05)
    saved = trainer_state(state, [], CPU)
    assert (saved["loss_ema"], saved["loss_var_ema"]) == (state.loss_ema, state.loss_var_ema)


def test_the_best_checkpoint_stays(shards, tmp_path):
    """Pruning spares the newest and the one with the lowest validation loss, whatever `keep` says."""
    config = tiny(shards, max_steps=5, save_every=1, eval_every=0, keep_checkpoints=5)
    run_quietly(config, shards, tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:
        for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 6.0)):
            print(json.dumps({"step": step, "val_loss": loss}), file=log)
    prune(tmp_path, 1)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-000002", "step-000005"]


def test_resuming_elsewhere_is_said(shards, tmp_path, monkeypatch):
    """Another torch, another number of threads: the resume works, and says that the last bits may differ."""
    run_quietly(tiny(shards, max_steps=2, save_every=1), shards, tmp_path)
    lines = []
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    run_quietly(tiny(shards, max_steps=3), shards, tmp_path, resume=True, log=lines.append)
    assert any("not to the bit: torch" in line and "→ 2.99.0" in line for line in lines)
    monkeypatch.undo()
    lines.clear()
    run_quietly(tiny(shards, max_steps=3), shards, tmp_path, resume=True, log=lines.append)
    assert any("2.99.0 → " in line for line in lines)


def test_a_full_disk_does_not_end_a_run(shards, tmp_path, monkeypatch):
    """A save in the middle fails: it is said, and training goes on to a last one that succeeds."""
    whole, lines = checkpoint.write_folder, []

    def full(folder, contents):
        if folder.name == "step-000002":
            raise UserError("the disk is full.")
        whole(folder, contents)

    monkeypatch.setattr(checkpoint, "write_folder", full)
    run_quietly(tiny(shards, max_steps=4, save_every=2), shards, tmp_path, log=lines.append)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-000004"]
    assert any("disk is full. The training goes on." in line for line in lines)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_the_step_and_saves(number, shards, tmp_path):
    """Then a resume ends with the bits of a run that was never stopped."""
    config, lines = tiny(shards, max_steps=12, save_every=5, sample_every=3), []
    raising = lambda model, tokenizer: signal.raise_signal(number) or "sample"
    with pytest.raises((KeyboardInterrupt, SystemExit)) as end:
        run_quietly(
            config,
            shards,
            tmp_path / "a",
            sampler=raising,
            log=lines.append,
            command="llm-course train",
        )
    assert number == signal.SIGINT or end.value.code == 128 + number
    assert newest_checkpoint(tmp_path / "a").name == "step-000004"
    assert any("after step 4" in line and "`llm-course train --resume`" in line for line in lines)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    resumed = run_quietly(
        config, shards, tmp_path / "a", sampler=lambda model, tokenizer: "sample", resume=True
    )
    never = run_quietly(config, shards, tmp_path / "b", sampler=lambda model, tokenizer: "sample")
    same_files(resumed.checkpoint, never.checkpoint)
    assert told(tmp_path / "a" / "log.jsonl") == told(tmp_path / "b" / "log.jsonl")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX")
def test_what_is_ignored_stays_so(shards, tmp_path):
    """`nohup` lets a run outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        raising = lambda model, tokenizer: signal.raise_signal(signal.SIGHUP) or "sample"
        assert (
            run_quietly(
                tiny(shards, max_steps=4, sample_every=2), shards, tmp_path, sampler=raising
            ).steps
            == 4
        )
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def impossible_batch() -> int:
    """So many sequences of 64 tokens that their logits need more memory than there is, and their tokens do not."""
    return int(1.5 * memory_of(CPU)) // (64 * 400 * 4)


def test_an_impossible_batch_size(shards, tmp_path, monkeypatch):
    """Is found out before the batch is read; what is advised is small enough to have been tried in no time, and works."""
    monkeypatch.setattr(resilience, "TRIAL_SECONDS", 0.05)
    monkeypatch.setattr(training, "get_batch", lambda *args: pytest.fail("the batch has been read"))
    with pytest.raises(
        UserError, match=r"does not fit into memory: --micro_batch_size (\d+) does"
    ) as error:
        run_quietly(tiny(shards, batch_size=impossible_batch()), shards, tmp_path)
    monkeypatch.undo()
    size = int(re.search(r"--micro_batch_size (\d+)", str(error.value))[1])
    assert (
        run_quietly(
            tiny(shards, batch_size=2 * size, micro_batch_size=size, max_steps=1), shards, tmp_path
        ).steps
        == 1
    )
    with pytest.raises(
        UserError, match="nor do the batch's tokens alone; try a smaller --batch_size"
    ):
        run_quietly(tiny(shards, batch_size=10**12), shards, tmp_path)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_while_a_size_is_searched(number, shards, tmp_path, monkeypatch):
    """It need not wait: nothing would be saved."""
    monkeypatch.setattr(
        resilience,
        "fits_in_memory",
        lambda *args: signal.raise_signal(number) or pytest.fail("the search goes on"),
    )
    before = signal.signal(number, lambda number, frame: (_ for _ in ()).throw(InterruptedError))
    try:
        with pytest.raises(InterruptedError):
            run_quietly(tiny(shards, batch_size=impossible_batch()), shards, tmp_path)
    finally:
        signal.signal(number, before)


def test_a_warm_up_that_is_longer_than_the_run(shards):
    """Is said, since the learning rate that was asked for never comes; and one that is not is not."""
    for warmup_steps, times in ((11, 1), (10, 0)):
        said = []
        start_run(
            tiny(shards, max_steps=10, warmup_steps=warmup_steps), shards, CPU, log=said.append
        )
        assert sum(line.count("never gets as high as lr") for line in said) == times


def test_a_sample_that_cannot_be_written(shards, tmp_path):
    """Ends no run."""

    def refuse(model, tokenizer):
        raise UserError("these weights write nothing.")

    said = []
    assert (
        run_quietly(
            tiny(shards, max_steps=2), shards, tmp_path, sampler=refuse, log=said.append
        ).steps
        == 2
    )
    assert "There is no sample: these weights write nothing." in said


class Keep(Callback):
    """Keeps what is logged."""

    def __init__(self, entries: list) -> None:
        self.entries = entries

    def on_log(self, trainer: Trainer, entry: dict) -> None:
        self.entries.append(entry)


def let_a_step_take(seconds: Callable[[int], float], monkeypatch) -> None:
    """On the clock that a run sees, step i takes `seconds(i)`, and all else nothing, however busy the machine is."""
    now, real, done = [0.0], training.train_step, [0]

    def step(*args, **options):
        now[0] += seconds(done[0])
        done[0] += 1
        return real(*args, **options)

    monkeypatch.setattr(training, "train_step", step)
    for module in (training, resilience, pipeline, demo):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))


def test_time_limit_cuts_the_schedule(shards, tmp_path, monkeypatch):
    """max_minutes shortens the run to what fits, says so, records it, and the schedule still ends at zero."""
    said = []
    let_a_step_take(lambda step: 0.01, monkeypatch)
    config = tiny(shards, max_steps=100_000, max_minutes=0.05, eval_every=0, save_every=0)
    result = run_quietly(config, shards, tmp_path, log=said.append)
    assert result.steps == pytest.approx(
        0.95 * 3 / 0.01, abs=1
    ) and result.seconds == pytest.approx(0.95 * 3, abs=0.02)
    assert sum("schedule ends" in line for line in said) == 1
    assert [entry["max_steps"] for entry in read_log(tmp_path) if "max_steps" in entry][
        -1
    ] == result.steps
    last = [entry for entry in read_log(tmp_path) if "lr" in entry][-1]
    assert (
        last["lr"]
        == learning_rate(result.steps - 1, replace(config.training, max_steps=result.steps))
        < 0.1 * config.training.lr
    )
    assert run_quietly(config, shards, tmp_path, resume=True).steps == result.steps


def test_steps_that_were_held_up_do_not_shorten_the_run(shards, tmp_path, monkeypatch):
    """Where another program slows the first steps, the number of steps grows again once it is gone, and the run uses its time."""
    said = []
    let_a_step_take(lambda step: 0.1 if step < 20 else 0.01, monkeypatch)
    config = tiny(
        shards, max_steps=100_000, max_minutes=0.1, decay_fraction=0.7, eval_every=0, save_every=0
    )
    result = run_quietly(config, shards, tmp_path, log=said.append)
    cuts = [entry["max_steps"] for entry in read_log(tmp_path) if "max_steps" in entry]
    assert cuts[0] == pytest.approx(57, abs=1)  # 5.7 seconds at the slow pace
    assert cuts[-1] == result.steps == pytest.approx(390, abs=1)  # and at both
    assert (
        result.seconds == pytest.approx(5.7, abs=0.02)
        and sum("Steps have become faster" in line for line in said) == 1
    )


@pytest.mark.parametrize(
    "step, fits, kept",
    [
        (200, 1050, 1050),
        (200, 700, 700),
        (500, 1050, 1000),
        (500, 1200, 1200),
        (500, 700, 1000),
        (500, 3000, 2000),
    ],
)
def test_once_the_rate_falls_the_number_of_steps_changes_little(
    step, fits, kept, shards, tmp_path, monkeypatch
):
    """Before, it is what fits; after, it grows where a tenth more fits, never shrinks, and never exceeds the config's."""
    config = tiny(
        shards, max_steps=2000, max_minutes=60, decay_fraction=0.7, eval_every=0, save_every=0
    )
    let_a_step_take(lambda step: 0, monkeypatch)
    run, cuts = start_run(config, shards, CPU, log=quiet).trainer, []
    run.callbacks, run.state.step, run.state.max_steps = [Keep(cuts)], step, 1000
    TimeLimit(0.0, quiet).adjust(run, pace=60 * 60 * (1 - SPARE) / (fits - step + 0.5))
    assert run.state.max_steps == kept and [entry["max_steps"] for entry in cuts] == [kept] * (
        kept != 1000
    )


def test_precision_is_chosen_and_the_reason_told(monkeypatch):
    """bf16 where the processor multiplies it, else fp32; what the config asks for is taken."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert pick_precision("auto", CPU) == (torch.bfloat16, "this processor has AMX")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert pick_precision("auto", CPU) == (torch.float32, "this cpu has no fast bf16")
    assert (
        pick_precision("bf16", CPU)[0] == torch.bfloat16
        and pick_precision("fp32", CPU)[0] == torch.float32
    )
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match="tpu"):
        pick_device("tpu")


@pytest.mark.parametrize(
    "muon_lr_scale, kinds",
    [(0.0, [["norm", "embedding", "matrix"]]), (7.0, [["norm", "embedding"], ["matrix"]])],
)
def test_every_parameter_has_its_optimizer(muon_lr_scale, kinds, shards):
    """Each parameter is in one group of one optimizer, only the blocks' matrices decay, and each group has the config's rate."""
    run = begin(shards, embedding_lr_scale=3.0, muon_lr_scale=muon_lr_scale)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    assert [
        [group["kind"] for group in optimizer.param_groups] for optimizer in run.optimizers
    ] == kinds
    found = [p for group in groups for p in group["params"]]
    assert len(set(found)) == len(found) == len(list(run.model.parameters()))
    assert {group["kind"] for group in groups if group["weight_decay"]} == {"matrix"}
    set_learning_rate(run.optimizers, 0.5)
    rates = {group["kind"]: group["lr"] for group in groups}
    assert rates == {"norm": 0.5, "embedding": 1.5, "matrix": (muon_lr_scale or 1) * 0.5}
    run.step()
    assert all(p.grad is None for p in found)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 40), (2, 40, 16), (1, 5, 1)])
def test_orthogonalised(shape):
    """Muon's products: those of a float64 reference, singular values near 1, directions kept, in bf16 nearly the same."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = (
            3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        )  # what the iteration does, each singular value by itself
    found = newton_schulz(matrices)
    torch.testing.assert_close(found.double(), u * s[..., None, :] @ vt, rtol=1e-4, atol=1e-4)
    assert ((torch.linalg.svdvals(found)[:, : min(shape[1:]) // 2 + 1] - 1).abs() < 0.4).all()
    low = newton_schulz(matrices.bfloat16()).float()
    assert torch.cosine_similarity(low.flatten(1), found.flatten(1)).min() > 0.99


def test_muon_step_by_hand():
    """Two steps of Muon are momentum, Nesterov's look ahead, orthogonalisation, decay: written out here, one matrix at a time."""
    torch.manual_seed(0)
    tall, wide = torch.randn(6, 3), torch.randn(3, 6)
    params = [torch.nn.Parameter(tall.clone()), torch.nn.Parameter(wide.clone())]
    optimizer, means = (
        Muon(params, lr=0.1, momentum=0.9, weight_decay=0.5),
        [torch.zeros(6, 3), torch.zeros(3, 6)],
    )
    expected = [tall, wide]
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            means[i] = 0.9 * means[i] + 0.1 * p.grad
            change = newton_schulz((0.1 * p.grad + 0.9 * means[i])[None])[0]
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * (2**0.5 if i == 0 else 1) * change
        optimizer.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), e, rtol=1e-5, atol=1e-6)


def test_config_changes():
    """Only what differs, old and new."""
    old = {"model": {"d": 1}, "training": {"lr": 1.0, "seed": 2}}
    assert config_changes(
        old, {"model": {"d": 1}, "training": {"lr": 2.0, "seed": 2, "new": 3}}
    ) == {"lr": (1.0, 2.0), "new": (None, 3)}


# Several processes

SCRIPT = """
import json, sys
from llm_course.config import load_config
from llm_course.pipeline import train
shards, out, resume, fields = sys.argv[1:]
train(load_config("tiny", json.loads(fields)), shards, out, resume=resume == "resume", device="cpu", progress=False)
"""


def torchrun(shards: Path, out: Path, *, processes: int = 2, resume: bool = False, **fields) -> str:
    """Train the tiny config under torchrun, as a user would start it; what it said."""
    script = out.with_name("train_tiny.py")
    script.write_text(SCRIPT)
    chosen = {
        "precision": "fp32",
        "log_every": 1,
        "batch_size": 8,
        "max_steps": 20,
        "save_every": 10,
        "vocab_size": Tokenizer.load(shards).vocab_size,
        **fields,
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(script),
        str(shards),
        str(out),
        "resume" if resume else "fresh",
        json.dumps(chosen),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"micro_batch_size": 1},
        {"muon_lr_scale": 7.0},
        {"document_aligned": True, "micro_batch_size": 3},
    ],
    ids=str,
)
def test_two_processes_are_one_run(fields, shards, tmp_path):
    """Two gloo processes at the same global batch: the losses of one process over 20 fp32 steps, within 1e-5, and one voice."""
    one = run_quietly(
        tiny(
            shards, batch_size=8, max_steps=20, save_every=10, **{**fields, "micro_batch_size": 0}
        ),
        shards,
        tmp_path / "one",
    )
    said = torchrun(shards, tmp_path / "two", **fields)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert len(losses(tmp_path / "two")) == 20
    assert said.count("parameters on cpu") == 1 and "on 2 processes" in said
    logs = [
        [entry["val_loss"] for entry in read_log(tmp_path / run) if "val_loss" in entry]
        for run in ("one", "two")
    ]
    np.testing.assert_allclose(*logs, rtol=1e-5)
    assert load_verified(tmp_path / "two").step == one.steps


def test_two_processes_resume(shards, tmp_path):
    """Two processes that stop at step 10 and are resumed end where two that did not stop end, bit for bit."""
    torchrun(shards, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    shutil.rmtree(tmp_path / "cut" / "step-000020")
    torchrun(shards, tmp_path / "cut", resume=True)
    same_files(tmp_path / "cut" / "step-000020", tmp_path / "whole" / "step-000020")
    assert told(tmp_path / "cut") == told(tmp_path / "whole")


def test_a_batch_must_divide_among_the_processes(shards):
    """Three processes cannot share eight sequences; the sentence says so."""
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        start_run(tiny(shards, batch_size=8), shards, CPU, World(0, 3), quiet)


# The whole arc


def test_tales_from_nothing(tmp_path):
    """Corpus to checkpoint in one call; the second call does nothing; a changed setting does again what depends on it."""
    said = []

    def arc(**fields):
        said.clear()
        config = load_config("tiny", {"max_steps": 2, "vocab_size": 400, **fields})
        return train_on_tales(
            config, tmp_path, n_train=200, n_val=20, progress=False, log=said.append
        )

    def reused():
        return {line.split(":")[0] for line in said if "up to date" in line}

    checkpoint = arc()
    assert load_verified(checkpoint).step == 2 and not reused()
    before = (checkpoint / "model.safetensors").read_bytes()
    assert arc() == checkpoint and reused() == {"corpus", "tokenizer", "shards", "training"}
    assert arc(max_steps=3).name == "step-000003" and reused() == {"corpus", "tokenizer", "shards"}
    arc(vocab_size=380)
    assert reused() == {"corpus"}
    arc(vocab_size=400)
    assert (
        newest_checkpoint(tmp_path / "checkpoints") / "model.safetensors"
    ).read_bytes() == before, "the same inputs, the same model"
    for name in (
        "corpus.txt",
        "val.txt",
        "llm_spm.model",
        "shards/manifest.json",
        "checkpoints/latest/model.safetensors",
    ):
        assert (tmp_path / name).exists(), name


def test_an_interrupted_arc_goes_on(tmp_path):
    """What was trained before the interruption is not trained again."""
    config = load_config(
        "tiny", {"max_steps": 4, "vocab_size": 400, "save_every": 2, "sample_every": 2}
    )
    with pytest.raises(PowerCut):
        train_on_tales(
            config, tmp_path, n_train=200, n_val=20, progress=False, log=quiet, sampler=cut
        )
    said = []
    train_on_tales(config, tmp_path, n_train=200, n_val=20, progress=False, log=said.append)
    assert any("at step 2" in line for line in said)


def test_a_training_says_how_long_it_will_take(tmp_path, capsys):
    """Measured, before it begins, with a bar from then on; where it is done already, nothing."""
    said = []

    def arc():
        said.clear()
        train_on_tales(
            load_config("tiny", {"max_steps": 40, "vocab_size": 400}),
            tmp_path,
            n_train=200,
            n_val=20,
            log=said.append,
        )
        return [line.startswith("Training takes about ") for line in said]

    announced = arc()
    assert announced.count(True) == 1 and "parameters on" in said[announced.index(True) + 1]
    assert "40/40" in capsys.readouterr().err
    assert not any(arc()) and not capsys.readouterr().err


def test_the_time_that_a_training_needs_is_that_of_the_steps_left(shards):
    """And never more than it may take."""
    config = tiny(shards, max_steps=10**6)
    assert re.fullmatch(
        r"Training takes about [0-9.]+ (minutes|hours|days) on this machine\.",
        time_needed(config, shards, None),
    )
    assert (
        time_needed(config, shards, Path("step-999999"))
        == "Training takes about 1 second on this machine."
    )
    assert (
        time_needed(tiny(shards, max_steps=10**6, max_minutes=2.5), shards, None)
        == "Training takes about 2.5 minutes on this machine."
    )
