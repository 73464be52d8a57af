"""How fast a model of 125M parameters learns with AdamW, and with Muon for the matrices of its blocks. For a GPU.

    python benchmarks/muon.py [--steps 600] [--shards FOLDER]

Each row trains the config `125m` for as many steps of 16 × 2048 tokens, in a process of its own: bf16, compiled, the schedule of the
config with a tenth of the steps to warm up. The text is Python: the modules of the standard library and of all that is installed beside
it, in the order of their hashes, 70 MB of them, each a document; one in a hundred is for validation. `--shards` takes a folder that is
prepared, or prepares it; with `--steps 0` that is all. A step's time is the median of all. Results go to benchmarks/muon.json or, of a
GPU, muon.gpu.json; the table is printed."""

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from common import in_order_of_hashes, in_process, middle, write_results

SIZE, VOCABULARY = 70_000_000, 16_384  # characters of text, pieces of the vocabulary
ROWS = {  # what is changed in the config
    "AdamW, 0.0012": {"lr": 1.2e-3, "muon_lr_scale": 0.0},
    "AdamW, 0.0024": {"lr": 2.4e-3, "muon_lr_scale": 0.0},
    "Muon, 0.02, AdamW, 0.0012": {"lr": 1.2e-3, "muon_lr_scale": 0.02 / 1.2e-3},
}


def modules(size: int) -> list[str]:
    """So many characters of Python, each module a text."""
    paths = {
        path
        for name in ("stdlib", "purelib", "platlib")
        for path in Path(sysconfig.get_paths()[name]).rglob("*.py")
    }
    texts, chosen, total = set(), [], 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 500 < len(text) < 200_000:
            texts.add(text)
    for text in in_order_of_hashes(texts):
        if total > size:
            break
        chosen.append(text)
        total += len(text)
    return chosen


def prepare(folder: Path) -> None:
    """Tokenizer and shards."""
    from llm_course.config import load_config
    from llm_course.shards import write_shards
    from llm_course.tokenizer import train_tokenizer

    texts = modules(SIZE)
    val, train = texts[::100], [text for number, text in enumerate(texts) if number % 100]
    tokenizer = train_tokenizer(train[: len(train) // 10], VOCABULARY)
    write_shards(
        train, tokenizer, folder, val_documents=val, seq_len=load_config("125m").model.seq_len
    )


def run_row(row: str, shards: Path, steps: int, config: str) -> dict:
    """Train one row here, in this process: the seconds of the steps, and losses by the number of steps done."""
    import torch

    from llm_course.config import load_config
    from llm_course.device import pick_device
    from llm_course.pipeline import start_run
    from llm_course.training import validate

    changes = {
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "micro_batch_size": 0,
        "checkpoint_activations": False,
        "compile": True,
    }
    device = pick_device()
    start = start_run(
        load_config(config, {**changes, **ROWS[row]}), shards, device, log=lambda text: None
    )
    run, state = start.trainer, start.trainer.state
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds, losses = [], {}
    while state.step < steps:
        begun = time.perf_counter()
        run.step()
        wait()
        seconds.append(time.perf_counter() - begun)
        if state.step % max(1, steps // 20) == 0:
            run.model.eval()
            losses[state.step] = validate(
                run.model,
                start.val_data,
                run.config.eval_sequences,
                batch_size=run.micro_batch_size,
                dtype=run.dtype,
            )
            run.model.train()
    return {
        "seconds": middle(seconds),
        "first": seconds[0],
        "losses": losses,
        "tokens": run.config.batch_size * run.model.config.seq_len,
    }


def table(results: dict) -> str:
    """Losses at the end, and when a row came below the best that AdamW came to."""
    best = min(
        row["losses"][str(results["steps"])]
        for name, row in results["rows"].items()
        if name.startswith("AdamW")
    )
    lines = [
        f"| {results['steps']} steps of {results['tokens_per_step']:,} tokens | milliseconds a step | nats a token at the end |"
        f" steps to {best:.3f} | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in results["rows"].items():
        reached = next((int(step) for step, loss in row["losses"].items() if loss <= best), None)
        when = (f"{reached:,}", f"{reached * row['seconds']:.1f}") if reached else ("never", "")
        lines.append(
            f"| {name} | {1000 * row['seconds']:.1f} | {row['losses'][str(results['steps'])]:.3f} | {when[0]} | {when[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--config", default="125m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(run_row(args.row, args.shards, args.steps, args.config)))
    with tempfile.TemporaryDirectory() as beside:
        shards = args.shards or Path(beside)
        if not (shards / "manifest.json").exists():
            prepare(shards)
        if not args.steps:
            return
        rows = {}
        for row in args.rows:
            rows[row] = in_process(
                __file__,
                "--row",
                row,
                "--shards",
                shards,
                "--steps",
                args.steps,
                "--config",
                args.config,
            )
            print(row, rows[row], file=sys.stderr, flush=True)
        manifest = sha256((shards / "manifest.json").read_bytes()).hexdigest()
    results = {
        "steps": args.steps,
        "tokens_per_step": rows[args.rows[0]]["tokens"],
        "shards": manifest,
        "rows": rows,
    }
    write_results(__file__, results)
    print(table(results))


if __name__ == "__main__":
    main()
