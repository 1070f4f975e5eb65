"""Two kinds of failure, each one line: what was given, what was expected, what to do.

``UsageError`` is a mistake in the input (the command exits with 2); ``RunError`` is a failure of the work itself (exit 1).
Both are raised once, at the public boundary, and nothing half-written is left behind.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """The input cannot be used as given."""


class RunError(RuntimeError):
    """The work could not be finished: non-finite values, a broken checkpoint, a full disk."""


def require(condition: object, given: str, expected: str, todo: str = "") -> None:
    """Raises ``UsageError("given ..., expected ...; todo")`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(f"given {given}, expected {expected}" + (f"; {todo}" if todo else ""))


def choose(name: str, known: Iterable[str], what: str) -> str:
    """``name`` if it is one of ``known``, else a ``UsageError`` with the nearest valid names."""
    known = sorted(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    raise UsageError(f"given {what} {name!r}, expected one of {', '.join(known)}; {hint}")


def call_named(spec: str, known: Mapping[str, Callable[..., T]], what: str, **given: Any) -> T:
    """``known[name](option=value, ...)`` for a ``spec`` "name" or "name:option=value,option=value"; ``given`` are options set already."""
    name, _, text = spec.partition(":")
    function = known[choose(name, known, what)]
    parameters = {key: p for key, p in inspect.signature(function).parameters.items() if key not in given}
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        require(parameters, f"{what} {spec!r}", f"{name} without options: it has none")
        key = choose(key.strip(), parameters, f"option of {what} {name}")
        options[key] = _parsed(value.strip(), parameters[key].default, f"{key} of {name}")
    return function(**given, **options)


def _parsed(text: str, like: Any, what: str) -> Any:
    """``text`` as a value of the type of ``like``."""
    kind = type(like)
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else text if kind is str else kind(text)
    except (ValueError, KeyError):
        raise UsageError(f"given {what} = {text!r}, expected {'true or false' if kind is bool else f'a number ({kind.__name__})'}") from None
