"""lm-evaluation-harness opens a checkpoint as it lies there, and finds the figures that we find.

Everything is offline, in a temporary folder. The model's weights are enlarged, so that a prediction depends strongly on all that it
sees: a window that began one token elsewhere would show in the third digit, and we ask for five.
"""
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm_course.corpus import Corpus, write_tales_corpus
from llm_course.evaluation import Evaluation, ask, evaluate, windows
from llm_course.training import load_checkpoint

lm_eval = pytest.importorskip("lm_eval")
utils, tasks = (importlib.import_module(f"lm_eval.{name}") for name in ("utils", "tasks"))
TASKS = Path(__file__).parents[1] / "llm_course" / "tasks"
SCRIPTS = ["Once upon a time, naïve façades.", "Μια φορά κι έναν καιρό", "Жила-была лиса", "كان يا ما كان", "היה היה פעם", "एक समय की बात है",
           "กาลครั้งหนึ่ง", "从前有一只狐狸", "むかしむかし", "옛날 옛적에", "🦊👩‍👩‍👧🏳️‍🌈"]
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
    latest, folder = trained / "artifacts" / "checkpoints" / "latest", tmp_path_factory.mktemp("a run") / "a checkpoint"
    shutil.copytree(latest, folder)
    checkpoint = load_checkpoint(latest)
    weights = {name: weight * (3 if weight.ndim == 2 else 1) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            parameter.copy_(weights[name])
    return SimpleNamespace(folder=folder, model=checkpoint.model, tokenizer=checkpoint.tokenizer, context=checkpoint.model.config.seq_len)


@pytest.fixture(scope="module")
def text(ours, tmp_path_factory) -> Path:
    "Documents in many scripts: long ones, all lengths around one, two and three contexts, and what a careless reader would strip."
    def of_length(n: int) -> str:
        document = "".join(SCRIPTS)[: n // 5]
        return document + "~" * (n - len(ours.tokenizer.encode(document)))

    lengths = [1, 2, *(k * ours.context + d for k in (1, 2, 3) for d in (-2, -1, 0, 1, 2)), 5 * ours.context + 7]
    odd = [" begins and ends blank \n\n", "\tA\u2581B  C\r\rD\u3000E", "</s> is text here</s>", "12345", "{{ jinja }}", "\n" + SCRIPTS[5]]
    documents = [*map(of_length, lengths), *SCRIPTS, " ".join(SCRIPTS * 3), *odd]
    assert [len(ours.tokenizer.encode(document)) for document in documents[: len(lengths)]] == lengths
    path = tmp_path_factory.mktemp("a text") / "many scripts.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    assert list(Corpus(path)) == documents
    return path


def harness(ours: SimpleNamespace, *names: str, batch_size: int = 4, samples: bool = False, model: str = "", **metadata: object) -> dict:
    "What `lm_eval` finds, called from Python."
    manager = tasks.TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    args = f"pretrained={ours.folder},dtype=float32{model}"
    return lm_eval.simple_evaluate(model="hf", model_args=args, tasks=list(names), task_manager=manager, batch_size=batch_size,
                                   device="cpu", log_samples=samples, bootstrap_iters=0, verbosity="ERROR")


def agree(theirs: dict, ours: Evaluation) -> None:
    "The figures of a task are ours to five digits."
    for name in FIGURES:
        assert math.isclose(theirs[f"{name},none"], getattr(ours, name), rel_tol=1e-5), (name, theirs, ours)


# ---- windows

@given(st.integers(0, 120), st.integers(1, 24), st.data())
def test_windows_are_theirs_window_for_window(n, context, data):
    "For each stride, which they call context_len (context - stride + 1); what `lm_eval` itself asks for is stride = context."
    stride = data.draw(st.one_of(st.just(context), st.integers(1, context)))
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    theirs = list(utils.get_rolling_token_windows(tokens, -1, context, context - stride + 1))
    mine = list(windows([-1, *tokens], context, stride))
    assert [(window.ids, window.targets[len(window.targets) - window.new :]) for window in mine] == theirs
    if stride == context:  # and what the model then reads, after their cut of what overlaps
        cut = [before + after for before, after in map(utils.make_disjoint_window, theirs)]
        assert [[*window.ids, window.targets[-1]] for window in mine] == cut


# ---- what a text costs

@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_figures_are_equal_on_many_scripts_and_lengths(ours, text, batch_size):
    theirs = harness(ours, "llm_course_text", batch_size=batch_size, input=str(text))["results"]["llm_course_text"]
    mine = evaluate(ours.model, ours.tokenizer, Corpus(text), stride=ours.context).without_ends
    agree(theirs, mine)
    overlapping = evaluate(ours.model, ours.tokenizer, Corpus(text)).without_ends
    assert not math.isclose(mine.nats, overlapping.nats, rel_tol=1e-3)  # so it does matter where the windows lie


def test_figures_are_equal_on_the_tales_and_the_tales_are_those_of_val_txt(ours, tmp_path):
    found = harness(ours, "llm_course_tales", samples=True, n=30)
    _, val = write_tales_corpus(tmp_path, n_train=1, n_val=30)
    assert [sample["doc"]["text"] for sample in found["samples"]["llm_course_tales"]] == list(Corpus(val, "line"))
    agree(found["results"]["llm_course_tales"], evaluate(ours.model, ours.tokenizer, Corpus(val, "line"), stride=ours.context).without_ends)


def test_nothing_is_added_silently(ours):
    "Their first prediction follows our `</s>`, their limit is our context, and their tokens are ours and no others."
    from lm_eval.models.huggingface import HFLM
    theirs = HFLM(pretrained=str(ours.folder), dtype="float32", device="cpu")
    assert theirs.prefix_token_id == ours.tokenizer.eos_id and theirs.max_length == ours.context
    for document in [*SCRIPTS, "</s> begins", " and ends </s>"]:
        assert theirs.tok_encode(document) == ours.tokenizer.encode(document)


# ---- questions

def test_questions_are_asked_and_answered_by_our_own_probabilities(ours, tmp_path):
    found = harness(ours, "llm_course_questions", samples=True, n=40, model=f",max_length={ours.context}")
    samples = found["samples"]["llm_course_questions"]
    _, val = write_tales_corpus(tmp_path, n_train=1, n_val=40)
    random, right = Random(0), 0
    for sample, tale in zip(sorted(samples, key=lambda sample: sample["doc_id"]), Corpus(val, "line"), strict=True):
        question = ask(tale, random)
        assert sample["doc"] == question._asdict() and sample["target"] == question.answer
        bits = []
        for option in question.options:  # with no `</s>` before the text, and its end only, since it is longer than the context
            tokens, begun = ours.tokenizer.encode(f"{question.text} {option}"), len(ours.tokenizer.encode(question.text))
            with torch.no_grad():
                log_probs = ours.model(torch.tensor([tokens[-ours.context - 1 : -1]]))[0].log_softmax(-1)
            new = tokens[begun:]
            bits.append(log_probs[range(-len(new), 0), new].sum().item())
        theirs = [response[0][0] for response in sample["resps"]]
        assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(theirs, bits, strict=True)), (theirs, bits)
        right += max(range(4), key=bits.__getitem__) == question.answer
    assert found["results"]["llm_course_questions"]["acc,none"] == right / 40


# ---- the command of the README, in a process of its own

def test_the_command_writes_the_same_figures(ours, text, tmp_path):
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={ours.folder},dtype=float32",
               "--include_path", str(TASKS), "--tasks", "llm_course_tales,llm_course_text,llm_course_questions", "--device", "cpu",
               "--batch_size", "8", "--metadata", json.dumps({"input": str(text), "n": 20}), "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(TASKS.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    agree(found["llm_course_text"], evaluate(ours.model, ours.tokenizer, Corpus(text), stride=ours.context).without_ends)
    assert found["llm_course_tales"]["bits_per_byte,none"] > 0 and 0 <= found["llm_course_questions"]["acc,none"] <= 1


def test_a_text_that_is_not_there_is_one_sentence(ours):
    with pytest.raises(Exception, match="nowhere.txt does not exist"):
        harness(ours, "llm_course_text", input="nowhere.txt")
