"""Round trips: text through the tokenizer, documents through split and shards, sequences through the batches of any ranks."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_course.corpus import held_out
from llm_course.files import UserError
from llm_course.packing import get_batch
from llm_course.shards import TokenDataset, Tokenized, write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer

CASES = int(os.environ.get("LLM_COURSE_CASES", 500))  # `make fuzz` asks for more


def quiet(*words: object) -> None:
    "Say nothing."


def tried(cases: int) -> settings:
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=CASES <= 500,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Text

# First and last character of blocks of Unicode 15, by what stands there
# fmt: off
SCRIPTS = {
    "control": (0x00, 0x1F), "ASCII": (0x20, 0x7E), "Latin": (0xA0, 0x24F), "phonetic": (0x250, 0x2AF),
    "combining": (0x300, 0x36F), "Greek": (0x370, 0x3FF), "Cyrillic": (0x400, 0x52F), "Armenian": (0x530, 0x58F),
    "Hebrew": (0x590, 0x5FF), "Arabic": (0x600, 0x6FF), "Syriac": (0x700, 0x74F), "Thaana": (0x780, 0x7BF),
    "NKo": (0x7C0, 0x7FF), "Devanagari": (0x900, 0x97F), "Bengali": (0x980, 0x9FF), "Gurmukhi": (0xA00, 0xA7F),
    "Gujarati": (0xA80, 0xAFF), "Tamil": (0xB80, 0xBFF), "Telugu": (0xC00, 0xC7F), "Kannada": (0xC80, 0xCFF),
    "Malayalam": (0xD00, 0xD7F), "Sinhala": (0xD80, 0xDFF), "Thai": (0xE00, 0xE7F), "Lao": (0xE80, 0xEFF),
    "Tibetan": (0xF00, 0xFFF), "Myanmar": (0x1000, 0x109F), "Georgian": (0x10A0, 0x10FF), "Jamo": (0x1100, 0x11FF),
    "Ethiopic": (0x1200, 0x137F), "Cherokee": (0x13A0, 0x13FF), "Canadian": (0x1400, 0x167F), "Ogham": (0x1680, 0x169F),
    "runes": (0x16A0, 0x16FF), "Khmer": (0x1780, 0x17FF), "Mongolian": (0x1800, 0x18AF), "Balinese": (0x1B00, 0x1B7F),
    "spaces and marks": (0x2000, 0x206F), "currency": (0x20A0, 0x20CF), "arrows and sums": (0x2190, 0x22FF),
    "boxes": (0x2500, 0x25FF), "dingbats": (0x2700, 0x27BF), "Braille": (0x2800, 0x28FF), "Glagolitic": (0x2C00, 0x2C5F),
    "Tifinagh": (0x2D30, 0x2D7F), "radicals": (0x2E80, 0x2FDF), "CJK marks": (0x3000, 0x303F), "kana": (0x3040, 0x30FF),
    "Bopomofo": (0x3100, 0x312F), "Han": (0x4E00, 0x9FFF), "Yi": (0xA000, 0xA48F), "Vai": (0xA500, 0xA63F),
    "Hangul": (0xAC00, 0xD7AF), "private": (0xE000, 0xF8FF), "ligatures": (0xFB00, 0xFDFF), "forms": (0xFE00, 0xFFEF),
    "specials": (0xFFF0, 0xFFFF), "Linear B": (0x10000, 0x100FF), "Gothic": (0x10330, 0x1034F), "cuneiform": (0x12000, 0x123FF),
    "hieroglyphs": (0x13000, 0x1342F), "music": (0x1D100, 0x1D1FF), "letters for sums": (0x1D400, 0x1D7FF),
    "Adlam": (0x1E900, 0x1E95F), "emoji": (0x1F300, 0x1FAFF), "rare Han": (0x20000, 0x2A6DF), "tags": (0xE0000, 0xE007F),
    "last": (0x10FF00, 0x10FFFF),
}

WORDS = [
    "▁", "▅", " ", "  ", "\n", "\r\n", "\0", "</s>", "<unk>", "<0x0A>", "👩\u200d👩\u200d👧", "🇪🇺", "e\u0301", "\u202eabc\u202c",
    "שָׁלוֹם", "السَّلَام", "नमस्ते", "สวัสดี", "한국어", "東京は日本", "Once upon",
]
# fmt: on
of_script = st.sampled_from(sorted(SCRIPTS)).flatmap(
    lambda name: st.text(
        st.characters(
            min_codepoint=SCRIPTS[name][0],
            max_codepoint=SCRIPTS[name][1],
            exclude_categories=["Cs"],
        ),
        min_size=1,
        max_size=20,
    )
)
texts = st.lists(of_script | st.sampled_from(WORDS), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    "One that learned tales, one that learned a bit of every script, and one that knows next to nothing but bytes."
    every = [
        chr(code) * 3
        for first, last in SCRIPTS.values()
        for code in range(first, last, max(1, (last - first) // 9))
        if code not in (0, 0x2581, 0x2585)
    ]
    return [
        train_tokenizer(sample_tales(0, 100), 700, log=quiet),
        train_tokenizer([" ".join(every[i::7]) for i in range(7)] * 3 + WORDS, 1500, log=quiet),
        train_tokenizer(["a"], 300, log=quiet),
    ]


@tried(2 * CASES if CASES > 500 else CASES)
@given(text=texts)
def test_text_of_every_script_comes_back(tokenizers: list[Tokenizer], text: str) -> None:
    "Whole, in a stream, and whatever the tokenizer has learned; the length of its pieces is the length of the text."
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == text
        assert sum(len(tokenizer.piece_bytes(i)) for i in ids) == len(text.encode())


def test_every_character_comes_back(tokenizers: list[Tokenizer]) -> None:
    "All 1,112,064 of them."
    every = [chr(code) for code in itertools.chain(range(0xD800), range(0xE000, 0x110000))]
    for i in range(0, len(every), 2000):
        text = "".join(every[i : i + 2000])
        assert tokenizers[1].decode(tokenizers[1].encode(text)) == text


# The tokenizer's training


@tried(max(20, CASES // 25))
@given(
    documents=st.lists(
        st.text(st.sampled_from("ab c"), min_size=1, max_size=30)
        | texts.filter(lambda t: t.strip("▁▅\0")),
        min_size=1,
        max_size=25,
    ),
    seed=st.integers(0, 99),
    limit=st.sampled_from([10**8, 200]),
)
def test_the_order_of_documents_is_no_matter(documents: list[str], seed: int, limit: int) -> None:
    "Any order, with many pairs that are equally frequent, and with a sample: the same bytes, or the same refusal."

    def learned(order: list[str]) -> bytes | str:
        try:
            return train_tokenizer(
                order, 350 + len(set("".join(documents))), sample_bytes=limit, log=quiet
            ).model
        except UserError as error:
            return str(error)

    assert learned(documents) == (
        found := learned(random.Random(seed).sample(documents, len(documents)))
    )
    assert isinstance(found, bytes) or not "".join(documents).strip(
        "▁▅\0\r\n"
    )  # of which nothing is learned


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        {"OMP_NUM_THREADS": "4", "PYTHONHASHSEED": "1"},
        {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "random", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
    ],
    ids=str,
)
def test_training_is_the_same_everywhere(variables: dict[str, str]) -> None:
    "Threads, hash seed and locale of the process do not stand in the model."
    code = (
        "import random; from llm_course.tales import sample_tales; from llm_course.tokenizer import train_tokenizer\n"
        "tales = sample_tales(0, 300); random.shuffle(tales)\n"
        "print(train_tokenizer(tales, 900, sample_bytes=150_000, log=lambda line: None).sha256)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert (
        done.stdout.strip()
        == train_tokenizer(sample_tales(0, 300), 900, sample_bytes=150_000, log=quiet).sha256
    )


# Documents


@tried(max(25, CASES // 20))
@given(
    documents=st.lists(texts, min_size=1, max_size=25),
    fraction=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    shard_tokens=st.integers(1, 300),
    seq_len=st.integers(1, 9),
)
def test_a_split_conserves_documents(
    tmp_path_factory,
    tokenizers: list[Tokenizer],
    documents: list[str],
    fraction: float,
    shard_tokens: int,
    seq_len: int,
) -> None:
    "Held out by any fraction, in shards of any size: both splits together are the documents, and no text is in both."
    sides = {
        split: [d for d in documents if held_out(d, fraction) == (split == "val")]
        for split in ("train", "val")
    }
    documents = [*documents, "x" * 50]  # so that training has one sequence, wherever the others go
    sides["val" if held_out(documents[-1], fraction) else "train"].append(documents[-1])
    if (
        not sides["train"]
        or sum(len(tokenizers[1].encode_document(d)) for d in sides["train"]) <= seq_len
    ):
        return
    out = tmp_path_factory.mktemp("split")
    manifest = write_shards(
        documents,
        tokenizers[1],
        out,
        val_fraction=fraction,
        seq_len=seq_len,
        shard_tokens=shard_tokens,
    )
    assert manifest.excluded == 0
    for split, expected in sides.items():
        shards = TokenDataset(out, split)
        assert [
            tokenizers[1].decode(shards.document(j)) for j in range(shards.documents)
        ] == expected
        assert shards.tokens == sum(len(tokenizers[1].encode_document(d)) for d in expected)
    assert not set(sides["train"]) & set(sides["val"])


# Sequences


@pytest.fixture(scope="module")
def stream(tokenizers: list[Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Shards whose tokens are 0, 1, 2, …, so that each sequence is known by its first one."
    ids, folder = (
        np.arange(tokenizers[0].vocab_size, dtype="<u2"),
        tmp_path_factory.mktemp("stream") / "s",
    )
    write_shards(
        [Tokenized("", part) for part in np.split(ids, 7)],
        tokenizers[0],
        folder,
        val_documents=[],
        seq_len=1,
        shard_tokens=150,
    )
    return folder


@tried(max(60, CASES // 10))
@given(
    length=st.integers(1, 400),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.integers(1, 6),
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 3),
)
@example(length=7, world=4, share=2, seed=0, epochs=3)
def test_ranks_together_see_every_sequence_once(
    stream: Path, length: int, world: int, share: int, seed: int, epochs: int
) -> None:
    "Any number of sequences, seed and ranks: an epoch is every sequence once, and the ranks in order are the batch of one."
    shards, batch = TokenDataset(stream, seq_len=length), world * share
    seen = []
    for step in range(min(-(-len(shards) * epochs // batch), 100)):
        whole, targets = get_batch(shards, step, batch, seed)
        parts = [get_batch(shards, step, batch, seed, rank, world) for rank in range(world)]
        assert (np.concatenate([x for x, _ in parts]) == whole).all() and (
            np.concatenate([y for _, y in parts]) == targets
        ).all()
        assert (targets == whole + 1).all()
        seen += (whole[:, 0] // length).tolist()
    for epoch in range(len(seen) // len(shards)):
        assert sorted(seen[epoch * len(shards) : (epoch + 1) * len(shards)]) == list(
            range(len(shards))
        )
    assert len(set(seen[: len(shards)])) == min(
        len(seen), len(shards)
    )  # where an epoch is longer than the test
