"""What the exercises' checks are worth: they call every right answer right, and every wrong one wrong.

An exercise is two cells of a notebook: a function without a body, and `check_` with its name, whose `feedback` on an answer is «Right.» or
«Not yet: …». tests/answers/ has answers to each, right ones and wrong ones that people give; and each right answer is also spoiled
in every single place, one sign, number or comparison at a time, as a mutation tester does it.
"""

import ast
import contextlib
import copy
import functools
import importlib
import io
import linecache
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from jaxtyping import Float
from test_layering import code_cells, exported_module
from torch import Tensor
from traitlets.config import Config

from llm_course.lessons import explain_error, feedback

ROOT = Path(__file__).parents[1]
SECONDS = 20  # for one answer: a spoiled one may run for ever
pytestmark = [
    pytest.mark.skipif(
        not hasattr(signal, "SIGALRM"), reason="an answer that never ends is stopped by SIGALRM"
    ),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]
Exercise = tuple[
    Path, str, str, str
]  # the notebook, the function's name, the cell to fill in, the cell that checks


def exercises() -> list[Exercise]:
    "All of them: a cell that defines `name`, and one that defines `check_name` and prints its feedback."
    found = []
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        defined = {
            name: cell
            for cell in code_cells(notebook)
            for name in re.findall(r"^def (\w+)\(", cell, re.M)
        }
        checks = {name: defined.get(f"check_{name}", "") for name in defined}
        found += [
            (notebook, name, defined[name], check)
            for name, check in checks.items()
            if f"feedback(check_{name}, {name})" in check
        ]
    return found


def answers(notebook: Path, name: str) -> list[tuple[str, str]]:
    "The answers to an exercise: (what is said of it, its source)."
    text = (ROOT / "tests" / "answers" / f"{notebook.stem}.py").read_text(encoding="utf-8")
    pieces = [piece.split("\n", 1) for piece in re.split(r"^# %% ", text, flags=re.M)[1:]]
    return [(title, source) for title, source in pieces if f"def {name}(" in source]


@functools.cache
def names_there(notebook: Path) -> dict[str, object]:
    "What a reader has when the exercises come: the notebook's module, and whatever it imports."
    module, there = exported_module(notebook), {}
    if module:
        there |= vars(importlib.import_module(f"llm_course.{module}"))
    for cell in code_cells(notebook):
        for node in ast.parse(cell).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), there)
    return there


def as_cell(source: str, name: str) -> CodeType:
    "Compiled as IPython does it: each cell in a file of its own, of which tracebacks know the lines."
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    return compile(source, name, "exec")


def verdict(there: dict[str, object], answer: str, check: str) -> str:
    "What the check says of an answer."

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {SECONDS} seconds.")

    space, said = dict(there), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(said):
            exec(as_cell(answer, "the answer"), space)
            exec(as_cell(check, "the check"), space)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return said.getvalue().strip()


OTHER = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.MatMult: [ast.Mult],
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.USub: [ast.UAdd],
}
OTHER_NAMES = {
    "min": ["max"],
    "max": ["min"],
    "exp": ["log"],
    "log": ["exp", "log2"],
    "sin": ["cos"],
    "cos": ["sin"],
    "any": ["all"],
    "all": ["any"],
    "tril": ["triu"],
    "triu": ["tril"],
    "sqrt": ["exp"],
    "sum": ["max"],
    "mean": ["sum"],
}


def replacements(node: ast.AST) -> Iterator[tuple[str, object]]:
    "What could stand in a node's fields instead: (field, value)."
    if hasattr(node, "op"):
        yield from (("op", other()) for other in OTHER.get(type(node.op), []))
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield from (
                ("ops", [*node.ops[:i], other(), *node.ops[i + 1 :]])
                for other in OTHER.get(type(op), [])
            )
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (("value", value) for value in (node.value + 1, node.value - 1))
    if isinstance(node, ast.Name):
        yield from (("id", other) for other in OTHER_NAMES.get(node.id, []))
    if isinstance(node, ast.Attribute):
        yield from (("attr", other) for other in OTHER_NAMES.get(node.attr, []))
    if isinstance(node, ast.IfExp):
        yield from (("test", ast.Constant(value)) for value in (True, False))


def spoiled(source: str) -> Iterator[str]:
    "The answer with one thing changed, for each thing that can be; defaults of arguments stay, and lines that end in «# either» as well."
    free = {
        number for number, line in enumerate(source.splitlines(), 1) if line.endswith("# either")
    }
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    places = [
        i for i, node in enumerate(ast.walk(function)) if getattr(node, "lineno", 0) not in free
    ]
    defaults = {id(node) for default in function.args.defaults for node in ast.walk(default)}
    for place in places:
        original = list(ast.walk(function))[place]
        if id(original) in defaults:
            continue
        for field, value in replacements(original):
            changed = copy.deepcopy(function)
            setattr(list(ast.walk(changed))[place], field, value)
            yield ast.unparse(ast.fix_missing_locations(changed))


every_exercise = pytest.mark.parametrize(
    "exercise", exercises(), ids=lambda exercise: f"{exercise[0].stem}-{exercise[1]}"
)


@every_exercise
def test_what_is_not_there_yet_is_told_kindly(exercise: Exercise):
    "An empty answer is no error that stops a notebook; it says what kind of thing is wanted; and there are answers to prove the check with."
    notebook, name, stub, check = exercise
    assert ast.parse(stub).body[0].returns
    assert re.fullmatch(r"Not yet: [^\n]+\.", verdict(names_there(notebook), stub, check))
    titles = [title for title, _ in answers(notebook, name)]
    assert (
        any(title.startswith("right") for title in titles)
        and sum(title.startswith("wrong: ") for title in titles) >= 3
    )


@every_exercise
def test_right_answers_are_called_right(exercise: Exercise):
    notebook, name, _, check = exercise
    for title, answer in answers(notebook, name):
        if title.startswith("right"):
            assert verdict(names_there(notebook), answer, check) == "Right.", title


@every_exercise
def test_wrong_answers_are_called_wrong(exercise: Exercise):
    "Each with a reason."
    notebook, name, _, check = exercise
    for title, answer in answers(notebook, name):
        if title.startswith("wrong"):
            assert re.match("Not yet: .", verdict(names_there(notebook), answer, check)), title


@every_exercise
def test_spoiled_answers_are_called_wrong(exercise: Exercise):
    "Whichever sign, number or comparison of a right answer is changed, the check sees it."
    notebook, name, _, check = exercise
    there = names_there(notebook)
    tried = [
        changed
        for title, answer in answers(notebook, name)
        if title.startswith("right")
        for changed in spoiled(answer)
    ]
    assert len(tried) >= 4
    passed = [
        changed for changed in tried if not verdict(there, changed, check).startswith("Not yet: ")
    ]
    assert not passed, f"{len(passed)} of {len(tried)} pass as right. The first:\n{passed[0]}"


def test_all_answers_belong_to_an_exercise():
    "None is left over from an exercise that has another name now."
    known = {(notebook.stem, name) for notebook, name, *_ in exercises()}
    for file in (ROOT / "tests" / "answers").glob("*.py"):
        for name in re.findall(r"^def (\w+)\(", file.read_text(encoding="utf-8"), re.M):
            assert (file.stem, name) in known


STUB, CHECK = (
    "def twice(words: list[str]) -> dict:\n    ",
    """
def check_twice(answer):
    found = answer(["a", "b", "a"])
    assert found["a"] == 2, f"there are two of a, and the answer says {found['a']}."
""",
)
OF_THE_LEARNER = {  # what somebody writes, what comes of it
    "a key that is not there": (
        "counts = {}\n    for word in words: counts[word] += 1\n    return counts",
        "Not yet: KeyError: 'a', in line 3 of your cell: for word in words: counts[word] += 1",
    ),
    "a wrong operation": (
        "return {word: words + 1 for word in words}",
        'Not yet: TypeError: can only concatenate list (not "int") to list, in line 2 of your cell: '
        "return {word: words + 1 for word in words}",
    ),
    "an endless recursion": (
        "return twice(words)",
        "Not yet: RecursionError: maximum recursion depth exceeded, in line 2 of your cell: return twice(words)",
    ),
    "an assertion without a word": (
        "assert words == []",
        "Not yet: AssertionError, in line 2 of your cell: assert words == []",
    ),
    "a helper in the same cell": (
        "return helper(words)\n\ndef helper(words):\n    return words[9]",
        "Not yet: IndexError: list index out of range, in line 5 of your cell: return words[9]",
    ),
    "nothing": ("...", "Not yet: nothing comes back."),
    "the wrong kind of thing": (
        "return 2",
        "Not yet: what comes back should be a dict, and is an int: 2",
    ),
    "the right kind, and wrong": (
        "return {'a': 3}",
        "Not yet: there are two of a, and the answer says 3.",
    ),
    "the right kind, which the check cannot read": ("return {}", "Not yet: KeyError: 'a'"),
    "what is right": ("return {word: words.count(word) for word in words}", "Right."),
}
said_of_the_learner = pytest.mark.parametrize(
    "body, said", OF_THE_LEARNER.values(), ids=OF_THE_LEARNER
)


@said_of_the_learner
def test_feedback_names_the_error_and_the_line(body: str, said: str):
    "Nobody is told «Not yet: 'a'»: the kind of the error, and the learner's own line, or what is wrong with what came back."
    assert (
        verdict({"feedback": feedback}, STUB + body, CHECK + "print(feedback(check_twice, twice))")
        == said
    )


@pytest.fixture(scope="module")
def shell() -> Iterator[InteractiveShell]:
    "IPython itself, without a history on the disk."
    hook = sys.excepthook
    yield InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    sys.excepthook = hook


@said_of_the_learner
def test_feedback_finds_the_line_in_a_notebook(
    shell: InteractiveShell, body: str, said: str, capsys: pytest.CaptureFixture
):
    "Cells of IPython have lines, too, though no file holds them."
    for cell in (
        STUB + body,
        "from llm_course.lessons import feedback" + CHECK,
        "print(feedback(check_twice, twice))",
    ):
        shell.run_cell(cell).raise_error()
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize(
    "kind, returned, said",
    [
        (float, "three", "should be a number, and is a str: 'three'"),
        (int, None, "nothing comes back."),
        (str, 7, "should be a str, and is an int: 7"),
        (list[int], np.arange(2), "should be a list, and is a ndarray: array([0, 1])"),
        (tuple[float, Tensor], 1.5, "should be a tuple of 2, and is a float: 1.5"),
        (
            tuple[float, Tensor],
            (1.5, [0]),
            "part 2 of it should be a Tensor, and is a list: (1.5, [0])",
        ),
        (Float[Tensor, "N"], np.zeros(2), "should be a Tensor, and is a ndarray: array([0., 0.])"),
        (float, np.float32(2), "2.0 is not right."),
        (float, torch.tensor(2.0), "2.0 is not right."),
        (list[int], [2], "[2] is not right."),
        (
            Float[Tensor, "N"],
            torch.zeros(2, 2),
            "tensor([[0., 0.],         [0., 0.]]) is not right.",
        ),
        ("undefined", 2, "2 is not right."),
    ],
)
def test_feedback_says_what_kind_is_wanted(kind: object, returned: object, said: str):
    "As the annotation in the exercise has it. What computes like a number is one; where the kind is right, the check has its say."

    def answer() -> kind:
        return returned

    said = said if said.endswith(".") else f"what comes back {said}"
    error = AssertionError(
        f"{returned.item() if getattr(returned, 'shape', None) == () else returned} is not right."
    )
    assert explain_error(error, answer, returned) == " ".join(said.split())


@pytest.mark.parametrize(
    "check, fault",
    [
        ("assert answer(2) == 4", "a check that one number satisfies"),
        ("pass", "a check that asks nothing"),
    ],
)
def test_a_check_that_catches_too_little_is_seen(check: str, fault: str):
    "The proof itself: spoiled answers get past a bad check."
    cell = f"def check_double(answer):\n    {check}\nprint(feedback(check_double, double))"
    answer = "def double(x):\n    return 2 * x"
    assert verdict({"feedback": feedback}, answer, cell) == "Right."
    assert any(
        verdict({"feedback": feedback}, changed, cell) == "Right."
        for changed in ["def double(x):\n    return x ** 2", *spoiled(answer)]
    ), fault
