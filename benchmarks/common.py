"""What every benchmark shares: rounds that take turns, rows in processes of their own, the machine, and the file of results."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def take_turns(rows: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list]:
    """What each row returns in each of `rounds` rounds. Rows take turns, so that a slow minute of the machine hits all alike."""
    found: dict[str, list] = {name: [] for name in rows}
    for number in range(rounds):
        for name, row in rows.items():
            found[name].append(row())
            print(
                f"round {number + 1} of {rounds}, {name}: {found[name][-1]}",
                file=sys.stderr,
                flush=True,
            )
    return found


def in_process(script: str | Path, *arguments: object, **environment: str) -> object:
    """What a script prints as JSON on its last line, run in a process of its own: no row inherits another's memory or caches."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment}
    )
    return json.loads(done.stdout.splitlines()[-1])


def in_order_of_hashes(texts: Iterable[str]) -> list[str]:
    """The same texts in an order that looks like chance, and is the same everywhere."""
    return sorted(texts, key=lambda text: sha256(text.encode()).digest())


def middle(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def machine(*packages: str) -> dict[str, object]:
    """The processor, its memory and number formats, a GPU if there is one, and the versions of Python, torch and `packages`."""
    import torch

    facts = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf"):
        facts["memory_gb"] = round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1
        )
    for name, probe in (
        ("amx", "_is_amx_tile_supported"),
        ("avx512_bf16", "_is_avx512_bf16_supported"),
    ):
        facts[name] = bool(getattr(torch.cpu, probe, bool)())
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {**facts, "versions": {name: installed(name) for name in ("torch", *packages)}}


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def results_path(script: str | Path) -> Path:
    """Where the results of a benchmark lie: beside it, those of a GPU in a file of their own."""
    import torch

    return Path(script).with_suffix(".gpu.json" if torch.cuda.is_available() else ".json")


def read_results(script: str | Path, nothing: object) -> object:
    """The results that lie beside a benchmark from the last time, or `nothing`."""
    path = results_path(script)
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else nothing


def write_results(script: str | Path, results: object, *packages: str) -> None:
    """Write the JSON file beside a benchmark: its command as typed, the machine, the versions, the results."""
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])
    record = {"command": command, "machine": machine(*packages), "results": results}
    results_path(script).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
