"""What a sub-command is, and how its options are found."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_args


@dataclass(frozen=True)
class Parsed:
    """What is left to parse once the names in front (experiment, recipe) are known."""

    kind: Any
    args: list[str]
    prog: str
    default: Any = None


@dataclass(frozen=True)
class Command:
    """A sub-command: its one-line help; ``options(args)``: its option type, a default of it, its full name and the arguments left; ``act``;
    ``resumes``: whether the same command goes on where an interrupted one stopped."""

    help: str
    options: Callable[[list[str]], Parsed]
    act: Callable[[Any], None]
    resumes: bool = False


def simple(cls: type, name: str) -> Callable[[list[str]], Parsed]:
    """Options of a dataclass whose fields marked "positional" are positional."""

    def options(args: list[str]) -> Parsed:
        import tyro

        for field in fields(cls):
            if get_args(field.type)[1:] == ("positional",):
                field.type = cls.__annotations__[field.name] = tyro.conf.Positional[get_args(field.type)[0]]
        return Parsed(cls, args, name)

    return options


def take(args: list[str]) -> tuple[str | None, list[str]]:
    """The name in front, if there is one, and the other arguments."""
    return (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
