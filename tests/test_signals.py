"""Signals, sent to real processes: every stage ends as it should, loses nothing that was saved, leaves no half of anything."""

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import course, fine, snapshot, words_of
from running import PATIENCE, ROOT, Running, running

from llm_course.integrity import load_verified
from llm_course.runs import CHECKPOINT_FILES, newest_checkpoint, read_log, step_folders

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals to process groups are POSIX")
MOMENTS = random.Random(0)  # when a signal comes, within what the command does then
STATUS = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
}  # the last one: where a terminal is closed
QUICK = [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]


def train_command(trained: Path, out: Path) -> list:
    "A run of a second or so, with saves, validations and samples in it."
    return [
        "train",
        "--config",
        "tiny",
        "--data",
        trained / "data/shards",
        "--out",
        out,
        "--precision",
        "fp32",
        "--max_steps",
        60,
        "--batch_size",
        4,
        "--save_every",
        9,
        "--eval_every",
        13,
        "--sample_every",
        17,
        "--log_every",
        1,
        "--keep_checkpoints",
        3,
    ]


def told(out: Path) -> list[dict]:
    "The log without what a clock decides."
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(out)]


def same(a: object, b: object) -> bool:
    "Whether two nests of dictionaries, lists and tensors are the same, bit for bit."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_end(a: Path, b: Path) -> None:
    "Two runs have ended in the same checkpoint, and told the same."
    a, b = newest_checkpoint(a), newest_checkpoint(b)
    assert a.name == b.name and told(a.parent) == told(b.parent)
    for name in set(CHECKPOINT_FILES) - {"trainer.pt"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = (torch.load(folder / "trainer.pt", weights_only=True) for folder in (a, b))
    assert same(first, second)


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory) -> Path:
    "Where the run has come to its end in peace."
    folder = tmp_path_factory.mktemp("undisturbed")
    fine(course(*train_command(trained, folder / "out"), cwd=folder))
    return folder / "out"


def interrupted(
    number: int, draw: random.Random, trained: Path, undisturbed: Path, folder: Path
) -> int:
    "Signal a run at a random moment of its training, resume it as its last line says, and compare; the step at which it stopped."
    out = folder / "out"
    with running(*train_command(trained, out), cwd=folder) as run:
        step = draw.randrange(60)
        run.until(
            lambda: (
                (out / "log.jsonl").exists()
                and (out / "log.jsonl").read_text().count('"loss"') >= step
            )
        )
        time.sleep(draw.uniform(0, 0.02))
        run.send(number)
        code = run.end()
    assert "Traceback" not in run.told, run.told
    if code == 0:
        same_end(out, undisturbed)  # too late
        return 60
    assert code == STATUS[number], run.told
    stopped = re.search(
        r"Stopped after step (\d+), which is saved; `(.+)` goes on from there\.", run.lines[-1]
    )
    assert stopped, run.told
    step, command = stopped.groups()
    assert newest_checkpoint(out).name == f"step-{int(step):06d}" and not list(out.glob(".*.tmp"))
    assert all(load_verified(each) for each in step_folders(out))
    fine(course(*words_of(command), cwd=folder))
    same_end(out, undisturbed)
    return int(step)


@pytest.mark.parametrize("number", QUICK)
def test_a_signal_at_a_random_moment_of_training(number, trained, undisturbed, tmp_path):
    "Exit status 130 or 143; the last line has the command that goes on; it ends as a run that nobody stopped, to the bit."
    interrupted(number, random.Random(number), trained, undisturbed, tmp_path)


@pytest.mark.slow
def test_many_signals(trained, undisturbed, tmp_path):
    "The same, thirty times."
    draw, stopped = random.Random(0), []
    for i in range(30):
        (tmp_path / str(i)).mkdir()
        stopped.append(
            interrupted(draw.choice(list(STATUS)), draw, trained, undisturbed, tmp_path / str(i))
        )
        shutil.rmtree(tmp_path / str(i))
    print(f"\nstopped after the steps {sorted(stopped)}")
    assert len(set(stopped)) > 10


def test_a_second_interrupt_ends_at_once(trained, tmp_path):
    "Also in the middle of a step that takes a minute; the checkpoints from before it load, and a resume goes on from the newest."
    out = tmp_path / "out"
    fine(course(*train_command(trained, out), "--max_steps", 2, "--save_every", 1, cwd=tmp_path))
    before = newest_checkpoint(out)
    slow = [
        *train_command(trained, out),
        "--resume",
        "--batch_size",
        2**15,
        "--micro_batch_size",
        8,
    ]
    with running(*slow, cwd=tmp_path) as run:
        run.until("Resuming")
        time.sleep(0.5)
        run.send(signal.SIGINT)
        time.sleep(0.3)
        assert run.process.poll() is None, "the first finishes the step"
        run.send(signal.SIGINT)
        assert run.end() == 130, run.told
    assert (
        "Traceback" not in run.told
        and newest_checkpoint(out) == before
        and load_verified(out).path == before
    )
    fine(
        course(
            *train_command(trained, out),
            "--resume",
            "--max_steps",
            int(before.name[5:]) + 1,
            cwd=tmp_path,
        )
    )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks into /proc for how far the start has come"
)
@pytest.mark.parametrize("number", QUICK)
def test_a_signal_while_all_is_loaded(number, trained, tmp_path):
    "It waits until all is there, for C++ may abort in between; at most one line, 130 or 143, nothing begun; the command works again."
    with running(*train_command(trained, tmp_path / "out"), cwd=tmp_path) as run:
        run.until(lambda: "libtorch" in Path(f"/proc/{run.process.pid}/maps").read_text())
        status = Path(f"/proc/{run.process.pid}/status").read_text()
        assert int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16) >> number - 1 & 1, status
        time.sleep(MOMENTS.uniform(0, 0.5))
        run.send(number)
        assert run.end() == STATUS[number], run.told
    assert "Traceback" not in run.told and len(run.lines) <= 5, run.told
    assert not step_folders(tmp_path / "out")
    fine(course(*train_command(trained, tmp_path / "out"), "--max_steps", 2, cwd=tmp_path))


STAGES = {  # arguments that keep a stage busy for long, what it tells once it is, and what it makes
    "corpus": (["--stories", 10**6, "--seed", 1], "Writing"),
    "tokenizer": (
        ["--input", "long.txt", "--documents", "line", "--vocab_size", 700],
        "every line",
    ),
    "prepare": (
        [
            "--input",
            "long.txt",
            "--documents",
            "line",
            "--seq_len",
            16,
            "--val",
            "data/raw/val.txt",
        ],
        "Validation",
    ),
    "eval": (["--input", "long.txt", "--documents", "line", "--stride", 1], "every line"),
    "generate": (["--n", 10**6, "--max_new_tokens", 10**6], "Once upon"),
}


@pytest.fixture(scope="module")
def busy(trained, tmp_path_factory) -> Path:
    "A finished run with a long text beside it."
    folder = tmp_path_factory.mktemp("busy") / "run"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "long.txt").write_bytes((trained / "data/raw/corpus.txt").read_bytes() * 40)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_in_every_other_stage(stage, busy, tmp_path):
    "Ctrl-C: one line, status 130, and every file is as it was: nothing half, nothing new, nothing hidden."
    args, sign = STAGES[stage]
    before = snapshot(busy)
    with running(stage, *args, cwd=busy) as run:
        output = Path(run.file.name)
        run.until(sign)
        time.sleep(MOMENTS.uniform(0.1, 0.6))
        run.send(signal.SIGINT)
        assert run.end() == 130, run.told
    output.rename(tmp_path / "output")
    text = (tmp_path / "output").read_text(errors="replace")
    assert text.rstrip().endswith(f"llm-course {stage}: stopped.") and "Traceback" not in text, (
        text[-2000:]
    )
    assert snapshot(busy) == before


@pytest.mark.parametrize("stage", ["corpus", "tokenizer", "prepare"])
def test_a_terminated_stage_leaves_no_half(stage, busy, tmp_path):
    "SIGTERM, as a scheduler sends it: status 143, and every file is as it was."
    args, sign = STAGES[stage]
    before = snapshot(busy)
    with running(stage, *args, cwd=busy) as run:
        output = Path(run.file.name)
        run.until(sign)
        time.sleep(MOMENTS.uniform(0.1, 0.6))
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
    output.unlink()
    try:
        assert snapshot(busy) == before
    finally:
        for left in set(snapshot(busy)) - set(before):
            shutil.rmtree(busy / left) if (busy / left).is_dir() else (busy / left).unlink(
                missing_ok=True
            )


def group_is_empty(run: Running) -> bool:
    "Whether the command and all that it has started have ended."
    try:
        os.killpg(run.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def ends_alone(run: Running) -> None:
    "Wait until no process of the command is left."
    end = time.monotonic() + PATIENCE
    while not group_is_empty(run):
        assert time.monotonic() < end, "a process has outlived the command that started it"
        time.sleep(0.01)


def with_workers(busy: Path, out: Path) -> list:
    "`prepare` in three processes, for some seconds."
    return [
        "prepare",
        "--input",
        busy / "long.txt",
        "--documents",
        "line",
        "--tok",
        busy / "artifacts/tokenizer/llm_spm.model",
        "--seq_len",
        16,
        "--val",
        busy / "data/raw/val.txt",
        "--out_dir",
        out,
        "--workers",
        3,
    ]


@pytest.mark.parametrize("to_all", [True, False], ids=["to all", "to the first"])
@pytest.mark.parametrize("number", QUICK[:2])
def test_a_signal_to_prepare_with_workers(number, to_all, busy, tmp_path):
    "A terminal sends Ctrl-C to every process, a scheduler may ask the first alone: one line at most, and nobody and nothing stays."
    with running(*with_workers(busy, tmp_path / "shards"), cwd=tmp_path) as run:
        run.until("Validation")
        time.sleep(MOMENTS.uniform(0, 0.8))  # the workers start, or work
        run.send(number) if to_all else run.process.send_signal(number)
        assert run.end() == STATUS[number], run.told
        ends_alone(run)
    assert run.lines[2:] == ["llm-course prepare: stopped."] * (number == signal.SIGINT), run.told
    assert [path.name for path in tmp_path.iterdir()] == [Path(run.file.name).name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the workers")
@pytest.mark.parametrize("victim", ["the first process", "a worker"])
def test_a_process_of_prepare_is_killed(victim, busy, tmp_path):
    "Without the first process its workers end, too; without a worker the command ends with a sentence and status 2. It works again."
    with running(*with_workers(busy, tmp_path / "shards"), cwd=tmp_path) as run:
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
        named = lambda: [
            pid
            for pid in children.read_text().split()
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        run.until(lambda: len(named()) == 2)
        time.sleep(0.3)
        os.kill(
            run.process.pid if victim == "the first process" else int(named()[0]), signal.SIGKILL
        )
        code = run.end()
        ends_alone(run)
    if victim == "a worker":
        assert code == 2 and "A worker process has come to a sudden end" in run.lines[-1], run.told
        assert not list(tmp_path.glob("*shards*"))
    fine(course(*with_workers(busy, tmp_path / "shards"), cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["shards"]


# A cell of a notebook


def test_stopping_a_cell(trained, tmp_path):
    "The stop button of Jupyter, during `training.train`: the step is saved, the kernel goes on computing, the checkpoint loads."
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    pytest.importorskip("ipykernel")
    manager.start_kernel(cwd=str(tmp_path), env={**os.environ, "PYTHONPATH": str(ROOT)})
    client = manager.client()
    client.start_channels()

    def run(code: str, act: object = None) -> tuple[dict, str]:
        "Execute a cell; its reply, and what it printed. `act` happens when it prints for the first time."
        printed = []

        def output(message: dict) -> None:
            nonlocal act
            printed.append(
                message["content"].get("text", "")
                or str(message["content"].get("data", {}).get("text/plain", ""))
            )
            if act and "passes over" in "".join(printed):
                time.sleep(1)
                act()
                act = None

        return client.execute_interactive(code, timeout=PATIENCE, output_hook=output)[
            "content"
        ], "".join(printed)

    try:
        client.wait_for_ready(timeout=PATIENCE)
        cell = (
            "from llm_course.config import load_config\nfrom llm_course.pipeline import train\n"
            "config = load_config('tiny', {'max_steps': 100_000, 'precision': 'fp32', 'save_every': 0, 'eval_every': 0})\n"
            f"train(config, {str(trained / 'data/shards')!r}, 'out', progress=False)"
        )
        reply, printed = run(cell, manager.interrupt_kernel)
        assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt", printed
        step = int(
            re.search(r"Stopped after step ([\d,]+), which is saved; resume=True goes on", printed)[
                1
            ].replace(",", "")
        )
        reply, printed = run("1 + 1")
        assert reply["status"] == "ok" and "2" in printed
        reply, printed = run(
            "from llm_course.integrity import load_verified\nload_verified('out').step"
        )
        assert reply["status"] == "ok" and int(printed) == step > 0
        reply, printed = run(
            cell.replace("100_000", str(step + 1)).replace("progress", "resume=True, progress")
        )
        assert reply["status"] == "ok" and f"at step {step:,} of {step + 1:,}" in printed
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
