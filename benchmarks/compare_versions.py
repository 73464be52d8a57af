"""Does this version compute what an earlier one computed, bit for bit?

    python benchmarks/compare_versions.py COMMIT        # for example 19d36b7

Both versions run the same commands on this machine, each in a process of its own: the commit in a temporary git worktree, the other
in this working tree. Compared are the SHA-256 of tokenizers and shards of three corpora; of the weights after 60 steps of `tiny` and
20 of `lesson`, in fp32 and bf16, with and without Muon, gradient accumulation, activation checkpointing, and two processes; the 50
greedy tokens that four of these models write; and what they export. Ends with status 1 where anything differs.

A processor's instruction set decides the last bits of a sum, so hashes of two machines are not compared. RENAMED says which fields of
a config had another name before.
"""

import argparse
import hashlib
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RENAMED = {  # name today: name before
    "embedding_lr_scale": "table_lr",
    "muon_lr_scale": "muon_lr",
    "mimetic_init": "copying",
    "document_aligned": "align",
    "keep_checkpoints": "keep",
}
RUNS = {  # name: config, steps, flags, processes
    **{
        f"tiny {precision}{extra}": ("tiny", 60, ["--precision", precision, *flags], n)
        for precision in ("fp32", "bf16")
        for extra, flags, n in (
            ("", [], 1),
            (", Muon", ["--muon_lr_scale", "7"], 1),
            (", accumulation", ["--micro_batch_size", "3"], 1),
            (", activation checkpointing", ["--checkpoint_activations", "true"], 1),
            (
                ", Muon, aligned, accumulation",
                ["--muon_lr_scale", "7", "--document_aligned", "true", "--micro_batch_size", "3"],
                1,
            ),
            (", two processes", [], 2),
            (
                ", two processes, Muon, accumulation",
                ["--muon_lr_scale", "7", "--micro_batch_size", "2"],
                2,
            ),
        )
    },
    **{
        f"lesson {precision}{extra}": ("lesson", 20, ["--precision", precision, *flags], 1)
        for precision in ("fp32", "bf16")
        for extra, flags in (("", []), (", AdamW alone", ["--muon_lr_scale", "0"]))
    },
}
WRITERS = (
    "tiny fp32",
    "tiny bf16, Muon",
    "lesson fp32",
    "lesson bf16",
)  # their greedy tokens and exports are compared


def write_corpora(folder: Path) -> None:
    "A text of many scripts with blank lines between documents, and JSON lines; the tales are the program's own."
    pages = [page for _, page in sorted(pydoc_data.topics.topics.items())]
    scripts = [
        "Zürich, naïve, ½ ﬁne",
        "東京は夜の七時",
        "Москва слезам не верит",
        "القاهرة مدينة كبيرة",
        "🦊 met a 🐻",
    ]
    paragraphs = [p.strip("\n") for page in pages for p in page.split("\n\n") if p.strip()]
    mixed = [text for pair in zip(paragraphs, scripts * len(paragraphs)) for text in pair]
    (folder / "blank.txt").write_text("\n\n".join(mixed) + "\n", encoding="utf-8")
    (folder / "pages.jsonl").write_text(
        "".join(json.dumps({"text": page}) + "\n" for page in pages), encoding="utf-8"
    )


class Version:
    "One of the two: where its code is, and a folder to work in."

    def __init__(self, code: Path, work: Path, old: bool) -> None:
        self.code, self.work, self.old = code, work, old
        self.work.mkdir()
        write_corpora(self.work)

    def run(self, *args: object, processes: int = 1) -> str:
        "`llm-course ARGS` of this version: its standard output."
        words = [str(arg) for arg in args]
        if self.old:
            words = [
                f"--{RENAMED[word[2:]]}" if word[2:] in RENAMED and word.startswith("--") else word
                for word in words
            ]
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            if processes > 1
            else []
        )
        env = {**os.environ, "PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launch, "-m", "llm_course", *words],
            cwd=self.work,
            env=env,
            text=True,
            encoding="utf-8",
            capture_output=True,
        )
        if done.returncode:
            raise SystemExit(
                f"{'before' if self.old else 'now'}: llm-course {' '.join(words)}\n{done.stderr[-3000:]}"
            )
        return done.stdout

    def hashes(self, pattern: str, ignore: tuple[str, ...] = ()) -> dict[str, str]:
        "The SHA-256 of all files that match, by their paths."
        found = sorted(
            path for path in self.work.glob(pattern) if path.is_file() and path.name not in ignore
        )
        return {
            str(path.relative_to(self.work)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in found
        }

    def results(self) -> Iterator[tuple[str, object]]:
        "What is compared, by name, as it is computed."
        self.run("corpus", "--folder", "tales", "--stories", 3000)
        yield "the tales", self.hashes("tales/*.txt")
        for name, source, size in (
            ("tales", "tales/corpus.txt", 2048),
            ("blank", "blank.txt", 4000),
            ("pages", "pages.jsonl", 3000),
        ):
            self.run(
                "tokenizer",
                "--input",
                source,
                "--model_prefix",
                f"tok/{name}",
                "--vocab_size",
                size,
            )
            val = ["--val", "tales/val.txt"] if name == "tales" else ["--val_fraction", 0.05]
            self.run(
                "prepare",
                "--input",
                source,
                "--tok",
                f"tok/{name}.model",
                "--seq_len",
                128,
                "--shard_tokens",
                100_000,
                "--out_dir",
                f"shards/{name}",
                *val,
            )
            yield f"tokenizer of {name}", self.hashes(f"tok/{name}.model")
            yield (
                f"shards of {name}",
                self.hashes(
                    f"shards/{name}/*-[0-9]*",
                    ignore=("manifest.json", "tokenizer.model", "val.txt"),
                ),
            )
        for name, (config, steps, flags, processes) in RUNS.items():
            out = f"runs/{name.replace(' ', '-').replace(',', '')}"
            self.run(
                "train",
                "--config",
                config,
                "--max_steps",
                steps,
                "--data",
                "shards/tales",
                "--out",
                out,
                *flags,
                processes=processes,
            )
            yield f"weights of {name}", self.hashes(f"{out}/step-{steps:06d}/model.safetensors")
        for name in WRITERS:
            out = f"runs/{name.replace(' ', '-').replace(',', '')}"
            prompt = [
                "--ckpt",
                out,
                "--prompt",
                "Once upon a time",
                "--temperature",
                0,
                "--max_new_tokens",
                50,
            ]
            yield f"greedy text of {name}", self.run("generate", *prompt)
            self.run(
                "export", "--to", "hf", "--ckpt", out, "--out", f"{out}-hf", "--license", "mit"
            )
            self.run(
                "export", "--to", "gguf", "--ckpt", out, "--out", f"{out}.gguf", "--dtype", "q8_0"
            )
            yield (
                f"exports of {name}",
                self.hashes(f"{out}-hf/*", ignore=("README.md",)) | self.hashes(f"{out}.gguf"),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="the version before")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(code), commit],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        try:
            before = Version(code, Path(folder, "before"), old=True)
            now = Version(ROOT, Path(folder, "now"), old=False)
            different = 0
            for (name, one), (_, other) in zip(before.results(), now.results(), strict=True):
                same = one == other and bool(one)
                different += not same
                print(f"{'same' if same else 'DIFFERS':8} {name}", flush=True)
                if not same:
                    print(f"  before: {one}\n  now:    {other}")
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=False
            )
    print(f"{different} differ" if different else "All are equal.")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
