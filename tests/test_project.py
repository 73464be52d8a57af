"""The project as a whole: one description, entry points that resolve, configs that load, and a README that cannot drift."""
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

CONFIGS = sorted((ROOT / "llm_course" / "configs").glob("*.json"))
TOP = set("""settings.ini setup.py pyproject.toml Makefile LICENSE README.md CONTRIBUTING.md .gitignore .gitattributes .ci .github
             nbs llm_course tests data artifacts docs benchmarks""".split())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def course(*arguments: str) -> subprocess.CompletedProcess:
    "Run the command line in a process of its own."
    command = [sys.executable, "-m", "llm_course", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE)


def blocks(page: Path) -> list[str]:
    "The lines of a page's code blocks, continued lines joined, comments left out."
    found = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def commands(page: Path) -> list[list[str]]:
    "Every `llm-course …` of a page as its words, whatever stands before it (torchrun, a folder of scripts)."
    lines = [re.sub(r"^.*(llm-course|-m llm_course)\s", "", line) for line in blocks(page) if re.search(r"llm-course\s|-m llm_course\s", line)]
    return [shlex.split(line.split(" && ")[0]) for line in lines]


def stages() -> list[str]:
    return [stage for stage in re.findall(r"^  ([a-z]+) ", course("--help").stdout, re.M)]


def installed() -> bool:
    try:
        return bool(metadata(settings()["lib_name"]))
    except ModuleNotFoundError:
        return False


def test_the_top_level_holds_only_what_belongs_there():
    answer = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    assert {line.split("/")[0] for line in answer.stdout.splitlines()} <= TOP


def test_the_tables_of_the_benchmarks_are_their_results(monkeypatch: pytest.MonkeyPatch):
    "A table in benchmarks/README.md is what its command makes of the results in git: no figure is typed by hand."
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as python does for a script
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = sorted((ROOT / "benchmarks").glob("*.json"))
    assert results
    for path in results:
        assert runpy.run_path(str(path.with_name(path.name.split(".")[0] + ".py")))["table"](json.loads(path.read_text())["results"]) in page


def test_settings_ini_is_the_only_description():
    "setup.py and pyproject.toml repeat no version, no name and no requirement."
    text = (ROOT / "setup.py").read_text(encoding="utf-8") + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "settings.ini" in text and settings()["version"] not in text
    for line in "\n".join(value for key, value in settings().items() if key.endswith("requirements")).split("\n"):
        assert not line or line not in text


@pytest.mark.skipif(not installed(), reason="the package is not installed in this environment")
def test_the_installed_package_is_what_settings_ini_says():
    fields, described = metadata(settings()["lib_name"]), settings()
    assert (fields["Version"], fields["Summary"]) == (described["version"], described["description"])
    wanted = [re.sub(r"[\s'\"]", "", line.split(";")[0]) for line in requires(described["lib_name"])]
    for line in described["requirements"].split():
        name, bounds = re.match(r"([\w-]+)(.*)", line).groups()
        assert any(w.startswith(name) and all(b in w for b in bounds.split(",")) for w in wanted), line


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("there", [True, False])
def test_make_installs_within_the_constraints_of_ci(there: bool, tmp_path: Path):
    "As long as the file lies there, `make` hands it to pip; what users of pip get, and what `doctor` admits, is settings.ini's range alone."
    for name in ("Makefile", "settings.ini", "setup.py", *([".ci/constraints.txt"] if there else [])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    planned = subprocess.run(["make", "-n", "demo", "VENV=new"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    line = next(line for line in planned.stdout.splitlines() if "pip install" in line)
    assert ("--constraint .ci/constraints.txt" in line) == there and line.endswith('-e ".[dev]"'), planned
    from llm_course.doctor import torch_wanted, within
    bounds = torch_wanted().removeprefix("torch")
    assert f"torch{bounds}" in settings()["requirements"].split("\n") and within("2.14.1", bounds) and not within("2.15.0", bounds)
    ours = re.search(r"^torch(.*)$", (ROOT / ".ci/constraints.txt").read_text(), re.M)[1]
    assert within("2.13.0", ours) and not within("2.14.1", ours), "the small build for processors is the newest there"


@pytest.mark.skipif(not installed(), reason="the package is not installed in this environment")
def test_every_entry_point_resolves():
    groups = ("console_scripts", "nbdev")
    ours = [point for group in groups for point in entry_points(group=group) if point.value.startswith("llm_course")]
    assert {point.name for point in ours} == {"llm-course", "llm_course"}
    for point in ours:
        assert point.load() is not None


def test_the_version_stands_in_the_package():
    assert importlib.import_module("llm_course").__version__ == settings()["version"]


def test_help_names_every_stage():
    answer = course("--help")
    assert answer.returncode == 0, answer.stderr
    assert {"tokenizer", "prepare", "train", "eval", "generate", "demo"} <= set(stages())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_by_name_and_by_path(path: Path):
    from llm_course.training import load_config
    assert load_config(path.stem) == load_config(path)


def test_the_configs_of_the_contract_are_there():
    assert {"tiny", "demo", "125m", "350m", "1.3b"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_on_the_page_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    said = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert said and said <= targets, said - targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_stages_and_flags_on_the_page_exist(page: Path):
    "Each `llm-course STAGE --flag` of a page is a stage that there is, with a flag that its --help names."
    for stage, *words in commands(page):
        answer = course(stage, "--help")
        assert answer.returncode == 0, f"{page.name} names the stage {stage!r}, and there is none"
        known = {plain(flag) for flag in re.findall(r"--[\w-]+", answer.stdout)}
        known |= config_fields() if stage in ("train", "demo", "plan") else set()
        said = {plain(word.split("=")[0]) for word in words if word.startswith("--")}
        assert said <= known, f"{page.name}: {stage} knows no {said - known}"


def plain(flag: str) -> str:
    "`--max-new-tokens` and `--max_new_tokens` are one flag."
    return flag.removeprefix("--").replace("-", "_")


def config_fields() -> set[str]:
    "Names of the config's fields, each of which is a flag of `train`, `plan` and `demo`."
    from dataclasses import fields
    from llm_course.gpt import ModelConfig
    from llm_course.training import TrainingConfig
    return {field.name for part in (ModelConfig, TrainingConfig) for field in fields(part)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_on_the_page_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_notebook_and_config_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *CONFIGS]:
        assert path.stem in readme, f"README.md does not say what {path.name} is"


def test_what_the_readme_promises_of_other_programs_is_tested():
    "Each row of the table of other programs names its tests; a row with a command of its own says when that passed, and with what."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| program \| what holds \| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", readme, re.M)[1].splitlines()
    passes = json.loads((ROOT / "tests" / "last_pass.json").read_text())
    for row in rows:
        program, _, tests = (cell.strip() for cell in row.strip("|").rsplit("|", 2))
        named = re.findall(r"`(test_\w+(?:\.py)?)`", tests)
        assert named, row
        for name in named:
            assert (ROOT / "tests" / name).exists() if name.endswith(".py") else defines(name), f"there is no {name}"
        if "make " in tests:
            last = passes[program]
            for word in (last["day"], *(f"{package} {number}" for package, number in last["versions"].items())):
                assert word in tests, f"{program}: tests/last_pass.json says {word}, and README.md does not"
    assert set(passes) == {row.split("|")[1].strip() for row in rows if "make " in row}


@pytest.mark.parametrize("head", ["fault | what is promised", "what | why"])
def test_what_the_readme_says_in_tables_is_tested(head: str):
    "Each row of the tables of faults and of differences names its tests."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(rf"^\| {re.escape(head)} \| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", readme, re.M)[1].splitlines()
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.strip("|").rsplit("|", 1)[1])
        assert named and all(map(defines, named)), row


def defines(test: str) -> bool:
    return any(f"def {test}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))


def test_parameter_counts_in_the_readme_are_right():
    "The table of configs names the parameters of each as the formula counts them."
    from llm_course.training import load_config
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    said = {name: re.search(r"([\d,]{7,})", row)[1].replace(",", "") for name, row in rows if name in {p.stem for p in CONFIGS}}
    assert set(said) == {path.stem for path in CONFIGS}
    assert {name: int(count) for name, count in said.items()} == {name: load_config(name).model.n_params for name in said}
