"Readers, the split and atomic files: what users bring, and what breaks."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.corpus import Corpus, held_out, normalized, write_tales_corpus
from llm_course.files import UserError, atomic_write, did_you_mean, folder_lock
from llm_course.formats import between
from llm_course.tales import check_tale

TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\ufeff"), min_size=1
).filter(lambda text: not text.isspace())


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# Documents


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(TEXTS, min_size=1), end=st.sampled_from(["\n", "\r\n"]))
def test_lines_come_back(tmp_path_factory, documents, end):
    "Any text without line breaks survives as a line, U+2028 and U+0085 inside included."
    file = put(tmp_path_factory.mktemp("lines") / "a.txt", end.join(documents))
    corpus = Corpus(file, documents="line")
    assert list(corpus) == documents == list(corpus)


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: t and not t.isspace()),
        min_size=1,
    )
)
def test_jsonl_comes_back(tmp_path_factory, documents):
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    put(file, "".join(json.dumps({"text": d}) + "\n" for d in documents))
    assert Corpus(file).format == "jsonl" and list(Corpus(file)) == list(map(normalized, documents))


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.text("ab|#\n", min_size=1), min_size=1),
    mark=st.sampled_from(["<>", "%%%", "~"]),
)
def test_separated_documents_come_back(tmp_path_factory, documents, mark):
    documents = [d.strip("\n") for d in documents if d.strip("\n")] or ["x"]
    file = put(
        tmp_path_factory.mktemp("marks") / "a.txt", "".join(f"{d}\n{mark}\n" for d in documents)
    )
    assert list(Corpus(file, documents=mark)) == documents


def test_a_separator_across_two_blocks(tmp_path):
    "A separator that begins in one megabyte and ends in the next is found, wherever it is cut."
    for cut in range(1, 5):
        first = b"a" * ((1 << 20) - cut)
        file = put(tmp_path / "a.txt", first + b"<cut>" + b"b" * 3)
        with open(file, "rb") as f:
            assert [(start, len(piece)) for start, piece in between("<cut>")(f)] == [
                (0, len(first)),
                (len(first) + 5, 3),
            ]


@pytest.mark.parametrize(
    "name, data, form, count",
    [
        ("a.txt", "one\ntwo\nthree\n", "line", 3),
        ("a.txt", "one\r\ntwo\r\n\r\n", "line", 2),
        ("a.txt", "a\nb\n\nc\nd\n", "blank", 2),
        ("a.txt", "a\r\nb\r\n \r\nc\r\n", "blank", 2),
        ("a.txt", "a\n\nb<|endoftext|>c\n<|endoftext|>\n", "<|endoftext|>", 2),
        ("a.jsonl", '{"text": "a"}\r\n\n{"text": "b", "id": 1}', "jsonl", 2),
        ("a.md", "one line without an end", "line", 1),
    ],
)
def test_formats_are_found(tmp_path, name, data, form, count):
    corpus = Corpus(put(tmp_path / name, data))
    documents = list(corpus)
    assert (
        corpus.format == form and len(documents) == count and not any("\r" in d for d in documents)
    )
    assert str(tmp_path / name) in corpus.describe() and "\n" not in corpus.describe()


def test_one_stray_blank_line_does_not_glue_a_file_of_lines_together(tmp_path):
    file = put(
        tmp_path / "a.txt", "\n".join(f"story {i}" for i in range(500)) + "\n\n" + "last\n" * 500
    )
    assert Corpus(file).format == "line" and len(list(Corpus(file))) == 1000


def test_folders_and_globs(tmp_path):
    "Every .txt file of a folder is a document, in the order of the names; a glob picks among them."
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.doc", ".hidden.txt"):
        put(tmp_path / name, f"{name}\nhas two lines\n")
    corpus = Corpus(tmp_path)
    assert corpus.format == "file" and [d.split("\n")[0] for d in corpus] == [
        "a.txt",
        "b.txt",
        "deep/c.txt",
    ]
    assert len(list(Corpus(str(tmp_path / "*.txt")))) == 2
    assert len(list(Corpus(tmp_path, documents="line"))) == 6


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert list(Corpus(put(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo"))) == ["one", "two"]


def test_one_line_of_50_megabytes(tmp_path):
    "It takes seconds and not minutes, in whatever way documents are told apart."
    file = put(tmp_path / "a.txt", b"once upon a time " * 3_000_000)
    start = time.process_time()
    marked = put(tmp_path / "b.txt", b"<|endoftext|>" + file.read_bytes())
    for place, documents in (
        (file, "auto"),
        (file, "blank"),
        (file, "file"),
        (marked, "<|endoftext|>"),
    ):
        assert [len(d) for d in Corpus(place, documents=documents)] == [51_000_000]
    assert time.process_time() - start < 20


def test_memory_does_not_grow_with_the_file(tmp_path):
    import tracemalloc

    file = put(tmp_path / "a.txt", b"A line of the corpus, one of very many.\n" * 500_000)
    tracemalloc.start()
    assert sum(1 for _ in Corpus(file)) == 500_000
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


# What is wrong with a corpus is said in one line


@pytest.mark.parametrize(
    "name, data, options, says",
    [
        ("a.txt", b"", {}, "holds no text"),
        ("a.txt", b" \n\r\n\t\n", {}, "holds no text"),
        ("a.txt", b" \n\n\n ", {"documents": "file"}, "holds no text"),
        ("a.txt", b"fine\nna\xefve\n", {}, "byte 7 is 0xef"),
        ("a.txt", b"fine\nna\xefve\n", {"documents": "blank"}, "byte 7 is 0xef"),
        ("a.txt", b"fine<>\nna\xefve\n", {"documents": "<>"}, "byte 9 is 0xef"),
        ("a.txt", "fine\nOnce".encode("utf-16"), {}, "byte 0 is 0xff"),
        ("a.txt", "fine\nOnce".encode("utf-16-le"), {}, "byte 1 is NUL"),
        ("a.txt", b"\x7fELF\0\0\0", {}, "NUL"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', {}, "the line at byte 14"),
        ("a.jsonl", b'{"text": 3}\n', {}, "the line at byte 0"),
        ("a.jsonl", b'["text"]\n', {}, "is a JSON array"),
        ("a.jsonl", b'{"text": "half\n', {}, "the line at byte 0"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, "the line at byte 0"),
        ("a.txt", b"text", {"errors": "ignore"}, "'strict' or 'replace'"),
        ("a.txt", b"text", {"documents": ""}, "documents is empty"),
    ],
)
def test_bad_corpora(tmp_path, name, data, options, says):
    with pytest.raises(UserError) as e:
        list(Corpus(put(tmp_path / name, data), **options))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_replace_goes_on(tmp_path):
    file = put(tmp_path / "a.txt", b"na\xefve\nnul \0 here\n")
    assert list(Corpus(file, errors="replace")) == ["na\ufffdve", "nul \ufffd here"]


def test_missing_and_wrong_places(tmp_path):
    put(tmp_path / "corpus.txt", "text")
    with pytest.raises(UserError, match="Did you mean 'corpus.txt'"):
        Corpus(tmp_path / "corpsu.txt")
    with pytest.raises(UserError, match="does not exist"):
        Corpus(tmp_path / "no" / "such" / "file.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="folder without"):
        Corpus(tmp_path / "empty")


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind the superuser"
)
def test_a_file_that_may_not_be_read(tmp_path):
    file = put(tmp_path / "a.txt", "text")
    file.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        list(Corpus(file))


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    "What the system refuses is one sentence (also for the superuser, whom permissions do not bind)."
    file = put(tmp_path / "a.txt", "text")
    corpus = Corpus(file)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        list(corpus)


# The split


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_held_out_is_a_function_of_the_document(document, one, two):
    assert held_out(document, one) == held_out(document, one)
    assert not held_out(document, 0) and held_out(document, 1)
    assert held_out(document, max(one, two)) or not held_out(document, min(one, two))


def test_held_out_holds_out_its_share():
    assert 0.008 < sum(held_out(str(i)) for i in range(50_000)) / 50_000 < 0.012


def test_a_corpus_of_tales(tmp_path):
    "Whole tales, one a line, the asked number, no tale on both sides, also across seeds and sizes."
    train, val = write_tales_corpus(tmp_path / "new" / "raw", n_train=300, n_val=30, seed=1)
    _, other = write_tales_corpus(tmp_path / "other", n_train=20, n_val=40, seed=1)
    trained, kept = list(Corpus(train, documents="line")), list(Corpus(val, documents="line"))
    assert (len(trained), len(kept)) == (300, 30) and (train.name, val.name) == (
        "corpus.txt",
        "val.txt",
    )
    assert all(check_tale(tale).valid for tale in trained + kept)
    assert not set(trained) & (set(kept) | set(Corpus(other, documents="line")))
    assert Corpus(train).format == "line"
    before = train.read_bytes()
    write_tales_corpus(tmp_path / "new" / "raw", n_train=300, n_val=30, seed=1)
    assert train.read_bytes() == before


# Files that are whole or not there


def test_atomic_write_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    with atomic_write(path, "w") as f:
        f.write("naïve\n")
        assert not path.exists()
    assert path.read_bytes() == "naïve\n".encode() and os.listdir(path.parent) == ["c.txt"]


def test_atomic_write_keeps_the_old_file_after_an_error(tmp_path):
    path = put(tmp_path / "a.bin", b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as f:
        f.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_atomic_write_where_nothing_can_be_written(tmp_path):
    put(tmp_path / "file", "text")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot be written"), atomic_write(path) as f:
            f.write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_atomic_write_lets_other_errors_through(tmp_path):
    "An error about another file is not blamed on this one."
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt") as f:
        f.write(Path(tmp_path / "missing").read_bytes())
    assert not os.listdir(tmp_path)


def test_did_you_mean():
    assert (
        did_you_mean("n_layer", ["n_layers", "n_heads"]) == " Did you mean 'n_layers'?"
        and did_you_mean("x", ["abc"]) == ""
    )


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    "A second process is refused while the first holds the folder, also if that is killed in the end; then the folder is free."
    code = (
        "from llm_course.files import folder_lock; from pathlib import Path\n"
        f"with folder_lock(Path({str(tmp_path / 'run')!r})): print(1, flush=True), input()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        with (
            pytest.raises(UserError, match="Another run is writing to"),
            folder_lock(tmp_path / "run"),
        ):
            pass
        other.kill()
        other.wait(PATIENCE)
    with folder_lock(tmp_path / "run"):
        pass
