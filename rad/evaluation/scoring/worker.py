"""A long-lived process that calls a benchmark's own functions on predicted arguments.

No predicted text is ever executed: see `_worker_main.py`, the program of that process, which parses
a prediction and computes literal-like arguments from the syntax tree. What is executed is the
benchmark's function, and that with little memory and CPU time, without network, files, processes
and environment. A process that dies or hangs costs one prediction and is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# The slowest right answer of the 8000 published ones takes a hundredth of that; the official check
# allows three seconds of wall time.
CPU_SECONDS = 1.0
# For a worker that waits or gets no CPU; an endless loop meets the limit on CPU time first.
WALL_SECONDS = 30.0
MEMORY_BYTES = 1 << 30
# Predictions are shorter than this; longer text is wrong without being parsed.
TEXT_LIMIT = 20_000

_PROGRAM = Path(__file__).with_name("_worker_main.py")
_READY = "ready"


class WorkerError(ValueError):
    """The worker cannot run here, or the benchmark's own text cannot be used."""


class FunctionWorker:
    """Calls functions of a benchmark in one limited process, started when first needed.

    `judge` returns one word: `equal`, `different`, `raised` (an exception), `refused` (the
    prediction is no call of f on literal-like arguments), `memory`, `time` (CPU time or wall time)
    or `crashed`. Only `equal` is a right answer. Several threads may share a worker.
    """

    def __init__(
        self,
        cpu_seconds: float = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.cpu_seconds = cpu_seconds
        self.wall_seconds = wall_seconds
        self.memory_bytes = memory_bytes
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def judge(self, code: str, call: str, gold: str) -> str:
        """What `assert {gold} == {call}` comes to after `code`, as one word; see the class.

        Raises `WorkerError` if no worker can be started, or `code` or `gold` cannot be read.
        """
        if len(call) > TEXT_LIMIT:
            return "refused"
        line = json.dumps({"code": code, "call": call, "gold": gold}).encode("ascii") + b"\n"
        with self._lock:
            outcome = self._ask(line)
        if outcome == "unusable":
            raise WorkerError(
                f"the benchmark's function or its output is no Python: {code[:60]!r}, {gold[:60]!r}"
            )
        return outcome

    def close(self) -> None:
        """End the process; the next `judge` starts another."""
        with self._lock:
            self._end()

    # --- the process ----------------------------------------------------------------------------

    def _ask(self, line: bytes) -> str:
        for _ in range(2):  # an idle process may have been ended from outside: once more
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                break
            except BrokenPipeError:
                self._end()
        else:
            raise WorkerError("the scoring worker ends before it gets a request")
        reply = self._reply(process)
        if reply is None:
            process.kill()
            self._end()
            return "time"
        if not reply:
            status = process.wait()
            self._end()
            return "time" if status in (-signal.SIGPROF, -signal.SIGXCPU) else "crashed"
        if reply == "memory":  # the process ends by itself
            self._end()
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # after a fork the process belongs to the parent
            self._process = self._folder = None
        if self._process is None:
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        self._owner = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="rad-worker-")
        # As isolated as -I, but with a fixed order of sets: scores do not differ between runs.
        process = subprocess.Popen(
            [
                *(sys.executable, "-s", "-S", "-P", str(_PROGRAM)),
                *(str(self.memory_bytes), str(self.cpu_seconds)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            env={"PYTHONHASHSEED": "0"},
        )
        self.starts += 1
        self._process = process
        answer = self._reply(process)
        if answer != _READY:
            process.kill()
            self._end()
            raise WorkerError(f"the scoring worker does not start: {answer or 'no reply'}")
        return process

    def _reply(self, process: subprocess.Popen[bytes]) -> str | None:
        """The next line; empty if the process ended, None if it is too late."""
        assert process.stdout is not None
        number = process.stdout.fileno()
        poll = select.poll()
        poll.register(number, select.POLLIN | select.POLLHUP)
        end = time.monotonic() + self.wall_seconds
        text = b""
        while not text.endswith(b"\n"):
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                return None
            piece = os.read(number, 4096)
            if not piece:
                return ""
            text += piece
        return text.decode("ascii").strip()

    def _end(self) -> None:
        process, folder = self._process, self._folder
        self._process = self._folder = None
        if process is None or self._owner != os.getpid():
            return
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that was not taken
                pipe.close()
        process.kill()
        process.wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def shared_worker() -> FunctionWorker:
    """The one worker of this process, ended with it."""
    worker = FunctionWorker()
    atexit.register(worker.close)
    return worker
