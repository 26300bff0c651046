"""The child process in which chat templates are rendered, within limits of time and memory."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

from coterie.errors import TokenizerError

WORKER = Path(__file__).with_name("template_worker.py")
LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # the interpreter may need them


class TemplateProcess:
    """Renders templates one at a time. It starts with the first one, and again after a failure."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a fork of this process needs a child of its own

    def render(self, source: str, variables: Mapping[str, object]) -> str:
        """Raises TokenizerError with the reason if the template fails or exceeds a limit."""
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._process, self._owner = _start(), os.getpid()
            answer = b""
            try:
                answer = _exchange(self._process, request)
            finally:
                # Also after an interrupt: the next answer would be that of this request.
                if not answer.endswith(b"\n"):
                    self.close()
        if not answer.endswith(b"\n"):
            raise TokenizerError("it takes too much time or memory")
        result = json.loads(answer)
        if "text" not in result:
            raise TokenizerError(result["error"])
        return result["text"]

    def close(self) -> None:
        """End the child; another render starts a new one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


RENDERER = TemplateProcess()
"""One for all templates: starting it takes a tenth of a second."""

atexit.register(RENDERER.close)


def _start() -> subprocess.Popen[bytes]:
    # Without the environment: a template that escaped its sandbox would find no secrets there.
    environment = {name: os.environ[name] for name in LIBRARY_PATHS if name in os.environ}
    command = [sys.executable, "-I", str(WORKER), *filter(None, sys.path)]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment)
    except OSError as error:
        raise TokenizerError(f"its process does not start ({error.strerror})") from None


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The answer, which ends in a newline unless the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""
