"""Kill training processes with SIGKILL, hundreds of times, resume them, and compare the end with runs that were never killed.

    python tests/torture.py --kills 200 --seed 0

Most victims are forks of this process, which has imported torch already; every tenth kill hits a real `llm-course train`.
Two kills in three come in the middle of a save. Then each file operation of a run is, once, the last one before a kill.
After each kill the newest checkpoint must load, and be no older than the newest that was seen whole before; at the end of a run
weights, optimizer state, log and samples must be the bits of the run that was never killed. Exit status 1 where one is not."""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: a process with one thread can be forked
)

import torch
import torch._dynamo  # every optimizer asks for it, a second's work: once for all forks

from llm_course.config import Config, load_config
from llm_course.files import UserError
from llm_course.generation import generate_text
from llm_course.integrity import load_verified, verify_checkpoint
from llm_course.pipeline import train
from llm_course.runs import CHECKPOINT_FILES, newest_checkpoint, read_log, step_folders
from llm_course.shards import write_shards
from llm_course.tales import sample_tales
from llm_course.tokenizer import train_tokenizer

VOCAB = 320
SMALL = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 64,
    "vocab_size": VOCAB,
    "seq_len": 32,
    "batch_size": 6,
    "max_steps": 30,
    "save_every": 5,
    "log_every": 1,
    "eval_every": 0,
    "eval_sequences": 4,
    "keep_checkpoints": 2,
    "warmup_steps": 5,
    "precision": "fp32",
    "compile": False,
}
SCENARIOS = {  # what differs from SMALL
    "fp32": {},
    "bf16": {"precision": "bf16", "save_every": 4, "log_every": 3},
    "accumulation": {"micro_batch_size": 4},
    "checkpointed activations": {
        "checkpoint_activations": True,
        "precision": "bf16",
        "micro_batch_size": 3,
    },
    "Muon": {"muon_lr_scale": 7.0, "embedding_lr_scale": 3.0, "precision": "bf16"},
    "several epochs": {"max_steps": 40, "batch_size": 4, "keep_checkpoints": 1},  # on tiny shards
    "a save each step": {"save_every": 1, "max_steps": 20, "keep_checkpoints": 3},
    "samples and evaluations": {
        "sample_every": 2,
        "eval_every": 3,
        "save_every": 3,
        "keep_checkpoints": 1,
    },
    "Muon, everything at once": {
        "muon_lr_scale": 7.0,
        "micro_batch_size": 4,
        "checkpoint_activations": True,
        "sample_every": 3,
        "eval_every": 2,
        "save_every": 2,
        "max_steps": 24,
    },
}
SHELL_SHARE = 0.1  # of the kills that hit processes started from a shell
SAVE_SHARE = 2 / 3  # of the kills that wait for a save
AFTER = 0.010  # seconds from the first sight of a save to the kill, at most
POLL = 0.0002  # seconds between two looks


def make_shards(root: Path) -> None:
    """Two folders of shards: `shards`, of 300 tales, and `tiny`, so small that a run goes through its files several times."""
    tales = sample_tales(0, 330)
    tokenizer = train_tokenizer(tales[:300], VOCAB)
    write_shards(
        tales[:300], tokenizer, root / "shards", val_documents=tales[300:], seq_len=SMALL["seq_len"]
    )
    write_shards(
        tales[:12],
        tokenizer,
        root / "tiny",
        val_documents=tales[300:],
        seq_len=SMALL["seq_len"],
        shard_tokens=400,
    )


def sample(model: torch.nn.Module, tokenizer: object) -> str:
    """A sampler as the command line has it; its seed comes from the random state, which a resumed run must have too."""
    return generate_text(
        model, tokenizer, "", max_new_tokens=12, seed=int(torch.randint(10**6, ())), log=None
    )[0]


@dataclass
class Scenario:
    """A kind of run: how its victims start, and the run that was never killed."""

    name: str
    root: Path
    shell: bool = False
    started: float = 0.0  # seconds from the start of a process to its first step
    seconds: float = 0.0  # that a whole run takes

    def __post_init__(self) -> None:
        fields = {**SMALL, **SCENARIOS[self.name]}
        self.folder = self.root / f"{self.name}{' (shell)' if self.shell else ''}"
        self.shards = self.root / ("tiny" if self.name == "several epochs" else "shards")
        self.config: Config = load_config("tiny", fields)
        self.folder.mkdir()
        (self.folder / "config.json").write_text(json.dumps(asdict(self.config)))
        begun, life = time.monotonic(), Life(self, self.whole)
        while (code := life.ended()) is None:
            if not self.started and (self.whole / "log.jsonl").exists():
                self.started = time.monotonic() - begun
            time.sleep(POLL)
        self.seconds = time.monotonic() - begun
        if code:
            raise SystemExit(f"{self.name}: a run that nobody killed failed:\n{life.said()}")

    @property
    def whole(self) -> Path:
        """The folder of the run that was never killed."""
        return self.folder / "whole"

    def start(self, out: Path, output: Path) -> int:
        """A new process that trains into `out`, from where an earlier one was killed; its id."""
        if not self.shell:
            return forked(lambda: self.train(out), output)
        command = [
            sys.executable,
            "-m",
            "llm_course",
            "train",
            "--config",
            self.folder / "config.json",
            "--resume",
            "--data",
            self.shards,
            "--out",
            out,
            "--device",
            "cpu",
        ]
        with open(output, "a") as file:
            return subprocess.Popen(
                [str(word) for word in command],
                stdout=file,
                stderr=file,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            ).pid

    def train(self, out: Path) -> None:
        """The training itself, as a forked process does it."""
        train(
            self.config, self.shards, out, resume=True, device="cpu", progress=False, sampler=sample
        )

    def left(self, out: Path) -> float:
        """The share of a run that is still to be done."""
        newest = newest_checkpoint(out)
        return 1 - (int(newest.name[5:]) if newest else 0) / self.config.training.max_steps


def forked(work: Callable[[], object], output: Path) -> int:
    """Start `work` in a copy of this process, with what it prints going to the end of a file; the new process's id."""
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        with (
            open(output, "a", buffering=1) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


class Life:
    """One process of a run, from its start to its end."""

    def __init__(self, scenario: Scenario, out: Path, pid: int | None = None) -> None:
        self.output = out.with_name(f"{out.name}.txt")
        self.pid, self.code = pid or scenario.start(out, self.output), None

    def ended(self, wait: bool = False) -> int | None:
        """How the process ended, as subprocess has it (-9: killed); None while it lives."""
        if self.code is None:
            done, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self) -> int:
        """Kill it, and wait for its end."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.ended(wait=True)

    def said(self) -> str:
        """The end of what it and those before it have said."""
        return self.output.read_text()[-3000:]


def saves(out: Path) -> set[str]:
    """The hidden names of a save that is under way, or was interrupted."""
    try:
        return {name for name in os.listdir(out) if name.startswith((".step-", ".latest"))}
    except FileNotFoundError:
        return set()


def known(out: Path) -> int:
    """The step of the newest checkpoint that is whole, which is one with its own name; -1 if there is none."""
    return max((int(path.name[5:]) for path in step_folders(out)), default=-1)


def latest_is_behind(out: Path) -> bool:
    """Whether `latest` does not name the newest checkpoint."""
    newest = newest_checkpoint(out)
    return bool(newest) and (
        not (out / "latest").is_symlink() or os.readlink(out / "latest") != newest.name
    )


def faults_after_a_kill(out: Path, before: int) -> list[str]:
    """What is wrong with the checkpoints in `out`, of which the one of step `before` was seen whole."""
    try:
        if known(out) < before:
            return [f"step {before} was saved, and {known(out)} is the newest now"]
        if before < 0 and known(out) < 0:
            return []
        for folder in step_folders(out):
            verify_checkpoint(folder)
        if load_verified(out).step < before:
            return [f"step {before} was saved, and an older one is loaded"]
        if (out / "latest").is_symlink():
            load_verified(out / "latest")
        return []
    except (UserError, OSError) as error:
        return [str(error)]


def equal(a: object, b: object) -> bool:
    """Whether two nests of dictionaries, lists and tensors are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def differences(out: Path, whole: Path) -> list[str]:
    """What in the folder of a run that was killed is not as in that of the run that was not."""
    found, last, wanted = [], newest_checkpoint(out), newest_checkpoint(whole)
    if last is None or last.name != wanted.name:
        return [f"the last checkpoint is {last}, and should be {wanted.name}"]
    for name in CHECKPOINT_FILES:
        if name == "trainer.pt":
            same = equal(
                *(torch.load(folder / name, weights_only=True) for folder in (last, wanted))
            )
        else:
            same = (last / name).read_bytes() == (wanted / name).read_bytes()
        if not same:
            found.append(f"{name} differs")
    logs = [
        [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(folder)]
        for folder in (out, whole)
    ]
    for mine, other in itertools.zip_longest(*logs):
        if mine != other:
            found.append(f"log.jsonl: {mine} instead of {other}")
            break
    if [entry["sample"] for entry in logs[0] if "sample" in entry] != [
        entry["sample"] for entry in logs[1] if "sample" in entry
    ]:
        found.append("the samples differ")
    if latest_is_behind(out):
        found.append("latest does not name the last checkpoint")
    if saves(out):
        found.append(f"left over: {', '.join(sorted(saves(out)))}")
    return found


@dataclass
class Tally:
    """What has been counted, by scenario."""

    counts: dict[str, Counter] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    columns = ("kills", "in a save", "resumes", "runs", "lost", "differing")

    def add(self, name: str, **counts: int) -> None:
        """Count something for a scenario."""
        self.counts.setdefault(name, Counter()).update(
            {key.replace("_", " "): n for key, n in counts.items()}
        )

    def blame(self, name: str, what: str, out: Path, faults: list[str]) -> None:
        """Count and keep faults, if there are any."""
        if not faults:
            return
        self.add(name, **{what: 1})
        self.faults += [f"{name}, {out}: {fault}" for fault in faults]
        print(self.faults[-1], flush=True)

    def total(self, column: str) -> int:
        """The sum of a column."""
        return sum(counts[column] for counts in self.counts.values())

    def table(self) -> str:
        """All of it."""
        rows = [
            (name, [counts[column] for column in self.columns])
            for name, counts in self.counts.items()
        ]
        rows.append(("all", [self.total(column) for column in self.columns]))
        left = max(len(name) for name, _ in rows)
        head = f"{'':{left}}" + "".join(f"  {column:>9}" for column in self.columns)
        return "\n".join(
            [
                head,
                *(
                    f"{name:{left}}" + "".join(f"  {n:9,}" for n in numbers)
                    for name, numbers in rows
                ),
            ]
        )


def live(scenario: Scenario, out: Path, rng: random.Random) -> tuple[Life, int]:
    """Start a process and kill it at a random moment of its life or in the middle of a save, if it does not end before.

    Returns it, and the newest step that was seen saved before the kill."""
    left, training = scenario.left(out), scenario.config.training
    per_life = scenario.started + (scenario.seconds - scenario.started) * left
    in_save = rng.random() < SAVE_SHARE
    deadline = time.monotonic() + (600 if in_save else rng.uniform(0, per_life))
    which = rng.randint(
        1, max(1, round(left * training.max_steps / training.save_every / 2))
    )  # of the saves to come
    seen, life = saves(out), Life(scenario, out)
    first = len(seen)
    while life.ended() is None and time.monotonic() < deadline:
        seen |= {name for name in saves(out) if name.startswith(".step-")}
        if in_save and len(seen) - first >= which:
            time.sleep(rng.uniform(0, AFTER))
            break
        time.sleep(POLL)
    before = known(out)
    life.kill()
    return life, before


def victim(scenario: Scenario, out: Path, kills: int, rng: random.Random, tally: Tally) -> int:
    """A run that is killed up to `kills` times and then goes to its end; how often it was killed."""
    name, done, sure = scenario.folder.name, 0, -1
    while True:
        tally.add(name, resumes=newest_checkpoint(out) is not None)
        if done < kills:
            life, before = live(scenario, out, rng)
            sure = max(sure, before)
        else:
            (life := Life(scenario, out)).ended(wait=True)
        if life.code != -signal.SIGKILL:
            break
        done += 1
        tally.add(name, kills=1, in_a_save=bool(saves(out)) or latest_is_behind(out))
        tally.blame(name, "lost", out, faults_after_a_kill(out, sure))
    tally.add(name, runs=1)
    found = (
        differences(out, scenario.whole)
        if life.code == 0
        else [f"exit status {life.code}: {life.said()}"]
    )
    tally.blame(name, "differing", out, found)
    if not found:
        shutil.rmtree(out)
    return done


def random_kills(
    root: Path, kills: int, rng: random.Random, tally: Tally, names: list[str]
) -> None:
    """Victims of all scenarios in turn, until there have been so many kills."""
    from_shell = round(kills * SHELL_SHARE)
    made: dict[tuple[str, bool], Scenario] = {}
    for shell, wanted in ((False, kills - from_shell), (True, from_shell)):
        for number, name in enumerate(itertools.cycle(names)):
            if wanted <= 0:
                break
            scenario = made.setdefault((name, shell), None) or Scenario(name, root, shell)
            made[name, shell] = scenario
            wanted -= victim(
                scenario,
                scenario.folder / f"victim-{number}",
                min(wanted, rng.randint(3, 8)),
                rng,
                tally,
            )


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")


def killed_at(scenario: Scenario, out: Path, operation: int, count: Path) -> None:
    """Train in a forked process; kill it just before it touches `out` for the `operation`th time; `count` gets a line each."""
    log, done = open(count, "w", buffering=1), itertools.count()

    def audit(event: str, args: tuple) -> None:
        if event not in OPERATIONS:
            return
        path = args[event == "os.symlink"]
        inside = (
            event in ("os.remove", "os.rmdir") and args[1] >= 0
        )  # a folder that is being removed
        if isinstance(path, str | Path) and (inside or str(path).startswith(str(out))):
            if next(done) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            log.write(f"{event} {Path(path).name}\n")

    sys.addaudithook(audit)
    scenario.train(out)


def each_operation(root: Path, tally: Tally, stride: int = 1) -> None:
    """Kill a run before each operation on files that it does (or every `stride`th), and resume it to its end."""
    name = "before each file operation"
    SCENARIOS[name] = {
        "max_steps": 3,
        "save_every": 1,
        "sample_every": 2,
        "eval_every": 2,
        "keep_checkpoints": 1,
        "batch_size": 2,
    }
    scenario = Scenario(name, root)
    count = scenario.folder / "operations.txt"
    for operation in itertools.count(0, stride):
        out = scenario.folder / f"victim-{operation}"
        life = Life(
            scenario,
            out,
            forked(
                lambda: killed_at(scenario, out, operation, count), out.with_name(f"{out.name}.txt")
            ),
        )
        if life.ended(wait=True) != -signal.SIGKILL:
            break
        tally.add(
            name,
            kills=1,
            in_a_save=bool(saves(out)) or latest_is_behind(out),
            resumes=newest_checkpoint(out) is not None,
        )
        lines = count.read_text().splitlines()
        renamed = [
            int(line[-10:-4]) for line in lines[:-1] if line.startswith("os.rename .step-")
        ]  # the last: perhaps not done
        tally.blame(name, "lost", out, faults_after_a_kill(out, max(renamed, default=-1)))
        (life := Life(scenario, out)).ended(wait=True)
        found = (
            differences(out, scenario.whole)
            if life.code == 0
            else [f"exit status {life.code}: {life.said()}"]
        )
        tally.add(name, runs=1)
        where = f"killed right after `{lines[-1]}`" if lines else "killed at once"
        tally.blame(name, "differing", out, [f"{where}: {fault}" for fault in found])
        if not found:
            shutil.rmtree(out)
    if life.code:
        tally.blame(name, "differing", out, [f"exit status {life.code}: {life.said()}"])


def main() -> int:
    """Torture, report, and 1 if anything was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scenario",
        action="append",
        choices=list(SCENARIOS),
        help="only this one (may be given again)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        help="kill before every STRIDEth file operation (0: before none)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the runs go, and stay (default: a temporary one; what fails stays)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun, tally, rng = time.monotonic(), Tally(), random.Random(args.seed)
    root = args.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    root.mkdir(parents=True, exist_ok=True)
    make_shards(root)
    random_kills(root, args.kills, rng, tally, args.scenario or list(SCENARIOS))
    if args.stride:
        each_operation(root, tally, args.stride)
    print(tally.table())
    lost, differing = tally.total("lost"), tally.total("differing")
    print(
        f"{tally.total('kills'):,} kills, {tally.total('in a save'):,} of them in a save; {tally.total('resumes'):,} resumes;"
        f" {tally.total('runs'):,} runs to their end; {lost} lost checkpoints; {differing} runs that differ;"
        f" seed {args.seed}, {time.monotonic() - begun:.0f} s"
    )
    if not (lost or differing or args.folder):
        shutil.rmtree(root)
    return int(bool(lost or differing))


if __name__ == "__main__":
    sys.exit(main())
