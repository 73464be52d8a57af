"""`llm-course` in a process group of its own, as a terminal starts it: to be watched, signalled and waited for while it runs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import PATIENCE, ROOT


class Running:
    "A command that runs; `told` is what it has written so far, on stdout and stderr, in the order of writing."

    def __init__(
        self,
        *args: object,
        cwd: Path,
        wrap: list[str] = [],
        python: list[str] = ["-m", "llm_course"],
        **env: str,
    ) -> None:
        self.file = open(cwd / f"output-{time.monotonic_ns()}.txt", "w+b")
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "utf-8",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        command = [*wrap, sys.executable, *python, *map(str, args)]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def told(self) -> str:
        return Path(self.file.name).read_text(encoding="utf-8", errors="replace")

    @property
    def lines(self) -> list[str]:
        "Its lines; what a progress bar draws over itself is not one."
        lines = [line for line in re.split(r"[\r\n]+", self.told) if line.strip()]
        return [line for line in lines if not re.search(r"\d+%\||\d+[kM]?B? \[\d\d:", line)]

    def until(self, happens: str | Callable[[], object]) -> object:
        "Wait for a text in what it tells, or for something to be true; it must still run then, or have run to that point."
        test = (lambda: re.search(happens, self.told)) if isinstance(happens, str) else happens
        end = time.monotonic() + PATIENCE
        while not (found := test()):
            assert time.monotonic() < end, f"{happens} has not happened:\n{self.told}"
            assert self.process.poll() is None or test(), (
                f"it ended with {self.process.poll()} before {happens}:\n{self.told}"
            )
            time.sleep(0.005)
        return found

    def send(self, number: int) -> None:
        "A signal to it and all its children, as Ctrl-C on a terminal does; none where it has ended."
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> int:
        "Wait for its end: the exit status."
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.told}") from None

    def stop(self) -> None:
        "Whatever it does, it is over."
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()
        self.file.close()


@contextmanager
def running(*args: object, cwd: Path, **options: object) -> Iterator[Running]:
    "`llm-course ARGS`, which runs within the block and not beyond it."
    command = Running(*args, cwd=cwd, **options)
    try:
        yield command
    finally:
        command.stop()
