"What the program did not write, it does not replace: the record beside a file says whose it is."

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from conftest import PATIENCE, course, fine

from llm_course import files
from llm_course.corpus import write_tales_corpus
from llm_course.files import (
    RECORD,
    UserError,
    atomic_write,
    check_ours,
    is_ours,
    own_entry,
    record_ours,
    write_ours,
)
from llm_course.tales import sample_tales


def written(path: Path, text: str = "ours") -> Path:
    "A file that the program has written and recorded."
    with write_ours(path, "w", what="a text") as file:
        file.write(text)
    return path


def by_hand(path: Path, data: bytes = b"theirs") -> Path:
    path.write_bytes(data)
    return path


CHANGES = {
    "nothing": (lambda path: None, True),
    "another time": (lambda path: os.utime(path, (1, 1)), True),
    "a byte, and the same size": (lambda path: by_hand(path, b"0urs"), False),
    "a line more": (lambda path: by_hand(path, b"ours\nmine\n"), False),
    "gone": (lambda path: path.unlink(), False),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), False),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), False),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere")), False),
    "no record": (lambda path: (path.parent / RECORD).unlink(), False),
    "a record of another name": (
        lambda path: by_hand(path.parent / RECORD, b'{"other.txt": {"size": 4}}'),
        False,
    ),
    "an entry that says nothing": (
        lambda path: by_hand(path.parent / RECORD, b'{"a.txt": {}}'),
        False,
    ),
    "an entry that is no object": (
        lambda path: by_hand(path.parent / RECORD, b'{"a.txt": [4]}'),
        False,
    ),
    "a record that is no object": (
        lambda path: by_hand(path.parent / RECORD, b"[" * 100_000),
        False,
    ),
    "a record cut short": (lambda path: by_hand(path.parent / RECORD, b'{"a.txt": {"si'), False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes among its files")
def test_a_file_is_ours_as_long_as_it_is_as_we_wrote_it(tmp_path, change):
    "What is not in the record, or not as it says, is somebody's: it is replaced with --force alone."
    path = written(tmp_path / "a.txt")
    act, ours = CHANGES[change]
    act(path)
    assert is_ours(path) == ours
    if ours or not os.path.lexists(path):
        check_ours(path)
        return
    with pytest.raises(
        UserError, match=r"a\.txt (is not from|has been changed since) this program.*--force"
    ):
        check_ours(path)
    check_ours(path, force=True)


def test_writing_again_needs_no_force_and_writing_over_others_does(tmp_path):
    "Ours is replaced at will; another's is left as it is, bit for bit, and becomes ours with force."
    assert written(written(tmp_path / "new" / "a.txt"), "ours, again").read_text() == "ours, again"
    theirs = by_hand(tmp_path / "b.txt")
    with pytest.raises(UserError, match="b.txt is not from this program"):
        with write_ours(theirs, what="a text"):
            raise AssertionError("nothing may be written")
    assert theirs.read_bytes() == b"theirs" and set(os.listdir(tmp_path)) == {"b.txt", "new"}
    with write_ours(theirs, what="a text", force=True) as file:
        file.write(b"ours now")
    assert is_ours(theirs) and own_entry(theirs)["what"] == "a text"


@pytest.mark.parametrize("moment", range(7))
def test_a_crash_at_any_moment_leaves_a_file_that_is_known(tmp_path, monkeypatch, moment):
    "Wherever the machine stops between two renames, the file that stands there is ours, be it the old one or the new one."
    path, done = written(tmp_path / "a.txt", "old"), []

    def rename(*names):
        if len(done) == moment:
            raise KeyboardInterrupt
        done.append(names)
        real(*names)

    real = os.replace
    monkeypatch.setattr(os, "replace", rename)
    finished = False
    try:
        with write_ours(path, "w", what="a text") as file:
            file.write("the new text")
        finished = True
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert (
        finished == (moment >= 3)
        and is_ours(path)
        and path.read_text() == ("old" if moment < 2 else "the new text")
    )
    assert own_entry(written(path, "newer")).get("before") is None


def test_a_folder_is_ours_with_all_that_is_in_it(tmp_path):
    "A folder that we made is not ours any more when one file more lies in it, or one has another name."
    made = tmp_path / "model"
    (made / "deep").mkdir(parents=True)
    by_hand(made / "deep" / "weights", b"1234")
    record_ours(made, "an export")
    assert is_ours(made) and is_ours(f"{made}/") and own_entry(made)["size"] == 4
    by_hand(made / ".env")
    assert not is_ours(made)
    (made / ".env").unlink()
    (made / "deep" / "weights").rename(made / "deep" / "heights")
    assert not is_ours(made)


def test_names_are_those_of_the_folder_and_not_of_the_path(tmp_path, monkeypatch):
    "However a file is named, by a path from here or from the root, it has one entry."
    written(tmp_path / "a" / "b.txt")
    monkeypatch.chdir(tmp_path / "a")
    for path in ("b.txt", "./b.txt", "../a/b.txt", f"{tmp_path}/a/b.txt"):
        assert is_ours(path)
        written(Path(path))
    assert list(json.loads((tmp_path / "a" / RECORD).read_text())) == ["b.txt"]


def write_five_times(path: Path) -> None:
    for i in range(5):
        written(path, str(i))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_programs_that_write_to_one_folder_take_turns(tmp_path):
    "Eight processes record eight files at once, and the record has them all."
    paths = [tmp_path / f"{i}.txt" for i in range(8)]
    running = [
        multiprocessing.get_context("fork").Process(target=write_five_times, args=(path,))
        for path in paths
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(PATIENCE)
    assert [process.exitcode for process in running] == [0] * 8 and all(map(is_ours, paths))
    assert set(os.listdir(tmp_path)) == {RECORD, *(path.name for path in paths)}


@pytest.mark.parametrize("name", ["corpus.txt", "val.txt"])
def test_tales_replace_no_text_of_somebody_else(tmp_path, name):
    "Neither text is touched when either is somebody's; with force both are tales, and then they are ours."
    by_hand(tmp_path / name, b"Once upon a time, there was my only copy.\n")
    with pytest.raises(UserError, match=f"{name} is not from this program"):
        write_tales_corpus(tmp_path, n_train=3, n_val=1)
    assert os.listdir(tmp_path) == [name]
    for options in ({"force": True}, {}, {"seed": 1}):
        texts = write_tales_corpus(tmp_path, n_train=3, n_val=1, **options)
        assert all(map(is_ours, texts))
    assert own_entry(tmp_path / "val.txt")["of"] == "corpus.txt"


def test_a_place_that_refuses_the_record_keeps_the_old_file(tmp_path, monkeypatch):
    "Where the record cannot be written, the file that it would speak of is not replaced."
    path = written(tmp_path / "a.txt", "old")

    def full(target, *args):
        if Path(target).name == RECORD:
            raise UserError(f"{target} cannot be written: No space left on device.")
        return atomic_write(target, *args)

    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(UserError, match="No space left"):
        written(path, "new")
    assert path.read_text() == "old" and is_ours(path)


# the commands that write

COMMANDS = {  # what is there before, and the command that would replace it
    "corpus": ("data/raw/corpus.txt", ["corpus", "--stories", 5]),
    "corpus, validation": ("data/raw/val.txt", ["corpus", "--stories", 5]),
    "tokenizer": (
        "artifacts/tokenizer/llm_spm.model",
        ["tokenizer", "--input", "in.txt", "--vocab_size", 400],
    ),
    "demo": (
        "r/corpus.txt",
        ["demo", "--root", "r", "--config", "tiny", "--max_steps", 1, "--stories", 10],
    ),
    "demo, validation": (
        "r/val.txt",
        ["demo", "--root", "r", "--config", "tiny", "--max_steps", 1, "--stories", 10],
    ),
    "demo, tokenizer": (
        "r/llm_spm.model",
        ["demo", "--root", "r", "--config", "tiny", "--max_steps", 1, "--stories", 10],
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_replaces_what_is_not_ours_with_force_alone(tmp_path, case):
    "One line names the file and --force; what the user had is as it was, even if it looks as if we had written it."
    path, words = tmp_path / COMMANDS[case][0], COMMANDS[case][1]
    path.parent.mkdir(parents=True)
    mine = by_hand(path, f"{sample_tales(5, 1)[0]}\n".encode()).read_bytes()
    (tmp_path / "in.txt").write_text("\n".join(sample_tales(0, 20)))
    done = course(*words, cwd=tmp_path)
    assert (
        done.code == 2
        and len(done.lines) == 1
        and path.name in done.lines[0]
        and "--force" in done.lines[0]
    ), done.err
    assert path.read_bytes() == mine and not (path.parent / "checkpoints").exists()
    if words[0] == "demo":  # and not its 200 stories
        from llm_course.config import load_config
        from llm_course.demo import train_on_tales

        train_on_tales(
            load_config("tiny", {"max_steps": "1"}),
            tmp_path / "r",
            n_train=10,
            n_val=2,
            force=True,
            log=lambda line: None,
        )
    else:
        fine(course(*words, "--force", cwd=tmp_path))
    assert is_ours(path)
