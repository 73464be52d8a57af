"From a text to shards and back: every command reads the same documents, says what it does with them, and deletes nobody's files."

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import course, fine, snapshot
from test_texts import through_a_pipe

from llm_course import files, shards
from llm_course.corpus import Corpus, write_tales_corpus
from llm_course.files import RECORD, UserError
from llm_course.preparation import ShardTexts, as_text, validation_source
from llm_course.shards import Manifest, TokenDataset, write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer

TALES = sample_tales(3, 240)
LINES = [tale[:90].replace("\n", " ") for tale in TALES]
TOKENIZER = train_tokenizer(LINES, 400, log=lambda line: None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    "A folder with a tokenizer where it is looked for, and a text of one's own, one document a line."
    (tmp_path / "artifacts" / "tokenizer").mkdir(parents=True)
    TOKENIZER.save(tmp_path / "artifacts" / "tokenizer" / "llm_spm.model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lines.txt").write_text("\n".join(LINES) + "\n")
    return tmp_path


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def prepared(place: Path, *words: object, source: str = "mine/lines.txt") -> str:
    "What `prepare` says."
    return fine(course("prepare", "--input", source, "--seq_len", 16, *words, cwd=place))


def validated(place: Path, shards: str = "data/shards") -> list[str]:
    "The documents of validation, out of the tokens."
    return list(ShardTexts(place / shards))


def trained_on(place: Path, shards: str = "data/shards") -> list[str]:
    return list(ShardTexts(place / shards, "train"))


def next_words(out: str) -> list[str]:
    "The command that a stage ends with."
    return shlex.split(re.search(r"^next: llm-course (.*)$", out, re.M)[1])


def number(name: str, out: str) -> float:
    return float(re.search(rf"^\s*{re.escape(name)}\s+([\d,.e+-]+)", out, re.M)[1].replace(",", ""))


def row(name: str, out: str) -> tuple[int, int, float]:
    "Documents, tokens and percent of a row of the table that `prepare` prints."
    found = re.search(rf"^  {name} +([\d,]+) documents +([\d,]+) tokens +([\d.]+) %", out, re.M)
    return int(found[1].replace(",", "")), int(found[2].replace(",", "")), float(found[3])


# what comes once, and what comes in other clothes


def test_every_command_reads_a_pipe_as_a_file(trained, tmp_path):
    "The vocabulary, the shards and the figures are those of the file, also what stands in the first megabyte."
    lines = "zyzzyva " * 140_000 + "\n" + "".join(f"{line}\n" for line in LINES)
    file = put(tmp_path / "m.txt", lines)
    short = put(tmp_path / "short.txt", "".join(f"{line}\n" for line in LINES[:9]))
    model = trained / "artifacts/tokenizer/llm_spm.model"
    commands = {
        "tokenizer": (file, ["--vocab_size", 400, "--model_prefix", "{}"]),
        "prepare": (file, ["--tok", model, "--seq_len", 16, "--out_dir", "{}"]),
        "eval": (short, ["--ckpt", trained / "artifacts/checkpoints/latest"]),
    }
    for stage, (source, words) in commands.items():
        run = lambda path, name: fine(
            course(
                stage, "--input", path, *(str(word).format(name) for word in words), cwd=tmp_path
            )
        )
        whole = run(source, "file")
        assert stage != "tokenizer" or next_words(whole)[2] == str(source)
        piped = through_a_pipe(source.read_bytes(), lambda path: run(path, "pipe"))
        if stage == "eval":
            assert (
                whole.splitlines()[1:] == piped.splitlines()[1:] and number("documents", piped) == 9
            )
        else:
            assert next_words(piped)[:3] == ["prepare", "--input", "-"] or stage == "prepare"
    assert any("zy" in Tokenizer.load(tmp_path / "pipe.model").piece(i) for i in range(400))
    assert (tmp_path / "pipe.model").read_bytes() == (tmp_path / "file.model").read_bytes()
    assert snapshot(tmp_path / "pipe") == snapshot(tmp_path / "file")


def test_training_and_evaluation_measure_the_same_documents(trained, tmp_path):
    "A hundred texts, whose files end in a line break, in none and in three, give the same shards, and the same figures."
    model, figures, shards = trained / "artifacts/tokenizer/llm_spm.model", [], []
    for end in ("\n", "", "\r\n\r\n\n"):
        for i, line in enumerate(LINES[:100]):
            put(
                tmp_path / f"{len(end)}" / f"{i:03d}.txt",
                line.replace(" ", "\r\n" if "\r" in end else "\n", 1) + end,
            )
        told = fine(
            course(
                "eval",
                "--input",
                f"{len(end)}",
                "--ckpt",
                trained / "artifacts/checkpoints/latest",
                cwd=tmp_path,
            )
        )
        figures.append([line for line in told.splitlines()[1:] if "next" not in line])
        fine(
            course(
                "prepare",
                "--input",
                f"{len(end)}",
                "--tok",
                model,
                "--seq_len",
                16,
                "--out_dir",
                f"s{len(end)}",
                cwd=tmp_path,
            )
        )
        shards.append(snapshot(tmp_path / f"s{len(end)}"))
    assert figures[0] == figures[1] == figures[2] and shards[0] == shards[1] == shards[2]
    totals = [Manifest.load(tmp_path / "s0").splits[split] for split in ("train", "val")]
    assert number("bytes", "\n".join(figures[0])) == sum(
        shard.bytes for split in totals for shard in split
    )


# what is held out


def test_documents_are_held_out_among_the_shards(place):
    "val.txt lies with the shards and not with the text; it gives back what was packed, and a new share takes effect."
    before = snapshot(place / "mine")
    told = prepared(place)
    assert (
        "held out, and goes to data/shards/val.txt" in told and snapshot(place / "mine") == before
    )
    held = list(Corpus(place / "data/shards/val.txt"))
    assert (
        held == validated(place)
        and set(held) < set(LINES)
        and sorted(held + trained_on(place)) == sorted(LINES)
    )
    assert (
        Manifest.load(place / "data/shards").val_sha256
        == snapshot(place / "data/shards")["val.txt"]
    )
    first = snapshot(place / "data/shards")
    prepared(place)
    assert snapshot(place / "data/shards") == first
    told = prepared(place, "--val_fraction", 0.2)
    assert len(validated(place)) > 25 > len(held) and row("val", told)[0] == len(validated(place))
    documents, tokens, share = (sum(part) for part in zip(row("train", told), row("val", told)))
    assert (documents, tokens) == (
        len(LINES),
        sum(len(TOKENIZER.encode_document(line)) for line in LINES),
    ) and abs(share - 100) < 0.11
    assert (
        "none is held out" in prepared(place, "--val_fraction", 0)
        and not (place / "data/shards/val.txt").exists()
    )


FORMS = {
    "poems": [f"{line}\n{line[::-1]}" for line in LINES[:20]],
    "code": [json.dumps({"text": line}) for line in LINES[:20]],
    "gaps": [f"{line}\n\n\n{line[::-1]}" for line in LINES[:20]],
    "brackets": [f'["{line}",' for line in LINES[:20]],
    "spaces": [f"  {line} \n\t{line}\t" for line in LINES[:20]],
    "one": LINES[:1],
    "plain": LINES[:20],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_held_out_text_gives_back_its_documents(tmp_path, form):
    "Whatever they look like, read without a flag; as lines where that is enough."
    text = as_text(FORMS[form])
    assert list(Corpus(put(tmp_path / "val.txt", text.decode()))) == FORMS[form]
    assert text.startswith(b"<|endoftext|>") == (form not in ("one", "plain"))


def test_whose_val_txt_it_is(place):
    "The user's own is validated on, wherever it lies; tales belong to the tales that they were written with, and to nothing else."
    own = put(place / "mine/val.txt", "my own\nvalidation text\n")
    for source in ("mine/lines.txt", "mine", "mine/*", "mine/*.txt", "mine/**"):
        told = prepared(place, source=source)
        assert "Validation: mine/val.txt" in told and validated(place) == [
            "my own",
            "validation text",
        ], source
        learned = fine(
            course(
                "tokenizer",
                "--input",
                source,
                "--vocab_size",
                400,
                "--model_prefix",
                "t",
                cwd=place,
            )
        )
        assert learned.splitlines()[0] == told.splitlines()[0]
        assert ("for validation: 1 file" in told) == (source != "mine/lines.txt")
        assert trained_on(place) == LINES and not (place / "data/shards/val.txt").exists()
    told = prepared(place, "--val_fraction", 0.1)
    assert "mine/val.txt is not used" in told and set(validated(place)) <= set(LINES)
    own.rename(place / "val.txt")
    assert "Validation: val.txt" in prepared(place, source="mine")
    (place / "val.txt").unlink()
    write_tales_corpus(place / "mine", n_train=30, n_val=4)
    tales = list(Corpus(place / "mine/val.txt"))
    for source in ("mine/corpus.txt", "mine"):
        assert (
            "Validation: mine/val.txt" in prepared(place, source=source)
            and validated(place) == tales
        ), source
    assert set(trained_on(place)) == {
        "\n".join(Corpus(place / "mine/corpus.txt")),
        "\n".join(LINES),
    }
    assert "held out, and goes to data/shards/val.txt" in prepared(place) and set(
        validated(place)
    ) <= set(LINES)
    put(place / "mine/corpus.txt", "\n".join(LINES))  # in the place of the tales
    assert "held out" in prepared(place, source="mine/corpus.txt") and not set(
        validated(place)
    ) & set(tales)
    put(place / "mine/val.txt", "edited\n")
    assert "Validation: mine/val.txt" in prepared(place, source="mine/corpus.txt") and validated(
        place
    ) == ["edited"]


def test_what_we_made_of_texts_is_no_text(trained, place):
    "Shards, a run and an export in a folder of texts are not entered, and said to be left out; named, they are refused."
    shutil.copytree(trained / "artifacts/checkpoints", place / "mine/run", symlinks=True)
    shutil.copytree(trained / "artifacts/checkpoints/latest", place / "mine/deep/model")
    (place / "mine/deep/model/manifest.json").unlink()  # as in an export
    told = fine(course("tokenizer", "--input", "mine", "--vocab_size", 400, "--force", cwd=place))
    assert next_words(told) == ["prepare", "--input", "mine"]
    for left_out in ("2 other files", "3 other files"):
        told = prepared(place, "--out_dir", "mine/shards", source="mine")
        assert (
            f"mine: every line is a document (0.0 MB); left out: {left_out} (shards or a model)"
            in told
        )
        assert sorted(trained_on(place, "mine/shards") + validated(place, "mine/shards")) == sorted(
            LINES
        )
    assert list(Corpus(f"{place}/mine/**/*")) == LINES
    done = course("tokenizer", "--input", "mine/shards", "--model_prefix", "t", cwd=place)
    assert done.code == 2 and "mine/shards" in done.lines[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_that_take_training_away_are_said(place, workers):
    "In documents, tokens and percent, of what is held out and of what is given; a few are a row, many are a sentence."
    held = prepared(place) and validated(place)
    put(place / "mine/lines.txt", "\n".join(LINES + held[:1] * 200))
    told = prepared(place, "--workers", workers)
    tokens = len(TOKENIZER.encode_document(held[0]))
    whole = tokens * 200 + sum(len(TOKENIZER.encode_document(line)) for line in LINES)
    assert row("left out", told) == (200, 200 * tokens, round(20_000 * tokens / whole, 1))
    assert (
        f"the text 200 copies of them: {200 * tokens / whole:.0%} of the tokens are not trained on"
        in told
    )
    put(place / "v.txt", "\n".join(LINES[:2]))
    told = prepared(place, "--val", "v.txt", "--workers", workers)
    assert (
        row("left out", told)[0] == 2 + 200 * (held[0] in LINES[:2])
        and "Remove the copies" not in told
    )
    assert (
        row("val", told)[0] == 2
        and row("train", told)[0] == len(LINES) + 200 - row("left out", told)[0]
    )


def test_a_manifest_of_an_earlier_version_opens(place):
    "It says nothing of a held-out text, nor of tokens left out."
    prepared(place, "--val_fraction", 0)
    path = place / "data/shards/manifest.json"
    raw = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("val_sha256", "excluded_tokens")
    }
    path.write_bytes(shards._as_file(files.with_checksum(raw)))
    assert Manifest.load(path.parent).val_sha256 == "" and len(TokenDataset(path.parent)) > 0
    prepared(place)


# what is measured, and what comes next

STATES = {  # how the shards are made: what eval measures without --input, and the next command after training on them
    "held out": ([], "data/shards/val.txt", []),
    "held out elsewhere": (["--out_dir", "s"], "data/raw/val.txt", ["--input", "s/val.txt"]),
    "a text with --val": (["--val", "v.txt"], "data/shards", []),
    "a text with --val, elsewhere": (
        ["--val", "v.txt", "--out_dir", "s"],
        "data/raw/val.txt",
        ["--input", "s"],
    ),
    "the text beside tales": (["--val", "data/raw/val.txt"], "data/raw/val.txt", []),
    "nothing": (["--val_fraction", 0], "data/raw/val.txt", None),
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_measured_is_what_training_validated_on(place, state):
    "Also where old tales lie in data/raw; the next command names a text that is there, or does without."
    from llm_course.cli import next_measurement
    from llm_course.options import SHARDS, VALIDATION
    from llm_course.preparation import usual_measure

    words, measured, following = STATES[state]
    put(place / "v.txt", "\n".join(LINES[:7]))
    write_tales_corpus(place / "data/raw", n_train=30, n_val=4)
    out = next_words(prepared(place, *words))
    data = "s" if "s" in words else "data/shards"
    assert out == ["train"] + (["--data", "s"] if data == "s" else [])
    os.chdir(place)
    assert usual_measure(SHARDS, VALIDATION) == measured
    told = next_words(next_measurement("c", data))
    assert told == (
        ["eval", "--ckpt", "c", *following]
        if following is not None
        else ["generate", "--ckpt", "c"]
    )
    if following is not None:
        source = Path(following[1] if following else measured)
        assert list(ShardTexts(source) if source.is_dir() else Corpus(source)) == validated(
            place, data
        )
    shutil.rmtree(place / "data/raw")
    assert validation_source(data, "data/raw/val.txt") == (
        None if state == "nothing" else data if "--val" in words else f"{data}/val.txt"
    )


def test_eval_and_export_find_the_text(trained, tmp_path):
    "From a text of one's own to figures, each command as the one before it says, without a text in data/raw."
    put(tmp_path / "lines.txt", "\n".join(LINES))
    shutil.copytree(trained / "artifacts/tokenizer", tmp_path / "artifacts/tokenizer")
    fine(
        course(
            "prepare", "--input", "lines.txt", "--seq_len", 16, "--documents", "line", cwd=tmp_path
        )
    )
    told = fine(course("train", "--config", "tiny", "--max_steps", 1, cwd=tmp_path))
    told = fine(course(*next_words(told), cwd=tmp_path))
    assert told.startswith("data/shards/val.txt: every line is a document")
    assert (number("documents", told), number("bytes", told)) == (
        len(validated(tmp_path)),
        sum(map(len, validated(tmp_path))),
    )
    assert (
        fine(course("eval", "--documents", "file", cwd=tmp_path))
        == told
        == fine(course("eval", "--input", "data/shards/val.txt", cwd=tmp_path))
    )
    through = fine(course("eval", "--input", "data/shards", cwd=tmp_path))
    assert through.splitlines()[1:] == told.splitlines()[1:]
    assert fine(course("export", cwd=tmp_path)).startswith("data/shards/val.txt")
    assert (
        f"{number('bits per byte', told):.3f}"
        in (tmp_path / "artifacts/export/model/README.md").read_text()
    )
    shutil.rmtree(tmp_path / "data")
    done = course("eval", cwd=tmp_path)
    assert done.code == 2 and "There is no text to measure on" in done.lines[0]


# the folder of shards


def test_hidden_files_of_others_stay_with_the_shards(place):
    "Files, links and folders, with their contents, through as many exchanges as there are."
    prepared(place)
    shards = place / "data/shards"
    (
        put(shards / ".env", "SECRET=1"),
        put(shards / ".gitkeep", ""),
        put(shards / ".git/refs/head", "main"),
    )
    (shards / ".link").symlink_to(".env")
    (shards / ".dangling").symlink_to("nowhere")
    others = {
        name: what
        for name, what in snapshot(shards).items()
        if name.startswith(".") and name != RECORD
    }
    assert len(others) == 7 - (not (shards / ".dangling").exists()) + (".dangling" in others)
    for words in ([], ["--val_fraction", 0.1], ["--val_fraction", 0]):
        prepared(place, *words)
        assert {
            name: what
            for name, what in snapshot(shards).items()
            if name.startswith(".") and name != RECORD
        } == others
        assert (
            os.readlink(shards / ".dangling") == "nowhere"
            and os.readlink(shards / ".link") == ".env"
        )
    assert sorted(path.name for path in shards.parent.iterdir()) == ["shards"]


class PowerCut(BaseException):
    "What stops a program here, as a failing machine does: nothing is cleaned up behind it."


@pytest.mark.parametrize("moment", range(12))
def test_hidden_files_survive_a_crash_at_any_moment(place, monkeypatch, moment):
    "Wherever an exchange stops, the file is in the folder, or in the old one that the next run puts back; and then all is clean."
    prepared(place, "--val_fraction", 0.1)
    folder, done = place / "data/shards", []
    put(folder / ".env", "SECRET=1")

    def cut(real):
        def operation(*args, **options):
            if len(done) >= moment:
                raise PowerCut
            done.append(args)
            return real(*args, **options)

        return operation

    for module, name in (
        (os, "rename"),
        (os, "link"),
        (os, "rmdir"),
        (files, "restore_folder"),
        (files, "clear_folder"),
    ):
        monkeypatch.setattr(module, name, cut(getattr(module, name)))
    try:
        assert (
            course("prepare", "--input", "mine/lines.txt", "--seq_len", 16, cwd=place).code == 0
            and moment == 11
        )
    except PowerCut:
        assert len(done) == moment < 11
    monkeypatch.undo()
    there = [path for path in (folder / ".env", place / "data/.shards.old/.env") if path.exists()]
    assert there and there[0].read_text() == "SECRET=1"
    prepared(place, "--val_fraction", 0.1)
    assert (folder / ".env").read_text() == "SECRET=1" and os.listdir(place / "data") == ["shards"]
    TokenDataset(folder).verify()


FOREIGN = {  # what lies in the folder: what is said, and whether --force replaces it
    "a text": ({"notes.txt": "mine"}, "holds other things (notes.txt)", False),
    "a folder": ({"deep/notes.txt": "mine"}, "holds other things (deep)", False),
    "a val.txt": ({"val.txt": "mine"}, "val.txt is not from this program", True),
    "tokens without a manifest": (
        {"train-00000.bin": "mine"},
        "holds train-00000.bin, but no manifest of this program",
        True,
    ),
    "another manifest": (
        {"manifest.json": '{"name": "my app"}'},
        "holds manifest.json, but no manifest of this program",
        True,
    ),
    "another tokenizer": ({"tokenizer.model": "mine"}, "holds tokenizer.model", True),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_of_somebody_else_is_left_alone(place, case):
    "What can be seen and is not ours is refused; what has our names, and nothing says that we wrote it, needs --force."
    files, told, can_force = FOREIGN[case]
    for name, text in files.items():
        put(place / "data/shards" / name, text)
    before = snapshot(place)
    words = ["prepare", "--input", "mine/lines.txt", "--seq_len", 16]
    done = course(*words, cwd=place)
    assert (
        done.code == 2
        and len(done.lines) == 1
        and told in done.lines[0]
        and snapshot(place) == before
    )
    assert course(*words, "--force", cwd=place).code == (0 if can_force else 2)
    if can_force:
        TokenDataset(place / "data/shards").verify()
        prepared(place)  # they are ours now
        put(place / "data/shards/val.txt", "edited")
        with pytest.raises(UserError, match="val.txt is damaged.*prepare --force"):
            TokenDataset(place / "data/shards").verify()
        done = course(*words, cwd=place)
        assert (
            done.code == 2
            and "val.txt has been changed since this program wrote it" in done.lines[0]
        )
        prepared(place, "--force")


def test_shards_without_a_place():
    "An empty path is refused by the function, too."
    with pytest.raises(UserError, match="empty"):
        write_shards(LINES, TOKENIZER, "")


def test_what_is_in_the_way_of_an_exchange_is_not_deleted(place):
    "A hidden neighbour with the name that we would give, and with somebody's files."
    prepared(place)
    theirs = put(place / "data/.shards.old/mine.txt", "mine")
    done = course("prepare", "--input", "mine/lines.txt", "--seq_len", 16, cwd=place)
    assert (
        done.code == 2
        and "mine.txt is in the way" in done.lines[0]
        and theirs.read_text() == "mine"
    )
    shutil.rmtree(place / "data/shards")
    assert (
        course("train", "--config", "tiny", cwd=place).code == 2 and theirs.exists()
    )  # nor is it taken for shards


# words on the command line

PATHS = [
    ("corpus", "folder"),
    ("tokenizer", "input"),
    ("tokenizer", "model_prefix"),
    ("prepare", "input"),
    ("prepare", "tok"),
    ("prepare", "out_dir"),
    ("prepare", "val"),
    ("train", "config"),
    ("train", "data"),
    ("train", "out"),
    ("train", "init_from"),
    ("eval", "tok"),
    ("eval", "ckpt"),
    ("eval", "input"),
    ("generate", "tok"),
    ("generate", "ckpt"),
    ("chat", "ckpt"),
    ("export", "tok"),
    ("export", "ckpt"),
    ("export", "out"),
    ("export", "input"),
    ("doctor", "data"),
    ("doctor", "checkpoints"),
    ("doctor", "tok"),
    ("plan", "config"),
    ("demo", "root"),
    ("demo", "config"),
]


@pytest.mark.parametrize("stage, flag", PATHS, ids="-".join)
def test_an_empty_path_is_refused(tmp_path, stage, flag):
    "Everywhere: from a variable that was never set, it would be the current folder."
    for value in ("", " "):
        done = course(stage, f"--{flag}", value, cwd=tmp_path)
        assert (
            done.code == 2
            and len(done.lines) == 1
            and f"--{flag}" in done.lines[0]
            and "empty" in done.lines[0]
        )
    assert os.listdir(tmp_path) == []


def test_every_path_is_known_as_one():
    "Whatever else takes a word is no path: a text, a number, a choice, a name, a field of the config."
    from llm_course.cli import main
    from llm_course.options import PATH, TEXT, ConfigOption

    options = {
        (stage, option.opts[0].removeprefix("--")): option
        for stage, command in main.commands.items()
        for option in command.params
    }
    paths = {words for words, option in options.items() if option.type is PATH}
    others = {
        flag
        for (_, flag), option in options.items()
        if option.type.name == "text"
        and option.type is not TEXT
        and not isinstance(option, ConfigOption)
    }
    assert set(PATHS) <= paths and paths - set(PATHS) == {("chat", "tok")} and others == {"device"}


@pytest.mark.parametrize(
    "words, told",
    [
        (
            ["tokenizer", "--input", "books/a.txt", "books/b.txt", "books/c.txt"],
            "quotes around it, as in --input 'books/*.txt'",
        ),
        (["tokenizer", "books/a.txt"], "Did you mean --input books/a.txt?"),
        (["generate", "Once"], "Did you mean --prompt Once?"),
        (
            ["generate", "--prompt", "Once", "upon", "a"],
            "'upon' belongs to no flag: --prompt takes one word, so put quotes",
        ),
        (["generate", "Once upon"], "Did you mean --prompt 'Once upon'?"),
        (["corpus", "extra"], "'extra' belongs to no flag."),
        (["corpus", "--seed", "-5"], "--seed"),
        (["tokenizer", "--model_prefix", "toks/"], "toks/llm_spm"),
        (["tokenizer", "--model_prefix", "toks/.model"], "toks/llm_spm"),
        (["tokenizer", "--model_prefix", ".."], "is a folder"),
        (["prepare", "--val", "v", "--val_fraction", "0.1"], "give one of them"),
        (["prepare", "--val_fraction", "nan"], "--val_fraction"),
        (["tokenizer", "--documents", "paragraph"], "Did you mean 'blank'?"),
        (["generate", "--prompt", "\udce9"], "Unicode"),
    ],
)
def test_words_that_cannot_be_meant(tmp_path, words, told):
    "One sentence, which says what would do; nothing is written."
    put(tmp_path / "data/raw/corpus.txt", "a text\n")
    before = snapshot(tmp_path)
    done = course(*words, cwd=tmp_path)
    assert (
        done.code == 2
        and len(done.lines) == 1
        and told in done.lines[0]
        and snapshot(tmp_path) == before
    ), done.err


def test_home_and_bytes_that_the_locale_does_not_know(place, monkeypatch):
    "`--out_dir=~/x` is in the home folder; a prompt or a separator whose bytes Python kept is UTF-8."
    from llm_course.cli import TEXT

    monkeypatch.setenv("HOME", str(place / "home"))
    put(place / "home/t.txt", "\n".join(LINES))
    prepared(place, "--out_dir=~/x", source="~/t.txt")
    assert (place / "home/x/manifest.json").exists() and not (place / "~").exists()
    assert TEXT.convert("caf\udcc3\udca9", None, None) == TEXT.convert("café", None, None) == "café"
    put(place / "mine/lines.txt", "é".join(LINES))
    told = prepared(place, "--documents", "\udcc3\udca9")
    assert "'é' stands between documents" in told


def test_negative_seeds_write_no_tales():
    "-5 would be 5 for Python's random numbers."
    with pytest.raises(UserError, match="-5"):
        sample_tales(-5, 1)
