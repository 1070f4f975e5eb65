"""Two kinds of failure, each one line: what was given, what was expected, what to do.

``UsageError`` is a mistake in the input (the command exits with 2); ``RunError`` is a failure of the work itself (exit 1).
Both are raised once, at the public boundary, and nothing half-written is left behind.
"""

import difflib
from collections.abc import Iterable


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
