"""The command line from end to end: the seven steps as they stand in the README, and with a text of one's own."""

import json
import os
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import course, fine, process, snapshot

from llm_course.config import ModelConfig, TrainingConfig
from llm_course.demo import ENOUGH

STAGES = [
    "corpus",
    "tokenizer",
    "prepare",
    "train",
    "eval",
    "generate",
    "chat",
    "export",
    "doctor",
    "plan",
    "demo",
]


def small_corpus(folder: Path, stories: int = 200) -> Path:
    "data/raw/corpus.txt and val.txt with a few tales in them."
    fine(course("corpus", "--stories", stories, cwd=folder))
    return folder


def number(name: str, out: str) -> float:
    "The number beside a name in a table."
    return float(
        re.search(rf"^\s*{re.escape(name)}\s+([\d,.e+-]+)", out, re.MULTILINE)[1].replace(",", "")
    )


def packed(folder: Path) -> dict[str, tuple[int, int]]:
    "Documents and bytes of each split of a folder of shards."
    from llm_course.shards import Manifest

    splits = Manifest.load(folder).splits
    return {
        name: (sum(s.documents for s in shards), sum(s.bytes for s in shards))
        for name, shards in splits.items()
    }


def next_words(out: str) -> list[str]:
    "The arguments of the command that a stage ends with."
    return shlex.split(re.search(r"^next: llm-course (.*)$", out, re.MULTILINE)[1])


# the face


def test_help_needs_no_torch(tmp_path):
    "`--help` answers at once, so none of the slow packages may be imported for it."
    code = (
        "import sys\nfrom llm_course.cli import main\n"
        f"for stage in {[[]] + [[s] for s in STAGES]!r}:\n"
        "    try: main([*stage, '--help'])\n    except SystemExit as end: assert not end.code\n"
        "slow = {'torch', 'numpy', 'sentencepiece', 'matplotlib', 'jaxtyping'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    out = fine(process(cwd=tmp_path, module=("-c", code)))
    assert all(stage in out for stage in STAGES)


def test_help_names_every_flag_of_the_seven_steps(tmp_path):
    "What users already know stays word for word."
    known = {
        "tokenizer": "--input --model_prefix --vocab_size",
        "prepare": "--input --tok --seq_len --shard_tokens --out_dir",
        "train": "--config --resume",
        "eval": "--tok --ckpt --input",
        "generate": "--tok --ckpt --prompt --max_new_tokens",
    }
    for stage, flags in known.items():
        out = fine(course(stage, "--help", cwd=tmp_path))
        assert not [flag for flag in flags.split() if f"{flag} " not in out], stage


def test_no_stage_and_version(tmp_path):
    "Without a stage the program says what it can do."
    assert "prepare" in fine(course(cwd=tmp_path))
    assert re.search(r"\d+\.\d+", fine(course("--version", cwd=tmp_path)))


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["trian"], "train"),
        (["tokenizer", "--vocab_sise", "9"], "--vocab_size"),
        (["train", "--max_stps", "2"], "max_steps"),
        (["train", "--confg", "tiny"], "config"),
        (["demo", "--fersh"], "fresh"),
        (["train", "--config", "tinny"], "tiny"),
    ],
)
def test_a_wrong_name_gets_the_nearest(tmp_path, words, nearest):
    "An unknown stage, flag or config is refused, and the right one is named."
    done = course(*words, cwd=tmp_path)
    assert done.code == 2 and len(done.lines) == 1 and nearest in done.lines[0]
    assert done.lines[0].startswith("llm-course") and snapshot(tmp_path) == {}


def test_an_interrupt_is_one_line_and_status_130(tmp_path, monkeypatch):
    "Ctrl-C is not a fault of the program."
    import llm_course.corpus

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm_course.corpus, "write_tales_corpus", interrupted)
    done = course("corpus", cwd=tmp_path)
    assert done.code == 130 and done.lines == ["llm-course corpus: stopped."]


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    "Only what the user can mend becomes a sentence."
    import llm_course.corpus

    monkeypatch.setattr(llm_course.corpus, "write_tales_corpus", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        course("corpus", cwd=tmp_path)


# the seven steps


def test_seven_steps_word_for_word(tmp_path):
    "The commands of the README, each in a process of its own, in a folder with a space in its name."
    folder = tmp_path / "my course"
    folder.mkdir()
    small_corpus(folder, 300)
    told = fine(
        process(
            *shlex.split(
                "tokenizer --input data/raw/corpus.txt --model_prefix artifacts/tokenizer/llm_spm "
                "--vocab_size 32000"
            ),
            cwd=folder,
        )
    )
    assert "the largest that it supports" in told
    fine(
        process(
            *shlex.split(
                "prepare --input data/raw/corpus.txt --tok artifacts/tokenizer/llm_spm.model --seq_len 2048 "
                "--shard_tokens 200_000_000 --out_dir data/shards"
            ),
            cwd=folder,
        )
    )
    told = fine(process(*shlex.split("train --config tiny --max_steps 3"), cwd=folder))
    assert "parameters" in told and ("float32" in told or "bfloat16" in told)
    told = fine(
        process(
            *shlex.split(
                "eval --tok artifacts/tokenizer/llm_spm.model --ckpt artifacts/checkpoints/latest "
                "--input data/raw/val.txt"
            ),
            cwd=folder,
        )
    )
    assert number("bits per byte", told) > number("known entropy", told) > 0.1
    told = fine(
        process(
            *shlex.split(
                "generate --tok artifacts/tokenizer/llm_spm.model --ckpt artifacts/checkpoints/latest "
                "--prompt 'Once upon a time' --max_new_tokens 100"
            ),
            cwd=folder,
        )
    )
    assert told.startswith("Once upon a time")


def test_defaults_meet(trained):
    "With no flags every stage finds what the one before it wrote, and says what comes next."
    assert {"corpus.txt", "val.txt"} <= {path.name for path in (trained / "data/raw").iterdir()}
    assert (trained / "artifacts/tokenizer/llm_spm.model").exists() and (
        trained / "data/shards/manifest.json"
    ).exists()
    assert next_words(fine(course("eval", cwd=trained))) == ["generate"]
    assert fine(course("generate", "--max_new_tokens", 5, cwd=trained)).startswith(
        "Once upon a time"
    )


@pytest.mark.parametrize("stage", ["tokenizer", "prepare"])
def test_the_default_corpus_is_written_where_it_is_missing(tmp_path, trained, monkeypatch, stage):
    "A fresh clone has no text: the stages that read one write the tales first, and say so in a line."
    import llm_course.corpus as corpus

    write = corpus.write_tales_corpus
    monkeypatch.setattr(
        corpus,
        "write_tales_corpus",
        lambda folder, **options: write(folder, **options | {"n_train": 60, "n_val": 5}),
    )
    shutil.copytree(trained / "artifacts/tokenizer", tmp_path / "artifacts/tokenizer")
    told = fine(course(stage, "--input", "data/raw/corpus.txt", cwd=tmp_path))
    assert (
        told.splitlines()[0].startswith("There is no data/raw/corpus.txt")
        and (tmp_path / "data/raw/val.txt").exists()
    )


def test_vocabulary_of_11027(tmp_path):
    "Any size is possible that the corpus supports."
    import random

    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9)))
        for _ in range(6_000)
    ]
    (tmp_path / "words.txt").write_text(
        "\n".join(" ".join(draw.choices(words, k=10)) for _ in range(4_000))
    )
    told = fine(
        course(
            "tokenizer",
            "--input",
            "words.txt",
            "--model_prefix",
            "t/m",
            "--vocab_size",
            11027,
            cwd=tmp_path,
        )
    )
    assert number("vocabulary", told) == 11027
    assert next_words(told) == ["prepare", "--input", "words.txt", "--tok", "t/m.model"]


def test_strict_refuses_a_smaller_vocabulary(trained, tmp_path):
    "`--strict` turns the line about the vocabulary into an error."
    shutil.copytree(trained / "data/raw", tmp_path / "data/raw")
    before = snapshot(tmp_path)
    done = course("tokenizer", "--vocab_size", 900_000, "--strict", cwd=tmp_path)
    assert (
        done.code == 2
        and len(done.lines) == 1
        and "900,000" in done.lines[0]
        and snapshot(tmp_path) == before
    )


@pytest.mark.slow
def test_125m_takes_two_steps(trained, tmp_path):
    "The owner's config on a CPU."
    fine(
        course(
            "prepare",
            "--input",
            trained / "data/raw/corpus.txt",
            "--tok",
            trained / "artifacts/tokenizer/llm_spm.model",
            "--out_dir",
            "shards",
            cwd=tmp_path,
        )
    )
    told = fine(
        process(
            "train",
            "--config",
            "125m",
            "--max_steps",
            "2",
            "--data",
            "shards",
            "--batch_size",
            "2",
            "--micro_batch_size",
            "1",
            cwd=tmp_path,
            timeout=600,
        )
    )
    assert number("steps", told) == 2


# a text of one's own

POEMS = [
    f"Poem {i}: «Straße», 文章, Ελλάδα.\nIts second line counts to {i * i} and ends in 🦊."
    for i in range(40)
]
LINES = [poem.replace("\n", " / ") for poem in POEMS]


def own_text(form: str, folder: Path) -> list[str]:
    "Write a text of one's own in some form; the flags that read it."
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    if form == "line":
        (raw / "mine.txt").write_text("\n".join(LINES), encoding="utf-8")
    elif form == "blank":
        (raw / "mine.txt").write_text("\n\n".join(POEMS), encoding="utf-8")
    elif form == "jsonl":
        (raw / "mine.jsonl").write_text(
            "".join(json.dumps({"text": poem}) + "\n" for poem in POEMS), encoding="utf-8"
        )
        return ["--input", "data/raw/mine.jsonl"]
    elif form in ("folder", "glob"):
        (raw / "mine").mkdir()
        for i, poem in enumerate(POEMS):
            (raw / "mine" / f"{i}.txt").write_text(poem, encoding="utf-8")
        return ["--input", "data/raw/mine" if form == "folder" else "data/raw/mine/*.txt"]
    elif form == "separator":
        (raw / "mine.txt").write_text("<|endoftext|>".join(POEMS), encoding="utf-8")
    else:
        (raw / "mine.txt").write_text("\n---\n".join(POEMS), encoding="utf-8")
        return ["--input", "data/raw/mine.txt", "--documents", r"\n---\n"]
    return ["--input", "data/raw/mine.txt"]


@pytest.mark.parametrize(
    "form", ["line", "blank", "jsonl", "folder", "glob", "separator", "own separator"]
)
def test_a_text_of_ones_own(form, tmp_path):
    "Documents are told apart, held out, packed and measured, whatever form the text has; a second run gives the same shards."
    reads = own_text(form, tmp_path)
    fine(course("tokenizer", *reads, "--vocab_size", 400, cwd=tmp_path))
    fine(course("prepare", *reads, "--seq_len", 64, cwd=tmp_path))
    first = snapshot(tmp_path / "data")
    documents, held = (
        packed(tmp_path / "data/shards")["train"][0],
        packed(tmp_path / "data/shards")["val"][0],
    )
    assert held > 0 and documents + held == len(POEMS)
    fine(course("prepare", *reads, "--seq_len", 64, cwd=tmp_path))
    assert snapshot(tmp_path / "data") == first
    fine(course("train", "--config", "tiny", "--max_steps", 1, cwd=tmp_path))
    told = fine(course("eval", *reads[2:], cwd=tmp_path))
    assert (number("documents", told), number("bytes", told)) == packed(tmp_path / "data/shards")[
        "val"
    ]
    assert "known entropy" not in told


def test_one_document_trains_without_validation(tmp_path):
    "There is nothing to hold out, and that is said."
    (tmp_path / "book.txt").write_text(" ".join(LINES), encoding="utf-8")
    reads = ["--input", "book.txt", "--documents", "file"]
    fine(course("tokenizer", *reads, "--vocab_size", 400, cwd=tmp_path))
    assert "Validation: none" in fine(course("prepare", *reads, "--seq_len", 64, cwd=tmp_path))
    assert not (tmp_path / "val.txt").exists()
    fine(course("train", "--config", "tiny", "--max_steps", 2, cwd=tmp_path))


def test_validation_text_of_ones_own(trained, tmp_path):
    "`--val` is what is validated on, and none of it is trained on."
    (tmp_path / "c.txt").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "v.txt").write_text("\n".join(LINES[:7]), encoding="utf-8")
    fine(
        course(
            "prepare",
            "--input",
            "c.txt",
            "--val",
            "v.txt",
            "--out_dir",
            "s",
            "--seq_len",
            64,
            "--tok",
            trained / "artifacts/tokenizer/llm_spm.model",
            cwd=tmp_path,
        )
    )
    assert [documents for documents, _ in packed(tmp_path / "s").values()] == [33, 7] and not (
        tmp_path / "val.txt"
    ).exists()


def test_tales_do_not_validate_another_text(trained, tmp_path):
    "A val.txt of tales that was left behind is not used for the user's own text, nor is it touched."
    shutil.copytree(trained / "data/raw", tmp_path / "data/raw")
    (tmp_path / "data/raw/corpus.txt").write_text("\n".join(LINES), encoding="utf-8")
    before = snapshot(tmp_path / "data/raw")
    told = fine(
        course(
            "prepare",
            "--seq_len",
            64,
            "--tok",
            trained / "artifacts/tokenizer/llm_spm.model",
            cwd=tmp_path,
        )
    )
    held = (tmp_path / "data/shards/val.txt").read_text(encoding="utf-8").splitlines()
    assert (
        "held out" in told
        and held
        and set(held) <= set(LINES)
        and snapshot(tmp_path / "data/raw") == before
    )


def test_tales_are_not_written_over_ones_own_text(tmp_path):
    "`corpus` leaves a text alone that it did not write, unless it is told to."
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/corpus.txt").write_text("my only copy\n")
    before = snapshot(tmp_path)
    done = course("corpus", "--stories", 10, cwd=tmp_path)
    assert done.code == 2 and "--force" in done.lines[0] and snapshot(tmp_path) == before
    fine(course("corpus", "--stories", 10, "--force", cwd=tmp_path))
    fine(course("corpus", "--stories", 11, cwd=tmp_path))


# training


def test_overrides_are_read_in_every_form(tmp_path):
    "`--name value`, `--name=value`, `--na-me value`, and a switch alone."
    from llm_course.cli import main, typed_fields

    words = ["--max_steps", "2", "--lr=3e-4", "--n-layers", "4", "--compile", "--grad_clip", "-1"]
    with (
        main.make_context("llm-course", ["train"]) as above,
        main.commands["train"].make_context("train", words, parent=above) as ctx,
    ):
        assert typed_fields(ctx) == {
            "max_steps": "2",
            "lr": "3e-4",
            "n_layers": "4",
            "compile": "true",
            "grad_clip": "-1",
        }


def test_show_prints_every_field_and_its_meaning(tmp_path):
    "What the fields say of themselves is the documentation, and nothing runs."
    names = [field.name for part in (ModelConfig, TrainingConfig) for field in fields(part)]
    told = fine(course("train", "--show", "--config", "tiny", "--max-steps", 77, cwd=tmp_path))
    rows = [line.split(maxsplit=2) for line in told.splitlines()]
    assert [row[0] for row in rows] == names and all(len(row) == 3 for row in rows)
    assert ["max_steps", "77"] in [row[:2] for row in rows] and snapshot(tmp_path) == {}


def test_fields_of_the_config_are_flags(trained, tmp_path):
    "A field set on the command line is the field of the run."
    told = fine(
        course(
            "train",
            "--config",
            "tiny",
            "--data",
            trained / "data/shards",
            "--n_layers=1",
            "--max-steps",
            2,
            "--out",
            "runs/one",
            cwd=tmp_path,
        )
    )
    from llm_course.checkpoint import load_checkpoint

    assert load_checkpoint(tmp_path / "runs/one/latest", "cpu").config.model.n_layers == 1
    assert next_words(told) == [
        "eval",
        "--ckpt",
        "runs/one/latest",
        "--input",
        f"{trained}/data/shards",
    ]
    assert (
        number("documents", fine(course(*next_words(told), cwd=tmp_path)))
        == packed(trained / "data/shards")["val"][0]
    )


def test_resume(trained, tmp_path):
    "Stopped at 4 and resumed to 8 is 8 in one go; and where there is no checkpoint, --resume begins."
    from llm_course.checkpoint import load_checkpoint

    flags = [
        "--config",
        "tiny",
        "--data",
        trained / "data/shards",
        "--decay_fraction",
        "0",
        "--precision",
        "fp32",
    ]
    fine(course("train", *flags, "--max_steps", 4, "--resume", "--out", "a", cwd=tmp_path))
    fine(course("train", *flags, "--max_steps", 8, "--resume", "--out", "a", cwd=tmp_path))
    fine(course("train", *flags, "--max_steps", 8, "--out", "b", cwd=tmp_path))
    stopped, straight = (load_checkpoint(tmp_path / out / "latest", "cpu") for out in "ab")
    assert stopped.step == straight.step == 8
    assert all(p.equal(q) for p, q in zip(stopped.model.parameters(), straight.model.parameters()))


def test_torchrun(trained, tmp_path):
    "Two processes under torchrun train one model, and one of them speaks."
    done = process(
        "--nproc_per_node",
        2,
        "-m",
        "llm_course",
        "train",
        "--config",
        "tiny",
        "--max_steps",
        3,
        "--device",
        "cpu",
        "--data",
        trained / "data/shards",
        "--out",
        "ddp",
        cwd=tmp_path,
        module=("-m", "torch.distributed.run"),
    )
    assert (
        "2 processes" in fine(done)
        and done.out.count("next: ") == 1
        and (tmp_path / "ddp/latest/model.safetensors").exists()
    )


# evaluation and generation


def test_eval_with_and_without_tok(trained):
    "The checkpoint carries its tokenizer; naming the same one changes nothing, nor does the batch size."
    table = fine(course("eval", cwd=trained))
    assert fine(course("eval", "--tok", "artifacts/tokenizer/llm_spm.model", cwd=trained)) == table
    assert number("perplexity", fine(course("eval", "--batch-size", 3, cwd=trained))) == number(
        "perplexity", table
    )
    assert number("bytes", table) == len(
        (trained / "data/raw/val.txt").read_bytes().replace(b"\n", b"")
    )


def test_generate(trained):
    "A seed repeats, greedy needs none, several samples differ, both spellings of a flag are taken, and the grammar is asked."
    once = fine(course("generate", "--max_new_tokens", 20, "--seed", 3, cwd=trained))
    assert fine(course("generate", "--max-new-tokens", 20, "--seed", 3, cwd=trained)) == once
    greedy = [
        fine(course("generate", "--max_new_tokens", 12, "--temperature", 0, cwd=trained))
        for _ in range(2)
    ]
    assert greedy[0] == greedy[1]
    several = fine(
        course(
            "generate",
            "--max_new_tokens",
            20,
            "--seed",
            3,
            "--n",
            3,
            "--top_k",
            50,
            "--top_p",
            0.9,
            "--min_p",
            0.01,
            "--repetition_penalty",
            1.1,
            "--check",
            cwd=trained,
        )
    )
    assert (
        len(re.findall(r"^Once upon a time", several, re.MULTILINE))
        == len(re.findall(r"^  The grammar:", several, re.MULTILINE))
        == 3
    )
    assert fine(
        course("generate", "--prompt", "", "--max_new_tokens", 3, "--num_samples", 1, cwd=trained)
    )


def test_generate_in_every_precision(trained):
    "That this machine has: fp32 is what one gets without asking, and a precision that is not there is refused by name."
    from llm_course.cli import main
    from llm_course.decoding import PRECISIONS, can_pack

    assert next(
        tuple(o.type.choices) for o in main.commands["generate"].params if o.name == "precision"
    ) == tuple(PRECISIONS)
    texts = {
        precision: fine(
            course(
                "generate",
                "--max_new_tokens",
                8,
                "--seed",
                3,
                "--precision",
                precision,
                cwd=trained,
            )
        )
        for precision in PRECISIONS
        if can_pack(precision)
    }
    assert all(texts.values()) and texts.get("fp32") in (
        None,
        fine(course("generate", "--max_new_tokens", 8, "--seed", 3, cwd=trained)),
    )
    refused = course("generate", "--precision", "int3", cwd=trained)
    assert refused.code == 2 and "int3" in refused.err


def test_generate_says_when_the_context_slides(trained):
    "Past the context the oldest half is forgotten; that is said once, and not in the text."
    done = course(
        "generate", "--max_new_tokens", 90, "--seed", 0, "--temperature", 1.5, cwd=trained
    )
    assert "context" not in fine(done) and sum("context" in line for line in done.lines) <= 1


# the demo


def test_demo(tmp_path):
    "The whole arc, small: a table with the floor and the gap, three stories with verdicts, a picture; then reused, then fresh."
    words = ["demo", "--config", "tiny", "--max_steps", 12, "--stories", 200, "--seq_len", 64]
    told = fine(course(*words, cwd=tmp_path))
    for name in (
        "parameters",
        "tokens seen",
        "validation perplexity",
        "bits per byte",
        "known entropy, bits per byte",
    ):
        assert number(name, told) > 0
    assert "--max_minutes" not in told  # all steps were made
    assert (
        told.count("The grammar:") == 3
        and "gap" in told
        and re.search(r"Of 200 such stories, [0-9.]+% are right", told)
    )
    assert (tmp_path / "artifacts/demo/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts"]
    assert next_words(told)[:3] == ["generate", "--ckpt", "artifacts/demo/checkpoints/latest"]
    trained_at = (tmp_path / "artifacts/demo/checkpoints/latest/manifest.json").stat().st_mtime_ns
    fine(course(*words, cwd=tmp_path))
    assert (
        tmp_path / "artifacts/demo/checkpoints/latest/manifest.json"
    ).stat().st_mtime_ns == trained_at
    fine(course(*words, "--fresh", cwd=tmp_path))
    assert (
        tmp_path / "artifacts/demo/checkpoints/latest/manifest.json"
    ).stat().st_mtime_ns != trained_at
    assert fine(course(*next_words(told), "--max_new_tokens", 5, cwd=tmp_path))


def test_a_slow_machine_is_told_how_long_to_train(tmp_path):
    "Where the clock cuts training far short, the demo names the minutes that would do."
    words = ["demo", "--config", "tiny", "--stories", 200, "--seq_len", 64]
    told = fine(course(*words, "--max_steps", 1_000_000, "--max_minutes", 0.05, cwd=tmp_path))
    seen = number("tokens seen", told)
    minutes = int(re.search(r"--max_minutes ([0-9]+) trains", told)[1])
    assert minutes - 1 < 0.05 * ENOUGH / seen <= minutes


def test_what_is_held_out_has_a_bound(tmp_path, monkeypatch):
    "However large the corpus: about MOST_HELD bytes, chosen by their hashes, and all else is trained on."
    from llm_course import preparation

    (tmp_path / "own.txt").write_text(
        "\n".join(f"line {i} of a text of one's own" for i in range(4000))
    )
    fine(course("tokenizer", "--input", "own.txt", "--vocab_size", 300, cwd=tmp_path))
    monkeypatch.setattr(preparation, "MOST_HELD", 3000)
    out = fine(
        course(
            "prepare", "--input", "own.txt", "--val_fraction", 0.5, "--seq_len", 16, cwd=tmp_path
        )
    )
    held = (tmp_path / "data/shards/val.txt").read_text().splitlines()
    assert 50 < len(held) < 150 and f"{4000 - len(held):,} documents" in out


def test_workers_change_no_byte(trained, tmp_path):
    "`--workers 2` writes the shards that one process writes."
    fine(
        course(
            "prepare",
            "--input",
            trained / "data/raw/corpus.txt",
            "--tok",
            trained / "artifacts/tokenizer/llm_spm.model",
            "--val",
            trained / "data/raw/val.txt",
            "--seq_len",
            64,
            "--out_dir",
            "s",
            "--workers",
            2,
            cwd=tmp_path,
        )
    )
    assert snapshot(tmp_path / "s") == snapshot(trained / "data/shards")


def test_as_many_workers_as_pay(tmp_path, monkeypatch):
    "One for a small text and for tokens, more for a large one, and never more than there are processors."
    from llm_course import preparation

    monkeypatch.setattr(preparation, "usable_processors", lambda: 4)
    (text := tmp_path / "text.txt").touch()
    for megabytes, workers in ((0, 1), (19, 1), (21, 2), (1000, 4)):
        os.truncate(text, megabytes * 10**6)
        assert preparation.useful_workers(SimpleNamespace(files=[text])) == workers
        assert preparation.useful_workers(SimpleNamespace(files=[text], tokenized=iter)) == 1
