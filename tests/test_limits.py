"""Every number that a user can give, at the ends of its range and just beyond: it works or costs one sentence, and is never a traceback.

The options are click's own, the fields the config's, so that a new one is covered as it comes."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import click
import pytest
from conftest import SCALE, Outcome, course

from llm_course.cli import main
from llm_course.config import ModelConfig, TrainingConfig

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "setitimer"),
    reason="what runs for ever is stopped by an alarm, which is POSIX",
)
COMMANDS = {  # what makes a subcommand small
    "corpus": "--folder made --stories 10",
    "tokenizer": "--input data/raw/val.txt --model_prefix made/t --vocab_size 300",
    "prepare": "--input data/raw/corpus.txt --val data/raw/val.txt --out_dir made/shards --seq_len 16",
    "train": "--config tiny --max_steps 1 --out made/run --seq_len 16 --batch_size 2 --n_layers 1",
    "eval": "--input short.txt --documents line",
    "generate": "--max_new_tokens 2",
    "chat": "--max_new_tokens 2",
    "export": "--out made/export",
    "doctor": "--seconds 0",
    "plan": "--config tiny --device a100",
    "demo": "--root made/demo --config tiny --max_steps 1 --stories 40 --seq_len 16 --batch_size 2 --n_layers 1",
}


class Enough(BaseException):
    "It has run for so long that it is no mistake."


def test_every_subcommand_is_here():
    "A new one needs arguments that make it small."
    assert set(COMMANDS) == set(main.commands)


@contextmanager
def for_a_while(command: str, seconds: float = 0.7 * SCALE) -> Iterator[None]:
    "Within it, what takes longer is stopped, and that is that. Not `plan`: an exception where it counts operations ends the process."
    if command == "plan":
        yield
        return

    def stop(*_: object) -> None:
        raise Enough

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Enough:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ends(kind: type, least: float | None, most: float | None) -> tuple[list[str], list[str]]:
    "The ends of a range, or numbers that no computer has met where it has none, and their neighbours outside; as texts."
    if kind is int:
        inside = [
            least if least is not None else -(10**30),
            *([most] if most is not None else [2**31, 2**63, 10**30]),
        ]
        outside = [end + way for end, way in ((least, -1), (most, 1)) if end is not None]
        return [str(int(n)) for n in inside], [str(int(n)) for n in outside]
    inside = [least if least is not None else -1e308, most if most is not None else 1e308]
    if least is not None:
        inside.append(math.nextafter(least, math.inf))
    outside = [
        math.nextafter(end, way)
        for end, way in ((least, -math.inf), (most, math.inf))
        if end is not None
    ]
    return [repr(float(x)) for x in inside], [
        repr(float(x)) for x in [*outside, math.inf, -math.inf, math.nan]
    ]


def numbers() -> Iterator[tuple[str, str, list[str], list[str]]]:
    "Each numeric option of each subcommand, with the texts to try: at the ends of its range, and beyond."
    for name, command in main.commands.items():
        for option in command.params:
            kinds = {click.types.IntParamType: int, click.types.FloatParamType: float}
            kind = next((kind for cls, kind in kinds.items() if isinstance(option.type, cls)), None)
            if kind:
                yield (
                    name,
                    option.opts[0],
                    *ends(
                        kind, getattr(option.type, "min", None), getattr(option.type, "max", None)
                    ),
                )
    for name, command in main.commands.items():
        if (
            command.context_settings.get("allow_extra_args") and name != "demo"
        ):  # which hands the fields to what `train` calls
            for field in fields(TrainingConfig):
                if field.metadata["least"] is not None:
                    yield (
                        name,
                        f"--{field.name}",
                        *ends(field.type, field.metadata["least"], field.metadata["most"]),
                    )
            for field in fields(ModelConfig):
                if field.type in (int, float):
                    yield name, f"--{field.name}", *ends(field.type, 0, 2**31)


NUMBERS = list(numbers())
LONG = (
    "train",
    "demo",
    "doctor",
    "plan",
    "corpus",
    "prepare --workers",
)  # they take a second or more
AT = [
    pytest.param(
        command,
        option,
        inside,
        id=f"{command} {option}",
        marks=[pytest.mark.slow] * f"{command} {option}".startswith(LONG),
    )
    for command, option, inside, _ in NUMBERS
]
BEYOND = [
    pytest.param(command, option, outside, id=f"{command} {option}")
    for command, option, _, outside in NUMBERS
]


@pytest.fixture(scope="module")
def loaded(own_run: Path) -> None:
    "All that the slower subcommands import is there: an alarm in the middle of an import would leave a half of it."
    for command in ("plan", "demo"):
        course(command, *COMMANDS[command].split(), cwd=own_run)


def mistake(done: Outcome, command: str) -> bool:
    "Whether it has ended with status 2, and one line that says why."
    told = [line for line in done.lines if not line.startswith("(")]  # what `generate` remarks
    return done.code == 2 and bool(told) and told[-1].startswith(f"llm-course {command}: ")


@pytest.mark.parametrize("command, option, texts", AT)
def test_at_the_ends_of_its_range(command, option, texts, own_run, request, monkeypatch):
    "It works, or is a mistake that is said; anything else would have raised."
    if command in ("plan", "demo"):
        request.getfixturevalue("loaded")
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    for text in texts:
        if (command, option, text) == ("plan", "--n_layers", str(2**31)):
            continue  # it goes through the layers one by one, and no memory is needed for that
        with for_a_while(command):
            done = course(command, *COMMANDS[command].split(), f"{option}={text}", cwd=own_run)
            assert (
                done.code == 0 or command == "doctor" and done.code == 1 or mistake(done, command)
            ), (text, done)


@pytest.mark.parametrize("command, option, texts", BEYOND)
def test_just_beyond_its_range(command, option, texts, own_run, monkeypatch):
    "A mistake that is said."
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    for text in texts:
        with for_a_while(command):
            done = course(command, *COMMANDS[command].split(), f"{option}={text}", cwd=own_run)
            assert mistake(done, command), (text, done)
