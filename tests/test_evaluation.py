"Evaluation: every token counted once, the right bytes, and the same figures however the work is cut up."

import math
from itertools import islice
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.config import ModelConfig
from llm_course.evaluation import document_windows, evaluate, score, windows
from llm_course.files import UserError
from llm_course.gpt import GPT
from llm_course.grading import ask, bits_by_choice, grade, loss_table, token_losses
from llm_course.tales import check_tale, sample_tales, tale_log_prob
from llm_course.tokenizer import train_tokenizer

SCRIPTS = {
    "Latin": "Once upon a time, naïve façades.",
    "Greek": "Μια φορά κι έναν καιρό",
    "Cyrillic": "Жила-была лиса",
    "Arabic": "كان يا ما كان",
    "Devanagari": "एक समय की बात है",
    "Han": "从前有一只狐狸",
    "Hangul": "옛날 옛적에",
    "emoji": "🦊👩‍👩‍👧🏳️‍🌈",
}


@pytest.fixture(scope="module")
def tales() -> list[str]:
    return sample_tales(7, 40)


@pytest.fixture(scope="module")
def tokenizer(tales):
    return train_tokenizer(tales, vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return random_model(tokenizer.vocab_size, seq_len=24)


def random_model(vocab_size: int, seq_len: int) -> GPT:
    "A tiny model with weights large enough that its predictions differ from token to token."
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            n_layers=2,
            d_model=32,
            n_heads=4,
            n_kv_heads=2,
            d_ff=48,
            vocab_size=vocab_size,
            seq_len=seq_len,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)
    return model.eval()


def naive_losses(model: GPT, tokenizer, document: str, stride: int) -> list[float]:
    "One token at a time, in float64, with the context that the docstring promises."
    context = model.config.seq_len
    tokens = [tokenizer.eos_id, *tokenizer.encode_document(document)]
    text, losses = len(tokens) - 2, []
    for i in range(1, len(tokens)):
        end = (
            min(context + max(0, math.ceil((i - context) / stride)) * stride, text)
            if i <= text
            else i
        )
        start = max(0, end - context)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:i]]))[0, -1].double()
        losses.append((logits.logsumexp(0) - logits[tokens[i]]).item())
    return losses


# ---- windows


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_token_is_predicted_once_from_enough_context(n, context, data):
    stride = data.draw(st.integers(1, context))
    tokens, predicted = list(range(n + 1)), []
    for window in windows(tokens, context, stride):
        assert 1 <= len(window.ids) <= context and 1 <= window.new <= len(window.ids)
        assert list(window.ids) == tokens[window.start : window.start + len(window.ids)]
        assert list(window.targets) == [token + 1 for token in window.ids]
        for target in window.targets[len(window.targets) - window.new :]:
            assert target - window.start >= min(target, context - stride + 1)
            predicted.append(target)
        assert len(window.ids) == min(context, n)  # the last one too is filled, from the left
        assert (window.start == 0) == (
            window.targets[0] == 1 and window.new == len(window.ids)
        )  # the first, and no other
    assert predicted == tokens[1:]


@pytest.mark.parametrize("length", [0, 1, 22, 23, 24, 25, 26, 47, 48, 49, 100])
@pytest.mark.parametrize("stride", [1, 11, 24])
def test_the_windows_of_a_text_do_not_depend_on_its_end(model, tokenizer, length, stride):
    "`</s>` goes with the text's last window where it fits, and is alone in one more where it does not."
    document = "~" * length  # one token each
    text = list(windows([tokenizer.eos_id, *tokenizer.encode(document)], 24, stride))
    assert sum(window.new for window in text) == length
    found = list(document_windows(model, tokenizer, document, stride))
    assert (
        found[-1].targets[-1] == tokenizer.eos_id
        and sum(window.new for window in found) == length + 1
    )
    if length < 24:
        (window,) = found
        assert window.ids[:-1] == [tokenizer.eos_id, *tokenizer.encode(document)][:-1]
    else:
        assert found[:-1] == text and (found[-1].new, len(found[-1].ids)) == (1, 24)
    assert [window.start == 0 for window in found] == [True] + [False] * (len(found) - 1)


# ---- losses against one token at a time


@pytest.mark.parametrize("stride", [1, 5, 12, 23, 24])
def test_losses_are_those_of_one_token_at_a_time_in_float64(model, tokenizer, tales, stride):
    exact = GPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    document = tales[0][:300]
    losses = token_losses(model, tokenizer, document, stride=stride)
    assert losses.dtype == torch.float64
    reference = torch.tensor(naive_losses(exact, tokenizer, document, stride), dtype=torch.float64)
    assert losses.shape == reference.shape
    assert math.isclose(losses.sum(), reference.sum(), rel_tol=1e-6)
    torch.testing.assert_close(losses, reference, rtol=1e-4, atol=1e-4)


def test_the_default_stride_is_half_the_context(model, tokenizer, tales):
    half = evaluate(model, tokenizer, tales[:3], stride=12)
    assert evaluate(model, tokenizer, tales[:3]) == half and (half.context, half.stride) == (24, 12)


def test_a_document_knows_nothing_of_its_neighbours(model, tokenizer, tales):
    together = loss_table(model, tokenizer, tales[:4], batch_size=3)
    for row, tale in zip(together, tales):
        alone = token_losses(model, tokenizer, tale)
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)
        assert row[len(alone) :].isnan().all()


@pytest.mark.parametrize("batch_size", [1, 2, 7, 500])
def test_the_result_does_not_depend_on_the_batch_size(model, tokenizer, tales, batch_size):
    documents = [*tales[:6], "x", *SCRIPTS.values()]
    expected = evaluate(model, tokenizer, documents)
    found = evaluate(model, tokenizer, documents, batch_size=batch_size)
    assert math.isclose(found.nats, expected.nats, rel_tol=1e-6) and math.isclose(
        found.eos_nats, expected.eos_nats, rel_tol=1e-6
    )
    assert (found.documents, found.bytes, found.tokens) == (
        expected.documents,
        expected.bytes,
        expected.tokens,
    )


def test_the_end_of_a_document_is_predicted_and_counted(model, tokenizer, tales):
    found = evaluate(model, tokenizer, tales[:3])
    ends = sum(naive_losses(model, tokenizer, tale, found.stride)[-1] for tale in tales[:3])
    assert math.isclose(found.eos_nats, ends, rel_tol=1e-4)
    assert found.tokens == sum(len(tokenizer.encode(tale)) + 1 for tale in tales[:3])


def test_without_ends_is_what_the_text_alone_costs(model, tokenizer, tales):
    "The predictions of the text are the same, asked for the end or not; and taking the ends away twice takes nothing more."
    documents = [*tales[:3], "x", tales[3][:60]]
    found = evaluate(model, tokenizer, documents, stride=7)
    alone = found.without_ends
    texts = [
        windows([tokenizer.eos_id, *tokenizer.encode(document)], 24, 7) for document in documents
    ]
    losses = torch.cat([losses for text in texts for _, losses in score(model, text, 3)])
    assert alone.tokens == len(losses) == found.tokens - len(documents) and (
        alone.eos_tokens,
        alone.eos_nats,
    ) == (0, 0)
    assert math.isclose(alone.nats, losses.sum(), rel_tol=1e-6)
    assert (alone.bytes, alone.words, alone.documents, alone.entropy_bits) == (
        found.bytes,
        found.words,
        5,
        found.entropy_bits,
    )
    assert alone.without_ends == alone and alone.bits_per_byte < found.bits_per_byte


# ---- bytes


@pytest.mark.parametrize("name", SCRIPTS)
def test_bytes_are_the_utf8_length_of_the_raw_text(model, tokenizer, name):
    text = SCRIPTS[name]
    found = evaluate(model, tokenizer, [text, text + "\u2581 \x00\n"])
    assert found.bytes == 2 * len(text.encode("utf-8")) + 6
    assert math.isclose(found.bits_per_byte, found.nats / math.log(2) / found.bytes)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=5)
)
def test_any_text_is_counted_right(model, tokenizer, texts):
    size = sum(len(text.encode("utf-8")) for text in texts)
    if size == 0:
        with pytest.raises(UserError):
            evaluate(model, tokenizer, texts)
    else:
        found = evaluate(model, tokenizer, texts)
        assert (found.documents, found.bytes) == (len(texts), size)
        assert found.tokens == sum(len(tokenizer.encode_document(text)) for text in texts)


# ---- the entropy


def test_the_entropy_is_the_probability_of_this_very_text(model, tokenizer, tales):
    found = evaluate(model, tokenizer, tales)
    assert math.isclose(found.entropy_bits, -sum(map(tale_log_prob, tales)) / math.log(2))
    assert (
        math.isclose(found.gap, found.bits_per_byte / found.entropy_bits_per_byte - 1)
        and found.gap > 0
    )


def test_one_text_that_is_no_tale_takes_the_entropy_away(model, tokenizer, tales):
    found = evaluate(model, tokenizer, [tales[0], "Once upon a time, no more.", tales[1]])
    assert found.entropy_bits is None and found.entropy_bits_per_byte is None and found.gap is None
    assert (
        "entropy" not in found.describe()
        and "entropy" in evaluate(model, tokenizer, tales[:1]).describe()
    )


def test_spans_add_up_to_the_tale_its_bits_and_its_probability(model, tokenizer, tales):
    for tale in tales[:5]:
        spans = bits_by_choice(model, tokenizer, tale)
        assert "".join(span.text for span in spans) == tale
        paid = token_losses(model, tokenizer, tale).sum() / math.log(2)
        assert math.isclose(sum(s.bits for s in spans), paid, rel_tol=1e-6)
        assert math.isclose(
            sum(s.entropy_bits for s in spans), -tale_log_prob(tale) / math.log(2), rel_tol=1e-9
        )
        for span in spans:
            assert all(choice.text in span.text for choice in span.choices)


def test_a_grade_has_the_checks_and_the_share_that_is_valid(tales):
    found = grade([tales[0], tales[1].replace("Once", "Twice"), tales[2]])
    assert [check.valid for check in found.checks] == [True, False, True]
    assert math.isclose(found.valid, 2 / 3)


# ---- questions


def test_a_question_has_one_answer_by_the_grammar_itself():
    "The text goes on with the right word only; each other word is told nowhere in it, and breaks the grammar where it stands."
    random, seen = Random(3), []
    for tale in sample_tales(11, 60):
        question = ask(tale, random)
        assert len(set(question.options)) == 4 and tale.startswith(
            f"{question.text} {question.options[question.answer]}"
        )
        assert question.options[question.answer] in question.text
        for i, option in enumerate(question.options):
            verdict = check_tale(f"{question.text} {option}")
            begun = len(question.text) + 1
            assert (verdict.position == begun + len(option)) == (i == question.answer), (
                question,
                option,
                verdict,
            )
            assert i == question.answer or option not in tale
        seen.append(question.answer)
    assert all(seen.count(place) > 5 for place in range(4))  # the right one stands anywhere


def test_questions_are_the_same_for_a_seed_and_differ_between_seeds():
    tales = sample_tales(5, 12)
    first, again, other = (
        [ask(tale, random) for tale in tales] for random in (Random(1), Random(1), Random(2))
    )
    assert first == again != other


def test_no_question_is_asked_about_what_is_no_tale():
    with pytest.raises(UserError, match="no tale"):
        ask("Once upon a time, no more.", Random(0))


# ---- memory, precision, mistakes


def test_a_long_document_is_read_window_by_window(model, tokenizer):
    "No more windows are made than one batch needs."
    made = []

    def counted():
        for window in windows(range(1, 100_000), model.config.seq_len, 12):
            made.append(window)
            yield window._replace(
                ids=[token % 400 for token in window.ids],
                targets=[token % 400 for token in window.targets],
            )

    list(islice(score(model, counted(), batch_size=4), 5))
    assert len(made) <= 8


def test_no_graph_is_kept(model, tokenizer, tales):
    assert not token_losses(model, tokenizer, tales[0]).requires_grad
    assert torch.is_grad_enabled()


def test_the_caller_chooses_the_precision(model, tokenizer, tales):
    exact = evaluate(model, tokenizer, tales[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = evaluate(model, tokenizer, tales[:3])
    assert rough.nats != exact.nats and math.isclose(rough.nats, exact.nats, rel_tol=2e-2)


@pytest.mark.parametrize(
    "mistake, word",
    [
        (dict(documents=[]), "corpus"),
        (dict(documents=["", ""]), "corpus"),
        (dict(documents=["x"], stride=0), "stride is 0"),
        (dict(documents=["x"], stride=25), "context of 24"),
        (dict(documents=["x"], stride=-3), "stride is -3"),
        (dict(documents=["x"], batch_size=0), "batch_size is 0"),
    ],
)
def test_mistakes_get_one_sentence(model, tokenizer, mistake, word):
    with pytest.raises(UserError, match=word) as caught:
        evaluate(model, tokenizer, **mistake)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tales):
    with pytest.raises(UserError, match="pieces"):
        evaluate(random_model(tokenizer.vocab_size + 1, 24), tokenizer, tales)


def test_nothing_to_grade_or_to_score_is_a_sentence(model, tokenizer):
    with pytest.raises(UserError):
        grade([])
    with pytest.raises(UserError):
        loss_table(model, tokenizer, [])
