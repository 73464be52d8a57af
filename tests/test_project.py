"""The project as a whole: one description, entry points that resolve, configs that load, and a README that cannot drift."""

import ast
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

CONFIGS = sorted((ROOT / "llm_course" / "configs").glob("*.json"))
TOP = set(
    """settings.ini setup.py pyproject.toml requirements.txt Makefile LICENSE README.md CHANGELOG.md CONTRIBUTING.md .gitignore .gitattributes .ci .github
             nbs llm_course tests data artifacts docs benchmarks""".split()
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def course(*arguments: str) -> subprocess.CompletedProcess:
    "Run the command line in a process of its own."
    command = [sys.executable, "-m", "llm_course", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE
    )


def blocks(page: Path) -> list[str]:
    "The lines of a page's code blocks, continued lines joined, comments left out."
    found = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    return [
        line.split("  #")[0].strip()
        for line in lines
        if line.strip() and not line.strip().startswith("#")
    ]


def commands(page: Path) -> list[list[str]]:
    "Every `llm-course …` of a page as its words, whatever stands before it (torchrun, a folder of scripts)."
    lines = [
        re.sub(r"^.*(llm-course|-m llm_course)\s", "", line)
        for line in blocks(page)
        if re.search(r"llm-course\s|-m llm_course\s", line)
    ]
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
        assert (
            runpy.run_path(str(path.with_name(path.name.split(".")[0] + ".py")))["table"](
                json.loads(path.read_text())["results"]
            )
            in page
        )


def test_whatever_is_compiled_is_compiled_anywhere():
    "Only `compile_anywhere`, which quotes torch's folder for the linker, calls torch.compile: no benchmark dies where that has a space."
    calls = {}
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "llm_course").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for function in ast.walk(ast.parse(text)) if "torch.compile" in text else ():
            if isinstance(function, ast.FunctionDef):
                found = [
                    node
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile"
                ]
                calls |= {f"{path.stem}.{function.name}": found} if found else {}
    assert set(calls) == {"kernels.compile_anywhere"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a link to torch needs rights there")
def test_a_benchmark_compiles_its_peers_where_torch_has_a_space(tmp_path: Path):
    "A row of benchmarks/throughput.py, small, with torch in a folder whose name has a space."
    import torch

    pytest.importorskip("transformers")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "torch").symlink_to(Path(torch.__file__).parent)
    code = """if 1:
        import torch, throughput
        assert " " in torch.__file__
        model, step = throughput.theirs("llama", 1, 8, 64, 1, 16, 1, 32, True)
        ids = torch.randint(64, (1, 9))
        print(step(ids[:, :-1], ids[:, 1:]))"""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [tmp_path / "a folder", ROOT, ROOT / "benchmarks"])),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=4 * PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 3 < float(done.stdout.split()[-1]) < 6


def test_settings_ini_is_the_only_description():
    "setup.py and pyproject.toml repeat no version, no name and no requirement."
    text = (ROOT / "setup.py").read_text(encoding="utf-8") + (ROOT / "pyproject.toml").read_text(
        encoding="utf-8"
    )
    assert "settings.ini" in text and settings()["version"] not in text
    for line in "\n".join(
        value for key, value in settings().items() if key.endswith("requirements")
    ).split("\n"):
        assert not line or line not in text


@pytest.mark.skipif(not installed(), reason="the package is not installed in this environment")
def test_the_installed_package_is_what_settings_ini_says():
    fields, described = metadata(settings()["lib_name"]), settings()
    assert (fields["Version"], fields["Summary"]) == (
        described["version"],
        described["description"],
    )
    wanted = [
        re.sub(r"[\s'\"]", "", line.split(";")[0]) for line in requires(described["lib_name"])
    ]
    for line in described["requirements"].split():
        name, bounds = re.match(r"([\w-]+)(.*)", line).groups()
        assert any(w.startswith(name) and all(b in w for b in bounds.split(",")) for w in wanted), (
            line
        )


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("there", [True, False])
def test_make_installs_within_the_constraints_of_ci(there: bool, tmp_path: Path):
    "As long as the file lies there, `make` hands it to pip; what users of pip get, and what `doctor` admits, is settings.ini's range alone."
    for name in (
        "Makefile",
        "settings.ini",
        "setup.py",
        *([".ci/constraints.txt"] if there else []),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    planned = subprocess.run(
        ["make", "-n", "demo", "VENV=new"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    line = next(line for line in planned.stdout.splitlines() if "pip install" in line)
    assert ("--constraint .ci/constraints.txt" in line) == there and line.endswith('-e ".[dev]"'), (
        planned
    )
    from packaging.specifiers import SpecifierSet

    from llm_course.numerics import torch_wanted

    bounds = torch_wanted().removeprefix("torch")
    assert (
        f"torch{bounds}" in settings()["requirements"].split("\n")
        and "2.14.1" in SpecifierSet(bounds)
        and "2.15.0" not in SpecifierSet(bounds)
    )
    ours = re.search(r"^torch(.*)$", (ROOT / ".ci/constraints.txt").read_text(), re.M)[1]
    assert "2.13.0" in SpecifierSet(ours) and "2.14.1" not in SpecifierSet(ours), (
        "the small build for processors is the newest there"
    )


@pytest.mark.skipif(not installed(), reason="the package is not installed in this environment")
def test_every_entry_point_resolves():
    groups = ("console_scripts", "nbdev")
    ours = [
        point
        for group in groups
        for point in entry_points(group=group)
        if point.value.startswith("llm_course")
    ]
    assert {point.name for point in ours} == {"llm-course", "llm_course"}
    for point in ours:
        assert point.load() is not None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    "The files of the project that pip reads, in a folder with a space in its name: what it builds there is no matter of ours."
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in (
        "requirements.txt",
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "llm_course", folder / "llm_course", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


OFFLINE = ["--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]


def test_requirements_txt_installs_the_course(checkout: Path):
    "pip would take it, for the package of this folder as it is, with the extra of the notebooks; and it describes nothing twice."
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert lines == ["-e .[course]"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *OFFLINE,
        "--dry-run",
        "--quiet",
        "--report",
        "-",
        "-r",
        "requirements.txt",
    ]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["install"]
    assert (found["metadata"]["name"], found["metadata"]["version"]) == (
        settings()["lib_name"],
        settings()["version"],
    )
    assert found["requested_extras"] == ["course"] and found["download_info"]["dir_info"] == {
        "editable": True
    }
    wanted = {
        re.match(r"[\w-]+", line)[0].lower()
        for line in found["metadata"]["requires_dist"]
        if "extra" not in line or '"course"' in line
    }
    for key in ("requirements", "course_requirements"):
        assert {re.match(r"[\w-]+", line)[0].lower() for line in settings()[key].split()} <= wanted


@pytest.mark.slow
def test_a_new_environment_has_the_command(checkout: Path):
    "After `pip install -r requirements.txt` in it; the packages that it needs are lent by this one."
    venv.create(checkout / ".venv", with_pip=True)
    bin = checkout / ".venv" / ("Scripts" if sys.platform == "win32" else "bin")
    (packages := checkout / "lent").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "llm_course" not in path.name:
            (packages / path.name).symlink_to(path)
    lent = {**os.environ, "PYTHONPATH": str(packages)}
    for command in (
        ["python", "-m", "pip", "install", *OFFLINE, "-r", "requirements.txt"],
        ["llm-course", "--version"],
    ):
        done = subprocess.run(
            [bin / command[0], *command[1:]],
            cwd=checkout,
            env=lent,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert settings()["version"] in done.stdout
    where = subprocess.run(
        [bin / "python", "-c", "import llm_course; print(llm_course.__file__)"],
        cwd=checkout.parent,
        env=lent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert Path(where.stdout.strip()).is_relative_to(checkout)


def test_the_readme_installs_with_requirements_txt():
    "Its commands without make do, and so does the workflow that tries them on Windows and macOS."
    plain = [
        line
        for line in blocks(ROOT / "README.md")
        if "pip install" in line and "torch" not in line and "lm-eval" not in line
    ]
    plain = [line for line in plain if "datatrove" not in line]
    assert len(plain) >= 3 and all(
        re.search(r"pip install -r requirements\.txt$", line.split(" && ")[-1]) for line in plain
    ), plain
    assert "pip install -r requirements.txt" in (
        ROOT / ".github" / "workflows" / "ci.yml"
    ).read_text(encoding="utf-8")


def test_the_version_stands_in_the_package():
    assert importlib.import_module("llm_course").__version__ == settings()["version"]


def test_help_names_every_stage():
    answer = course("--help")
    assert answer.returncode == 0, answer.stderr
    assert {"tokenizer", "prepare", "train", "eval", "generate", "demo"} <= set(stages())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_by_name_and_by_path(path: Path):
    from llm_course.config import load_config

    assert load_config(path.stem) == load_config(path)


def test_the_configs_of_the_contract_are_there():
    assert {"tiny", "demo", "125m", "350m", "1.3b"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_on_the_page_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    said = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert said and said <= targets, said - targets


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


@pytest.fixture
def lessons(tmp_path: Path) -> Path:
    "A checkout with two notebooks, whose environment is ready."
    for name in (
        "nbs/index.ipynb",
        "nbs/13_corpus.ipynb",
        "settings.ini",
        "setup.py",
        ".venv/ready",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} as it is given")
    return tmp_path


def make(folder: Path, *words: str, **env: str) -> str:
    "What `make WORDS` prints with this project's Makefile in a folder."
    done = subprocess.run(
        ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), *words],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, **env},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_make
def test_make_mine_keeps_what_a_learner_wrote(lessons: Path):
    "It copies what is not there, says what has a newer version, and git does not see any of it."
    assert "make lab COURSE=mine" in make(lessons, "mine")
    mine = lessons / "mine"
    assert (mine / "index.ipynb").read_text() == "nbs/index.ipynb as it is given"
    (mine / "index.ipynb").write_text("my answer")
    (mine / "mine too.ipynb").write_text("my own page")
    (mine / "13_corpus.ipynb").unlink()
    (lessons / "nbs" / "15_tokenizer.ipynb").write_text("a new lesson")
    assert "newer" not in make(lessons, "mine")
    (lessons / "nbs" / "index.ipynb").write_text("the next version")
    told = make(lessons, "mine")
    assert [line.split()[0] for line in told.splitlines() if "newer version" in line] == [
        "mine/index.ipynb"
    ]
    found = {path.name: path.read_text() for path in mine.glob("*.ipynb")}
    assert found == {
        "index.ipynb": "my answer",
        "mine too.ipynb": "my own page",
        "15_tokenizer.ipynb": "a new lesson",
        "13_corpus.ipynb": "nbs/13_corpus.ipynb as it is given",
    }
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "-q", "mine/index.ipynb"], cwd=ROOT
    )
    assert ignored.returncode in (0, 128)  # 128: no git checkout


@needs_make
@pytest.mark.parametrize("uid, allowed", [("0", True), ("1000", False)])
def test_make_lab_works_as_root(lessons: Path, uid: str, allowed: bool):
    "As one is in containers, with the flag that JupyterLab asks for; nobody else gets it. It opens the copy that is asked for."
    (lessons / "bin").mkdir()
    (lessons / "bin" / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (lessons / "bin" / "id").chmod(0o755)
    make(lessons, "mine")
    for words, page in ((), "nbs/index.ipynb"), (("COURSE=mine",), "mine/index.ipynb"):
        told = make(
            lessons, "-n", "lab", *words, PATH=f"{lessons / 'bin'}{os.pathsep}{os.environ['PATH']}"
        )
        line = next(line for line in told.splitlines() if "jupyter" in line)
        assert ("--allow-root" in shlex.split(line)) == allowed and line.endswith(
            f'/lab/tree/{page}"'
        )


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

    from llm_course.config import ModelConfig, TrainingConfig

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
    rows = re.search(
        r"^\| program \| what holds \| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", readme, re.M
    )[1].splitlines()
    passes = json.loads((ROOT / "tests" / "last_pass.json").read_text())
    for row in rows:
        program, _, tests = (cell.strip() for cell in row.strip("|").rsplit("|", 2))
        named = re.findall(r"`(test_\w+(?:\.py)?)`", tests)
        assert named, row
        for name in named:
            assert (ROOT / "tests" / name).exists() if name.endswith(".py") else defines(name), (
                f"there is no {name}"
            )
        if "make " in tests:
            last = passes[program]
            for word in (
                last["day"],
                *(f"{package} {number}" for package, number in last["versions"].items()),
            ):
                assert word in tests, (
                    f"{program}: tests/last_pass.json says {word}, and README.md does not"
                )
    assert set(passes) == {row.split("|")[1].strip() for row in rows if "make " in row}


@pytest.mark.parametrize("head", ["fault | what is promised", "what | why"])
def test_what_the_readme_says_in_tables_is_tested(head: str):
    "Each row of the tables of faults and of differences names its tests."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(rf"^\| {re.escape(head)} \| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", readme, re.M)[
        1
    ].splitlines()
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.strip("|").rsplit("|", 1)[1])
        assert named and all(map(defines, named)), row


def defines(test: str) -> bool:
    return any(
        f"def {test}(" in path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").glob("test_*.py")
    )


def test_parameter_counts_in_the_readme_are_right():
    "The table of configs names the parameters of each as the formula counts them."
    from llm_course.config import load_config

    rows = re.findall(
        r"^\| `([\w.]+)` \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    said = {
        name: re.search(r"([\d,]{7,})", row)[1].replace(",", "")
        for name, row in rows
        if name in {p.stem for p in CONFIGS}
    }
    assert set(said) == {path.stem for path in CONFIGS}
    assert {name: int(count) for name, count in said.items()} == {
        name: load_config(name).model.n_params for name in said
    }


def too_many_pieces() -> None:
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a short text"]),
        model_writer=io.BytesIO(),
        vocab_size=32_000,
        minloglevel=2,
    )


def mask_of_another_shape() -> None:
    import torch

    torch.zeros(1, 2, 5, 5) + torch.zeros(6, 6)


def wrong_split_of_qkv() -> None:
    import torch

    torch.zeros(2, 6, 9).view(2, 6, 3, 2, 4)


def wrong_permute_of_qkv() -> None:
    import torch

    torch.zeros(2, 6, 3, 4).permute(0, 2, 1, 3).view(2, 6, 12)


def missing_folder() -> None:
    open("no/such/folder/model.bin", "wb")


@pytest.mark.parametrize(
    "fault, words",
    [
        (None, "Vocabulary size is too high"),
        (too_many_pieces, "Vocabulary size too high (…). Please set it to a value <= …"),
        (mask_of_another_shape, "The size of tensor a (…) must match the size of tensor b (…)"),
        (wrong_split_of_qkv, "shape '[…]' is invalid for input of size …"),
        (wrong_permute_of_qkv, "view size is not compatible with input tensor's size and stride"),
        (missing_folder, "No such file or directory"),
        (None, "CUDA out of memory. Tried to allocate …"),
        (None, "The loss is NaN (`nan`)"),
        (None, "wrong permute"),
        (None, "qkv"),
        (None, "broadcasts"),
        (None, "output folder that does not exist"),
        (None, "a mask of the wrong shape"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_search_for_a_symptom_finds_the_page(fault, words):
    "The words that people meet elsewhere stand in the README's list of what goes wrong, as the programs print them."
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert words in " ".join(
        page.split("## When something goes wrong")[1].split("## Contributing")[0].split()
    )
    if fault:
        with pytest.raises((RuntimeError, OSError)) as raised:
            fault()
        assert re.search(
            "[^…]+".join(map(re.escape, words.rstrip("…").split("…"))), str(raised.value)
        ), raised.value


@pytest.mark.parametrize(
    "words, module, function",
    [
        ("FlashAttention", "attention", "causal_attention"),
        ("Flash-Attn", "attention", "causal_attention"),
        ("scaled_dot_product_attention", "attention", "causal_attention"),
        ("sdpa_kernel", "attention", "causal_attention"),
        ("FSDP", "distributed", "DDP"),
        ("fully_shard", "distributed", "DDP"),
        ("DeepSpeed", "training", "train_step"),
        ("data pipeline", "training", "Trainer"),
    ],
)
def test_where_to_plug_in_what_others_wrote(words, module, function):
    "README.md names it with its place, and the comment stands there."
    page = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .split("## Scaling")[1]
        .split("## Other programs")[0]
    )
    assert words in page and f"`{function}`" in page
    source = inspect.getsource(getattr(importlib.import_module(f"llm_course.{module}"), function))
    assert words in " ".join(re.findall(r"# (.*)", source)), source


def test_the_profiler_names_the_kernel_of_attention():
    "As the comment on attention says that it does."
    import torch
    from torch.profiler import profile

    from llm_course.attention import causal_attention

    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with profile() as seen:
        causal_attention(q, k, k)
    assert any("scaled_dot_product_flash_attention" in event.key for event in seen.key_averages())
    assert {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"} <= set(
        torch.nn.attention.SDPBackend.__members__
    )
