"""Program of the scoring worker: calls a benchmark's own function, in a process without rights.

`worker.py` starts it; nothing imports it. A request is one line of JSON on standard input,

    {"code": source of the benchmark's function f, "call": "f(...)" as predicted, "gold": literal}

and the reply is one line, a word of `OUTCOMES`. The benchmark's code is run; the predicted call is
only *parsed*, and its arguments are computed by `Arguments` from the syntax tree: literals, a few
operators, a few functions and methods of built-in types, and lambdas made of these. Whatever else
a prediction holds is refused.

Limits set here hold for the rest of the process: address space, no file or socket can be opened (no
descriptor is left), no process started, no byte written to a file, no core dump. CPU time is
limited per request by a timer whose signal kills. An audit hook refuses every audited operation
(imports, files, processes, sockets, compiling, ...) while foreign code runs.
"""

from __future__ import annotations

import ast
import builtins
import codecs
import contextlib
import encodings.aliases
import json
import operator
import os
import resource
import signal
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sized
from typing import Any

# What a call came to; `refused`: the prediction is no call of f on arguments as above; `unusable`:
# the benchmark's own code or gold output cannot be read.
OUTCOMES = ("equal", "different", "raised", "refused", "memory", "unusable")

STEP_LIMIT = 200_000  # evaluated nodes per request
DEPTH_LIMIT = 100  # nesting of one expression
SIZE_LIMIT = 1_000_000  # elements or characters of a computed argument
BIT_LIMIT = 100_000  # of a computed integer
NOBODY = 65534  # user and group when started by root

# Not for the benchmark's functions, which use none of them.
_WITHHELD = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}
_BUILTINS = {name: value for name, value in vars(builtins).items() if name not in _WITHHELD}


class Refused(Exception):
    """A predicted call, or an operation, that is not allowed."""


# --- predicted arguments --------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(abs, bool, dict, enumerate, float, frozenset, int, len, list, max, min, range),
        *(reversed, round, set, sorted, str, sum, tuple, zip),
    )
}
_METHODS: dict[type, frozenset[str]] = {
    kind: frozenset(names.split())
    for kind, names in {
        str: "capitalize casefold center count endswith expandtabs find index isalnum isalpha "
        "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
        "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
        "zfill",
        list: "append clear copy count extend index insert pop remove reverse sort",
        dict: "clear copy get items keys pop popitem setdefault update values",
        set: "add clear copy difference discard intersection isdisjoint issubset issuperset pop "
        "remove symmetric_difference union update",
        frozenset: "copy difference intersection isdisjoint issubset issuperset union",
        tuple: "count index",
    }.items()
}
_WIDE = {"center", "expandtabs", "ljust", "rjust", "zfill"}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
# What a predicted call may name of the benchmark's own module, as the gold input of one does.
_DATA = (str, bytes, int, float, bool, list, tuple, set, dict)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _check_operands(kind: type, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before it is computed."""
    whole = isinstance(left, int) and isinstance(right, int)
    if kind is ast.Mult:
        if whole:
            too_large = left.bit_length() + right.bit_length() > BIT_LIMIT
        else:
            counts = [value for value in (left, right) if isinstance(value, int)]
            size = max(_size(left), _size(right))
            too_large = any(size * count > SIZE_LIMIT for count in counts)
    elif kind is ast.Pow:
        too_large = whole and left.bit_length() * max(right, 0) > BIT_LIMIT
    elif kind is ast.Mod:
        too_large = isinstance(left, str | bytes)  # a format, whose widths are not known here
    else:
        too_large = _size(left) + _size(right) > SIZE_LIMIT
    if too_large:
        raise Refused("operands")


def _check_call(name: str, receiver: Any, values: list[Any]) -> None:
    """Refuse a call whose result would be too large, before it is made."""
    size = _size(receiver)
    sizes = [_size(value) for value in values]
    needed = max([size, *sizes])
    if name in _WIDE:
        widths = [value for value in values if isinstance(value, int)]
        needed = max([0, *widths]) * (max(size, 1) if name == "expandtabs" else 1)
    elif name == "replace" and sizes:
        needed = (size + 1) * max(1, *sizes)
    elif name == "join" and sizes and isinstance(values[0], list | tuple):
        needed = sum(_size(part) + size for part in values[0])
    if needed > SIZE_LIMIT:
        raise Refused("size")


class Arguments:
    """Values of argument expressions, computed from their syntax trees without running them.

    `names` are the benchmark module's own data. Raises `Refused` on anything not listed above, and
    whatever the listed operations raise.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names
        self.steps = 0

    def call(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of a call."""
        return self._arguments(node, {}, 0)

    def _arguments(
        self, node: ast.Call, scope: Mapping[str, Any], depth: int
    ) -> tuple[list[Any], dict[str, Any]]:
        positional = [self.value(each, scope, depth) for each in node.args]
        keywords: dict[str, Any] = {}
        for each in node.keywords:
            if each.arg is None or each.arg in keywords:
                raise Refused("keywords")
            keywords[each.arg] = self.value(each.value, scope, depth)
        return positional, keywords

    def value(self, node: ast.expr, scope: Mapping[str, Any], depth: int = 0) -> Any:
        """The value of one expression; `scope` holds the parameters of lambdas around it."""
        self.steps += 1
        depth += 1
        if self.steps > STEP_LIMIT or depth > DEPTH_LIMIT:
            raise Refused("steps")
        match node:
            case ast.Constant(value=constant) if constant is not Ellipsis:
                return constant
            case ast.List(elts=parts):
                return [self.value(part, scope, depth) for part in parts]
            case ast.Tuple(elts=parts):
                return tuple([self.value(part, scope, depth) for part in parts])
            case ast.Set(elts=parts):
                return {self.value(part, scope, depth) for part in parts}
            case ast.Dict(keys=keys, values=parts):
                return {
                    self.value(self._given(key), scope, depth): self.value(part, scope, depth)
                    for key, part in zip(keys, parts, strict=True)
                }
            case ast.Name(id=name):
                return self._name(name, scope)
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self.value(operand, scope, depth))
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _BINARY:
                first, second = self.value(left, scope, depth), self.value(right, scope, depth)
                _check_operands(type(op), first, second)
                return _BINARY[type(op)](first, second)
            case ast.BoolOp(op=op, values=parts):
                result = None
                for part in parts:
                    result = self.value(part, scope, depth)
                    if bool(result) is isinstance(op, ast.Or):
                        break
                return result
            case ast.Compare():
                return self._compare(node, scope, depth)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test, scope, depth) else orelse, scope, depth)
            case ast.Subscript(value=target, slice=index):
                return self.value(target, scope, depth)[self._index(index, scope, depth)]
            case ast.Call():
                return self._call(node, scope, depth)
            case ast.Lambda():
                return self._lambda(node, scope)
        raise Refused(type(node).__name__)

    def _given(self, node: ast.expr | None) -> ast.expr:
        if node is None:
            raise Refused("unpacking")
        return node

    def _name(self, name: str, scope: Mapping[str, Any]) -> Any:
        for table in (scope, self.names, _FUNCTIONS):
            if name in table:
                return table[name]
        raise Refused("name")

    def _index(self, node: ast.expr, scope: Mapping[str, Any], depth: int) -> Any:
        if not isinstance(node, ast.Slice):
            return self.value(node, scope, depth)
        parts = (node.lower, node.upper, node.step)
        return slice(*(part and self.value(part, scope, depth) for part in parts))

    def _compare(self, node: ast.Compare, scope: Mapping[str, Any], depth: int) -> Any:
        left = self.value(node.left, scope, depth)
        result: Any = True
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = self.value(part, scope, depth)
            result = _COMPARE[type(op)](left, right)
            if not result:
                break
            left = right
        return result

    def _call(self, node: ast.Call, scope: Mapping[str, Any], depth: int) -> Any:
        receiver = None
        match node.func:
            case ast.Name(id=name) if (
                name in _FUNCTIONS and name not in scope and name not in self.names
            ):
                function = _FUNCTIONS[name]
            case ast.Attribute(value=target, attr=name):
                receiver = self.value(target, scope, depth)
                if name not in _METHODS.get(type(receiver), ()):
                    raise Refused("method")
                function = getattr(receiver, name)
            case _:
                raise Refused("function")
        positional, keywords = self._arguments(node, scope, depth)
        _check_call(name, receiver, [*positional, *keywords.values()])
        return function(*positional, **keywords)

    def _lambda(self, node: ast.Lambda, scope: Mapping[str, Any]) -> Callable[..., Any]:
        given = node.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.defaults:
            raise Refused("parameters")
        names = [each.arg for each in (*given.posonlyargs, *given.args)]

        def function(*values: Any) -> Any:
            inner = {**scope, **dict(zip(names, values, strict=True))}
            return self.value(node.body, inner)

        return function


def predicted_call(text: str) -> ast.Call:
    """The call of `f` in `text`, which stands right of `assert gold ==`; or `Refused`.

    Parsed as that assertion, so that operators and commas bind as in the official check.
    """
    try:
        body = ast.parse(f"assert 0 == {text}").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Refused("syntax") from error
    match body:
        case [
            ast.Assert(
                test=ast.Compare(
                    ops=[ast.Eq()], comparators=[ast.Call(func=ast.Name(id="f")) as call]
                )
            )
        ]:
            return call
    raise Refused("form")


# --- one request ----------------------------------------------------------------------------


class Guard:
    """Refuses every audited operation while it is closed."""

    def __init__(self) -> None:
        self.closed = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _: Any) -> None:
        if self.closed:
            # What an unknown module gives, so that looking for an unknown text encoding ends as
            # usual; those of the standard library are loaded before.
            raise ImportError("no imports") if event == "import" else Refused(event)

    def __enter__(self) -> None:
        self.closed = True

    def __exit__(self, *_: object) -> None:
        self.closed = False


def judge(request: Mapping[str, str], guard: contextlib.AbstractContextManager[None]) -> str:
    """Whether the predicted call gives the gold output: a word of `OUTCOMES`."""
    namespace: dict[str, Any] = {"__builtins__": _BUILTINS}
    try:
        # A function, because `exec` is an audited operation and the guard is closed by then.
        module = types.FunctionType(compile(request["code"], "<benchmark>", "exec"), namespace)
        gold = ast.literal_eval(request["gold"])
    except (SyntaxError, ValueError):
        return "unusable"
    try:
        call = predicted_call(request["call"])
        with guard:
            module()
            own = {
                name: value
                for name, value in namespace.items()
                if type(value) in _DATA and not name.startswith("_")
            }
            positional, keywords = Arguments(own).call(call)
            result = namespace["f"](*positional, **keywords)
            # The order of the official assertion.
            return "equal" if gold == result else "different"
    except Refused:
        return "refused"
    except MemoryError:
        return "memory"
    except BaseException:
        return "raised"
    finally:
        namespace.clear()


# --- the process ----------------------------------------------------------------------------


def _descriptors() -> tuple[int, int]:
    """Move the pipes away from standard input and output, which then lead nowhere."""
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return requests, replies


def _load_encodings() -> None:
    """Load what `str.encode` would import on its first use; a few milliseconds each."""
    for name in set(encodings.aliases.aliases.values()):
        with contextlib.suppress(LookupError):  # of another system, or left out of this Python
            codecs.lookup(name)


def _limit(memory: int, descriptors: int) -> None:
    """Give up every right that calling a function does not need."""
    if os.geteuid() == 0:  # limits on processes do not bind root
        with contextlib.suppress(OSError):  # a namespace without that user: its root is no root
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, descriptors),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))


def _allow(seconds: float) -> None:
    """Die after so many seconds of CPU time from now; 0 takes the timer away.

    The timer's signal is left to the kernel, so no code can catch it. The limit on CPU time, in
    whole seconds over the life of the process, is moved along as a second lock.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def main() -> None:
    """Answer requests until the input ends; arguments: bytes of memory, CPU seconds a request."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    requests, replies = _descriptors()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    with os.fdopen(requests, "rb") as source, os.fdopen(replies, "wb") as sink:

        def reply(word: str) -> None:
            sink.write(word.encode("ascii", "replace") + b"\n")
            sink.flush()

        try:
            _load_encodings()
            _limit(memory, max(requests, replies) + 1)
            guard = Guard()
        except (OSError, ValueError) as error:
            reply(f"cannot limit the process: {error}".replace("\n", " "))
            return
        reply("ready")
        while line := source.readline():
            _allow(seconds)
            outcome = judge(json.loads(line), guard)
            _allow(0)
            reply(outcome)
            if outcome == "memory":  # what is left of the address space is not known
                return


if __name__ == "__main__":
    main()
