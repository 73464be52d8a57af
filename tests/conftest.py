"""What the tests share: the command line called in this process or in one of its own, and one small trained run made with it.

On a slow machine, LLM_COURSE_TIME_SCALE=3 gives three times the time.
"""

import contextlib
import datetime
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCALE = float(os.environ.get("LLM_COURSE_TIME_SCALE", "1"))
PATIENCE = (
    300 * SCALE
)  # seconds after which something that should happen will not: machines have stood still for two minutes
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models of the tests are too small for a second thread to pay
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in the background of a script, where what we start would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Outcome:
    "How a command ended: exit status, what it wrote, and its stderr line by line without progress bars."

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        "Lines of stderr; what a progress bar draws over itself is not one."
        drawn = re.compile(r"\d+%\||it/s|s/it|\?it|\d+ ?\w+ \[\d|/s[\],]")
        return [
            line
            for line in re.split(r"[\r\n]+", self.err)
            if line.strip() and not drawn.search(line)
        ]


def course(*args: object, cwd: Path) -> Outcome:
    "`llm-course ARGS` in the folder `cwd`, in this process: as a shell sees it, without the seconds that importing torch takes."
    from llm_course.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


def process(
    *args: object,
    cwd: Path,
    module: tuple[str, ...] = ("-m", "llm_course"),
    timeout: float = PATIENCE,
    **env: str,
) -> Outcome:
    "The same in a process of its own."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env}
    done = subprocess.run(
        [sys.executable, *module, *map(str, args)],
        cwd=cwd,
        env=env,
        timeout=timeout,
        text=True,
        encoding="utf-8",
        capture_output=True,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def fine(outcome: Outcome) -> str:
    "The standard output of a command that has to succeed."
    assert outcome.code == 0, f"exit status {outcome.code}\n{outcome.out}\n{outcome.err}"
    assert "Traceback" not in outcome.err
    return outcome.out


def words_of(command: str) -> list[str]:
    "The arguments of a command that a message names: `llm-course ARGS`, or `python -m llm_course ARGS` where that is how it was started."
    program, *words = shlex.split(command.replace("\\\n", " "))
    return words if Path(program).stem == "llm-course" else words[2:]


def snapshot(folder: Path) -> dict[str, str]:
    "Every path under a folder and what is in it."
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder, with a space in its name, in which every stage has run with its default paths. Tests read it and change nothing."
    folder = tmp_path_factory.mktemp("a small run")
    for stage in (
        "corpus --stories 400",
        "tokenizer --vocab_size 600",
        "prepare --seq_len 64",
        "train --config tiny --max_steps 8 --eval_every 4 --save_every 4",
    ):
        fine(course(*stage.split(), cwd=folder))
    return folder


@pytest.fixture(scope="module")
def own_run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of `trained`, with a short text, that the tests of a module may write to."
    folder = tmp_path_factory.mktemp("own") / "run"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "short.txt").write_text("Once upon a time.\nThere was a text.\n")
    return folder


PASSES = (
    ROOT / "tests" / "last_pass.json"
)  # when the slow tests beside other programs passed last, and with which versions


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        metavar="NAME: PACKAGE PACKAGE",
        help="Write the day and the packages' versions to "
        "tests/last_pass.json under NAME, if all that was asked for ran and passed.",
    )


def pytest_configure(config: pytest.Config) -> None:
    "With LLM_COURSE_PROGRAMS=all, as in `make test`, a program that is missing is an error: its tests would be skipped, and all look well."
    programs = ["transformers", "gguf", "lm_eval", "datatrove", "orjson"] + ["megatron"] * (
        sys.platform == "linux" and sys.version_info < (3, 14)
    )
    missing = [name for name in programs if not find_spec(name)]
    if os.environ.get("LLM_COURSE_PROGRAMS") == "all" and missing:
        raise pytest.UsageError(
            f"Not installed: {', '.join(missing)}. Their tests would be skipped: `make clean`, then `make test`."
        )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    counts = {
        outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "skipped")
    }
    if (
        not (record := config.getoption("record"))
        or exitstatus
        or counts["skipped"]
        or not counts["passed"]
    ):
        return
    name, packages = record.split(": ")
    entry = {
        "day": f"{datetime.date.today()}",
        "tests": counts["passed"],
        "versions": {package: version(package) for package in packages.split()},
    }
    known = json.loads(PASSES.read_text()) if PASSES.exists() else {}
    PASSES.write_text(json.dumps({**known, name: entry}, indent=1, sort_keys=True) + "\n")
    terminalreporter.write_line(f"noted in {PASSES.relative_to(ROOT)}: {name}")
