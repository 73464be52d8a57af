"""Every notebook runs top to bottom in a process of its own, in time, leaving nothing behind; and is committed run and clean."""

import copy
import html
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import PATIENCE, ROOT, SCALE
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbdev.clean import clean_nb

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MINUTES = {
    "31_optim": 2,
    "34_training": 2,
    "36_checkpoint": 2,
    "60_speed": 4,
}  # of two CPUs; all others: 1; 60 has bf16 products even where they are slow
WORKED = "import os; print(sum(os.times()[:4]))"  # processor seconds, with those of ended children
SKIPPED_CELL = re.compile(r"^#\|\s*(slow|gpu|eval:\s*false)\s*$", re.M)  # as nbdev_test skips them
FORBIDDEN = {
    r"^\s*[!%]\s*(pip|wget|curl|conda|uv)\b": "installs or fetches: the environment is made once",
    r"\bsys\.path\b": "changes sys.path: the package is installed",
    r"filterwarnings\(\s*[\"']ignore[\"']\s*\)|simplefilter\(\s*[\"']ignore": "silences every warning: name the one that is meant",
    r"^from \S+ import \*|^\s+from \S+ import \*": "imports everything: name what is used",
    r"/home/|/Users/|/tmp/|C:\\\\": "holds a path of one machine",
}
PLAIN_WORDS = re.compile(
    r"\b(simply|just|obviously|easy|easily)\b", re.I
)  # what is hard for a reader is not `simply` done

notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def git_status() -> str | None:
    "What git sees as changed or new; None where the folder is not a git checkout."
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout if answer.returncode == 0 else None


class Client(NotebookClient):
    "Runs cells, and shows no widgets."

    def handle_comm_msg(self, *message: object) -> None:
        """Not to answer, as a page would. Whoever waits for a reply, and sends on the same socket, may miss that the reply has come:
        one in thirty notebooks with a widget then stood still until its time was up (nbclient 0.11, pyzmq 27)."""


def execute(
    nb: nbformat.NotebookNode, folder: Path, seconds: float = 2 * PATIENCE, then: str = ""
) -> float:
    """Run a notebook in a kernel of its own with `folder` as its working directory: the processor seconds that it worked.

    `then` runs in the same kernel, after that; its output is the last cell's. TimeoutError when all has not ended after
    `seconds` on the clock, which a busy machine makes longer, and the work hardly.
    """
    for cell in nb.cells:
        if cell.cell_type == "code" and SKIPPED_CELL.search(cell.source):
            cell.source = ""
    nb.cells += [nbformat.v4.new_code_cell(code) for code in (WORKED, then)]
    end = time.monotonic() + seconds
    left = lambda cell: max(
        1, int(end - time.monotonic())
    )  # the limit is the notebook's: cells share it
    Client(
        nb, timeout_func=left, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return float(nb.cells[-2].outputs[0].text)


def last_line(cell: nbformat.NotebookNode) -> str:
    "The last line that a cell has printed; a kernel may send a line and its end one after the other."
    return (
        "".join(o.text for o in cell.outputs if o.output_type == "stream").rstrip().split("\n")[-1]
    )


MOVE_CONTROLS = f"import runpy; _ = runpy.run_path({str(ROOT / 'tests' / 'controls.py')!r})"  # beside the notebook's names, not among them


@pytest.mark.slow  # `make test` runs every notebook with nbdev_test
@notebook
def test_runs_in_time_and_leaves_nothing_behind(path: Path):
    "Top to bottom, offline, in its own process; what it writes lies in folders that git ignores. Then all of its widgets work."
    before, nb = git_status(), nbformat.read(path, as_version=4)
    worked = execute(nb, path.parent, then=MOVE_CONTROLS)
    limit = MINUTES.get(path.stem, 1) * 2 * 60 * SCALE
    assert worked < limit, (
        f"{path.name} took {worked:.0f} seconds of a processor's time, where {limit:.0f} are allowed"
    )
    assert git_status() == before
    assert json.loads(last_line(nb.cells[-1])) == []


CONTROLS = [  # what is shown, which controls it has, and a fault that tests/controls.py has to find in them, if any
    ("lambda n: print(n)", "n=w.IntSlider(1, 0, 3, continuous_update=False, style=fits)", None),
    ("lambda n: print(n)", "n=w.Checkbox(True, style=fits)", None),
    ("lambda n: print(n)", "n=w.Text('x', continuous_update=False, style=fits)", None),
    ("lambda n: print(n)", "{'manual': True}, n=w.Dropdown(options='ab', style=fits)", None),
    (
        "lambda n: print(n)",
        "n=w.IntSlider(1, 0, 3, style=fits)",
        "IntSlider 'n' calls its function while it moves",
    ),
    (
        "lambda n: print(n)",
        "n=w.IntSlider(1, 0, 3, continuous_update=False)",
        "IntSlider 'n' may be cut off",
    ),
    (
        "lambda n: print(6 / n)",
        "n=w.IntSlider(1, 0, 3, continuous_update=False, style=fits)",
        "set to 0: ZeroDivisionError: division by zero",
    ),
    (
        "lambda n: None",
        "n=w.Dropdown(options=['a', 'b'], style=fits)",
        "Dropdown 'n' is set to 'b': nothing is shown",
    ),
    (
        "lambda n: print(seen[n])",
        "n=w.Dropdown(options={'a': 0, 'b': 1}, style=fits)",
        "NameError: name 'seen' is not defined",
    ),
    (
        "lambda n: print(n[0])",
        "n=w.Text('x', continuous_update=False, style=fits)",
        "Text 'n' is set to '': IndexError",
    ),
    (
        "lambda n: print(n)",
        "{'manual': True}, n=w.Text('x', style=fits)",
        "its function is called 1 times, and not 0",
    ),
    (
        "lambda n: print(n)",
        "n=w.ColorPicker(value='red', style=fits)",
        "does not know how to move ColorPicker 'n'",
    ),
]


def test_a_control_that_fails_is_seen(tmp_path: Path):
    "What tests/controls.py says of widgets that work, and of others. One kernel has them all, one after the other."
    codes = ["import ipywidgets as w; fits = {'description_width': 'initial'}"]
    for function, controls, _ in CONTROLS:
        codes += [
            f"some = w.interactive({function}, {controls})",
            MOVE_CONTROLS,
            "some.close_all(); some.close()",
        ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    execute(nb, tmp_path)
    for cell, (function, controls, fault) in zip(nb.cells[2::3], CONTROLS):
        said = json.loads(last_line(cell))
        assert any(fault in sentence for sentence in said) if fault else said == [], (
            f"{function}, {controls}: {said}"
        )


def test_a_run_says_whether_files_are_watched():
    "Outside a git checkout the files that a notebook leaves cannot be seen, and this line says so."
    if git_status() is None:
        pytest.skip("not a git checkout: files that notebooks leave behind are not looked for")


def test_a_notebook_that_hangs_is_stopped(tmp_path: Path):
    "The time limit holds for the whole notebook, however many cells share it."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; time.sleep(600)")])
    with pytest.raises(TimeoutError):
        execute(nb, tmp_path, 5)


def test_a_notebook_that_fails_is_seen(tmp_path: Path):
    "An exception in a cell fails the run; and the working directory is the notebook's folder."
    good = nbformat.v4.new_code_cell(f"import os; assert os.path.samefile('.', {str(tmp_path)!r})")
    execute(nbformat.v4.new_notebook(cells=[good]), tmp_path)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(nbformat.v4.new_notebook(cells=[good, nbformat.v4.new_code_cell("1/0")]), tmp_path)


def test_the_work_of_a_notebook_is_measured(tmp_path: Path):
    "What it computes counts, in children that it waits for too; what it waits for does not."
    busy = "import time\nend = time.process_time() + 2\nwhile time.process_time() < end: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    notebooks = (
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        for code in ("import time; time.sleep(2)", busy, child)
    )
    waits, works, lets_work = (execute(nb, tmp_path) for nb in notebooks)
    assert min(works, lets_work) > waits + 1


@notebook
def test_committed_with_its_outputs(path: Path):
    "Readers look at the notebooks on the web: what a cell shows stands below it, and none shows an error."
    code = [cell for cell in cells(path, "code") if not SKIPPED_CELL.search(source(cell))]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    for cell in code:
        last = source(cell).strip().splitlines()[-1:] or [""]
        shows = re.match(r"print\(|plt\.show\(|display\(", last[0])
        assert cell["outputs"] or not shows, (
            f"{path.name} is committed without the output of:\n{source(cell)}"
        )
    assert outputs or not code, (
        f"{path.name} is committed without outputs: `make notebooks` makes them"
    )


@notebook
def test_shows_no_folder_of_the_machine_that_ran_it(path: Path):
    "As a warning does that names the file it comes from."
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert 'File "/' not in "".join(output.get("text", "")), (
                f"{path.name} shows a path below:\n{source(cell)}"
            )


@notebook
def test_small_enough_to_read_on_the_web(path: Path):
    assert path.stat().st_size < 300 * 1024, (
        f"{path.name} has {path.stat().st_size / 1024:.0f} KB: smaller or fewer pictures"
    )


@notebook
def test_clean(path: Path):
    "As nbdev_clean leaves it: no metadata of one editor, no cell numbers, so that a diff shows what changed."
    nb = json.loads(path.read_text(encoding="utf-8"))
    cleaned = copy.deepcopy(nb)
    clean_nb(cleaned)
    assert nb == cleaned, f"run: nbdev_clean --fname nbs/{path.name}"


@notebook
def test_holds_nothing_forbidden(path: Path):
    for cell in cells(path, "code"):
        for pattern, why in FORBIDDEN.items():
            found = re.search(pattern, source(cell), re.M)
            assert not found, f"{path.name} has a cell that {why}: {found[0].strip()}"


@notebook
def test_speaks_to_the_reader_kindly(path: Path):
    "A title first, and none of the words that make a reader feel slow."
    prose = [source(cell) for cell in cells(path, "markdown")]
    assert prose and re.match(r"# \w", prose[0])
    for text in prose:
        found = PLAIN_WORDS.search(re.sub(r"`[^`]*`", "", text))
        assert not found, f"{path.name} says {found[0]!r} in: {text[:80]}"


def shown(cell: dict) -> Iterator[str]:
    "The lines of text that a cell has printed, or shows as its result. (What a picture or a widget says instead of itself is not among them.)"
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = (
            ""
            if any(kind.startswith(("image/", "application/")) for kind in data)
            else data.get("text/plain", output.get("text", ""))
        )
        yield from "".join(text).splitlines()


@notebook
def test_pictures_can_be_seen_by_all(path: Path):
    """PNG, which JupyterLab shows in a notebook that it does not trust, as it does not show SVG; and in words for those who do not
    see it. MyST-NB and nbconvert's classic pages take the words from where they lie here, the output's metadata."""
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            if kinds := {kind for kind in output.get("data", {}) if kind.startswith("image/")}:
                words = output["metadata"].get("image/png", {}).get("alt", "")
                assert kinds == {"image/png"} and len(words.split()) > 8, (
                    f"{path.name} has a picture without a text, or not as PNG, below:\n{source(cell)}"
                )


def test_the_words_of_a_picture_are_on_its_web_page():
    "As nbconvert writes it. (Of its templates, `classic` does; `lab`, as of 7.17, does not.)"
    path = ROOT / "nbs" / "index.ipynb"
    words = [
        o["metadata"]["image/png"]["alt"]
        for cell in cells(path, "code")
        for o in cell["outputs"]
        if "image/png" in o.get("data", {})
    ]
    page, _ = HTMLExporter(template_name="classic").from_filename(str(path))
    assert words and all(f'alt="{html.escape(text)}"' in page for text in words)


@notebook
def test_text_is_as_wide_as_the_page(path: Path):
    "JupyterLab shows 105 columns of code beside its file browser, and breaks longer lines within words: tales have 88, exercises at most 100."
    for cell in cells(path, "code"):
        code = source(cell)
        if re.search(r"^print\(feedback\(|# your turn$", code, re.M):
            assert max(map(len, code.splitlines())) <= 100, (
                f"{path.name} has an exercise with a line of more than 100 columns:\n{code}"
            )
        for line in (
            shown(cell) if "shell(" not in code else []
        ):  # what a command prints, it lays out by itself
            assert len(line) <= 88 or "Once upon a time, there" not in line, (
                f"{path.name} shows a tale in a line of {len(line)} columns below:\n{code}"
            )


@notebook
def test_no_sentence_is_printed_twice(path: Path):
    "As the say of a function that is called twice would be."
    for cell in cells(path, "code"):
        sentences = [line for line in shown(cell) if line.endswith(".") and line[:1].isupper()]
        assert len(sentences) == len(set(sentences)), (
            f"{path.name} prints a sentence twice below:\n{source(cell)}"
        )


@notebook
def test_a_training_of_minutes_is_announced(path: Path):
    "The first visit trains the lessons' model: it says for how long, and shows how far it is."
    for cell in cells(path, "code"):
        if "train_on_tales(" in source(cell) and "#| export" not in source(cell):
            assert not re.search(r"train_on_tales\([^\n]*(progress|say)=", source(cell)), (
                f"{path.name} trains in silence:\n{source(cell)}"
            )


LONG_CELLS = {
    "2e21f6a5": "the settings of sampling with what they do, in the order in which they apply",
    "5c85a9bd": "the loop of generation on one screen",
    "7977f78b": "half of it is the signature and what the options mean",
    "795db71d": "the figures of an evaluation, a line each",
    "c88b4b2e": "the model, whole",
    "32trainr": "what a run works with, and a step of it: one class, mostly names with what they mean",
    "32fit001": "the training loop on one screen",
    "f0dbabca": "one class, whole: half of it says what may be given, and checks it",
    "ef4a6af2": "one class, whole: text to ids and back, a method of a few lines for each way",
}  # id of a code cell of more than 40 lines: the reason that a reader would be given


@notebook
def test_a_chapter_is_one_sitting(path: Path):
    "Some 50 cells and 250 lines of code (blank ones aside), or 600 in a workshop, whose first words say that it is one; no cell longer than a screen."
    title = "".join(map(source, cells(path, "markdown")[:2]))
    workshop = "Workshop" in title
    code = [cell for cell in cells(path, "code")]
    lines = [sum(bool(line.strip()) for line in source(cell).splitlines()) for cell in code]
    assert sum(lines) <= (600 if workshop else 250), f"{path.name} has {sum(lines)} lines of code"
    assert workshop or len(cells(path, "code")) + len(cells(path, "markdown")) <= 55, (
        f"{path.name} has too many cells"
    )
    for cell, n in zip(code, lines):
        assert n <= 40 or workshop or cell["id"] in LONG_CELLS, (
            f"{path.name} has a cell of {n} lines:\n{source(cell)[:200]}"
        )


@notebook
def test_links_between_notebooks_lead_somewhere(path: Path):
    for text in map(source, cells(path, "markdown")):
        for target in re.findall(r"\]\(([^)#:]+\.(?:ipynb|md|json|py))\)", text):
            assert (path.parent / target).exists(), (
                f"{path.name} links to {target}, which is not there"
            )
