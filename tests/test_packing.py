"""Shards: every token once, the same for any number of files, readable by others, safe against interruption and damage."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course import preparation
from llm_course.corpus import held_out, normalized
from llm_course.files import UserError
from llm_course.packing import IGNORE_INDEX, batch_indices, feistel_permutation, get_batch
from llm_course.preparation import (
    TokenFiles,
    _chunks,
    _encode_all,
    _tokenized,
    token_files,
    tokenize_in_parallel,
)
from llm_course.shards import (
    Manifest,
    TokenDataset,
    Tokenized,
    read_ends,
    tokenize_documents,
    write_ends,
    write_shards,
)
from llm_course.tales import sample_tales, tales
from llm_course.tokenizer import id_dtype, train_tokenizer

TALES = sample_tales(0, 60)
TOKENIZER = train_tokenizer([*TALES, "東京 🦊"], 600)


def stream_of(documents) -> list[int]:
    return [i for document in documents for i in TOKENIZER.encode_document(document)]


def among(document: str, others: list[str]) -> bool:
    """Whether a document is one of the others, whatever its line endings."""
    return any(
        document.replace("\r\n", "\n").strip("\r\n") == other.replace("\r\n", "\n").strip("\r\n")
        for other in others
    )


def put(folder: Path, name: str, documents: list[list[int]], dtype: str = "<u2") -> Path:
    """A token file and its index, as datatrove writes them."""
    folder.mkdir(exist_ok=True)
    np.array([i for document in documents for i in document], dtype).tofile(folder / f"{name}.ds")
    write_ends(folder / f"{name}.ds.index", [len(document) for document in documents])
    return folder / f"{name}.ds"


@pytest.fixture
def folder(tmp_path):
    write_shards(
        TALES,
        TOKENIZER,
        tmp_path / "shards",
        val_documents=sample_tales(1, 10),
        seq_len=32,
        shard_tokens=3000,
    )
    return tmp_path / "shards"


@settings(max_examples=40, deadline=None)
@given(
    train=st.lists(st.text(max_size=30), min_size=1, max_size=20),
    val=st.lists(st.text(max_size=30), max_size=5),
    shard_tokens=st.integers(8, 200),
    seq_len=st.integers(1, 20),
)
def test_every_token_once(tmp_path_factory, train, val, shard_tokens, seq_len):
    """Any documents, empty ones and all scripts, any shard size: the stream is the documents, each once and in order."""
    out, kept = (
        tmp_path_factory.mktemp("any"),
        [document for document in train if not among(document, val)],
    )
    if len(stream_of(kept)) <= seq_len:
        with pytest.raises(UserError, match=f"needs {seq_len + 1}"):
            write_shards(
                train, TOKENIZER, out, val_documents=val, seq_len=seq_len, shard_tokens=shard_tokens
            )
        return
    manifest = write_shards(
        iter(train),
        TOKENIZER,
        out,
        val_documents=iter(val),
        seq_len=seq_len,
        shard_tokens=shard_tokens,
    )
    assert manifest == Manifest.load(out) and manifest.excluded == len(train) - len(kept)
    for split, documents in (("train", kept), ("val", val)):
        stream, shards = stream_of(documents), TokenDataset(out, split)
        shards.verify()
        assert shards.tokens == manifest.tokens(split) == len(stream) and shards.documents == len(
            documents
        )
        assert len(shards) == max(len(stream) - 1, 0) // seq_len
        for i in range(len(shards)):
            assert (
                shards[i].tolist() == stream[i * seq_len : (i + 1) * seq_len + 1]
                and shards[i].dtype == np.int64
            )
        assert [TOKENIZER.decode(shards.document(j)) for j in range(len(documents))] == documents
        assert sum(s.bytes for s in shards.shards) == sum(len(d.encode()) for d in documents)
        assert all(s.tokens <= shard_tokens or s.documents == 1 for s in shards.shards)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    shard_tokens=st.integers(5, 200),
    seq_len=st.integers(1, 50),
)
def test_aligned_sequences(tmp_path_factory, lengths, shard_tokens, seq_len):
    """They end where documents end, as many as fit, but for documents longer than one; every token is a target once."""
    documents = ["x" * length for length in lengths]
    stream = stream_of(documents)
    if len(stream) <= seq_len:
        return
    out = tmp_path_factory.mktemp("aligned") / "s"
    write_shards(
        documents, TOKENIZER, out, val_documents=[], seq_len=seq_len, shard_tokens=shard_tokens
    )
    shards = TokenDataset(out, document_aligned=True)
    ends = (
        np.cumsum([len(stream_of([document])) for document in documents]) - 1
    )  # where each `</s>` stands
    at = 0
    for i in range(len(shards)):
        length = int(shards.lengths([i])[0])
        assert shards[i].tolist() == stream[at : at + length + 1] and 1 <= length <= seq_len
        fitting = [end for end in ends if at < end <= at + seq_len]
        assert at + length == (fitting[-1] if fitting else at + seq_len)
        assert set(shards.documents_in(i)) == set(
            np.searchsorted(ends, np.arange(at, at + length + 1)).tolist()
        )
        at += length
    assert at == len(stream) - 1 and shards.mean_length == at / len(shards)


def test_number_of_shards_does_not_matter(tmp_path):
    """Training sequences and validation are the same in one shard and in a shard for each document."""
    for name, size in (("one", 10**9), ("some", 1000), ("each", 1)):
        write_shards(
            TALES[:20],
            TOKENIZER,
            tmp_path / name,
            val_documents=sample_tales(1, 5),
            seq_len=64,
            shard_tokens=size,
        )
    for split in ("train", "val"):
        one, some, each = (TokenDataset(tmp_path / name, split) for name in ("one", "some", "each"))
        assert len(one.shards) == 1 < len(some.shards) < len(each.shards) == each.documents
        for i in range(len(one)):
            assert (one[i] == some[i]).all() and (one[i] == each[i]).all()


@pytest.mark.parametrize(
    "vocab_size, dtype, code", [(600, "<u2", 8), (65_536, "<u2", 8), (65_537, "<u4", 4)]
)
def test_others_read_the_same_bytes(tmp_path, vocab_size, dtype, code):
    """The index follows Megatron-core's IndexedDataset field by field, for two and four bytes a token; datatrove's has ends."""

    class Large:  # a tokenizer of any size, whose document is one token, the largest
        model, sha256, eos_id = b"", hashlib.sha256(b"").hexdigest(), 1
        encode_array = staticmethod(
            lambda text: np.array([int(text), vocab_size - 1], id_dtype(vocab_size))
        )
        save = staticmethod(lambda path: path.write_bytes(b""))

    Large.vocab_size = vocab_size
    plain = lambda routed, tokenizer: (
        (split, Tokenized(text, tokenizer.encode_array(text))) for split, text in routed
    )
    write_shards(
        ["5", "6", "7"], Large, tmp_path / "s", val_documents=[], seq_len=2, tokenize=plain
    )
    raw = (tmp_path / "s" / "train-00000.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00" and struct.unpack("<QBQQ", raw[9:34]) == (1, code, 3, 4)
    size = np.dtype(dtype).itemsize
    assert np.frombuffer(raw, "<i4", 3, 34).tolist() == [2, 2, 2]
    assert np.frombuffer(raw, "<i8", 3, 46).tolist() == [0, 2 * size, 4 * size]
    assert np.frombuffer(raw, "<i8", 4, 70).tolist() == [0, 1, 2, 3] and len(raw) == 102
    assert np.fromfile(tmp_path / "s" / "train-00000.bin.index", "<u8").tolist() == [2, 4, 6]
    last = vocab_size - 1
    assert np.fromfile(tmp_path / "s" / "train-00000.bin", dtype).tolist() == [
        5,
        last,
        6,
        last,
        7,
        last,
    ]
    assert TokenDataset(tmp_path / "s").document(2).tolist() == [7, last]


def test_validation_is_held_out_by_itself(tmp_path):
    """Without validation documents, those that `held_out` names are it, and no document is on both sides."""
    documents = list(itertools.islice(tales(0), 400))
    write_shards(documents, TOKENIZER, tmp_path / "s", seq_len=32)
    val, train = TokenDataset(tmp_path / "s", "val"), TokenDataset(tmp_path / "s")
    assert [TOKENIZER.decode(val.document(j)) for j in range(val.documents)] == [
        d for d in documents if held_out(d)
    ]
    assert train.documents + val.documents == len(documents) and val.documents > 0


def test_same_bytes_again(folder, tmp_path):
    """Writing again gives the same files, over an older set with more shards, and leaves nothing beside them."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_shards(TALES, TOKENIZER, folder, val_documents=[], seq_len=32, shard_tokens=100)
    assert len(list(folder.glob("train-*.bin"))) > 20
    write_shards(
        TALES, TOKENIZER, folder, val_documents=sample_tales(1, 10), seq_len=32, shard_tokens=3000
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["shards"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, ValueError])
def test_interrupted(folder, tmp_path, error):
    """A run that stops in the middle leaves the old shards and nothing else."""

    def documents():
        yield from TALES[:30]
        raise error("stop")

    before = Manifest.load(folder)
    with pytest.raises(error):
        write_shards(documents(), TOKENIZER, folder, seq_len=32)
    assert Manifest.load(folder) == before and os.listdir(tmp_path) == ["shards"]
    TokenDataset(folder).verify()


def test_killed_between_the_two_renames(folder, tmp_path):
    """The old folder has been put aside and the new one not yet put in place: the old one comes back by itself."""
    before = Manifest.load(folder)
    (tmp_path / ".shards.new").mkdir()
    folder.rename(tmp_path / ".shards.old")
    assert Manifest.load(folder) == before
    write_shards(TALES, TOKENIZER, folder, val_documents=[], seq_len=16)
    assert Manifest.load(folder).seq_len == 16 and os.listdir(tmp_path) == ["shards"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Documents stream through: ten times the text takes hardly more memory."""

    def peak(n):
        tracemalloc.start()
        write_shards(
            (TALES[i % 60] for i in range(n)),
            TOKENIZER,
            tmp_path / "s",
            val_documents=[],
            seq_len=32,
        )
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(10)
    assert peak(800) < peak(80) + 200_000


def test_progress_counts_bytes(tmp_path):
    """The progress of a run adds up to the UTF-8 bytes of all that was read, documents left out included."""
    done = []
    write_shards(
        TALES, TOKENIZER, tmp_path / "s", val_documents=TALES[:2], seq_len=32, progress=done.append
    )
    assert sum(done) == sum(len(d.encode()) for d in TALES + TALES[:2])


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    epochs=st.integers(1, 3),
)
def test_every_sequence_once_an_epoch(n, batch_size, seed, epochs):
    """For any number, batch size and seed, the batches in a row visit every sequence once before any comes again."""
    steps = -(-n * epochs // batch_size)
    order = np.concatenate([batch_indices(n, batch_size, seed, step) for step in range(steps)])
    assert order.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_is_a_fixed_function():
    """The order is the same on every machine and in every version: these numbers must never change."""
    assert batch_indices(1000, 8, seed=0, step=3).tolist() == [
        720,
        597,
        165,
        753,
        101,
        66,
        223,
        301,
    ]
    assert batch_indices(10**9, 4, seed=1, step=10**6).shape == (4,)
    assert batch_indices(1000, 8, 0, 3).tolist() != batch_indices(1000, 8, 1, 3).tolist()


def test_order_is_well_shuffled():
    """Over many epochs every sequence comes to every place about as often (chi-square within five sigma)."""
    n, epochs = 10, 3000
    table = np.zeros((n, n))
    for epoch in range(epochs):
        table[np.arange(n), feistel_permutation(np.arange(n), n, 7, epoch)] += 1
    chi2, freedom = ((table - epochs / n) ** 2 / (epochs / n)).sum(), (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=10, max_size=30),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**63),
    seq_len=st.integers(1, 80),
)
def test_aligned_batches(tmp_path_factory, lengths, batch_size, seed, seq_len):
    """A batch has the sequences that batch_indices names, the shortest first; what fills them up is ignored."""
    out = tmp_path_factory.mktemp("aligned") / "s"
    write_shards(
        ["x" * length for length in lengths], TOKENIZER, out, val_documents=[], seq_len=seq_len
    )
    shards = TokenDataset(out, document_aligned=True)
    if shards.tokens <= seq_len:
        return
    for step in range(4):
        x, y = get_batch(shards, step, batch_size, seed)
        assert x.shape == y.shape == (batch_size, seq_len)
        sequences = sorted(
            (shards[int(i)].tolist() for i in batch_indices(len(shards), batch_size, seed, step)),
            key=len,
        )
        for sequence, inputs, targets in zip(sequences, x, y):
            assert inputs.tolist() == (sequence + [0] * seq_len)[:seq_len]
            assert targets.tolist() == sequence[1:] + [IGNORE_INDEX] * (seq_len + 1 - len(sequence))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_make_the_batch(folder, world_size):
    """The ranks' parts in order are the batch of one process, inputs and targets."""
    shards = TokenDataset(folder)
    for step in (0, 7, 1000):
        x, y = get_batch(shards, step, 6, seed=3)
        parts = [get_batch(shards, step, 6, 3, rank, world_size) for rank in range(world_size)]
        assert (np.concatenate([p[0] for p in parts]) == x).all() and (
            np.concatenate([p[1] for p in parts]) == y
        ).all()
        assert x.shape == y.shape == (6, 32) and (x[:, 1:] == y[:, :-1]).all()


def test_another_length(folder):
    """Shards can be read at another length than they were made for; too great a length gets a sentence."""
    assert TokenDataset(folder, seq_len=100)[0].shape == (101,)
    with pytest.raises(UserError, match="needs 1,000,001"):
        get_batch(TokenDataset(folder, seq_len=10**6), 0, 1, 0)
    with pytest.raises(UserError, match="does not divide"):
        get_batch(TokenDataset(folder), 0, 4, 0, 0, 3)
    for i in (-1, 10**9):
        with pytest.raises(IndexError):
            TokenDataset(folder)[i]


@pytest.mark.parametrize("change", [
    dict(seq_len="32"), dict(vocab_size=1.5), dict(vocab_size=True), dict(tokenizer_sha256=None), dict(dtype="float32"),
    dict(splits=[]), dict(splits={"train": 3}), dict(splits={"train": [{}]}), dict(splits={"train": [3]}), dict(excluded=None),
    dict(seq_len=0), dict(splits={"train": [dict(name="../x", tokens=1, documents=1, bytes=1, sha256="")]}),
])  # fmt: skip
def test_ill_formed_manifest(folder, change):
    """A manifest with a missing field or another type gets a sentence that names the file."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="manifest.json"):
        TokenDataset(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", "\udcff"])
def test_broken_manifest(folder, content):
    """A manifest that is no JSON object gets a sentence."""
    (folder / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="manifest.json"):
        TokenDataset(folder)


def test_damage(folder):
    """A flipped bit, a cut file, a missing file and an index that is none are each found and named."""
    path = folder / "train-00001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:99] + bytes([whole[99] ^ 4]) + whole[100:])
    with pytest.raises(UserError, match="train-00001.bin is damaged"):
        TokenDataset(folder).verify()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="train-00001.bin has"):
        TokenDataset(folder)
    path.unlink()
    with pytest.raises(UserError, match="train-00001.bin is missing"):
        TokenDataset(folder)
    index = (folder / "val-00000.idx").read_bytes()
    for damaged in (b"", b"something else, but as long as an index may be", index[:-1]):
        (folder / "val-00000.idx").write_bytes(damaged)
        with pytest.raises(UserError, match="val-00000.idx is missing, or not an index"):
            TokenDataset(folder, "val").document(0)
    (folder / "val-00000.idx").write_bytes(index)
    ends = read_ends(folder / "val-00000.bin.index")
    for wrong in (
        ends[:-1],
        ends[1:],
        np.sort([*ends[1:], 5]),
        [*ends, ends[-1]],
        [*ends[:-1], ends[-1] + 1],
    ):
        np.asarray(wrong, "<u8").tofile(folder / "val-00000.bin.index")
        with pytest.raises(UserError, match="val-00000.bin.index is damaged"):
            TokenDataset(folder, "val").verify()
    (folder / "val-00000.bin.index").unlink()
    with pytest.raises(UserError, match="val-00000.bin.index is missing"):
        TokenDataset(folder, "val").verify()


@pytest.mark.parametrize(
    "name", ["manifest.json", "train-00000.bin", "train-00000.idx", "train-00000.bin.index"]
)
def test_one_bit_is_found(name, folder):
    """Of whatever file: in the first byte, in the last, and somewhere between; and so is a byte too few or too many."""
    path = folder / name
    whole = path.read_bytes()
    flips = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :]
        for i in {0, 8, len(whole) // 2, len(whole) - 2}
    ]
    for damaged in (*flips, whole[:-3], whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(name)):
            TokenDataset(folder).verify()


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no folders")
def test_two_runs_do_not_mix(folder):
    """The second to come is told so, and what the first writes is whole."""

    def first():
        yield from TALES[:50]
        with pytest.raises(UserError, match="Another run is writing to .*shards.new"):
            write_shards(TALES, TOKENIZER, folder, seq_len=8)
        yield from TALES[50:]

    manifest = write_shards(first(), TOKENIZER, folder, seq_len=8, val_documents=[])
    assert sum(shard.documents for shard in manifest.splits["train"]) == len(TALES)
    TokenDataset(folder).verify()
    assert not list(folder.parent.glob(".*"))


def test_wrong_places(folder, tmp_path):
    """No shards, a file where a folder should be, a folder with other things, a split that is not there."""
    for place in (tmp_path / "nowhere", tmp_path, folder / "manifest.json"):
        with pytest.raises(UserError, match="No shards in"):
            TokenDataset(place)
    with pytest.raises(UserError, match="no split 'test'"):
        TokenDataset(folder, "test")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_shards(TALES, TOKENIZER, tmp_path / "file")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        write_shards(TALES, TOKENIZER, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="at least 1"):
        write_shards(TALES, TOKENIZER, tmp_path / "s", seq_len=0)


@pytest.mark.skipif(os.name != "posix", reason="a place that nobody can write to")
def test_a_place_that_cannot_be_written():
    """An output folder that cannot be made gets a sentence."""
    with pytest.raises(UserError, match="cannot be written"):
        write_shards(TALES, TOKENIZER, "/proc/shards", seq_len=32)


def test_symlink_is_followed(folder, tmp_path):
    """A link to a folder on another disk stays a link."""
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    write_shards(TALES, TOKENIZER, tmp_path / "link", val_documents=[], seq_len=16)
    assert (tmp_path / "link").is_symlink() and Manifest.load(folder).seq_len == 16


def test_other_tokenizer(folder):
    """The shards know their tokenizer, and carry a copy."""
    manifest = Manifest.load(folder)
    manifest.check_tokenizer(TOKENIZER)
    assert (folder / "tokenizer.model").read_bytes() == TOKENIZER.model
    with pytest.raises(UserError, match="another tokenizer"):
        dataclasses.replace(manifest, tokenizer_sha256="0" * 64).check_tokenizer(TOKENIZER)


def test_validation_that_is_the_training_text(tmp_path):
    """The same file given as both is told for what it is."""
    with pytest.raises(UserError, match="60 documents were left out because validation has them"):
        write_shards(TALES, TOKENIZER, tmp_path / "s", val_documents=TALES, seq_len=32)


def test_validation_ends_its_lines_otherwise(tmp_path):
    """A training document whose copy in validation has lost its last line ending, or has other ones, is left out as well."""
    train = [*TALES, "one\r\ntwo\r\n", "three\n", "four"]
    manifest = write_shards(
        train, TOKENIZER, tmp_path / "s", val_documents=["one\ntwo", "three", "\nfour"], seq_len=32
    )
    assert manifest.excluded == 3 and sum(
        shard.documents for shard in manifest.splits["train"]
    ) == len(TALES)


# Token files, as datatrove writes them; tests/test_other_readers.py has datatrove itself

NAMES = st.sampled_from(["</s>", "<unk>", "\u2581", "\r\n", "\0", " ", "a"])
TEXTS = st.lists(NAMES | st.text(max_size=9), max_size=9).map("".join)


def as_raw(text: str) -> list[int]:
    """The tokens of a document as the `tokenizers` library makes them: it looks for the names of special pieces first."""
    special = {"</s>": [TOKENIZER.eos_id], "<unk>": [TOKENIZER.unk_id]}
    parts = re.split("(</s>|<unk>)", text)
    return [i for part in parts for i in special.get(part) or TOKENIZER.encode(part)] + [
        TOKENIZER.eos_id
    ]


@settings(max_examples=50, deadline=None)
@given(
    files=st.lists(st.lists(TEXTS, max_size=8), min_size=1, max_size=4), block=st.integers(1, 40)
)
def test_token_files(tmp_path_factory, files, block):
    """Any documents in any number of files, read in blocks of any size: texts and tokens as if we had read and tokenized them."""
    folder, texts = tmp_path_factory.mktemp("tokens"), [text for file in files for text in file]
    for i, file in enumerate(files):
        put(folder, f"{i:05d}", [as_raw(text) for text in file])
    if not texts:
        with pytest.raises(UserError, match="holds no documents"):
            TokenFiles(folder, TOKENIZER)
        return
    corpus = TokenFiles(folder, TOKENIZER)
    found = list(corpus.tokenized(block))
    right = [normalized(text) for text in texts if text.strip()]
    assert [(d.text, d.ids.tolist()) for d in found] == [
        (text, TOKENIZER.encode_document(text)) for text in right
    ]
    assert corpus.mended == sum(
        "</s>" in text or "<unk>" in text for text in texts
    ) and corpus.documents == len(texts)


BREAKS = train_tokenizer(
    ["the end.\n\nthe end\r\nthe\n\n\nend.\n", "end.\r\n\r\nthe\rthe\r\r"] * 40,
    300,
    log=lambda line: None,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\n", "\r\n", "\r", "\n\n", ".", " ", "the", " end", ".\n", "x"]),
        max_size=14,
    ).map("".join)
)
def test_line_breaks_around_a_document_of_tokens(tmp_path_factory, text):
    """They go, as from a text, and the tokens that stay are those that we make of what is left; a blank document goes altogether."""
    folder, normal = tmp_path_factory.mktemp("breaks"), normalized(text)
    put(folder, "a", [BREAKS.encode_document("the end"), BREAKS.encode_document(text)])
    found = list(TokenFiles(folder, BREAKS).tokenized())[1:]
    assert [(d.text, d.ids.tolist()) for d in found] == [
        (normal, BREAKS.encode_document(normal))
    ] * bool(text.strip())


def test_token_files_for_validation_are_not_trained_on(tmp_path):
    """Where a file for validation lies among the others, it is left out."""
    for name in ("a", "b"):
        put(tmp_path, name, [TOKENIZER.encode_document(name)])
    assert list(TokenFiles(tmp_path, TOKENIZER, leave_out=tmp_path / "b.ds")) == ["a"]
    with pytest.raises(UserError, match="no .ds files to train on"):
        TokenFiles(tmp_path / "b.ds", TOKENIZER, leave_out=tmp_path)


def test_where_token_files_are(tmp_path):
    """A file, a folder, a glob; other files beside them are left alone; where there are none, a sentence."""
    files = [put(tmp_path / "tokens", name, [[1]]) for name in ("a", "b", "c")]
    for other in ("a.ds.loss", "a.ds.metadata", "notes.txt"):
        (tmp_path / "tokens" / other).write_text("")
    (tmp_path / "tokens" / "d.ds").mkdir()
    assert (
        token_files(tmp_path / "tokens")
        == token_files(f"{tmp_path}/tokens/*")
        == token_files(f"{tmp_path}/**/*.ds")
        == files
    )
    assert token_files(files[1]) == files[1:2]
    for nothing in (
        tmp_path,
        tmp_path / "tokens" / "notes.txt",
        tmp_path / "missing.ds",
        "corpus.txt",
    ):
        assert token_files(nothing) == []
        with pytest.raises(UserError, match="names no .ds files"):
            TokenFiles(nothing, TOKENIZER)


@pytest.mark.parametrize("documents, sentence", [
    ([[600, 1]], "holds token 600, and the vocabulary has but 600; .* another tokenizer"),
    ([[300, 1], [65_535, 1]], "holds token 65,535"),
    ([[300, 1], [301, 302]], "document 1 does not end with </s>; give DocumentTokenizer .*eos_token"),
    ([[300, 1], [], [301, 1]], "document 1 does not end with </s>"),
    ([[]], "document 0 does not end with </s>"),
    ([[2 + 0xE6, 1]], "document 0 is not UTF-8; .* another tokenizer"),
    ([[2 + 0x41, 2 + 0x6E, 2 + 0x64, 1]], "this tokenizer writes document 0, 'And'…, in other tokens"),
])  # fmt: skip
def test_token_files_that_are_not_ours(tmp_path, documents, sentence):
    """What this tokenizer does not make is refused, with the file, the document and what to do."""
    path = put(tmp_path, "x", documents)
    with pytest.raises(UserError, match=sentence) as error:
        write_shards(TokenFiles(path, TOKENIZER).tokenized(), TOKENIZER, tmp_path / "s", seq_len=1)
    assert (
        str(path) in str(error.value)
        and "\n" not in str(error.value)
        and not (tmp_path / "s").exists()
    )


def test_token_files_that_do_not_fit(tmp_path):
    """Another size of token, a file or an index that is cut, an index that goes back, and none at all are each told apart."""
    documents = [TOKENIZER.encode_document(tale) for tale in TALES[:5]]
    path = put(tmp_path, "x", documents, "<u4")
    with pytest.raises(UserError, match="4 bytes a token, and a vocabulary of 600 takes 2"):
        TokenFiles(path, TOKENIZER)
    put(tmp_path, "x", documents)
    whole, index = path.read_bytes(), Path(f"{path}.index").read_bytes()
    for cut in (b"", whole[:-1], whole[:-2], whole + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="its index counts"):
            TokenFiles(path, TOKENIZER)
    path.write_bytes(whole)
    for sentence, others in (
        ("is not an index", (index[:-1], index[8:16] + index, index[:-8] + b"\xff" * 8)),
        ("its index counts", (index[:-8], b"")),
    ):
        for other in others:
            Path(f"{path}.index").write_bytes(other)
            with pytest.raises(UserError, match=sentence):
                TokenFiles(path, TOKENIZER)
    Path(f"{path}.index").unlink()
    with pytest.raises(UserError, match="x.ds.index cannot be read"):
        TokenFiles(path, TOKENIZER)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), which=st.sampled_from(["", ".index"]), block=st.sampled_from([1, 100, 2**16])
)
def test_damaged_token_files(tmp_path_factory, data, which, block):
    """Whatever bytes are changed, added or lost: a sentence, or documents that are text and end where they should."""
    path = put(
        tmp_path_factory.mktemp("tokens"),
        "x",
        [TOKENIZER.encode_document(tale) for tale in TALES[:4]],
    )
    damaged = Path(f"{path}{which}")
    content = bytearray(damaged.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    damaged.write_bytes(content)
    try:
        for document in TokenFiles(path, TOKENIZER).tokenized(block):
            assert (
                TOKENIZER.decode(document.ids.tolist()) == document.text
                and document.ids[-1] == TOKENIZER.eos_id
            )
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_memory_does_not_grow_with_token_files(tmp_path):
    """Forty times the tokens take no more memory, beside the index: eight bytes a document."""

    def peak(n):
        path = put(tmp_path, "x", [TOKENIZER.encode_document(tale) for tale in TALES] * n)
        tracemalloc.start()
        write_shards(
            TokenFiles(path, TOKENIZER).tokenized(block=4096),
            TOKENIZER,
            tmp_path / "s",
            val_documents=[],
            seq_len=32,
        )
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(1)
    assert peak(40) < peak(1) + 200_000


# Several processes


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 300))
def test_chunks_are_the_documents(data, size):
    """Any documents, chunks of any size: none is lost, the order stays, and only the last document of a chunk goes beyond its size."""
    ids = np.zeros(3, np.uint16)
    document = st.one_of(
        st.text(max_size=80), st.text(max_size=80).map(lambda text: Tokenized(text, ids))
    )
    routed = data.draw(
        st.lists(st.tuples(st.sampled_from(["train", "val", "excluded"]), document), max_size=40)
    )
    chunks = list(_chunks(iter(routed), size))
    assert sum(chunks, []) == routed and all(chunks)
    for chunk in chunks:
        assert (
            sum(len(text if isinstance(text, str) else text.text) + 64 for _, text in chunk[:-1])
            < size
        )


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text(max_size=60), max_size=30),
    data=st.data(),
    workers=st.integers(2, 4),
    size=st.integers(1, 400),
)
def test_the_order_is_that_of_the_documents(documents, data, workers, size):
    """Whichever process does a chunk and whenever it is done: documents and tokens are those of one process."""
    late = []  # what has been given away and is done at some later time

    @contextlib.contextmanager
    def out_of_order(tokenizer, number):
        def give(texts):
            late.append((result := LateFuture(lambda: finish(result)), texts))
            if data.draw(st.booleans()):
                finish(data.draw(st.sampled_from(late))[0])
            return result

        def finish(result):
            if not result.done():
                result.set_result(
                    _encode_all(tokenizer, next(texts for other, texts in late if other is result))
                )

        yield give

    class LateFuture(Future):
        def __init__(self, finish):
            super().__init__()
            self.finish = finish

        def result(self):
            self.finish()
            return super().result()

    routed = [
        (data.draw(st.sampled_from(["train", "val", "excluded"])), text) for text in documents
    ]
    expected = list(tokenize_documents(iter(routed), TOKENIZER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_workers", out_of_order)
        patch.setattr(preparation, "_chunks", lambda routed: _chunks(routed, size))
        found = list(_tokenized(iter(routed), TOKENIZER, workers))
    for (split, document), (wanted_split, wanted) in zip(found, expected, strict=True):
        assert (
            split == wanted_split
            and document.text == wanted.text
            and np.array_equal(document.ids, wanted.ids)
        )


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a thousand characters, so that few documents make many."""
    monkeypatch.setattr(preparation, "_chunks", lambda routed: _chunks(routed, 1000))


def test_the_same_bytes_from_any_number_of_processes(tmp_path, small_chunks):
    """Texts and tokens mixed, empty ones and long ones, several shards, some left out: every file is the same, and all is counted."""
    texts = [*TALES, "", "東京 🦊 ▁", " ".join(TALES), *TALES[:5]] * 3
    mixed = [
        Tokenized(text, TOKENIZER.encode_array(text)) if i % 3 == 0 else text
        for i, text in enumerate(texts)
    ]
    files, counted = [], []
    for workers in (1, 2, 3):
        done = []
        write_shards(
            mixed,
            TOKENIZER,
            tmp_path / "s",
            val_documents=TALES[:7],
            seq_len=32,
            shard_tokens=5000,
            tokenize=tokenize_in_parallel(workers),
            progress=done.append,
        )
        files.append({path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()})
        counted.append(done)
    assert files[0] == files[1] == files[2] and len(files[0]) > 20
    assert counted[0] == counted[1] == counted[2] and sum(counted[0]) == sum(
        len(t.encode()) for t in [*texts, *TALES[:7]]
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, ValueError])
def test_interrupted_with_workers(folder, tmp_path, error, small_chunks):
    """As with one process: the old shards stay, nothing lies beside them, and no process is left."""

    def documents():
        yield from TALES[:30]
        raise error("stop")

    before = Manifest.load(folder)
    with pytest.raises(error, match="stop"):
        write_shards(documents(), TOKENIZER, folder, seq_len=32, tokenize=tokenize_in_parallel(2))
    assert (
        Manifest.load(folder) == before
        and os.listdir(tmp_path) == ["shards"]
        and not multiprocessing.active_children()
    )


def test_a_text_that_is_none_in_a_worker(folder, tmp_path, small_chunks):
    """The sentence comes back from the worker as it is, and the old shards stay."""
    before = Manifest.load(folder)
    with pytest.raises(UserError, match=r"not valid Unicode: character 3 is '\\ud800'") as error:
        write_shards(
            ["abc\ud800", *TALES],
            TOKENIZER,
            folder,
            val_documents=[],
            seq_len=32,
            tokenize=tokenize_in_parallel(2),
        )
    assert "\n" not in str(error.value)
    assert (
        Manifest.load(folder) == before
        and os.listdir(tmp_path) == ["shards"]
        and not multiprocessing.active_children()
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_worker_that_is_killed(folder, tmp_path, small_chunks):
    """As by a system that has no memory left: a sentence, the old shards, and an end."""

    def documents():
        yield from TALES[:30]
        [worker] = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        yield from itertools.islice(tales(0), 100_000)

    before = Manifest.load(folder)
    with pytest.raises(UserError, match="A worker process has come to a sudden end"):
        write_shards(
            documents(),
            TOKENIZER,
            folder,
            val_documents=[],
            seq_len=32,
            tokenize=tokenize_in_parallel(2),
        )
    assert (
        Manifest.load(folder) == before
        and os.listdir(tmp_path) == ["shards"]
        and not multiprocessing.active_children()
    )


def test_chunks_under_way_are_few(small_chunks):
    """However long the corpus and however slow a worker: what has been read and is not yet written has a bound."""
    read, most = 0, 0

    def documents():
        nonlocal read
        for text in TALES * 20:
            read += 1
            yield "train", text

    for written, _ in enumerate(_tokenized(documents(), TOKENIZER, 2)):
        most = max(most, read - written)
    assert written + 1 == read == 1200 and most <= 8 * 2 + 2  # a tale is a chunk here


def test_a_script_without_a_guard(tmp_path):
    """It starts itself in the worker, which Python refuses: told as a sentence that says what is missing."""
    (tmp_path / "script.py").write_text(
        "from llm_course.tales import sample_tales\nfrom llm_course.shards import write_shards\n"
        "from llm_course.preparation import tokenize_in_parallel\n"
        "from llm_course.tokenizer import train_tokenizer\ntales = sample_tales(0, 300)\n"
        "write_shards(tales * 5, train_tokenizer(tales, 600), 'shards', val_documents=[], seq_len=32, tokenize=tokenize_in_parallel(2))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (
        done.returncode == 1
        and 'lacks `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    ), done.stderr
    assert os.listdir(tmp_path) == ["script.py"]


def test_a_system_that_starts_no_process(folder, tmp_path, monkeypatch):
    """It is the processes that are too many, not the disk that is full: said so, and the old shards stay."""

    def refuse(*args):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    before = Manifest.load(folder)
    monkeypatch.setattr(preparation.ProcessPoolExecutor, "submit", refuse)
    with pytest.raises(
        UserError,
        match=r"starts no further process \(Resource temporarily unavailable\): try fewer workers",
    ):
        write_shards(
            TALES, TOKENIZER, folder, val_documents=[], seq_len=32, tokenize=tokenize_in_parallel(2)
        )
    assert Manifest.load(folder) == before and os.listdir(tmp_path) == ["shards"]
