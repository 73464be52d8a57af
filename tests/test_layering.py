"""The layering rule: a module imports only from modules of earlier notebooks, and nothing imports the command line.

The order is that of the notebooks' file names. Imports are read from the source, those inside functions included.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

PACKAGE = "llm_course"
GENERATED = {"__init__", "__main__", "_modidx"}
LATE_TORCH = (
    "corpus",
    "tokenizer",
    "packing",
    "preparation",
    "options",
    "text_commands",
    "cli",
)  # `llm-course --help` answers before torch would be loaded
INSTALLED_WITH = {
    "ipywidgets": ["IPython"],
    "matplotlib": ["PIL"],
}  # what a requirement always brings, under its import name


def code_cells(notebook: Path) -> list[str]:
    "The code cells of a notebook as Python: lines for IPython (`%matplotlib inline`, `!ls`) are left out."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [
        "" if cell.startswith("%%") else re.sub(r"^[ \t]*[%!].*$", "", cell, flags=re.M)
        for cell in source
    ]


def exported_module(notebook: Path) -> str:
    "The module that a notebook exports, or an empty string."
    found = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code_cells(notebook)), re.M)
    return found[0] if found else ""


def imports(source: str) -> Iterator[str]:
    "Every absolute module name that a source imports, at any depth; `.x` and `from llm_course import x` give llm_course.x."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = ".".join(filter(None, [PACKAGE, node.module])) if node.level else node.module
            yield from (
                [f"{name}.{alias.name}" for alias in node.names] if name == PACKAGE else [name]
            )


def own_imports(source: str) -> set[str]:
    return {name.split(".")[1] for name in imports(source) if name.startswith(PACKAGE + ".")} - {
        "__version__"
    }


def outside_imports(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)} - sys.stdlib_module_names - {PACKAGE}


def requirements(*lists: str) -> set[str]:
    "Import names of what settings.ini lists."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    names = {
        re.match(r"[\w.-]+", line)[0]
        for key in lists
        for line in parser["DEFAULT"][key].split("\n")
        if line.strip()
    }
    return {
        module
        for name in names
        for module in [name.replace("-", "_"), *INSTALLED_WITH.get(name, [])]
    }


NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
ORDER = [module for module in map(exported_module, NOTEBOOKS) if module]  # modules, first to last
MODULES = [path for path in sorted((ROOT / PACKAGE).glob("*.py")) if path.stem not in GENERATED]


def earlier(module: str) -> set[str]:
    return set(ORDER[: ORDER.index(module)])


def test_every_module_has_its_notebook():
    "Nothing stands in the package that no notebook exports, and no two notebooks export the same module."
    assert sorted(ORDER) == sorted(path.stem for path in MODULES)


def test_notebook_names_say_what_they_export():
    "`NN_noun.ipynb` exports `noun.py`."
    for path in NOTEBOOKS:
        assert exported_module(path) in ("", re.sub(r"^\d+_", "", path.stem)), path.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_earlier_modules(path: Path):
    later = own_imports(path.read_text(encoding="utf-8")) - earlier(path.stem)
    assert not later, (
        f"{path.name} imports {sorted(later)}, which an earlier notebook does not export"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_needs_only_what_settings_ini_lists(path: Path):
    "What the extra `sharing` brings is imported inside the function that needs it, so that everybody else can do without."
    source = path.read_text(encoding="utf-8")
    first = "\n".join(
        ast.unparse(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    needed = requirements("requirements")
    unknown = (outside_imports(first) - needed) | (
        outside_imports(source) - needed - requirements("sharing_requirements")
    )
    assert not unknown, (
        f"{path.name} imports {sorted(unknown)}, which is not in settings.ini's requirements"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_only_its_own_and_earlier_modules(path: Path):
    "Pages that export nothing (index, 00_tour) look ahead on purpose; the command line is for nobody."
    source, module = "\n".join(code_cells(path)), exported_module(path)
    allowed = earlier(module) | {module} if module else set(ORDER)
    assert not own_imports(source) - allowed, f"{path.name} imports from a later notebook"
    assert module == "cli" or "cli" not in own_imports(source)
    unknown = outside_imports(source) - requirements(
        "requirements", "course_requirements", "sharing_requirements"
    )
    assert not unknown, f"{path.name} imports {sorted(unknown)}, which is not in settings.ini"


def test_nothing_imports_the_command_line():
    "The command line is a face: a script gets everything that it does from the modules behind it."
    for path in MODULES:
        assert "cli" not in own_imports(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("module", LATE_TORCH)
def test_torch_is_not_loaded_before_it_is_needed(module: str):
    "Text, tokens and shards are plain Python and numpy, and so is the start of the command line."
    code = f"import sys, {PACKAGE}.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE).returncode == 0


def test_only_what_compiles_loads_the_compiler():
    "torch's compiler takes as long to import as all the rest of torch: no module does, nor a step of both optimizers, only `accelerate(model, compile=True)`."
    code = f"""if True:
        import importlib, sys, torch
        for module in {ORDER}:
            importlib.import_module("{PACKAGE}." + module)
            assert "torch._dynamo" not in sys.modules, module
        from {PACKAGE}.config import TrainingConfig, load_config
        from {PACKAGE}.optim import make_optimizers
        from {PACKAGE}.step import forward_backward
        from {PACKAGE}.gpt import GPT
        from {PACKAGE}.kernels import accelerate
        model, ids = accelerate(GPT(load_config("tiny").model)), torch.zeros(1, 64, dtype=torch.long)
        for muon_lr_scale in (0.0, 7.0):
            optimizers = make_optimizers(model, TrainingConfig(muon_lr_scale=muon_lr_scale))
            forward_backward(model, ids, ids, 1)
            for optimizer in optimizers:
                optimizer.step(), optimizer.zero_grad(), optimizer.load_state_dict(optimizer.state_dict())
                assert "torch._dynamo" not in sys.modules, optimizer
        accelerate(model, compile=True)
        assert "torch._dynamo" in sys.modules"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_reader_of_imports_reads_every_form():
    "The rule is worth what its reader sees: all forms, at any depth."
    source = (
        "import llm_course.a\nfrom llm_course import b\nfrom llm_course.c import x\nfrom . import d\nfrom .e import y\n"
        "def f():\n    from .g.h import z\n    import numpy.random as r, os.path"
    )
    assert own_imports(source) == set("abcdeg")
    assert outside_imports(source) == {"numpy"}
