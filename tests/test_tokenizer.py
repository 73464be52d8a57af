"""The tokenizer: nothing is lost, the same text gives the same bytes, and other programs read the same tokens."""

import hashlib
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.corpus import sample
from llm_course.files import UserError
from llm_course.formats import chunks_of_text
from llm_course.preparation import huggingface_files
from llm_course.shards import BulkEncoder, EncodeCache
from llm_course.tales import sample_tales
from llm_course.tokenizer import _SETTINGS, Tokenizer, train_tokenizer

SCRIPTS = [
    "Zürich",
    "東京は日本",
    "Москва",
    "القاهرة",
    "दिल्ली",
    "ᚠᛇᚻ",
    "👩‍👩‍👧🇪🇺",
    "e\u0301",
    "한국어",
    "½ﬁ²",
    "\U0010ffff",
]
TRICKS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "▁",
    "▅",
    "</s>",
    "<unk>",
    "<0x41>",
    "\u00a0",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\x1b",
    "\ufffd",
]
TALES = sample_tales(0, 200)
QUIET = dict(log=lambda line: None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        [*TALES, *SCRIPTS * 3, "def f(x):\n    return x\n\tpass  \r\n" * 20], 1000, **QUIET
    )


@pytest.fixture(scope="module")
def fast(tokenizer):
    library = pytest.importorskip("tokenizers")
    fast = library.Tokenizer.from_str(huggingface_files(tokenizer)["tokenizer.json"].decode())
    fast.encode_special_tokens = (
        True  # what `split_special_tokens` in tokenizer_config.json asks of transformers
    )
    return fast


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return train_tokenizer(TALES[:50], 0, **QUIET)


texts = st.one_of(
    st.text(),
    st.text(st.sampled_from("ab \n▁once upon,.")),
    st.lists(
        st.one_of(
            st.sampled_from(SCRIPTS + TRICKS + TALES[0].split()), st.characters(codec="utf-8")
        )
    ).map("".join),
)


@settings(max_examples=1000, deadline=None)
@given(text=texts)
def test_nothing_is_lost(tokenizer, text):
    """Every valid string comes back, no text makes a special token, and the parts of a stream are the whole."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == "".join(tokenizer.stream(ids))
    assert tokenizer.unk_id not in ids and tokenizer.eos_id not in ids


@pytest.fixture(scope="module")
def foreign(tokenizer) -> list[Tokenizer]:
    """Ours, and models of SentencePiece with pieces that ours never has: spaces behind letters or between them, pieces of the user's."""
    found = [tokenizer]
    for change in (
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True},
        {"split_by_unicode_script": False},
        {"user_defined_symbols": ["once upon", "\n\n", "東京は"]},
        {"split_digits": True, "vocab_size": 400},
    ):
        model, options = (
            io.BytesIO(),
            _SETTINGS | {"vocab_size": 700, "character_coverage": 1.0} | change,
        )
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([*TALES, *SCRIPTS]), model_writer=model, **options
        )
        found.append(Tokenizer(model.getvalue()))
    return found


@settings(max_examples=500, deadline=None)
@given(text=texts, most=st.sampled_from([1, 3, 2**17]))
def test_looking_up_does_not_change_tokens(foreign, text, most):
    """The tokens are those of SentencePiece on the whole text, whatever pieces there are, and however often the memory is emptied."""
    text = text.replace("▁", "_")
    for tokenizer in foreign:
        bulk = BulkEncoder(tokenizer)
        bulk.cache.most = most
        ids = tokenizer._processor.encode(text)
        assert tokenizer.encode(text) == ids
        for encoder in (tokenizer, bulk, bulk):
            assert encoder.encode_array(text).tolist() == [*ids, tokenizer.eos_id]


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_many_documents_get_the_same_tokens(foreign, text):
    """With U+2581, and where a text is long: the encoder for many documents gives what the tokenizer gives."""
    for tokenizer in foreign:
        for each in (text, f"▁{text}▁a", text * 30):
            assert BulkEncoder(tokenizer).encode_array(each).tolist() == tokenizer.encode_document(
                each
            )


def test_the_memory_has_a_bound(tokenizer):
    """Ever new words, short and long, are not kept for ever."""
    memory = EncodeCache(tokenizer, most=100)
    for i in range(1000):
        assert memory[f" {i}".encode()] and memory[f" {i}".encode() * 50]
        assert len(memory) <= 100 and all(len(part) <= 64 for part in memory)


@settings(max_examples=500, deadline=None)
@given(text=texts, size=st.integers(1, 20))
def test_passages_do_not_change_tokens(tokenizer, text, size):
    """Where a text is cut before it is encoded does not show in its tokens."""
    assert "".join(chunks_of_text(text, size)) == text
    assert sum(
        (tokenizer.encode(part) for part in chunks_of_text(text, size)), []
    ) == tokenizer.encode(text)


@settings(max_examples=1000, deadline=None)
@given(ids=st.lists(st.integers(0, 400)))
def test_any_ids_decode(tokenizer, ids):
    """A model may write any ids, so bytes that are no text have to be decoded too, and alike in a stream."""
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids))


@settings(max_examples=2000, deadline=None)
@given(text=texts)
def test_the_tokenizers_library_agrees(tokenizer, fast, text):
    """`tokenizer.json` means the same tokens and the same text, U+2581 and written-out special pieces included."""
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text)
    assert fast.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("seed", range(20))
def test_the_tokenizers_library_agrees_on_ties(seed):
    """Runs of few letters, where one piece can be made in many ways, are joined in the same order."""
    library, rng = pytest.importorskip("tokenizers"), random.Random(seed)
    letters = rng.choice(["a", "ab", "abc", "a ", "ab "])
    made = train_tokenizer(
        ["".join(rng.choices(letters, k=50)) for _ in range(20)], rng.randint(270, 500), **QUIET
    )
    fast = library.Tokenizer.from_str(huggingface_files(made)["tokenizer.json"].decode())
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randint(1, 80)))
        assert fast.encode(text).ids == made.encode(text)


def test_special_tokens_for_other_programs(tokenizer, fast):
    """They end and begin a document with `</s>`, skip it in text, and add nothing by themselves."""
    config = json.loads(huggingface_files(tokenizer)["tokenizer_config.json"])
    assert (config["eos_token"], config["bos_token"], config["add_bos_token"]) == (
        "</s>",
        "</s>",
        False,
    )
    assert (
        fast.token_to_id("</s>") == tokenizer.eos_id
        and fast.token_to_id("<unk>") == tokenizer.unk_id
    )
    assert fast.get_vocab_size() == tokenizer.vocab_size
    assert fast.decode(tokenizer.encode_document("fox")) == "fox" and fast.encode(
        "fox"
    ).ids == tokenizer.encode("fox")


def test_sentencepiece_reads_the_same_model(tokenizer):
    """The model is an ordinary SentencePiece file: apart from U+2581, plain SentencePiece gives the same tokens."""
    plain = spm.SentencePieceProcessor(model_proto=tokenizer.model)
    for text in [*TALES[:20], *SCRIPTS, "  a  b ", "\n\n\t"]:
        assert (
            plain.encode(text) == tokenizer.encode(text)
            and plain.decode(tokenizer.encode(text)) == text
        )


def test_space_without_spaces():
    """A corpus without a space, as Chinese may be, still gives a tokenizer that keeps spaces."""
    made = train_tokenizer(["東京東京は日本"] * 5, 400, **QUIET)
    assert made.decode(made.encode("東京 は  日本 ")) == "東京 は  日本 "


def test_same_text_same_bytes_in_another_process():
    """No path, order, thread count or hash seed stands in the model."""
    code = (
        "from llm_course.tales import sample_tales; from llm_course.tokenizer import train_tokenizer as t;"
        "print(t(reversed(sample_tales(0, 200)), 900, log=lambda line: None).sha256)"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    made = train_tokenizer(TALES, 900, **QUIET)
    assert result.stdout.strip() == made.sha256 == hashlib.sha256(made.model).hexdigest()
    assert result.stderr == ""


def test_quiet(capfd):
    """The trainer's own log does not flood the terminal."""
    train_tokenizer(TALES, 500)
    assert capfd.readouterr() == ("", "")


def test_vocabulary_too_large(capfd):
    """The largest one and one line, which is exactly what asking for that size gives; with strict a sentence."""
    largest = train_tokenizer(TALES[:3], 32_000)
    assert f"{largest.vocab_size:,}" in capfd.readouterr().out
    assert train_tokenizer(TALES[:3], largest.vocab_size).model == largest.model
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match=f"32,000.*{largest.vocab_size:,}"):
        train_tokenizer(TALES[:3], 32_000, strict=True)


@pytest.mark.parametrize("asked", [-1, 1, 2, 100, 258, 270])
def test_vocabulary_too_small(asked):
    """The least possible number is named, is indeed possible, and is the least."""
    with pytest.raises(UserError) as error:
        train_tokenizer(TALES[:50], asked)
    least = int(re.search(r"make (\d+), the least", str(error.value))[1])
    assert train_tokenizer(TALES[:50], least).vocab_size == least
    with pytest.raises(UserError, match=f"make {least},"):
        train_tokenizer(TALES[:50], least - 1)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_characters_as_tokens(characters, text):
    """Vocabulary 0: a character of the corpus is one token, any other is its bytes, and nothing is lost."""
    ids = characters.encode(text)
    assert characters.decode(ids) == text
    known = {characters.decode([i]) for i in range(258, characters.vocab_size)}
    assert {" ", "e", "."} <= known <= {" ", *"".join(TALES[:50])}  # but for the rarest of them
    assert len(ids) == sum(
        1 if character in known else len(character.encode()) for character in text
    )


@pytest.mark.parametrize("documents", [[], [""], ["", ""], ["▁"], ["\0\0"]])
def test_no_text(documents):
    """An empty corpus gets a sentence."""
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(documents)


@pytest.mark.parametrize(
    "documents", [["a"], [" "], ["\t\n"], ["a" * 70_000], ["▅ a"], ["x" * 1000 + " y"]]
)
def test_odd_corpora(documents):
    """One letter, blanks, an endless word, SentencePiece's own sign: each gives a whole tokenizer."""
    made = train_tokenizer(documents, 1000, **QUIET)
    assert made.decode(made.encode("ab  ▁\n")) == "ab  ▁\n"


def test_text_with_the_trainers_own_sign_is_learned():
    """SentencePiece skips every text that has U+2585 in it; here the rest of such a text is learned from."""
    made = train_tokenizer([tale + "▅" for tale in TALES[:50]], 400)
    assert made.model == train_tokenizer(TALES[:50], 400).model


def test_sample_is_a_matter_of_the_texts_alone():
    """As much as fits, the same in any order and whatever comes after duplicates, and said in one line."""
    lines = []
    chosen = sample(TALES, 20_000, lines.append)
    assert len(lines) == 1 and 15_000 < sum(len(t.encode()) for t in chosen) <= 20_000
    for seed in range(5):
        assert sorted(
            sample(random.Random(seed).sample(TALES, len(TALES)), 20_000, lines.append)
        ) == sorted(chosen)
    assert sorted(sample(TALES, 10**9)) == sorted(TALES)


def test_large_corpus_is_sampled():
    """A corpus larger than the limit, one endless document too, is learned from in part."""
    lines = []
    for corpus in (iter(TALES * 20), [" ".join(TALES * 20)]):
        assert (
            train_tokenizer(corpus, 500, sample_bytes=300_000, log=lines.append).vocab_size == 500
        )
    assert len(lines) == 2 and "0.3 MB" in lines[0]


def test_files(tokenizer, tmp_path):
    """Saved and loaded by file and by folder; what is no tokenizer gets a sentence with its path."""
    tokenizer.save(tmp_path / "new" / "tokenizer.model")
    assert (
        Tokenizer.load(tmp_path / "new").sha256
        == Tokenizer.load(str(tmp_path / "new" / "tokenizer.model")).sha256
    )
    (tmp_path / "bad.model").write_bytes(b"no model at all")
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("absent.model", "bad.model", "empty.model", "."):
        with pytest.raises(UserError, match=str(tmp_path)):
            Tokenizer.load(tmp_path / name)


def test_a_model_that_loses_text_is_refused(tmp_path):
    """A model with SentencePiece's defaults would change the text, so it is not taken."""
    model = io.BytesIO()
    careless = dict(vocab_size=300, model_type="bpe", minloglevel=2)
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TALES), model_writer=model, **careless)
    with pytest.raises(UserError, match="does not give back"):
        Tokenizer(model.getvalue())


def test_surrogates(tokenizer):
    """Half of a surrogate pair is no valid text, and is called so."""
    for mistaken in (lambda: tokenizer.encode("a\ud83d"), lambda: train_tokenizer(["a\ud83d"])):
        with pytest.raises(UserError, match="half of a pair"):
            mistaken()


@pytest.mark.slow
def test_one_long_line():
    """One line of 50 MB, with spaces or without, learns and encodes within two minutes."""
    for line in (" ".join(TALES * 230)[:50_000_000], "東京は日本" * 3_400_000):
        made = train_tokenizer([line], 2000, **QUIET)
        assert made.decode(made.encode(line)) == line
