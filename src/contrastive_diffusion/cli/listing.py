"""``cdl list``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from contrastive_diffusion.cli._command import Command, simple


@dataclass(frozen=True)
class List:
    """List experiments, recipes, toys and what else can be named."""

    what: Annotated[Literal["all", "solvers", "grids"], "positional"] = "all"
    """solvers: what each can do; grids: their options."""


def _act_list(options: List) -> None:
    from importlib.resources import files

    from contrastive_diffusion.data.toys import TOYS
    from contrastive_diffusion.experiments import summaries
    from contrastive_diffusion.parallel import SLOPES
    from contrastive_diffusion.schedules import GRIDS
    from contrastive_diffusion.solvers import SOLVERS

    if options.what == "all":
        print("experiments (cdl run NAME [RECIPE])")
        for name, summary in summaries().items():
            print(f"  {name:<12} {summary}")
        recipes = sorted(f.name.removesuffix(".yaml") for f in (files("contrastive_diffusion") / "recipes").iterdir() if f.name.endswith(".yaml"))
        for title, names in {"recipes": recipes, "toys": TOYS, "slopes": SLOPES}.items():
            print(f"{title}\n  {', '.join(names)}")
    if options.what in ("all", "solvers"):
        _list_solvers(SOLVERS)
    if options.what in ("all", "grids"):
        print("grids (--grid NAME or NAME:option=value)")
        for name, make in GRIDS.items():
            print(f"  {name:<15} {_options_of(make, skip='steps')}")


def _list_solvers(known: dict[str, Callable[..., Any]]) -> None:
    from contrastive_diffusion.solvers import natural_grid

    print("solvers (--solver NAME or NAME:option=value)")
    print(f"  {'':<15} {'order':>5}  {'evals a step':>12}  {'draws noise':<11}  {'parallel':<8}  {'grid':<8} options")
    for name, make in known.items():
        solver = make()
        print(
            f"  {name:<15} {solver.order:>5}  {solver.evals:>12}  {'yes' if solver.noisy else 'no':<11}  {'no' if solver.alone else 'yes':<8}  "
            f"{natural_grid(solver):<8} {_options_of(make)}"
        )


def _options_of(make: Callable[..., Any], skip: str = "") -> str:
    """ "option=default, ..." of a registered function."""
    import inspect

    return ", ".join(f"{key}={p.default}" for key, p in inspect.signature(make).parameters.items() if key != skip)


COMMAND = Command("List experiments, recipes, toys, solvers, grids.", simple(List, "list"), _act_list)
