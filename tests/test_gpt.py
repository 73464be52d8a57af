"The model: its counts, its first loss, what it refuses, and that every path through it gives the same numbers."

import json
import math
from dataclasses import asdict
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.config import HF_NAMES, ModelConfig
from llm_course.files import UserError
from llm_course.gpt import GPT
from llm_course.shapes import ShapeError

SMALL = dict(
    n_layers=2, d_model=24, n_heads=6, n_kv_heads=2, d_ff=40, vocab_size=53, seq_len=16, head_dim=10
)
CONFIGS = {
    path.name.removesuffix(".json"): json.loads(path.read_text())
    for path in (files("llm_course") / "configs").iterdir()
    if path.name.endswith(".json")
}


@st.composite
def small_configs(draw) -> ModelConfig:
    "Any small shape: tied or not, any grouping of the heads, head_dim free of d_model / n_heads."
    kv_heads = draw(st.integers(1, 3))
    return ModelConfig(
        n_layers=draw(st.integers(1, 3)),
        d_model=draw(st.integers(1, 24)),
        n_heads=kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        d_ff=draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(2, 60)),
        seq_len=draw(st.integers(2, 12)),
        head_dim=2 * draw(st.integers(1, 6)),
        tie_embeddings=draw(st.booleans()),
    )


def built(config: ModelConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def some_ids(config: ModelConfig, batch: int = 2, length: int | None = None) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length or config.seq_len))


def size_on_meta(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in GPT(config).parameters())


# The configs of the package


def test_the_six_configs_are_there():
    assert set(CONFIGS) >= {"tiny", "lesson", "demo", "125m", "350m", "1.3b"}


@pytest.mark.parametrize("name", CONFIGS)
def test_formula_counts_what_is_built(name):
    "The number of parameters that we print is the number that the model has."
    config = ModelConfig(**CONFIGS[name]["model"])
    assert config.n_params == size_on_meta(config)
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    assert config.n_params_no_embedding == config.n_params - tables


@pytest.mark.parametrize(
    "name, label, tolerance", [("125m", 125e6, 0.02), ("350m", 350e6, 0.03), ("1.3b", 1.3e9, 0.03)]
)
def test_a_config_is_as_large_as_its_name(name, label, tolerance):
    assert abs(ModelConfig(**CONFIGS[name]["model"]).n_params / label - 1) <= tolerance


def test_125m_is_what_the_course_promises():
    "seq_len 2048, vocabulary 32000, activation checkpointing on."
    model, training = CONFIGS["125m"]["model"], CONFIGS["125m"]["training"]
    assert (
        model["seq_len"] == 2048
        and model["vocab_size"] == 32_000
        and training["checkpoint_activations"] is True
    )


@pytest.mark.parametrize("name", ["tiny", "lesson", "demo"])
def test_first_loss_is_ln_V(name):
    "An untrained model knows nothing: a loss below or far above ln V is a defect of the initialisation or of the loss."
    config = ModelConfig(**CONFIGS[name]["model"])
    ids = some_ids(config, batch=4, length=64)
    with torch.no_grad():
        loss = built(config)(ids[:, :-1], ids[:, 1:])
    assert math.log(config.vocab_size) - 0.05 < loss < math.log(config.vocab_size) + 0.15


def test_first_loss_of_the_125m_shape():
    "The same at full width and depth, where the excess C * 0.02**2 / 2 is 0.15."
    config = ModelConfig(**CONFIGS["125m"]["model"])
    model, ids = (
        built(config),
        some_ids(config, batch=1, length=49),
    )  # the seed is set first, so the ids are always the same
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])
    assert abs(loss - math.log(32_000)) < 0.3


# Any small config


@settings(deadline=None, max_examples=60)
@given(config=small_configs())
def test_formula_counts_any_shape(config):
    "Also untied, and with heads that are wider or narrower than d_model / n_heads."
    assert config.n_params == size_on_meta(config)


@settings(deadline=None, max_examples=60)
@given(config=small_configs())
def test_config_goes_to_hf_and_back(config):
    "What is saved in config.json is the config that was trained."
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf(eos_id=1)))) == config
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config


@settings(deadline=None, max_examples=30)
@given(config=small_configs(), data=st.data())
def test_no_logit_sees_a_later_token(config, data):
    "Bit for bit: a model that peeks has a splendid loss and is worthless."
    model, ids = built(config).eval(), some_ids(config)
    t = data.draw(st.integers(1, config.seq_len - 1))
    changed = ids.clone()
    changed[:, t:] = (changed[:, t:] + 1) % config.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :t], model(changed)[:, :t])


@settings(deadline=None, max_examples=30)
@given(config=small_configs(), data=st.data())
def test_cache_gives_the_same_logits(config, data):
    "Whatever the pieces that a sequence is read in."
    model, ids = built(config).eval(), some_ids(config)
    cuts = sorted(data.draw(st.sets(st.integers(1, config.seq_len - 1), max_size=4)))
    cache = model.make_cache(batch=2)
    with torch.no_grad():
        pieces = [
            model(ids[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, config.seq_len])
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-4)
    assert cache.length == config.seq_len


@settings(deadline=None, max_examples=20)
@given(config=small_configs())
def test_checkpointing_changes_no_gradient(config):
    "Computing activations again gives the same loss and the same gradients to the last bit."
    ids, results = some_ids(config), []
    for recompute in (False, True):
        model = built(config).train()
        model.checkpoint_activations = recompute
        loss = model(ids, ids.roll(-1, 1))
        loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@settings(deadline=None, max_examples=20)
@given(config=small_configs())
def test_loss_is_minus_log_softmax(config):
    "Against float64 by hand; a target of -100 is left out."
    model, ids = built(config), some_ids(config)
    targets = ids.roll(-1, 1)
    targets[0, 0] = -100
    surprise = (
        -model(ids).double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    )
    torch.testing.assert_close(
        model(ids, targets).double(), surprise[targets >= 0].mean(), atol=1e-5, rtol=1e-5
    )


@settings(deadline=None, max_examples=20)
@given(config=small_configs())
def test_flops_are_those_that_pytorch_counts(config):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = some_ids(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(config)(ids, ids).backward()
    assert counter.get_total_flops() == config.flops_per_token() * ids.numel()


# The model as others see it


def test_state_dict_holds_the_weights_alone():
    "Named as Qwen3ForCausalLM names them; no buffers; a tied head is not stored twice."
    names = GPT(ModelConfig(**SMALL)).state_dict().keys()
    assert names == dict(GPT(ModelConfig(**SMALL)).named_parameters()).keys()
    layer = [
        "input_layernorm",
        *(
            f"self_attn.{part}"
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        ),
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    assert names == expected | {
        f"model.layers.{i}.{part}.weight" for i in range(2) for part in layer
    }
    assert GPT(ModelConfig(**SMALL, tie_embeddings=False)).state_dict().keys() == names | {
        "lm_head.weight"
    }


def test_hf_config_says_all_that_transformers_needs():
    config = ModelConfig(**SMALL, rope_theta=50_000).to_hf(eos_id=3, dtype="bfloat16")
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert (
        config["head_dim"] == 10
        and config["hidden_act"] == "silu"
        and config["tie_word_embeddings"] is True
    )
    assert config["attention_bias"] is False and config["use_sliding_window"] is False
    assert (
        config["eos_token_id"] == config["bos_token_id"] == 3
        and config["dtype"] == config["torch_dtype"] == "bfloat16"
    )


def test_loss_is_fp32_under_autocast():
    "And close to the loss without: the angles of the positions, too, are computed in fp32."
    model, ids = built(ModelConfig(**SMALL)), some_ids(ModelConfig(**SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(ids, ids), atol=0.02, rtol=0)


def test_model_works_on_meta_and_after_a_move():
    "Nothing is computed at build time that a device or a dtype could leave behind."
    config = ModelConfig(**SMALL)
    with torch.device("meta"):
        model = GPT(config)
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, 53)
    model.to_empty(device="cpu").load_state_dict(built(config).state_dict())
    ids = some_ids(config)
    assert torch.equal(model(ids), built(config)(ids))


def test_a_seed_decides_the_first_weights():
    a, b, c = (built(ModelConfig(**SMALL), seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(a[key], b[key]) for key in a) and not torch.equal(a[name], c[name])


# What it refuses


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"d_model": 24.0}, "d_model is 24.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"n_kv_heads": 4}, "n_kv_heads is 4"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"d_model": 25, "head_dim": 0}, "d_model is 25"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"norm_eps": math.inf}, "norm_eps is inf"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"seq_len": "16"}, "seq_len is '16'"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1"),
        ({"d_ff": None}, "d_ff is None"),
    ],
)
def test_a_wrong_config_gets_a_sentence_that_begins_with_the_field(changes, words):
    with pytest.raises(UserError) as error:
        ModelConfig(**{**SMALL, **changes})
    assert str(error.value).startswith(words) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "llama"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"hidden_size": 0}, "d_model"),
    ],
)
def test_a_config_of_another_model_is_refused(changes, word):
    "Rather than loaded and computed wrong."
    with pytest.raises(UserError, match=word):
        ModelConfig.from_hf({**ModelConfig(**SMALL).to_hf(), **changes})


@pytest.mark.parametrize(
    "name", [name for name in HF_NAMES.values() if name not in ("rope_theta",)]
)
def test_a_config_with_a_hole_is_refused(name):
    config = ModelConfig(**SMALL).to_hf()
    del config[name]
    with pytest.raises(UserError, match=name):
        ModelConfig.from_hf(config)


def test_older_config_with_rope_theta_alone_is_read():
    "transformers 4 wrote the base of the angles at the top level."
    config = ModelConfig(**SMALL, rope_theta=1e6).to_hf()
    del config["rope_parameters"]
    assert ModelConfig.from_hf({**config, "rope_scaling": None}).rope_theta == 1e6


@torch.no_grad()
def test_the_last_logits_alone_are_the_last_of_all():
    "With a cache and without; a loss is of all positions, always."
    model = GPT(ModelConfig(**SMALL)).eval()
    ids = torch.randint(SMALL["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(0))
    every, cache = model(ids), model.make_cache(batch=3)
    model(ids[:, :4], cache=cache)
    for last in (model(ids, last_only=True), model(ids[:, 4:], cache=cache, last_only=True)):
        assert last.shape == (3, 1, SMALL["vocab_size"]) and torch.allclose(
            last, every[:, -1:], atol=1e-5
        )
    assert torch.equal(model(ids, ids, last_only=True), model(ids, ids))


@pytest.mark.parametrize("bad", [53, -1])
def test_a_token_outside_the_vocabulary_gets_a_sentence(bad):
    with pytest.raises(UserError, match=f"Token id {bad} is outside"):
        GPT(ModelConfig(**SMALL))(torch.tensor([[1, bad, 2]]))


def test_too_long_a_sequence_gets_a_sentence():
    "Also when it becomes too long by way of the cache."
    model = GPT(ModelConfig(**SMALL))
    with pytest.raises(UserError, match="17 tokens, and this model reads 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = model.make_cache(batch=1)
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match="17 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    "ids, targets, words",
    [
        (torch.zeros(5, dtype=torch.long), None, "ids has shape (5,)"),
        (torch.zeros(2, 5), None, "ids has dtype float32"),
        (
            torch.zeros(2, 5, dtype=torch.long),
            torch.zeros(2, 4, dtype=torch.long),
            "targets has shape (2, 4)",
        ),
    ],
)
def test_a_wrong_shape_is_named(ids, targets, words):
    with pytest.raises(ShapeError) as error:
        GPT(ModelConfig(**SMALL))(ids, targets)
    assert words in str(error.value)
