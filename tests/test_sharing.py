"""What others get: the published folder in other programs and in ours, the card against the run, GGUF against the weights."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import PATIENCE, ROOT, course, fine, snapshot

from llm_course.checkpoint import Checkpoint
from llm_course.config import ModelConfig, load_config
from llm_course.corpus import Corpus
from llm_course.demo import draw_losses
from llm_course.evaluation import evaluate
from llm_course.export import EXPORT_FILES, rounded
from llm_course.files import RECORD, UserError, is_ours, read_json, replace_folder, write_ours
from llm_course.gguf import write_gguf
from llm_course.gpt import GPT
from llm_course.integrity import load_verified
from llm_course.model_card import Facts, collect_facts, export_hf, model_card, portable
from llm_course.pipeline import train
from llm_course.runs import read_log
from llm_course.shards import write_shards
from llm_course.tokenizer import Tokenizer

SHAPE = dict(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=1, seq_len=64)


def quiet(text: str) -> None:
    "A voice that says nothing."


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Checkpoint:
    return load_verified(trained / "artifacts" / "checkpoints")


@pytest.fixture(scope="module")
def documents(trained: Path) -> list[str]:
    return list(islice(Corpus(trained / "data" / "raw" / "val.txt", "line"), 4))


@pytest.fixture(scope="module")
def published(
    checkpoint: Checkpoint, documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    "An export that the tests read and do not change."
    return export_hf(
        checkpoint, tmp_path_factory.mktemp("exports") / "tale teller", documents, log=quiet
    )


@pytest.fixture
def drawn(checkpoint: Checkpoint):
    "Checkpoints of other shapes: random weights, large enough that predictions differ, and the trained tokenizer."

    def draw(**shape: object) -> Checkpoint:
        torch.manual_seed(0)
        model = GPT(
            ModelConfig(**{**SHAPE, "vocab_size": checkpoint.tokenizer.vocab_size, **shape})
        ).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4) if weight.ndim == 2 else weight.add_(0.1 * torch.randn_like(weight))
        return replace(checkpoint, model=model)

    return draw


def tokens(
    checkpoint: Checkpoint, text: str = "Once upon a time, there lived a shy, small fox"
) -> torch.Tensor:
    return torch.tensor([[checkpoint.tokenizer.eos_id, *checkpoint.tokenizer.encode(text)]])


# the folder


SHAPES = [{}, {"tie_embeddings": False}, {"n_kv_heads": 4, "head_dim": 24}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_and_ours_open_an_export(drawn, shape: dict, dtype: str, tmp_path: Path):
    "Nothing missing, nothing left over; the logits of the stored weights, to the bit; the same story."
    transformers = pytest.importorskip("transformers")
    checkpoint = drawn(**shape)
    folder = export_hf(checkpoint, tmp_path / "export", dtype=dtype, log=quiet)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.dtype == getattr(torch, dtype)
    ids, stored = tokens(checkpoint), rounded(checkpoint.model, dtype)
    with torch.no_grad():
        assert torch.equal(theirs.float()(ids).logits, stored(ids))
        assert torch.equal(load_verified(folder).model(ids), stored(ids))
        assert torch.equal(stored(ids), checkpoint.model(ids)) == (dtype == "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a fox,  <s>\n🦊") == checkpoint.tokenizer.encode("a fox,  <s>\n🦊")


def test_a_reader_in_its_own_precision_computes_as_ours_does(
    checkpoint: Checkpoint, tmp_path: Path
):
    "Who opens a bfloat16 export as it is gets bfloat16 products: near the logits of the card, not equal to them."
    transformers = pytest.importorskip("transformers")
    folder = export_hf(checkpoint, tmp_path / "export", dtype="bfloat16", log=quiet)
    theirs, ids = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        tokens(checkpoint),
    )
    with torch.no_grad():
        ours = load_verified(folder).model(ids)
        assert 0 < (theirs(ids).logits.float() - ours).abs().max() < 0.02 * ours.abs().max()


def test_an_export_holds_what_it_should_and_nothing_else(published: Path, trained: Path):
    "No pickle, no zip, no optimizer; no word of the machine that it was made on."
    assert {path.name for path in published.iterdir()} == set(EXPORT_FILES)
    for path in published.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), (
            path.name
        )
        for private in (trained.name, str(Path.home()), str(ROOT), os.sep + trained.parent.name):
            assert private.encode() not in data, f"{path.name} names {private}"


def test_tied_weights_stand_there_once(drawn, tmp_path: Path):
    sizes = {}
    for tied in (True, False):
        checkpoint = drawn(tie_embeddings=tied)
        folder = export_hf(checkpoint, tmp_path / str(tied), dtype="bfloat16", log=quiet)
        data = (folder / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert ("lm_head.weight" in header) is not tied
        sizes[tied] = len(data) - 8 - int.from_bytes(data[:8], "little")
        assert sizes[tied] == 2 * checkpoint.model.config.n_params
    assert sizes[True] < sizes[False]


def test_the_same_export_twice(
    published: Path, checkpoint: Checkpoint, documents: list[str], tmp_path: Path
):
    "Byte for byte, and an export that somebody has downloaded is exported again as it was, but for what only the run knew."
    again = export_hf(checkpoint, tmp_path / published.name, documents, log=quiet)
    assert snapshot(again) == snapshot(published)
    second = export_hf(load_verified(published), tmp_path / "second", log=quiet)
    assert {k: v for k, v in snapshot(second).items() if k != "README.md"} == {
        k: v for k, v in snapshot(published).items() if k != "README.md"
    }
    assert "How it was trained was not recorded." in (second / "README.md").read_text(
        encoding="utf-8"
    )


def test_a_weight_that_float16_cannot_hold_is_refused(drawn, tmp_path: Path):
    checkpoint = drawn()
    checkpoint.model.model.norm.weight.data[0] = 1e6
    with pytest.raises(
        UserError, match="weights that float16 cannot hold: choose bfloat16 or float32"
    ):
        export_hf(checkpoint, tmp_path / "export", dtype="float16", log=quiet)
    assert not list(tmp_path.iterdir())


def test_exporting_changes_nothing_in_the_model(checkpoint: Checkpoint, tmp_path: Path):
    before = {name: weight.clone() for name, weight in checkpoint.model.named_parameters()}
    state = torch.get_rng_state()
    export_hf(checkpoint, tmp_path / "export", dtype="bfloat16", log=quiet)
    write_gguf(checkpoint, tmp_path / "tale.gguf", "f16", quiet)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(weight, before[name]) for name, weight in checkpoint.model.named_parameters()
    )


# whole or not at all


def test_an_earlier_export_is_replaced(
    checkpoint: Checkpoint, documents: list[str], tmp_path: Path
):
    "Whole: the files are those of the second export, and nothing is left beside them."
    folder = export_hf(checkpoint, tmp_path / "export", dtype="bfloat16", log=quiet)
    first = snapshot(folder)
    assert export_hf(checkpoint, folder, documents, log=quiet) == folder
    assert (
        snapshot(folder) != first
        and {path.name for path in tmp_path.iterdir()} == {"export", RECORD}
        and is_ours(folder)
    )


def unread() -> Iterator[str]:
    "A text that nobody may begin to read."
    raise AssertionError("the text was read before the place was looked at")
    yield ""


REFUSED = {
    "notes": (
        ["notes.txt", ".hidden"],
        r"export holds files that no export wrote \(notes.txt\): move them away, or choose another folder.",
    ),
    "a page": (
        ["README.md"],
        "export is not from this program: move it away, name another place, or replace it with --force.",
    ),
    "a model from elsewhere": (
        ["model.safetensors", "config.json", "README.md"],
        "export is not from this program: move it away, name another place, or replace it with --force.",
    ),
    "a checkpoint": (
        ["model.safetensors", "config.json", "trainer.pt", "manifest.json"],
        "export is a checkpoint: choose another folder.",
    ),
}


@pytest.mark.parametrize("names, sentence", REFUSED.values(), ids=REFUSED)
def test_any_other_folder_is_refused_and_left_alone(
    names: list, sentence: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch
):
    "Before anything is measured or said, in a sentence that names the place as it was typed."
    monkeypatch.chdir(tmp_path)
    Path("export").mkdir()
    for name in names:
        Path("export", name).write_text("mine")
    before, said = snapshot(tmp_path), []
    with pytest.raises(UserError, match=f"^{sentence}$"):
        export_hf(checkpoint, "export", unread(), log=said.append)
    assert snapshot(tmp_path) == before and not said


CHANGED = {
    "the card": lambda folder: (folder / "README.md").write_text("My own words."),
    "a weight": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1] + b"!"
    ),
    "a file less": lambda folder: (folder / "config.json").unlink(),
    "no record": lambda folder: (folder.parent / RECORD).unlink(),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_an_export_changed_by_hand_is_replaced_with_force_alone(
    change, checkpoint: Checkpoint, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    whole = snapshot(export_hf(checkpoint, "export", log=quiet))
    change(Path("export"))
    before = snapshot(tmp_path)
    with pytest.raises(
        UserError, match="^export (has been changed since|is not from) this program.*--force"
    ):
        export_hf(checkpoint, "export", unread(), log=quiet)
    assert snapshot(tmp_path) == before
    export_hf(checkpoint, "export", force=True, log=quiet)
    assert snapshot(Path("export")) == whole and is_ours("export")


def test_force_takes_no_files_that_no_export_writes(checkpoint: Checkpoint, tmp_path: Path):
    "A repository of git, notes: whoever forces an export keeps them."
    folder = export_hf(checkpoint, tmp_path / "export", log=quiet)
    (folder / ".git").mkdir()
    with pytest.raises(UserError, match=r"no export wrote \(.git\): move them away"):
        export_hf(checkpoint, folder, force=True, log=quiet)
    assert (folder / ".git").is_dir()


def test_the_hidden_folders_of_others_stay(checkpoint: Checkpoint, tmp_path: Path):
    "While an export is made and exchanged, only names of its own come and go beside it."
    for name in (".export.new", ".export.old", ".export.new.tmp"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        export_hf(checkpoint, tmp_path / "export", log=quiet)
    assert {path.name for path in tmp_path.iterdir()} == {
        "export",
        RECORD,
        ".export.new",
        ".export.old",
        ".export.new.tmp",
    }


def test_a_checkpoint_is_no_place_for_an_export(trained: Path, checkpoint: Checkpoint):
    "By its own name, by `latest`, and the folder that holds it."
    runs = trained / "artifacts" / "checkpoints"
    before = snapshot(runs)
    for place in (checkpoint.path, runs / "latest"):
        with pytest.raises(UserError, match=f"{place.name} is a checkpoint: choose another folder"):
            export_hf(checkpoint, place, unread(), log=quiet)
    with pytest.raises(UserError, match="checkpoints holds files that no export wrote"):
        export_hf(checkpoint, runs, unread(), log=quiet)
    assert snapshot(runs) == before


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_not(
    checkpoint: Checkpoint, tmp_path: Path
):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: choose the name of a folder"):
        export_hf(checkpoint, tmp_path / "file", log=quiet)
    (tmp_path / "empty").mkdir()
    assert (export_hf(checkpoint, tmp_path / "empty", log=quiet) / "config.json").is_file()


def test_a_place_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path):
    "One sentence; and no half of a folder."
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written: .*What was there before is untouched"):
        export_hf(checkpoint, tmp_path / "file" / "export", log=quiet)
    with pytest.raises(UserError, match="cannot be written"):
        write_gguf(checkpoint, tmp_path / "file" / "tale.gguf", log=quiet)
    assert snapshot(tmp_path).keys() == {"file"}


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_a_disk_that_fails_leaves_the_earlier_export(
    when: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch
):
    "The disk is full in the middle of the new folder, or a rename fails between the old one and the new."
    from llm_course import export

    folder = export_hf(checkpoint, tmp_path / "export", log=quiet)
    before, full = snapshot(folder), OSError(28, "No space left on device")

    def no_space(path: Path, data: bytes, write=export.write_synced) -> None:
        if path.name == "README.md":
            raise full
        write(path, data)

    def no_move(path: Path, target: Path, rename=Path.rename) -> Path:
        if target == folder and path.name.startswith(".export") and path.name.endswith("new"):
            raise full
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_synced", no_space) if when == "writing" else patched.setattr(
            Path, "rename", no_move
        )
        with pytest.raises(UserError, match="export cannot be written: No space left on device"):
            export_hf(checkpoint, folder, dtype="bfloat16", log=quiet)
    assert snapshot(folder) == before and is_ours(folder)
    assert (
        export_hf(checkpoint, folder, dtype="bfloat16", log=quiet) == folder
    )  # what was left behind does not disturb
    assert (
        {path.name for path in tmp_path.iterdir()} == {"export", RECORD}
        and snapshot(folder) != before
        and is_ours(folder)
    )


def test_two_exports_do_not_mix(checkpoint: Checkpoint, tmp_path: Path):
    "The second to come is told so; one that was killed between its two renames leaves the earlier export, which comes back."
    folder, old = tmp_path / "export", tmp_path / ".export.llm-course-old"
    with pytest.raises(
        UserError,
        match="Another run is writing to .*export.*: wait for it, or choose another --out",
    ):
        with replace_folder(folder, prefix="llm-course-"):
            export_hf(checkpoint, folder, log=quiet)
    assert not list(tmp_path.iterdir())
    before = snapshot(export_hf(checkpoint, folder, log=quiet))
    folder.rename(old)
    with pytest.raises(KeyboardInterrupt), replace_folder(folder, prefix="llm-course-"):
        assert snapshot(folder) == before
        raise KeyboardInterrupt
    assert snapshot(folder) == before and is_ours(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"export", RECORD}


# the card


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_accepts_the_card(published: Path, checkpoint: Checkpoint, documents: list[str]):
    "Its own library reads the head, and finds in it what was measured."
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card(published)).data
    assert (data.license, data.language, data.library_name, data.pipeline_tag) == (
        None,
        None,
        "transformers",
        "text-generation",
    )
    assert data.tags == ["llm_course", "qwen3"] and data.base_model is None
    measured = evaluate(checkpoint.model, checkpoint.tokenizer, documents)
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {
        "bits_per_byte": round(measured.bits_per_byte, 6),
        "perplexity": round(measured.perplexity, 6),
    }
    assert {result.metric_name for result in data.eval_results} == {
        "bits per byte",
        "perplexity per token of its own tokenizer",
    }
    assert hub.ModelCard(
        model_card(
            Facts('a "name": with\\ all # of it – 🦊', "f", checkpoint.model.config, "float32")
        )
    ).data


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


def test_every_number_of_the_card_stands_in_the_run(
    published: Path, checkpoint: Checkpoint, documents: list[str], trained: Path
):
    "Read by machine: outside code and links no number is there that manifest, log, config or evaluation do not have."
    text = card(published)
    _, head, body = text.split("---\n", 2)
    body = re.sub(r"```.*?```|`[^`]*`|\(https?:[^)]*\)", "", body, flags=re.S)
    manifest = read_json(checkpoint.path / "manifest.json")
    log = read_log(trained / "artifacts" / "checkpoints")
    e = evaluate(checkpoint.model, checkpoint.tokenizer, documents)
    shape, run = asdict(checkpoint.model.config), manifest["run"]
    whole = [
        *shape.values(),
        run["parameters"],
        run["tokens"],
        manifest["step"],
        e.documents,
        e.bytes,
        e.tokens,
        e.context - e.stride + 1,
        *(count for split in run["data"].values() for count in split.values()),
    ]
    losses = [entry[key] for entry in log for key in ("loss", "val_loss") if key in entry]
    allowed = {f"{n:,}" for n in whole if type(n) is int} | {f"{loss:.4f}" for loss in losses}
    allowed |= {
        f"{e.bits_per_byte:.4f}",
        f"{e.perplexity:.3f}",
        f"{e.without_ends.bits_per_byte:.4f}",
        f"{e.entropy_bits_per_byte:.4f}",
        f"{100 * e.gap:.1f}",
    }
    said = numbers(body.replace("float32", "").replace("UTF-8", "").replace("Qwen3", ""))
    assert said <= allowed, said - allowed
    for figure in (
        run["tokens"],
        run["parameters"],
        manifest["step"],
        run["data"]["train"]["bytes"],
        e.bytes,
    ):
        assert f"{figure:,}" in said
    for key in ("loss", "val_loss"):
        assert f"{[entry[key] for entry in log if key in entry][-1]:.4f}" in said


def test_a_checkpoint_in_the_middle_tells_its_own_losses(trained: Path, tmp_path: Path):
    "Not those of the end of the run; and beside the log of another run, none."
    early = load_verified(trained / "artifacts" / "checkpoints" / "step-000004")
    log = read_log(trained / "artifacts" / "checkpoints")
    losses = collect_facts(early, name="", folder="", dtype="float32").losses
    assert losses == {
        key: max((e["step"], e[key]) for e in log if key in e and e["step"] <= 4)
        for key in ("loss", "val_loss")
    }
    shutil.copytree(early.path, tmp_path / early.path.name)
    assert not collect_facts(
        load_verified(tmp_path / early.path.name), name="", folder="", dtype="float32"
    ).losses
    log[0]["config"]["model"]["d_model"] += 1
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    assert not collect_facts(
        load_verified(tmp_path / early.path.name), name="", folder="", dtype="float32"
    ).losses


def test_the_config_in_the_card_is_a_config(
    published: Path, checkpoint: Checkpoint, tmp_path: Path
):
    (tmp_path / "run.json").write_text(re.search(r"```json\n(.*?)```", card(published), re.S)[1])
    assert load_config(tmp_path / "run.json") == checkpoint.config


def examples(folder: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", card(folder), re.M | re.S)


def python(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    "A script in a process of its own, with `folder` as its working directory."
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )


def test_the_first_example_of_the_card_runs(published: Path, checkpoint: Checkpoint):
    "As it stands, in a process of its own; the text begins as it was asked to, and nothing is complained about."
    pytest.importorskip("transformers")
    code = next(code for code in examples(published, "python") if "transformers" in code)
    done = python(code, published.parent, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > len(
        "Once upon a time\n"
    )
    assert not re.search(r"warn|deprecat|attention mask|pad", done.stderr, re.I), done.stderr


def test_the_commands_of_the_card_run(published: Path, checkpoint: Checkpoint, tmp_path: Path):
    "Each line, in the folder that holds the export."
    shutil.copytree(published, tmp_path / published.name)
    lines = examples(published, "sh")[0].splitlines()  # the second of them is how it was trained
    assert len(lines) == 2
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "llm-course"
        out = fine(course(*words, cwd=tmp_path))
        assert words[0] != "generate" or out.startswith("Once upon a time")
    assert (tmp_path / f"{published.name}.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.llama
def test_the_llama_example_of_the_card_runs(
    published: Path, checkpoint: Checkpoint, tmp_path: Path
):
    pytest.importorskip("llama_cpp")
    write_gguf(checkpoint, tmp_path / f"{published.name}.gguf", log=quiet)
    code = next(code for code in examples(published, "python") if "llama_cpp" in code)
    done = python(code, tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_licence(checkpoint: Checkpoint, documents: list[str], tmp_path: Path):
    "The one that was given; else the card says that there is none, and so does the program: also where the text is tales."
    said = []
    text = card(export_hf(checkpoint, tmp_path / "none", documents, log=said.append))
    assert "license:" not in text and "language:" not in text and "Not stated." in text
    assert said == ["The card says that no licence is stated: choose one with --license."]
    text = card(export_hf(checkpoint, tmp_path / "given", license="apache-2.0", log=said.append))
    assert 'license: "apache-2.0"' in text and "`apache-2.0`." in text and len(said) == 1
    assert "## Evaluation\n\nNot measured." in text and "model-index" not in text


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def own(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    "A model that has learned from a text of one's own."
    folder = tmp_path_factory.mktemp("own")
    write_shards(
        [f"Sentence {i} of somebody's own, in no grammar that we know." for i in range(200)],
        Tokenizer.load(trained / "data" / "shards"),
        folder / "shards",
        val_documents=["A last one."],
        seq_len=64,
    )
    result = train(
        load_config("tiny", {"seq_len": 64, "max_steps": 1}),
        folder / "shards",
        folder / "run",
        progress=False,
        log=quiet,
    )
    return load_verified(result.checkpoint)


def test_tales_as_the_evaluation_say_nothing_of_what_was_learned(
    own: Checkpoint, documents: list[str], tmp_path: Path
):
    "Only the section on the evaluation, and the head's name for its text, speak of tales."
    text = card(export_hf(own, tmp_path / "own", documents, log=quiet))
    _, head, body = text.split("---\n", 2)
    assert (
        "license" not in head
        and "language" not in head
        and "Not stated." in section(text, "Licence")
    )
    assert "tales" in section(text, "Evaluation") and "tales" not in body.replace(
        section(text, "Evaluation"), ""
    )
    assert (
        "It is another text than the val split above, or a part of it." in text
        and "whoever shares this model has to say" in section(text, "Data")
    )


def test_what_is_said_of_the_evaluated_text(
    trained: Path, checkpoint: Checkpoint, documents: list[str], tmp_path: Path
):
    "Tales or not; as much text as the val split of the run, or not that."
    whole = list(Corpus(trained / "data" / "raw" / "val.txt", "line"))
    text = section(card(export_hf(checkpoint, tmp_path / "whole", whole, log=quiet)), "Evaluation")
    assert (
        "Its documents are *tales*" in text
        and "It has as many documents and bytes as the val split above." in text
    )
    assert "The gap is" in text
    text = section(
        card(
            export_hf(checkpoint, tmp_path / "part", [*documents, "A text of my own."], log=quiet)
        ),
        "Evaluation",
    )
    assert (
        "Not all of its documents are tales" in text
        and "another text than the val split above" in text
        and "gap" not in text
    )


def test_a_model_from_elsewhere_is_not_called_ours(
    published: Path, documents: list[str], tmp_path: Path
):
    "A folder without a manifest: no tag, no maker, no data; whether the text was learned from, nobody knows."
    folder = shutil.copytree(published, tmp_path / "theirs")
    text = card(export_hf(load_verified(folder), tmp_path / "again", documents, log=quiet))
    assert 'tags: ["qwen3"]' in text and "made with llm_course" not in text
    assert "Whether the model has learned from it was not recorded." in section(text, "Evaluation")
    for name in ("Data", "Training"):
        assert "was not recorded." in section(text, name) and "tales" not in section(text, name)


@pytest.fixture
def told(checkpoint: Checkpoint, tmp_path: Path):
    "Facts of a checkpoint whose manifest says something else of its run."

    def tell(**run: object) -> Facts:
        manifest = read_json(checkpoint.path / "manifest.json")
        (tmp_path / "manifest.json").write_text(
            json.dumps({**manifest, "run": {**manifest["run"], **run}})
        )
        return collect_facts(
            replace(checkpoint, path=tmp_path), name="tale", folder="tale", dtype="float32"
        )

    return tell


def test_all_commands_of_a_run_stand_in_the_card_in_order(told):
    commands = [
        "llm-course train --data /home/me/shards",
        "llm-course train --resume --out '../runs/tale'",
    ]
    assert (
        "```sh\nllm-course train --data shards\nllm-course train --resume --out tale\n```"
        in model_card(told(commands=commands))
    )
    assert "```sh\n" not in section(model_card(told(commands=[])), "Training")


@pytest.mark.parametrize(
    "name, sha256, sentence",
    [
        (
            "first",
            "a" * 64,
            f"Training began from first (sha256 {'a' * 64}); what that had learned from is not counted here.",
        ),
        (
            "owner/first",
            None,
            "Training began from owner/first; what that had learned from is not counted here.",
        ),
    ],
)
def test_what_a_run_began_from(told, name: str, sha256: str | None, sentence: str):
    "It is in the card; in the head only where its name is one of the Hub's."
    hub = pytest.importorskip("huggingface_hub")
    text = model_card(told(init_from={"name": name, "sha256": sha256}))
    assert sentence in section(text, "Data")
    assert hub.ModelCard(text).data.base_model == (name if "/" in name else None)
    assert "Training began" not in model_card(told(init_from=None))


def test_the_figures_are_those_of_the_published_weights(
    checkpoint: Checkpoint, documents: list[str], tmp_path: Path
):
    "In bfloat16 the weights are others, and so is the loss, a little: the card has that one."
    text = card(export_hf(checkpoint, tmp_path / "export", documents, dtype="bfloat16", log=quiet))
    stored = evaluate(load_verified(tmp_path / "export").model, checkpoint.tokenizer, documents)
    given = evaluate(checkpoint.model, checkpoint.tokenizer, documents)
    assert f'"value": {round(stored.bits_per_byte, 6)}}}' in text
    assert round(stored.bits_per_byte, 6) != round(given.bits_per_byte, 6)


PLACES = {
    "/home/me/shards": "shards",
    "~/runs/tale/": "tale",
    r"C:\Users\me\run": "run",
    "C:/Users/me/run": "run",
    "--out=/home/me/x": "--out=x",
    r"\\server\share\x": "x",
    r"--data=\\server\share\x" + "\\": "--data=x",
    "//server/share/x": "x",
    "file:///home/me/x": "x",
    "https://me:secret@host/a/x": "x",
    "https://host": "''",
    "s3://bucket/x": "x",
    "../../me/x": "x",
    "a/../../x": "x",
    r"..\me\x": "x",
    "..": "..",
    "~me": "'~'",
    "x,/home/me/y": "y",
    "/": "''",
    "data/shards": "data/shards",
    "./x": "./x",
    "--lr=3e-4": "--lr=3e-4",
    "1..2": "1..2",
    "a b": "'a b'",
    "été/x-y_z.*": "'été/x-y_z.*'",
}


@pytest.mark.parametrize("word, left", PLACES.items())
def test_the_command_in_the_card_names_no_place(word: str, left: str):
    "Of a path that says where it lies its last name stays, whatever the system and however it is written."
    assert portable(f"llm-course train '{word}'") == f"llm-course train {left}"


def test_a_command_with_half_a_quote_names_no_place():
    assert "home" not in portable("llm-course train --data /home/me/don't")


def test_the_card_has_the_command_of_the_run(trained: Path, tmp_path: Path):
    "As it was typed, but for where the folders lay."
    config = load_config("tiny", {"seq_len": 64, "max_steps": 1})
    typed = f"llm-course train --config tiny --data '{trained}/data/shards' --max_steps 1"
    result = train(
        config,
        trained / "data" / "shards",
        tmp_path / "run",
        progress=False,
        log=quiet,
        command=typed,
    )
    folder = export_hf(load_verified(result.checkpoint), tmp_path / "export", log=quiet)
    assert "```sh\nllm-course train --config tiny --data shards --max_steps 1\n```" in card(folder)
    assert trained.name not in card(folder) and str(tmp_path) not in card(folder)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"dtype": "bf16"}, r"dtype is 'bf16': it must be one of float32, bfloat16, float16\."),
        ({"dtype": "float61"}, "Did you mean 'float16'|Did you mean float16"),
        ({"license": "MIT License"}, "license is 'MIT License': write it as the Hub does"),
    ],
)
def test_wrong_choices_are_refused_in_a_sentence(
    options: dict, sentence: str, checkpoint: Checkpoint, tmp_path: Path
):
    said = []
    with pytest.raises(UserError, match=sentence):
        export_hf(checkpoint, tmp_path / "export", unread(), log=said.append, **options)
    if "license" in options:
        with pytest.raises(UserError, match=sentence):
            write_gguf(checkpoint, tmp_path / "tale.gguf", log=said.append, **options)
    assert not list(tmp_path.iterdir()) and not said


# GGUF


def opened(path: Path):
    return pytest.importorskip("gguf").GGUFReader(path)


def value(reader, key: str) -> object:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensors_of_a_gguf_file_are_ours(drawn, shape: dict, dtype: str, tmp_path: Path):
    "To the bit in f32, rounded to nearest in f16, within half a step in q8_0; the gains of the norms always to the bit."
    gguf = pytest.importorskip("gguf")
    checkpoint = drawn(**shape)
    reader = opened(write_gguf(checkpoint, tmp_path / "tale.gguf", dtype, quiet))
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, checkpoint.model.config.n_layers)
    assert len(found) == len(list(checkpoint.model.parameters()))
    for name, weight in checkpoint.model.named_parameters():
        tensor, weight = (
            found[names.get_name(name, try_suffixes=(".weight",))],
            weight.detach().numpy(),
        )
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        stored = "f32" if weight.ndim == 1 else dtype
        assert tensor.tensor_type.name == stored.upper(), name
        if stored == "q8_0":
            blocks = weight.reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            slack = 127 * step * 2.0**-11 + 2.0**-18  # the step itself is stored in f16
            assert (np.abs(numbers.reshape(-1, 32) - blocks) <= step / 2 + slack).all(), name
        else:
            assert np.array_equal(
                numbers, weight.astype(np.float16).astype(np.float32) if stored == "f16" else weight
            ), name


def test_the_facts_of_a_gguf_file_are_ours(drawn, tmp_path: Path):
    "Shape, vocabulary, special tokens: what llama.cpp builds the model from."
    checkpoint = drawn(head_dim=24, rope_theta=50_000.0)
    reader = opened(
        write_gguf(
            checkpoint, tmp_path / "tale.gguf", name="The tale teller", license="mit", log=quiet
        )
    )
    shape, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    wanted = {
        "block_count": shape.n_layers,
        "context_length": shape.seq_len,
        "embedding_length": shape.d_model,
        "feed_forward_length": shape.d_ff,
        "attention.head_count": shape.n_heads,
        "attention.head_count_kv": shape.n_kv_heads,
        "attention.key_length": 24,
        "attention.value_length": 24,
        "rope.freq_base": 50_000.0,
        "vocab_size": shape.vocab_size,
    }
    assert {key: value(reader, f"qwen3.{key}") for key in wanted} == wanted
    assert np.float32(value(reader, "qwen3.attention.layer_norm_rms_epsilon")) == np.float32(
        shape.norm_eps
    )
    assert (
        value(reader, "general.architecture"),
        value(reader, "general.name"),
        value(reader, "general.license"),
    ) == ("qwen3", "The tale teller", "mit")
    assert [
        value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown")
    ] == [tokenizer.eos_id, tokenizer.eos_id, tokenizer.unk_id]
    assert value(reader, "tokenizer.ggml.tokens") == [
        tokenizer.piece(i) for i in range(tokenizer.vocab_size)
    ]
    assert not any(
        value(reader, f"tokenizer.ggml.{name}")
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
    )


def test_rows_that_q8_0_cannot_pack_are_f16_and_said_so(drawn, tmp_path: Path):
    "d_ff is 96 = 3 · 32 and d_model 40 is no multiple: what reads the stream is f16, what reads the MLP's inside is q8_0."
    said = []
    checkpoint = drawn(d_model=40, head_dim=16)
    reader = opened(write_gguf(checkpoint, tmp_path / "tale.gguf", "q8_0", said.append))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    narrow = [
        name
        for name, weight in checkpoint.model.named_parameters()
        if weight.ndim == 2 and weight.shape[1] % 32
    ]
    assert list(types.values()).count("F16") == len(narrow) and types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == types["blk.0.attn_output.weight"] == "Q8_0"
    assert len(said) == 1 and f"for {len(narrow)} matrices" in said[0]


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_the_same_gguf_bytes_twice_and_an_older_gguf_file_is_replaced(
    checkpoint: Checkpoint, dtype: str, tmp_path: Path
):
    pytest.importorskip("gguf")
    first, second = (
        write_gguf(checkpoint, tmp_path / name, dtype, quiet) for name in ("one.gguf", "two.gguf")
    )
    assert first.read_bytes() == second.read_bytes()
    write_gguf(checkpoint, second, "f16" if dtype == "f32" else "f32", quiet)
    assert write_gguf(checkpoint, second, dtype, quiet).read_bytes() == first.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one.gguf", "two.gguf", RECORD}
    assert str(checkpoint.path).encode() not in first.read_bytes()


def tokenizer_of_ours(path: Path) -> None:
    with write_ours(path, what="a tokenizer") as file:
        file.write(b"learned")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"A corpus."),
        lambda path: path.write_bytes(b""),
        tokenizer_of_ours,
        lambda path: path.write_bytes(b"GGUF, somebody else's"),
    ],
    ids=["text", "empty", "our tokenizer", "gguf"],
)
def test_no_other_file_is_written_over(make, checkpoint: Checkpoint, tmp_path: Path, monkeypatch):
    "A corpus, an empty file, what is ours and something else, a model from another program: each stays, but with force."
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    make(Path("mine"))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="^mine is (not )?from this program.*--force.$"):
        write_gguf(checkpoint, "mine", log=quiet)
    assert snapshot(tmp_path) == before
    assert write_gguf(checkpoint, "mine", log=quiet, force=True).read_bytes()[
        :4
    ] == b"GGUF" and is_ours("mine")


def test_a_folder_is_no_place_for_a_gguf_file(checkpoint: Checkpoint, tmp_path: Path):
    for force in (False, True):
        with pytest.raises(UserError, match="not from this program|it is a folder"):
            write_gguf(checkpoint, tmp_path, log=quiet, force=force)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, path",
    [
        ("export --to hf --out new", "new/README.md"),
        ("export --to gguf --out new.gguf", "new.gguf"),
        ("demo --root r --config tiny --stories 10 --max_steps 1", "r/loss.png"),
    ],
)
def test_a_command_replaces_nothing_of_the_user(
    trained: Path, tmp_path: Path, words: str, path: str
):
    "One line, with the way on, before anything else is made; exports with --force take the place of what was there."
    pytest.importorskip("gguf")
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(b"mine")
    before, model = (
        snapshot(tmp_path),
        ["--ckpt", trained / "artifacts/checkpoints/latest"] if "export" in words else [],
    )
    done = course(*words.split(), *model, cwd=tmp_path)
    assert (
        done.code == 2
        and len(done.lines) == 1
        and "--force" in done.lines[0]
        and snapshot(tmp_path) == before
    ), done
    if model:
        fine(course(*words.split(), *model, "--force", cwd=tmp_path))
        assert (tmp_path / path).read_bytes() != b"mine" and fine(
            course(*words.split(), *model, cwd=tmp_path)
        )


def test_a_plot_is_replaced_if_it_is_ours(tmp_path: Path):
    "The same one again, and another's with force."
    log = [{"step": step, "loss": 3.0 / step, "val_loss": 3.1 / step} for step in (1, 2)]
    path = tmp_path / "loss.png"
    for _ in range(2):
        draw_losses(log, 0.4, 0.17, path)
    assert is_ours(path) and path.read_bytes()[:4] == b"\x89PNG"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="--force"):
        draw_losses(log, 0.4, 0.17, path)
    draw_losses(log, 0.4, 0.17, path, force=True)
    assert is_ours(path)


def elsewhere(**settings: object) -> Tokenizer:
    "A tokenizer that somebody else has trained, on a web page, with other settings than ours."
    model = io.BytesIO()
    page = "<p>a <span> b</span> <small>c </small>  <strong> d</strong> <s>e</s> <strike>f</strike> <sub>g</sub></p>"
    common = dict(
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        bos_id=-1,
        unk_id=0,
        eos_id=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([page] * 50),
        model_writer=model,
        vocab_size=330,
        **common,
        **settings,
    )
    return Tokenizer(model.getvalue())


def test_a_piece_that_would_spell_the_end_of_a_document_is_kept_apart(tmp_path: Path, drawn):
    "Where `</s>` can be joined from pieces, llama.cpp would join it: the special piece then has a name that no text has."
    tokenizer = elsewhere(model_type="bpe", split_by_unicode_script=False)
    assert "</s" in {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
    checkpoint = replace(drawn(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
    names = value(
        opened(write_gguf(checkpoint, tmp_path / "page.gguf", log=quiet)), "tokenizer.ggml.tokens"
    )
    assert (
        names[tokenizer.eos_id] == "</s> " and len(set(names)) == len(names) == tokenizer.vocab_size
    )


def test_a_tokenizer_that_is_no_byte_pair_one_is_refused(tmp_path: Path, drawn):
    tokenizer = elsewhere(model_type="unigram")
    checkpoint = replace(drawn(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
    with pytest.raises(UserError, match="no byte-pair one"):
        write_gguf(checkpoint, tmp_path / "page.gguf", log=quiet)
    assert not list(tmp_path.iterdir())


def test_refusals_of_gguf(checkpoint: Checkpoint, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"dtype is 'q8': it must be one of f32, f16, q8_0\."):
        write_gguf(checkpoint, tmp_path / "tale.gguf", "q8")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as where it is not installed
    with pytest.raises(UserError, match=re.escape('pip install "llm_course[sharing]"')):
        write_gguf(checkpoint, tmp_path / "tale.gguf")
    assert not list(tmp_path.iterdir())
