"""Faults of disks, memory and networks, really injected: what was saved stays sound, and one sentence says what happened."""
import hashlib
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llm_course.corpus import CourseError, atomic_write, download

# Downloads, from a server on this machine that does what it is told

BOOK = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(BOOK).hexdigest()


class Scripted(BaseHTTPRequestHandler):
    "Answers each request as the next of `script` says, and notes the ranges that were asked for."

    def do_GET(self) -> None:
        self.asked.append(self.headers["Range"])
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
        self.script.pop(0)(self, start)
        self.close_connection = True

    def answer(self, body: bytes, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        "Say nothing."


@pytest.fixture
def scripted() -> Iterator[Callable]:
    "A function: give it the answers, and it gives the address of a server, and the list of ranges that it is asked for."
    servers = []

    def start(*script: Callable) -> tuple[str, list]:
        handler = type("Handler", (Scripted,), {"script": list(script), "asked": []})
        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/book.bin", handler.asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def whole(body: bytes = BOOK, **lies: object) -> Callable:
    "All that is asked for, from where it is asked for."
    return lambda server, start: server.answer(body[start:], 206 if start else 200,
                                               **{"Content_Length": len(body) - start, **lies})


def no_ranges(body: bytes = BOOK, **lies: object) -> Callable:
    "All of it, wherever one asked to begin."
    return lambda server, start: server.answer(body, 200, **{"Content_Length": len(body), **lies})


def cut(at: int, body: bytes = BOOK) -> Callable:
    "So many bytes, and then the line goes dead."
    return lambda server, start: server.answer(body[start:][:at], 206 if start else 200, Content_Length=len(body) - start)


def stalls(at: int | None) -> Callable:
    "So many bytes, or not even headers, and then nothing, without hanging up."
    def act(server: Scripted, start: int) -> None:
        if at is not None:
            cut(at)(server, start)
        time.sleep(1)
    return act


def says(raw: bytes) -> Callable:
    "Bytes that need not be HTTP."
    return lambda server, start: server.wfile.write(raw)


def status(code: int, **headers: object) -> Callable:
    "Nothing but a status."
    return lambda server, start: server.answer(b"", code, Content_Length=0, **headers)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

ARRIVES = {  # the answers of the server, and the ranges that it is asked for till all is there
    "stalls in the middle": ([stalls(100_000), whole()], [None, "bytes=100000-"]),
    "stalls before the first byte": ([stalls(None), whole()], [None, None]),
    "hangs up at once": ([says(b""), whole()], [None, None]),
    "is cut twice": ([cut(1), cut(1), whole()], [None, "bytes=1-", "bytes=2-"]),
    "a chunk is cut": ([says(CHUNKED + b"8\r\n" + BOOK[:4]), whole()], [None, "bytes=4-"]),
    "promises too much": ([no_ranges(Content_Length=400_000)], [None]),
    "says no length": ([says(b"HTTP/1.0 200 OK\r\n\r\n" + BOOK)], [None]),
    "says a length that is no number": ([no_ranges(Content_Length="many")], [None]),
    "says a negative length": ([no_ranges(Content_Length=-5)], [None]),
    "cannot go on": ([cut(1000), no_ranges()], [None, "bytes=1000-"]),
    "redirects": ([status(302, Location="/elsewhere"), whole()], [None, None]),
    "redirects in the middle": ([cut(1000), status(307, Location="/elsewhere"), whole()], [None, "bytes=1000-", "bytes=1000-"]),
}


@pytest.mark.parametrize("script, asked", ARRIVES.values(), ids=ARRIVES)
def test_a_download_arrives_in_spite_of_a_server_that(script, asked, scripted, tmp_path):
    "Each fault costs a try and no byte that came; at the end the file is right, and alone."
    url, ranges = scripted(*script)
    path = download(url, tmp_path / "book.bin", SHA, timeout=0.3)
    assert path.read_bytes() == BOOK and ranges == asked and os.listdir(tmp_path) == ["book.bin"]


FAILS = {  # the answers, what the sentence says, and how many bytes are kept for the next time
    "stalls": ([stalls(1000), stalls(0), stalls(0)], r"broke off after 1,000 bytes \(nothing came for 0.3 seconds\)", 1000),
    "never begins": ([stalls(None)] * 3, r"broke off after 0 bytes \(nothing came", None),
    "cuts": ([cut(10)] * 3, r"broke off after 30 bytes \(the server hung up\)", 30),
    "cuts a chunk": ([says(CHUNKED + b"8\r\n" + BOOK[:4])] * 3, r"broke off after 4 bytes \(the connection was cut\)", 4),
    "promises too much": ([no_ranges(OTHER, Content_Length=400_000)] * 3, r"broke off after 300,000 bytes \(the server hung up", 300_000),
    "promises too little": ([no_ranges(Content_Length=1000)], "SHA-256 of its 1,000 bytes is", None),
    "sends wrong bytes": ([whole(OTHER)], "SHA-256 of its 300,000 bytes is", None),
    "changes the file in between": ([cut(1000), whole(OTHER)], "SHA-256 of its 300,000 bytes is", None),
    "goes on at the wrong place": ([cut(1000), lambda server, start: server.answer(BOOK[5:], 206)], "SHA-256 of its", None),
    "is out of order": ([status(503)], "Service Unavailable", None),
    "refuses the rest": ([cut(1000), status(403)], "Forbidden", 1000),
    "speaks no HTTP": ([says(b"220 mail ready\r\n" * 9)], "the server does not speak HTTP", None),
    "redirects for ever": ([status(302, Location="/book.bin")] * 30, "infinite loop", None),
    "redirects to a file": ([status(302, Location="file:///etc/hostname")], "not allowed", None),
}


@pytest.mark.parametrize("script, told, kept", FAILS.values(), ids=FAILS)
def test_a_download_fails_where_a_server(script, told, kept, scripted, tmp_path):
    "One sentence says what happened; nothing stands under the name, what came stays aside, and the next call needs no help."
    url, _ = scripted(*script)
    with pytest.raises(CourseError, match=told) as error:
        download(url, tmp_path / "book.bin", SHA, timeout=0.3)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == ({} if kept is None else {"book.bin.part": kept})
    url, _ = scripted(whole(), no_ranges())
    assert download(url, tmp_path / "book.bin", SHA, timeout=0.3).read_bytes() == BOOK


def test_a_download_whose_file_has_changed_since(scripted, tmp_path):
    "The part of the old file is thrown away, and the new one is fetched whole in the same call."
    with pytest.raises(CourseError):
        download(scripted(cut(1000, OTHER))[0], tmp_path / "book.bin", SHA, tries=1, timeout=0.3)
    url, asked = scripted(whole(), cut(10), whole())
    assert download(url, tmp_path / "book.bin", SHA).read_bytes() == BOOK and asked == ["bytes=1000-", None, "bytes=10-"]


def test_a_range_that_is_refused(scripted, tmp_path):
    "A server that knows no ranges, and says 416 to each, is asked for the whole."
    (tmp_path / "book.bin.part").write_bytes(BOOK[:1000])
    url, asked = scripted(status(416), whole())
    assert download(url, tmp_path / "book.bin", SHA).read_bytes() == BOOK and asked == ["bytes=1000-", None]


@pytest.mark.parametrize("url", ["http://a..b/c", "http://[::1/c", "http://127.0.0.1/a b", "http://127.0.0.1:x/"])
def test_a_download_from_what_is_no_url(url, tmp_path):
    "It is said so."
    with pytest.raises(CourseError, match="not a URL|not a valid"):
        download(url, tmp_path / "book.bin", SHA)


# What a file may replace

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("behind_a_link", [False, True])
def test_a_pipe_is_not_replaced(behind_a_link, scripted, tmp_path):
    "Nor is a device, as which a pipe stands here: root could rename a file into the place of /dev/null."
    os.mkfifo(place := tmp_path / "pipe")
    if behind_a_link:
        (link := tmp_path / "link").symlink_to(place)
    named = link if behind_a_link else place
    with pytest.raises(CourseError, match="cannot be written: it is a device, a pipe or a socket, and no file"), atomic_write(named):
        raise AssertionError("the block must not run")
    with pytest.raises(CourseError, match="a device, a pipe"):
        download(scripted(whole())[0], named, SHA)
    assert stat.S_ISFIFO(place.stat().st_mode) and sorted(os.listdir(tmp_path)) == (["link", "pipe"] if behind_a_link else ["pipe"])
