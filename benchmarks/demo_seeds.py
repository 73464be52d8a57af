"""How far the demo's runs differ: the same steps from one seed after another, and which words of a tale's beginning each finds again.

    python benchmarks/demo_seeds.py [--seeds 0 1 2 3 4 5 6 7] [--steps 2600] [--at_once 1] [--set name=value ...]

Every seed is a process of its own, with its share of the threads. Results, with the machine and the versions, go to
benchmarks/demo_seeds.json, which keeps what it has of other seeds; the table is printed. To try something else, --set changes fields of
the config: what comes out, as with other --steps, is printed alone."""

import argparse
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import in_process, read_results, write_results
from demo_ingredients import prepare, trained

from llm_course.demo import STORIES, own_stories

STEPS = 2600  # a little less than five minutes allow on two processors with AVX512-BF16
LOOKUPS = {  # what a tale tells early and needs late: what stands before the words that depend on it, and those words
    "what somebody is": (
        r"(?<=clapped his |clapped her )",
        ["hands", "paws", "wings", "feet"],
    ),  # a boy has hands, a rabbit paws
    "the time of day": (
        r"\b",
        ["by noon", "by sunset", "before nightfall"],
    ),  # what begins in the morning is done by noon
}


def run_seed(seed: int, steps: int, threads: int, settings: dict[str, str], root: Path) -> dict:
    """Train from one seed here, in this process; grade the model by held-out tales, its own stories, and each lookup."""
    from llm_course.corpus import Corpus
    from llm_course.evaluation import evaluate
    from llm_course.grading import grade
    from llm_course.tales import sample_tales

    checkpoint, _ = trained(steps, seed, threads, root / "shards", settings)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    gap = evaluate(model, tokenizer, list(Corpus(root / "val.txt", "line"))).gap
    tales = sample_tales(seed=1_000_003, n=400)
    return {
        "seed": seed,
        "gap": gap,
        "right": grade(own_stories(checkpoint)).valid,
        "sure": {name: sure(model, tokenizer, tales, *lookup) for name, lookup in LOOKUPS.items()},
    }


def sure(
    model: object, tokenizer: object, tales: list[str], before: str, words: list[str]
) -> float:
    """In what share of the places where one of `words` comes the model gives it more than two thirds of what all of them get.

    The demo drops what has less than half of the best one's probability: then the right one is left alone."""
    import torch

    from llm_course.grading import loss_table

    found = []
    for tale in tales:
        for place in re.finditer(f"{before}({'|'.join(words)})\\b", tale):
            texts = [tale[: place.start()] + word for word in words]
            nats = [
                row[: len(tokenizer.encode(text))].sum()
                for row, text in zip(loss_table(model, tokenizer, texts), texts)
            ]
            shares = torch.stack(nats).neg().softmax(0)
            found.append(shares[words.index(place.group())].item() > 2 / 3)
    return sum(found) / len(found)


def table(results: list[dict]) -> str:
    """The results as a table in Markdown: a row for each seed."""
    lines = [
        f"| seed | gap | of {STORIES} stories, right | "
        + " | ".join(f"sure: {name}" for name in LOOKUPS)
        + " |",
        "|---|---:|---:|" + "---:|" * len(LOOKUPS),
    ]
    for result in results:
        cells = [result["gap"], result["right"], *(result["sure"][name] for name in LOOKUPS)]
        lines.append(f"| {result['seed']} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=range(8))
    for name, default in (("steps", STEPS), ("at_once", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="name=value", help="fields of the config"
    )
    for name, kind in (("seed", int), ("threads", int), ("root", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.root:
        settings = dict(word.split("=", 1) for word in args.set)
        return print(json.dumps(run_seed(args.seed, args.steps, args.threads, settings, args.root)))
    threads = max(1, (os.cpu_count() or 1) // args.at_once)
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.at_once) as at_once:
        prepare(Path(root), 30_000)

        def row(seed: int) -> dict:
            words = (
                "--seed",
                seed,
                "--steps",
                args.steps,
                "--threads",
                threads,
                "--root",
                root,
                "--set",
                *args.set,
            )
            result = in_process(__file__, *words, OMP_NUM_THREADS=str(threads))
            print(result, file=sys.stderr, flush=True)
            return result

        results = list(at_once.map(row, args.seeds))
    if not args.set and args.steps == STEPS:
        found = {result["seed"]: result for result in [*read_results(__file__, []), *results]}
        results = [found[seed] for seed in sorted(found)]
        write_results(__file__, results)
    print(table(results))


if __name__ == "__main__":
    main()
