"""Memory stays flat: over thousands of batches and steps, and over a corpus of a gigabyte. Slow; each test prints its figures."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, course, fine

from llm_course.config import load_config
from llm_course.packing import get_batch
from llm_course.pipeline import train
from llm_course.shards import TokenDataset, Tokenized, write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import train_tokenizer

STATUS = "/proc/{}/status"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(STATUS.format("self")).exists(), reason="/proc tells how much memory is taken"
    ),
]
FLAT = 50  # MB


def memory(field: str, pid: int | str = "self") -> float:
    "Megabytes of a process: VmRSS, resident; RssAnon, of that what is no mapped file; VmHWM, the most that was ever resident."
    with suppress(FileNotFoundError, ProcessLookupError):  # a worker that has ended since
        for line in Path(STATUS.format(pid)).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sample_tales(0, 300), 600, log=lambda line: None)


def test_ten_thousand_batches(tokenizer, tmp_path: Path) -> None:
    "Batches from a shard of 400 MB: nothing is kept. (Pages of the mapped file are not counted: the system takes them back.)"
    ids = np.random.default_rng(0).integers(2, tokenizer.vocab_size, 2_000_000).astype("<u2")
    write_shards(
        (Tokenized("", ids) for _ in range(100)),
        tokenizer,
        tmp_path / "s",
        val_documents=[],
        seq_len=512,
    )
    shards, seen = TokenDataset(tmp_path / "s"), []
    for step in range(10_500):
        get_batch(shards, step, 16, seed=0)
        if step % 500 == 499:
            seen.append(memory("RssAnon"))
    print(
        f"\n10,000 batches: {seen[-1] - seen[0]:+.1f} MB after 500 (at most {max(seen) - seen[0]:+.1f}, of {seen[0]:.0f})"
    )
    assert max(seen[1:]) - seen[0] < FLAT


def test_ten_thousand_steps(tokenizer, tmp_path: Path) -> None:
    "A real run: steps, log, validation, samples and checkpoints."
    tales, seen = sample_tales(0, 300), []
    write_shards(tales[:280], tokenizer, tmp_path / "s", val_documents=tales[280:], seq_len=32)
    config = load_config(
        "tiny",
        {
            "n_layers": 1,
            "d_model": 16,
            "n_heads": 2,
            "n_kv_heads": 1,
            "d_ff": 24,
            "seq_len": 32,
            "vocab_size": tokenizer.vocab_size,
            "batch_size": 4,
            "max_steps": 11_000,
            "eval_every": 500,
            "sample_every": 500,
            "save_every": 500,
            "log_every": 10,
        },
    )
    train(
        config,
        tmp_path / "s",
        tmp_path / "out",
        device="cpu",
        progress=False,
        log=lambda text: None,
        sampler=lambda model, tokenizer: str(seen.append(memory("VmRSS"))),
    )
    warm = seen[1]
    print(
        f"\n10,000 steps: {seen[-1] - warm:+.1f} MB after the first 1,000 (at most {max(seen[1:]) - warm:+.1f}, of {warm:.0f})"
    )
    assert len(seen) == 22 and max(seen[1:]) - warm < FLAT


def write_corpus(path: Path, megabytes: int) -> Path:
    "A corpus of so many megabytes, in documents of which no two are the same."
    block, size, number = sample_tales(0, 2000), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        while size < megabytes * 1e6:
            size += file.write(
                "".join(f"{number + i} {tale}\n" for i, tale in enumerate(block)).encode()
            )
            number += len(block)
    return path


def children(pid: int) -> list[int]:
    "The processes that a process has started."
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def watched(*args: object, cwd: Path) -> list[float]:
    """The resident memory of `llm-course ARGS` and its workers, ten times a second, and at the end the most that it ever was.

    From when there are most processes: a large text is read for seconds before the first worker begins."""
    command = subprocess.Popen(
        [sys.executable, "-m", "llm_course", *map(str, args)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    seen, processes, highest = [], [], 0.0
    while command.poll() is None:
        everyone = [command.pid, *children(command.pid)]
        seen.append(sum(memory("VmRSS", pid) for pid in everyone))
        processes.append(len(everyone))
        highest = max(highest, sum(memory("VmHWM", pid) for pid in everyone))
        time.sleep(0.1)
    assert command.returncode == 0, command.stderr.read().decode()
    return [*seen[processes.index(max(processes)) :], highest]


@pytest.mark.parametrize(
    "stage, args",
    [
        ("prepare", ["--seq_len", 512, "--workers", 1]),
        ("prepare", ["--seq_len", 512, "--workers", 2]),
        ("tokenizer", ["--vocab_size", 1000, "--model_prefix", "t"]),
    ],
    ids=["prepare", "prepare in two processes", "tokenizer"],
)
def test_a_corpus_of_a_gigabyte(stage: str, args: list, tmp_path: Path) -> None:
    "Ten times the text takes no more memory: the peak on 1 GB is that on 100 MB, and once it is warm nothing grows."
    fine(course("corpus", "--stories", 3000, cwd=tmp_path))
    fine(course("tokenizer", "--vocab_size", 1000, cwd=tmp_path))
    peaks = {}
    for megabytes in (100, 1000):
        folder = tmp_path / f"{megabytes}"
        corpus, begun = write_corpus(folder / "text" / "corpus.txt", megabytes), time.monotonic()
        more = ["--out_dir", folder / "shards"] if stage == "prepare" else []
        *seen, peaks[megabytes] = watched(stage, "--input", corpus, *more, *args, cwd=tmp_path)
        warm = max(seen[: max(1, len(seen) // 10)])
        growth = max(seen) - warm
        seconds = time.monotonic() - begun
        print(
            f"\n{stage}, {megabytes} MB: peak {peaks[megabytes]:.0f} MB, {growth:+.1f} MB after a tenth, {seconds:.0f} s"
        )
        corpus.unlink()
    assert peaks[1000] - peaks[100] < FLAT, peaks
    if stage == "prepare":
        assert growth < FLAT
