"The way in: what users give as a text, in whatever form, is read as they mean it, or refused in one sentence."

import io
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course import formats
from llm_course.corpus import Corpus, normalized, write_tales_corpus
from llm_course.files import UserError


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def sentence(*args: object, **options: object) -> str:
    "The one sentence with which a corpus is refused, when it is made or when it is read."
    with pytest.raises(UserError) as refused:
        list(Corpus(*args, **options))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# one document, one string

PARTS = st.lists(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\ufeff<"), min_size=1
    ),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(
    lines=PARTS.filter(
        lambda lines: "".join(lines).strip() and not any(line.isspace() for line in lines)
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    before=st.integers(0, 2),
    after=st.integers(0, 3),
)
def test_a_document_is_one_string_however_it_is_stored(tmp_path_factory, lines, end, before, after):
    "As a file, between separators, in JSON lines, on a Mac of old: the same document, whatever line breaks stand around it."
    folder, text = tmp_path_factory.mktemp("forms"), end * before + end.join(lines) + end * after
    right = ["\n".join(lines), "another"]
    forms = {
        "file": {"a.txt": text, "b.txt": f"another{end}"},
        "mark": {"a.txt": f"{text}<|endoftext|>another"},
        "own": {"a.txt": f"{text}{end}<{end}another"},
        "blank": {"a.txt": f"{text}{end}{end}another{end}"},
        "jsonl": {"a.jsonl": jsonl(text, f"{end}another")},
    }
    documents = {
        "file": "file",
        "mark": "<|endoftext|>",
        "own": "\n<\n",
        "blank": "blank",
        "jsonl": "auto",
    }
    for form, files in forms.items():
        for name, content in files.items():
            put(folder / form / name, content)
        assert list(Corpus(folder / form, documents[form])) == right, form
    assert normalized(normalized(text)) == normalized(text) == right[0]


@pytest.mark.parametrize("size", [1 << 18, (1 << 18) - 1, 1 << 20, (1 << 20) - 1])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_and_separators_across_blocks(tmp_path, size, end):
    "A line break or a separator that begins in one block and ends in the next is one; positions count every byte."
    lines = ["a" * (size - len(end) // 2), "b" * 10, "", "c"]
    file = put(tmp_path / "a.txt", end.join(lines))
    assert list(Corpus(file, "line")) == [line for line in lines if line]
    assert list(Corpus(file, "\nb")) == [lines[0], "b" * 9 + "\n\nc"]
    put(file, end.join([*lines, "d"]).encode() + b"\xff")
    assert f"byte {len(end.join([*lines, 'd']))} is 0xff" in sentence(file, "line")
    assert f"byte {len(end.join([*lines, 'd']))} is 0xff" in sentence(file, "\nb")


def test_the_byte_is_right_behind_a_byte_order_mark(tmp_path):
    "Its three bytes count; and the file is named, also where it is the only one of a folder."
    file = put(tmp_path / "a.txt", b"\xef\xbb\xbfa\xff" + b"b" * 20)
    for source in (file, tmp_path, tmp_path / "*"):
        assert f"{file} is not UTF-8: byte 4 is 0xff" in sentence(source)


# what a file holds

DOCUMENTS = ["first", "second\nof two lines", "third"]
LINES = "first\nsecond\nthird\n"
FORMS = {  # name, content: format, number of documents
    "lone.json": (jsonl(*DOCUMENTS), "jsonl", 3),
    "upper.JSONL": (jsonl(*DOCUMENTS), "jsonl", 3),
    "new.ndjson": (jsonl(*DOCUMENTS), "jsonl", 3),
    "plain.txt": (jsonl(*DOCUMENTS), "jsonl", 3),
    "no ending": (jsonl(*DOCUMENTS), "jsonl", 3),
    "mark.jsonl": ("\ufeff" + jsonl(*DOCUMENTS), "jsonl", 3),
    "windows.jsonl": (jsonl(*DOCUMENTS).replace("\n", "\r\n"), "jsonl", 3),
    "blank lines.jsonl": ("\n\n" + jsonl(*DOCUMENTS).replace("\n", "\n\n"), "jsonl", 3),
    "spaced.json": ('{ "id": 1, "text": "a" }\n\t{"text":"b"}', "jsonl", 2),
    "separators in strings.jsonl": ('{"text": "a\u2028b\u0085c"}\n', "jsonl", 1),
    "long.jsonl": (jsonl("x" * 2_000_000, "y"), "jsonl", 2),
    "one line.txt": (jsonl("x" * 2_000_000), "jsonl", 1),
    "lines.txt": (LINES, "line", 3),
    "mac.txt": (LINES.replace("\n", "\r"), "line", 3),
    "mac blank.txt": ("a\rb\r\rc\rd", "blank", 2),
    "list.txt": ("[1] A reference.\n[2] Another one.\n", "line", 2),
    "quotes.txt": ('["Hello," he said.\n{sic}\n{"not": json}\n', "line", 3),
    "code.txt": ("{\n  int x;\n}\n", "line", 3),
    "objects.txt": ('see:\n{"a": 1}\n{"b": 2}\n', "line", 3),
    "UPPER.TXT": (LINES, "line", 3),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_content_says_how_documents_are_kept(tmp_path, name):
    "Not the name of the file decides, but what is in it."
    content, form, number = FORMS[name]
    found = Corpus(put(tmp_path / name, content))
    assert (found.format, len(list(found))) == (form, number)
    assert not any("{" in document for document in found if form == "jsonl")


BAD_JSON = {
    "an array": ('[{"text": "a"},\n {"text": "b"}]', "is a JSON array"),
    "an array on one line": (json.dumps([{"text": "a"}, {"text": "b"}]), "is a JSON array"),
    "an array of strings": ('["a",\n"b"]\n', "is a JSON array"),
    "arrays on lines": ('["a"]\n["b"]\n', "is a JSON array"),
    "a long array": (
        "[" + ",\n".join(json.dumps({"text": "x" * 100}) for _ in range(10_000)) + "]",
        "is a JSON array",
    ),
    "an object over lines": (json.dumps({"text": "a"}, indent=1), "span lines"),
    "objects over lines": (json.dumps({"text": "a"}, indent=1) * 2, "span lines"),
    "a long object": (
        json.dumps({f"{i}": "x" * 100 for i in range(10_000)}, indent=1),
        "span lines",
    ),
    "no text": ('{"content": "a"}\n{"content": "b"}\n', 'without a string "text"'),
    "some text": (jsonl("a") + '{"content": "b"}\n', 'without a string "text"'),
    "a number for a text": ('{"text": 5}\n{"text": 6}\n', 'without a string "text"'),
    "lines before": ("a heading\n" + jsonl("a", "b"), "mixes JSON lines and other lines"),
    "lines after": (jsonl("a", "b") + "the end\n", "mixes JSON lines and other lines"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_of_another_shape_is_refused(tmp_path, case):
    "Nobody means braces and quotes to be learned: a sentence says what it is, and how else to go on."
    content, told = BAD_JSON[case]
    refused = sentence(put(tmp_path / "a.txt", content))
    assert told in refused and "a.txt" in refused and "--documents line or file" in refused
    assert len(list(Corpus(tmp_path / "a.txt", "file"))) == 1  # it can be meant
    for name in ("a.json", "b.JSONL", "c.ndjson"):  # and in these it cannot
        for documents in ("auto", "line", "file", "blank", "jsonl"):
            refused = sentence(put(tmp_path / name, content), documents)
            assert name in refused and (
                "array" in refused or "span lines" in refused or "the line at byte" in refused
            )


@pytest.mark.parametrize(
    "documents, number", [("auto", 3 + 2), ("line", 3 + 2), ("blank", 2 + 1), ("file", 2 + 1)]
)
def test_files_of_several_kinds_lie_together(tmp_path, documents, number):
    "Whatever --documents says, it says of the texts: JSON lines stay JSON lines, beside one text or several."
    put(tmp_path / "a.jsonl", jsonl("one", "two"))
    put(tmp_path / "b.txt", "first\nsecond\nthird\n")
    for source in (tmp_path, tmp_path / "*"):
        if documents in ("auto", "line"):
            assert sorted(Corpus(source, documents)) == sorted(
                ["one", "two", "first", "second", "third"]
            )
        else:
            assert len(list(Corpus(source, documents))) == number
    told = Corpus(tmp_path, documents).describe()
    assert (
        told.count("1 file: ") == 2
        and 'the "text" of every line is a document' in told
        and "2 files" in told
    )
    put(tmp_path / "c.json", jsonl("three"))
    put(tmp_path / "d.txt", "fourth\n\nfifth\n")
    assert sum(document in ("one", "two", "three") for document in Corpus(tmp_path, documents)) == 3
    assert ("2 files: every file is a document" in Corpus(tmp_path, documents).describe()) == (
        documents in ("auto", "file")
    )


@pytest.mark.parametrize(
    "documents, told",
    [
        ("<|endoftext|>", "'<|endoftext|>' stands nowhere"),
        ("\n---\n", "stands nowhere"),
        ("FILE", "Did you mean 'file'?"),
        ("paragraph", "Did you mean 'blank'?"),
        ("Lines", "Did you mean 'line'?"),
        ("json", "Did you mean 'jsonl'?"),
        ("AUTO", "'auto'"),
    ],
)
def test_a_separator_that_is_none(tmp_path, documents, told):
    "What stands nowhere in the text tells no documents apart, and a word for a format is no separator."
    put(tmp_path / "a.txt", LINES)
    assert told in sentence(tmp_path, documents)
    put(tmp_path / "b.txt", f"one{documents}two")
    if documents.isalpha():
        assert told in sentence(tmp_path, documents)
    else:
        assert list(Corpus(tmp_path, documents)) == [
            LINES.strip(),
            "one",
            "two",
        ]  # one file with it is enough


def test_lines_are_lines_where_that_is_asked_for(tmp_path):
    "--documents line holds also where a file begins with the mark that is usual between documents."
    file = put(tmp_path / "a.txt", "<|endoftext|>one\ntwo\n<|endoftext|>three\n")
    assert list(Corpus(file)) == ["one\ntwo", "three"] and len(list(Corpus(file, "line"))) == 3


NO_TEXTS = {
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "Parquet": b"PAR1\x15\x04\x15\xff\xfe\x00",
    "zip": b"PK\x03\x04\x14\x00\x00\x00",
    "PNG": b"\x89PNG\r\n\x1a\n\x00",
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
}


@pytest.mark.parametrize("kind", [*NO_TEXTS, "noise", "another encoding", "UTF-16"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_what_is_no_text_is_never_learned(tmp_path, kind, errors):
    "Neither is it read with --errors replace, nor does a sentence advise that."
    others = {
        "noise": bytes(range(128, 256)) * 40,
        "another encoding": ("Жили-были старик со старухой. " * 9).encode("cp1251"),
        "UTF-16": ("Once upon a time\n" * 9).encode("utf-16"),
    }
    told = sentence(
        put(
            tmp_path / "a.txt",
            NO_TEXTS[kind] + bytes(range(256)) if kind in NO_TEXTS else others[kind],
        ),
        errors=errors,
    )
    assert (
        "replace" not in told
        and "a.txt" in told
        and ("UTF-" in told or f"is a {kind} file" in told)
    )


# what lies in a folder


def test_a_folder_is_read_without_what_is_hidden(tmp_path):
    "All endings of texts in any case, links to folders, loops; what is left out is counted and named, and no hidden file is read."
    for name in ("a.TXT", "b.md", "c.text", "d.Txt", "deep/e.txt"):
        put(tmp_path / "t" / name, name)
    for name in (
        ".hidden.txt",
        ".git/f.txt",
        ".ipynb_checkpoints/a.txt",
        formats.RECORD,
        "deep/.env.txt",
    ):
        put(tmp_path / "t" / name, "hidden")
    for name in ("g.jsonl.gz", "h.PNG", "deep/i.gz", "README"):
        put(tmp_path / "t" / name, b"\x1f\x8b")
    put(tmp_path / "elsewhere" / "k.txt", "k.txt")
    (tmp_path / "t" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "t" / "deep" / "loop").symlink_to(tmp_path / "t")
    (tmp_path / "t" / "up").symlink_to(tmp_path)
    (tmp_path / "t" / "gone.txt").symlink_to("nowhere.txt")
    right = ["a.TXT", "b.md", "c.text", "d.Txt", "deep/e.txt", "k.txt"]
    for source in (tmp_path / "t", f"{tmp_path}/t/**", f"{tmp_path}/t/**/*"):
        found = Corpus(source)
        assert list(found) == right, source
        assert (
            "; left out: 5 other files (.PNG, .gz, a link to nothing, no ending)"
            in found.describe()
        )
    assert list(Corpus(f"{tmp_path}/t/**/*.txt")) == ["deep/e.txt", "k.txt"]
    assert list(Corpus(f"{tmp_path}/t/.*.txt")) == ["hidden"]  # who asks for it has it
    assert "is a gzip file" in sentence(f"{tmp_path}/t/*.gz")
    assert "without texts" in sentence(
        put(tmp_path / "n" / "a.gz", b"\x1f\x8b").parent
    ) and "left out: 1 other file (.gz)" in sentence(tmp_path / "n")


def test_names_that_look_like_globs(tmp_path, monkeypatch):
    "A folder that is called data[1] is that folder; where nothing matches, that is what is said."
    put(tmp_path / "data[1]" / "x.txt", "literal")
    put(tmp_path / "data1" / "y.txt", "pattern")
    monkeypatch.chdir(tmp_path)
    assert (
        list(Corpus("data[1]/*.txt"))
        == ["literal"]
        == list(Corpus("data[1]"))
        == list(Corpus("./data[1]/**/x.t?t"))
    )
    assert list(Corpus("data[0-9]/*")) == ["pattern"] and sorted(
        Corpus(f"{tmp_path}/d*/*.txt")
    ) == ["literal", "pattern"]
    assert sentence("data[1]/*.md") == "No file matches data[1]/*.md."
    assert sentence("data1/z.txt") == "data1/z.txt does not exist. Did you mean 'y.txt'?"
    put(tmp_path / "part-00000", "a\nb"), put(tmp_path / "part-00001", "c\nd")
    assert list(Corpus("part-*")) == ["a\nb", "c\nd"]
    assert "is empty" in sentence("")


def test_what_we_held_out_is_no_corpus(tmp_path):
    "In a folder, tales that were held out are left out, and said so; named, they are read; changed by hand, they are the user's."
    train, val = write_tales_corpus(tmp_path, n_train=5, n_val=3)
    assert (
        len(list(Corpus(tmp_path))) == 5
        and "left out: 1 other file (held out)" in Corpus(tmp_path).describe()
    )
    assert len(list(Corpus(f"{tmp_path}/*.txt"))) == 5 and len(list(Corpus(val))) == 3
    assert "is all for validation" in sentence(f"{tmp_path}/c*.txt", leave_out=train)
    put(val, "mine\n")
    assert sorted(map(len, Corpus(tmp_path)))[0] == len("mine") and list(
        Corpus(tmp_path, leave_out=val)
    ) == list(Corpus(train))


# what comes once


def feed(into: int, data: bytes) -> None:
    "Write into a pipe until all is written, or nobody reads any more."
    with suppress(BrokenPipeError), open(into, "wb") as pipe:
        pipe.write(data)


def through_a_pipe(data: bytes, read: object) -> object:
    "What `read` makes of a path at which `data` comes once, as from `<(…)` in a shell."
    out, into = os.pipe()
    feeding = threading.Thread(target=feed, args=(into, data))
    feeding.start()
    try:
        return read(f"/dev/fd/{out}")
    finally:
        os.close(out)
        feeding.join()


BEGINNING = b"zyzzyva zyzzyva\n" * 100_000  # over a megabyte
STREAMED = {
    "lines": (BEGINNING + b"the end\n", 100_001),
    "JSON lines": ((jsonl("x" * 1_500_000) + jsonl("y")).encode(), 2),
    "blank": ((b"a" * 90 + b"\nb\n\n") * 20_000, 20_000),
}


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="the system has no /dev/fd")
@pytest.mark.parametrize("content", STREAMED)
def test_a_pipe_is_read_from_its_first_byte(tmp_path, monkeypatch, content):
    "Twice as well, as from a file; and its copy goes with the corpus."
    monkeypatch.setattr(formats.tempfile, "tempdir", str(tmp_path))
    data, number = STREAMED[content]

    def read(path):
        found = Corpus(path)
        assert path in found.describe() and os.listdir(tmp_path) != []
        return [list(found), list(found)]

    once, again = through_a_pipe(data, read)
    assert len(once) == number and once == again == list(Corpus(put(tmp_path / "file.txt", data)))
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_fifo_and_standard_input(tmp_path, monkeypatch):
    "A named pipe, and `-` for standard input: messages have the name that the user gave."
    os.mkfifo(tmp_path / "fifo")
    feeding = threading.Thread(
        target=lambda: (tmp_path / "fifo").write_bytes(BEGINNING + b"bad \xff\n")
    )
    feeding.start()
    assert f"{tmp_path}/fifo is not UTF-8: byte {len(BEGINNING) + 4} is 0xff" in sentence(
        tmp_path / "fifo"
    )
    feeding.join()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    found = Corpus("-")
    assert list(found) == ["one", "two"] == list(found) and found.describe().startswith(
        "standard input: every line"
    )
    assert "standard input holds no text" in sentence("-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "no standard input" in sentence("-")


@pytest.mark.parametrize("path", ["/proc/self/mem", "/dev/zero", "/dev/null", "/dev/full"])
def test_what_cannot_be_read_has_a_name(path):
    "A device that never ends is not read, and what gives an error is named in the sentence."
    if not Path(path).exists():
        pytest.skip("another system")
    assert path in sentence(path) and "Errno" not in sentence(path)


def test_a_copy_for_which_there_is_no_room(tmp_path, monkeypatch):
    "The sentence says where there is no room, and what to change; nothing is left there."
    monkeypatch.setattr(formats.tempfile, "tempdir", str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.shutil, "copyfileobj", full)
    told = through_a_pipe(b"one\n", sentence)
    assert str(tmp_path) in told and "TMPDIR" in told and os.listdir(tmp_path) == []
