"""How long training takes to reach a loss: nanoGPT's recipe for a CPU, and our `speedrun`, on one text, taking turns.

    python benchmarks/time_to_loss.py [--text help] [--seeds 3] [--threads 2]
    python benchmarks/time_to_loss.py --ablations [--text help] [--seeds 1] [--threads 2]

The text is `help` (a million characters of Python's own), `tales`, or the path of a file of about 1 MB; its last tenth is for
validation. Every row is a process of its own. Time is that of the training steps alone: preparing data, building the model and
evaluating stand outside the clock on both sides. The loss is in nats per character over the whole validation text but its first
character, each model reading windows of its own context that move on by half of it. Results, with the machine and the versions, go
to benchmarks/time_to_loss.json, the plot to benchmarks/time_to_loss.png; the table is printed.

The reference is what nanoGPT's README gives to those with a CPU alone (https://github.com/karpathy/nanoGPT), with transformers'
GPT2LMHeadModel: REFERENCE below. Its matrix products are in bf16, its attention is `eager`: the fastest of four settings, which the
row "settings" times. Ablations get as many steps as fit into the time of `speedrun` at the paces of their steps, which take turns."""

import argparse
import ast
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common import in_order_of_hashes, in_process, middle, read_results, write_results

TALES = 2_200  # make about a million characters
LOOKS = 10  # points of a curve beside its end
LOOKED_AT = 8_000  # characters of the validation text that a point is measured on


@dataclass(frozen=True)
class Recipe:
    """How a model is trained here. The defaults are nanoGPT's, for those with a CPU alone; a change is an ingredient of ours."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    steps: int = 2000
    lr: float = 1e-3
    least_lr: float = 1e-4  # where the cosine ends
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1  # of what has two dimensions
    clip: float = 1.0
    bf16: bool = True
    attention: str = "eager"  # or sdpa
    ours: str = ""  # the part that is `speedrun`'s: "model", "schedule", "muon", or none


REFERENCE = Recipe()


def reference_rate(step: int, recipe: Recipe = REFERENCE) -> float:
    """nanoGPT's learning rate of a step: from zero up in a line, then half a cosine down to a tenth."""
    if step < recipe.warmup:
        return recipe.lr * step / recipe.warmup
    share = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.least_lr + 0.5 * (1 + math.cos(math.pi * share)) * (recipe.lr - recipe.least_lr)


PIECES = 1_024  # vocabulary of the row in which tokens may be any pieces of text

MAIN = {
    "reference": {"recipe": {}},
    "speedrun": {"settings": {}},
    "speedrun, as long": {"settings": {}},
    "speedrun, pieces": {"settings": {}},
}

# What an ingredient brings alone, to the reference; what `speedrun` is without it; and with what it was found to do as well without.
ADDED: dict[str, dict] = {
    "nothing": {},
    "the model": {"ours": ("model",)},
    "Muon": {"ours": ("muon",)},
    "the learning rates": {"ours": ("rate",)},
    "the context and the batch": {"context": 128, "batch": 8},
}
LEFT_OUT: dict[str, dict] = {
    "nothing": {},
    "two layers (four)": {"n_layers": 4},
    "a head of its own (tied)": {"tie_embeddings": True},
    "Muon (AdamW for all)": {"muon_lr_scale": 0.0},
    "short momentum (0.95)": {"muon_momentum": 0.95},
    "the tables' own rate": {"embedding_lr_scale": 1.0},
    "the high rate (0.001)": {"lr": 0.001},
    "the long fall to zero (a tenth)": {"decay_fraction": 0.1},
    "the long context (64)": {"seq_len": 64, "batch_size": 32},
    "bf16": {"precision": "fp32"},
    "attention in blocks": {"plain": "attention"},
    "the loss some rows at a time": {"plain": "loss"},
}
TAKEN_OUT: dict[str, dict] = {
    "one key-value head": {"n_kv_heads": 1},
    "warm-up (10 steps)": {"warmup_steps": 10},
    "batches of half the size": {"batch_size": 8},
    "weight decay (0.1)": {"weight_decay": 0.1},
    "clipping (at 1)": {"grad_clip": 1.0},
}
ROWS = {
    **MAIN,
    **{f"reference and {name}": {"recipe": recipe} for name, recipe in ADDED.items()},
    **{f"speedrun without {name}": {"settings": settings} for name, settings in LEFT_OUT.items()},
    **{f"speedrun with {name}": {"settings": settings} for name, settings in TAKEN_OUT.items()},
}


@dataclass
class Trainer:
    """A training that has begun: `step()` makes one step of it, `model(ids)` gives logits, `encode(text)` gives ids."""

    step: Callable[[], object]
    model: object
    encode: Callable[[str], list[int]]
    context: int
    tokens: int  # of one step


def read(name: str) -> str:
    """A text by its name or its path."""
    if name == "help":
        return python_help()
    if name == "tales":
        from llm_course.tales import sample_tales

        return "\n".join(sample_tales(0, TALES))
    return Path(name).read_text(encoding="utf-8")


def python_help(characters: int = 1_000_000) -> str:
    """What Python's `help` shows: the pages of its topics and the docstrings of its library, in the order of their hashes."""
    from pydoc_data.topics import topics

    library, found = Path(sysconfig.get_paths()["stdlib"]), set(topics.values())
    for path in library.rglob("*.py"):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(
            path.relative_to(library).parts
        ):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                found.add(ast.get_docstring(node) or "")
    pages = (page for page in found if len(page) >= 100)
    return "\n\n".join(in_order_of_hashes(pages))[:characters]


def split(text: str) -> tuple[str, str]:
    """The first nine tenths, to learn from, and the last tenth."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def reference_model(vocab: int, recipe: Recipe = REFERENCE):
    """The reference's model, called as GPT is: with `targets` it gives the loss, else the logits."""
    import torch
    from torch.nn import functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    class Reference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocab,
                    n_positions=recipe.context,
                    n_embd=recipe.width,
                    n_layer=recipe.layers,
                    n_head=recipe.heads,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    bos_token_id=0,
                    eos_token_id=0,
                    use_cache=False,
                    attn_implementation=recipe.attention,
                )
            )

        def forward(self, ids, targets=None):
            logits = self.gpt(ids).logits
            return (
                logits
                if targets is None
                else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            )

    return Reference()


def reference_optimizers(model, recipe: Recipe, training) -> list:
    """AdamW as nanoGPT has it: what has two dimensions decays. Muon takes the blocks' matrices where that is the ingredient."""
    import torch

    from llm_course.optim import Muon

    named, muon = dict(model.named_parameters()), []
    if "muon" in recipe.ours:
        matrices = {
            name: p
            for name, p in named.items()
            if p.ndim == 2 and ("layers" in name or ".h." in name)
        }
        muon = [
            Muon(
                [
                    {
                        "params": list(matrices.values()),
                        "weight_decay": training.weight_decay,
                        "lr_scale": training.muon_lr_scale,
                    }
                ],
                dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
            )
        ]
        named = {name: p for name, p in named.items() if name not in matrices}
    groups = [
        {
            "params": [p for p in named.values() if (p.ndim > 1) == decays],
            "lr_scale": 1.0,
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return [
        torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True),
        *muon,
    ]


def theirs(text: str, seed: int, recipe: Recipe) -> Trainer:
    """The reference, perhaps with a part of `speedrun`: characters as nanoGPT numbers them, batches drawn as it draws them."""
    import torch

    from llm_course.config import load_config
    from llm_course.gpt import GPT
    from llm_course.kernels import accelerate
    from llm_course.optim import learning_rate, set_learning_rate

    torch.manual_seed(seed)
    known, config = sorted(set(text)), load_config("speedrun", {"max_steps": recipe.steps})
    ids = {character: i for i, character in enumerate(known)}
    encode = lambda part: [ids[character] for character in part]
    stream = torch.tensor(encode(split(text)[0]))
    model = reference_model(len(known), recipe)
    if "model" in recipe.ours:
        model = accelerate(
            GPT(replace(config.model, vocab_size=len(known), seq_len=recipe.context))
        )
    optimizers = reference_optimizers(model, recipe, config.training)
    done = 0

    def step() -> float:
        nonlocal done
        starts = torch.randint(len(stream) - recipe.context, (recipe.batch,)).tolist()
        x, y = (
            torch.stack(
                [stream[start + ahead : start + ahead + recipe.context] for start in starts]
            )
            for ahead in (0, 1)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        rate = (
            learning_rate(done, config.training)
            if "rate" in recipe.ours
            else reference_rate(done, recipe)
        )
        set_learning_rate(optimizers, rate)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss.item()

    return Trainer(step, model, encode, recipe.context, recipe.batch * recipe.context)


def ours(folder: Path, seed: int, steps: int, settings: dict) -> Trainer:
    """`speedrun` as `llm-course train` runs it: shards, start_run and its steps; `settings` set fields of the config anew.

    One of them is no field: `plain` puts the plain attention, or the plain loss, in the place of the fast one."""
    import torch

    from llm_course.attention import causal_attention
    from llm_course.config import load_config
    from llm_course.gpt import cross_entropy
    from llm_course.pipeline import start_run

    fields = {name: value for name, value in settings.items() if name != "plain"}
    config = load_config("speedrun", {"max_steps": steps, "seed": seed, **fields})
    start = start_run(config, folder, torch.device("cpu"), log=lambda line: None)
    run = start.trainer
    tokens = config.tokens_per_step
    if settings.get("plain") == "attention":
        for block in run.model.model.layers:
            block.self_attn.attend = causal_attention
    if settings.get("plain") == "loss":
        run.model.loss = cross_entropy

    def step() -> float:
        run.step()
        return run.loss

    return Trainer(step, run.model, start.tokenizer.encode, config.model.seq_len, tokens)


def nats_per_character(trainer: Trainer, before: str, text: str) -> float:
    """The loss on `text`, of which the model has seen the last token of `before`: nats of its tokens, divided by its characters."""
    from llm_course.evaluation import score, windows

    tokens = [*trainer.encode(before)[-1:], *trainer.encode(text)]
    stream = windows(tokens, trainer.context, trainer.context // 2)
    return sum(losses.sum().item() for _, losses in score(trainer.model, stream, 64)) / len(text)


def timed(
    begin: Callable[[int], Trainer], steps: int, seconds: float, text: str, looks: int
) -> dict:
    """Train for `steps`, or for as many as fit into `seconds`, on a clock that stands still while the model is looked at."""
    if seconds:
        rehearsal = begin(1000)
        for _ in range(5):
            rehearsal.step()
        start = time.perf_counter()
        for _ in range(20):
            rehearsal.step()
        steps = max(1, round(seconds / (time.perf_counter() - start) * 20))
    trainer, curve, clock = begin(steps), [], 0.0
    before, val = split(text)
    for done in range(1, steps + 1):
        start = time.perf_counter()
        trainer.step()
        clock += time.perf_counter() - start
        if looks and done % max(1, steps // looks) == 0:
            curve.append((clock, nats_per_character(trainer, before, val[:LOOKED_AT])))
    return {
        "steps": steps,
        "tokens": steps * trainer.tokens,
        "seconds": clock,
        "loss": nats_per_character(trainer, before, val),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "curve": curve,
    }


def paces(rows: dict[str, Trainer]) -> dict[str, float]:
    """Milliseconds of a step of each row. Rows take turns step by step, so that a slow minute of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(40):
        for name, trainer in rows.items():
            start = time.perf_counter()
            trainer.step()
            if number >= 5:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: middle(found) for name, found in times.items()}


def begun(row: str, root: Path, seed: int, steps: int, text: str) -> Trainer:
    """The training of a row, at its beginning."""
    if "recipe" in ROWS[row]:
        return theirs(text, seed, replace(REFERENCE, steps=steps, **ROWS[row]["recipe"]))
    return ours(
        root / ("pieces" if row == "speedrun, pieces" else "characters"),
        seed,
        steps,
        ROWS[row]["settings"],
    )


def run_row(args: argparse.Namespace) -> dict:
    """One row, trained here, in this process; or the paces of the reference's settings, or of all ablations."""
    import torch

    from llm_course.device import keep_memory

    torch.set_num_threads(args.threads)
    keep_memory()  # on both sides
    text = (args.root / "text.txt").read_text(encoding="utf-8")
    if args.row == "settings":
        return paces(
            {
                f"{attention}, {'bf16' if bf16 else 'fp32'}": theirs(
                    text, 0, replace(REFERENCE, attention=attention, bf16=bf16)
                )
                for attention in ("eager", "sdpa")
                for bf16 in (False, True)
            }
        )
    if args.row == "paces":
        return paces({row: begun(row, args.root, 0, 1000, text) for row in ROWS if row not in MAIN})
    begin = partial(begun, args.row, args.root, args.seed, text=text)
    found = timed(begin, args.steps, args.seconds, text, LOOKS if args.row in MAIN else 0)
    return {
        "row": args.row,
        "text": args.text,
        "seed": args.seed,
        "load": os.getloadavg()[0],
        **found,
    }


def prepare(root: Path, text: str) -> None:
    """The text, and its tokenizer and shards, once for all rows: with characters as tokens, and with pieces."""
    from llm_course.config import load_config
    from llm_course.shards import write_shards
    from llm_course.tokenizer import train_tokenizer

    (root / "text.txt").write_text(text, encoding="utf-8", newline="")
    train, val = split(text)
    for folder, vocab_size in (("characters", 0), ("pieces", PIECES)):
        write_shards(
            [train],
            train_tokenizer([train], vocab_size),
            root / folder,
            val_documents=[val],
            seq_len=load_config("speedrun").model.seq_len,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="help")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ablations", action="store_true")
    for name, kind in (
        ("row", str),
        ("seed", int),
        ("steps", int),
        ("seconds", float),
        ("root", Path),
    ):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(run_row(args)))
    from llm_course.config import load_config

    short, results = load_config("speedrun").training.max_steps, read_results(__file__, {})
    with tempfile.TemporaryDirectory() as root:
        prepare(Path(root), read(args.text))
        process = partial(
            in_process,
            __file__,
            "--text",
            args.text,
            "--root",
            root,
            "--threads",
            args.threads,
            "--row",
        )

        def row(name: str, seed: int, steps: int = 0, seconds: float = 0.0) -> dict:
            found = process(name, "--seed", seed, "--steps", steps, "--seconds", seconds)
            print(
                f"{name:50} seed {seed}: {found['loss']:.4f} after {found['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            return found

        mine = results.setdefault(args.text, {})
        if args.ablations:
            pace = mine["paces"] = process("paces")
            steps = {
                name: round(short * pace["speedrun without nothing"] / pace[name]) for name in pace
            }
            mine["ablations"] = []
            for seed, name in ((seed, name) for seed in range(args.seeds) for name in steps):
                mine["ablations"].append(row(name, seed, steps[name]))
                write_results(
                    __file__, results, "transformers"
                )  # so that a run that is stopped leaves something
        else:
            mine["settings"], mine["rows"] = process("settings"), []
            for seed in range(args.seeds):
                reference = row("reference", seed, REFERENCE.steps)
                mine["rows"] += [
                    reference,
                    row("speedrun", seed, short),
                    row("speedrun, as long", seed, seconds=reference["seconds"]),
                    row("speedrun, pieces", seed, seconds=reference["seconds"] / 5),
                ]
                write_results(__file__, results, "transformers")
    write_results(__file__, results, "transformers")
    plot(results)
    print(table(results))


def spread(values: list[float], form: str) -> str:
    """The median, and the least and the most where there are several."""
    found = f"{middle(values):{form}}"
    return found if len(values) == 1 else f"{found} ({min(values):{form}} to {max(values):{form}})"


def ratios(rows: list[dict]) -> tuple[list[float], list[float]]:
    """For each seed: the reference's time in times of `speedrun`'s, and the nats that `speedrun` is below it after the same time."""
    of = lambda name: [found for found in rows if found["row"] == name]
    times = [
        theirs["seconds"] / ours["seconds"] for theirs, ours in zip(of("reference"), of("speedrun"))
    ]
    return times, [
        theirs["loss"] - ours["loss"]
        for theirs, ours in zip(of("reference"), of("speedrun, as long"))
    ]


def table(results: dict) -> str:
    """The results as tables in Markdown."""
    return "\n\n".join(
        part
        for name, found in results.items()
        for part in (main_table(name, found), ablation_table(found))
        if part
    )


def main_table(text: str, found: dict) -> str:
    """The rows of a text: medians over the seeds, with their spread, and what follows from them."""
    if "rows" not in found:
        return ""
    lines = [
        f"| {text} | parameters | tokens | seconds | nats per character |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in MAIN:
        mine = [row for row in found["rows"] if row["row"] == name]
        tokens = middle(row["tokens"] for row in mine)
        lines.append(
            f"| {name} | {mine[0]['parameters']:,} | {tokens:,.0f} | {spread([row['seconds'] for row in mine], '.1f')}"
            f" | {spread([row['loss'] for row in mine], '.3f')} |"
        )
    times, nats = ratios(found["rows"])
    return "\n".join(lines) + (
        f"\n\n{text}: the reference takes {spread(times, '.1f')} times as long as `speedrun`; after the same"
        f" time `speedrun` is {spread(nats, '.2f')} nats lower."
    )


def ablation_table(found: dict) -> str:
    """What each ingredient brings alone, and what is lost without it, in the same time."""
    if "ablations" not in found:
        return ""
    lines = [
        "| in the same time | milliseconds a step | steps | nats per character |",
        "|---|---:|---:|---:|",
    ]
    for name, pace in found["paces"].items():
        mine = [row for row in found["ablations"] if row["row"] == name]
        if mine:
            lines.append(
                f"| {name.replace(' and nothing', '').replace(' without nothing', '')} | {pace:.1f} | {mine[0]['steps']}"
                f" | {spread([row['loss'] for row in mine], '.3f')} |"
            )
    return "\n".join(lines)


def plot(results: dict) -> None:
    """Loss against the time of training, every seed a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(6 * len(results), 4), layout="constrained", squeeze=False
    )
    colours = dict(zip(MAIN, ("tab:gray", "tab:red", "tab:blue", "tab:green")))
    for axis, (text, found) in zip(axes[0], results.items()):
        for row in found.get("rows", []):
            axis.plot(
                *zip(*row["curve"]),
                color=colours[row["row"]],
                label=row["row"] if row["seed"] == 0 else None,
            )
        axis.set(
            xscale="log", xlabel="seconds of training", ylabel="nats per character", title=text
        )
        axis.legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
