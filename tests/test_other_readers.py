"""Beside other programs: Megatron-core, datatrove and numpy read our shards, and what datatrove tokenizes becomes ours."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, course, fine, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_course.corpus import held_out, normalized
from llm_course.files import UserError
from llm_course.preparation import TokenFiles, huggingface_files
from llm_course.shards import TokenDataset, write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer

TALES = sample_tales(0, 300)
HANZI = [
    chr(i)
    for first, last in ((0x4E00, 0xA000), (0x3400, 0x4DC0), (0x20000, 0x2A6E0))
    for i in range(first, last)
][:65_600]
TRAPS = [
    "</s>",
    "<unk>",
    "<s>",
    "</ s>",
    "<0x41>",
    "\u2581",
    " ",
    "\r\n",
    "\n",
    "\t",
    "\0",
    "\ufeff",
    "a",
    "Once upon",
    "東",
    "🦊",
]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(TRAPS) | st.characters(codec="utf-8"), max_size=8).map("".join),
)
QUICK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=["2 bytes a token", "4 bytes a token"])
def tokenizer(request) -> Tokenizer:
    """A small vocabulary, and one of more than 65,536 pieces, most of them Chinese characters."""
    if request.param.startswith("2"):
        return train_tokenizer([*TALES, "東京 🦊"], 600)
    return train_tokenizer(
        [*TALES[:20], *("".join(HANZI[i : i + 100]) for i in range(0, len(HANZI), 100))], 66_000
    )


def tokenizer_json(tokenizer: Tokenizer, folder: Path) -> str:
    (folder / "tokenizer.json").write_bytes(huggingface_files(tokenizer)["tokenizer.json"])
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def datatrove(tokenizer, tmp_path_factory):
    """A function that has datatrove's DocumentTokenizer tokenize texts into a folder, as one of several processes."""
    tokens = pytest.importorskip("datatrove.pipeline.tokens")
    pytest.importorskip("tokenizers")
    from datatrove.data import Document
    from datatrove.utils.logging import logger

    logger.disable("datatrove")
    path = tokenizer_json(tokenizer, tmp_path_factory.mktemp("json"))

    def tokenize(texts: list[str], folder: Path, rank: int = 0, **options) -> Path:
        options = {
            "eos_token": "</s>",
            "shuffle_documents": False,
            "tokenizer_name_or_path": path,
        } | options
        step = tokens.DocumentTokenizer(str(folder), **options)
        step.run((Document(text=text, id=str(i)) for i, text in enumerate(texts)), rank, 8)
        return folder

    return tokenize


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode_document(text) for text in texts]


def documents_of(shards: TokenDataset) -> list[list[int]]:
    return [shards.document(j).tolist() for j in range(shards.documents)]


# Others read ours


def with_numpy(folder: Path, name: str, dtype: str) -> list[list[int]]:
    tokens = np.memmap(folder / f"{name}.bin", dtype, "r")
    ends = np.memmap(folder / f"{name}.bin.index", "<u8", "r").astype(int)
    return [document.tolist() for document in np.split(tokens, ends[:-1])]


def with_megatron(folder: Path, name: str, dtype: str) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Megatron-core says at length which of its own accelerators are missing
        indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = indexed.IndexedDataset(str(folder / name))
    assert dataset.index.dtype == {"<u2": np.uint16, "<u4": np.int32}[dtype]
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def with_datatrove(folder: Path, name: str, dtype: str) -> list[list[int]]:
    dataset = pytest.importorskip("datatrove.utils.dataset")
    item, path = np.dtype(dtype).itemsize, folder / f"{name}.bin"
    whole = path.stat().st_size // item
    read = dataset.DatatroveFileDataset(
        str(path), whole - 1, token_size=item, return_positions=True
    )[0]
    starts = np.flatnonzero(read["positions"].numpy() == 0)
    return [document.tolist() for document in np.split(read["input_ids"].numpy(), starts[1:])]


@pytest.mark.parametrize("reader", [with_numpy, with_megatron, with_datatrove])
@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=12), shard_tokens=st.sampled_from([1, 20, 10**6]))
def test_others_find_the_same_documents(tmp_path_factory, tokenizer, reader, texts, shard_tokens):
    """Any documents, empty ones too, in one shard or many: every reader finds each document, whole and in order."""
    folder, texts = tmp_path_factory.mktemp("shards"), ["ab", *texts]
    manifest = write_shards(
        texts, tokenizer, folder, val_documents=[], seq_len=1, shard_tokens=shard_tokens
    )
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest.dtype]
    found = [
        document
        for shard in manifest.splits["train"]
        for document in reader(folder, shard.name, dtype)
    ]
    assert found == encoded(tokenizer, texts)


def test_datatrove_reads_a_folder_of_shards(tmp_path, tokenizer):
    """A pattern picks the split; windows that cross documents and their positions are those that the tokens say."""
    dataset = pytest.importorskip("datatrove.utils.dataset")
    manifest = write_shards(
        TALES[:40],
        tokenizer,
        tmp_path / "s",
        val_documents=TALES[40:50],
        seq_len=32,
        shard_tokens=2000,
    )
    options = dict(token_size=np.dtype(manifest.dtype).itemsize, return_positions=True)
    for split in ("train", "val"):
        by_index = dataset.DatatroveFolderDataset(
            str(tmp_path / "s"), 32, f"{split}-*.bin", **options
        )
        by_token = dataset.DatatroveFolderDataset(
            str(tmp_path / "s"),
            32,
            f"{split}-*.bin",
            **options,
            positions_from_eos_token_id=tokenizer.eos_id,
        )
        assert (
            len(by_index.files) == len(manifest.splits[split])
            and len(by_index) == len(by_token) > 0
        )
        for i in range(len(by_index)):
            a, b = by_index[i], by_token[i]
            assert (
                a["input_ids"].tolist() == b["input_ids"].tolist()
                and a["positions"].tolist() == b["positions"].tolist()
            )


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_datatrove_shuffles_our_shards(tmp_path, tokenizer):
    """With links that end in .ds, datatrove's merger shuffles the documents of all our shards, and we read the result."""
    merger = pytest.importorskip("datatrove.pipeline.tokens.merger")
    manifest = write_shards(
        TALES[:60], tokenizer, tmp_path / "s", val_documents=[], seq_len=32, shard_tokens=3000
    )
    (tmp_path / "links").mkdir()
    for shard in manifest.splits["train"]:
        for ending in ("", ".index"):
            (tmp_path / "links" / f"{shard.name}.ds{ending}").symlink_to(
                tmp_path / "s" / f"{shard.name}.bin{ending}"
            )
        item = np.dtype(manifest.dtype).itemsize
        (tmp_path / "links" / f"{shard.name}.ds.metadata").write_text(
            f"ours|{item}\n{shard.tokens}\n"
        )
    step = merger.DocumentTokenizerMerger(
        str(tmp_path / "links"), str(tmp_path / "merged"), "all", seed=0, progress=False
    )
    step.run()
    [file] = (tmp_path / "merged").glob("*.ds")
    texts = list(TokenFiles(file, tokenizer))
    assert sorted(texts) == sorted(TALES[:60]) and texts != TALES[:60]


# We read what datatrove wrote


@pytest.mark.parametrize("shuffle", [False, True])
@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_text_through_datatrove(tmp_path_factory, tokenizer, datatrove, shuffle, texts, seed):
    """Any text that datatrove tokenizes comes back as itself, in the tokens that we make, special pieces' names in it or not."""
    folder = datatrove(
        texts, tmp_path_factory.mktemp("tokens"), shuffle_documents=shuffle, seed=seed
    )
    read = [normalized(text) for text in texts if text.strip()]
    files, ours = TokenFiles(folder, tokenizer), list(zip(read, encoded(tokenizer, read)))
    found = [(document.text, document.ids.tolist()) for document in files.tokenized()]
    assert sorted(found) == sorted(ours) if shuffle else found == ours
    assert files.documents == len(texts) and files.tokens >= len(texts)
    assert files.mended == sum("</s>" in text or "<unk>" in text for text in texts)


def test_the_same_shards_either_way(tmp_path, tokenizer, datatrove):
    """Text by way of datatrove, in several processes, and by ours: the same folder byte for byte, validation given or not."""
    texts = [*TALES[:150], "", "old <s>price</s> new", "</s>", "<unk>\u2581\r\n", *TALES[150:]]
    for rank in range(3):
        datatrove(
            texts[len(texts) * rank // 3 : len(texts) * (rank + 1) // 3], tmp_path / "tokens", rank
        )
    read = [normalized(text) for text in texts if text]
    for i, options in enumerate(
        [
            {},
            {"val_fraction": 0.1},
            {"val_documents": [*texts[:5], "another"]},
            {"val_documents": []},
        ]
    ):
        options |= {"seq_len": 64, "shard_tokens": 20_000}
        files = TokenFiles(str(tmp_path / "tokens" / "*.ds"), tokenizer)
        assert len(files.files) == 3
        here = write_shards(read, tokenizer, tmp_path / f"ours {i}", **options)
        assert (
            write_shards(files.tokenized(), tokenizer, tmp_path / f"theirs {i}", **options) == here
        )
        assert snapshot(tmp_path / f"ours {i}") == snapshot(tmp_path / f"theirs {i}")
        assert files.mended == 3
    held = encoded(tokenizer, [text for text in read if held_out(text, 0.1)])
    assert documents_of(TokenDataset(tmp_path / "theirs 1", "val")) == held != []


def test_what_else_datatrove_writes(tmp_path, tokenizer, datatrove):
    """Loss masks, metadata, files cut at a number of tokens and a process that had no documents are all in order."""
    datatrove(
        TALES[:20],
        tmp_path,
        0,
        shuffle_documents=True,
        max_tokens_per_file=1000,
        save_loss_metadata=True,
    )
    datatrove([], tmp_path, 1)
    datatrove(TALES[20:30], tmp_path, 2, save_filename="part")
    files = TokenFiles(tmp_path, tokenizer)
    assert len(files.files) > 4 and len(list(tmp_path.glob("*.loss"))) > 2
    assert sorted(files) == sorted(TALES[:30])


@pytest.mark.parametrize("options, sentence", [
    ({"eos_token": None}, "document 0 does not end with </s>; give DocumentTokenizer .*eos_token"),
    ({"shuffle_chunk_size": 64}, "does not end with </s>.* no shuffle_chunk_size"),
    ({"save_index": False}, "index cannot be read"),
])  # fmt: skip
def test_settings_that_lose_documents(tmp_path, tokenizer, datatrove, options, sentence):
    """Where datatrove was told not to say, or not to keep, where documents end, the sentence says what to tell it."""
    datatrove(TALES[:20], tmp_path, **options)
    with pytest.raises(UserError, match=sentence):
        write_shards(
            TokenFiles(tmp_path, tokenizer).tokenized(), tokenizer, tmp_path / "s", seq_len=32
        )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("other", [500, 600, 700])
def test_another_tokenizer(tmp_path, tokenizer, datatrove, other):
    """Tokens of another tokenizer are refused, whether its vocabulary is smaller, as large, or larger."""
    another = train_tokenizer(sample_tales(7, 100) + ["quite another language"] * 50, other)
    datatrove(TALES[:20], tmp_path, tokenizer_name_or_path=tokenizer_json(another, tmp_path))
    with pytest.raises(UserError, match="the work of another tokenizer"):
        list(TokenFiles(tmp_path, tokenizer))


def test_train_on_what_datatrove_wrote(tmp_path, tokenizer, datatrove):
    """The real training runs on the result."""
    from llm_course.config import load_config
    from llm_course.pipeline import train

    datatrove(TALES[:50], tmp_path / "tokens", shuffle_documents=True)
    write_shards(
        TokenFiles(tmp_path / "tokens", tokenizer).tokenized(),
        tokenizer,
        tmp_path / "s",
        val_fraction=0.1,
        seq_len=32,
    )
    config = load_config(
        "tiny", {"max_steps": 2, "seq_len": 32, "vocab_size": tokenizer.vocab_size, "batch_size": 2}
    )
    result = train(
        config,
        tmp_path / "s",
        tmp_path / "run",
        device="cpu",
        progress=False,
        log=lambda line: None,
    )
    assert result.steps == 2 and abs(result.loss - np.log(tokenizer.vocab_size)) < 1


# README.md, section "Scaling"


def test_the_script_in_the_readme(tmp_path):
    """The script on the page runs as it stands, the command below takes what it wrote, and the shards are those of the text."""
    for library in ("datatrove", "tokenizers", "orjson"):
        pytest.importorskip(library)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
        if "datatrove" in block
    ]
    commands = re.findall(r"^llm-course (prepare .*\.ds.*)$", page, re.M)
    assert len(scripts) == len(commands) == 1, (
        "README.md should have one script for datatrove, and one command for its files"
    )
    (tmp_path / "data" / "raw").mkdir(parents=True)
    texts = [*TALES, "old <s>price</s> new"]
    for i in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i::3]]
        (tmp_path / "data" / "raw" / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(TALES, 600).save(tmp_path / "artifacts" / "tokenizer" / "llm_spm.model")
    (tmp_path / "tokenize_corpus.py").write_text(scripts[0], encoding="utf-8")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    run = [sys.executable, "tokenize_corpus.py"]
    done = subprocess.run(
        run,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = fine(course(*shlex.split(commands[0]), cwd=tmp_path))
    assert f"{len(texts)} documents" in said and "Mended: 1 document whose" in said
    fine(
        course(
            "prepare",
            "--input",
            "data/raw/*.jsonl",
            "--val",
            "data/shards/val.txt",
            "--out_dir",
            "of_text",
            cwd=tmp_path,
        )
    )
    for split in ("train", "val"):
        tokens, text = (
            documents_of(TokenDataset(tmp_path / folder, split))
            for folder in ("data/shards", "of_text")
        )
        assert sorted(tokens) == sorted(text) and tokens, (
            "shuffled by the way, but the same documents"
        )
