"""How fast a model of 125M parameters writes: ours beside transformers, and both beside what the memory allows.

    python benchmarks/generation.py [--new 256] [--prompt 1000] [--rounds 3] [--add]

The same random weights: a checkpoint folder of ours, which transformers opens as a Qwen3ForCausalLM; and its GPT-2 of 111M.
Greedy; 1 and 8 samples after a prompt of 16 tokens; then the first token after a long prompt, on a model that has written before.
Every row of every round is a process of its own, and rows take turns. In the same process, right before and right after each
measurement, the memory's bandwidth: the bytes of 512 MB of float32 over the median seconds of summing them. The table is that of
benchmarks/README.md; all results go to benchmarks/generation.json. With --add, new rounds join those that are there."""
import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import in_process, middle, read_results, take_turns, write_results

SHORT = 16  # tokens of the short prompt
OURS = {"ours, fp32": "fp32", "ours, bf16": "bf16", "ours, fp16 weights": "fp16"}
THEIRS = {f"{name}, {dtype}": (name, dtype) for name in ("Qwen3", "GPT-2") for dtype in ("fp32", "bf16")}
NO_CACHE = "ours, fp32, without a cache"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def bandwidth(rounds: int = 7) -> float:
    """Bytes per second at which this process reads memory."""
    import torch

    numbers = torch.ones(2**27)
    return numbers.nbytes / middle(seconds(numbers.sum) for _ in range(rounds))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def our_writer(row: str, folder: Path) -> Callable[[list[int], int, int], object]:
    """Our `generate` on the weights of a folder: (prompt, samples, new tokens) are written."""
    from safetensors.torch import load_file

    from llm_course.gpt import GPT
    from llm_course.sampling import generate
    from llm_course.training import load_config

    model = GPT(load_config("125m").model).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    options = {"use_cache": False} if row == NO_CACHE else {"precision": OURS[row]}
    return lambda prompt, samples, new: generate(model, prompt, new, temperature=0, n_samples=samples, **options)


def their_writer(row: str, folder: Path) -> Callable[[list[int], int, int], object]:
    """The same with transformers: its own cache and fused attention. GPT-2 has random weights of its own."""
    import torch
    import transformers

    kind, name = THEIRS[row]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if kind == "Qwen3":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32_000, n_positions=2048)).to(dtype)
    model.eval()
    assert model.config._attn_implementation == "sdpa"

    def write(prompt: list[int], samples: int, new: int) -> None:
        ids = torch.tensor([prompt] * samples)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                 do_sample=False, eos_token_id=None, pad_token_id=0)
        assert written.shape == (samples, len(prompt) + new)

    return write


def measure(row: str, folder: Path, new: int, long: int) -> dict:
    """One row here, in this process: seconds for each task, and the bandwidth around it."""
    import torch

    torch.manual_seed(0)
    write = (their_writer if row in THEIRS else our_writer)(row, folder)
    prompt = torch.randint(2, 32_000, (long,)).tolist()
    write(prompt[:SHORT], 1, 2)
    write(prompt[:SHORT], 8, 2)
    found = {}
    for task, work in {"1 sample": lambda: write(prompt[:SHORT], 1, new), "8 samples": lambda: write(prompt[:SHORT], 8, new),
                       "first token": lambda: write(prompt, 1, 1)}.items():
        if row == NO_CACHE and task == "8 samples": continue  # minutes
        before = bandwidth()
        took = seconds(work)
        found[task] = {"seconds": took, "bandwidth": (before + bandwidth()) / 2}
    return found


def prepare(folder: Path) -> None:
    """A folder with the weights and config of our 125M model, as checkpoints have them; the weights are random."""
    import torch
    from safetensors.torch import save_file

    from llm_course.gpt import GPT
    from llm_course.training import load_config

    torch.manual_seed(0)
    model = GPT(load_config("125m").model)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))


def summary(rounds: dict[str, list[dict]], new: int, long: int) -> dict:
    """Medians: tokens per second (of all samples together), seconds to the first token, and the share of the bandwidth."""
    from llm_course.training import load_config

    size, rows = load_config("125m").model.n_params, {}
    for row, found in rounds.items():
        rows[row] = mine = {}
        for task, samples in (("1 sample", 1), ("8 samples", 8)):
            if task in found[0]: mine[task] = middle(new * samples / each[task]["seconds"] for each in found)
        mine["first token"] = middle(each["first token"]["seconds"] for each in found)
        if row in OURS:
            read = size * BYTES[OURS[row]] * new
            alone = [each["1 sample"] for each in found]
            mine["share of bandwidth"] = middle(read / each["seconds"] / each["bandwidth"] for each in alone)
        mine["GB/s"] = middle(each[task]["bandwidth"] / 1e9 for each in found for task in each)
    return {"new": new, "prompt": long, "parameters": size, "rows": rows, "rounds": rounds}


def table(results: dict) -> str:
    """The medians as a table in Markdown; ratios are to the fastest row of transformers in each column."""
    rows = results["rows"]
    best = {task: better(row[task] for name, row in rows.items() if name in THEIRS)
            for task, better in (("1 sample", max), ("8 samples", max), ("first token", min))}
    lines = ["| | 1 sample, tokens/s | × | 8 samples, tokens/s | × | first token, s | × | share of bandwidth |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, row in rows.items():
        cells = [f"transformers, {name}" if name in THEIRS else name]
        for task in ("1 sample", "8 samples"):
            cells += [f"{row[task]:.1f}", f"{row[task] / best[task]:.2f}"] if task in row else ["–", "–"]
        cells += [f"{row['first token']:.2f}", f"{best['first token'] / row['first token']:.2f}"]
        cells.append(f"{row['share of bandwidth']:.0%} of {row['GB/s']:.0f} GB/s" if "share of bandwidth" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("new", 256), ("prompt", 1000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--add", action="store_true", help="add the rounds to those in the JSON file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(measure(args.row, args.folder, args.new, args.prompt)))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))

        def run(row: str) -> Callable[[], dict]:
            return lambda: in_process(__file__, "--row", row, "--folder", folder, "--new", args.new, "--prompt", args.prompt)

        rounds = take_turns({row: run(row) for row in (*OURS, *THEIRS)}, args.rounds)
        if args.add:
            there = read_results(__file__, {})["rounds"]
            rounds = {row: there.get(row, []) + rounds[row] for row in rounds} | {NO_CACHE: there[NO_CACHE]}
        else:
            rounds |= take_turns({NO_CACHE: run(NO_CACHE)}, 1)  # once: it takes a minute
    results = summary(rounds, args.new, args.prompt)
    write_results(__file__, results, "transformers")
    print(table(results))


if __name__ == "__main__":
    main()
