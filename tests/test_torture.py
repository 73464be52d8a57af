"""The short form of `make torture`: real processes are killed, and what they leave must load and lead to the same bits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

TORTURE = Path(__file__).with_name("torture.py")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks its victims")


def torture(*args: object) -> tuple[int, str]:
    """Exit status and output of the command."""
    done = subprocess.run(
        [sys.executable, TORTURE, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout + done.stderr


def test_killed_runs_end_with_the_same_bits():
    """Random kills in every scenario, most of them in a save, one of them of `llm-course train`."""
    code, said = torture("--kills", 20, "--seed", 1, "--stride", 0)
    assert code == 0 and "20 kills" in said and "0 lost checkpoints; 0 runs that differ" in said, (
        said
    )
    assert int(re.search(r"(\d+) of them in a save", said)[1]) > 0 and "(shell)" in said


def test_before_each_file_operation():
    """A run that is killed before any one of its operations on files loses nothing, and is resumed to the same bits."""
    code, said = torture("--kills", 0, "--stride", 2)  # every other one, here
    assert code == 0 and "0 lost checkpoints; 0 runs that differ" in said, said
    assert int(re.search(r"(\d+) kills", said)[1]) > 25


def test_it_would_tell(tmp_path):
    """The comparison sees one bit of a weight, of the optimizer's memory, and a word of a sample."""
    check = """
import sys; sys.argv = ["torture.py"]
from torture import *
out, root = Path(sys.stdin.readline().strip()), None
make_shards(out)
one = Scenario("samples and evaluations", out)
def spoil(work):
    copy = one.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(one.whole, copy, symlinks=True)
    work(newest_checkpoint(copy))
    return differences(copy, one.whole)
def flip(path):
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
def forget(folder):
    state = torch.load(folder / "trainer.pt", weights_only=True)
    state["optimizers"][0]["state"][0]["exp_avg"].view(-1).view(torch.int32)[0] ^= 1
    torch.save(state, folder / "trainer.pt")
def reword(folder):
    log = folder.parent / "log.jsonl"
    log.write_text(log.read_text().replace('"sample": "', '"sample": "x', 1))
assert spoil(lambda folder: None) == []
assert spoil(lambda folder: flip(folder / "model.safetensors")) == ["model.safetensors differs"]
assert spoil(forget) == ["trainer.pt differs"]
assert spoil(reword)[-1] == "the samples differ"
assert spoil(lambda folder: (folder.parent / ".step-000001.tmp").mkdir()) == ["left over: .step-000001.tmp"]
assert spoil(shutil.rmtree)[0].startswith("the last checkpoint is")
flip(newest_checkpoint(one.whole) / "trainer.pt")
assert faults_after_a_kill(one.whole, 1) and faults_after_a_kill(one.whole, 10**6)
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", check],
        input=f"{tmp_path}\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(TORTURE.parent)},
    )
    assert done.stdout.endswith("fine\n"), done.stderr
