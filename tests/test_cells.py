"""Cells can be run again: twice in a row on the way down, and one alone when a notebook has run to its end, as readers do who change a number."""

import ast
import dis
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import CodeType

import nbformat
import pytest
from conftest import PATIENCE, SCALE
from nbclient.exceptions import CellExecutionError
from test_layering import code_cells
from test_notebooks import SKIPPED_CELL, Client, notebook

LONG = 10 * SCALE  # seconds: what takes longer, as a training does, is run once


def run_again(nb: nbformat.NotebookNode, folder: Path) -> list[str]:
    """What fails, in a kernel of its own, when each cell runs twice before the next one, and then each once more.

    The second round goes from the last cell to the first. From first to last, a cell that another has spoiled would not be found:
    the cell that made its names or its files in the first place would have made them again just before.
    """
    cells = [
        (i, cell)
        for i, cell in enumerate(nb.cells)
        if cell.cell_type == "code" and cell.source and not SKIPPED_CELL.search(cell.source)
    ]
    client, seconds, failed = (
        Client(
            nb,
            timeout=int(2 * PATIENCE),
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ),
        {},
        [],
    )

    def run(number: int, cell: nbformat.NotebookNode, when: str) -> None:
        begun = perf_counter()
        try:
            client.execute_cell(cell, number)
        except CellExecutionError as error:
            failed.append(f"[{number}] {when}: {error.ename}: {error.evalue}")
        seconds.setdefault(number, perf_counter() - begun)

    with client.setup_kernel():
        for number, cell in cells:
            run(number, cell, "first")
            if seconds[number] < LONG:
                run(number, cell, "twice in a row")
        for number, cell in reversed(cells):
            if seconds[number] < LONG:
                run(number, cell, "alone, after all others")
    return failed


@pytest.mark.slow
@notebook
def test_every_cell_can_be_run_again(path: Path):
    "Twice in a row, and alone after a full run: no name is used for something else, no clean-up breaks the page."
    assert run_again(nbformat.read(path, as_version=4), path.parent) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "codes, failed",
    [
        (["n = 1", "assert n == 1", "m = 2"], []),
        (["import os; os.mkdir('made')"], ["[0] twice in a row: FileExistsError"]),
        (
            ["x = []", "x.append(1)", "assert len(x) == 1"],
            ["[2] first: AssertionError", "[2] twice in a row: AssertionError"],
        ),
        (["n = 1", "assert n == 1", "n = 2"], ["[1] alone, after all others: AssertionError"]),
        (
            [
                "open('a', 'w').close()",
                "open('a')",
                "import os, contextlib\nwith contextlib.suppress(OSError): os.remove('a')",
            ],
            ["[1] alone, after all others: FileNotFoundError"],
        ),
    ],
)
def test_a_cell_that_cannot_be_run_again_is_seen(
    tmp_path: Path, codes: list[str], failed: list[str]
):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    found = run_again(nb, tmp_path)
    assert all(any(line.startswith(start) for line in found) for start in failed) and bool(
        found
    ) == bool(failed), found


def names_of(code: CodeType) -> set[str]:
    "All names that a function, a class or a comprehension takes from its surroundings, and those inside it."
    own = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return own.union(*(names_of(part) for part in code.co_consts if isinstance(part, CodeType)))


def uses(cell: str) -> tuple[set[str], set[str]]:
    "The names that a cell binds, and those that it reads as another cell has left them."
    code = compile(cell, "cell", "exec")
    bound, read = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_NAME", "STORE_GLOBAL"):
            bound.add(step.argval)
        elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL") and step.argval not in bound:
            read.add(step.argval)
    later = set().union(
        *(names_of(part) for part in code.co_consts if isinstance(part, CodeType))
    )  # when it is called, all is bound
    return bound, read | later - bound


def imports(cell: str) -> set[tuple[str, str]]:
    "(Name, from where) of each import of a cell."
    nodes = [node for node in ast.parse(cell).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        ((alias.asname or alias.name).split(".")[0], f"{getattr(node, 'module', '')} {alias.name}")
        for node in nodes
        for alias in node.names
    }


def overwritten(cells: list[str]) -> Iterator[str]:
    "Each name that one cell reads as an earlier one has left it, and a later one binds to something else."
    used, imported = [uses(cell) for cell in cells], [imports(cell) for cell in cells]
    for name in sorted(set().union(*(bound for bound, _ in used))):
        binders = [number for number, (bound, _) in enumerate(used) if name in bound]
        sources = {
            source for number in binders for which, source in imported[number] if which == name
        }
        same = len(sources) == 1 and all(
            any(which == name for which, _ in imported[number]) for number in binders
        )
        readers = [
            number
            for number, (_, read) in enumerate(used)
            if name in read and number <= binders[-1]
        ]
        if len(binders) > 1 and readers and not same:
            yield f"{name}, bound in the code cells {binders}, is read in {readers}"


@notebook
def test_no_cell_depends_on_a_name_that_a_later_cell_overwrites(path: Path):
    "Else it does something else when it is run again, without a word perhaps."
    assert (
        list(overwritten([cell for cell in code_cells(path) if not SKIPPED_CELL.search(cell)]))
        == []
    )


@pytest.mark.parametrize(
    "cells, names",
    [
        (["n = 1", "print(n)"], []),
        (["n = 1", "print(n)", "n = 2"], ["n"]),
        (["n = 1", "print(n)", "n = 2; print(n)"], ["n"]),
        (["for n in 'ab': print(n)", "for n in 'cd': print(n)"], []),
        (["n = 1", "n = n + 1"], ["n"]),
        (["n = 1", "n += 1"], ["n"]),
        (["import os", "os.getcwd()", "import os"], []),
        (["import os", "os.getcwd()", "from x import y as os"], ["os"]),
        (["n = 1", "def f(): return n", "n = 2"], ["n"]),
        (["n = 1", "def f(n): return n", "n = 2"], []),
        (["n = 1", "[n for n in 'ab']", "n = 2"], []),
        (["n = 1", "class A: m = n", "n = 2"], ["n"]),
        (["def f(): return f", "def f(): return 1"], []),
        (["def f(): return g()\ndef g(): pass", "g = 1"], []),
        (["from functools import cache", "@cache\ndef f(): pass", "cache = {}"], ["cache"]),
        (["n = 1", "lambda: [m + n for m in 'a']", "n = 2"], ["n"]),
    ],
)
def test_a_name_that_is_overwritten_is_seen(cells: list[str], names: list[str]):
    "Whatever form reads it and binds it."
    assert [line.split(",")[0] for line in overwritten(cells)] == names
