"""What a training step costs as the work grows, in time and in memory, beside what the count and the rehearsal predict.

    python benchmarks/growth.py [--rounds 2] [--threads 2]
    python benchmarks/growth.py --gpu

One process for each point: its memory is the most that the process has held, its time the shortest of some steps. Width, depth,
sequence length and vocabulary grow one at a time; then four sizes in both precisions, with and without checkpointing. Results,
with the machine and the versions, go to benchmarks/growth.json, the curves to benchmarks/growth.png; the table is printed. On a GPU it is
sizes alone, all in one process; their memory is that of PyTorch's tensors at the most, and results go to growth.gpu.json."""

import argparse
import json
import re
import sys
from pathlib import Path

from common import in_process, middle, read_results, write_results

BASE = {
    "config": "tiny",
    "precision": "fp32",
    "n_layers": 4,
    "d_model": 128,
    "n_heads": 4,
    "n_kv_heads": 4,
    "d_ff": 384,
    "vocab_size": 1024,
    "seq_len": 256,
    "batch_size": 4,
}
AXES = {
    "width": [
        {"d_model": n, "n_heads": n // 32, "n_kv_heads": n // 32, "d_ff": 3 * n}
        for n in (64, 128, 256, 512)
    ],
    "depth": [{"n_layers": n} for n in (1, 2, 4, 8, 16)],
    "sequence length": [{"seq_len": n} for n in (64, 128, 256, 512, 1024, 2048)],
    "vocabulary": [{"vocab_size": n} for n in (256, 1024, 4096, 16_384, 65_536)],
}
SIZES = {  # a config and what is changed in it
    "tiny": ("tiny", {}),
    "lesson": ("lesson", {}),
    "10m": (
        "tiny",
        {
            "n_layers": 6,
            "d_model": 320,
            "n_heads": 5,
            "n_kv_heads": 5,
            "d_ff": 864,
            "vocab_size": 8000,
            "seq_len": 256,
        },
    ),
    "125m": ("125m", {"seq_len": 256, "batch_size": 2, "micro_batch_size": 1}),
}
GPU_SIZES = {
    "10m": (
        "tiny",
        {
            "n_layers": 6,
            "d_model": 320,
            "n_heads": 5,
            "n_kv_heads": 5,
            "d_ff": 864,
            "vocab_size": 8192,
            "seq_len": 256,
            "batch_size": 64,
        },
    ),
    "125m": ("125m", {"batch_size": 16, "micro_batch_size": 4}),
    "350m": ("350m", {"batch_size": 8, "micro_batch_size": 4}),
    "1.3b": ("1.3b", {"batch_size": 4, "micro_batch_size": 2}),
}
PRECISIONS = ("fp32", "bf16")


def config_of(point: dict) -> object:
    """The Config of a point: {"config": name, and fields of it}."""
    from llm_course.config import load_config

    fields = {"checkpoint_activations": False, "muon_lr_scale": 0.0, **point}
    return load_config(fields.pop("config"), fields)


def highest() -> int:
    """Bytes that this process has held at the most. (Of Linux's two accounts the other one begins with the parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def train(config: object, steps: int, device: str) -> list[float]:
    """The seconds of some steps here, in this process, as `llm-course train` makes them, but for those of the first."""
    import time

    import torch

    from llm_course.gpt import GPT
    from llm_course.kernels import accelerate
    from llm_course.optim import clip_gradients, make_optimizers
    from llm_course.step import forward_backward

    training, bf16, times = config.training, config.training.precision == "bf16", []
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.device(device):
        model = accelerate(GPT(config.model))
    model.checkpoint_activations = training.checkpoint_activations
    optimizers = make_optimizers(model, training, torch.bfloat16 if bf16 else torch.float32)
    for _ in range(steps):
        ids = torch.randint(
            config.model.vocab_size, (training.batch_size, config.model.seq_len + 1)
        ).to(device)
        wait()
        begun = time.perf_counter()
        forward_backward(
            model,
            ids[:, :-1],
            ids[:, 1:],
            training.micro_batch_size or training.batch_size,
            torch.bfloat16 if bf16 else torch.float32,
        )
        clip_gradients(model, training.grad_clip)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        wait()
        times.append(time.perf_counter() - begun)
    return times[1:]


def run_point(point: dict, steps: int, threads: int) -> dict:
    """Train a few steps on the processor: seconds of the shortest, bytes held at the most."""
    import torch

    from llm_course.device import keep_memory

    torch.set_num_threads(threads)
    keep_memory()
    return {"seconds": min(train(config_of(point), steps, "cpu")), "bytes": highest()}


def foretell(point: dict, speed: float) -> dict:
    """What the count on paper and the rehearsal say of a point, where `speed` bytes a second come from memory."""
    import torch

    from llm_course.device import rate_at_shapes
    from llm_course.planner import simulate_step, step_memory

    config = config_of(point)
    bf16 = config.training.precision == "bf16"
    dtype, rows = (torch.bfloat16 if bf16 else torch.float32), config.tokens_per_step
    played, rate = (
        simulate_step(config, dtype),
        rate_at_shapes(config.model, min(rows, 1024), dtype),
    )
    memory = step_memory(played, True, bf16)
    return {
        "seconds": played.seconds(rate, speed),
        "least": config.model.flops_per_token() * rows / rate,
        "bytes": sum(memory.values()),
        "memory": memory,
        "parameters": config.model.n_params,
    }


def foretell_all(points: list[dict], threads: int) -> list[dict]:
    """The same of many points, in one process, which measures the machine's ceilings."""
    import torch

    from llm_course.device import bandwidth

    torch.set_num_threads(threads)
    speed = bandwidth(2**26)
    return [foretell(point, speed) for point in points]


def run_on_gpu(point: dict, steps: int) -> dict:
    """The same on a GPU: the bytes of tensors at the most, and all that the process has taken from the GPU, if no other is there."""
    import torch

    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    times, (free, total) = train(config_of(point), steps, "cuda"), torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return {
        "seconds": min(times),
        "bytes": torch.cuda.max_memory_allocated(),
        "taken": torch.cuda.max_memory_reserved() + beside,
    }


WORKSPACES = (
    2 * 2**25
)  # bytes that cuBLAS keeps on a Hopper GPU, for the forward and the backward thread: torch counts them as tensors


def foretell_on_gpu(point: dict, speed: float) -> dict:
    """What `llm-course plan --device cuda` says of a point, but for what CUDA itself takes."""
    import torch

    from llm_course.device import rate_at_shapes
    from llm_course.planner import simulate_step

    config = config_of(point)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    played = simulate_step(config, dtype, on_cpu=False)
    rate = rate_at_shapes(config.model, 8192, dtype, "cuda")
    return {
        "seconds": played.seconds(rate, speed),
        "bytes": sum(played.memory.values()) + WORKSPACES,
        "memory": played.memory,
        "parameters": config.model.n_params,
    }


def gpu_results(steps: int) -> list[dict]:
    """All sizes on the GPU, foretold and measured."""
    from llm_course.device import bandwidth

    speed, results = bandwidth(2**30, "cuda"), []
    for each in sizes(GPU_SIZES):
        results.append(
            {
                **each,
                "measured": run_on_gpu(each["point"], steps),
                "foretold": foretell_on_gpu(each["point"], speed),
            }
        )
        print(*results[-1].values(), file=sys.stderr, flush=True)
    return results


def sizes(chosen: dict = SIZES) -> list[dict]:
    """The points of the table."""
    return [
        {
            "size": size,
            "point": {
                "config": name,
                **fields,
                "precision": precision,
                "checkpoint_activations": recompute,
            },
        }
        for size, (name, fields) in chosen.items()
        for precision in PRECISIONS
        for recompute in (False, True)
    ]


def points() -> list[dict]:
    """All points: those of the curves, then those of the table."""
    return [
        {"axis": axis, "point": {**BASE, **change}} for axis in AXES for change in AXES[axis]
    ] + sizes()


def draw(results: list[dict], path: Path) -> None:
    """Four columns, one for what grows; time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "width": "d_model",
        "depth": "n_layers",
        "sequence length": "seq_len",
        "vocabulary": "vocab_size",
    }
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained", sharey="row")
    for column, axis in enumerate(AXES):
        mine = [result for result in results if result.get("axis") == axis]
        at = [result["point"][names[axis]] for result in mine]
        top, low = axes[:, column]
        top.loglog(at, [1000 * r["measured"]["seconds"] for r in mine], "o-", label="measured")
        top.loglog(
            at, [1000 * r["foretold"]["seconds"] for r in mine], "--", label="by the rehearsal"
        )
        top.loglog(
            at,
            [1000 * r["foretold"]["least"] for r in mine],
            ":",
            color="grey",
            label="least, by the count",
        )
        low.loglog(at, [r["measured"]["bytes"] / 1e6 for r in mine], "o-", label="measured")
        low.loglog(at, [r["foretold"]["bytes"] / 1e6 for r in mine], "--", label="predicted")
        top.set(title=f"as the {axis} grows", ylabel="ms a step" if column == 0 else None)
        low.set(xlabel=axis, ylabel="MB at the most" if column == 0 else None)
        for ax in (top, low):
            ax.set_xticks(at, [f"{n:,}" for n in at])
            ax.minorticks_off(), ax.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_yticks(
        ticks := [400, 600, 1000, 1500, 2500, 4000], [f"{tick:,}" for tick in ticks]
    )
    axes[0, 0].legend(frameon=False), axes[1, 0].legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(results: list[dict]) -> str:
    """Memory of four sizes, foretold and measured; then by how much each curve's ends differ, in time and in memory."""
    gpu = any("taken" in result["measured"] for result in results)
    lines = [
        "| model | parameters | precision | activations | predicted, MB | measured, MB | predicted / measured |"
        + gpu * " the same of a step's time |",
        "|---|---:|---|---|---:|---:|---:|" + gpu * "---:|",
    ]
    for result in (result for result in results if "size" in result):
        point, guess, found = (
            result["point"],
            result["foretold"]["bytes"],
            result["measured"]["bytes"],
        )
        kept = "computed twice" if point["checkpoint_activations"] else "kept"
        lines.append(
            f"| {result['size']} | {result['foretold']['parameters']:,} | {point['precision']} | {kept} |"
            f" {guess / 1e6:,.0f} | {found / 1e6:,.0f} | {guess / found:.2f} |"
            + gpu
            * f" {result['foretold']['seconds'] / result['measured']['seconds']:.2f} |"
        )
    if all("size" in result for result in results):
        return "\n".join(lines)
    lines += [
        "",
        "| what grows | from, to | time, measured | by the rehearsal | by the count | memory, measured | predicted |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    names = {
        "width": "d_model",
        "depth": "n_layers",
        "sequence length": "seq_len",
        "vocabulary": "vocab_size",
    }
    for axis in AXES:
        first, *_, last = (result for result in results if result.get("axis") == axis)
        grown = lambda kind, key: f"{last[kind][key] / first[kind][key]:.1f} ×"
        ends = ", ".join(f"{end['point'][names[axis]]:,}" for end in (first, last))
        lines.append(
            f"| {axis} | {ends} | {grown('measured', 'seconds')} | {grown('foretold', 'seconds')} |"
            f" {grown('foretold', 'least')} | {grown('measured', 'bytes')} | {grown('foretold', 'bytes')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 1), ("threads", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--only",
        default="",
        help="curves or sizes: measure these, and keep what growth.json has of the others",
    )
    parser.add_argument("--gpu", action="store_true", help="sizes on the GPU")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--foretell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(run_point(json.loads(args.run), args.steps, args.threads)))
    if args.foretell:
        return print(json.dumps(foretell_all(json.loads(args.foretell), args.threads)))
    if args.gpu:
        write_results(__file__, results := gpu_results(args.steps))
        return print(table(results))
    results = []
    kind = {"curves": "axis", "sizes": "size"}.get(args.only)
    known = read_results(__file__, []) if kind else []
    ask = lambda flag, what: in_process(
        __file__, flag, json.dumps(what), "--threads", args.threads, "--steps", args.steps
    )
    chosen = [each for each in points() if not kind or kind in each]
    for each, foretold in zip(chosen, ask("--foretell", [each["point"] for each in chosen])):
        rounds = [ask("--run", each["point"]) for _ in range(args.rounds)]
        measured = {key: middle(found[key] for found in rounds) for key in ("seconds", "bytes")}
        results.append({**each, "measured": measured, "foretold": foretold})
        shares = [f"{foretold[key] / measured[key]:.2f}" for key in ("bytes", "seconds")]
        print(
            *list(each.values()),
            "foretold, of memory and time measured:",
            *shares,
            file=sys.stderr,
            flush=True,
        )
    results += [old for old in known if kind not in old]
    write_results(__file__, results)
    if any("axis" in result for result in results):
        draw(results, Path(__file__).with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
