"""How much code runs when the plain model computes a loss, trains for two steps, and generates? python tests/plain_size.py [--list]

One plain CPU run of each is traced. Counted are the lines of every project function that is entered, without blank lines, comments and
docstrings; and these functions. Left out: decorators (shape checks), the config's own checks, and, of training and generation,
the model, which is counted by itself. Building the model and reading batches from shards have lines of their own, without a limit.
Status 1 where a figure is above its limit.
"""

import ast
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llm_course"
sys.path.insert(0, str(ROOT))
ASIDE = ("shapes", "config", "files")
MODEL, DATA = ("gpt", "attention"), ("packing", "shards")
LIMITS = {  # lines and definitions, and what nanoGPT has (commit 3adf61e; its training is one script)
    "forward and loss": (200, 15, "117 in 8"),
    "a training step with its loop": (190, 16, "232 in one script"),
    "generate": (150, 10, "13 in 1"),
}
NO_LIMIT = (10**9, 10**9, "")


def entered(run: Callable[[], object]) -> set[CodeType]:
    "The code of every function of the package that is called while `run` runs."
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).parent == PACKAGE:
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


@cache
def functions(path: Path) -> list[tuple[set[int], str, set[int]]]:
    "Of each function in a module: where its code object may say that it begins, its name, and its own lines that count."
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        own = set(range(node.lineno, node.end_lineno + 1))
        for inner in ast.walk(node):
            if (
                isinstance(inner, ast.FunctionDef | ast.ClassDef)
                and ast.get_docstring(inner) is not None
            ):
                own -= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
        own = {n for n in own if lines[n - 1].strip() and not lines[n - 1].strip().startswith("#")}
        found.append(({node.lineno, *(d.lineno for d in node.decorator_list)}, node.name, own))
    return found


def count(run: Callable[[], object], aside: tuple[str, ...]) -> dict[str, int]:
    "The functions that `run` enters, by module and name, and how many lines each adds."
    counted: dict[Path, set[int]] = {}
    result = {}
    for code in sorted(entered(run), key=lambda code: (code.co_filename, code.co_firstlineno)):
        path = Path(code.co_filename)
        match = [
            (name, own)
            for starts, name, own in functions(path)
            if code.co_firstlineno in starts and name == code.co_name
        ]
        if (
            path.stem in aside or not match
        ):  # a lambda or a comprehension is counted with the function around it
            continue
        name, own = match[0]
        new = own - counted.setdefault(path, set())
        counted[path] |= own
        result[f"{path.stem}.{code.co_qualname}"] = len(new)
    return result


def runs(folder: Path) -> dict[str, tuple[Callable[[], object], tuple[str, ...]]]:
    "The three runs, and the modules that each leaves aside."
    import torch

    from llm_course.config import load_config
    from llm_course.generation import generate
    from llm_course.gpt import GPT
    from llm_course.shards import TokenDataset, write_shards
    from llm_course.tales import sample_tales
    from llm_course.tokenizer import train_tokenizer
    from llm_course.training import fit

    tales = sample_tales(0, 100)
    tokenizer = train_tokenizer(tales, 400)
    config = load_config(
        "tiny",
        {
            "vocab_size": tokenizer.vocab_size,
            "seq_len": 64,
            "max_steps": 2,
            "log_every": 1,
            "precision": "fp32",
        },
    )
    write_shards(tales, tokenizer, folder / "shards", val_documents=sample_tales(1, 10), seq_len=64)
    data = TokenDataset(folder / "shards")
    torch.manual_seed(0)
    model, ids = GPT(config.model), torch.randint(0, tokenizer.vocab_size, (2, 65))
    everything = ("training", "optim", "device", *MODEL, *ASIDE)
    return {
        "building the model": (lambda: GPT(config.model), ASIDE),
        "forward and loss": (lambda: model(ids[:, :-1], ids[:, 1:]), ASIDE),
        "reading batches": (lambda: fit(model, data, config.training), everything),
        "a training step with its loop": (
            lambda: fit(model, data, config.training),
            ASIDE + MODEL + DATA,
        ),
        "generate": (
            lambda: generate(model, ids[0, :5].tolist(), 10, temperature=0.8, top_k=20, seed=0),
            ASIDE + MODEL,
        ),
    }


def main() -> None:
    too_many = False
    with tempfile.TemporaryDirectory() as folder:
        for name, (run, aside) in runs(Path(folder)).items():
            found = count(run, aside)
            lines, definitions, (most_lines, most_definitions, theirs) = (
                sum(found.values()),
                len(found),
                LIMITS.get(name, NO_LIMIT),
            )
            too_many |= lines > most_lines or definitions > most_definitions
            limit = (
                f" (at most {most_lines} in {most_definitions}; nanoGPT: {theirs})"
                if theirs
                else ""
            )
            print(f"{name}: {lines} lines in {definitions} definitions{limit}")
            if "--list" in sys.argv:
                print(*(f"  {lines:4}  {where}" for where, lines in found.items()), sep="\n")
    sys.exit(too_many)


if __name__ == "__main__":
    main()
