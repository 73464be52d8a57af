"""Settings are read strictly: a mistake in a config file or a flag costs one sentence, never a run with other settings."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_course.config import Config, config_names, from_text, load_config, make_config
from llm_course.files import UserError, read_json

MODEL = {
    "n_layers": 2,
    "d_model": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 160,
    "vocab_size": 512,
    "seq_len": 64,
}


def refused(text: str, tmp_path) -> str:
    """The sentence that a config file with this text is refused with."""
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(model: dict = {}, training: dict = {}) -> str:
    """A config file, sound but for what is given."""
    return json.dumps({"model": MODEL | model, "training": training})


@pytest.mark.parametrize("name", ["tiny", "lesson", "demo", "125m", "350m", "1.3b"])
def test_configs_of_the_package(name):
    """Every config that the package names can be loaded, and divides its batches evenly."""
    config = load_config(name)
    training = config.training
    assert name in config_names()
    assert training.batch_size % (training.micro_batch_size or training.batch_size) == 0
    assert training.warmup_steps < training.max_steps


def test_125m_is_what_the_course_promises():
    """The config that users start with: its context, its vocabulary, and little memory."""
    config = load_config("125m")
    assert (
        config.model.seq_len,
        config.model.vocab_size,
        config.training.checkpoint_activations,
    ) == (2048, 32_000, True)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"model": {"seq_len": 8, "seq_len": 16}}', ["'seq_len'", "twice"]),
        ('{"training": {"lr": NaN}}', ["NaN"]),
        ('{"training": {"lr": -Infinity}}', ["-Infinity"]),
        ('{"training": {"lr": 1e999}}', ["1e999"]),
        ('{"training": {"lr": 1e-3,}}', ["JSON"]),
        ("[1, 2]", ["object"]),
        ("", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
    ],
)
def test_what_is_not_sound_json_is_refused(text, words, tmp_path):
    """Python's own reader would take the first four of these."""
    message = refused(text, tmp_path)
    assert all(word in message for word in ["mine.json", *words]), message


@pytest.mark.parametrize(
    "model, training, words",
    [
        ({}, {"max_stepz": 5}, ["training.max_stepz", "max_steps"]),
        ({"n_layer": 5}, {}, ["model.n_layer", "n_layers"]),
        ({}, {"max_steps": 5.0}, ["training.max_steps", "whole number"]),
        ({}, {"max_steps": "5"}, ["training.max_steps", "whole number"]),
        ({}, {"max_steps": True}, ["training.max_steps", "whole number"]),
        ({}, {"max_steps": None}, ["training.max_steps", "whole number"]),
        ({}, {"compile": 1}, ["training.compile", "true or false"]),
        ({}, {"lr": "fast"}, ["training.lr", "number"]),
        ({}, {"lr": [1e-3]}, ["training.lr", "number"]),
        ({}, {"precision": "bf17"}, ["training.precision", "bf16"]),
        ({}, {"max_steps": 0}, ["training.max_steps", "1"]),
        ({}, {"decay_fraction": 1.5}, ["training.decay_fraction"]),
        ({}, {"lr": -1e-3}, ["training.lr"]),
        ({}, {"keep_checkpoints": 0}, ["training.keep_checkpoints"]),
        ({}, {"seed": -1}, ["training.seed"]),
        ({"n_layers": 0}, {}, ["n_layers"]),
        ({"n_kv_heads": 3}, {}, ["n_kv_heads"]),
    ],
)
def test_wrong_fields_are_named(model, training, words, tmp_path):
    """Unknown, mistyped and out of range: the sentence names the field, and for an unknown one the nearest right one."""
    message = refused(written(model, training), tmp_path)
    assert all(word in message for word in words), message


def test_missing_parts_are_named(tmp_path):
    """A field without a default must be given; a part of another name is refused."""
    assert "model.n_layers is missing" in refused("{}", tmp_path)
    assert "modle" in (message := refused('{"modle": {}}', tmp_path)) and "'model'" in message
    assert "model" in refused('{"model": 3}', tmp_path)


def test_a_config_that_does_not_exist(tmp_path):
    """The nearest name is offered; a missing file is named; a folder is no file."""
    with pytest.raises(UserError, match="'demo'"):
        load_config("dmo")
    with pytest.raises(UserError, match="nowhere.json"):
        load_config(tmp_path / "nowhere.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="folder.json"):
        load_config(tmp_path / "folder.json")


def test_a_config_as_windows_saves_it(tmp_path):
    """With a byte order mark and a name in capitals it is a config all the same."""
    (tmp_path / "C.JSON").write_text(written(training={"max_steps": 7}), encoding="utf-8-sig")
    assert load_config(tmp_path / "C.JSON").training.max_steps == 7
    assert load_config(str(tmp_path / "C.JSON")).model.d_model == 64


@pytest.mark.parametrize("name", ["TINY", "Tiny", "tinY", "TINNY"])
def test_a_config_in_other_letters(name):
    """The right one is offered, whatever the case."""
    with pytest.raises(UserError, match="Did you mean 'tiny'?"):
        load_config(name)


def test_overrides_are_read_as_on_the_command_line():
    """Texts become the field's type; values that are typed already are taken as they are."""
    config = load_config(
        "tiny",
        {
            "max_steps": "200_000",
            "lr": "3e-4",
            "compile": "true",
            "precision": "fp32",
            "d_model": 128,
        },
    )
    assert (config.training.max_steps, config.training.lr, config.training.compile) == (
        200_000,
        3e-4,
        True,
    )
    assert (config.training.precision, config.model.d_model) == ("fp32", 128)
    assert config.model.head_dim == 128 // config.model.n_heads, (
        "what is derived follows the override"
    )


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"max_step": "5"}, ["max_step", "max_steps"]),
        ({"max_steps": "many"}, ["max_steps", "'many'"]),
        ({"max_steps": "1.5"}, ["max_steps", "whole number"]),
        ({"lr": "nan"}, ["lr", "number"]),
        ({"lr": "inf"}, ["lr", "number"]),
        ({"compile": "perhaps"}, ["compile", "true or false"]),
        ({"max_steps": "-1"}, ["max_steps", "-1"]),
    ],
)
def test_wrong_overrides_are_named(overrides, words):
    """A flag with a wrong value names the flag and says what it takes."""
    with pytest.raises(UserError) as error:
        load_config("tiny", overrides)
    assert all(word in str(error.value) for word in words), error.value


@given(st.integers(1, 10**9), st.floats(1e-9, 1), st.booleans())
def test_what_is_printed_is_read_back(steps, lr, flag):
    """Whatever Python prints for a value, the reader of overrides takes."""
    assert from_text("max_steps", f"{steps:_}", int) == steps
    assert from_text("lr", repr(lr), float) == lr
    assert from_text("compile", str(flag), bool) is flag


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
some_part = st.dictionaries(
    st.sampled_from([*MODEL, "lr", "max_steps", "compile", "precision"]),
    plain | st.lists(plain, max_size=2),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["model", "training", "other"]), plain | some_part))
def test_no_config_gets_past_with_anything_but_our_error(values):
    """Whatever JSON there is in the file: a Config or a UserError."""
    try:
        assert isinstance(make_config(values, "mine.json"), Config)
    except UserError:
        pass


def test_file_and_dataclass_agree(tmp_path):
    """A config written from the dataclasses and read again is the same."""
    from dataclasses import asdict

    config = load_config("demo")
    path = tmp_path / "again.json"
    path.write_text(json.dumps(asdict(config)), encoding="utf-8")
    assert load_config(path) == config
    assert read_json(path)["training"]["lr"] == config.training.lr
