"""The child that runs a program: it defines the program's function, then calls it as often as it is asked to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from suites.scoring.sandbox.values import decoded, encoded, receive, send

MOST_ASKED = 2**22  # bytes of the arguments of one call


def serve(source: str, function: str, asked: int, answers: int, refused: Callable[[], str | None]) -> None:
    """Run a program, say on the pipe `answers` that it did, and answer the calls that come on the pipe `asked`.

    An answer is {"value": ...}, or {"error": the name of a built-in exception, "refused": what `refused` returns}: no
    text of an exception, which may hold anything that the program has read.
    """
    module = sys.modules["program"] = ModuleType("program")  # dataclasses and pickle look a class's module up
    names = vars(module)

    def answer(action: Callable[[], Any]) -> None:
        try:
            value = encoded(action())
        except BaseException as error:
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            send(answers, {"error": kind.__name__, "refused": refused()})
        else:
            send(answers, {"value": value})

    answer(lambda: exec(compile(source, "<program>", "exec", dont_inherit=True, optimize=0), names))
    while True:
        arguments, keywords = decoded(receive(asked, MOST_ASKED))
        answer(partial(_call, names, function, arguments, keywords))


def _call(names: dict[str, Any], function: str, arguments: tuple, keywords: dict[str, Any]) -> Any:
    if function not in names:
        raise NameError(function)
    return names[function](*arguments, **keywords)
