"What a terminal shows: lines that fit it, words and commands whole, numbers with their nouns, times in units that people use."

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import course, fine
from hypothesis import given
from hypothesis import strategies as st

from llm_course.cli import show_finding, show_story
from llm_course.files import duration, quantity
from llm_course.runs import read_log
from llm_course.tales import tales
from llm_course.terminal import LineBreaker, copyable, fitted, format_table, width


class Screen(io.StringIO):
    "Standard output that is a terminal."

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch):
    "Call a function, or `llm-course ARGS` in a folder, on a terminal of 80 columns or another `limit`: what is shown."

    def show(*args: object, cwd: Path | None = None, limit: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(limit))
        with contextlib.redirect_stdout(shown := Screen()), contextlib.redirect_stderr(Screen()):
            if cwd is None:
                args[0](*args[1:])
            else:
                from llm_course.cli import main

                with contextlib.chdir(cwd), pytest.raises(SystemExit) as end:
                    main([str(arg) for arg in args])
                assert end.value.code in (0, None), shown.getvalue()
        return shown.getvalue()

    return show


def check_fits(shown: str, limit: int) -> None:
    "No line is too long that could have been broken."
    for line in shown.split("\n"):
        assert width(line) <= limit or len(line.split()) == 1 or "`" in line, line


TEXTS = st.text(st.sampled_from("aé-. \t\n界🦊\u0301"), max_size=120)


@given(TEXTS, st.integers(20, 60), st.integers(0, 12), st.lists(st.integers(1, 9), max_size=30))
def test_lines_fit_and_words_stay_whole(text, limit, hang, sizes):
    "However the text comes in pieces: its words, in their order, and the lines that it has already."
    breaker, start, shown = LineBreaker(limit, hang), 0, ""
    for size in sizes:
        shown += breaker.add(text[start : start + size])
        start += size
    shown += breaker.add(text[start:]) + breaker.rest()
    assert shown == fitted(text, limit, hang) and shown.split() == text.split()
    assert fitted(text, None) == text and shown.count("\n") >= text.count("\n")
    for line in shown.split("\n"):
        assert width(line.rstrip()) <= limit or len(line.split()) == 1


def test_a_text_is_broken_where_it_should_be():
    "At the last space that fits; after it a line may begin further to the right; quoted commands stay in one line."
    assert fitted("one two three", 7) == "one two\nthree"
    assert fitted("wrong  x  one two", 14, hang=10) == "wrong  x  one\n          two"
    assert (
        fitted("go on: `make lab PYTHON=python3` does it", 12)
        == "go on:\n`make lab PYTHON=python3`\ndoes it"
    )
    assert fitted("next: llm-course eval --ckpt x", 26) == "next: llm-course eval \\\n  --ckpt x"
    assert (
        format_table({"a": "one two three", "bc": 1234}, 12)
        == "  a   one\n      two\n      three\n  bc  1,234"
    )


def test_a_word_longer_than_a_line_is_shown_as_it_comes():
    "A model that writes no space keeps nobody waiting for the end of its word."
    breaker = LineBreaker(20)
    assert len("".join(breaker.add("Once") for _ in range(100))) >= 380


WORDS = st.lists(
    st.text(st.sampled_from("ab-'\" $\\*=é"), min_size=1, max_size=12), min_size=1, max_size=12
)


@given(WORDS, st.integers(20, 60), st.integers(0, 10))
def test_a_command_that_is_broken_is_the_same_command(words, limit, indent):
    "Joined again it has the same words; only what has no flag to break at is longer than the terminal is wide."
    shown = copyable(shlex.join(["llm-course", *words]), limit, indent)
    assert shlex.split(shown.replace("\\\n", "")) == ["llm-course", *words]
    for line in shown.split("\n")[:-1]:
        assert line.endswith(" \\")
    for line in shown.split("\n")[1:]:
        written = re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""", line)
        assert width(line) <= limit or not any(word.startswith("-") for word in written[1:])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sh")
def test_a_shell_takes_a_command_that_is_broken(tmp_path):
    words = [
        sys.executable,
        "-c",
        "import sys; print(sys.argv[1:])",
        "--prompt",
        "Once upon a time",
        "--out",
        "a b/$c",
        "--n",
        "3",
    ]
    shown = copyable(shlex.join(words), 40)
    assert "\\\n" in shown
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout == f"{words[3:]}\n"


FINDINGS = [
    "fine   processors   INTEL(R) XEON(R) PLATINUM 8488C CPU @ 2.40GHz, 2 of 96 processors are ours; torch computes with 2 threads.",
    f"wrong  shards       data/shards/train-00000.bin is damaged: 1 of its bytes has changed.\n{'':20}llm-course prepare --input "
    "data/raw/corpus.txt --tok artifacts/tokenizer/llm_spm.model --seq_len 2048 --out_dir data/shards",
    "35 fine, 1 to know, 1 wrong: run the command below each.",
]


@pytest.mark.parametrize("finding", FINDINGS)
def test_doctor_fits_the_terminal(screen, capsys, finding):
    "A sentence goes on below itself, a command can be copied; in a pipe both are lines as before."
    shown = screen(show_finding, finding)
    check_fits(shown, 79)
    assert shown.replace("\\\n", "").split() == finding.split()
    assert all(line.startswith(" " * 20) for line in shown.rstrip("\n").split("\n")[1:])
    show_finding(finding)
    assert capsys.readouterr().out == f"{finding}\n"


@pytest.mark.parametrize(
    "words, limit",
    [
        ("plan --config tiny --n_layers 1 --device h100 --devices 2", 60),
        ("train --config tiny --show", 80),
        ("generate --seed 1 --check --max_new_tokens 120 --temperature 1.5", 80),
    ],
)
def test_what_a_stage_shows_fits_the_terminal(screen, trained, words, limit):
    "The same words in the same order as in a pipe, where lines are as long as they are."
    piped = fine(course(*words.split(), cwd=trained))
    shown = screen(*words.split(), cwd=trained, limit=limit)
    check_fits(shown, limit - 1)
    assert shown.split() == piped.split() and any(width(line) > limit for line in piped.split("\n"))


def test_the_samples_of_training_fit_the_terminal(screen, trained, tmp_path):
    "They come in lines like all that training says, with the words that stand in the log."
    shown = screen(
        "train",
        "--config",
        "tiny",
        "--max_steps",
        2,
        "--sample_every",
        1,
        "--out",
        tmp_path / "out",
        cwd=trained,
    )
    check_fits("\n".join(line for line in shown.split("\n") if str(tmp_path) not in line), 79)
    sample = read_log(tmp_path / "out")[-1]["sample"]
    assert width(sample) > 80 and " ".join(sample.split()) in " ".join(shown.split())


@pytest.mark.parametrize(
    "story",
    [next(tales(3)), "Once upon a tiny time " * 20, "Once" * 60],
    ids=["right", "wrong", "one word"],
)
def test_a_story_of_the_demo_fits_the_terminal(screen, capsys, story):
    "With what the grammar says about it; in a pipe a story has 100 columns, and the verdict is a line."
    shown = screen(show_story, story)
    check_fits(shown, 79)
    show_story(story)
    piped = capsys.readouterr().out
    assert shown.split() == piped.split() and piped.split("\n")[-2].startswith("  The grammar")
    check_fits(piped.rpartition("  The grammar")[0], 100)


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0, "0 seconds"),
        (0.021, "0.021 seconds"),
        (1, "1 second"),
        (1.6, "1.6 seconds"),
        (40, "40 seconds"),
        (59.6, "1 minute"),
        (60, "1 minute"),
        (3599, "1 hour"),
        (31 * 60, "31 minutes"),
        (5400, "1.5 hours"),
        (36 * 3600, "1.5 days"),
        (2.4 * 86_400, "2.4 days"),
        (9.97 * 3600, "10 hours"),
        (800 * 86_400, "2.2 years"),
        (1e12, "31,688 years"),
    ],
)
def test_a_time_is_told_in_the_unit_of_people(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize(
    "n, noun, told",
    [
        (1, "step", "1 step"),
        (0, "step", "0 steps"),
        (1234, "step", "1,234 steps"),
        (1.0, "minute", "1 minute"),
        (0.5, "minute", "0.5 minutes"),
        (5.0, "minute", "5 minutes"),
    ],
)
def test_a_number_and_its_noun_agree(n, noun, told):
    assert quantity(n, noun) == told and quantity(n, "process", "processes") == told.replace(
        noun, "process"
    ).replace("processs", "processes")


@pytest.mark.parametrize(
    "seconds, told", [(31 * 60, "31 minutes"), (2.4 * 86_400, "2.4 days"), (60, "1 minute")]
)
def test_plan_tells_the_time_of_a_run(tmp_path, seconds, told):
    "For as many tokens as this model sees in that time."
    from llm_course.config import load_config
    from llm_course.planner import plan

    tokens = round(seconds * plan(load_config("tiny"), device="h100").tokens_per_second)
    out = fine(
        course("plan", "--config", "tiny", "--device", "h100", "--tokens", tokens, cwd=tmp_path)
    )
    assert re.search(rf"^  time +{told}$", out, re.M), out


def test_one_is_no_plural(trained, tmp_path):
    "Where a run has one layer, one sequence, one step, and a text two documents."
    said = fine(
        course(
            "plan",
            "--config",
            "tiny",
            "--n_layers",
            1,
            "--batch_size",
            1,
            "--device",
            "h100",
            cwd=trained,
        )
    )
    said += fine(
        course(
            "train",
            "--config",
            "tiny",
            "--max_steps",
            1,
            "--batch_size",
            1,
            "--out",
            tmp_path / "out",
            cwd=trained,
        )
    )
    (tmp_path / "two.txt").write_text(
        f"{' '.join(['a first line'] * 20)}\n{' '.join(['a second line'] * 20)}\n"
    )
    said += fine(
        course(
            "prepare",
            "--input",
            tmp_path / "two.txt",
            "--seq_len",
            16,
            "--out_dir",
            tmp_path / "shards",
            cwd=trained,
        )
    )
    said += fine(course("eval", "--input", tmp_path / "shards" / "val.txt", cwd=trained))
    assert (
        "1 layer of" in said
        and "1 step of" in said
        and "1 of the documents is held out" in said
        and "in 1 shard" in said
    )
    assert not set(re.findall(r"(?<![\d.,])1 ([a-z]+s)\b", said)) - {"is", "has", "was"}, said
