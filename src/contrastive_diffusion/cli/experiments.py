"""``cdl run`` and ``cdl report``."""

from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Union

from contrastive_diffusion.cli._command import Command, Parsed, simple, take
from contrastive_diffusion.errors import require

HELP_FLAGS = {"-h", "--help"}


@dataclass(frozen=True)
class Report:
    """Write report.html of a run folder again from its files."""

    run: Annotated[str, "positional"]
    """The run folder."""


def experiments() -> Any:
    """The union of the recipes of all experiments."""
    import tyro

    from contrastive_diffusion.experiments import load, summaries

    kinds = {key: load(key).Config for key in summaries()}
    return Union[  # noqa: UP007
        tuple(
            Annotated[kind, tyro.conf.subcommand(key, default=kind(), description=summaries()[key], prefix_name=False)] for key, kind in kinds.items()
        )
    ]


def _run_options(args: list[str]) -> Parsed:
    from contrastive_diffusion.experiments import load, summaries
    from contrastive_diffusion.recipes import recipe

    name, args = take(args)
    if name is None:
        require(HELP_FLAGS & set(args), "no experiment", f"one of {', '.join(summaries())}", "try cdl run dino")
        return Parsed(make_dataclass("Run", [("experiment", experiments())]), args, "run")
    config = load(name).Config
    chosen, args = take(args)
    return Parsed(config, args, f"run {name}", recipe(config, chosen, f"{name}-"))


def _act_run(config: Any) -> None:
    import importlib

    from contrastive_diffusion.report import write
    from contrastive_diffusion.report.text import summary

    folder = importlib.import_module(type(config).__module__).run(config)
    page = write(folder)
    print(summary(folder))
    print(f"report: {page}")


def _act_report(options: Report) -> None:
    from contrastive_diffusion.report import write

    print(f"report: {write(options.run)}")


RUN = Command("Run an experiment, a table or figure of the paper: cdl run NAME [RECIPE].", _run_options, _act_run, resumes=True)
REPORT = Command("Write the HTML page of a run again.", simple(Report, "report"), _act_report)
