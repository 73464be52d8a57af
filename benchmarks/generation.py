"""How fast a model of 125M parameters writes: ours beside transformers, and both beside what the memory allows.

    python benchmarks/generation.py [--new 256] [--prompt 1000] [--rounds 3] [--add] [--config 125m] [--rows "ours, bf16" ...]

The same random weights: a checkpoint folder of ours, which transformers opens as a Qwen3ForCausalLM; and its GPT-2 of 111M.
Greedy; 1 and 8 samples after a prompt of 16 tokens; then the first token after a long prompt, on a model that has written before.
Every row of every round is a process of its own, and rows take turns. In the same process, right before and right after each
measurement, the memory's bandwidth: the bytes of 512 MB of float32 (4 GB on a GPU) over the median seconds of summing them. The table
is that of benchmarks/README.md; all results go to benchmarks/generation.json, those of a GPU to generation.gpu.json, which keep what they
have of other configs. With --add, new rounds join those that are there."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import in_process, middle, read_results, take_turns, write_results

SHORT = 16  # tokens of the short prompt
OURS = {"ours, fp32": "fp32", "ours, bf16": "bf16", "ours, fp16 weights": "fp16"}
THEIRS = {
    f"{name}, {dtype}": (name, dtype) for name in ("Qwen3", "GPT-2") for dtype in ("fp32", "bf16")
}
NO_CACHE = "ours, fp32, without a cache"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def bandwidth(rounds: int = 7) -> float:
    """Bytes per second at which this process reads memory."""
    import torch

    from llm_course.device import pick_device

    device = pick_device()
    numbers = torch.ones(2**27 if device.type == "cpu" else 2**30, device=device)
    return numbers.nbytes / middle(seconds(lambda: numbers.sum().item()) for _ in range(rounds))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_model(config: str):
    """A model of ours; its weights are random, and always the same."""
    import torch

    from llm_course.config import load_config
    from llm_course.gpt import GPT

    torch.manual_seed(0)
    return GPT(load_config(config).model)


def our_writer(row: str, config: str) -> Callable[[list[int], int, int], object]:
    """Our `generate`: (prompt, samples, new tokens) are written."""
    from llm_course.decoding import fast_engine
    from llm_course.device import pick_device
    from llm_course.generation import PlainEngine, generate

    model = random_model(config).to(pick_device()).eval()
    engine = (
        partial(PlainEngine, use_cache=False)
        if row == NO_CACHE
        else partial(fast_engine, precision=OURS[row])
    )
    return lambda prompt, samples, new: generate(
        model, prompt, new, temperature=0, n_samples=samples, engine=engine
    )


def their_writer(row: str, folder: Path) -> Callable[[list[int], int, int], object]:
    """The same with transformers: its own cache and fused attention. GPT-2 has random weights of its own."""
    import torch
    import transformers

    from llm_course.device import pick_device

    kind, name = THEIRS[row]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if kind == "Qwen3":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32_000, n_positions=2048)
        ).to(dtype)
    model.to(device := pick_device()).eval()
    assert model.config._attn_implementation == "sdpa"

    def write(prompt: list[int], samples: int, new: int) -> None:
        ids = torch.tensor([prompt] * samples, device=device)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert written.cpu().shape == (samples, len(prompt) + new)  # on a GPU: once it is done

    return write


def measure(row: str, config: str, folder: Path, new: int, long: int) -> dict:
    """One row here, in this process: seconds for each task, and the bandwidth around it."""
    import torch

    write = their_writer(row, folder) if row in THEIRS else our_writer(row, config)
    torch.manual_seed(0)
    prompt = torch.randint(2, 32_000, (long,)).tolist()
    write(prompt[:SHORT], 1, 2)
    write(prompt[:SHORT], 8, 2)
    if torch.cuda.is_available():
        write(prompt, 1, 1)  # there, what a shape needs is chosen and loaded when it first comes
    found = {}
    for task, work in {
        "1 sample": lambda: write(prompt[:SHORT], 1, new),
        "8 samples": lambda: write(prompt[:SHORT], 8, new),
        "first token": lambda: write(prompt, 1, 1),
    }.items():
        if row == NO_CACHE and task == "8 samples":
            continue  # minutes
        before = bandwidth()
        took = seconds(work)
        found[task] = {"seconds": took, "bandwidth": (before + bandwidth()) / 2}
    return found


def prepare(folder: Path, config: str) -> None:
    """A folder with the weights and config of that model, as checkpoints have them."""
    from safetensors.torch import save_file

    model = random_model(config)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))


def summary(rounds: dict[str, list[dict]], config: str, new: int, long: int) -> dict:
    """Medians: tokens per second (of all samples together), seconds to the first token, and the share of the bandwidth."""
    from llm_course.config import load_config

    size, rows = load_config(config).model.n_params, {}
    for row, found in rounds.items():
        rows[row] = mine = {}
        for task, samples in (("1 sample", 1), ("8 samples", 8)):
            if task in found[0]:
                mine[task] = middle(new * samples / each[task]["seconds"] for each in found)
        mine["first token"] = middle(each["first token"]["seconds"] for each in found)
        if row in OURS:
            read = size * BYTES[OURS[row]] * new
            alone = [each["1 sample"] for each in found]
            mine["share of bandwidth"] = middle(
                read / each["seconds"] / each["bandwidth"] for each in alone
            )
        mine["GB/s"] = middle(each[task]["bandwidth"] / 1e9 for each in found for task in each)
    return {"new": new, "prompt": long, "parameters": size, "rows": rows, "rounds": rounds}


def table(results: dict) -> str:
    """The medians of every config as a table in Markdown; ratios are to the fastest row of transformers in each column."""
    return "\n\n".join(table_of(config, found["rows"]) for config, found in results.items())


def table_of(config: str, rows: dict) -> str:
    """The table of one config."""
    best = {
        task: better(
            (row[task] for name, row in rows.items() if name in THEIRS and task in row),
            default=None,
        )
        for task, better in (("1 sample", max), ("8 samples", max), ("first token", min))
    }
    lines = [
        f"| {config} | 1 sample, tokens/s | × | 8 samples, tokens/s | × | first token, ms | × | share of bandwidth |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        cells = [f"transformers, {name}" if name in THEIRS else name]
        for task in ("1 sample", "8 samples"):
            cells += (
                [f"{row[task]:,.1f}", f"{row[task] / best[task]:.2f}" if best[task] else ""]
                if task in row
                else ["–", "–"]
            )
        cells.append(f"{1000 * row['first token']:,.{0 if row['first token'] > 0.1 else 1}f}")
        cells.append(
            f"{best['first token'] / row['first token']:.2f}" if best["first token"] else ""
        )
        cells.append(
            f"{row['share of bandwidth']:.0%} of {row['GB/s']:,.0f} GB/s"
            if "share of bandwidth" in row
            else ""
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("new", 256), ("prompt", 1000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--config", default="125m")
    parser.add_argument(
        "--rows", nargs="+", choices=[*OURS, *THEIRS, NO_CACHE], default=[*OURS, *THEIRS, NO_CACHE]
    )
    parser.add_argument(
        "--add", action="store_true", help="add the rounds to those in the JSON file"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(measure(args.row, args.config, args.folder, args.new, args.prompt)))
    results = read_results(__file__, {})
    with tempfile.TemporaryDirectory() as folder:
        if set(args.rows) & set(THEIRS):
            prepare(Path(folder), args.config)
        run = partial(
            in_process,
            __file__,
            "--folder",
            folder,
            "--config",
            args.config,
            "--new",
            args.new,
            "--prompt",
            args.prompt,
            "--row",
        )
        rounds = take_turns(
            {row: partial(run, row) for row in args.rows if row != NO_CACHE}, args.rounds
        )
        there = results[args.config]["rounds"] if args.add else {}
        rounds = there | {row: there.get(row, []) + found for row, found in rounds.items()}
        if NO_CACHE in args.rows and not args.add:
            rounds |= take_turns({NO_CACHE: partial(run, NO_CACHE)}, 1)  # once: it takes a minute
    results[args.config] = summary(rounds, args.config, args.new, args.prompt)
    write_results(__file__, results, "transformers")
    print(table(results))


if __name__ == "__main__":
    main()
