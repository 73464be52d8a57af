"""llama.cpp opens what `write_gguf` writes: our logits, our tokens, our text, and an end where a document ends.

The real library, through llama-cpp-python, which is built from its source: `make test-llama` does that and runs this file."""

import ctypes
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="`make test-llama` builds llama-cpp-python from its source"
)
pytest.importorskip("gguf", reason="the extra `sharing` brings it")

from conftest import PATIENCE, course, fine  # noqa: E402

from llm_course.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from llm_course.config import ModelConfig  # noqa: E402
from llm_course.generation import generate  # noqa: E402
from llm_course.gguf import write_gguf  # noqa: E402
from llm_course.gpt import GPT
from llm_course.tokenizer import SPACE, Tokenizer  # noqa: E402

pytestmark = pytest.mark.llama

SENTENCE = "Once upon a time there was a fox who ended every tale.\n"
SHAPES = {  # what they have that the small trained model has not; the vocabulary is its tokenizer's, and what is added
    "a head for every query, two tables": dict(
        d_model=64, n_heads=4, n_kv_heads=4, tie_embeddings=False
    ),
    "one kv head, wide heads, other constants": dict(
        d_model=48, n_heads=3, n_kv_heads=1, head_dim=32, rope_theta=5e5, norm_eps=1e-3
    ),
    "rows that 32 does not divide": dict(d_model=40, n_heads=4, n_kv_heads=2, d_ff=72),
    "more rows than pieces": dict(d_model=64, n_heads=2, n_kv_heads=2, added=40),
}


@dataclass(frozen=True)
class Pair:
    """A checkpoint, and a way to open it in llama.cpp."""

    checkpoint: Checkpoint
    folder: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return self.checkpoint.tokenizer

    def file(self, dtype: str) -> Path:
        path = self.folder / f"{dtype}.gguf"
        return (
            path
            if path.exists()
            else write_gguf(self.checkpoint, path, dtype, log=lambda line: None)
        )

    def opened(self, dtype: str = "f32") -> "llama_cpp.Llama":
        """llama.cpp with the file, on one thread, every logit kept and its KV cache in float32.

        q8_0 goes through token by token: GCC 12 leaves out most of what llama.cpp tells Intel's AMX units, and one that it has
        built for such a processor dies in a longer batch (https://github.com/ggml-org/llama.cpp/issues/20824)."""
        return llama_cpp.Llama(
            str(self.file(dtype)),
            n_ctx=self.checkpoint.model.config.seq_len,
            n_batch=1 if dtype == "q8_0" else 512,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.checkpoint.model(torch.tensor([ids]))[0].numpy()

    def their_logits(self, ids: list[int], dtype: str) -> np.ndarray:
        llama = self.opened(dtype)
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])

    def some_ids(self, n: int) -> list[int]:
        """The end of a document, and tokens at random: special ones and bytes too."""
        return [self.tokenizer.eos_id] + np.random.default_rng(0).integers(
            0, self.tokenizer.vocab_size, n - 1
        ).tolist()


@torch.no_grad()
def lively(config: ModelConfig) -> GPT:
    """A model with random weights so large, and gains so different, that a wrong layout shows in every logit."""
    torch.manual_seed(0)
    model = GPT(config)
    for weight in model.parameters():
        weight.uniform_(0.5, 1.5) if weight.ndim == 1 else weight.normal_(
            std=weight.shape[-1] ** -0.5
        )
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(trained) -> Checkpoint:
    return load_checkpoint(trained / "artifacts" / "checkpoints")


@pytest.fixture(scope="module", params=["trained", *SHAPES])
def pair(request, checkpoint, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("a gguf")
    if request.param == "trained":
        return Pair(checkpoint, folder)
    shape = dict(SHAPES[request.param])
    vocab_size = checkpoint.tokenizer.vocab_size + shape.pop("added", 0)
    model = lively(
        ModelConfig(**{"n_layers": 3, "d_ff": 96, "seq_len": 96, "vocab_size": vocab_size, **shape})
    )
    return Pair(
        Checkpoint(model, checkpoint.tokenizer, checkpoint.config, 0, checkpoint.path), folder
    )


@pytest.fixture(scope="module")
def by_heart(checkpoint, tmp_path_factory) -> Pair:
    """A model that has learned one sentence, and that the document ends after it."""
    tokenizer = checkpoint.tokenizer
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode_document(SENTENCE)]])
    torch.manual_seed(0)
    model = GPT(ModelConfig(2, 64, 4, 2, 96, tokenizer.vocab_size, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Pair(
        Checkpoint(model.eval(), tokenizer, checkpoint.config, 60, checkpoint.path),
        tmp_path_factory.mktemp("by heart"),
    )


def test_the_logits_are_ours(pair):
    """Names, shapes, rotation, norms, constants and the tied table mean the same there: every logit of a whole context."""
    ids = pair.some_ids(pair.checkpoint.model.config.seq_len)
    ours, theirs = pair.logits(ids), pair.their_logits(ids, "f32")
    assert ours.std() > 0.1
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("dtype, bound", [("f16", 2.5e-3), ("q8_0", 0.08)])
def test_smaller_files_are_close(pair, dtype, bound):
    """Fewer bits cost what they must: f16 keeps 11 of a number, q8_0 counts in steps of 1/127 of the largest of 32.

    llama.cpp rounds what a matrix multiplies as it rounds the matrix, so both enter in every layer. The bound is on the root
    mean square of the difference, as a share of the logits' own spread: twice what we measure (0.0013 and 0.041 at most)."""
    ids = pair.some_ids(64)
    ours, theirs = pair.logits(ids), pair.their_logits(ids, dtype)
    off = float(np.sqrt(np.square(ours - theirs).mean()) / ours.std())
    assert 0 < off < bound


def test_fifty_greedy_tokens_are_ours(pair):
    """With its cache, token by token, llama.cpp goes the same way."""
    ids = pair.some_ids(10)
    [ours] = generate(pair.checkpoint.model, ids, 50, temperature=0)
    theirs = pair.opened().generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [token for token, _ in zip(theirs, range(50))] == ours


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_it_stops_where_the_document_ends(by_heart, dtype):
    """llama.cpp's own completion tells the sentence to its end, knows that it is the end, and does not print `</s>`."""
    prompt = [by_heart.tokenizer.eos_id, *by_heart.tokenizer.encode("Once upon")]
    [answer] = by_heart.opened(dtype).create_completion(prompt, max_tokens=60, temperature=0)[
        "choices"
    ]
    assert answer["finish_reason"] == "stop"
    assert "Once upon" + answer["text"] == SENTENCE


def test_a_program_without_the_course_writes_the_sentence(by_heart):
    """The one file is all that another program needs: it tokenizes a prompt, goes on with it and ends, and adds nothing to it."""
    code = (
        "import sys, json\nfrom llama_cpp import Llama\n"
        "llama = Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False)\n"
        "print(json.dumps(llama('Once upon a time', max_tokens=60, temperature=0)))\n"
        "assert 'torch' not in sys.modules and 'llm_course' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(by_heart.file("f16"))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "Once upon a time" + answer["choices"][0]["text"] == SENTENCE
    assert answer["usage"]["prompt_tokens"] == len(by_heart.tokenizer.encode("Once upon a time"))


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_what_the_stages_left_opens(trained, tmp_path, dtype):
    """From the folder of a run to a file that goes on as the run's own model does: the same token is the likeliest."""
    checkpoint = load_checkpoint(trained / "artifacts" / "checkpoints")
    pair = Pair(checkpoint, tmp_path)
    fine(
        course(
            "export",
            "--to",
            "gguf",
            "--dtype",
            dtype,
            "--out",
            tmp_path / "exported.gguf",
            cwd=trained,
        )
    )
    again = write_gguf(
        checkpoint, tmp_path / "again.gguf", dtype, lambda line: None, name="exported"
    )
    assert (
        (tmp_path / "exported.gguf").read_bytes()
        == again.read_bytes()
        != pair.file(dtype).read_bytes()
    )  # but for the name
    ids = [checkpoint.tokenizer.eos_id, *checkpoint.tokenizer.encode("Once upon a time")]
    ours, theirs = pair.logits(ids), pair.their_logits(ids, dtype)
    assert np.corrcoef(ours[-1], theirs[-1])[0, 1] > 0.999
    assert ours[-1][theirs[-1].argmax()] > ours[-1].max() - 0.05 * ours.std()


def test_what_it_reads_about_the_model_is_ours(pair):
    """Sizes, constants and special tokens, as llama.cpp itself reports them."""
    config, llama, tokenizer = pair.checkpoint.model.config, pair.opened(), pair.tokenizer
    told = {
        key.removeprefix("qwen3."): value
        for key, value in llama.metadata.items()
        if key.startswith("qwen3.")
    }
    assert {key: float(value) for key, value in told.items()} == pytest.approx(
        {
            "block_count": config.n_layers,
            "context_length": config.seq_len,
            "embedding_length": config.d_model,
            "feed_forward_length": config.d_ff,
            "vocab_size": config.vocab_size,
            "attention.head_count": config.n_heads,
            "attention.head_count_kv": config.n_kv_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.freq_base": config.rope_theta,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
        }
    )
    assert (llama.n_vocab(), llama.n_embd()) == (config.vocab_size, config.d_model)
    assert llama_cpp.llama_model_n_params(llama.model) == config.n_params
    assert llama.token_eos() == llama.token_bos() == tokenizer.eos_id
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    assert not llama_cpp.llama_vocab_get_add_bos(vocab) and not llama_cpp.llama_vocab_get_add_eos(
        vocab
    )
    ends = [i for i in range(tokenizer.vocab_size) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    assert ends == [tokenizer.eos_id]


# ---- the tokenizer -------------------------------------------------------------------------------------------------------

PIECES = [
    " ",
    "  ",
    "        ",
    " " * 300,
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\0",
    "\x1b",
    "\u00a0",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\ufffd",
    "▅",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "</s",
    "<un",
    "k>",
    "<|im_end|>",
    "<strike>",
    "</strike>",
    "Once upon a time",
    "fox",
    ",",
    "🦊",
    "👩‍👩‍👧🇪🇺",
    "e\u0301",
    "½ﬁ²",
    "\U0010ffff",
    "Zürich",
    "東京は日本",
    "Москва",
    "القاهرة",
    "दिल्ली",
    "한국어",
]
TEXTS = st.one_of(
    st.text(),
    st.text(st.sampled_from("ab \n<>/s0xAunk")),
    st.lists(st.one_of(st.sampled_from(PIECES), st.characters(codec="utf-8")), max_size=30).map(
        "".join
    ),
).filter(lambda text: SPACE not in text)


def markup_tokenizer() -> Tokenizer:
    """One that somebody else has trained, on web pages: its pieces may go across scripts, so `</s` and `<un` are among them."""
    page = "<p>Once  upon</p><span>a\ttime</span>\r\n<ul>std::vector<unsigned> task></sub> <strike>東京 🦊</strike>\n"
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        # (a piece named <|im_end|> llama.cpp takes for the end of a turn, whatever the file says of it: this one has none)
        sentence_iterator=iter(
            [page + piece for piece in PIECES * 5 if piece not in ("\0", "<|im_end|>")]
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue())
    assert {"</s", "<un"} < {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
    return tokenizer


@pytest.fixture(scope="module", params=["tales", "markup"])
def vocabulary(request, checkpoint, tmp_path_factory) -> Pair:
    """The tokenizer of the tales, and the other one."""
    tokenizer = checkpoint.tokenizer if request.param == "tales" else markup_tokenizer()
    model = GPT(ModelConfig(1, 32, 1, 1, 32, tokenizer.vocab_size, 8))
    return Pair(
        Checkpoint(model, tokenizer, checkpoint.config, 0, checkpoint.path),
        tmp_path_factory.mktemp("vocabulary"),
    )


@pytest.fixture(scope="module")
def llama(vocabulary) -> "llama_cpp.Llama":
    return vocabulary.opened()


def their_ids(llama: "llama_cpp.Llama", text: str) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=False, special=False)


def their_text(llama: "llama_cpp.Llama", ids: list[int]) -> bytes:
    """By llama.cpp's own function: the Python one cuts pieces above 32 bytes, and a space after the beginning of a document."""
    out = ctypes.create_string_buffer(64 * len(ids) + 1)
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    size = llama_cpp.llama_detokenize(
        vocab, (llama_cpp.llama_token * len(ids))(*ids), len(ids), out, len(out), False, False
    )
    assert 0 <= size <= len(out)
    return out.raw[:size]


@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_token_ids_and_text_are_ours(vocabulary, llama, text):
    """The vocabulary, its scores and its flags mean the same there: every text becomes our ids, and they become the text."""
    ids = vocabulary.tokenizer.encode(text)
    assert their_ids(llama, text) == ids
    assert their_text(llama, ids) == text.encode()


@pytest.mark.parametrize(
    "text", ["</s>", "<unk>", "a</s>b", "</strike></s>", " ".join(PIECES), *PIECES]
)
def test_no_text_becomes_a_special_token(vocabulary, llama, text):
    """`</s>` in a prompt is four characters or the pieces of a web page, not the end of the document, in llama.cpp too."""
    ids = their_ids(llama, text)
    assert ids == vocabulary.tokenizer.encode(text)
    assert not {vocabulary.tokenizer.eos_id, vocabulary.tokenizer.unk_id} & set(ids)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(TEXTS, min_size=2, max_size=4))
def test_the_one_character_that_it_cannot_read(vocabulary, llama, parts):
    """U+2581 in a text is a space to llama.cpp, whose pieces write the space so; we write it as its three bytes. Nothing else."""
    text = SPACE.join(parts)
    assert (
        their_ids(llama, text)
        == vocabulary.tokenizer.encode(text.replace(SPACE, " "))
        != vocabulary.tokenizer.encode(text)
    )
    assert their_text(llama, vocabulary.tokenizer.encode(text)) == text.encode()
