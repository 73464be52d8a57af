"""Bad input: one sentence on stderr, exit status 2, no traceback, and the folder as it was."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import course, fine, process, snapshot

TALE = "Once upon a time, there was a text that somebody wrote down.\n"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    "A finished run in the default places, to be damaged."
    place = tmp_path / "a run"
    shutil.copytree(trained, place, symlinks=True)
    return place


def refused(folder: Path, *args: object) -> str:
    "The one sentence with which a command is refused; the folder must be as it was."
    before = snapshot(folder)
    done = course(*args, cwd=folder)
    assert done.code == 2, f"exit status {done.code}\n{done.out}\n{done.err}"
    assert len(done.lines) == 1 and done.lines[0].startswith(f"llm-course {args[0]}: "), done.err
    assert "Traceback" not in done.err and snapshot(folder) == before
    return done.lines[0]


READERS = {"tokenizer": ["--vocab_size", 300], "prepare": ["--seq_len", 16], "eval": []}


@pytest.mark.parametrize("stage", READERS)
@pytest.mark.parametrize(
    "content, told",
    [
        (None, "does not exist"),
        ("folder", ".txt"),
        (b"", "no text"),
        (b" \n\t\r\n \n", "no text"),
        (b"fine\n" + b"a" * 40 + b"\xff\xfe\n", "byte 45"),
        ("text\nmore\n".encode("utf-16-le"), "byte 1"),
        (b"one\0two\n", "byte 3"),
    ],
    ids=["missing", "folder", "empty", "blank", "utf-8", "utf-16", "NUL"],
)
def test_text_that_is_none(folder, stage, content, told):
    "A text that is not there, or is none, is named, with the position of the byte that is wrong."
    if content == "folder":
        (folder / "mine.txt").mkdir()
    elif content is not None:
        (folder / "mine.txt").write_bytes(content)
    line = refused(folder, stage, "--input", "mine.txt", *READERS[stage])
    assert "mine.txt" in line and told in line


@pytest.mark.parametrize("stage", READERS)
def test_errors_replace_goes_on(folder, stage):
    "`--errors replace` is the way past a byte that is wrong."
    (folder / "mine.txt").write_bytes(
        (TALE * 40).encode() + b"\xff\n" + (TALE.upper() * 40).encode()
    )
    fine(
        course(
            stage,
            "--input",
            "mine.txt",
            "--errors",
            "replace",
            "--documents",
            "line",
            *READERS[stage],
            cwd=folder,
        )
    )


def test_crlf_is_no_mistake(folder):
    "A text from Windows has the same documents, and gives the same shards."
    lines = (folder / "data/raw/corpus.txt").read_bytes()
    for name, text in (("lf", lines), ("crlf", lines.replace(b"\n", b"\r\n"))):
        (folder / name).mkdir()
        (folder / name / "c.txt").write_bytes(text)
        fine(
            course(
                "prepare",
                "--input",
                f"{name}/c.txt",
                "--seq_len",
                16,
                "--out_dir",
                f"{name}/shards",
                cwd=folder,
            )
        )
    assert snapshot(folder / "lf/shards") == snapshot(folder / "crlf/shards")
    assert (folder / "lf/shards/val.txt").exists()


@pytest.mark.slow
def test_one_line_of_50_mb(folder):
    "One document, however long: it is learned from, packed, and said not to leave any for validation."
    (folder / "long.txt").write_bytes(
        (folder / "data/raw/corpus.txt").read_bytes().replace(b"\n", b" ") * 120
    )
    assert (folder / "long.txt").stat().st_size > 5e7
    fine(
        process(
            "tokenizer",
            "--input",
            "long.txt",
            "--model_prefix",
            "long",
            "--vocab_size",
            500,
            cwd=folder,
        )
    )
    told = fine(
        process("prepare", "--input", "long.txt", "--out_dir", "long", "--seq_len", 64, cwd=folder)
    )
    assert "Validation: none" in told


def test_1_kb_is_enough_for_a_vocabulary(folder):
    "A tiny corpus gives a small vocabulary, and then what is too short is said."
    (folder / "kb.txt").write_text(TALE * 16)
    assert "the largest that it supports" in fine(
        course("tokenizer", "--input", "kb.txt", "--model_prefix", "kb", cwd=folder)
    )
    line = refused(folder, "prepare", "--input", "kb.txt", "--tok", "kb.model", "--out_dir", "kb")
    assert "2,048" in line or "2048" in line


def test_no_text_without_validation_is_half_written(folder):
    "When packing fails, the held-out text is not left behind either."
    (folder / "in").mkdir()
    (folder / "in/short.txt").write_text("one\ntwo\nthree\n")
    assert "one sequence" in refused(folder, "prepare", "--input", "in/short.txt", "--seq_len", 500)


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "half of a pair: \\ud800"}',
        '{"txt": "no text"}',
        "{",
        '{"text": 5}',
        '{"text": "a\\u0000b"}',
    ],
)
def test_jsonl(folder, text):
    "A line of .jsonl that is no document is refused; a NUL or half a surrogate pair never ends in a traceback."
    (folder / "mine.jsonl").write_text('{"text": "a good one"}\n' * 9 + text + "\n")
    for stage, out in (("tokenizer", "--model_prefix"), ("prepare", "--out_dir")):
        before = snapshot(folder)
        done = course(stage, "--input", "mine.jsonl", *READERS[stage], out, "new", cwd=folder)
        assert (
            done.code == 0 or done.code == 2 and len(done.lines) == 1 and snapshot(folder) == before
        ), done.err


# configs


MODEL = (
    '"n_layers": 2, "d_model": 64, "n_kv_heads": 2, "d_ff": 96, "vocab_size": 600, "seq_len": 64'
)


@pytest.mark.parametrize(
    "config, told",
    [
        ('{"model": {"n_layer": 2}}', "n_layers"),
        ('{"modell": {}}', "'model'"),
        ('{"model": {}}', "n_layers"),
        (f'{{"model": {{{MODEL}, "n_heads": 4}}, "training": {{"lr": "fast"}}}}', "training.lr"),
        (
            f'{{"model": {{{MODEL}, "n_heads": 4}}, "training": {{"max_steps": 2.5}}}}',
            "training.max_steps",
        ),
        (f'{{"model": {{{MODEL}, "n_heads": true}}}}', "model.n_heads"),
        (f'{{"model": {{{MODEL}, "n_heads": 5}}}}', "n_heads"),
        ('{"training": {"lr": NaN}}', "NaN"),
        ('{"training": {"lr": 1, "lr": 2}}', "lr"),
        ('{"model": {"d_model": 64', "JSON"),
        ("[]", "JSON"),
    ],
)
def test_config_file(folder, config, told):
    "Unknown and mistyped keys, NaN, keys that stand twice: refused with the name of the field."
    (folder / "mine.json").write_text(config)
    line = refused(folder, "train", "--config", "mine.json")
    assert told in line


@pytest.mark.parametrize(
    "words, told",
    [
        (["--max_steps", "two"], "max_steps"),
        (["--lr", "nan"], "lr"),
        (["--n_heads", "5"], "n_heads"),
        (["--batch_size", "0"], "batch_size"),
        (["--precision", "bf61"], "bf16"),
        (["--max_steps"], "--max_steps needs a value"),
        (["5"], "'5'"),
        (["--device", "cubicle"], "cubicle"),
        (["--config", "missing.json"], "missing.json"),
        (["--data", "nowhere"], "No shards in nowhere"),
        (["--data", "data/raw/val.txt"], "shards"),
    ],
)
def test_train_flags(folder, words, told):
    "A flag with a value that makes no sense names itself."
    assert told in refused(
        folder,
        "train",
        *words,
        *([] if "--config" in words else ["--config", "tiny"]),
        "--out",
        "new",
    )


def test_corpus_shorter_than_one_sequence(folder):
    "Shards too short for the config's sequences are refused before anything is made."
    assert "--seq_len" in refused(
        folder, "train", "--config", "tiny", "--seq_len", 5_000_000, "--out", "new"
    )


# things that do not belong together


def test_tokenizer_that_does_not_match(folder):
    "Another tokenizer than the checkpoint's, or than the shards', is refused wherever it turns up."
    fine(course("tokenizer", "--vocab_size", 500, "--model_prefix", "other", cwd=folder))
    assert "other.model" in refused(folder, "eval", "--tok", "other.model")
    assert "other.model" in refused(folder, "generate", "--tok", "other.model")
    shutil.copytree(folder / "data/shards", folder / "mixed")
    shutil.copy(folder / "other.model", folder / "mixed/tokenizer.model")
    assert "tokenizer" in refused(
        folder, "train", "--config", "tiny", "--data", "mixed", "--out", "new"
    )
    fine(
        course(
            "prepare", "--tok", "other.model", "--seq_len", 64, "--out_dir", "others", cwd=folder
        )
    )
    assert "tokenizer" in refused(
        folder, "train", "--config", "tiny", "--data", "others", "--resume"
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["eval", "--ckpt", "nowhere"], "no checkpoint at nowhere"),
        (["eval", "--ckpt", "data/raw"], "no checkpoint"),
        (["eval", "--ckpt", "data/raw/val.txt"], "val.txt"),
        (["eval", "--tok", "nowhere.model"], "No tokenizer at nowhere.model"),
        (["eval", "--tok", "data/raw"], "No tokenizer"),
        (["eval", "--tok", "data/raw/val.txt"], "val.txt"),
        (["eval", "--stride", "0"], "--stride"),
        (["eval", "--stride", "65"], "stride"),
        (["eval", "--batch_size", "0"], "--batch_size"),
        (["prepare", "--tok", "nowhere.model"], "llm-course tokenizer"),
        (["prepare", "--seq_len", "0"], "--seq_len"),
        (["prepare", "--shard_tokens", "many"], "--shard_tokens"),
        (["prepare", "--val", "nowhere.txt"], "nowhere.txt"),
        (["prepare", "--val", "data/raw/corpus.txt"], "--val"),
        (["prepare", "--val_fraction", "2"], "--val_fraction"),
        (["prepare", "--out_dir", "data/raw"], "data/raw"),
        (["prepare", "--documents", "lines"], "'line'"),
        (["prepare", "--documents", ""], "documents"),
        (["prepare", "--errors", "ignore"], "--errors"),
        (["tokenizer", "--vocab_size", "-1"], "--vocab_size"),
        (["tokenizer", "--vocab_size", "270"], "too small"),
        (["corpus", "--stories", "0"], "--stories"),
        (["corpus", "extra"], "extra"),
        (["generate", "--max_new_tokens", "0"], "--max_new_tokens"),
        (["generate", "--max_new_tokens", "-5"], "--max_new_tokens"),
        (["generate", "--max_new_tokens", "ten"], "--max_new_tokens"),
        (["generate", "--temperature", "-1"], "--temperature"),
        (["generate", "--temperature", "nan"], "temperature"),
        (["generate", "--top_p", "0"], "top_p"),
        (["generate", "--n", "0"], "--n"),
        (["generate", "--prompt", "the " * 300], "shorten"),
        (["generate", "--prompt", "\udcff"], "Unicode"),
        (["generate", "--device", "abacus"], "abacus"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_flags(folder, words, told):
    "A flag with a value that cannot be used: its name, and what can be."
    assert told in refused(folder, *words)


def test_damaged_checkpoint(folder):
    "A checkpoint whose bytes have changed is not used."
    with open(folder / "artifacts/checkpoints/latest/model.safetensors", "r+b") as file:
        file.seek(2_000)
        file.write(b"\xff\xff")
    assert "model.safetensors" in refused(folder, "eval")


# places that cannot be written to

WRITERS = {
    "corpus": ["--folder", "{}/raw", "--stories", 20],
    "tokenizer": ["--model_prefix", "{}/t", "--vocab_size", 600],
    "prepare": ["--out_dir", "{}/shards", "--seq_len", 64],
    "train": ["--out", "{}/ckpt", "--config", "tiny"],
    "demo": ["--root", "{}/demo", "--config", "tiny", "--stories", 20],
}


@pytest.mark.parametrize("stage", WRITERS)
@pytest.mark.parametrize("kind", ["a file in the way", "no permission"])
def test_no_permission_to_write(folder, stage, kind):
    "A folder that cannot be made or written to is named."
    if kind == "no permission" and (os.name == "nt" or os.geteuid() == 0):
        pytest.skip("this user may write everywhere")
    if kind == "no permission":
        (folder / "locked").mkdir(mode=0o500)
    else:
        (folder / "locked").write_text("a file")
    assert "locked" in refused(
        folder, stage, *(str(arg).format("locked") for arg in WRITERS[stage])
    )


def test_a_text_in_a_folder_that_cannot_be_written(folder):
    "What is held out goes with the shards, so the text may lie where nothing can be written."
    (folder / "mine").mkdir()
    shutil.copy(folder / "data/raw/corpus.txt", folder / "mine/c.txt")
    (folder / "mine").chmod(0o500)
    fine(course("prepare", "--input", "mine/c.txt", "--seq_len", 16, cwd=folder))
    assert (folder / "data/shards/val.txt").exists()


def test_the_same_in_a_process_of_its_own(folder):
    "What a shell sees: one line, status 2."
    done = process("prepare", "--input", "nowhere.txt", cwd=folder)
    assert (done.code, done.out, len(done.lines)) == (2, "", 1) and done.lines[0].startswith(
        "llm-course prepare: "
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU torch.compile needs another compiler"
)
def test_compiling_without_a_compiler(folder):
    "The first step finds out; the sentence says whom to ask and how to go on."
    done = process(
        "train",
        "--config",
        "tiny",
        "--max_steps",
        1,
        "--compile",
        "true",
        "--out",
        "compiled",
        cwd=folder,
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"),
    )
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert "llm_course doctor`" in done.lines[-1] and "--compile false" in done.lines[-1]
