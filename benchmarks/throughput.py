"""How many tokens a second a training step takes in, beside transformers' LlamaForCausalLM and GPT2LMHeadModel of the same size.

    python benchmarks/throughput.py [--shapes 125m-short 125m-long 10m] [--rounds 3] [--steps 3] [--rows "ours, compiled" ...]
    python benchmarks/throughput.py --shapes 125m-gpu nanogpt --steps 20
    python benchmarks/throughput.py --in_turns --steps 14 --rows "ours, compiled" "llama, compiled" "gpt2, compiled"

Each row is a process of its own, and rows take turns: after all its steps, three rounds of them, or --in_turns after every step, which
is fair on a machine whose pace wanders, and needs the memory of all at once. All models have the same width, depth, heads, vocabulary and
(GPT-2's positions aside) number of parameters; all train in bf16 autocast with sdpa attention and fused AdamW on the same random tokens, with and without
torch.compile. Peak memory is of the process; where the first step compiles, the compiler's own memory may be its peak.
Results go to benchmarks/throughput.json, those of a GPU to throughput.gpu.json, which keep what they have of other shapes; the table
is printed."""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial

from common import in_process, middle, read_results, take_turns, write_results

SHAPES = {  # batch, sequence, vocabulary, layers, width, heads, hidden width of a gated MLP (GPT-2's has 3/2 of it and no gate)
    "125m-short": (4, 512, 50304, 12, 768, 12, 2048),
    "125m-long": (1, 2048, 50304, 12, 768, 12, 2048),
    "10m": (64, 256, 8192, 6, 320, 5, 864),
    "125m-gpu": (16, 2048, 50304, 12, 768, 12, 2048),
    "nanogpt": (
        12,
        1024,
        50304,
        12,
        768,
        12,
        2048,
    ),  # of its train_gpt2.py: the micro batch of one GPU
}
MODELS = ["ours", "llama", "gpt2"]
ROWS = [f"{model}{how}" for model in MODELS for how in ("", ", compiled")]


def ours(
    batch: int,
    length: int,
    vocab: int,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    compiled: bool,
):
    """Our model, and a step as `llm_course.training` takes it."""
    import torch

    from llm_course.config import ModelConfig, TrainingConfig
    from llm_course.device import keep_memory, pick_device
    from llm_course.gpt import GPT
    from llm_course.kernels import accelerate
    from llm_course.optim import clip_gradients, make_optimizers
    from llm_course.step import forward_backward

    device = pick_device()
    if device.type == "cpu":
        keep_memory()
    config = TrainingConfig(batch_size=batch)
    model = GPT(ModelConfig(layers, width, heads, heads, hidden, vocab, length)).to(device)
    accelerate(model, compile=compiled)
    optimizers = make_optimizers(model, config, torch.bfloat16)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        loss = forward_backward(model, x, y, batch, torch.bfloat16)
        clip_gradients(model, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return model, step


def theirs(
    kind: str,
    batch: int,
    length: int,
    vocab: int,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    compiled: bool,
):
    """A model of transformers, and the step that its users write."""
    import torch
    import transformers

    from llm_course.device import pick_device
    from llm_course.kernels import compile_anywhere

    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=hidden,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=hidden * 3 // 2,
            n_positions=length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = transformers.GPT2LMHeadModel(config)
    model.to(pick_device()).train()
    forward = compile_anywhere(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = forward(input_ids=x, labels=x).loss  # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def run_row(row: str, shape: str, steps: int, in_turns: bool) -> dict:
    """One row here, in this process: the median of some steps, the seconds of the first, the peak memory, the number of parameters.

    `in_turns`: each step waits for a line, and answers with one."""
    import torch

    from llm_course.device import pick_device

    kind, _, how = row.partition(", ")
    batch, length, vocab, *_ = SHAPES[shape]
    torch.manual_seed(0)
    model, step = (ours if kind == "ours" else lambda *a: theirs(kind, *a))(
        *SHAPES[shape], bool(how)
    )
    ids = torch.randint(vocab, (batch, length + 1)).to(pick_device())
    seconds = []
    for _ in range(2 + steps):
        if in_turns:
            sys.stdin.readline()
        begun = time.perf_counter()
        step(ids[:, :-1], ids[:, 1:])
        seconds.append(time.perf_counter() - begun)
        if in_turns:
            print(seconds[-1], flush=True)
    on_gpu = torch.cuda.is_available()
    memory = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "tokens_per_second": batch * length / middle(seconds[2:]),
        "memory": memory,
        "parameters": parameters,
        "first_step": seconds[0],
    }


def step_by_step(rows: list[str], shape: str, steps: int) -> dict[str, list[dict]]:
    """`run_row` of each row, in a process of its own: all are there at once, and take turns after every step."""
    command = [
        sys.executable,
        __file__,
        "--shapes",
        shape,
        "--steps",
        str(steps),
        "--in_turns",
        "--row",
    ]
    children = {
        row: subprocess.Popen(
            [*command, row], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for row in rows
    }
    for number in range(2 + steps):
        for row, child in children.items():
            print(file=child.stdin, flush=True)
            print(
                f"step {number + 1} of {2 + steps}, {row}: {child.stdout.readline()}",
                end="",
                file=sys.stderr,
                flush=True,
            )
    return {row: [json.loads(child.stdout.readline())] for row, child in children.items()}


def matrix_peak(rows: int, width: int, hidden: int) -> float:
    """The rate in FLOP/s at which this machine multiplies bf16 matrices of a model's shape, at its best of many tries."""
    import torch

    from llm_course.device import pick_device

    device = pick_device()
    a, b = (
        torch.randn(rows, width, device=device).bfloat16(),
        torch.randn(width, hidden, device=device).bfloat16(),
    )
    best = float("inf")
    for _ in range(50):
        begun = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * rows * width * hidden / best


def sheet_peak() -> dict[str, float]:
    """The dense bf16 peak of the GPU here by its data sheet, where we know it."""
    import torch

    from llm_course.planner import DEVICES

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [
        found for key, found in DEVICES.items() if key.upper() in name.replace(" ", "-").split("-")
    ]
    return {"sheet": known[0].rates[torch.bfloat16]} if known else {}


def flops_per_token(shape: str) -> int:
    """Of a training step: 6 for each weight that multiplies, and attention (PaLM's count, as in 05_gpt)."""
    from llm_course.config import ModelConfig

    _, length, vocab, layers, width, heads, hidden = SHAPES[shape]
    return ModelConfig(layers, width, heads, heads, hidden, vocab, length).flops_per_token()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["125m-short", "125m-long", "10m"]
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    for name, default in (("rounds", 3), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--in_turns", action="store_true", help="take turns after every step; there are no rounds"
    )
    parser.add_argument("--row", choices=[*ROWS, "peak"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        batch, length, _, _, width, _, hidden = SHAPES[args.shapes[0]]
        found = (
            matrix_peak(batch * length, width, hidden)
            if args.row == "peak"
            else run_row(args.row, args.shapes[0], args.steps, args.in_turns)
        )
        return print(json.dumps(found))
    results = read_results(__file__, {})
    for shape in args.shapes:
        row_of = {
            row: partial(
                in_process, __file__, "--row", row, "--shapes", shape, "--steps", args.steps
            )
            for row in ["peak", *args.rows]
        }
        found = (
            {"peak": [row_of["peak"]()], **step_by_step(args.rows, shape, args.steps)}
            if args.in_turns
            else take_turns(row_of, args.rounds)
        )
        results[shape] = {"flops_per_token": flops_per_token(shape), **sheet_peak(), **found}
    write_results(__file__, results, "transformers")
    print(table(results))


def table(results: dict) -> str:
    """The results as a table in Markdown: medians of the rounds, and the ratio to the better of the two others."""
    gpu = any("sheet" in found for found in results.values())
    head = "| shape (batch × length) | model | tokens/s | of the bf16 peak | times the best other | peak memory |"
    lines = [head + gpu * " MFU |", "|---|---|---:|---:|---:|---:|" + gpu * "---:|"]
    for shape, found in results.items():
        speed = {
            row: middle(one["tokens_per_second"] for one in found[row])
            for row in ROWS
            if row in found
        }
        best, peak = (
            max(value for row, value in speed.items() if not row.startswith("ours")),
            middle(found["peak"]),
        )
        for row in speed:
            memory, used = (
                middle(one["memory"] for one in found[row]),
                speed[row] * found["flops_per_token"],
            )
            ratio = f"{speed[row] / best:.2f}" if row.startswith("ours") else ""
            lines.append(
                f"| {shape} ({SHAPES[shape][0]} × {SHAPES[shape][1]}) | {row} | {speed[row]:,.0f} | {used / peak:.0%} | {ratio} |"
                f" {memory / 1e9:.2f} GB |" + gpu * f" {used / found.get('sheet', peak):.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
