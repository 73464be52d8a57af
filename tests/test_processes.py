"""Several processes under torchrun, as users start them: one is killed, all are told to stop, and they resume elsewhere."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Outcome, course, fine, process
from running import running
from test_training import pack, same_files, told

from llm_course.integrity import load_verified
from llm_course.runs import newest_checkpoint, read_log, step_folders
from llm_course.tales import sample_tales

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for the processes of torchrun in /proc"
)

FLAGS = (
    "train --config tiny --data shards --resume --save_every 5 --sample_every 10 --eval_every 10 --log_every 1 --device cpu "
    "--precision fp32 --max_steps"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shards`, whose name has a space."""
    tales, folder = sample_tales(0, 400), tmp_path_factory.mktemp("several processes")
    pack(tales[:380], tales[380:], folder / "shards")
    return folder


CLUSTER = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "nowhere.invalid",
    "MASTER_PORT": "1",
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function that sets the variables of a launcher, those that are not given being unset."""

    def put(**variables: str) -> None:
        for name in CLUSTER:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "line, code, told",
    [
        ("prepare --input nosuch", 2, "nosuch"),
        ("prepare --seq_len 16 --out_dir new", 0, "next: "),
        ("eval --input short.txt --documents line", 0, "bits"),
        ("generate --max_new_tokens 2", 0, "Once"),
        ("demo --root new --config tiny --max_steps 2 --stories 40 --seq_len 16", 0, "next: "),
    ],
)
def test_the_environment_of_a_cluster_is_for_train_alone(
    line, code, told, cluster, trained, tmp_path, monkeypatch
):
    """Every other subcommand works, and speaks, whatever number its process has there."""
    monkeypatch.setattr("llm_course.demo.STORIES", 3)  # of the demo's model, to be judged
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (tmp_path / "run/short.txt").write_text("Once upon a time.\n")
    cluster(**CLUSTER)
    done = course(*line.split(), cwd=tmp_path / "run")
    assert done.code == code and told in done.out + done.err, done


@pytest.mark.parametrize(
    "variables, told",
    [
        (
            {"WORLD_SIZE": "2"},
            "RANK and MASTER_ADDR and MASTER_PORT are not set: start the processes with torchrun, or unset WORLD_SIZE",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({**CLUSTER, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({**CLUSTER, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({**CLUSTER, "RANK": "2"}, "RANK is '2'"),
        ({**CLUSTER, "RANK": "one"}, "RANK is 'one'"),
        ({**CLUSTER, "MASTER_PORT": "99999"}, "MASTER_PORT"),
        ({**CLUSTER, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_an_environment_that_makes_no_sense(variables, told, cluster, trained, tmp_path):
    """One sentence, at once."""
    cluster(**variables)
    done = course(
        "train",
        "--config",
        "tiny",
        "--data",
        trained / "data/shards",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert (
        done.code == 2
        and len(done.lines) == 1
        and told in done.lines[0]
        and not (tmp_path / "out").exists()
    ), done


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "", "RANK": "3", "LOCAL_RANK": "x"},
    ],
)
def test_a_number_without_others_is_no_crowd(variables, cluster, trained, tmp_path):
    """A process that is alone trains alone, and speaks."""
    cluster(**variables)
    said = fine(
        course(
            "train",
            "--config",
            "tiny",
            "--max_steps",
            1,
            "--data",
            trained / "data/shards",
            "--out",
            "out",
            cwd=tmp_path,
        )
    )
    assert "next: " in said and load_verified(tmp_path / "out").step == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_waits_for_the_others_can_be_stopped(number, folder):
    """The first process waits where the others should meet it; a signal ends that, and leaves nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def waits() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", port)) == 0

    with running(*FLAGS, 4, "--out", "alone", cwd=folder, **meeting) as run:
        run.until(waits)
        run.send(number)
        assert run.end() == -number, run.told
        Path(run.file.name).unlink()
    assert not (folder / "alone").exists()


class Job:
    """`torchrun … -m llm_course train` into folder/out, under way."""

    def __init__(
        self,
        folder: Path,
        out: str,
        *,
        steps: int = 40,
        processes: int = 2,
        restarts: int = 0,
        flags: tuple = (),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            processes,
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
            "--max-restarts",
            restarts,
            "-m",
            "llm_course",
            *FLAGS,
            steps,
            "--out",
            out,
            *flags,
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.out, self.files = (
            folder / out,
            [open(folder / f"{out}.{name}", "w+") for name in ("stdout", "stderr")],
        )
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder,
            env=env,
            stdout=self.files[0],
            stderr=self.files[1],
        )

    def reaches(self, step: int) -> "Job":
        """Wait until a checkpoint of `step` or later is there."""
        end = time.monotonic() + PATIENCE
        while not ((newest := newest_checkpoint(self.out)) and int(newest.name[5:]) >= step):
            assert self.process.poll() is None and time.monotonic() < end, self.ended()
            time.sleep(0.002)
        return self

    def workers(self) -> list[int]:
        """The process ids of the ranks, in their order."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended, or is not ours
                continue
            if parent == self.process.pid and rank:
                found[int(rank[1])] = int(folder.name)
        return [pid for _, pid in sorted(found.items())]

    def ended(self) -> Outcome:
        """How it ended, which must be soon."""
        try:
            self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                for worker in self.workers():
                    os.kill(worker, signal.SIGKILL)
                self.process.kill()
        for file in self.files:
            file.seek(0)
        return Outcome(self.process.returncode, *(file.read() for file in self.files))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The run of two processes that nothing disturbs."""
    fine(Job(folder, "whole").ended())
    return folder / "whole"


def same_runs(a: Path, b: Path) -> None:
    """Assert that two runs ended with the same bits, and their logs and samples are the same."""
    assert newest_checkpoint(a).name == newest_checkpoint(b).name == os.readlink(a / "latest")
    same_files(newest_checkpoint(a), newest_checkpoint(b))
    assert told(a) == told(b) and any("sample" in entry for entry in read_log(a))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_takes_the_job_down(rank, folder, whole):
    """With a status that is not 0, one sentence of ours, and a checkpoint that goes on to the same bits."""
    job = Job(folder, f"killed {rank}").reaches(10)
    os.kill(job.workers()[rank], signal.SIGKILL)
    outcome = job.ended()
    assert outcome.code != 0
    said = re.findall(
        "Another process of this run has ended.*", outcome.err
    )  # perhaps behind the bar of the killed one
    assert len(said) == 1 and "--resume" in said[0] and "training.py" not in outcome.err, (
        outcome.err
    )
    saved = load_verified(job.out)
    assert saved.step >= 10 and saved.path.name in said[0]
    fine(Job(folder, job.out.name).ended())
    same_runs(job.out, whole)


@pytest.mark.slow
def test_it_comes_back_by_itself(folder, whole):
    """--max-restarts 2 and --resume: each rank is killed once, and the bits are those of the run that nothing disturbed."""
    job = Job(folder, "restarted", restarts=2).reaches(10)
    os.kill(job.workers()[1], signal.SIGKILL)
    job.reaches(25)
    os.kill(job.workers()[0], signal.SIGKILL)
    said = fine(job.ended())
    assert said.count("Resuming") == 2
    same_runs(job.out, whole)


@pytest.mark.slow
def test_sigterm_lets_all_finish_their_step(folder, whole):
    """SIGTERM to torchrun, as a scheduler sends it: the step is finished and saved, and a resume ends the same."""
    job = Job(folder, "stopped").reaches(10)
    job.process.terminate()
    outcome = job.ended()
    assert outcome.code != 0 and "training.py" not in outcome.err
    stopped = read_log(job.out)[-1]["step"]
    assert f"Stopped after step {stopped}, which is saved" in outcome.out
    assert (
        load_verified(job.out).step == stopped
        and os.readlink(job.out / "latest") == f"step-{stopped:06d}"
    )
    fine(Job(folder, "stopped").ended())
    same_runs(job.out, whole)


@pytest.mark.slow
def test_four_processes_resume(folder):
    """Among more than two the order of a sum matters: it is the same in a resumed run."""
    flags = ("--keep_checkpoints", 9)
    fine(Job(folder, "four", steps=15, processes=4, flags=flags).ended())
    shutil.copytree(folder / "four", folder / "four resumed", symlinks=True)
    for step in step_folders(folder / "four resumed")[1:]:
        shutil.rmtree(step)
    assert "at step 5 of 15" in fine(
        Job(folder, "four resumed", steps=15, processes=4, flags=flags).ended()
    )
    same_runs(folder / "four resumed", folder / "four")


def test_resuming_on_fewer_processes_or_more_threads_is_said(folder):
    """Two processes go on as one, and one thread as two: each time, one line says what is not to the bit any more."""
    fine(Job(folder, "moved", steps=5).ended())
    for steps, threads, change in ((6, "1", "processes 2 → 1"), (7, "2", "threads 1 → 2")):
        before = os.environ["OMP_NUM_THREADS"]
        os.environ["OMP_NUM_THREADS"] = threads
        try:
            said = fine(process(*FLAGS, steps, "--out", "moved", cwd=folder))
        finally:
            os.environ["OMP_NUM_THREADS"] = before
        assert re.findall("The same.*not to the bit: (.*).", said) == [change], said
