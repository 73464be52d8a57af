"""Is this version as fast as an earlier one? Whole commands, in turns.

    python benchmarks/compare_speed.py COMMIT [--pairs 7]

The commit in a temporary git worktree and this working tree run the same commands on this machine, one right after the other, and the
order changes with every pair. Printed are, for each command, the median of each version's seconds, and the median over the pairs of
before / now: 1 is as fast, 0.95 takes five per cent longer. A command's start is part of it. Status 1 where a median is below 0.95.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import middle
from compare_versions import ROOT, Version

COMMANDS = {  # in this order: each works with what those before it have made
    "corpus": ["corpus", "--folder", "tales", "--stories", 10_000, "--force"],
    "tokenizer": [
        *("tokenizer", "--input", "tales/corpus.txt", "--model_prefix", "tok/tales"),
        *("--vocab_size", 2048, "--force"),
    ],
    "prepare": [
        *("prepare", "--input", "tales/corpus.txt", "--tok", "tok/tales.model", "--force"),
        *("--seq_len", 352, "--out_dir", "shards", "--val", "tales/val.txt", "--workers", 1),
    ],
    "train": [
        *("train", "--config", "lesson", "--max_steps", 20, "--precision", "fp32"),
        *("--data", "shards", "--out", "run", "--sample_every", 0),
    ],
    "train, AdamW, accumulation": [
        *("train", "--config", "lesson", "--max_steps", 10, "--precision", "fp32"),
        *("--muon_lr_scale", 0, "--micro_batch_size", 4),
        *("--data", "shards", "--out", "other", "--sample_every", 0),
    ],
    "eval": ["eval", "--ckpt", "run", "--input", "tales/val.txt", "--documents", "line"],
    "generate": [
        *("generate", "--ckpt", "run", "--prompt", "Once upon a time", "--seed", 0),
        *("--max_new_tokens", 330, "--n", 8),
    ],
    "help": ["--help"],
}


def seconds(version: Version, name: str) -> float:
    "How long a command takes."
    if name.startswith("train"):
        out = COMMANDS[name][COMMANDS[name].index("--out") + 1]
        subprocess.run(["rm", "-rf", version.work / out], check=True)
    begun = time.perf_counter()
    version.run(*COMMANDS[name])
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="the version before")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    took = {name: ([], []) for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        add = ["git", "worktree", "add", "--detach", str(code), args.commit]
        subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
        try:
            versions = [Version(code, Path(folder, "before"), old=True)]
            versions.append(Version(ROOT, Path(folder, "now"), old=False))
            for pair in range(args.pairs):
                for name in COMMANDS:
                    for which in (0, 1) if pair % 2 else (1, 0):
                        took[name][which].append(seconds(versions[which], name))
                print(f"pair {pair + 1} of {args.pairs}", file=sys.stderr, flush=True)
        finally:
            remove = ["git", "worktree", "remove", "--force", str(code)]
            subprocess.run(remove, cwd=ROOT, check=False)
    print("| command | before | now | before / now |\n|---|---:|---:|---:|")
    ratios = {}
    for name, (before, now) in took.items():
        ratios[name] = middle(one / other for one, other in zip(before, now))
        print(f"| {name} | {middle(before):.2f} s | {middle(now):.2f} s | {ratios[name]:.2f} |")
    sys.exit(min(ratios.values()) < 0.95)


if __name__ == "__main__":
    main()
