"""Faults of disks, memory and networks, really injected: what was saved stays sound, and one sentence says what happened."""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Outcome, course, fine, snapshot
from running import PATIENCE, ROOT, running

from llm_course.checkpoint import save_checkpoint
from llm_course.config import load_config
from llm_course.files import RECORD, UserError, atomic_write
from llm_course.integrity import load_verified
from llm_course.pipeline import open_shards, start_run, train
from llm_course.runs import CHECKPOINT_FILES, newest_checkpoint, read_log, step_folders
from llm_course.shards import write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import train_tokenizer
from llm_course.training import TrainState

# What a file may replace


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("behind_a_link", [False, True])
def test_a_pipe_is_not_replaced(behind_a_link, tmp_path):
    "Nor is a device, as which a pipe stands here: root could rename a file into the place of /dev/null."
    os.mkfifo(place := tmp_path / "pipe")
    if behind_a_link:
        (link := tmp_path / "link").symlink_to(place)
    named = link if behind_a_link else place
    with (
        pytest.raises(UserError, match="cannot be written: it is a device, a pipe or a socket"),
        atomic_write(named),
    ):
        raise AssertionError("the block must not run")
    assert stat.S_ISFIFO(place.stat().st_mode) and os.listdir(tmp_path).count("pipe") == 1
    assert len(os.listdir(tmp_path)) == 1 + behind_a_link


# Disks


class Disk:
    "A small disk of its own, in a mount namespace: `path` is its folder as the commands see it, `seen` the same from out here."

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        script = f"mount -t tmpfs -o {options} none {shlex.quote(str(path))} && echo ready && exec sleep 600"
        for flags in ("-rm", "-m"):
            command = ["unshare", flags, "sh", "-c", script]
            self.holder = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if self.holder.stdout.readline():
                break
            self.holder.wait()
        else:
            pytest.skip("this system lets nobody mount a small disk in a namespace")
        user = ["-U", "--preserve-credentials"] if flags == "-rm" else []
        home = [
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
            str(path),
        ]  # a process that enters stands in / at first
        self.inside = ["nsenter", "-t", str(self.holder.pid), *user, "-m", *home]
        self.seen = Path(f"/proc/{self.holder.pid}/root{path}")

    def fill(self, leave: int = 0) -> None:
        "Take all room but `leave` bytes."
        with (
            open(self.seen / "ballast", "ab", buffering=0) as ballast,
            contextlib.suppress(OSError),
        ):
            while True:
                ballast.write(bytes(1 << 16 if self.free() >= 1 << 16 else 4096))
        os.truncate(self.seen / "ballast", (self.seen / "ballast").stat().st_size - leave)

    def free(self) -> int:
        "Bytes of room."
        return os.statvfs(self.seen).f_bavail * os.statvfs(self.seen).f_frsize

    def make_room(self) -> None:
        "Give all of it back."
        (self.seen / "ballast").unlink()

    def mount(self, *how: str) -> None:
        "Mount the disk anew, somewhere or somehow."
        subprocess.run([*self.inside, "mount", *how], check=True)

    def course(self, *args: object) -> Outcome:
        "A stage in a process of its own, from beginning to end, with the disk as its working folder."
        done = subprocess.run(
            [*self.inside, sys.executable, "-m", "llm_course", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    "A function that mounts a disk with the options of a tmpfs."
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("this system has no namespaces")
    disks = []

    def mounted(options: str) -> Disk:
        (tmp_path / "disk").mkdir()
        disks.append(Disk(tmp_path / "disk", options))
        return disks[0]

    yield mounted
    for each in disks:
        each.holder.kill()
        each.holder.wait()


def endless(trained: Path, out: Path, *more: object) -> list:
    "`train` with small steps and many saves, which will not end by itself."
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
        10**6,
        "--batch_size",
        2,
        "--seq_len",
        16,
        "--save_every",
        4,
        "--eval_every",
        8,
        "--eval_sequences",
        2,
        "--sample_every",
        16,
        "--log_every",
        1,
        *more,
    ]


FAILED = r"(.*)step-\d+ cannot be written: "


def steps(out: Path) -> int:
    "The step of the newest checkpoint."
    return int((newest_checkpoint(out) or Path("step-0")).name[5:])


def sound(out: Path) -> int:
    "Load every checkpoint and read the log; how many there are."
    read_log(out)
    return sound_checkpoints(out)


def sound_checkpoints(out: Path) -> int:
    "Load every checkpoint; how many there are."
    return len([load_verified(folder) for folder in step_folders(out)])


def test_a_full_disk_in_the_middle_of_a_run(trained, disk, tmp_path):
    "The save that fails is said, the old ones stand, the run goes on, and saves again when there is room; then it resumes."
    small = disk("size=12m")
    out = small.seen / "out"
    with running(*endless(trained, small.path / "out"), cwd=tmp_path, wrap=small.inside) as run:
        run.until(lambda: steps(out) >= 8)
        small.fill(leave=600_000)  # of one checkpoint's 1.5 MB
        told = run.until(
            FAILED
            + r"No space left on device\. What was saved before is untouched\. The training goes on"
        )
        stuck = steps(out)
        run.until(
            lambda: run.told.count("The training goes on") > 20
        )  # long enough for the log to fail, too
        assert steps(out) == stuck and sound_checkpoints(out)
        assert str(small.path / "out") in told[1] and not list(out.glob(".*.tmp")), run.told
        small.make_room()
        run.until(lambda: steps(out) > stuck + 8)
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
        assert "Traceback" not in run.told
    assert sound(out) >= 2 and os.readlink(out / "latest") == newest_checkpoint(out).name
    last = steps(out)
    done = course(*endless(trained, out, "--resume", "--max_steps", last + 2), cwd=tmp_path)
    assert done.code == 0 and steps(out) == last + 2, done.err


def test_a_disk_that_is_full_to_the_last_byte(trained, disk, tmp_path):
    "Then the log cannot be written either. The run goes on, and when there is room again, the log is whole, without a torn line."
    small = disk("size=12m")
    out = small.seen / "out"
    with running(*endless(trained, small.path / "out"), cwd=tmp_path, wrap=small.inside) as run:
        run.until(lambda: steps(out) >= 8)
        small.fill()
        run.until(r"log\.jsonl cannot be written: No space left on device\. The training goes on")
        run.until(lambda: run.told.count("step-") > 40)  # several buffers full
        small.make_room()
        stuck = steps(out)
        run.until(lambda: steps(out) > stuck + 8)
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
    assert "Traceback" not in run.told and sound(out) >= 2
    logged = [entry["step"] for entry in read_log(out) if "loss" in entry]
    assert logged == list(range(1, steps(out) + 1)), "lines are missing"
    assert run.told.count("log.jsonl cannot be written") < 20, "said again and again"


def test_a_disk_that_stays_full(trained, disk, tmp_path):
    "A run whose last save fails ends with one line and status 2; the old checkpoint is there to go on from."
    small = disk("size=12m")
    out = small.seen / "out"
    command = endless(
        trained,
        small.path / "out",
        "--max_steps",
        100,
        "--save_every",
        50,
        "--eval_every",
        0,
        "--sample_every",
        0,
    )
    with running(*command, cwd=tmp_path, wrap=small.inside) as run:
        run.until(lambda: steps(out) == 50)
        small.fill()
        assert run.end() == 2, run.told
    assert re.search(
        r"llm-course train: .*step-000100 cannot be written: No space left on device\.",
        run.lines[-1],
    ), run.told
    assert "Traceback" not in run.told and steps(out) == 50 and sound_checkpoints(out) == 1
    small.make_room()
    done = course(*command, "--resume", "--out", out, cwd=tmp_path)
    assert done.code == 0 and steps(out) == 100 and sound(out) == 2, done.err


def test_latest_where_links_are_refused_and_the_disk_is_full(trained, disk, monkeypatch):
    "`latest` is then a copy, for which there may be no room: the checkpoint itself is whole, and the next save mends `latest`."

    def refuse(*args: object, **named: object) -> None:
        raise OSError("links are refused")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    small = disk("size=30m")
    config = load_config("tiny", {"precision": "fp32", "keep_checkpoints": 9})
    start = start_run(config, trained / "data/shards", torch.device("cpu"), log=list)
    out, model = small.seen / "out", start.trainer.model
    save = lambda step: save_checkpoint(
        out, model, start.tokenizer, config.training, TrainState(step), start.trainer.optimizers
    )
    save(0)
    size = sum(file.stat().st_size for file in (out / "step-000000").iterdir())
    small.fill(leave=int(1.5 * size))
    with pytest.raises(UserError, match=r"latest cannot be written: .*No space left on device"):
        save(1)
    assert load_verified(out / "step-000001").step == 1 and load_verified(out / "latest").step == 0
    small.make_room()
    save(2)
    assert load_verified(out / "latest").step == 2


def test_a_disk_without_inodes(trained, disk, tmp_path):
    "No more files can be made: whichever file of a save that stops, it is said, nothing half stays, and later saves succeed."
    small = disk("size=50m,nr_inodes=60")
    out = small.seen / "out"
    with running(
        *endless(trained, small.path / "out", "--sample_every", 0), cwd=tmp_path, wrap=small.inside
    ) as run:
        run.until(lambda: steps(out) >= 12)
        last = steps(out)
        for spare in range(
            10, -1, -1
        ):  # files that a save may make before it fails: eight, their folder and the link
            files = [small.seen / f"file-{i}" for i in range(60)]
            with contextlib.suppress(OSError):
                for file in files:
                    file.touch()
            with contextlib.suppress(OSError):
                for file in files[:spare]:
                    file.unlink()
            seen = len(run.told)
            run.until(lambda: "The training goes on" in run.told[seen:] or steps(out) > last)
            for file in files:
                file.unlink(missing_ok=True)
            last = steps(out)
            run.until(lambda: steps(out) > last + 4)
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
    assert "Traceback" not in run.told and "[(" not in run.told, run.told
    assert (
        sound(out) >= 2
        and os.readlink(out / "latest") == newest_checkpoint(out).name
        and not list(out.glob(".*.tmp"))
    )


STAGES = {
    "corpus": ("--stories 400", "data/raw"),
    "tokenizer": ("--vocab_size 500", "artifacts/tokenizer"),
    "prepare": ("--seq_len 16 --val data/raw/val.txt", "data/shards"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_in_an_earlier_stage(stage, trained, disk):
    "At whatever byte the disk is full, what the stage had made before stays to the byte, nothing half is left, one line says so."
    small, (args, made) = disk("size=6m"), STAGES[stage]
    for folder in ("data", "artifacts/tokenizer"):
        shutil.copytree(trained / folder, small.seen / folder)
    command = [stage, *args.split(), *(["--seed", 1] if stage == "corpus" else [])]
    for leave in (0, 4096, 20_000) if stage == "tokenizer" else (0, 40_000, 300_000):
        small.fill(leave)
        before = snapshot(small.seen)
        done = small.course(*command)
        if done.code == 0:  # it fitted, in the room that was left
            assert leave == 20_000
            continue
        assert done.code == 2 and len(done.lines) == 1, done.err
        assert re.match(
            rf"llm-course {stage}: .*{made}.* No space left on device\.", done.lines[0]
        ), done.lines
        assert snapshot(small.seen) == before
        small.make_room()
    fine(small.course(*command))
    assert not [path for path in small.seen.rglob(".*") if path.name not in (".lock", RECORD)]


@pytest.mark.parametrize("stage", [*STAGES, "train"])
def test_a_read_only_disk(stage, trained, disk):
    "One line says which folder cannot be written; nothing has changed."
    small = disk("size=20m")
    for folder in ("data", "artifacts"):
        shutil.copytree(trained / folder, small.seen / folder, symlinks=True)
    before = snapshot(small.seen)
    small.mount("-o", "remount,ro", str(small.path))
    args, made = {
        **STAGES,
        "train": ("--config tiny --resume --max_steps 9", "artifacts/checkpoints"),
    }[stage]
    done = small.course(stage, *args.split())
    assert done.code == 2 and len(done.lines) == 1, done.err
    assert re.match(rf"llm-course {stage}: .*{made}.* Read-only file system\.", done.lines[0]), (
        done.lines
    )
    assert snapshot(small.seen) == before


def test_a_disk_that_becomes_read_only(trained, disk, tmp_path):
    "As when the system remounts it after an error: the saves fail and say so, the run goes on, and saves when it can."
    small = disk("size=12m")
    out = small.seen / "out"
    with running(*endless(trained, small.path / "out"), cwd=tmp_path, wrap=small.inside) as run:
        run.until(lambda: steps(out) >= 8)
        small.mount("--bind", str(small.path), str(small.path))
        small.mount("-o", "remount,bind,ro", str(small.path))
        run.until(
            FAILED
            + r"Read-only file system\. What was saved before is untouched\. The training goes on"
        )
        small.mount("-o", "remount,bind,rw", str(small.path))
        stuck = steps(out)
        run.until(lambda: steps(out) > stuck + 8)
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
    assert "Traceback" not in run.told and sound(out) >= 2


DELETED = {
    "the newest checkpoint": lambda out: shutil.rmtree(newest_checkpoint(out)),
    "one file of it": lambda out: (newest_checkpoint(out) / "model.safetensors").unlink(),
    "latest": lambda out: (out / "latest").unlink(),
    "the log": lambda out: (out / "log.jsonl").unlink(),
    "the lock": lambda out: (out / ".lock").unlink(),
    "all of it": lambda out: os.rename(out, out.with_name("elsewhere")),
}


def test_deleted_under_a_run(trained, tmp_path):
    "Somebody tidies up, again and again. The run goes on, its next checkpoints are whole, and `latest` names the newest."
    out = tmp_path / "out"
    with running(
        *endless(trained, out, "--save_every", 20, "--sample_every", 0), cwd=tmp_path
    ) as run:
        run.until(lambda: steps(out) >= 20)
        for delete in DELETED.values():
            before = steps(out)
            delete(out)
            run.until(lambda: steps(out) >= before + 60)
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
    assert "Traceback" not in run.told and sound_checkpoints(out) >= 2
    assert os.readlink(out / "latest") == newest_checkpoint(out).name


def test_a_checkpoint_with_a_file_missing_is_named(trained, tmp_path):
    "`--resume` does not begin afresh, nor go on from something older without a word: it says which file, and what to do."
    shutil.copytree(trained / "artifacts/checkpoints", tmp_path / "out", symlinks=True)
    (tmp_path / "out/step-000008/trainer.pt").unlink()
    command = [
        "train",
        "--config",
        "tiny",
        "--data",
        trained / "data/shards",
        "--out",
        tmp_path / "out",
        "--max_steps",
        8,
        "--resume",
    ]
    done = course(*command, cwd=tmp_path)
    assert done.code == 2 and "step-000008/trainer.pt cannot be read" in done.lines[-1], done.err
    shutil.rmtree(tmp_path / "out/step-000008")
    assert "Resuming" in fine(course(*command, cwd=tmp_path)) and sound(tmp_path / "out") == 2


FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/* While the file $FAULT_SWITCH exists, every seventh fsync fails: so each of the ten of a save does, sooner or later. */
int fsync(int fd) {
    static int (*real)(int), count;
    if (!real) real = (int (*)(int)) dlsym(RTLD_NEXT, "fsync");
    if (access(getenv("FAULT_SWITCH"), F_OK) == 0 && ++count % 7 == 0) { errno = EIO; return -1; }
    return real(fd);
}
"""


def test_an_fsync_that_fails(trained, tmp_path):
    "A disk that reports an error in the end: no such save counts as one, all that is there loads, and the run goes on."
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, and a system that preloads libraries")
    (tmp_path / "fsync.c").write_text(FSYNC)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "fsync.so", tmp_path / "fsync.c", "-ldl"],
        check=True,
    )
    switch, out = tmp_path / "switch", tmp_path / "out"
    told = r"step-(\d+) cannot be written: Input/output error\. What was saved before is untouched\. The training goes on"
    with running(
        *endless(trained, out, "--keep_checkpoints", 100, "--sample_every", 0),
        cwd=tmp_path,
        LD_PRELOAD=str(tmp_path / "fsync.so"),
        FAULT_SWITCH=str(switch),
    ) as run:
        run.until(lambda: steps(out) >= 8)
        switch.touch()
        run.until(lambda: len(re.findall(told, run.told)) >= 20)
        switch.unlink()
        good = steps(out)
        run.until(lambda: steps(out) > good + 8)
        run.send(signal.SIGTERM)
        assert run.end() == 143, run.told
    assert "Traceback" not in run.told and sound(out) > 3 and not list(out.glob(".*.tmp"))
    assert os.readlink(out / "latest") == newest_checkpoint(out).name


# Memory


def test_out_of_memory_says_what_fits(trained, tmp_path):
    "On a CPU with a bound on its memory: the sentence names a micro batch size, and with that the same command works."
    resource = pytest.importorskip("resource", reason="this system bounds no process's memory")
    probe = (
        "import os, resource, torch; x = torch.ones(64, 64, requires_grad=True); (x @ x).sum().backward();"
        "print(open('/proc/self/statm').read().split()[0] if os.path.exists('/proc/self/statm') else '')"
    )
    used = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path
    ).stdout.strip()
    if not used:
        pytest.skip("this system does not say how much address space a process has")
    bound = int(used) * resource.getpagesize() + 250_000_000
    limited = [
        "-c",
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({bound}, {bound}))\n"
        "from llm_course.cli import main; main()",
    ]
    command = [
        "train",
        "--config",
        "tiny",
        "--data",
        trained / "data/shards",
        "--out",
        tmp_path / "out",
        "--precision",
        "fp32",
        "--batch_size",
        512,
        "--max_steps",
        3,
        "--warmup_steps",
        0,
    ]
    with running(*command, cwd=tmp_path, python=limited) as run:
        assert run.end() == 2, run.told
    found = re.search(
        r"512 sequences of 64 tokens does not fit into memory: --micro_batch_size (\d+) does",
        run.lines[-1],
    )
    assert found and "Traceback" not in run.told, run.told
    with running(*command, "--micro_batch_size", found[1], cwd=tmp_path, python=limited) as run:
        assert run.end() == 0, run.told
    assert sound(tmp_path / "out") == 1


# Bits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable, Path]]:
    "Shards and a checkpoint so small that they can be read again for each bit; and how each is loaded."
    folder, documents = tmp_path_factory.mktemp("bits"), sample_tales(0, 40)
    write_shards(
        documents[:30],
        train_tokenizer(documents, 330),
        folder / "shards",
        val_documents=documents[30:],
        seq_len=16,
    )
    fields = {
        "n_layers": 1,
        "d_model": 4,
        "n_heads": 1,
        "n_kv_heads": 1,
        "d_ff": 4,
        "seq_len": 16,
        "max_steps": 1,
        "precision": "fp32",
        "batch_size": 2,
    }
    result = train(
        load_config("tiny", fields),
        folder / "shards",
        folder / "out",
        device="cpu",
        progress=False,
        log=list,
    )
    return {
        "shards": (load_shards, folder / "shards"),
        "checkpoint": (load_verified, result.checkpoint),
    }


def load_shards(folder: Path) -> None:
    "Open a folder of shards as a run does, and verify every byte."
    for shards in open_shards(folder, 16)[1:]:
        shards.verify()


def faults(file: Path, many: int) -> Iterator[tuple[str, bytes]]:
    "Every flipped bit and every truncation of a file, or so `many` of each where it has more; and what that makes of it."
    good, draw = file.read_bytes(), random.Random(file.name)
    bits, lengths = range(8 * len(good)), range(len(good))
    for bit in bits if len(bits) <= many else draw.sample(bits, many):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8}, {good[bit // 8 :][:1]!r}, flipped", bytes(bad)
    for length in (
        lengths if len(lengths) <= many else [*draw.sample(lengths[:-1], many - 1), lengths[-1]]
    ):
        yield f"cut to {length} of {len(good)} bytes", good[:length]


def undetected(load: Callable, folder: Path, name: str, many: int) -> list[str]:
    "The faults of a file that loading its folder does not refuse with a sentence that names the file."
    file, found = folder / name, []
    good = file.read_bytes()
    try:
        for fault, bad in faults(file, many):
            file.write_bytes(bad)
            try:
                load(folder)
                found.append(fault)
            except UserError as error:
                if name not in str(error):
                    found.append(f"{fault}: {error}")
            except Exception as error:
                found.append(f"{fault}: {error!r}")
    finally:
        file.write_bytes(good)
    load(folder)
    return found


SHARD_FILES = (
    "train-00000.bin",
    "train-00000.idx",
    "val-00000.bin",
    "val-00000.idx",
    "tokenizer.model",
    "manifest.json",
)
FILES = [
    *(("checkpoint", name) for name in (*CHECKPOINT_FILES, "manifest.json")),
    *(("shards", name) for name in SHARD_FILES),
]


@pytest.mark.parametrize("what, name", FILES)
def test_bits_and_lengths(what, name, small):
    "100 flipped bits and 100 truncations of every file are refused at load, with the file's name, as nothing but a UserError."
    assert undetected(*small[what], name, 100) == []


@pytest.mark.slow
@pytest.mark.parametrize("what, name", FILES)
def test_every_bit_and_every_length(what, name, small):
    "The same for each bit and each length of a small file, and for 2,000 of each of a larger one."
    assert (
        undetected(
            *small[what], name, 10**6 if (small[what][1] / name).stat().st_size < 4000 else 2000
        )
        == []
    )
