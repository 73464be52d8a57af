"""What is said may find no reader: a full disk, a closed stream, a pipe whose other end is gone. Work goes on; what is only said ends, quietly.

And what is said names commands: each of them works, from the state in which it is named."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Outcome, course, fine, words_of
from tqdm import tqdm

from llm_course.config import load_config
from llm_course.demo import train_on_tales
from llm_course.files import MessageStream, message_stream, print_message
from llm_course.integrity import load_verified
from llm_course.pipeline import train
from llm_course.runs import newest_checkpoint, read_log

posix = pytest.mark.skipif(os.name != "posix", reason="file descriptors as POSIX has them")
KINDS = ["full", "closed", "gone"]


@contextlib.contextmanager
def unreadable(number: int, kind: str) -> Iterator[None]:
    "Within it, stdout (1) or stderr (2) of this process, down to its file descriptor, is a full disk, closed, or a pipe without a reader."
    name, kept = {1: "stdout", 2: "stderr"}[number], os.dup(number)
    before = getattr(sys, name)
    if kind == "gone":
        reader, target = os.pipe()
        os.close(reader)
    else:
        target = os.open("/dev/full" if kind == "full" else os.devnull, os.O_WRONLY)
    os.dup2(target, number)
    os.close(target)
    if kind == "closed":
        os.close(number)
    setattr(
        sys,
        name,
        None
        if kind == "closed"
        else io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8"),
    )
    try:
        yield
        if kind != "closed":
            getattr(
                sys, name
            ).flush()  # as Python does in the end: nothing may be left that fails then
    finally:
        setattr(sys, name, before)
        os.dup2(kept, number)
        os.close(kept)


def run(number: int, kind: str, *args: object, cwd: Path) -> Outcome:
    "`llm-course ARGS` whose stdout (1) or stderr (2) cannot be written; what it says on the other one."
    from llm_course.cli import main

    heard, code = io.StringIO(), 0
    other = contextlib.redirect_stderr(heard) if number == 1 else contextlib.redirect_stdout(heard)
    with contextlib.chdir(cwd), other, unreadable(number, kind):
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code or 0
    return (
        Outcome(code, "", heard.getvalue()) if number == 1 else Outcome(code, heard.getvalue(), "")
    )


WORK = {  # what a subcommand makes
    "corpus --folder new --stories 20": "new/corpus.txt",
    "tokenizer --vocab_size 400 --model_prefix new/t": "new/t.model",
    "prepare --seq_len 16 --out_dir new": "new/manifest.json",
    "export --to gguf --out new.gguf": "new.gguf",
    "train --config tiny --max_steps 4 --save_every 2 --eval_every 2 --out new": "new/step-000004/manifest.json",
}
TRAIN = list(WORK)[-1]
LOST = [
    *((line, "full", 1) for line in WORK),
    *((TRAIN, kind, 1) for kind in KINDS[1:]),
    *((TRAIN, kind, 2) for kind in KINDS),
    ("tokenizer --vocab_size 400 --model_prefix new/t", "closed", 2),
    ("prepare --seq_len 16 --out_dir new", "gone", 1),
]
OUTPUT = [
    *(("generate --max_new_tokens 3", kind) for kind in KINDS),
    ("eval --input short.txt --documents line", "full"),
    ("--help", "gone"),
    *(
        pytest.param(line, "closed", marks=pytest.mark.slow)
        for line in ("plan --config tiny --device a100", "train --show")
    ),
]


@posix
@pytest.mark.parametrize("line, kind, number", LOST, ids=lambda value: str(value).split()[0])
def test_work_outlives_its_reader(line, kind, number, own_run):
    "Status 0, all is made, and one sentence on stderr says what is wrong with stdout."
    made = own_run / WORK[line]
    shutil.rmtree(own_run / "new", ignore_errors=True)
    (own_run / "new.gguf").unlink(missing_ok=True)
    done = run(number, kind, *line.split(), cwd=own_run)
    assert done.code == 0 and made.is_file(), done
    told = [l for l in done.lines if "Standard output" in l]
    assert (
        number == 2
        or len(told) == 1
        and {"full": "No space left", "closed": "closed", "gone": "Broken pipe"}[kind] in told[0]
    ), done
    if line.startswith("train"):
        assert load_verified(own_run / "new").step == 4 and [
            e["step"] for e in read_log(own_run / "new") if "val_loss" in e
        ] == [2, 4]


@posix
@pytest.mark.parametrize("line, kind", OUTPUT, ids=lambda value: value.split()[0])
def test_output_without_a_reader_ends_quietly(line, kind, own_run):
    "No traceback and a status that is not 0. Nobody is told what they know: that they went, or want no output; a full disk is said."
    done = run(1, kind, *line.split(), cwd=own_run)
    assert done.code == (2 if kind == "full" else 1), done
    assert done.lines == ["Standard output cannot be written: No space left on device."] * (
        kind == "full"
    ), done


@posix
def test_output_does_not_need_stderr(own_run):
    "Progress and remarks are lost, and the answer is there."
    done = run(2, "closed", "eval", "--input", "short.txt", "--documents", "line", cwd=own_run)
    assert done.code == 0 and "bits per byte" in done.out


@posix
@pytest.mark.parametrize(
    "shape",
    [
        ">/dev/full",
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in (
                ">&-",
                "<&- >&- 2>&-",
                "2>/dev/full",
                ">/dev/full 2>&1",
                "| true",
                "2>&1 | true",
            )
        ),
    ],
)
def test_a_process_of_its_own(shape, trained, tmp_path):
    "From the start of Python to its end, on a full disk, without a reader, and with streams closed."
    words = [
        "-m",
        "llm_course",
        "train",
        "--config",
        "tiny",
        "--max_steps",
        "2",
        "--data",
        str(trained / "data/shards"),
        "--out",
        "out",
    ]
    line = f"{shlex.join([sys.executable, *words])} {shape}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and load_verified(tmp_path / "out").step == 2, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done


def test_a_library_speaks_as_safely(trained, tmp_path, capsys, monkeypatch):
    "`train`, called from Python where stdout and stderr cannot be written, bar and sentences and all; and a callable of one's own is called."

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with contextlib.redirect_stdout(Full()), contextlib.redirect_stderr(Full()):
        result = train(
            load_config("tiny", {"max_steps": 2}), trained / "data/shards", tmp_path, device="cpu"
        )
    assert load_verified(result.checkpoint).step == 2
    with contextlib.redirect_stdout(io.StringIO()) as heard:
        print_message("→ and 3")
    assert heard.getvalue() == "→ and 3\n"


@pytest.mark.parametrize("in_a_program", [False, True])
def test_a_bar_makes_way_for_a_message(in_a_program, monkeypatch):
    "On one terminal a message stands on a line of its own, above the bar: from Python as it is, and where a program has put its streams."
    terminal = io.StringIO()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        if in_a_program:
            for name in ("stdout", "stderr"):
                monkeypatch.setattr(sys, name, MessageStream(name))
        with tqdm(total=3, file=message_stream("stderr")) as bar:
            bar.refresh()
            with tqdm.external_write_mode():
                print_message("told")
    assert re.search(r"0/3 [^\r]*\r *\rtold\n", terminal.getvalue()), terminal.getvalue()


def test_a_character_that_a_stream_does_not_know():
    "It becomes a question mark, and the stream is not given up."
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="ascii", write_through=True)):
        for text in ("lr 1 → 2", "later"):
            print_message(text)
        assert message_stream("stdout") == sys.stdout and not message_stream("stdout").isatty()
        with pytest.raises(TypeError):
            MessageStream("stdout").write(b"bytes")
    assert raw.getvalue().decode().split("\n") == ["lr 1 ? 2", "later", ""]


# commands that are named


def named(text: str) -> list[str]:
    "The commands in a text: in `backquotes`, or after `next:`."
    return re.findall(r"`(llm-course [^`]+)`|^next: (llm-course .+)$", text, re.MULTILINE)


DEMO = "demo --config tiny --max_steps 4 --stories 60 --seq_len 32".split()
TRAIN_SMALL = "--config tiny --max_steps 4 --save_every 2 --sample_every 2".split()
STATES: dict[
    str, tuple[list, Callable | None]
] = {  # what gives the message: a subcommand; and what a sample of the model does, if anything
    "after corpus": (["corpus", "--folder", "elsewhere", "--stories", 60], None),
    "after tokenizer": (["tokenizer", "--vocab_size", 400, "--model_prefix", "else/where"], None),
    "after prepare": (["prepare", "--seq_len", 16, "--out_dir", "elsewhere"], None),
    "after train": (["train", *TRAIN_SMALL, "--out", "else where"], None),
    "after eval": (["eval"], None),
    "after demo": (DEMO, None),
    "Ctrl-C in train": (
        ["train", *TRAIN_SMALL, "--out", "else where"],
        lambda model: signal.raise_signal(signal.SIGINT),
    ),
    "SIGTERM in train": (
        ["train", *TRAIN_SMALL, "--out", "elsewhere", "--resume"],
        lambda model: signal.raise_signal(signal.SIGTERM),
    ),
    "Ctrl-C in demo": (
        [*DEMO, "--sample_every", 2, "--fresh"],
        lambda model: signal.raise_signal(signal.SIGINT),
    ),
    "an earlier run": (["train", "--config", "tiny", "--max_steps", 2], None),
    "bad steps": (
        ["train", *TRAIN_SMALL, "--max_steps", 9, "--out", "elsewhere"],
        lambda model: model.model.norm.weight.data.fill_(float("nan")) is None,
    ),
    "no tokenizer": (["prepare", "--tok", "nowhere.model"], None),
    "no shards": (["train", "--config", "tiny", "--data", "nowhere"], None),
    "no checkpoint": (["generate", "--ckpt", "nowhere"], None),
    "generate after the demo alone": (["generate"], None),
    "eval after the demo alone": (["eval"], None),
    "chat after the demo alone": (["chat"], None),
    "export after the demo alone": (["export", "--out", "exported"], None),
    "doctor after the demo alone": (["doctor", "--seconds", 0], None),
}
SLOW = "doctor after the demo alone"


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder in which `demo` has run, and nothing else; the text for `eval` lies where that looks."
    folder = tmp_path_factory.mktemp("demonstrated")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llm_course.demo.STORIES", 3)  # fewer are sooner judged
        fine(course(*DEMO, cwd=folder))
    (folder / "data/raw").mkdir(parents=True)
    shutil.copy(folder / "artifacts/demo/val.txt", folder / "data/raw/val.txt")
    return folder


@pytest.mark.parametrize(
    "state", [pytest.param(state, marks=[pytest.mark.slow] * (state == SLOW)) for state in STATES]
)
def test_every_command_that_is_named_works(state, trained, demonstrated, tmp_path, monkeypatch):
    "From the state in which it is named. (`train` alone would train a large model for days: it takes a step of a small one here.)"
    import llm_course.demo as demo

    monkeypatch.setattr("sys.stdin", open(os.devnull))
    monkeypatch.setattr(demo, "STORIES", 3)
    words, sample = STATES[state]
    shutil.copytree(
        demonstrated if "after the demo" in state else trained,
        place := tmp_path / "run",
        symlinks=True,
    )
    with monkeypatch.context() as patched:
        if sample:
            patched.setattr(
                demo, "sample_text", lambda model, tokenizer: sample(model) and "" or "a sample"
            )
        done = course(*words, cwd=place)
    commands = [first or second for first, second in named(done.out + done.err)]
    assert commands, done
    for command in commands:
        more = (
            []
            if "--config" in command or " train" not in command
            else ["--config", "tiny", "--max_steps", "1", "--out", "new"]
        )
        answer = course(
            *words_of(command),
            *more,
            *["--max_new_tokens", "2"] * (" generate" in command),
            cwd=place,
        )
        assert answer.code == 0 or " doctor" in command and "checkpoints" in answer.out, (
            command,
            answer,
        )
    if "Ctrl-C" in state or "SIGTERM" in state:
        assert "Resuming" in answer.out and "at step 3 of 4" in answer.out


def test_a_notebook_is_told_what_goes_on(tmp_path):
    "`train_on_tales` has no resume=True, and needs none: the same call goes on, and with fresh=True it would begin anew."
    config, said = (
        load_config("tiny", {"max_steps": 4, "vocab_size": 400, "sample_every": 2, "seq_len": 32}),
        [],
    )
    stopped = lambda model, tokenizer: signal.raise_signal(signal.SIGINT) or "a sample"
    for fresh, advice in (
        (True, "the same call without fresh=True goes on from there"),
        (False, "Resuming"),
    ):
        with contextlib.suppress(KeyboardInterrupt):
            train_on_tales(
                config,
                tmp_path,
                n_train=60,
                n_val=10,
                fresh=fresh,
                progress=False,
                log=said.append,
                sampler=stopped if fresh else None,
            )
        assert any(advice in line for line in said), said
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-000004"


@posix
@pytest.mark.parametrize(
    "typed, on_path, called",
    [
        ("bin/llm-course", False, "bin/llm-course"),
        ("bin/llm-course", True, "llm-course"),
        ("a folder/llm-course", False, "'a folder/llm-course'"),
        ("llm_course/__main__.py", False, f"{shlex.quote(sys.executable)} -m llm_course"),
        ("somebody/script.py", False, "llm-course"),
    ],
)
def test_commands_are_named_as_a_shell_finds_them(typed, on_path, called, tmp_path, monkeypatch):
    "By the name alone where that is on the PATH and means this program, else as it was started: `make demo` activates no environment."
    from llm_course.cli import next_command
    from llm_course.terminal import runnable

    (tmp_path / typed).parent.mkdir(parents=True)
    (tmp_path / typed).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [typed])
    monkeypatch.setenv("PATH", str((tmp_path / typed).parent) if on_path else "/nowhere")
    line = runnable(next_command("generate", prompt="a b"))
    assert runnable(line) == line == f"next: {called} generate --prompt 'a b'"
    assert (
        runnable("`llm-course train` makes one.") == f"`{called} train` makes one."
        and runnable("llm-course: of it") == "llm-course: of it"
    )
