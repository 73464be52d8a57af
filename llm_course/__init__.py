__version__ = "0.1.0"

# What `import llm_course as lc` offers, and the module that has it: each is loaded when it is first asked for.
_HOMES = {
    "train_tokenizer": "api", "prepare": "api", "train": "api", "load": "api", "generate": "api", "evaluate": "api",
    "Tokenizer": "tokenizer", "GPT": "gpt", "ModelConfig": "config", "TrainingConfig": "config", "Config": "config",
    "sample_tales": "tales", "check_tale": "tales", "UserError": "files",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    "A function or class of the library, from its module; AttributeError for any other name."
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    "The names that are there, loaded or not."
    return sorted({*globals(), *_HOMES})
