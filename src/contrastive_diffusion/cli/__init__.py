"""``cdl``: the command. Errors are one line; exit code 2 for a mistake in the input, 1 for a failure, 130 for ctrl-C.

One file for each sub-command, which imports what it needs when it acts, so ``cdl --help`` needs no torch.
"""

import os
import sys
from dataclasses import make_dataclass
from typing import Annotated, Any, Union

from contrastive_diffusion.cli import checkpoints, compare, estimate, evaluate, experiments, generate, listing, sample, training
from contrastive_diffusion.cli._command import Command
from contrastive_diffusion.errors import RunError, UsageError, choose, require

HELP = """Diffusion models whose denoiser is right where samplers actually go.

Start with `cdl run dino`. Every command takes --threads N (default 1: more threads are slower beside any busy process)."""
COMPLETION = {"--tyro-print-completion", "--tyro-write-completion"}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line ``argv`` (``sys.argv[1:]`` by default) and returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        args, threads = _threads(args)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        _dispatch(args, threads)
    except UsageError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {str(error) or 'nothing was written'}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: object, code: int) -> int:
    print(f"cdl: {message}", file=sys.stderr)
    return code


def _threads(args: list[str]) -> tuple[list[str], int]:
    if "--threads" not in args:
        return args, 1
    at = args.index("--threads")
    value = args[at + 1] if at + 1 < len(args) else ""
    require(value.isdigit() and int(value) >= 1, f"--threads {value}", "a number >= 1")
    return args[:at] + args[at + 2 :], int(value)


def _dispatch(args: list[str], threads: int) -> None:
    import tyro

    name = args[0] if args and not args[0].startswith("-") else ""
    if not name:
        tyro.cli(_all(bool(COMPLETION & set(args))), prog="cdl", description=HELP, args=args, config=(tyro.conf.OmitArgPrefixes,))
        return
    command = COMMANDS[choose(name, COMMANDS, "command")]
    parsed = command.options(args[1:])
    default = {} if parsed.default is None else {"default": parsed.default}
    chosen = tyro.cli(parsed.kind, prog=f"cdl {parsed.prog}", args=parsed.args, **default)
    from contrastive_diffusion.runs import tune_process

    tune_process(threads)
    try:
        command.act(chosen)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or ("run the same command again to continue" if command.resumes else "")) from None


def _all(whole: bool) -> Any:
    """The union of all commands: with their options for shell completion, else only with what the help shows."""
    import tyro

    members = []
    for key, command in COMMANDS.items():
        kind, default = make_dataclass(key.title(), [], namespace={"__doc__": command.help}), {}
        if whole and key == "run":
            kind = make_dataclass("Run", [("experiment", experiments.experiments())])
        elif whole:
            parsed = command.options([])
            kind, default = parsed.kind, {} if parsed.default is None else {"default": parsed.default}
        members.append(Annotated[kind, tyro.conf.subcommand(key, description=command.help, prefix_name=False, **default)])
    return Union[tuple(members)]  # noqa: UP007


COMMANDS: dict[str, Command] = {
    "run": experiments.RUN,
    "train": training.TRAIN,
    "finetune": training.FINETUNE,
    "convert": checkpoints.CONVERT,
    "inspect": checkpoints.INSPECT,
    "sample": sample.COMMAND,
    "generate": generate.COMMAND,
    "estimate": estimate.COMMAND,
    "evaluate": evaluate.COMMAND,
    "compare": compare.COMMAND,
    "report": experiments.REPORT,
    "list": listing.COMMAND,
}
