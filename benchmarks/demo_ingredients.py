"""What each ingredient of the demo's recipe brings: trained without it, on the same tales, for the same number of steps.

    python benchmarks/demo_ingredients.py [--steps 300] [--seeds 1] [--threads 2]

Every row is a process of its own; seeds go round and round, so that a slow minute of the machine hits all rows alike.
Results, with the machine and the versions, go to benchmarks/demo_ingredients.json; the table is printed."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import in_process, middle, write_results

ROWS = {  # what is left out: the settings that leave it out
    "nothing": {},
    "Muon (AdamW for all)": {"muon_lr_scale": 0.0},
    "mimetic_init": {"mimetic_init": 0.0},
    "Muon and mimetic_init": {"muon_lr_scale": 0.0, "mimetic_init": 0.0},
    "sequences that begin with a tale": {"document_aligned": False},
    "sequences that end with a tale": {"filled": True},
    "the table's own rate": {"embedding_lr_scale": 1.0},
    "memory that is kept": {"keep_memory": False},
}


def trained(
    steps: int, seed: int, threads: int, shards: Path, settings: dict[str, object]
) -> tuple[object, list[dict]]:
    """The demo's model after so many steps here, in this process, with other settings; and the log of its training."""
    import torch

    from llm_course.checkpoint import load_checkpoint
    from llm_course.config import load_config
    from llm_course.pipeline import train
    from llm_course.runs import read_log

    torch.set_num_threads(threads)
    config = load_config(
        "demo",
        {
            "max_minutes": 0.0,
            "max_steps": steps,
            "seed": seed,
            "sample_every": 0,
            "save_every": 0,
            "eval_every": 0,
            **settings,
        },
    )
    with tempfile.TemporaryDirectory() as out:
        train(config, shards, out, device="cpu", progress=False, log=lambda text: None)
        return load_checkpoint(out), read_log(out)


def run_row(row: str, steps: int, seed: int, threads: int, shards: Path, val: Path) -> dict:
    """Train one row here, in this process: bits above the entropy for each tale, and tokens per second."""
    from llm_course import evaluation, pipeline
    from llm_course.corpus import Corpus

    settings = dict(ROWS[row])
    if not settings.pop("keep_memory", True):
        pipeline.keep_memory = lambda: None
    if settings.pop("filled", False):
        pipeline.TokenDataset = filled_shards()
    checkpoint, log = trained(steps, seed, threads, shards, {"log_every": 5, **settings})
    speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    tales = list(Corpus(val, "line"))[:100]
    found = evaluation.evaluate(checkpoint.model, checkpoint.tokenizer, tales)
    return {
        "row": row,
        "seed": seed,
        "excess_bits_per_tale": (found.bits - found.entropy_bits) / len(tales),
        "gap": found.gap,
        "tokens_per_second": middle(speeds),
    }


def filled_shards() -> type:
    """Shards whose aligned sequences are filled with the beginning of the next tale, which comes again whole in the next sequence."""
    from llm_course.shards import TokenDataset

    class Filled(TokenDataset):
        def __getitem__(self, i: int):
            return self.read(self._cuts[i], self._cuts[i] + 1 + self.lengths([i])[0])

        def lengths(self, rows):
            return (self.tokens - 1 - self._cuts[rows]).clip(max=self.seq_len)

    return Filled


def prepare(root: Path, stories: int = 10_000) -> None:
    """Tales, tokenizer and shards of the demo, once for all rows."""
    from llm_course.config import load_config
    from llm_course.corpus import Corpus, write_tales_corpus
    from llm_course.shards import write_shards
    from llm_course.tokenizer import train_tokenizer

    model = load_config("demo").model
    corpus, val = write_tales_corpus(root, stories, 500)
    tokenizer = train_tokenizer(Corpus(corpus, "line"), model.vocab_size)
    write_shards(
        Corpus(corpus, "line"),
        tokenizer,
        root / "shards",
        val_documents=Corpus(val, "line"),
        seq_len=model.seq_len,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("steps", 300), ("seeds", 1), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(
            json.dumps(
                run_row(
                    args.row,
                    args.steps,
                    args.seed,
                    args.threads,
                    args.root / "shards",
                    args.root / "val.txt",
                )
            )
        )
    with tempfile.TemporaryDirectory() as root:
        prepare(Path(root))
        results = []
        for seed in range(args.seeds):
            for row in ROWS:
                results.append(
                    in_process(
                        __file__,
                        "--row",
                        row,
                        "--seed",
                        seed,
                        "--root",
                        root,
                        "--steps",
                        args.steps,
                        "--threads",
                        args.threads,
                    )
                )
                print(
                    f"{row:24} seed {seed}: {results[-1]['excess_bits_per_tale']:6.1f} bits above the entropy",
                    file=sys.stderr,
                )
    write_results(__file__, results)
    print(table(results))


def table(results: list[dict]) -> str:
    """The results as a table in Markdown: the median of each row's seeds."""
    lines = [
        "| left out | bits per tale above the entropy | gap | tokens per second |",
        "|---|---:|---:|---:|",
    ]
    for row in ROWS:
        mine = [result for result in results if result["row"] == row]
        bits, gap, speed = (
            middle(r[key] for r in mine)
            for key in ("excess_bits_per_tale", "gap", "tokens_per_second")
        )
        lines.append(f"| {row} | {bits:.1f} | {gap:.1%} | {speed:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
