"""lm-evaluation-harness opens a checkpoint as it lies there, and finds the figures that we find.

Everything is offline, in a temporary folder. The model's weights are enlarged, so that a prediction depends strongly on all
that it sees: a window that began one token elsewhere would show, and we ask for five digits.
"""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm_course.checkpoint import load_checkpoint
from llm_course.corpus import Corpus, normalized, write_tales_corpus
from llm_course.evaluation import Evaluation, evaluate, windows
from llm_course.grading import ask

lm_eval = pytest.importorskip("lm_eval")
utils, tasks = (importlib.import_module(f"lm_eval.{name}") for name in ("utils", "tasks"))
TASKS = ROOT / "llm_course" / "tasks"
SCRIPTS = [
    "Once upon a time, naïve façades.",
    "Μια φορά κι έναν καιρό",
    "Жила-была лиса",
    "كان يا ما كان",
    "היה היה פעם",
    "एक समय की बात है",
    "กาลครั้งหนึ่ง",
    "从前有一只狐狸",
    "むかしむかし",
    "옛날 옛적에",
    "🦊👩‍👩‍👧🏳️‍🌈",
]
FIGURES = "bits_per_byte", "byte_perplexity", "word_perplexity"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    "No hub, and no cache outside the temporary folder."
    patch = pytest.MonkeyPatch()
    for name in "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE":
        patch.setenv(name, "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def ours(trained, tmp_path_factory) -> SimpleNamespace:
    "A checkpoint with larger weights in a folder whose name has a space, and the same model in memory."
    latest, folder = (
        trained / "artifacts" / "checkpoints" / "latest",
        tmp_path_factory.mktemp("a run") / "a checkpoint",
    )
    shutil.copytree(latest, folder)
    checkpoint = load_checkpoint(latest)
    weights = {
        name: weight * (3 if weight.ndim == 2 else 1)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            parameter.copy_(weights[name])
    model = checkpoint.model
    return SimpleNamespace(
        folder=folder, model=model, tokenizer=checkpoint.tokenizer, context=model.config.seq_len
    )


@pytest.fixture(scope="module")
def text(ours, tmp_path_factory) -> Path:
    "Documents in many scripts: long ones, all lengths around one, two and three contexts, and what a careless reader strips."

    def of_length(n: int) -> str:
        document = "".join(SCRIPTS)[: n // 5]
        return document + "~" * (n - len(ours.tokenizer.encode(document)))

    lengths = [
        1,
        2,
        *(k * ours.context + d for k in (1, 2, 3) for d in (-2, -1, 0, 1, 2)),
        5 * ours.context + 7,
    ]
    odd = [
        " begins and ends blank \n\n",
        "\tA\u2581B  C\r\rD\u3000E",
        "</s> is text here</s>",
        "12345",
        "{{ jinja }}",
        "\n한",
    ]
    documents = [*map(of_length, lengths), *SCRIPTS, " ".join(SCRIPTS * 3), *odd]
    assert [
        len(ours.tokenizer.encode(document)) for document in documents[: len(lengths)]
    ] == lengths
    path = tmp_path_factory.mktemp("a text") / "many scripts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8"
    )
    assert list(Corpus(path)) == list(map(normalized, documents))
    return path


def harness(
    ours: SimpleNamespace,
    *names: str,
    batch_size: int = 4,
    samples: bool = False,
    **metadata: object,
) -> dict:
    "What `lm_eval` finds, called from Python."
    manager = tasks.TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    args = f"pretrained={ours.folder},dtype=float32"
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=args,
        tasks=list(names),
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
        log_samples=samples,
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def as_they_count(ours: SimpleNamespace, documents: Corpus) -> Evaluation:
    "Our own evaluation, with their windows and without the ends."
    return evaluate(ours.model, ours.tokenizer, documents, stride=ours.context).without_ends


def agree(theirs: dict, ours: Evaluation) -> None:
    "The figures of a task are ours to five digits."
    for name in FIGURES:
        assert math.isclose(theirs[f"{name},none"], getattr(ours, name), rel_tol=1e-5), (
            name,
            theirs,
            ours,
        )


# ---- windows


@given(st.integers(0, 120), st.integers(1, 24), st.data())
def test_windows_are_theirs_window_for_window(n, context, data):
    "For each stride, which they call context_len (context - stride + 1); what `lm_eval` itself asks for is stride = context."
    stride = data.draw(st.one_of(st.just(context), st.integers(1, context)))
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    theirs = list(utils.get_rolling_token_windows(tokens, -1, context, context - stride + 1))
    mine = list(windows([-1, *tokens], context, stride))
    assert [
        (window.ids, window.targets[len(window.targets) - window.new :]) for window in mine
    ] == theirs
    if stride == context:  # and what the model then reads, after their cut of what overlaps
        cut = [before + after for before, after in map(utils.make_disjoint_window, theirs)]
        assert [[*window.ids, window.targets[-1]] for window in mine] == cut


# ---- what a text costs


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_figures_are_equal_on_many_scripts_and_lengths(ours, text, batch_size):
    theirs = harness(ours, "llm_course_text", batch_size=batch_size, input=str(text))["results"][
        "llm_course_text"
    ]
    mine = as_they_count(ours, Corpus(text))
    agree(theirs, mine)
    overlapping = evaluate(ours.model, ours.tokenizer, Corpus(text)).without_ends
    assert not math.isclose(
        mine.nats, overlapping.nats, rel_tol=1e-3
    )  # so it does matter where the windows lie


def test_figures_are_equal_on_the_tales_and_the_tales_are_those_of_val_txt(ours, tmp_path):
    found = harness(ours, "llm_course_tales", samples=True, n=30)
    _, val = write_tales_corpus(tmp_path, n_train=1, n_val=30)
    assert [sample["doc"]["text"] for sample in found["samples"]["llm_course_tales"]] == list(
        Corpus(val, "line")
    )
    agree(found["results"]["llm_course_tales"], as_they_count(ours, Corpus(val, "line")))


def test_nothing_is_added_silently(ours):
    "Their first prediction follows our `</s>`, their limit is our context, and their tokens are ours and no others."
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(ours.folder), dtype="float32", device="cpu")
    assert theirs.prefix_token_id == ours.tokenizer.eos_id and theirs.max_length == ours.context
    for document in [*SCRIPTS, "</s> begins", " and ends </s>"]:
        assert theirs.tok_encode(document) == ours.tokenizer.encode(document)


# ---- questions


def test_questions_are_asked_and_answered_by_our_own_probabilities(ours, tmp_path):
    found = harness(ours, "llm_course_questions", samples=True, n=40)
    samples = found["samples"]["llm_course_questions"]
    _, val = write_tales_corpus(tmp_path, n_train=1, n_val=40)
    random, right = Random(0), 0
    for sample, tale in zip(
        sorted(samples, key=lambda sample: sample["doc_id"]), Corpus(val, "line"), strict=True
    ):
        question = ask(tale, random)
        assert sample["doc"] == question._asdict() and sample["target"] == question.answer
        bits = []
        for option in (
            question.options
        ):  # with no `</s>` before the text, and its end only, since it is longer than the context
            tokens, begun = (
                ours.tokenizer.encode(f"{question.text} {option}"),
                len(ours.tokenizer.encode(question.text)),
            )
            with torch.no_grad():
                log_probs = ours.model(torch.tensor([tokens[-ours.context - 1 : -1]]))[
                    0
                ].log_softmax(-1)
            new = tokens[begun:]
            bits.append(log_probs[range(-len(new), 0), new].sum().item())
        theirs = [response[0][0] for response in sample["resps"]]
        assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(theirs, bits, strict=True)), (
            theirs,
            bits,
        )
        right += max(range(4), key=bits.__getitem__) == question.answer
    assert found["results"]["llm_course_questions"]["acc,none"] == right / 40


# ---- the commands of the tasks' page, in a process of their own


def page() -> str:
    return (TASKS / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    "The arguments of every `lm_eval …` in a text."
    return [
        shlex.split(line.replace("\\\n", " "))[1:]
        for line in re.findall(r"^lm_eval (?:.*\\\n)*.*", text, re.M)
    ]


@pytest.fixture(scope="module")
def found(ours, text, tmp_path_factory) -> dict[str, dict]:
    "What the page's commands find, as one, where the course has been run and where there are books."
    place = tmp_path_factory.mktemp("a place")
    (model,) = {
        re.search(r"pretrained=([^,]+)", " ".join(command))[1] for command in commands(page())
    }
    shutil.copytree(ours.folder, place / model)
    shutil.copytree(TASKS, place / "llm_course" / "tasks")
    (place / "books").mkdir()
    for i, document in enumerate(Corpus(text)):
        (place / "books" / f"{i}.txt").write_bytes(document.encode("utf-8"))
    flags = commands(page())[-1]
    flags[flags.index("--tasks") + 1] = ",".join(
        command[command.index("--tasks") + 1] for command in commands(page())
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        *flags,
        "--metadata",
        "n=20",
        "--output_path",
        "out",
    ]
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (place / "out").rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def test_the_command_of_the_page_finds_our_figures(ours, text, tmp_path, found):
    agree(found["llm_course_text"], as_they_count(ours, Corpus(text)))
    _, val = write_tales_corpus(tmp_path, n_train=1, n_val=20)
    agree(found["llm_course_tales"], as_they_count(ours, Corpus(val, "line")))
    assert 0 <= found["llm_course_questions"]["acc,none"] <= 1


def test_the_command_of_the_notebook_reads_the_tales_of_its_table(tmp_path):
    "The model of the notebooks, and as many tales from the same place as the table there is about."
    cells = json.loads((ROOT / "nbs" / "41_evaluation.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    (flags,) = commands(text)
    given = dict(zip(flags[::2], flags[1::2]))
    assert given["--model_args"].startswith("pretrained=artifacts/lesson/checkpoints/latest,")
    assert given["--tasks"] == "llm_course_tales" and given["--include_path"] == "llm_course/tasks"
    n = int(given["--metadata"].removeprefix("n="))
    assert f'tales = list(islice(Corpus("../artifacts/lesson/val.txt"), {n}))' in text
    _, val = write_tales_corpus(tmp_path, n_train=1, n_val=n)
    assert importlib.import_module("llm_course.tasks.utils").held_out_tales(n, 0) == list(
        Corpus(val, "line")
    )


def test_the_page_names_every_task_and_its_metrics(found):
    rows = {
        row[0]: row[3]
        for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", page(), re.M)
    }
    assert rows.keys() == {path.stem for path in TASKS.glob("*.yaml")} == found.keys()
    for name, row in rows.items():
        metrics = {
            key.removesuffix(",none")
            for key in found[name]
            if key.endswith(",none") and "stderr" not in key
        }
        assert metrics == set(
            re.findall(r"`(\w+)`", rows["llm_course_tales"] if row == "the same" else row)
        )


def test_a_text_that_is_not_there_is_one_sentence(ours):
    with pytest.raises(Exception, match="nowhere.txt does not exist"):
        harness(ours, "llm_course_text", input="nowhere.txt")
