"""The doctor: each fault is really made, is found under its name, and the command that is given mends it."""

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import PATIENCE, ROOT, SCALE, course, fine, snapshot

from llm_course import doctor, kernels, preparation
from llm_course.device import memory, physical_memory, pick_precision
from llm_course.doctor import (
    TINY,
    Finding,
    RunPaths,
    check_checkpoints,
    check_clock,
    check_disk,
    check_folders,
    check_log,
    check_numbers,
    check_packages,
    check_shards,
    check_tokenizer,
    examine,
    guarded,
    usable_processors,
)
from llm_course.numerics import device_code_paths
from llm_course.runs import step_folders
from llm_course.shards import Manifest

SHARDS, CHECKPOINTS, TOKENIZER = (
    Path("data/shards"),
    Path("artifacts/checkpoints"),
    Path("artifacts/tokenizer/llm_spm.model"),
)
NEWEST, BEFORE = CHECKPOINTS / "step-000008", CHECKPOINTS / "step-000004"
FILES = (
    check_tokenizer,
    check_shards,
    check_checkpoints,
    check_log,
    check_folders,
    check_clock,
    check_disk,
)
posix = pytest.mark.skipif(os.name != "posix", reason="limits and permissions of a POSIX system")


def look(folder: Path, *checks: Callable, **places: object) -> list[Finding]:
    "What the checks (those of files, unless given) find in a folder with the default paths."
    with contextlib.chdir(folder):
        return [
            finding for check in checks or FILES for finding in guarded(check, RunPaths(**places))
        ]


def wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state == "wrong"]


def run_command(command: str, folder: Path) -> None:
    "Run a command as it stands, as a user would who pastes it."
    if command.startswith("llm-course "):
        fine(course(*shlex.split(command)[1:], cwd=folder))
    else:
        subprocess.run(
            command,
            shell=True,
            cwd=folder,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=PATIENCE,
        )


def elsewhere(check: str, before: str = "", **env: str) -> list[Finding]:
    "What one check finds in a process of its own, started by a shell that has run `before`."
    code = f"import json; from llm_course.doctor import *; print(json.dumps([vars(f) for f in {check}(RunPaths())]))"
    script = f"{before}\n{shlex.join([sys.executable, '-c', code])}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return [Finding(**found) for found in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    "A copy of the trained folder, to be hurt."
    return Path(shutil.copytree(trained, tmp_path / "a hurt run", symlinks=True))


def test_the_whole_visit_takes_less_than_a_minute_and_changes_nothing(trained: Path):
    "Every check runs, none is wrong on sound files, and neither files nor threads nor random numbers are touched."
    said, before = [], (snapshot(trained), torch.get_num_threads(), torch.random.get_rng_state())
    begun = os.times()
    with contextlib.chdir(trained):
        found = examine(log=said.append)
    worked = sum(os.times()[:4]) - sum(begun[:4])  # of two processors, here and in what was started
    assert worked < 2 * 60 * SCALE
    assert snapshot(trained) == before[0] and torch.get_num_threads() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    machine = {
        "packages",
        "processors",
        "memory",
        "disk",
        "gpu",
        "bf16",
        "numbers",
        "clock",
        "folders",
        "compile",
    }
    assert {finding.name for finding in found} == machine | {
        "tokenizer",
        "shards",
        "checkpoints",
        "latest",
        "log",
    }
    assert len(said) == len(found) + 1 and all(map(str.__eq__, said, map(str, found)))
    files = [
        f
        for f in found
        if f.name in ("tokenizer", "shards", "checkpoints", "latest", "log", "folders", "numbers")
    ]
    assert {finding.state for finding in files} == {"fine"}, files


def test_nothing_made_yet_is_no_fault(tmp_path: Path):
    "In an empty folder each stage that has not run is a note with its command, and nothing appears there."
    found = look(tmp_path)
    assert not wrong(found) and not list(tmp_path.iterdir())
    commands = [finding.command.split()[1] for finding in found if finding.state == "note"]
    assert commands == ["tokenizer", "prepare", "train"]


def flip(path: Path) -> None:
    "Change one bit in the middle of a file."
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def other_index(path: Path) -> None:
    "An index of the right size that cuts documents where they do not begin: the first two lengths exchanged."
    raw = bytearray(path.read_bytes())
    raw[34:38], raw[38:42] = raw[38:42], raw[34:38]
    path.write_bytes(raw)


def lossy_tokenizer(path: Path) -> None:
    "A tokenizer with the settings that SentencePiece has unless told otherwise: it changes the text."
    prefix = path.with_suffix("")
    texts = iter(["once upon a time there was a quick brown fox that jumped over a lazy dog"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=str(prefix),
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    prefix.with_suffix(".vocab").unlink()


def other_tokenizer(path: Path) -> None:
    "A sound tokenizer of another vocabulary."
    folder = path.parents[2]
    fine(
        course(
            "tokenizer",
            "--vocab_size",
            500,
            "--model_prefix",
            path.relative_to(folder).with_suffix(""),
            cwd=folder,
        )
    )


def link_to(name: str) -> Callable[[Path], None]:
    def point(path: Path) -> None:
        path.unlink()
        path.symlink_to(name, target_is_directory=True)

    return point


def old_copy(path: Path) -> None:
    "What a system without links has: `latest` as a copy, of a checkpoint that is not the newest."
    path.unlink()
    shutil.copytree(path.parent / BEFORE.name, path)


FAULTS = {
    "a bit of a shard": ("shards", SHARDS / "train-00000.bin", flip),
    "a bit of the validation shard": ("shards", SHARDS / "val-00000.bin", flip),
    "a shard cut off": ("shards", SHARDS / "train-00000.bin", truncate),
    "a shard gone": ("shards", SHARDS / "train-00000.bin", Path.unlink),
    "an index cut off": ("shards", SHARDS / "train-00000.idx", truncate),
    "an index of other documents": ("shards", SHARDS / "train-00000.idx", other_index),
    "a manifest cut off": ("shards", SHARDS / "manifest.json", truncate),
    "the shards' tokenizer damaged": ("shards", SHARDS / "tokenizer.model", truncate),
    "a tokenizer cut off": ("tokenizer", TOKENIZER, truncate),
    "a tokenizer that changes the text": ("tokenizer", TOKENIZER, lossy_tokenizer),
    "another tokenizer": ("tokenizer", TOKENIZER, other_tokenizer),
    **{
        f"a bit of a checkpoint's {name}": ("checkpoints", NEWEST / name, flip)
        for name in (
            "model.safetensors",
            "trainer.pt",
            "config.json",
            "tokenizer.model",
            "manifest.json",
        )
    },
    "a checkpoint's file gone": ("checkpoints", NEWEST / "trainer.pt", Path.unlink),
    "an older checkpoint damaged": ("checkpoints", BEFORE / "model.safetensors", flip),
    "latest dangling": ("latest", CHECKPOINTS / "latest", link_to("step-000009")),
    "latest an older one": ("latest", CHECKPOINTS / "latest", link_to(BEFORE.name)),
    "latest gone": ("latest", CHECKPOINTS / "latest", Path.unlink),
    "latest an old copy": ("latest", CHECKPOINTS / "latest", old_copy),
    "a log damaged": (
        "log",
        CHECKPOINTS / "log.jsonl",
        lambda path: path.write_text('{"step": 1, "lo\n' + path.read_text()),
    ),
    "a log without steps": ("log", CHECKPOINTS / "log.jsonl", lambda path: path.write_text("{}\n")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_command_mends_it(fault: str, run: Path):
    "The commands that the doctor gives, run as they stand, in their order, leave nothing wrong."
    name, path, hurt = FAULTS[fault]
    hurt(run / path)
    found = wrong(look(run))
    assert name in [finding.name for finding in found], found
    assert all(finding.command and "\n" not in finding.what for finding in found)
    for finding in found:
        run_command(finding.command, run)
    assert not wrong(look(run)), look(run)
    assert fine(course("generate", "--prompt", "Once", "--max_new_tokens", 2, cwd=run))


def test_a_damaged_checkpoint_is_kept(run: Path):
    "To mend is not to delete: the damaged folder stays, under a name that no stage reads."
    flip(run / NEWEST / "model.safetensors")
    files = snapshot(run / NEWEST)
    for finding in wrong(look(run, check_checkpoints)):
        run_command(finding.command, run)
    assert snapshot(run / CHECKPOINTS / f"damaged-{NEWEST.name}") == files
    assert [folder.name for folder in step_folders(run / CHECKPOINTS)] == [BEFORE.name]


def test_shards_made_again_are_the_same(run: Path):
    "The command for a damaged shard knows the text, the tokenizer and the length: what it makes is what there was."
    before = Manifest.load(run / SHARDS)
    flip(run / SHARDS / "train-00000.bin")
    [finding] = wrong(look(run, check_shards))
    run_command(finding.command, run)
    assert Manifest.load(run / SHARDS) == before


def test_a_text_that_cannot_be_found_is_for_the_user_to_name(run: Path):
    "`prepare` without its text would write the built-in tales over shards of something else."
    (run / "data/raw/corpus.txt").rename(run / "mine.txt")
    flip(run / SHARDS / "train-00000.bin")
    [finding] = wrong(look(run, check_shards))
    assert "--input TEXT " in finding.command


def test_without_checkpoints_the_newer_tokenizer_counts(run: Path):
    "A tokenizer that was made again wants new shards; nothing has been learned with the old ones."
    shutil.rmtree(run / CHECKPOINTS)
    other_tokenizer(run / TOKENIZER)
    [finding] = wrong(look(run))
    assert finding.name == "tokenizer" and " prepare " in finding.command
    run_command(finding.command, run)
    assert not wrong(look(run)) and Manifest.load(run / SHARDS).vocab_size == 500


def test_what_there_is_no_time_to_read_is_said(run: Path):
    "With no time left, sizes are checked and the rest is named, with the command that reads it; a missing file is still wrong."
    notes = [
        finding
        for finding in look(run, check_shards, check_checkpoints, seconds=0.0)
        if finding.state == "note"
    ]
    assert [finding.name for finding in notes] == ["shards", "checkpoints"] and all(
        "--seconds" in finding.command for finding in notes
    )
    (run / SHARDS / "val-00000.bin").unlink()
    assert wrong(look(run, check_shards, seconds=0.0))


def test_a_run_that_is_writing_is_seen(run: Path):
    "While another process holds the folder, the doctor says so."
    code = (
        "from llm_course.files import folder_lock; from pathlib import Path\n"
        f"with folder_lock(Path({str(CHECKPOINTS)!r})): print(1, flush=True), input()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=run,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert "A run is writing" in " ".join(finding.what for finding in look(run, check_folders))
        other.communicate(b"\n")
    assert "A run is writing" not in " ".join(finding.what for finding in look(run, check_folders))


@contextlib.contextmanager
def powerless() -> Iterator[None]:
    "Within it, this process is not root, whom no permission stops."
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@posix
def test_a_read_only_folder_is_found():
    "Where nothing can be written, the doctor says who may not, and gives the command that lets them."
    with TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        os.chmod(name, 0o755)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        folder.chmod(0o555)
        places = RunPaths(data=str(folder / "shards"), checkpoints=str(folder))
        with powerless():
            [finding] = wrong(list(check_folders(places)))
            assert "Permission denied" in finding.what and finding.command == shlex.join(
                ["chmod", "u+rwX", str(folder)]
            )
        run_command(finding.command, Path(name))
        with powerless():
            assert not wrong(list(check_folders(places)))


@posix
def test_a_limit_on_files_is_found(run: Path):
    "`ulimit -f` below the size of a checkpoint's largest file: the save would fail."
    size = (run / NEWEST / "trainer.pt").stat().st_size
    few = f"cd {shlex.quote(str(run))}; ulimit -S -f {size // 1024 // 2}"
    [finding] = wrong(elsewhere("check_disk", few))
    assert not wrong(elsewhere("check_disk", f"{few}; {finding.command}"))
    assert wrong(elsewhere("check_folders", f"{few}; ulimit -S -f 1"))


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk is made with Linux's tmpfs")
def test_a_full_disk_is_found(run: Path, tmp_path: Path):
    "A disk of 8 MB with 1 MB less than a checkpoint left: said, with the command that shows what takes the space."
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a disk here")
    try:
        shutil.copytree(run / CHECKPOINTS, small / "checkpoints", symlinks=True)
        (small / "film.mp4").write_bytes(bytes(shutil.disk_usage(small).free))
        places = RunPaths(data=str(small / "shards"), checkpoints=str(small / "checkpoints"))
        disk, folders = wrong(list(check_disk(places))), wrong(list(check_folders(places)))
        assert disk and folders and "No space left" in folders[0].what
        shown = subprocess.run(
            disk[0].command.replace("checkpoints", ""), shell=True, capture_output=True, text=True
        ).stdout
        largest = [
            line.split("\t")[1]
            for line in shown.splitlines()
            if Path(line.split("\t")[1]).is_file()
        ][-1]
        assert Path(largest).name == "film.mp4"
        Path(largest).unlink()
        assert not wrong([*check_disk(places), *check_folders(places)])
    finally:
        subprocess.run(["umount", small], check=True)


@posix
def test_too_many_threads_are_found():
    "OMP_NUM_THREADS=64 on fewer processors, in a process of its own; the command sets what is there."
    assert usable_processors() < 64
    [finding] = wrong(elsewhere("check_processors", OMP_NUM_THREADS="64"))
    assert "asks for 64 threads" in finding.what
    [after] = elsewhere("check_processors", finding.command, OMP_NUM_THREADS="64")
    assert after.state == "fine" and f"{usable_processors()} threads" in after.what


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system binds no process to processors"
)
def test_processors_are_those_that_the_job_may_use():
    "A process that is bound to one processor has one, whatever the machine has."
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_processors() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    "own, files, processors, total",
    [
        (
            "0::/job",
            {
                "job/cpu.max": "150000 100000",
                "cpu.max": "max 100000",
                "job/memory.max": "3000000",
                "job/memory.current": "9",
            },
            2,
            3000000,
        ),
        (
            "0::/job/step",
            {
                "job/cpu.max": "100000 100000",
                "job/memory.max": "5000000",
                "job/memory.current": "1",
            },
            1,
            5000000,
        ),
        (
            "4:cpu:/docker/x\n5:memory:/docker/x",
            {
                "cpu/cpu.cfs_quota_us": "100000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "4000000",
                "memory/memory.usage_in_bytes": "1",
            },
            1,
            4000000,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
    ],
)
def test_a_containers_limits_are_read(own, files, processors, total, tmp_path, monkeypatch):
    "Control groups of both versions, of the process itself and above it, in a tree laid out as Linux does."
    (tmp_path / "own").write_text(own + "\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    everything, real = physical_memory()[0], preparation.cgroups
    monkeypatch.setattr(preparation, "cgroups", lambda: real(tmp_path / "own", tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_processors() == (processors or 64)
    assert memory()[0] == (total or everything)


@posix
def test_little_memory_is_found():
    "`ulimit -v` below what the machine has: said, and lifted by the command."
    few = "ulimit -S -v 8000000"
    if memory()[0] < 9e9:
        pytest.skip("this machine has no more than the limit of the test")
    [finding] = wrong(elsewhere("check_memory", few))
    assert not [
        found
        for found in wrong(elsewhere("check_memory", f"{few}; {finding.command}"))
        if found.command == finding.command
    ]


def test_a_clock_that_is_behind_is_found(run: Path):
    "A file from the day after tomorrow means that one of two clocks is wrong."
    os.utime(run / CHECKPOINTS / "log.jsonl", (time.time() + 2 * 86400,) * 2)
    [finding] = wrong(look(run, check_clock))
    assert "log.jsonl" in finding.what and finding.command
    os.utime(run / CHECKPOINTS / "log.jsonl")
    assert not wrong(look(run, check_clock))


@pytest.mark.parametrize(
    "fault, caught",
    [
        (
            lambda sound, q, k, v, **options: sound(q, k, v, **{**options, "is_causal": False}),
            "attention, fused",
        ),
        (
            lambda sound, q, k, v, **options: (
                sound(q, k, v, **options) * (1 + 1e-4 * (q.shape[2] == 1))
            ),
            "with a KV cache",
        ),
        (
            lambda sound, q, k, v, **options: (
                sound(q, k, v, **options) * (1.2 if torch.is_autocast_enabled("cpu") else 1)
            ),
            "bf16",
        ),
        (
            lambda sound, q, k, v, **options: (
                sound(q, k, v, **options) * (1 + 1e-6 * random.random())
            ),
            "twice",
        ),
        (lambda sound, q, k, v, **options: sound(q, k, v, **options).detach(), "the gradient"),
    ],
)
def test_an_attention_that_is_wrong_is_found(fault, caught, monkeypatch):
    "Kernels as a faulty build could have them (ours is sound, so they are made here): no mask, a bad short path, no gradient."
    sound, blocks = F.scaled_dot_product_attention, kernels.chunked_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, **options: fault(sound, *qkv, **options)
    )
    monkeypatch.setattr(
        kernels, "chunked_attention", lambda *qkv: fault(lambda q, k, v, **_: blocks(q, k, v), *qkv)
    )
    found = wrong(list(check_numbers(RunPaths())))
    assert caught in " ".join(finding.what for finding in found) and all(
        finding.command for finding in found
    )
    monkeypatch.undo()
    assert not wrong(list(check_numbers(RunPaths())))


def test_an_accelerator_has_the_same_judge():
    "The checks of an accelerator, here with the processor in its place: the judge is NumPy, not a second torch."
    assert all(way.error <= way.allowed for way in device_code_paths(torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees():
    assert all(way.error <= way.allowed for way in device_code_paths(torch.device("cuda", 0)))


@pytest.mark.skipif(
    "AMX" not in pick_precision("auto", torch.device("cpu"))[1],
    reason="this processor has no AMX to turn off",
)
def test_bf16_that_is_slower_than_promised_is_found():
    "A library that is kept from the units for bf16 multiplies in it slowly, while the flags say what they said."
    [finding] = elsewhere("check_precision", ONEDNN_MAX_CPU_ISA="AVX2")
    assert finding.state == "wrong" and finding.command == "llm-course train --precision fp32"


def installed(folder: Path, name: str, version: str) -> None:
    "A package as pip leaves it, as far as its version goes."
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_package_outside_its_range_is_found(tmp_path: Path, monkeypatch):
    "An old numpy and an old gguf before the sound ones on the path: one command for both."
    installed(tmp_path, "gguf", "0.1.0"), installed(tmp_path, "numpy", "1.20.3")
    monkeypatch.syspath_prepend(tmp_path)
    [finding] = wrong(list(check_packages(RunPaths())))
    assert "numpy is 1.20.3" in finding.what and "gguf is 0.1.0" in finding.what
    assert shlex.split(finding.command)[-2:] == ["numpy>=1.26", "gguf>=0.17"]
    for name, version in (("gguf", "0.18"), ("numpy", "1.26.4")):
        shutil.rmtree(next(tmp_path.glob(f"{name}-*"))), installed(tmp_path, name, version)
    assert not wrong(list(check_packages(RunPaths())))


def test_the_ranges_are_known_without_settings_ini(tmp_path: Path, monkeypatch):
    "An installed package has no settings.ini beside it; its metadata say the same."
    there = {
        (name, bounds) for name, bounds, extra in doctor.requirements() if extra in ("", "sharing")
    }
    info = tmp_path / "llm_course-0.1.0.dist-info"
    info.mkdir()
    lines = [
        f"Requires-Dist: {n}{b}" + (f'; extra == "{e}"' if e else "")
        for n, b, e in doctor.requirements()
        if e in ("", "sharing")
    ]
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", "Name: llm_course", "Version: 0.1.0", *lines]) + "\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("llm_course.numerics.files", lambda name: tmp_path / "elsewhere" / name)
    assert {(name, bounds) for name, bounds, _ in doctor.requirements()} == there


@pytest.mark.parametrize(
    "version, bounds, inside",
    [
        ("2.13.0+cpu", ">=2.6,<2.14", True),
        ("2.14.0", ">=2.6,<2.14", False),
        ("2.6", ">=2.6.0", True),
        ("2.14.0rc1", ">=2.6,<2.14", False),
        ("0.9", ">=0.17", False),
        ("10.1", ">=8", True),
        ("2.4.14", "==2.4.14", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(
    version: str, bounds: str, inside: bool, monkeypatch
):
    "A build's name after the + does not count, and a candidate of a release that is too new is too new."
    monkeypatch.setattr(doctor, "requirements", lambda: [("torch", bounds, "")])
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    [finding] = check_packages(RunPaths())
    assert finding.state == ("fine" if inside else "wrong")


@posix
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_gpu_that_torch_does_not_use_is_found(tmp_path: Path):
    "The driver lists a GPU, and torch is built without CUDA: the most common reason for a slow first day."
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    listing.chmod(0o755)
    [finding] = wrong(elsewhere("check_gpu", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"))
    assert finding.what.startswith("NVIDIA H200 is there") and "pip install" in finding.command


@posix
@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU torch.compile needs another compiler"
)
def test_a_compiler_that_is_not_there_is_found():
    "CXX names nothing: training works, compiling does not, and the command forgets the name."
    [finding] = elsewhere("check_compile", CXX="no-such-compiler")
    assert finding.state == "note" and finding.command == "unset CXX"
    [finding] = elsewhere("check_compile", finding.command, CXX="no-such-compiler")
    assert finding.state == "fine" or "more than" in finding.what


@posix
@pytest.mark.skipif(
    torch.cuda.is_available() or not shutil.which("g++"), reason="needs a C++ compiler, and no GPU"
)
def test_torch_compiles_in_a_folder_whose_name_has_a_space(tmp_path):
    "As it does not by itself: it is found there, by links to the packages that are installed."
    place = tmp_path / "a place"
    place.mkdir()
    for package in Path(torch.__file__).parents[1].iterdir():
        (place / package.name).symlink_to(package)
    env = {
        **os.environ,
        "PYTHONPATH": f"{place}{os.pathsep}{ROOT}",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    code = TINY.format("cpu") + f"; assert torch.__file__.startswith({str(place)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_check_that_fails_is_a_finding(monkeypatch):
    "The others go on, and the command shows where it failed."

    def check_nothing(places: RunPaths) -> Iterator[Finding]:
        raise ZeroDivisionError("no reason")
        yield

    found = examine(log=lambda line: None, checks=[check_nothing, check_clock])
    assert [finding.name for finding in found] == ["nothing", "clock"] and "no reason" in found[
        0
    ].what
    assert "check_nothing(RunPaths(" in found[0].command
