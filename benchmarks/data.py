"""How fast text becomes shards: `prepare` beside Hugging Face `tokenizers` with the same vocabulary, on one core and on two.

    python benchmarks/data.py [--megabytes 100] [--rounds 3] [--gigabyte] [--folder FOLDER]

Two texts: tales, and the Python sources of the standard library (copies, until they are enough, with other names in each).
Every row is a process of its own; rows take turns. `tokenizers` gets documents in memory and has to encode them, no more;
`prepare` also reads, looks for copies of validation documents, writes and hashes. --gigabyte adds the same on 1 GB of tales,
and how much memory it takes.
Texts, vocabularies and figures stay in --folder, if one is given, so that a run goes on where it stopped. Results go to
benchmarks/data.json; the tables are printed."""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

from common import in_process, middle, take_turns, write_results

SEPARATOR = "<|endoftext|>"
TEXTS = {"tales": "line", "sources": SEPARATOR}  # and how their documents are told apart
THEIRS = 10_000_000  # bytes that `tokenizers` encodes: it takes several times as long, and as long for every megabyte
ROWS = {  # what runs, and on how many cores
    "tokenizers, 1 core": ("theirs", 1),
    "tokenizers, 2 cores": ("theirs", 2),
    "tokenizers, cut at spaces, 1 core": ("theirs at spaces", 1),
    "tokenizers, cut at spaces, 2 cores": ("theirs at spaces", 2),
    "encode_array, 1 core": ("encode", 1),
    "prepare, 1 process": ("prepare", 1),
    "prepare, 2 processes": ("prepare", 2),
}


# The texts


def write_texts(folder: Path, megabytes: int) -> None:
    """Both texts, and a vocabulary for each, where they are missing."""
    from llm_course.corpus import Corpus, write_tales_corpus
    from llm_course.files import atomic_write
    from llm_course.preparation import huggingface_files
    from llm_course.tokenizer import train_tokenizer

    if not (folder / "tales.txt").exists():
        write_tales_corpus(folder, megabytes * 900, 500)
        (folder / "corpus.txt").rename(folder / "tales.txt")
    if not (folder / "sources.txt").exists():
        with atomic_write(folder / "sources.txt", "w") as file:
            file.writelines(f"{text}\n" for text in sources(megabytes))
    for text, form in TEXTS.items():
        if not (folder / f"{text}.model").exists():
            corpus = Corpus(folder / f"{text}.txt", form)
            tokenizer = train_tokenizer(
                corpus, 32_000, sample_bytes=10_000_000, log=lambda line: None
            )
            tokenizer.save(folder / f"{text}.model")
            (folder / f"{text}.json").write_bytes(huggingface_files(tokenizer)["tokenizer.json"])


def sources(megabytes: int) -> list[str]:
    """Python's own modules, each behind a separator; in every further copy the longer lower-case names end in its number."""
    root, found, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    for copy in count():
        for path in files:
            text = path.read_bytes().decode("utf-8", "ignore").replace("\0", "")
            found.append(
                SEPARATOR + (re.sub(r"\b([a-z_]{6,})\b", rf"\g<1>{copy}", text) if copy else text)
            )
            size += len(found[-1].encode())
            if size > megabytes * 1e6:
                return found


# One row, in a process of its own


def throughput(row: str, text: str, folder: Path) -> float:
    """Megabytes of text a second."""
    what, cores = ROWS[row]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return {"encode": encode, "prepare": prepare}.get(what, theirs)(text, folder, what, cores)


def documents_of(text: str, folder: Path, most: float = float("inf")) -> tuple[list[str], int]:
    """The documents of a text, and their size in bytes, up to `most`."""
    from llm_course.corpus import Corpus

    found, size = [], 0
    for document in Corpus(folder / f"{text}.txt", TEXTS[text]):
        if size >= most:
            break
        found.append(document)
        size += len(document.encode())
    return found, size


def theirs(text: str, folder: Path, what: str, cores: int) -> float:
    """`encode_batch_fast`, which computes no places in the text, 1000 documents at a time."""
    os.environ |= {
        "RAYON_NUM_THREADS": str(cores),
        "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false",
    }
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(folder / f"{text}.json"))
    fast.encode_special_tokens = True
    if what == "theirs at spaces":  # the same ids: no piece has a space behind another character
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(" *[^ ]+| +"), "isolated"
        )
    documents, size = documents_of(text, folder, THEIRS)
    begun = time.perf_counter()
    for i in range(0, len(documents), 1000):
        [
            encoding.ids
            for encoding in fast.encode_batch_fast(
                documents[i : i + 1000], add_special_tokens=False
            )
        ]
    return size / 1e6 / (time.perf_counter() - begun)


def encode(text: str, folder: Path, what: str, cores: int) -> float:
    """`BulkEncoder.encode_array`, a document at a time."""
    from llm_course.shards import BulkEncoder
    from llm_course.tokenizer import Tokenizer

    encoder = BulkEncoder(Tokenizer.load(folder / f"{text}.model"))
    documents, size = documents_of(text, folder, 3 * THEIRS)
    begun = time.perf_counter()
    for document in documents:
        encoder.encode_array(document)
    return size / 1e6 / (time.perf_counter() - begun)


def prepare(text: str, folder: Path, what: str, cores: int) -> float:
    """`packing.write_shards` from the file to the finished shards, the start of other processes included."""
    from llm_course.corpus import Corpus
    from llm_course.preparation import tokenize_in_parallel
    from llm_course.shards import write_shards
    from llm_course.tokenizer import Tokenizer

    tokenizer, corpus = (
        Tokenizer.load(folder / f"{text}.model"),
        Corpus(folder / f"{text}.txt", TEXTS[text]),
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        begun = time.perf_counter()
        manifest = write_shards(
            corpus,
            tokenizer,
            Path(out) / "shards",
            val_documents=Corpus(folder / "val.txt"),
            tokenize=tokenize_in_parallel(cores),
        )
        seconds = time.perf_counter() - begun
    return (
        sum(shard.bytes for shards in manifest.splits.values() for shard in shards) / 1e6 / seconds
    )


def same_ids(text: str, folder: Path) -> bool:
    """Whether all four ways give the same ids, on the first megabyte."""
    import tokenizers

    from llm_course.tokenizer import Tokenizer

    ours, fast = (
        Tokenizer.load(folder / f"{text}.model"),
        tokenizers.Tokenizer.from_file(str(folder / f"{text}.json")),
    )
    fast.encode_special_tokens = True
    documents, _ = documents_of(text, folder, 1e6)
    ids = [ours.encode(document) for document in documents]
    same = [each.ids for each in fast.encode_batch_fast(documents, add_special_tokens=False)] == ids
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" *[^ ]+| +"), "isolated")
    return (
        same
        and [each.ids for each in fast.encode_batch_fast(documents, add_special_tokens=False)]
        == ids
    )


# Whole commands, watched


def memory_of(pid: int) -> dict[str, float]:
    """The most that a process and its children have ever had resident, in MB: of itself, and of the largest child."""
    peak = lambda one: next(
        (
            int(line.split()[1]) / 1000
            for line in Path(f"/proc/{one}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ),
        0.0,
    )
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"first": peak(pid), "worker": max([peak(child) for child in children], default=0.0)}


def command(stage: str, megabytes: int, folder: Path) -> dict:
    """`llm-course STAGE` on so many megabytes of tales with two processes: seconds, and peak memory of each process."""
    source = folder / f"{megabytes}" / "tales.txt"
    if not source.exists():
        source.parent.mkdir(exist_ok=True)
        from llm_course.corpus import write_tales_corpus

        write_tales_corpus(source.parent, megabytes * 900, 500)
        (source.parent / "corpus.txt").rename(source)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        more = {
            "prepare": [
                "--tok",
                folder / "tales.model",
                "--val",
                folder / "val.txt",
                "--out_dir",
                f"{out}/shards",
                "--workers",
                2,
            ],
            "tokenizer": ["--model_prefix", f"{out}/learned"],
        }[stage]
        words = [
            sys.executable,
            "-m",
            "llm_course",
            stage,
            "--input",
            source,
            "--documents",
            "line",
            *more,
        ]
        begun, peaks = time.perf_counter(), {"first": 0.0, "worker": 0.0}
        running = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
        while running.poll() is None:
            try:
                peaks = {
                    name: max(peaks[name], now) for name, now in memory_of(running.pid).items()
                }
            except OSError:  # it has ended since
                pass
            time.sleep(0.05)
        seconds = time.perf_counter() - begun
        assert running.returncode == 0
    memory = {f"{process}_mb": peak for process, peak in peaks.items()}
    return {"stage": stage, "megabytes": source.stat().st_size / 1e6, "seconds": seconds, **memory}


def learning(text: str, folder: Path) -> dict:
    """What `tokenizer` does: seconds to read a text, to choose from it, and to learn 32,000 pieces from at most 100 MB."""
    from llm_course import tokenizer
    from llm_course.corpus import Corpus, sample

    seconds = [time.perf_counter()]
    documents = list(Corpus(folder / f"{text}.txt", TEXTS[text]))
    seconds.append(time.perf_counter())
    chosen = sample(tokenizer._trainable(documents), 100_000_000, log=lambda line: None)
    seconds.append(time.perf_counter())
    tokenizer._train(chosen, 32_000)
    seconds.append(time.perf_counter())
    size = sum(len(document.encode()) for document in documents) / 1e6
    taken = dict(
        zip(("read", "choose", "learn"), (end - start for start, end in pairwise(seconds)))
    )
    return {"text": text, "megabytes": size, **taken}


def batches(name: str, folder: Path) -> dict:
    """Seconds for a batch of a config, and for the forward and backward pass on it, in the precision that training would pick here."""
    import numpy as np
    import torch

    from llm_course.config import load_config
    from llm_course.device import pick_precision
    from llm_course.gpt import GPT
    from llm_course.packing import get_batch
    from llm_course.shards import TokenDataset, Tokenized, write_shards
    from llm_course.tokenizer import Tokenizer

    config = load_config(name)
    precision, _ = pick_precision("auto", torch.device("cpu"))
    size = {"demo": config.training.batch_size, "125m": 1}[name]
    tokenizer = Tokenizer.load(folder / "tales.model")
    ids = (
        np.random.default_rng(0)
        .integers(2, tokenizer.vocab_size, 50_000_000)
        .astype(tokenizer.dtype)
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        write_shards(
            [Tokenized("", ids)] * 2,
            tokenizer,
            f"{out}/shards",
            val_documents=[],
            seq_len=config.model.seq_len,
        )
        shards = TokenDataset(f"{out}/shards")
        reading = middle(
            timed(lambda data=shards, step=step: get_batch(data, step, size, 0))
            for step in range(50)
        )
        x, y = (torch.from_numpy(part % 1000) for part in get_batch(shards, 0, size, 0))
        shards = None  # let go of the files
    model = GPT(config.model)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            logits = model(x)
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten()).backward()

    return {
        "config": name,
        "batch": list(x.shape),
        "read": reading,
        "step": min(timed(step) for _ in range(2)),
    }


def timed(act: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


PARTS = {
    "throughput": throughput,
    "same": same_ids,
    "command": command,
    "learning": learning,
    "batches": batches,
}


def measure(folder: Path, rounds: int, gigabyte: bool) -> dict:
    """All of it; what a run that was stopped has measured is kept in `folder`."""
    part = lambda name, *words: in_process(__file__, "--part", name, *words, "--folder", folder)
    turns = lambda text: take_turns(
        {row: lambda row=row: part("throughput", row, text) for row in ROWS}, rounds
    )
    sizes = [100, 1000] if gigabyte else [100]

    def kept(name: str, act: Callable[[], object]) -> object:
        path = folder / f"measured {name}.json"
        if not path.exists():
            path.write_text(json.dumps(act()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    assert all(part("same", text) for text in TEXTS)
    return {
        "speeds": {text: kept(text, lambda: turns(text)) for text in TEXTS},
        "commands": [
            kept(f"{stage} {size}", lambda: part("command", stage, size))
            for stage in ("prepare", "tokenizer")
            for size in sizes
        ],
        "batches": [
            kept(f"batches {name}", lambda: part("batches", name)) for name in ("demo", "125m")
        ],
        "learning": [kept(f"learning {text}", lambda: part("learning", text)) for text in TEXTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabyte", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, *words = (int(word) if word.isdigit() else word for word in args.part)
        return print(json.dumps(PARTS[name](*words, args.folder)))
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        write_texts(folder, args.megabytes)
        results = measure(folder, args.rounds, args.gigabyte)
    write_results(__file__, results, "tokenizers", "sentencepiece", "numpy")
    print(table(results))


def table(results: dict) -> str:
    """The results as tables in Markdown: medians, and ratios of medians."""
    mid = {
        text: {row: middle(values) for row, values in rows.items()}
        for text, rows in results["speeds"].items()
    }
    lines = ["| MB/s | tales | sources |", "|---|---:|---:|"]
    lines += [f"| {row} | {' | '.join(f'{mid[text][row]:.1f}' for text in mid)} |" for row in ROWS]
    for words, ours, other in (
        ("`prepare`, 1 process ÷ the better `tokenizers`, 1 core", "prepare, 1 process", "1 core"),
        (
            "`prepare`, 2 processes ÷ the better `tokenizers`, 2 cores",
            "prepare, 2 processes",
            "2 cores",
        ),
        ("`prepare`, 2 processes ÷ 1 process", "prepare, 2 processes", "prepare, 1 process"),
    ):
        beside = [
            row
            for row in ROWS
            if row == other or row.startswith("tokenizers") and row.endswith(other)
        ]
        ratios = [rows[ours] / max(rows[row] for row in beside) for rows in mid.values()]
        lines.append(f"| {words} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    lines += [
        "",
        "| command, on tales | seconds | MB/s | peak of the first process, MB | of the other, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in results["commands"]:
        speed, other = (
            each["megabytes"] / each["seconds"],
            f"{each['worker_mb']:.0f}" if each["worker_mb"] else "–",
        )
        lines.append(
            f"| `{each['stage']}`, {each['megabytes']:,.0f} MB | {each['seconds']:.1f} | {speed:.1f} | "
            f"{each['first_mb']:.0f} | {other} |"
        )
    lines += [
        "",
        "| what `tokenizer` does, seconds | read | choose | learn |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {each['text']}, {each['megabytes']:.0f} MB | {each['read']:.1f} | {each['choose']:.1f} | {each['learn']:.1f} |"
        for each in results["learning"]
    ]
    lines += [
        "",
        "| config | batch | to read it, ms | forward and backward, ms | share |",
        "|---|---|---:|---:|---:|",
    ]
    for each in results["batches"]:
        batch, read, step = " × ".join(map(str, each["batch"])), each["read"], each["step"]
        lines.append(
            f"| {each['config']} | {batch} | {1000 * read:.2f} | {1000 * step:.0f} | {read / step:.3%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
