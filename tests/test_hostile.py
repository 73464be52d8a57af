"""Files from a stranger: whatever stands in them, a reader takes them or refuses them with our own error, and does nothing else.

Each reader meets good files that were changed in a few places, and files that were never good. It reads them in a process of its
own, which tells how that ended: so a crash, a loop without end, a size that fills memory and a path that leads elsewhere are
found too. `make fuzz` tries 10,000 cases a reader; without it there are 300, always the same."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm_course.checkpoint import json_bytes
from llm_course.config import Config, ModelConfig, TrainingConfig, load_config
from llm_course.corpus import Corpus
from llm_course.demo import StageCache
from llm_course.device import pick_device
from llm_course.files import UserError, read_json, with_checksum
from llm_course.integrity import load_verified
from llm_course.pipeline import resume_run, start_run, train
from llm_course.preparation import TokenFiles, huggingface_files
from llm_course.runs import prune, read_log
from llm_course.shards import (
    Manifest,
    TokenDataset,
    read_ends,
    read_index,
    write_ends,
    write_index,
    write_shards,
)
from llm_course.tales import sample_tales
from llm_course.tokenizer import Tokenizer, train_tokenizer

resource = pytest.importorskip("resource")  # it limits a process's memory; Windows has none

ROOT = Path(__file__).resolve().parent.parent
CASES = int(os.environ.get("LLM_COURSE_CASES", 300))  # of each reader
SECONDS, ROOM = (
    20,
    2**30,
)  # what one case may take: time, and bytes of memory beyond what the process has
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES <= 300,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


def quiet(*words: object) -> None:
    "Say nothing."


# The readers: each opens what lies in a folder, and uses it as the program does

KEPT: dict[str, object] = {}  # what the reading process makes once


def reads_config(folder: Path) -> None:
    load_config(
        folder / "config.json",
        {"lr": "1e-3", "d_model": 8, "max_steps": "5"} if (folder / "flags").exists() else {},
    )


def reads_checkpoint(folder: Path) -> None:
    found = load_verified(folder)
    assert type(found.step) is int and found.step >= 0, f"a step is {found.step!r}"
    assert found.config.model.n_params == sum(p.numel() for p in found.model.parameters())
    found.tokenizer.decode(found.tokenizer.encode("Once upon a time"))


def resumes(folder: Path) -> None:
    if "run" not in KEPT:
        KEPT["run"] = start_run(
            load_config(folder / "run.json"), folder / "shards", pick_device("cpu"), log=quiet
        )
    start = KEPT["run"]
    trainer, run = start.trainer, start.trainer.state
    resume_run(trainer, start.tokenizer, folder / "step-000002", quiet)
    assert all(
        type(count) is int
        for count in (run.step, run.max_steps, run.skipped, run.consecutive_skips)
    )
    assert 0 <= run.step <= run.max_steps
    assert (
        type(run.sequences) is int
        and type(run.tokens) is float
        and 0 <= run.sequences
        and 0 <= run.tokens
    )
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"][0].grad = group["params"][0].detach() * 0
        optimizer.step()


def reads_shards(folder: Path) -> None:
    for split in Manifest.load(folder).splits:
        shards = TokenDataset(folder, split)
        assert shards.tokens >= 0 and shards.documents >= 0, "there are fewer than none"
        for i in {0, len(shards) // 2, len(shards) - 1} & set(range(min(len(shards), 10**6))):
            assert shards[i].shape == (shards.seq_len + 1,)
            shards.documents_in(i)
        for j in {0, shards.documents - 1} & set(range(min(shards.documents, 10**6))):
            shards.document(j)
        shards.verify()


def reads_index(folder: Path) -> None:
    lengths, starts = read_index(folder / "x.idx")
    assert len(lengths) == len(starts)
    assert (read_ends(folder / "x.index") >= 0).all()


def reads_tokens(folder: Path) -> None:
    if "tokenizer" not in KEPT:
        KEPT["tokenizer"] = Tokenizer.load(folder)
    for document in TokenFiles(folder / "x.ds", KEPT["tokenizer"]).tokenized():
        assert document.ids[-1] == KEPT["tokenizer"].eos_id


def reads_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for text in ("", "Once upon a time", " \n▁\0", "東京 🦊 e\u0301"):
        ids = tokenizer.encode_document(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        "".join(tokenizer.stream(ids))
    tokenizer.decode(range(tokenizer.vocab_size))
    huggingface_files(tokenizer)


def reads_corpus(folder: Path) -> None:
    refusal = None
    for name, form in [
        ("x.txt", form) for form in ("auto", "line", "blank", "file", "<|endoftext|>")
    ] + [("x.jsonl", "auto")]:
        for errors in ("strict", "replace"):
            try:
                for document in Corpus(folder / name, form, errors):
                    assert document and "\0" not in document or form == "auto" and name == "x.jsonl"
            except UserError as error:
                refusal = str(error)  # the error itself would keep the text alive
    if refusal:
        raise UserError(refusal)


def reads_log(folder: Path) -> None:
    read_log(folder)
    for step in (1, 2, 3):
        (folder / f"step-{step}").mkdir(exist_ok=True)
    prune(folder, 1)


def reads_stages(folder: Path) -> None:
    StageCache(folder / "stages.json", False, quiet).unchanged("corpus", [folder], {"n": 1})


def reads_object(folder: Path) -> None:
    read_json(folder / "x.json")


def reads_latest(folder: Path) -> None:
    load_verified(folder / "latest")


def trains(folder: Path) -> None:
    train(
        load_config(folder / "run.json"),
        folder / "shards",
        folder / "out",
        device="cpu",
        progress=False,
        log=quiet,
    )


READERS = {
    reader.__name__: reader
    for reader in (
        reads_config,
        reads_checkpoint,
        reads_latest,
        resumes,
        trains,
        reads_shards,
        reads_index,
        reads_tokens,
        reads_tokenizer,
        reads_corpus,
        reads_log,
        reads_stages,
        reads_object,
    )
}

# The process that reads

WRITES = {
    "open",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
CALLS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
PROGRAM = tuple(
    os.path.realpath(place)
    for place in (sys.prefix, sys.base_prefix, ROOT / "llm_course", "/proc", "/sys", "/usr", "/dev")
)
IDLE = (
    "torchinductor"  # in the name of a folder that torch makes when it first imports its compiler
)


def serve(pipe: object) -> None:
    "Read what is asked for and tell how it went, until this process is killed."
    inside, strayed = "", []

    def watch(event: str, args: tuple) -> None:
        if not inside or event not in WRITES | CALLS:
            return
        if event in CALLS:
            strayed.append(f"{event} {args}"[:200])
        for path in (
            args[:2] if event in ("os.rename", "os.link") else args[:1] if event in WRITES else ()
        ):
            place = (
                os.path.realpath(os.fsdecode(path))
                if isinstance(path, str | bytes | os.PathLike)
                else inside
            )
            reading = event == "open" and not (args[2] or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if (
                not f"{place}/".startswith(f"{inside}/")
                and IDLE not in place
                and not (reading and place.startswith(PROGRAM))
            ):
                strayed.append(f"{event} {place}")

    warnings.simplefilter("ignore")
    sys.addaudithook(watch)
    if os.path.exists("/proc/self/statm"):  # elsewhere the size is not known
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    pipe.send("ready")
    while True:
        name, folder = pipe.recv()
        strayed.clear()
        try:
            inside = os.path.realpath(folder)
            READERS[name](Path(folder))
            answer = "taken"
        except UserError as error:
            answer = "refused" if str(error).strip() else "refused without a word"
        except BaseException as error:
            ours = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if "llm_course" in frame.filename
            ]
            where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in ours[::-1][:3])
            answer = f"{type(error).__name__} in {where}: {error!s:.200}"
        inside = ""
        pipe.send(ascii(f"strayed: {strayed[:3]}") if strayed else ascii(answer)[1:-1])


class Reading:
    "The process that reads, and the one that takes its place when it has died."

    def __init__(self) -> None:
        self.process = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(120) and self.pipe.recv() == "ready"

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
        self.process = None

    @property
    def peak(self) -> int:
        "The most memory that the process has ever had, in bytes, without what it shares; 0 where the system does not tell."
        status = Path(f"/proc/{self.process.pid}/status")
        return (
            1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
            if status.exists()
            else 0
        )

    def outcome(self, reader: Callable, folder: Path, seconds: int = SECONDS) -> str:
        "How it ends when `reader` opens what lies in `folder`."
        if not self.process:
            self.start()
        self.pipe.send((reader.__name__, str(folder)))
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            self.stop()
            return f"no end after {seconds} seconds"
        except EOFError:
            self.process.join()
            code, self.process = self.process.exitcode, None
            return f"the process died, exit code {code}"


def judge(outcome: str) -> None:
    "A file may be taken or refused; all else is a fault."
    assert outcome in ("taken", "refused"), outcome


@pytest.fixture(scope="module")
def reading() -> Iterator[Reading]:
    reading = Reading()
    yield reading
    reading.stop()


# Good files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A finished run of a very small model: shards, two checkpoints, a log; and the same model as a folder of another program."
    root, tales = tmp_path_factory.mktemp("good"), sample_tales(0, 60)
    tokenizer = train_tokenizer(tales, 400, log=quiet)
    write_shards(
        tales[:50],
        tokenizer,
        root / "shards",
        val_documents=tales[50:],
        seq_len=16,
        shard_tokens=2500,
    )
    shape = ModelConfig(
        n_layers=1,
        d_model=8,
        n_heads=2,
        n_kv_heads=1,
        d_ff=12,
        vocab_size=tokenizer.vocab_size,
        seq_len=16,
    )
    config = Config(
        shape,
        TrainingConfig(
            batch_size=2, max_steps=4, warmup_steps=1, precision="fp32", log_every=1, save_every=2
        ),
    )
    (root / "run.json").write_text(json.dumps(asdict(config)))
    train(config, root / "shards", root / "run", device="cpu", progress=False, log=quiet)
    shutil.copytree(root / "run/step-000004", root / "other")
    for ours in ("manifest.json", "trainer.pt"):
        (root / "other" / ours).unlink()
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder to put hostile files in, below one that nobody may touch."
    return tmp_path_factory.mktemp("hostile")


def seal(folder: Path, *names: str, **fields: object) -> None:
    "Let a checkpoint's manifest say what its files are now, as a stranger would who wants them to be believed."
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in names:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(json_bytes(with_checksum({**manifest, **fields})))


def seal_shards(manifest: object) -> bytes:
    "The manifest of shards with a seal of its own."
    return (
        json.dumps(
            with_checksum(manifest) if isinstance(manifest, dict) else manifest, indent=1
        ).encode()
        + b"\n"
    )


# Changes: of bytes, of JSON, of safetensors, of pickles, of protocol buffers

# fmt: off
NUMBERS = [
    0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**6, 10**9, 10**12, 10**18, 10**30, 10**400, 10**4298,
    -10**400, 0.5, 1e-320, 1e308, -0.0, math.nan, math.inf, -math.inf, True, False, None,
]

TEXTS = [
    "", "x", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "\u0660", "1", "1e999", "F64", "C64", "BOOL", "train-1",
    "9" * 300, "x" * 5000,
]
# fmt: on
ODD = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.integers(-5, 500),
    st.floats(),
    st.recursive(
        st.sampled_from([0, 1, "a", None]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "step", "text"]), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
# fmt: off
AWKWARD = [
    b"\0", b"\xff", b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0" * 999,
    b"9" * 5000, b"[" * 9000, b'{"a":' * 9000, b"NaN", b"-Infinity", b"1e999", b"\\ud800", b'"x":1,', b"<|endoftext|>",
    b"\x80\x04", b"\xff" * 8, b"\x7f" + b"\xff" * 7,
]
# fmt: on
PIECES = st.one_of(st.binary(max_size=8), st.sampled_from(AWKWARD))


@st.composite
def bent(draw: Callable, data: bytes) -> bytes:
    "Bytes with up to four places flipped, written over, inserted, left out, doubled or cut off."
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, len(data)), st.integers(0, min(64, len(data)))))
        end = min(len(data), at + draw(st.sampled_from([1, 1, 2, 4, 8, 30, 500])))
        kind = draw(st.sampled_from(["flip", "over", "insert", "leave", "double", "cut"]))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind in ("over", "insert"):
            piece = draw(PIECES)
            data = data[:at] + piece + data[at + (len(piece) if kind == "over" else 0) :]
        else:
            data = {
                "leave": data[:at] + data[end:],
                "double": data[:end] + data[at:],
                "cut": data[:at],
            }.get(kind, data)
    return data


def places(value: object) -> list[tuple[dict | list, object]]:
    "Each container inside a value, with each of its keys."
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    return [found for key in keys for found in [(value, key), *places(value[key])]]


@st.composite
def twisted(draw: Callable, value: object) -> object:
    "A nest of dictionaries and lists with up to three values replaced, left out, renamed or put in another's place."
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        inside = places(value)
        if not inside:
            return draw(ODD)
        where, key = draw(st.sampled_from(inside))
        kind = draw(
            st.sampled_from(
                ["replace", "replace", "replace", "replace", "leave", "rename", "swap", "double"]
            )
        )
        if kind == "replace":
            where[key] = draw(ODD)
        elif kind == "leave":
            del where[key]
        elif kind == "rename" and isinstance(where, dict):
            where[draw(st.sampled_from([*TEXTS, *where]))] = where.pop(key)
        elif kind == "swap":
            there, other = draw(st.sampled_from(inside))
            where[key] = copy.deepcopy(there[other])
        elif kind == "double" and isinstance(where, list):
            where.append(copy.deepcopy(where[key]))
    return value


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def hostile_json(data: bytes) -> st.SearchStrategy[bytes]:
    "A JSON file, bent or twisted, or none at all."
    return st.one_of(
        twisted(json.loads(data)).map(as_json),
        twisted(json.loads(data)).map(as_json),
        bent(data),
        st.binary(max_size=50),
        ODD.map(as_json),
    )


def tensors(header: bytes, body: bytes, length: int | None = None) -> bytes:
    "A safetensors file; `length` is what it says of its header."
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@st.composite
def hostile_tensors(draw: Callable, data: bytes) -> bytes:
    "A safetensors file with another header, a header that lies about its length, another body, or bent bytes."
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = draw(st.sampled_from(["header", "header", "types", "length", "bent", "random", "body"]))
    if kind == "header":
        return tensors(draw(hostile_json(header)), body)
    if kind == "types":
        types = st.sampled_from(
            [
                "F64",
                "F32",
                "F16",
                "BF16",
                "I64",
                "U8",
                "BOOL",
                "F8_E4M3",
                "F8_E8M0",
                "F4",
                "C64",
                "U64",
                "F6_E2M3",
            ]
        )
        told = json.loads(header)
        one = draw(st.sampled_from([name for name in told if name != "__metadata__"]))
        told[one]["dtype"] = draw(types)
        wide = {"F64": 2, "I64": 2, "C64": 2, "U64": 2, "F16": 0.5, "BF16": 0.5, "F32": 1}.get(
            told[one]["dtype"], 0.25
        )
        begin, end = told[one]["data_offsets"]
        grown = int((end - begin) * wide)
        for name, entry in told.items():
            if name != "__metadata__":
                entry["data_offsets"] = [
                    o + (grown - end + begin if o >= end and (name, k) != (one, 0) else 0)
                    for k, o in enumerate(entry["data_offsets"])
                ]
        return tensors(
            as_json(told), body[:begin] + body[begin:end].ljust(grown, b"\1")[:grown] + body[end:]
        )
    if kind == "length":
        return tensors(
            header,
            body,
            draw(
                st.sampled_from(
                    [
                        0,
                        1,
                        size - 1,
                        size + 1,
                        2**31,
                        2**40,
                        2**63 - 1,
                        2**63,
                        2**64 - 9,
                        2**64 - 1,
                        99_999_999,
                        100_000_001,
                    ]
                )
            ),
        )
    return {
        "bent": draw(bent(data)),
        "random": draw(st.binary(max_size=60)),
        "body": tensors(header, draw(bent(body))),
    }[kind]


def rezipped(
    data: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    "A zip file whose members have been changed, with checksums that are right."
    with (
        zipfile.ZipFile(BytesIO(data)) as old,
        zipfile.ZipFile(buffer := BytesIO(), "w", method) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


@st.composite
def hostile_pickle(draw: Callable, data: bytes, state: dict) -> bytes:
    "A trainer.pt with other values, a bent pickle inside it, or bent itself."
    import torch

    kind = draw(
        st.sampled_from(
            ["values", "values", "values", "inside", "inside", "bent", "random", "plain"]
        )
    )
    if kind == "values":
        torch.save(draw(twisted(state)), buffer := BytesIO())
        return buffer.getvalue()
    if kind == "inside":
        member = draw(
            st.sampled_from(["data.pkl", "data.pkl", "data.pkl", "version", "byteorder", "data/0"])
        )
        return rezipped(data, lambda name, old: draw(bent(old)) if name.endswith(member) else old)
    if kind == "plain":
        return draw(bent(pickle.dumps(draw(ODD), protocol=draw(st.integers(0, 5)))))
    return draw(bent(data)) if kind == "bent" else draw(st.binary(max_size=60))


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def message(data: bytes) -> list[list] | None:
    "The fields of a protocol buffer message as [number, wire type, value], or None when it is none."
    fields, at = [], 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                return value

    try:
        while at < len(data):
            tag = number()
            size = {0: 0, 1: 8, 2: 0, 5: 4}[tag & 7]
            value = number() if tag & 7 in (0, 2) else 0
            if size := value if tag & 7 == 2 else size:
                value, at = data[at : at + size], at + size
            elif tag & 7 == 2:
                value = b""
            if at > len(data):
                return None
            fields.append([tag >> 3, tag & 7, value])
    except (IndexError, KeyError):
        return None
    return fields


def packed(fields: list[list]) -> bytes:
    "The message with these fields."
    body = {0: lambda v: varint(v), 1: bytes, 2: lambda v: varint(len(v)) + v, 5: bytes}
    return b"".join(
        varint(number << 3 | kind) + body[kind](value) for number, kind, value in fields
    )


@st.composite
def hostile_message(draw: Callable, data: bytes, depth: int = 0) -> bytes:
    "A protocol buffer message with up to three fields replaced, left out, doubled, moved or added, also inside its fields."
    fields = message(data)
    if not fields:
        return draw(bent(data))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(
            st.one_of(
                st.integers(0, len(fields) - 1),
                st.integers(0, min(6, len(fields) - 1)),
                st.integers(max(0, len(fields) - 3), len(fields) - 1),
            )
        )
        field = fields[at]
        kind = draw(
            st.sampled_from(
                ["inside", "inside", "inside", "value", "value", "leave", "double", "move", "add"]
            )
        )
        if kind in ("inside", "value") and field[1] == 0:
            field[2] = draw(
                st.sampled_from(
                    [0, 1, 2, 3, 4, 5, 6, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
                )
            )
        elif kind == "inside" and field[1] == 2 and depth < 3 and field[2]:
            field[2] = draw(hostile_message(field[2], depth + 1))
        elif kind in ("inside", "value"):
            field[2] = (
                draw(
                    st.sampled_from(
                        [
                            b"",
                            b"<0x41>",
                            b"<0xZZ>",
                            b"<0x>",
                            b"</s>",
                            b"<unk>",
                            "▁".encode(),
                            b"\xff\xfe",
                            b"a" * 3000,
                        ]
                    )
                    | st.binary(max_size=40)
                )
                if field[1] == 2
                else draw(st.binary(min_size=len(field[2]), max_size=len(field[2])))
            )
        elif kind == "leave" and len(fields) > 1:
            del fields[at]
        elif kind == "double":
            fields.insert(at, list(field))
        elif kind == "move":
            fields.insert(draw(st.integers(0, len(fields) - 1)), fields.pop(at))
        elif kind == "add":
            wire = draw(st.sampled_from([0, 2]))
            fields.insert(
                at,
                [
                    draw(st.integers(1, 60)),
                    wire,
                    draw(st.integers(0, 2**64 - 1) if wire == 0 else st.binary(max_size=20)),
                ],
            )
    return packed(fields)


# The readers, each with its thousands of cases


def put(folder: Path, files: dict[str, bytes]) -> Path:
    "Let `folder` hold these files beside what it has."
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def copied(source: Path, place: Path) -> Path:
    "A copy of a folder, made once a test."
    folder = place / f"copy-{len(list(place.iterdir()))}"
    shutil.copytree(source, folder, symlinks=True)
    return folder


@pytest.mark.parametrize("flags", [False, True], ids=["", "flags"])
def test_config(reading: Reading, good: Path, place: Path, flags: bool) -> None:
    "The file of a run's settings, alone and with flags on top of it."

    @fuzzed
    @given(hostile_json((good / "run.json").read_bytes()))
    def check(data: bytes) -> None:
        judge(
            reading.outcome(
                reads_config,
                put(
                    place / f"config-{flags}",
                    {"config.json": data, **({"flags": b""} if flags else {})},
                ),
            )
        )

    check()


def test_json(reading: Reading, good: Path, place: Path) -> None:
    "`read_json`, by which each of our JSON files is read."

    @fuzzed
    @given(
        st.one_of(
            hostile_json((good / "run/step-000004/config.json").read_bytes()),
            st.recursive(
                ODD, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
            ).map(as_json),
        )
    )
    def check(data: bytes) -> None:
        judge(reading.outcome(reads_object, put(place / "json", {"x.json": data})))

    check()


def test_checkpoint_manifest(reading: Reading, good: Path, place: Path) -> None:
    "The manifest of a checkpoint: bent, and twisted by somebody who can seal it again."
    folder, data = (
        copied(good / "run/step-000004", place),
        (good / "run/step-000004/manifest.json").read_bytes(),
    )

    def resealed(manifest: object) -> bytes:
        return json_bytes(with_checksum(manifest) if isinstance(manifest, dict) else manifest)

    @fuzzed
    @given(st.one_of(*[twisted(json.loads(data)).map(resealed)] * 3, hostile_json(data)))
    def check(manifest: bytes) -> None:
        judge(reading.outcome(reads_checkpoint, put(folder, {"manifest.json": manifest})))

    check()


def test_checkpoint_shape(reading: Reading, good: Path, place: Path) -> None:
    "A sealed manifest whose model has another shape than the weights: nothing so large is made."
    folder = copied(good / "run/step-000004", place)
    config = json.loads((folder / "manifest.json").read_bytes())["config"]

    @fuzzed
    @given(twisted({"model": config["model"]}))
    def check(part: dict) -> None:
        if isinstance(part, dict):
            seal(folder, config={**config, **part})
            judge(reading.outcome(reads_checkpoint, folder))

    check()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_checkpoint_files(reading: Reading, good: Path, place: Path, name: str) -> None:
    "Files of a checkpoint that its manifest says are right."
    folder, data = (
        copied(good / "run/step-000004", place),
        (good / "run/step-000004" / name).read_bytes(),
    )

    @fuzzed
    @given(
        hostile_tensors(data)
        if name == "model.safetensors"
        else st.one_of(hostile_message(data), bent(data))
    )
    def check(changed: bytes) -> None:
        put(folder, {name: changed})
        seal(folder, name)
        judge(reading.outcome(reads_checkpoint, folder))

    check()


def test_trainer_state(reading: Reading, good: Path, place: Path) -> None:
    "What a run resumes from, sealed."
    import torch

    folder = place / "resumed"
    folder.mkdir()
    for name in ("shards", "run/step-000002"):
        shutil.copytree(good / name, folder / Path(name).name)
    shutil.copytree(good / "run/step-000004", folder / "step-000002", dirs_exist_ok=True)
    shutil.copy(good / "run.json", folder)
    data = (good / "run/step-000004/trainer.pt").read_bytes()
    state = torch.load(BytesIO(data), weights_only=True)

    @fuzzed
    @given(hostile_pickle(data, state))
    def check(changed: bytes) -> None:
        put(folder / "step-000002", {"trainer.pt": changed})
        seal(folder / "step-000002", "trainer.pt")
        judge(reading.outcome(resumes, folder))

    check()


def test_model_from_elsewhere(reading: Reading, good: Path, place: Path) -> None:
    "A Qwen3 folder: its config.json, of any size, its weights, or an index of several files."
    folder, files = (
        copied(good / "other", place),
        {
            name: (good / "other" / name).read_bytes()
            for name in ("config.json", "model.safetensors")
        },
    )
    index = as_json(
        {
            "metadata": {},
            "weight_map": {
                name: "model.safetensors" for name in ("lm_head.weight", "model.norm.weight")
            },
        }
    )
    shutil.copy(folder / "model.safetensors", place / "x")
    case = st.one_of(
        st.tuples(st.just("config.json"), hostile_json(files["config.json"])),
        st.tuples(st.just("model.safetensors"), hostile_tensors(files["model.safetensors"])),
        st.tuples(st.just("model.safetensors.index.json"), hostile_json(index)),
    )

    @fuzzed
    @given(case)
    def check(change: tuple[str, bytes]) -> None:
        put(folder, {**files, change[0]: change[1]})
        try:
            judge(reading.outcome(reads_checkpoint, folder))
        finally:
            (folder / "model.safetensors.index.json").unlink(missing_ok=True)

    check()


def test_tokenizer(reading: Reading, good: Path, place: Path) -> None:
    "SentencePiece models: a crash of the library counts."
    data = (good / "shards/tokenizer.model").read_bytes()

    @fuzzed
    @given(st.one_of(*[hostile_message(data)] * 3, bent(data), st.binary(max_size=200)))
    def check(model: bytes) -> None:
        judge(
            reading.outcome(reads_tokenizer, put(place / "tokenizer", {"tokenizer.model": model}))
        )

    check()


def test_shards(reading: Reading, good: Path, place: Path) -> None:
    "A folder of shards: its manifest, its tokens and both indexes."
    folder, source = copied(good / "shards", place), good / "shards"
    names = ["train-00000.bin", "train-00000.idx", "train-00000.bin.index", "val-00000.idx"]
    manifest = (source / "manifest.json").read_bytes()
    told = json.loads(manifest)

    def with_sums(name: str, data: bytes) -> dict[str, bytes]:
        "A changed file that the manifest says is right."
        changed, what = (
            copy.deepcopy(told),
            {"bin": "sha256", "idx": "idx_sha256", "index": "index_sha256"}[
                name.rpartition(".")[2]
            ],
        )
        shard = changed["splits"][name[: name.index("-")]][0]
        shard |= {
            what: sha256(data).hexdigest(),
            **({"tokens": len(data) // 2} if what == "sha256" else {}),
        }
        return {name: data, "manifest.json": seal_shards(changed)}

    case = st.one_of(
        *[twisted(told).map(lambda told: {"manifest.json": seal_shards(told)})] * 4,
        hostile_json(manifest).map(lambda data: {"manifest.json": data}),
        *[
            bent((source / name).read_bytes()).map(lambda data, name=name: with_sums(name, data))
            for name in names
        ],
        *[
            numbers((source / names[1]).read_bytes(), code, start).map(
                lambda data: with_sums(names[1], data)
            )
            for code, start in (("<q", 18), ("<i", 34))
        ],
        numbers((source / names[2]).read_bytes(), "<q").map(lambda data: with_sums(names[2], data)),
    )

    @fuzzed
    @given(case)
    def check(files: dict[str, bytes]) -> None:
        put(
            folder,
            {name: (source / name).read_bytes() for name in [*names, "manifest.json"]} | files,
        )
        judge(reading.outcome(reads_shards, folder))

    check()


@st.composite
def numbers(draw: Callable, data: bytes, code: str, start: int = 0) -> bytes:
    "A file of whole numbers, some of them replaced."
    size = struct.calcsize(code)
    for _ in range(draw(st.integers(1, 3))):
        at = start + size * draw(st.integers(0, max(0, (len(data) - start) // size - 1)))
        bits = 8 * size - 1
        number = draw(
            st.sampled_from([0, 1, 2, -1, -(2**bits), 2**bits - 1, 2 ** (bits - 1), 255])
            | st.integers(-(2**bits), 2**bits - 1)
        )
        data = data[:at] + struct.pack(code, number) + data[at + size :]
    return data


def test_indexes(reading: Reading, place: Path) -> None:
    "Megatron's index and datatrove's, by themselves."
    write_index(place / "x.idx", [3, 1, 4, 1, 5], 2)
    write_ends(place / "x.index", [3, 1, 4, 1, 5])
    idx, ends = ((place / name).read_bytes() for name in ("x.idx", "x.index"))

    @fuzzed
    @given(
        st.one_of(bent(idx), numbers(idx, "<q", 18), numbers(idx, "<i", 34)),
        st.one_of(st.just(ends), bent(ends), numbers(ends, "<q")),
    )
    def check(one: bytes, other: bytes) -> None:
        judge(reading.outcome(reads_index, put(place / "index", {"x.idx": one, "x.index": other})))

    check()


def test_ends_that_wrap(reading: Reading, place: Path) -> None:
    "Ends that grow by more than 64 bits can say, and come back to the right one."
    write_index(put(place / "wrap", {}) / "x.idx", [1], 2)
    refused(
        reading.outcome(
            reads_index,
            put(place / "wrap", {"x.index": struct.pack("<5q", 5, 2**63 - 1, -(2**63), -1, 9)}),
        )
    )


def test_token_files(reading: Reading, good: Path, place: Path) -> None:
    "Tokens that another program has written, and where their documents end."
    tokenizer = Tokenizer.load(good / "shards")
    ids = [
        tokenizer.encode_document(text) for text in ("Once upon a time", "", "東京 🦊", "a </s> b")
    ]
    write_ends(place / "ends", [len(document) for document in ids])
    data, ends = (
        struct.pack(f"<{sum(map(len, ids))}H", *sum(ids, [])),
        (place / "ends").read_bytes(),
    )
    shutil.copy(good / "shards/tokenizer.model", put(place / "tokens", {}))

    @fuzzed
    @given(
        st.one_of(st.just(data), bent(data), numbers(data, "<h")),
        st.one_of(st.just(ends), bent(ends), numbers(ends, "<q")),
    )
    def check(tokens: bytes, index: bytes) -> None:
        judge(
            reading.outcome(
                reads_tokens, put(place / "tokens", {"x.ds": tokens, "x.ds.index": index})
            )
        )

    check()


def test_corpus(reading: Reading, good: Path, place: Path) -> None:
    "Text and .jsonl in every form."
    text = "One.\n\nTwo <|endoftext|> three 東京.\r\n\r\n\n<|endoftext|>🦊 four\n".encode()
    lines = b'{"text": "one"}\n\n{"text": "two \\u6771 \\ud83e\\udd8a", "meta": {"a": [1, 2]}}\r\n{"id": 1, "text": "three"}\n'
    line = twisted({"text": "one", "meta": [1, {"text": "two"}]}).map(as_json)

    @fuzzed
    @given(
        st.one_of(bent(text), st.binary(max_size=100), st.text().map(lambda t: t.encode("utf-16"))),
        st.one_of(bent(lines), line, st.binary(max_size=60)),
    )
    def check(plain: bytes, jsonl: bytes) -> None:
        judge(
            reading.outcome(reads_corpus, put(place / "corpus", {"x.txt": plain, "x.jsonl": jsonl}))
        )

    check()


def test_log(reading: Reading, good: Path, place: Path) -> None:
    "A run's log, which decides which checkpoint is the best."
    data = (good / "run/log.jsonl").read_bytes()
    entries = [json.loads(line) for line in data.splitlines()]
    lines = lambda entries: (
        b"".join(as_json(entry) + b"\n" for entry in entries)
        if isinstance(entries, list)
        else as_json(entries)
    )

    @fuzzed
    @given(
        st.one_of(
            twisted(entries).map(lines),
            twisted([{"step": 1, "val_loss": 2.5}, {"step": 2, "val_loss": 3}]).map(lines),
            bent(data),
            st.binary(max_size=60),
        )
    )
    def check(log: bytes) -> None:
        judge(reading.outcome(reads_log, put(place / "log", {"log.jsonl": log})))

    check()


def test_stages(reading: Reading, place: Path) -> None:
    "What the demo remembers of its stages."

    @fuzzed
    @given(hostile_json(b'{"corpus": {"n": 1}, "tokenizer": {"vocab_size": 400, "corpus": "ab"}}'))
    def check(data: bytes) -> None:
        judge(reading.outcome(reads_stages, put(place / "stages", {"stages.json": data})))

    check()


# What somebody would try first


def refused(outcome: str) -> None:
    assert outcome == "refused", outcome


@pytest.mark.parametrize(
    "number", [10**5, 10**7, 10**9, 10**12, 10**30, 10**400], ids=lambda n: f"1e{len(str(n)) - 1}"
)
@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "head_dim",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
    ],
)
def test_absurd_sizes(reading: Reading, good: Path, place: Path, field: str, number: int) -> None:
    "A model of any size on paper, with weights of another, is refused before memory is filled. (What no weight shows may do.)"
    folder = copied(good / "other", place)
    config = json.loads((folder / "config.json").read_bytes())
    more = (
        {"num_attention_heads": number, "num_key_value_heads": number} if "heads" in field else {}
    )
    put(
        folder,
        {
            "config.json": as_json(
                {
                    **config,
                    field: number,
                    **more,
                    **({"rope_parameters": {}} if field == "rope_theta" else {}),
                }
            )
        },
    )
    (judge if field in ("rope_theta", "rms_norm_eps", "max_position_embeddings") else refused)(
        reading.outcome(reads_checkpoint, folder)
    )


def test_absurd_sizes_together(reading: Reading, good: Path, place: Path) -> None:
    "Weights whose header agrees with a config too large for memory, in a file that takes no place on the disk."
    folder = copied(good / "other", place)
    config = json.loads((folder / "config.json").read_bytes()) | {
        "hidden_size": 2**19,
        "intermediate_size": 2**19,
    }
    (size,) = struct.unpack("<Q", (data := (folder / "model.safetensors").read_bytes())[:8])
    header, at = {"__metadata__": {"format": "pt"}}, 0
    old = {8: config["hidden_size"], 12: config["intermediate_size"]}
    for name, told in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            shape = [old.get(n, n) for n in told["shape"]]
            header[name] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [at, at := at + 4 * math.prod(shape)],
            }
    put(
        folder, {"config.json": as_json(config), "model.safetensors": tensors(as_json(header), b"")}
    )
    try:
        os.truncate(
            folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + at
        )
    except OSError:
        pytest.skip("this disk has no files with holes of that size")
    refused(reading.outcome(reads_checkpoint, folder))


@pytest.mark.parametrize(
    "name",
    [
        "../weights.safetensors",
        "{}/weights.safetensors",
        "below/../../weights.safetensors",
        "..",
        ".",
        "",
        "/dev/zero",
        "\0",
        "9" * 5000,
        5,
        None,
        ["a"],
    ],
    ids=lambda name: str(name)[:20],
)
def test_an_index_that_leads_elsewhere(
    reading: Reading, good: Path, place: Path, name: object
) -> None:
    "The files of weights lie in the model's folder, and nowhere else, even where that would work."
    root = place / f"index-{len(list(place.iterdir()))}"
    folder = shutil.copytree(good / "other", root / "model")
    (folder / "below").mkdir()
    (folder / "model.safetensors").rename(root / "weights.safetensors")
    name = name.format(root) if isinstance(name, str) else name
    put(
        folder,
        {"model.safetensors.index.json": as_json({"weight_map": {"model.norm.weight": name}})},
    )
    refused(reading.outcome(reads_checkpoint, folder))


def test_links(reading: Reading, good: Path, place: Path) -> None:
    "`latest` in a stranger's folder that names a place elsewhere, itself, or nothing."
    for target in ("latest", "/", "/etc", "../..", "nothing", "/dev/zero", "x" * 255):
        folder = put(place / f"links-{len(list(place.iterdir()))}", {})
        (folder / "latest").symlink_to(target)
        refused(reading.outcome(reads_latest, folder))
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        folder = copied(good / "other", place)
        (folder / name).unlink()
        (folder / name).symlink_to(name)
        refused(reading.outcome(reads_checkpoint, folder))


class Evil:
    "An object whose pickle runs a program."

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"echo ran > '{self.path}'",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_no_pickle_runs_code(
    reading: Reading, good: Path, place: Path, zipped: bool, nested: bool
) -> None:
    "Neither a trainer.pt nor a pytorch_model.bin, nor weights that are a pickle under a safe name."
    import torch

    token = place / f"ran-{zipped}-{nested}"
    torch.save(
        {"step": 1, "optimizers": [{"state": Evil(token)}]} if nested else Evil(token),
        buffer := BytesIO(),
        _use_new_zipfile_serialization=zipped,
    )
    evil = buffer.getvalue()
    root = put(place / f"evil-{zipped}-{nested}", {})
    shutil.copytree(good / "shards", root / "shards")
    folder = shutil.copytree(good / "run/step-000004", root / "step-000002")
    shutil.copy(good / "run.json", root)
    put(folder, {"trainer.pt": evil})
    seal(folder, "trainer.pt")
    refused(reading.outcome(resumes, root))
    for name in ("pytorch_model.bin", "model.safetensors"):
        other = copied(good / "other", place)
        (other / "model.safetensors").unlink()
        put(other, {name: evil, "training_args.bin": evil})
        refused(reading.outcome(reads_checkpoint, other))
    assert not token.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert token.exists(), "the pickle is harmless, so this test shows nothing"


def test_a_pickle_with_a_name_as_long_as_a_book(reading: Reading, good: Path, place: Path) -> None:
    "torch.load quotes a class that it refuses, and looks through the quotation in a time that grows with its square: hours."
    import torch

    torch.save({"step": Evil(place)}, buffer := BytesIO())
    root = put(place / "long name", {})
    shutil.copytree(good / "shards", root / "shards")
    folder = shutil.copytree(good / "run/step-000004", root / "step-000002")
    shutil.copy(good / "run.json", root)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(folder / "trainer.pt", "w") as new:
        for name in old.namelist():
            new.writestr(
                name, old.read(name).replace(b"posix\nsystem", b"posix\n" + b"GLOBAL:" * 30_000)
            )
    seal(folder, "trainer.pt")
    refused(reading.outcome(resumes, root))


def test_a_step_below_zero(reading: Reading, good: Path, place: Path) -> None:
    "A sealed manifest that says so is refused."
    folder = copied(good / "run/step-000004", place)
    seal(folder, step=-1)
    refused(reading.outcome(reads_checkpoint, folder))


def test_a_pickle_that_swells(reading: Reading, good: Path, place: Path) -> None:
    "A small trainer.pt whose compressed members are gigabytes."
    root = put(place / "swells", {})
    shutil.copytree(good / "shards", root / "shards")
    folder = shutil.copytree(good / "run/step-000004", root / "step-000002")
    shutil.copy(good / "run.json", root)
    data = (folder / "trainer.pt").read_bytes()
    with (
        zipfile.ZipFile(BytesIO(data)) as old,
        zipfile.ZipFile(folder / "trainer.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as member:
                if name.endswith("data/0"):
                    for _ in range(768):
                        member.write(bytes(2**20))
                else:
                    member.write(old.read(name))
    assert (folder / "trainer.pt").stat().st_size < 1e7
    seal(folder, "trainer.pt")
    reading.stop()  # so that the highest memory is that of this case
    refused(reading.outcome(resumes, root))
    assert reading.peak < 768 * 2**20, f"{reading.peak / 2**20:,.0f} MB"


@pytest.mark.parametrize(
    "reader, name",
    [
        ("reads_object", "x.json"),
        ("reads_config", "config.json"),
        ("reads_log", "log.jsonl"),
        ("reads_shards", "manifest.json"),
        ("reads_checkpoint", "manifest.json"),
        ("reads_tokenizer", "tokenizer.model"),
        ("reads_index", "x.index"),
        ("reads_corpus", "x.txt"),
        ("reads_corpus", "x.jsonl"),
    ],
)
def test_endless_files(reading: Reading, place: Path, reader: str, name: str) -> None:
    "A file of a terabyte that takes no place on the disk: one line of zeros."
    folder = put(
        place / f"endless-{len(list(place.iterdir()))}",
        {"x.txt": b"a\n", "x.jsonl": b'{"text": "a"}\n', name: b""},
    )
    write_index(folder / "x.idx", [1], 2)
    try:
        os.truncate(folder / name, 2**40)
    except OSError:
        pytest.skip("this disk has no files with holes of that size")
    refused(
        reading.outcome(READERS[reader], folder, 6 * SECONDS)
    )  # a corpus is read in twelve ways


DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
WIDE = json.dumps({f"k{i}": 0 for i in range(100_000)}).encode()
DIGITS = b'{"text": ' + b"9" * 1_000_000 + b"}"


@pytest.mark.parametrize("data", [DEEP, WIDE, DIGITS], ids=["deep", "wide", "digits"])
@pytest.mark.parametrize(
    "reader, name",
    [
        ("reads_object", "x.json"),
        ("reads_config", "config.json"),
        ("reads_log", "log.jsonl"),
        ("reads_shards", "manifest.json"),
        ("reads_checkpoint", "manifest.json"),
        ("reads_stages", "stages.json"),
        ("reads_corpus", "x.jsonl"),
    ],
)
def test_json_of_any_form(
    reading: Reading, place: Path, reader: str, name: str, data: bytes
) -> None:
    "Brackets within brackets, 100,000 keys, a number of a million digits: read in a moment, or refused."
    folder = put(
        place / f"form-{len(list(place.iterdir()))}",
        {"x.txt": b"a\n", "x.jsonl": b'{"text": "a"}\n', name: data + b"\n"},
    )
    judge(reading.outcome(READERS[reader], folder))


@pytest.mark.parametrize(
    "change",
    [
        dict(tokens=0),
        dict(documents=-1),
        dict(documents=10**9),
        dict(name="x" * 300 + "-1"),
        dict(name="train-99999"),
        dict(bytes=-1),
    ],
    ids=str,
)
def test_counts_that_lie(reading: Reading, good: Path, place: Path, change: dict) -> None:
    "A manifest of shards whose counts or names are not those of the files."
    folder = copied(good / "shards", place)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["splits"]["train"][0] |= change
    put(
        folder,
        {
            "manifest.json": seal_shards(manifest),
            **({"train-00000.bin": b""} if "tokens" in change else {}),
        },
    )
    refused(reading.outcome(reads_shards, folder))


def test_tokens_that_the_model_does_not_know(reading: Reading, good: Path, place: Path) -> None:
    "Shards whose sums are right, and whose ids are beyond the vocabulary."
    root = put(place / "unknown", {"run.json": (good / "run.json").read_bytes()})
    folder = shutil.copytree(good / "shards", root / "shards")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for shard in manifest["splits"]["train"]:
        data = b"\xff\xff" * shard["tokens"]
        put(folder, {f"{shard['name']}.bin": data})
        shard["sha256"] = sha256(data).hexdigest()
    put(folder, {"manifest.json": seal_shards(manifest)})
    refused(reading.outcome(trains, root))
