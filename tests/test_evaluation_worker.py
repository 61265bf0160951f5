"""The scoring worker: what it calls, what it refuses, and what cannot hurt it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_time import cpu_seconds

from rad.evaluation.scoring import _worker_main, worker
from rad.evaluation.scoring.worker import FunctionWorker, WorkerError

SAME = "def f(x, y=None):\n    return x"
APPLY = "def f(values, operation):\n    return [operation(value) for value in values]"


@pytest.fixture(scope="module")
def limited() -> Iterator[FunctionWorker]:
    found = FunctionWorker(cpu_seconds=0.3)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("call", "gold"),
    [
        ("f(1)", "1"),
        ("f(True)", "1"),  # equal, as officially
        ("f(1.0)", "1"),
        ("f(x='a')", "'a'"),
        ("f(1), 'the message of the assertion'", "1"),
        ("f(  # where from\n  -1)", "-1"),
        ("f(dict(a=1, b=2))", "{'a': 1, 'b': 2}"),
        ("f(list(range(3)))", "[0, 1, 2]"),
        ("f(set())", "set()"),
        ("f(b'\\x00')", "b'\\x00'"),
        ("f('a-b'.upper().split('-'))", "['A', 'B']"),
        ("f(''.join(['A'] * 3) + 'b')", "'AAAb'"),
        ("f([1, 2, 3][::-1][:2])", "[3, 2]"),
        ("f(2 ** 10 // 3 % 100)", "41"),
        ("f(1 if 2 > 1 and not [] else 0)", "1"),
        ("f(sorted([3, 1], key=lambda each: -each))", "[3, 1]"),
        ("f('\\ud800')", "'\\ud800'"),  # half of a character
        ("f(0x" + "f" * 6000 + ")", "0x" + "f" * 6000),
    ],
)
def test_arguments_are_literals_and_a_few_operations(
    limited: FunctionWorker, call: str, gold: str
) -> None:
    assert limited.judge(SAME, call, gold) == "equal"


def test_lambdas_are_interpreted(limited: FunctionWorker) -> None:
    gold = "[False, True, True]"
    assert limited.judge(APPLY, "f([1, 2, 3], lambda x: x in (2, 3))", gold) == "equal"
    assert limited.judge(APPLY, "f([1, 2], lambda x: [x, x + 1].pop())", "[2, 3]") == "equal"
    assert limited.judge(APPLY, "f([1], lambda x: (lambda: x)())", "[1]") == "refused"
    assert limited.judge(APPLY, "f([1], lambda x: x.__class__)", "[1]") == "refused"
    assert limited.judge(APPLY, "f([1], lambda: 1)", "[1]") == "raised"


def test_names_are_those_of_the_benchmark_and_of_no_more(limited: FunctionWorker) -> None:
    code = "table = [1, 2]\n" + SAME
    assert limited.judge(code, "f(table[:1])", "[1]") == "equal"
    assert limited.judge(code, "f(table.append(3))", "None") == "equal"
    assert limited.judge(code, "f(table)", "[1, 2]") == "equal"  # fresh in every call
    for name in ("f", "os", "__builtins__", "__name__", "open", "eval", "json", "Refused"):
        assert limited.judge(code, f"f({name})", "1") == "refused", name


@pytest.mark.parametrize(
    "call",
    [
        "",
        "f",
        "g(1)",
        "1",
        "f(1) + 0",
        "f(1); f(1)",
        "f(1)\nimport os",
        "f(1) == 1",
        "(lambda: 1)()",
        "f(f(1))",
        "f(...)",
        "f(f'{1}')",
        "f([x for x in (1,)])",
        "f(*[1])",
        "f(**{'x': 1})",
        "f({**{}})",
        "f(x := 1)",
        "f(__import__('os').system('echo'))",
        "f(open('/etc/passwd').read())",
        "f(eval('1'))",
        "f(''.__class__.__mro__[1].__subclasses__())",
        "f('{0.__class__}'.format(1))",
        "f('%1000000000d' % 1)",
        "f(str.mro())",
        "f([].__init__)",
        "f(1\0)",
        "f(\ud800)",
        "f(" + "9" * 5000 + ")",  # longer than Python reads, officially too
        "f(10 ** 10 ** 8)",
        "f(1 << 10 ** 9)",
        "f('a' * 10 ** 9)",
        "f([0] * 1000 * 1000 * 1000)",
        "f(' '.join(['a' * 1000000] * 1000))",
        "f(('a' * 1000000).replace('a', 'b' * 1000000))",
        "f('a'.ljust(10 ** 10))",
        "f('\t'.expandtabs(10 ** 10))",
        "f(list(range(10 ** 12)))",
        "f(" + "[" * 5000 + "]" * 5000 + ")",
        "f(" + "-" * 10000 + "1)",
        "f(" + "1+" * 9000 + "1)",
        "f('" + "a" * 20_000 + "')",
    ],
)
def test_nothing_else_is_a_call(limited: FunctionWorker, call: str) -> None:
    started = cpu_seconds()
    assert limited.judge(SAME, call, "1") == "refused"
    assert cpu_seconds() - started < 20


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("while True: pass", "time"),
        ("try:\n        while True: pass\n    except BaseException:\n        return 1", "time"),
        ("return 7 ** 10 ** 9 % 2", "time"),  # one long operation, no byte code in between
        ("x = []\n    while True: x.append(bytes(10 ** 7))", "memory"),
        ("return 'a' * 10 ** 10", "memory"),
        ("return f(x)", "raised"),
        ("raise SystemExit", "raised"),
        ("return open('/etc/passwd').read()", "raised"),
        ("import os\n    return os.getpid()", "raised"),
        ("return eval('1')", "raised"),
        ("return input()", "raised"),
        ("print('equal')\n    return 2", "different"),
    ],
)
def test_the_benchmarks_function_is_limited(
    limited: FunctionWorker, body: str, outcome: str
) -> None:
    assert limited.judge(f"def f(x):\n    {body}", "f(1)", "1") == outcome
    # and the next request is answered
    assert limited.judge(SAME, "f(1)", "1") == "equal"


# The worker's own modules, reached through the classes of the interpreter: what a function could do
# that is out to break the limits.
_REACH = """def f(x):
    for each in object.__subclasses__():
        if each.__name__ == 'Arguments':
            return reach(each.__init__.{globals}['os'])
"""


@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "os.system('true')",
        "os.open('/etc/passwd', 0)",
        "os.mkdir('here')",
        "os.unlink('/tmp/nothing')",
        "os.kill(os.getppid(), 9)",
        "os.listdir('/')",
    ],
)
def test_system_calls_are_refused(limited: FunctionWorker, action: str) -> None:
    code = f"def reach(os):\n    {action}\n    return 1\n" + _REACH.format(globals="__globals__")
    assert limited.judge(code, "f(1)", "1") == "refused"
    harmless = "def reach(os):\n    return os.sep\n" + _REACH.format(globals="__globals__")
    assert limited.judge(harmless, "f(1)", "'/'") == "equal"  # so it did reach the module


_PROBE = """
import contextlib, os, resource, runpy, socket, sys
program = runpy.run_path(sys.argv[1], run_name="probe")
highest = max(program["_descriptors"]())
replies = os.fdopen(highest, "w")
program["_limit"](1 << 30, highest + 1)
failed = []
for name, action in {
    "fork": lambda: os.fork() or os._exit(0),
    "file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "socket": socket.socket,
    "memory": lambda: bytearray(1 << 30),
}.items():
    with contextlib.suppress(OSError, MemoryError):
        action()
        continue
    failed.append(name)
print(*failed, os.geteuid(), resource.getrlimit(resource.RLIMIT_FSIZE)[0], file=replies)
"""


def test_the_kernel_refuses_too() -> None:
    """Without the audit hook: the limits alone stop processes, files, sockets and memory."""
    program = str(Path(_worker_main.__file__))
    found = subprocess.run(
        [sys.executable, "-c", _PROBE, program], capture_output=True, text=True, timeout=60
    )
    *failed, user, size = found.stdout.split()
    assert failed == ["fork", "file", "socket", "memory"]
    assert int(user) != 0 and int(size) == 0


def test_the_process_has_no_environment(
    limited: FunctionWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAD_SECRET", "x")
    fresh = FunctionWorker()
    code = "def reach(os):\n    return sorted(os.environ)\n" + _REACH.format(globals="__globals__")
    # LC_CTYPE is the interpreter's own
    assert fresh.judge(code, "f(1)", "['LC_CTYPE', 'PYTHONHASHSEED']") == "equal"
    fresh.close()


def test_one_process_answers_until_it_dies() -> None:
    found = FunctionWorker(cpu_seconds=0.2)
    for number in range(50):
        assert found.judge(SAME, f"f({number})", str(number)) == "equal"
    assert found.starts == 1
    assert found.judge("def f():\n    while True: pass", "f()", "1") == "time"
    assert found.judge(SAME, "f(1)", "1") == "equal"
    assert found.starts == 2
    process = found._process
    assert process is not None
    process.kill()  # from outside, while idle
    process.wait()
    assert found.judge(SAME, "f(1)", "1") == "equal"
    found.close()
    assert found._process is None
    assert found.judge(SAME, "f(1)", "1") == "equal"
    found.close()


def test_a_process_that_hangs_is_replaced() -> None:
    found = FunctionWorker(wall_seconds=5.0)
    assert found.judge(SAME, "f(1)", "1") == "equal"
    found.wall_seconds = 0.2
    reads = "def reach(os):\n    return os.read(0 + 3, 1)\n" + _REACH.format(globals="__globals__")
    assert found.judge(reads, "f(1)", "1") == "time"  # waits for the next request, uses no CPU
    found.wall_seconds = 5.0
    assert found.judge(SAME, "f(1)", "1") == "equal"
    found.close()


def test_leaves_no_process_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.tempfile, "tempdir", str(tmp_path))
    found = FunctionWorker()
    assert found.judge(SAME, "f(1)", "1") == "equal"
    assert found._process is not None
    number = found._process.pid
    assert list(tmp_path.iterdir())
    found.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_answers_do_not_depend_on_the_process() -> None:
    """Sets have the same order in every process."""
    outcomes = set()
    for _ in range(3):
        found = FunctionWorker()
        outcomes.add(found.judge("def f(x):\n    return list(set(x))", "f('abcdef')", "['a']"))
        code = "def f(x):\n    return hash(x)"
        gold = subprocess.run(
            [sys.executable, "-c", "print(hash('abc'))"],
            env={"PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert found.judge(code, "f('abc')", gold) == "equal"
        found.close()
    assert outcomes == {"different"}


def test_unknown_and_known_encodings_end_as_usual(limited: FunctionWorker) -> None:
    code = (
        "def f(x, y):\n    try:\n        return x.encode(y)\n"
        "    except LookupError:\n        return 'unknown'"
    )
    assert limited.judge(code, "f('a', 'shift_jis')", "b'a'") == "equal"
    assert limited.judge(code, "f('a', 'no such')", "'unknown'") == "equal"


def test_unusable_benchmark_text_is_an_error(limited: FunctionWorker) -> None:
    with pytest.raises(WorkerError, match="no Python"):
        limited.judge("def f(:", "f(1)", "1")
    with pytest.raises(WorkerError, match="no Python"):
        limited.judge(SAME, "f(1)", "no literal()")
    assert limited.judge(SAME, "f(1)", "1") == "equal"


def test_a_worker_that_does_not_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_PROGRAM", tmp_path / "nothing.py")
    with pytest.raises(WorkerError, match="does not start: no reply"):
        FunctionWorker().judge(SAME, "f(1)", "1")


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="no /proc/PID/limits here")
def test_limits_are_those_of_the_running_process(limited: FunctionWorker) -> None:
    assert limited.judge(SAME, "f(1)", "1") == "equal"
    assert limited._process is not None
    lines = Path(f"/proc/{limited._process.pid}/limits").read_text("utf-8").splitlines()
    found = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert found["Max open files"] == ["5", "5"]
    assert found["Max processes"] == ["0", "0"]
    assert found["Max file size"] == ["0", "0"]
    assert found["Max core file size"] == ["0", "0"]
    assert found["Max address space"] == [str(1 << 30)] * 2
    assert int(found["Max cpu time"][0]) < 60


def test_requests_hold_any_text(limited: FunctionWorker) -> None:
    text = "line\r\n\u2028\x00\x1b'\"\\ \U0001f600"
    call = f"f({text!r})"
    assert limited.judge(SAME, call, json.dumps(text).replace("\\ud83d\\ude00", text[-1])) == (
        "equal"
    )
