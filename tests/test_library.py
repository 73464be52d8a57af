"""The package as a library: what `import llm_course as lc` offers, what it loads, and what it says about a wrong type."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

import llm_course as lc
from llm_course.files import UserError


def script_of_the_readme() -> str:
    "The script under the README's heading on scripts."
    return re.search(
        r"```python\n(import llm_course as lc\n.*?)```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.S,
    )[1]


def test_the_script_of_the_readme_runs(tmp_path: Path):
    "Ten lines from a text to a story, in a process of their own and an empty folder."
    script = script_of_the_readme()
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=3 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout and re.search(r"\d\.\d+", done.stdout)


def test_every_name_that_is_offered_is_there():
    "`dir` lists them before they are loaded, none has the name of a module (which would win once it is imported), others are refused."
    for name in lc.__all__:
        assert name in dir(lc) and getattr(lc, name) is getattr(lc, name)
        assert not (ROOT / "llm_course" / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'grind'"):
        lc.grind


@pytest.mark.parametrize(
    "code, loaded, not_loaded",
    [
        ("import llm_course", {"llm_course"}, {"llm_course.files", "torch", "numpy", "click"}),
        (
            "import llm_course as lc; lc.sample_tales",
            {"llm_course.tales"},
            {"torch", "llm_course.gpt"},
        ),
        (
            "import llm_course.gpt",
            {"llm_course.gpt", "torch"},
            {
                "sentencepiece",
                "llm_course.tokenizer",
                "llm_course.packing",
                "llm_course.shards",
                "llm_course.training",
            },
        ),
    ],
)
def test_only_what_is_needed_is_loaded(code: str, loaded: set[str], not_loaded: set[str]):
    "Counted in modules, which is the same on every machine."
    told = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    ).stdout.split()
    assert loaded <= set(told) and not not_loaded & set(told)


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: lc.train_tokenizer(7),
            "text should be a path, or a list of documents, not 7 of type int",
        ),
        (
            lambda: lc.train_tokenizer(["a", b"b"]),
            "document 1 of text should be a text, not b'b' of type bytes",
        ),
        (
            lambda: lc.train_tokenizer(["a b c"], "big"),
            "vocab_size should be a whole number, not 'big' of type str",
        ),
        (
            lambda: lc.train_tokenizer(["a b c"], True),
            "vocab_size should be a whole number, not True of type bool",
        ),
        (lambda: lc.prepare(["a"], 3), "tokenizer should be a tokenizer or its path"),
        (lambda: lc.prepare(["a"], "no/such.model"), "no/such.model"),
        (lambda: lc.prepare("nosuch.txt", 3), "tokenizer should be"),
        (lambda: lc.train(3), "config should be a name, a path or a Config"),
        (lambda: lc.train("tinny"), "tiny"),
        (lambda: lc.train("tiny", ["text"]), "data should be a folder of shards"),
        (lambda: lc.train("tiny", "nosuch", max_step=3), "max_steps"),
        (lambda: lc.load(None), "path should be a path"),
        (lambda: lc.load("nosuch"), "nosuch"),
        (lambda: lc.generate(lc.GPT, "x"), "model should be a checkpoint or its path"),
        (lambda: lc.evaluate("nosuch", "x"), "nosuch"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(
    call, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    "It names the argument, what it should be, and what it is."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
