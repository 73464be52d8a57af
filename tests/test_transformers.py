"""transformers opens what the course writes, and the course what transformers writes: the same ids, logits, losses and texts.

`make test-older` runs this file with transformers 4.57, where configs, tokenizers and dtypes are written in the older way.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, course, fine
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm_course.checkpoint import model_files
from llm_course.config import Config, ModelConfig, load_config
from llm_course.evaluation import evaluate
from llm_course.files import UserError
from llm_course.generation import PlainEngine, generate
from llm_course.gpt import GPT
from llm_course.integrity import load_verified
from llm_course.pipeline import train
from llm_course.preparation import huggingface_files
from llm_course.runs import step_folders
from llm_course.shards import write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

TALES = sample_tales(0, 200)
SCRIPTS = [
    "Zürich",
    "東京は日本",
    "Москва",
    "القاهرة",
    "दिल्ली",
    "ᚠᛇᚻ",
    "👩‍👩‍👧🇪🇺",
    "e\u0301\u0323",
    "한국어",
    "½ﬁ²",
    "\U0010ffff",
]
TRICKS = [
    " ",
    "  ",
    " " * 17,
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\0",
    "▁",
    "▅",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<0x41>",
    "\u00a0",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u2028",
    "\x1b",
    "\ufffd",
    "\u0301",
    " .",
    " n't",
    "x" * 300,
]
QUIET = dict(log=lambda line: None)
HEADS = {
    "multi-head": dict(n_heads=4, n_kv_heads=4),
    "grouped": dict(n_heads=4, n_kv_heads=2, rope_theta=1e6),
    "grouped, free head_dim": dict(n_heads=6, n_kv_heads=2, head_dim=10, norm_eps=1e-5),
}
SHAPES = {
    f"{name}, {'tied' if tied else 'untied'}": dict(heads, tie_embeddings=tied)
    for tied in (True, False)
    for name, heads in HEADS.items()
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def opened(folder: Path, **options: object) -> "transformers.PreTrainedModel":
    "The model in a folder, as everybody opens one; nothing may be missing, left over or of another shape."
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert type(model).__name__ == "Qwen3ForCausalLM" and not any(info.values()), info
    return model.eval()


def some_ids(vocab_size: int, length: int, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def largest_difference(ours: GPT, theirs: "transformers.PreTrainedModel") -> float:
    "Between the logits, over several lengths and two batch sizes."
    sizes = (3, 1), (3, 2), (3, 7), (1, 33), (3, 63), (3, 64)
    batches = [some_ids(ours.config.vocab_size, length, batch) for batch, length in sizes]
    return (
        torch.stack([(ours(ids) - theirs(ids).logits).abs().max() for ids in batches]).max().item()
    )


def tiny(shape: dict, **training: object) -> Config:
    config = load_config(
        "tiny", {"max_steps": 3, "save_every": 1, "keep_checkpoints": 9, "log_every": 1, **training}
    )
    return replace(
        config,
        model=ModelConfig(
            **{**dict(n_layers=2, d_model=48, d_ff=72, vocab_size=600, seq_len=64), **shape}
        ),
    )


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "For each shape of a model the folder of a short run."
    folders = {name: tmp_path_factory.mktemp("run") for name in SHAPES}
    for name, folder in folders.items():
        train(
            tiny(SHAPES[name]),
            trained / "data" / "shards",
            folder,
            device="cpu",
            progress=False,
            **QUIET,
        )
    return folders


# The model, ours to theirs


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_opens_every_checkpoint(runs, name):
    "As it lies there, with the logits of our own model: bit for bit by the same attention, nearly so by another."
    folders = [*step_folders(runs[name]), runs[name] / "latest"]
    assert len(folders) == 4
    for folder in folders:
        ours = load_verified(folder).model
        assert largest_difference(ours, opened(folder, attn_implementation="sdpa")) == 0
        assert largest_difference(ours, opened(folder, attn_implementation="eager")) <= 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_logits_in_bf16(runs, name):
    "Bit for bit in bf16 too, if transformers loads them so; a later `.to(bfloat16)` rounds the angles' frequencies too."
    ours = load_verified(runs[name]).model.to(torch.bfloat16)
    assert largest_difference(ours, opened(runs[name] / "latest", dtype=torch.bfloat16)) == 0
    theirs = opened(runs[name] / "latest").to(torch.bfloat16)
    assert (
        theirs.model.rotary_emb.inv_freq.dtype == torch.bfloat16
        and largest_difference(ours, theirs) > 0
    )
    theirs.model.rotary_emb.inv_freq = opened(runs[name] / "latest").model.rotary_emb.inv_freq
    assert largest_difference(ours, theirs) == 0


@torch.no_grad()
def loud(config: ModelConfig) -> GPT:
    "A model of large random weights: it writes other tokens again and again, as a model after three steps does not."
    torch.manual_seed(0)
    model = GPT(config).eval()
    for weight in model.parameters():
        weight += 0.3 * torch.randn_like(weight)
    return model


def saved(
    folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> Path:
    "A folder with a model as checkpoints hold it."
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in model_files(model, tokenizer, dtype).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_both_write_the_same_tokens(runs, name, dtype, tmp_path):
    "Fifty greedy ones, with either's cache and without."
    checkpoint = load_verified(runs[name])
    ours = loud(checkpoint.config.model).to(dtype)
    theirs = opened(saved(tmp_path, ours, checkpoint.tokenizer, dtype), dtype=dtype)
    tokens = set()
    for length in (1, 14):
        prompt = some_ids(600, length, batch=1, seed=length)
        written = {}
        for use_cache in (True, False):
            written["ours", use_cache] = generate(
                ours,
                prompt[0].tolist(),
                50,
                temperature=0,
                engine=partial(PlainEngine, use_cache=use_cache),
            )[0]
            longer = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=50,
                do_sample=False,
                use_cache=use_cache,
                eos_token_id=600,
            )
            written["theirs", use_cache] = longer[0, length:].tolist()
            assert (
                len(written["ours", use_cache]) == 50
                and written["ours", use_cache] == written["theirs", use_cache]
            )
        # In bf16 a cache rounds a sum in another order, and a near tie may fall the other way: in both programs alike.
        assert dtype == torch.bfloat16 or written["ours", True] == written["ours", False]
        tokens |= set(written["ours", True])
    assert len(tokens) > 9


# Its end of a document


@pytest.fixture(scope="module")
def brief(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A checkpoint that knows three short documents by heart."
    folder = tmp_path_factory.mktemp("brief")
    write_shards(
        BRIEF * 300,
        Tokenizer.load(trained / "data" / "shards"),
        folder / "shards",
        val_documents=["Snow."],
        seq_len=64,
    )
    return train(
        tiny(dict(n_heads=4, n_kv_heads=2), max_steps=100, save_every=0),
        folder / "shards",
        folder / "out",
        device="cpu",
        progress=False,
        **QUIET,
    ).checkpoint


BRIEF = ["A fox ran home.", "The owl slept all day long.", "Rain fell."]
WRITING = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(0)
begin = [tokenizer.bos_token_id]
alone = model.generate(max_new_tokens=40)
ids = model.generate(torch.tensor([begin + tokenizer("The owl").input_ids]), max_new_tokens=40)
rows = tokenizer(["A fox", "The owl slept all", "Rain"], padding=True, return_tensors="pt")
rows = model.generate(**rows, max_new_tokens=40)
drawn = model.generate(num_return_sequences=9, do_sample=True, max_new_tokens=40)
print(json.dumps([written.tolist() for written in (alone, ids, rows, drawn)]))
"""


def test_generation_stops_where_a_document_ends(brief):
    "With generate's own defaults, for one text and for many, in a few lines that anybody would write; and not a word of warning."
    tokenizer = Tokenizer.load(brief)
    done = subprocess.run(
        [sys.executable, "-c", WRITING, str(brief)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    alone, ids, rows, drawn = json.loads(done.stdout)
    assert (
        tokenizer.decode(alone[0]) in BRIEF
        and alone[0][0] == alone[0][-1] == tokenizer.eos_id
        and len(alone[0]) < 40
    )
    assert tokenizer.decode(ids[0]) == BRIEF[1] and ids[0][-1] == tokenizer.eos_id
    assert [tokenizer.decode(row) for row in rows] == BRIEF
    assert all(tokenizer.eos_id in row[1:] for row in rows + drawn)


def test_what_padding_is_called(brief):
    "The model and its tokenizer agree, and no text has it."
    theirs, tokenizer = (
        transformers.GenerationConfig.from_pretrained(brief),
        transformers.AutoTokenizer.from_pretrained(brief),
    )
    for config in (theirs, transformers.AutoConfig.from_pretrained(brief)):
        assert (config.bos_token_id, config.eos_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
    assert theirs.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_pipeline_writes(brief):
    "The shortest way in, and with padding on the left each row goes on as it does alone."
    writer = transformers.pipeline("text-generation", model=str(brief), device="cpu")
    written = writer(
        ["A fox", "The owl slept all", "Rain"], batch_size=3, max_new_tokens=40, do_sample=False
    )
    assert [row[0]["generated_text"] for row in written] == BRIEF


# The tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    "Tokenizers of tales and of many scripts: ours, transformers', and transformers' saved by itself and opened again."
    texts = {
        "tales": (TALES, 1000),
        "scripts": (SCRIPTS * 9 + ["def f(x):\n    return  x\n\tpass\r\n" * 9], 700),
    }
    found = []
    for name, (documents, size) in texts.items():
        ours, folder = train_tokenizer(documents, size, **QUIET), tmp_path_factory.mktemp(name)
        for file, data in huggingface_files(ours).items():
            (folder / file).write_bytes(data)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.save_pretrained(folder / "again")
        found.append((ours, theirs, transformers.AutoTokenizer.from_pretrained(folder / "again")))
    return found


strings = st.one_of(
    st.text(),
    st.text(st.sampled_from("ab \n▁once upon,.")),
    st.lists(
        st.one_of(
            st.sampled_from(SCRIPTS + TRICKS + TALES[0].split()), st.characters(codec="utf-8")
        )
    ).map("".join),
)


@settings(max_examples=3000, deadline=None)
@given(text=strings)
def test_the_tokenizers_agree(tokenizers, text):
    "On every text: special pieces written out, leading spaces, NUL, parts of an emoji, and what comes back."
    for ours, *theirs in tokenizers:
        ids = ours.encode(text)
        for tokenizer in theirs:
            assert tokenizer(text).input_ids == ids
            assert (
                tokenizer.decode(ids)
                == tokenizer.decode([*ids, ours.eos_id], skip_special_tokens=True)
                == text
            )


def test_the_tokenizers_agree_on_documents(tokenizers):
    "Whole tales, one by one and as batches, a page without an end, and a word without one."
    for ours, *theirs in tokenizers:
        for tokenizer in theirs:
            documents = [*TALES, " ".join(TALES), "東京は日本" * 2000, "a" * 9999, " " * 999, ""]
            ids = [ours.encode(document) for document in documents]
            assert tokenizer(documents).input_ids == ids
            assert tokenizer.batch_decode(ids) == documents
            assert (
                tokenizer.batch_decode(
                    [row + [ours.eos_id] for row in ids], skip_special_tokens=True
                )
                == documents
            )
            assert tokenizer.decode([*ids[0], ours.eos_id]) == documents[0] + "</s>"


def test_special_tokens_of_transformers(tokenizers):
    "`</s>` ends and begins, `<unk>` pads on the left; there are no others, and nothing is put into a text unasked."
    for ours, *theirs in tokenizers:
        for tokenizer in theirs:
            assert len(tokenizer) == ours.vocab_size and tokenizer.vocab_size == ours.vocab_size
            assert tokenizer.bos_token_id == tokenizer.eos_token_id == ours.eos_id
            assert tokenizer.unk_token_id == tokenizer.pad_token_id == ours.unk_id
            assert set(tokenizer.all_special_tokens) == {"<unk>", "</s>"}
            texts = ["A fox", "A fox ran home"]
            rows = tokenizer(texts, padding=True)
            assert rows.keys() == {"input_ids", "attention_mask"}  # what generate takes
            assert [sum(row) for row in rows["attention_mask"]] == [
                len(ours.encode(text)) for text in texts
            ]
            assert (
                rows["attention_mask"][0][-1] == 1 and ours.decode(rows["input_ids"][0]) == "A fox"
            )


def test_offsets_name_the_characters_of_a_token(tokenizers):
    "Each token's characters, in order; the bytes of one character all name that character."
    for ours, theirs, _ in tokenizers:
        for text in [*TALES[:20], *SCRIPTS, "".join(SCRIPTS + TRICKS)]:
            spans = theirs(text, return_offsets_mapping=True)["offset_mapping"]
            assert "".join(text[a:b] for a, b in dict.fromkeys(spans)) == text
            for token, (a, b) in zip(ours.encode(text), spans, strict=True):
                assert text[a:b].encode() == ours.piece_bytes(token) or ours.piece_bytes(token) in {
                    bytes([byte]) for byte in text[a:b].encode()
                }


def test_what_differs_in_the_bare_library(tokenizers):
    "`tokenizers` without transformers takes a written-out special piece for the piece, until it is told not to; nothing else."
    library = pytest.importorskip("tokenizers")
    for ours, *_ in tokenizers:
        bare = library.Tokenizer.from_str(huggingface_files(ours)["tokenizer.json"].decode())
        for text in [*TALES[:20], *SCRIPTS, *TRICKS, "a </s> b", "a<unk>b</s>"]:
            for asked in (False, True):
                bare.encode_special_tokens = asked
                special = [piece for piece in ("<unk>", "</s>") if piece in text]
                assert (bare.encode(text).ids == ours.encode(text)) is (asked or not special)
                assert bare.decode(ours.encode_document(text)) == text


def test_what_differs_on_bytes_that_are_no_text(tokenizers):
    "A model may write half a character. Ours gives back the whole ones beside it; the library spoils the run of bytes."
    for ours, theirs, _ in tokenizers:
        whole, half = (
            [ours.piece_bytes(i) for i in range(ours.vocab_size)].index(bytes([b]))
            for b in (0x41, 0xE2)
        )
        assert ours.decode([half]) == theirs.decode([half]) == "\ufffd"
        assert (ours.decode([whole, half]), theirs.decode([whole, half])) == (
            "A\ufffd",
            "\ufffd\ufffd",
        )


# The model, theirs to ours

SOURCES = {
    f"{name}, {'tied' if tied else 'untied'}, {'sharded' if sharded else 'whole'}": (
        dtype,
        tied,
        sharded,
    )
    for name, dtype in DTYPES.items()
    for tied in (True, False)
    for sharded in (False, True)
}
SOURCES["fp16, tied, whole"] = torch.float16, True, False
THEIRS = dict(
    vocab_size=600,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
)


def foreign(folder: Path, dtype: torch.dtype, tied: bool, sharded: bool) -> Path:
    "The folder of a Qwen3 model that transformers has made and saved, without a tokenizer."
    torch.manual_seed(1)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**THEIRS, tie_word_embeddings=tied)
    ).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "5GB")
    assert (folder / "model.safetensors").exists() is not sharded
    return folder


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Tokenizer:
    return Tokenizer.load(trained / "artifacts" / "tokenizer" / "llm_spm.model")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: foreign(tmp_path_factory.mktemp("theirs"), *source)
        for name, source in SOURCES.items()
    }


@torch.no_grad()
def loss_by_transformers(
    model: "transformers.PreTrainedModel", tokenizer: Tokenizer, documents: list[str]
) -> float:
    "Nats per token, as transformers counts them: each document between two `</s>`."
    losses, counts = [], []
    for document in documents:
        ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode_document(document)]])
        losses.append(model(ids, labels=ids).loss.double() * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    return (sum(losses) / sum(counts)).item()


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_of_transformers_is_read(sources, tokenizer, name):
    "Of any precision, in one file or several: the same logits, texts and loss. Its tokenizer is given, or lies in its folder."
    ours, theirs = (
        load_verified(sources[name], tokenizer=tokenizer),
        opened(sources[name], dtype=torch.float32),
    )
    assert ours.tokenizer is tokenizer and largest_difference(ours.model, theirs) == 0
    prompt = [tokenizer.eos_id, *tokenizer.encode("Once")]
    written = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=600, pad_token_id=0
    )
    assert generate(ours.model, prompt, 20, temperature=0)[0] == written[0, len(prompt) :].tolist()
    found = evaluate(ours.model, tokenizer, FIRST_SENTENCES)
    assert found.loss == pytest.approx(
        loss_by_transformers(theirs, tokenizer, FIRST_SENTENCES), rel=1e-6
    )


FIRST_SENTENCES = [tale[: tale.index(".") + 1] for tale in TALES[:12]]


def test_their_tokenizer_may_lie_in_the_folder(sources, tokenizer, tmp_path):
    "As SentencePiece's file, beside what transformers saves of the tokenizer; a folder without one asks for it."
    folder = shutil.copytree(next(iter(sources.values())), tmp_path / "theirs")
    with pytest.raises(UserError, match="has no tokenizer.model.*--tok"):
        load_verified(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    assert load_verified(folder).tokenizer.sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["fp32, tied, whole", "bf16, untied, sharded"])
def test_training_begins_with_a_model_of_transformers(sources, trained, tokenizer, tmp_path, name):
    "With its very weights; and transformers opens what comes of it."
    config = tiny(HEADS["multi-head"], max_steps=2)
    result = train(
        config,
        trained / "data" / "shards",
        tmp_path,
        init_from=sources[name],
        device="cpu",
        progress=False,
        **QUIET,
    )
    begun, ended = (
        load_verified(path, tokenizer=tokenizer) for path in (sources[name], result.checkpoint)
    )
    assert ended.step == 2 and largest_difference(ended.model, opened(result.checkpoint)) == 0
    moved = max(
        (a - b).abs().max().item()
        for a, b in zip(begun.model.parameters(), ended.model.parameters(), strict=True)
    )
    assert 0 < moved < 0.01


# Both ways


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_there_and_back(runs, name, shard, tmp_path):
    "Ours, saved by transformers, is ours again: every weight and every logit, bit for bit."
    ours = load_verified(runs[name])
    opened(runs[name] / "latest").save_pretrained(tmp_path, max_shard_size=shard)
    back = load_verified(tmp_path, tokenizer=ours.tokenizer)
    assert back.config.model == ours.config.model
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            ours.model.state_dict().values(), back.model.state_dict().values(), strict=True
        )
    )
    assert (
        largest_difference(ours.model, opened(tmp_path))
        == largest_difference(back.model, opened(runs[name] / "latest"))
        == 0
    )


# From version 5 to version 4

OLDER = (
    Path(__file__).parents[1] / ".cache" / "transformers-4.57"
)  # `make test-older` puts it there
THETAS = {"usual": 10_000.0, "other": 50_000.0}
SAVING = """
import sys
import transformers
assert int(transformers.__version__.split(".")[0]) >= 5
ours, again = sys.argv[1:]
for part in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
    part.from_pretrained(ours).save_pretrained(again)
"""
READING = """
import json, sys
import torch
import transformers
assert transformers.__version__.startswith("4.57.")
def tokenizer_in(folder):
    try:
        return transformers.AutoTokenizer.from_pretrained(folder).encode("a fox,  </s>")
    except ValueError as error:
        return str(error)
ours, again, logits = sys.argv[1:]
models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (ours, again)]
with torch.no_grad():
    torch.save([model(torch.arange(60)[None]).logits for model in models], logits)
print(json.dumps([[model.config.rope_theta for model in models], [tokenizer_in(folder) for folder in (ours, again)]]))
"""


def script(code: str, *args: Path, front: tuple[Path, ...] = ()) -> str:
    "What a script prints, in a process of its own, with these folders before all others on its path."
    path = os.pathsep.join(map(str, (*front, Path(__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    not (OLDER / "transformers").is_dir(), reason="`make test-older` brings transformers 4.57"
)
@pytest.mark.parametrize("theta", THETAS.values(), ids=THETAS)
def test_what_version_5_saves_again_version_4_misreads(runs, theta, tmp_path):
    "It knows neither the tokenizer's class nor another rope_theta than 10,000. We read it; and ours both versions read."
    checkpoint = load_verified(next(iter(runs.values())))
    model = loud(replace(checkpoint.config.model, rope_theta=theta))
    ours, again, logits = (
        saved(tmp_path / "ours", model, checkpoint.tokenizer),
        tmp_path / "again",
        tmp_path / "logits.pt",
    )
    script(SAVING, ours, again)
    thetas, tokens = json.loads(script(READING, ours, again, logits, front=(OLDER,)))
    assert thetas == [theta, 10_000.0]
    assert tokens[0] == checkpoint.tokenizer.encode("a fox,  </s>")
    assert "TokenizersBackend does not exist" in tokens[1]
    with torch.no_grad():
        wanted = model(torch.arange(60)[None])
        assert torch.equal(
            load_verified(again, tokenizer=checkpoint.tokenizer).model(torch.arange(60)[None]),
            wanted,
        )
    right, wrong = (
        (found - wanted).abs().max().item() for found in torch.load(logits, weights_only=True)
    )
    assert right == 0 and (wrong == 0) is (theta == 10_000.0)


# What is refused


def edited(folder: Path, **changes: object) -> None:
    "Change config.json."
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"type": "linear", "factor": 2.0}
REFUSED = {
    "rope scaling, as version 5 writes it": (
        lambda folder: edited(folder, rope_parameters=YARN),
        "is 'yarn'",
    ),
    "rope scaling, as version 4 writes it": (
        lambda folder: edited(folder, rope_parameters=None, rope_scaling=YARN),
        "is 'yarn'",
    ),
    "rope scaling, as older files write it": (
        lambda folder: edited(folder, rope_scaling=LINEAR),
        "is 'linear'",
    ),
    "rope scaling, for either version": (
        lambda folder: edited(folder, rope_scaling=YARN),
        "is 'yarn'",
    ),
    "rope scaling, as a word": (lambda folder: edited(folder, rope_scaling="yarn"), "is 'yarn'"),
    "attention bias": (
        lambda folder: edited(folder, attention_bias=True),
        "attention_bias is True",
    ),
    "sliding window": (
        lambda folder: edited(folder, use_sliding_window=True, sliding_window=16),
        "use_sliding_window is True",
    ),
    "another vocabulary": (
        lambda folder: edited(folder, vocab_size=700),
        "vocabulary of 700 and its tokenizer 600",
    ),
    "a missing weight": (without_weight, "model.layers.1.mlp.up_proj.weight is nothing there"),
    "weights of another shape": (
        lambda folder: edited(folder, intermediate_size=80),
        r"down_proj.weight is \(48, 72\) there",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has no .*model.safetensors",
    ),
    "a pickle": (as_pickle, "bin are pickles"),
    "a cut file": (lambda folder: os.truncate(folder / "model.safetensors", 999), "cannot be read"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(sources, tokenizer, tmp_path, what):
    "In one sentence, rather than computed wrong."
    spoil, words = REFUSED[what]
    folder = shutil.copytree(sources["fp32, tied, whole"], tmp_path / "theirs")
    load_verified(folder, tokenizer=tokenizer)
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        load_verified(folder, tokenizer=tokenizer)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))


def test_a_llama_is_refused(tokenizer, tmp_path):
    "Which has nearly the same weights, and other arithmetic."
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**THEIRS)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type is 'llama'"):
        load_verified(tmp_path, tokenizer=tokenizer)


# The commands


def test_the_commands_take_a_folder_of_transformers(sources, trained, tokenizer, tmp_path):
    "Where a checkpoint is named, any Qwen3 folder will do: with its tokenizer in it, or beside it."
    without = sources["bf16, tied, sharded"]
    inside = shutil.copytree(without, tmp_path / "theirs")
    (inside / "tokenizer.model").write_bytes(tokenizer.model)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(FIRST_SENTENCES))
    perplexity = math.exp(
        loss_by_transformers(opened(without, dtype=torch.float32), tokenizer, FIRST_SENTENCES)
    )
    said = []
    for place in (
        ["--ckpt", inside],
        ["--ckpt", without, "--tok", trained / "artifacts" / "tokenizer" / "llm_spm.model"],
    ):
        found = fine(course("eval", *place, "--input", text, "--documents", "line", cwd=tmp_path))
        assert float(
            re.search(r"perplexity +([\d.,]+)", found)[1].replace(",", "")
        ) == pytest.approx(perplexity, rel=1e-3)
        said.append(
            fine(
                course(
                    "generate",
                    *place,
                    "--prompt",
                    "Once",
                    "--max_new_tokens",
                    9,
                    "--temperature",
                    0,
                    cwd=tmp_path,
                )
            )
        )
    assert said[0] == said[1]
    fine(
        course(
            "train",
            "--config",
            "tiny",
            "--max_steps",
            2,
            "--data",
            trained / "data" / "shards",
            "--init_from",
            without,
            cwd=tmp_path,
        )
    )
    assert (
        opened(tmp_path / "artifacts" / "checkpoints" / "latest").config.head_dim
        == THEIRS["head_dim"]
    )


def test_a_folder_that_does_not_fit_gets_a_line(sources, trained, tmp_path):
    "Not a traceback."
    tok = trained / "artifacts" / "tokenizer" / "llm_spm.model"
    folder = shutil.copytree(sources["fp32, tied, whole"], tmp_path / "theirs")
    edited(folder, model_type="llama")
    for command in (
        ["eval", "--tok", tok, "--ckpt", folder, "--input", tok],
        ["generate", "--tok", tok, "--ckpt", folder],
        ["train", "--config", "tiny", "--data", trained / "data" / "shards", "--init_from", folder],
    ):
        done = course(*command, cwd=tmp_path)
        assert (
            done.code == 2 and "model_type is 'llama'" in done.err and "Traceback" not in done.err
        )
