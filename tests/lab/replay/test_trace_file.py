"""Trace files: complete under their name or not there, and never read wrongly when damaged."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from test_trace import made

from coterie.cli.entry import run
from coterie.errors import CheckpointError, CoterieError
from coterie.lab.replay.trace import FRAME_HEADER, TraceForward, encode_forward
from coterie.lab.replay.trace_file import TraceWriter, check_new_trace, read_trace
from coterie.testing import write_checkpoint

Capture = pytest.CaptureFixture[str]


def write_trace(path: Path, count: int = 4, **options: bool) -> list[int]:
    """Writes a trace; returns the size of the file before each forward, and at the end."""
    trace, _ = made()
    with TraceWriter(path, trace.header, trace.bias, **options) as writer:
        sizes = [writer.path.stat().st_size]
        for forward in trace.forwards[:count]:
            writer.write(forward)
            sizes.append(writer.path.stat().st_size)
    return sizes


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "t"
    write_trace(path)
    return path.read_bytes()


@given(st.integers(0, 10_000))
@law(40)
def test_a_torn_tail_costs_the_last_forward_alone(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "t"
    ends = write_trace(path)
    size = ends[0] + cut % (ends[-1] - ends[0] + 1)
    path.write_bytes(path.read_bytes()[:size])
    found = read_trace(path)
    assert len(found.forwards) == sum(end <= size for end in ends[1:])
    assert found.truncated == (size not in ends)


def read_or_refuse(path: Path) -> CoterieError | None:
    """The error of reading, which names the file; another kind of error fails the test."""
    try:
        read_trace(path)
    except CoterieError as error:
        return error if str(path) in str(error) else pytest.fail(str(error))
    return None


@given(st.data())
@law(60)
def test_any_damage_is_our_error(tmp_path_factory, good: bytes, data: st.DataObject) -> None:
    """Bytes flipped, cut out and put in, anywhere in the file."""
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(("flip", "cut", "extend"))):
            case "flip" if at < len(content):
                content[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 40))]
            case _:
                content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    path = tmp_path_factory.mktemp("damage") / "t"
    path.write_bytes(content)
    read_or_refuse(path)


@given(st.data())
@law(60)
def test_a_record_of_any_content_is_ours_or_refused(
    tmp_path_factory, good: bytes, data: st.DataObject
) -> None:
    """The checksum is right, so only the content can be refused."""
    trace, _ = made()
    body = bytearray(encode_forward(trace.forwards[0], trace.header.experts))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, 40), st.integers(0, len(body) - 1)))
        body[at % len(body)] = data.draw(st.integers(0, 255))
    length = data.draw(st.sampled_from((0, 1, 23, 24, len(body) - 1, len(body), len(body) + 8)))
    body = bytes(body)[:length].ljust(length, b"\0")
    content = data.draw(st.sampled_from((b"\0" + body, b"\1" + zlib.compress(body), b"\2" + body)))
    path = tmp_path_factory.mktemp("content") / "t"
    frame = FRAME_HEADER.pack(len(content), zlib.crc32(content)) + content
    path.write_bytes(good + frame)
    error = read_or_refuse(path)
    assert error is None or "record 4 is damaged" in str(error)
    assert error is not None or len(read_trace(path).forwards) == 5


HEADER_VALUES = (None, -1, 0, 1.5, 10**30, True, "x", [], {}, [1, "2"], [[]], {"bf16": -1})


@given(st.data())
@law(50)
def test_a_header_of_any_content_is_ours_or_refused(
    tmp_path_factory, good: bytes, data: st.DataObject
) -> None:
    head, _, rest = good.partition(b"\n")
    fields = json.loads(head)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(fields)))
        if data.draw(st.booleans()):
            fields[name] = data.draw(st.sampled_from(HEADER_VALUES))
        elif len(fields) > 1:
            del fields[name]
    path = tmp_path_factory.mktemp("header") / "t"
    path.write_bytes(json.dumps(fields).encode() + b"\n" + rest)
    read_or_refuse(path)


def test_each_damage_is_named(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "t"
    header = good.index(b"\n") + 1
    for at, reason in ((len(good) - 9, "record 3 is damaged"), (header + 3, "bias")):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match=reason):
            read_trace(path)
    for tail in (bytes(8), bytes(4096)):  # blocks that a power cut left
        path.write_bytes(good + tail)
        with pytest.raises(CheckpointError, match="record 4 is damaged"):
            read_trace(path)
    path.write_bytes(good.replace(b'"version": 1', b'"version": 9', 1))
    with pytest.raises(CheckpointError, match="version 9; this reads 1"):
        read_trace(path)
    for other in (b"", b"{}\n", b"\x80\x03 no text", b'{"format": "coterie trace"', b"[" * 10**5):
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match="not a trace"):
            read_trace(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nowhere"):
        with pytest.raises(CheckpointError, match=name):
            read_trace(tmp_path / name)


def test_a_large_record_is_refused_before_it_takes_memory(tmp_path: Path, good: bytes) -> None:
    """A few kilobytes that would be 32 MiB of zeros."""
    content = b"\1" + zlib.compress(bytes(1 << 25), 1)
    path = tmp_path / "t"
    path.write_bytes(good + FRAME_HEADER.pack(len(content), zlib.crc32(content)) + content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="record 4 is damaged"):
        read_trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23
    path.write_bytes(good + struct.pack("<II", 1 << 30, 0) + bytes(100))
    with pytest.raises(CheckpointError, match="record 4 is damaged"):
        read_trace(path)


def stop_after(writer: TraceWriter, forwards: Sequence[TraceForward]) -> None:
    for forward in forwards:
        writer.write(forward)
    raise KeyboardInterrupt


def test_a_trace_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    trace, _ = made()
    path = tmp_path / "t"
    writer = TraceWriter(path, trace.header, trace.bias)
    with pytest.raises(KeyboardInterrupt), writer:
        stop_after(writer, trace.forwards[:2])
    assert not path.exists()
    assert len(read_trace(tmp_path / "t.part").forwards) == 2
    write_trace(path)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_a_trace_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_trace(path)
    before = path.read_bytes()
    for refused in (check_new_trace, write_trace):
        with pytest.raises(CoterieError, match=r"exists already.*`overwrite`"):
            refused(path, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]
    assert path.read_bytes() == before
    check_new_trace(path, overwrite=True)
    assert path.read_bytes() == before
    write_trace(path, 2, overwrite=True)
    assert len(read_trace(path).forwards) == 2


def test_two_traces_into_one_file_are_refused(tmp_path: Path) -> None:
    trace, _ = made()
    path = tmp_path / "t"
    with TraceWriter(path, trace.header, trace.bias) as writer:
        writer.write(trace.forwards[0])
        for second in (check_new_trace, write_trace):
            with pytest.raises(CoterieError, match="another process"):
                second(path, overwrite=True)
        writer.write(trace.forwards[1])
    assert len(read_trace(path).forwards) == 2


def test_many_at_once_leave_one_whole_trace(tmp_path: Path) -> None:
    path, errors = tmp_path / "t", []

    def attempt() -> None:
        try:
            write_trace(path)
        except CoterieError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_trace(path).forwards) == 4
    assert len(errors) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def full_disk(at_call: int) -> Callable[[int, bytes], int]:
    """``os.write`` on a disk that is full from the given call on; half of that is written."""
    calls, write = 0, os.write

    def fail(descriptor: int, content: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > at_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[: len(content) // 2] if calls == at_call else content)

    return fail


def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    write_trace(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "write", full_disk(4))
    with pytest.raises(CoterieError, match=r"t\.part: cannot be written \(No space left"):
        write_trace(path, overwrite=True)
    assert path.read_bytes() == before
    part = read_trace(tmp_path / "t.part")
    assert (len(part.forwards), part.truncated) == (2, False)


def test_the_command_traces_and_says_what(tmp_path: Path, capsys: Capture) -> None:
    model = str(write_checkpoint(tmp_path / "tiny", "llada2", seed=3))
    (tmp_path / "prompts").write_text("5 17 33\n6 2 9\n")
    words = ["trace", "-m", model, "--prompts", str(tmp_path / "prompts"), "-n", "16"]
    words += ["--block", "8", "--unmask", "fixed:steps=3", "-p", "des-vote:beta=0.3"]
    path = tmp_path / "a.trace"
    assert run([*words, "-o", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    trace = read_trace(path)
    assert (told["forwards"], told["rows"]) == (len(trace.forwards), 2)
    assert told["bytes"] == path.stat().st_size
    assert trace.header.policy == "des-vote:beta=0.3"
    assert (trace.header.model, trace.header.unmask) == (model, "fixed:steps=3")
    assert trace.header.expert_bytes["bf16"] == 3 * 32 * 16 * 2
    assert told["kinds"]["decode"] + told["kinds"]["prefill"] <= told["forwards"]
    decode = [forward for forward in trace.forwards if forward.kind == "decode"]
    assert all(forward.used.sum(-1).max() <= 4 for forward in decode)
    assert run([*words, "-o", str(tmp_path / "nowhere" / "a.trace")]) == 2
    capsys.readouterr()
    before = path.read_bytes()
    assert run([*words, "-o", str(path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert run([*words, "--max-forwards", "1", "-o", str(path), "--overwrite"]) == 0
    kinds = [(forward.kind, forward.decode_index) for forward in read_trace(path).forwards]
    assert [kind for kind in kinds if kind[0] == "decode"] == [("decode", 0)] * 2
