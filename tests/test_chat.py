"""`llm-course chat`: a real process at a real terminal, typed at byte by byte, interrupted, ended; and the same from a pipe."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import PATIENCE, ROOT, course, fine, process

WINDOWS = sys.platform == "win32"
at_a_terminal = pytest.mark.skipif(
    WINDOWS, reason="Windows has no pseudoterminal in Python's library"
)
UP, LEFT, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x03", "\x04"
IN_A_TERMINAL = (
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # so that ^C becomes a signal
    "from llm_course.cli import main; main()"
)


class Terminal:
    "A pseudoterminal of 80 columns with `llm-course chat` on it: `type` is the keyboard, `until` the screen."

    def __init__(self, folder: Path, state: Path, *args: object):
        import pty
        import termios

        self.keys, self.line = pty.openpty()
        termios.tcsetwinsize(self.line, (24, 80))
        self.settings = lambda: termios.tcgetattr(self.line)
        self.before, self.shown, self.read = self.settings(), "", 0
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUTF8": "1",
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm",
            "XDG_STATE_HOME": str(state),
        }
        env.pop("COLUMNS", None)  # which would overrule the terminal
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, "chat", *map(str, args)],
            cwd=folder,
            env=env,
            stdin=self.line,
            stdout=self.line,
            stderr=self.line,
            start_new_session=True,
        )
        self.until("it does not answer.*\n> ")

    def type(self, text: str, pause: float = 0) -> None:
        "Press keys; with a pause after each byte of them, if one is given."
        data = text.encode()
        for part in [data[i : i + 1] for i in range(len(data))] if pause else [data]:
            os.write(self.keys, part)
            time.sleep(pause)

    def interrupt(self) -> None:
        "Press Ctrl-C no sooner than a hand can: readline hears of a signal while it waits for a key, not on its way there."
        time.sleep(0.3)
        self.type(CTRL_C)

    def until(self, pattern: str) -> str:
        "What appears on the screen up to the end of `pattern`, from where the last call stopped."
        end, raw = time.monotonic() + PATIENCE, b""
        while not (found := re.compile(pattern).search(self.shown, self.read)):
            if select.select([self.keys], [], [], 0.1)[0]:
                raw += os.read(self.keys, 65536)
                text = raw.decode("utf-8", "ignore")
                if text.encode() == raw:  # a character may come in two reads
                    self.shown, raw = self.shown + text.replace("\r\n", "\n"), b""
            assert time.monotonic() < end, f"{pattern!r} did not come:\n{self.shown[self.read :]}"
        start, self.read = self.read, found.end()
        return self.shown[start : self.read]

    def ends(self) -> int:
        "Its exit status; the terminal must be as it was."
        status = self.process.wait(PATIENCE)
        assert self.settings() == self.before, "the terminal was left with other settings"
        return status


@pytest.fixture
def terminal(trained: Path, tmp_path: Path):
    "Open a terminal in the trained folder; what is still open at the end of the test is closed."
    pytest.importorskip("readline")
    opened: list[Terminal] = []

    def open_terminal(*args: object, state: Path = tmp_path) -> Terminal:
        opened.append(Terminal(trained, state, *args))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.keys), os.close(one.line)


def piped(folder: Path, typed: str, *args: object) -> Result:
    "`llm-course chat` in this process, with `typed` on its standard input."
    import contextlib

    from llm_course.cli import main

    with contextlib.chdir(folder):
        return CliRunner().invoke(main, ["chat", *map(str, args)], input=typed)


def piped_process(folder: Path, *args: object) -> subprocess.Popen:
    "The same in a process of its own, with pipes to talk through."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, "-m", "llm_course", "chat", *map(str, args)],
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def long_seed(folder: Path, tokens: int = 400) -> int:
    "A seed whose text after `Once`, at temperature 1, does not end within so many tokens."
    from llm_course.checkpoint import load_checkpoint
    from llm_course.generation import TextSession

    checkpoint = load_checkpoint(folder / "artifacts/checkpoints/latest")
    sessions = (
        (
            seed,
            TextSession(checkpoint.model.eval(), checkpoint.tokenizer, "Once", seed=seed, log=None),
        )
        for seed in range(100)
    )
    return next(seed for seed, session in sessions if len(list(session.generate(tokens))) == tokens)


# at a terminal


@at_a_terminal
def test_lines_are_edited_and_come_back(terminal, trained, tmp_path):
    "Arrow keys edit a line, a character may come byte by byte, arrow up brings the last line back, also in the next talk."
    chat = terminal("--max_new_tokens", 3, "--seed", 5)
    chat.type("Once a time" + LEFT * 6 + "upon ")
    chat.type("é", pause=0.02)
    chat.type("\x05🦊\n", pause=0.02)  # Ctrl-E goes to the line's end
    chat.until(r"\nOnce upon éa time🦊(?s:.*?)\n\(seed 5: .*\)\n> ")
    chat.type(UP + "\n")
    chat.until(r"\nOnce upon éa time🦊(?s:.*?)\n\(seed 6: .*\)\n> ")
    chat.type(CTRL_D)
    assert chat.ends() == 0
    again = terminal("--max_new_tokens", 3)
    again.type(UP + "\n")
    again.until(r"\nOnce upon éa time🦊(?s:.*?)\n\(seed \d+: .*\)\n> ")
    again.type("/quit\n")
    assert again.ends() == 0 and (tmp_path / "llm_course" / "history").exists()


@at_a_terminal
def test_ctrl_c_stops_the_text_and_an_empty_line_goes_on(terminal, trained, tmp_path):
    """What is on the screen before and after the interruption is one text: the beginning of what `generate` writes with that seed.

    It has lines that fit the terminal, broken between words."""
    from llm_course.files import visible
    from llm_course.terminal import width

    seed = long_seed(trained)
    chat = terminal("--max_new_tokens", 10**6, "--temperature", 1, "--seed", seed)
    chat.type("Once\n")
    begun = chat.until(r"\nOnce.{9}")
    chat.type(CTRL_C)  # at once: a text that is being written hears it at any time
    begun += chat.until(r"\n\(seed \d+: an empty line goes on\)\n> ")
    chat.type("/max_new_tokens 100\n\n")
    more = chat.until(r"\nmax_new_tokens 100\n> \n(?s:.*?)\n\(seed .*\)\n> ")
    chat.type(f"/save {tmp_path / 'text'}\n{CTRL_D}")
    assert chat.ends() == 0
    text = visible((tmp_path / "text").read_bytes().decode().removesuffix("\n"))
    whole = fine(
        course(
            "generate",
            "--prompt",
            "Once",
            "--seed",
            seed,
            "--temperature",
            1,
            "--max_new_tokens",
            500,
            cwd=trained,
        )
    )
    assert whole.startswith(text)
    parts = (begun.split("\n", 1)[1].replace("^C", "", 1), more.split("100\n> \n", 1)[1])
    told = [
        re.sub(r"\n\(The text outgrows[^)]*\)", "", part.rpartition("\n(seed ")[0])
        for part in parts
    ]
    assert "".join("".join(told).split()) == "".join(text.split())
    lines = [line for part in told for line in part.split("\n")]
    assert len(lines) > 3 and all(width(line) < 80 or len(line.split()) == 1 for line in lines)
    assert set(told[1].split()[1:-1]) <= set(text.split())


@at_a_terminal
def test_ctrl_c_at_the_prompt(terminal):
    "The first clears the line and says what the second does; a line between them, and it is the first again."
    chat = terminal("--max_new_tokens", 3)
    chat.type("not this")
    chat.until("not this")
    chat.interrupt()
    assert "ends.)" in chat.until(r"\n> ")
    chat.type("Once\n")
    assert "not this" not in chat.until(r"\(seed \d+: .*\)\n> ")
    chat.type("the " * 300 + "\n")
    chat.until(r"shorten it\.\n> ")
    chat.interrupt()
    chat.until(r"ends\.\)\n> ")
    chat.interrupt()
    assert chat.ends() == 0


@at_a_terminal
@pytest.mark.parametrize("busy", [False, True], ids=["at the prompt", "writing"])
def test_sigterm_ends_at_once(terminal, busy):
    "With the shell's status for it and the terminal as it was, though no history can be kept."
    chat = terminal("--temperature", 0, "--max_new_tokens", 10**6, state=Path("/dev/null"))
    chat.type("Once\n" if busy else "half a line")
    chat.until(r"\nOnce.{9}" if busy else "half a line")
    time.sleep(0.3)
    chat.process.terminate()
    assert chat.ends() == 128 + signal.SIGTERM  # and not after a million tokens, or never
    assert "Traceback" not in chat.shown


# from a pipe


def test_texts_are_those_of_generate(trained):
    "Lines are prompts, text i has seed + i, pauses leave no trace, and nothing else is on standard output."
    done = piped(trained, "Once upon\n\n\nOnce upon\n/check\n", "--seed", 7, "--max_new_tokens", 10)
    texts = [
        fine(
            course(
                "generate",
                "--prompt",
                "Once upon",
                "--seed",
                seed,
                "--max_new_tokens",
                length,
                cwd=trained,
            )
        )
        for seed, length in ((7, 30), (8, 10))
    ]
    assert done.exit_code == 0 and done.stdout.replace("\n", "").startswith(
        "".join(texts).replace("\n", "")
    )
    assert (
        done.stdout.splitlines()[-1].startswith("  The grammar: ")
        and "> " not in done.stdout
        and "\x1b" not in done.output
    )


def test_commands(trained, tmp_path):
    "A setting holds for the next text, /again takes the next seed, /save writes a new file and no other."
    path = tmp_path / "new" / "text.txt"
    lines = [
        "/help",
        "/temperature 0",
        "Once",
        "/again",
        "/temperature",
        "/top-k 3",
        "/seed 4",
        "Once",
        "//Once",
        f"/save {path}",
    ]
    done = piped(trained, "\n".join(lines) + "\r\n", "--max_new_tokens", 6)
    first, again, *_, last = done.stdout.splitlines()
    assert done.exit_code == 0 and first == again and last.startswith("/Once")
    assert path.read_text(encoding="utf-8") == f"{last}\n"
    assert (
        "temperature 0.0\n" in done.stderr
        and "top_k 3\n" in done.stderr
        and done.stderr.count("The same seed") == 1
    )


@pytest.mark.parametrize(
    "line, told",
    [
        ("/temprature 1", "'/temperature'"),
        ("/temp 1", "'/temperature'"),
        ("/qiut", "'/quit'"),
        ("/", "/help"),
        ("/xyz", "/help"),
        ("/temperature -1", "/temperature"),
        ("/top_k many", "/top_k"),
        ("/seed 99999999999999999999", "/seed"),
        ("/temperature nan", "temperature"),
        ("/repetition_penalty inf", "repetition_penalty"),
        ("/top_p nan", "top_p"),
        ("/save", "/save story"),
        ("/save .", "another name"),
        ("/save /dev/null/x", "/dev/null"),
        ("the " * 300, "shorten"),
        ("\udcff", "Unicode"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_talk_goes_on(trained, line, told):
    "One line on standard error for it, the next line is answered, and a script learns of it by the exit status."
    typed = b"Once\n" + line.encode("utf-8", "surrogateescape") + b"\nOnce\n"
    done = piped(trained, typed, "--max_new_tokens", 2, "--temperature", 0)
    assert done.exit_code == 2 and done.stdout.count("Once") == 2
    assert len(done.stderr.splitlines()) == 1 and told in done.stderr


def test_settings_at_their_limits_write_on(trained):
    "What is admitted is answered: with numbers that a float32 takes for 0 or infinity, too, and all of them together."
    limits = [
        "/temperature 1e-46",
        "/top_p 1e-300",
        "/repetition_penalty 1e-300",
        "/top_k 99999999999999999999",
        "/min_p 5e-324",
    ]
    done = piped(
        trained,
        "".join(
            f"{line}\nOnce\n"
            for line in [*limits, "/temperature 1e300", "/repetition_penalty 1e300"]
        ),
        "--max_new_tokens",
        3,
        "--seed",
        0,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("Once")]
    assert done.exit_code == 0 and len(told) == 7 and len(done.stderr.splitlines()) == 7


def test_a_fault_of_ours_ends_no_chat(trained, monkeypatch):
    "It costs its text a line with what happened and where; the next line is answered, and an empty one begins anew."
    from llm_course import generation

    real, throws = generation.multinomial, iter([True, False])

    def breaks_once(*given):
        if next(throws, False):
            raise IndexError("index 600 is out of bounds")
        return real(*given)

    monkeypatch.setattr(generation, "multinomial", breaks_once)
    done = piped(trained, "Once\n\nTwice\n", "--max_new_tokens", 3, "--seed", 0)
    first, second, third = done.stdout.split("\n")[:3]
    assert (
        done.exit_code == 2
        and first == "Once"
        and not second.startswith("Once")
        and third.startswith("Twice")
    )
    assert re.fullmatch(
        r"IndexError in test_chat.py, line \d+: index 600 is out of bounds. .*goes on.\n",
        done.stderr,
    )


@pytest.mark.parametrize("line", ["/again", "/check", "/save x.txt"])
def test_before_the_first_text(trained, line):
    "There is nothing yet to do it with."
    done = piped(trained, f"{line}\n")
    assert (
        done.exit_code == 2
        and done.stderr == "there is no text yet: type how one begins.\n"
        and not done.stdout
    )


def test_an_answer_comes_before_the_next_line(trained):
    "A program may talk line by line; one that stops listening ends it quietly, without a word on standard error."
    with piped_process(trained, "--max_new_tokens", 20, "--temperature", 0) as chat:
        for _ in range(2):
            chat.stdin.write(b"Once\n"), chat.stdin.flush()
            assert chat.stdout.readline().startswith(b"Once")
        chat.stdout.close()
        chat.stdin.write(b"Once\n"), chat.stdin.close()
        told = chat.stderr.read().decode()
        assert chat.wait(PATIENCE) == 1 and "Traceback" not in told and "Broken" not in told


@pytest.mark.skipif(WINDOWS, reason="Windows has no SIGINT for one process")
def test_an_interrupt_ends_a_piped_talk(trained):
    "There is no prompt to come back to: as every stage, it ends with status 130."
    with piped_process(trained, "--max_new_tokens", 10**6, "--temperature", 0) as chat:
        chat.stdin.write(b"Once\n"), chat.stdin.flush()
        assert chat.stdout.read(9)
        chat.send_signal(signal.SIGINT)
        chat.stdout.read()
        assert chat.wait(PATIENCE) == 130 and "Traceback" not in chat.stderr.read().decode()


def test_help_needs_no_torch(tmp_path):
    "`chat --help` answers at once, so nothing slow may be imported for it."
    code = (
        "import sys\nfrom llm_course.cli import main\ntry: main(['chat', '--help'])\n"
        "except SystemExit: assert not {'torch', 'numpy', 'readline'} & set(sys.modules)"
    )
    assert "--temperature" in fine(process(cwd=tmp_path, module=("-c", code)))
