"""The child that runs the tests of a program: the program's function is a call to another process there."""

from __future__ import annotations

import builtins
from typing import Any

from suites.scoring.sandbox.audit_hook import NAMED
from suites.scoring.sandbox.values import decoded, encoded, receive, send

PASSED = "passed"
GONE = "gone"  # the other process ended before it answered
MOST_ANSWERED = 2**22  # bytes of one result
STOPS = (StopIteration, StopAsyncIteration, GeneratorExit)  # they end a loop over calls as if there were no more


class ProgramFailed(BaseException):
    """The program raised something that tests must not catch as their own; `args` are the name of it."""


class _Function:
    """The function under test: it sends its arguments to the program's process and returns what comes back."""

    def __init__(self, asks: int, answers: int) -> None:
        self._asks, self._answers = asks, answers
        self.refused: Any = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            send(self._asks, encoded((arguments, keywords)))
        except BrokenPipeError:
            raise ProgramFailed(GONE) from None
        return self.result()

    def result(self) -> Any:
        """Return the value that the program's process answers with, or raise what it says was raised."""
        try:
            answer = receive(self._answers, MOST_ANSWERED)
            if "value" in answer:
                return decoded(answer["value"])
            name, self.refused = answer["error"], answer["refused"]
        except EOFError:
            raise ProgramFailed(GONE) from None
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError):
            raise ProgramFailed("an answer that is no plain value, or too large") from None
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise ProgramFailed("Exception")
        if issubclass(kind, Exception) and not issubclass(kind, (*STOPS, BaseExceptionGroup)):
            raise kind.__new__(kind)
        raise ProgramFailed(kind.__name__)


def verdict(tests: str, given: str, function: str, asks: int, answers: int) -> tuple[str, int | None]:
    """Run the tests against the program's process; return `PASSED`, or what failed and in which line, or `GONE`.

    `given` is run before the tests, and they may use its names. The name `function` is the program's. The verdict names
    types of exceptions, nothing that the program wrote.
    """
    call = _Function(asks, answers)
    names: dict[str, Any] = {"__name__": "tests"}
    stage = "program failed"
    try:
        call.result()
        stage = "tests failed"
        exec(compile(given, "<given>", "exec", dont_inherit=True, optimize=0), names)
        names[function] = call
        exec(compile(tests, "<tests>", "exec", dont_inherit=True, optimize=0), names)
    except BaseException as error:
        if error.args == (GONE,) and isinstance(error, ProgramFailed):
            return GONE, None
        return f"{stage}: {_described(error, call.refused)}", _line(error)
    return PASSED, None


def _described(error: BaseException, refused: Any) -> str:
    name = str(error.args[0]) if isinstance(error, ProgramFailed) else type(error).__name__
    return f"{name} (the sandbox refuses {refused})" if isinstance(refused, str) and refused in NAMED else name


def _line(error: BaseException) -> int | None:
    """Return the number of the line of the tests where the error was raised, if it was in one."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
