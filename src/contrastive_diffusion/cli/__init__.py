"""``cdl``: the command. Errors are one line; exit code 2 for a mistake in the input, 1 for a failure, 130 for ctrl-C.

Only the command that is asked for is imported, so ``cdl --help`` needs no torch.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from contrastive_diffusion.errors import RunError, UsageError, choose, require

if TYPE_CHECKING:
    from torch import Tensor

HELP = """Diffusion models whose denoiser is right where samplers actually go.

Start with `cdl run dino`. Every command takes --threads N (default 1: more threads are slower beside any busy process)."""
HELP_FLAGS = {"-h", "--help"}
COMPLETION = {"--tyro-print-completion", "--tyro-write-completion"}


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained run or a toy's exact denoiser into a .npy file."""

    source: Annotated[str, "positional"]
    """A run folder, or a toy whose law is a mixture (dino, two-modes, ...)."""
    out: str = "samples.npy"
    """Where to write the array (n, *S)."""
    n: int = 2000
    """Number of samples."""
    solver: str = "ddpm"
    """Step map, with options if wanted: heun, ddim:eta=0.5, edm:churn=40,s_noise=1.007; see cdl list solvers."""
    steps: int | None = None
    """Steps of the grid; 1000 for ddpm and the like, 100 for deterministic and higher-order solvers."""
    evals: int | None = None
    """Denoiser evaluations per sample, instead of --steps: the most steps that they pay for."""
    grid: str | None = None
    """Noise levels: karras, uniform:low=-8,high=10, leading, ... (cdl list grids), or log-SNRs "-8,-2,0,4"; the solver's usual one by default."""
    batch: int = 1000
    """Samples drawn at a time; ctrl-C keeps the batches that are finished."""
    parallel: bool = False
    """Many steps at once instead of one after another; under torchrun, in all processes."""
    slope: str = "secant"
    """Of --parallel: secant (measured), gauss, picard, ... (cdl list slopes)."""
    window: int | None = None
    """Steps of a sample worked on at once by --parallel; 64 by default, or all of a shorter grid."""
    tolerance: float = 0.02
    """Of --parallel; 0 is exactly the sequential sample."""
    seed: int = 0
    """Sample i of a seed is the same whatever n."""
    device: str = "cpu"
    """Where the network runs: cpu, cuda, ..."""
    label: int | None = None
    """Class to draw from, of a network trained on labels."""


@dataclass(frozen=True)
class EstimateCommand:
    """Estimate log-likelihood ratios, negative log-likelihoods or noise levels of points, each with its error."""

    what: Annotated[Literal["llr", "nll", "noise"], "positional"]
    """llr: log p_zeta(x) - log p(x); nll: -log p(x); noise: how noisy is x."""
    source: Annotated[str, "positional"]
    """A run folder, or a toy whose law is a mixture."""
    x: str | None = None
    """A .npy or .csv file of points (N, D), an image, or a folder or archive of images; draws of the source's data by default."""
    n: int = 8
    """Number of points to draw, or to read at most."""
    zeta: float = 6.0
    """Log-SNR of the noised law (llr)."""
    corrupt: float | None = None
    """Noise the points to this log-SNR first."""
    logsnrs: tuple[float, ...] = tuple(range(-6, 13))
    """Candidate levels, rising (noise)."""
    mass: float = 0.9
    """Of the credible interval (noise)."""
    likelihood: Literal["continuous", "dequantised", "discrete"] = "continuous"
    """Of x itself, or of x on its 8-bit grid, as an upper bound: with uniform noise, or by rounding (nll of images)."""
    check: bool = False
    """First check that the denoiser keeps its contract (shape, finite, rows independent)."""
    evals: int = 512
    """Denoiser evaluations per point."""
    seed: int = 0
    """Of points and estimates."""
    out: str | None = None
    """Also write the numbers to this JSON file."""


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint (EDM pickle, DDPM state dict, diffusers folder, run folder) into a model folder; nothing in it is executed."""

    source: Annotated[str, "positional"]
    """The file or folder."""
    out: Annotated[str, "positional"]
    """The model folder to write."""
    weights: Literal["ema", "raw"] | None = None
    """Which weights: for files that do not say, and for runs, which have both (default: ema)."""
    resolution: int | None = None
    """Of the images, where a file does not imply it."""


@dataclass(frozen=True)
class Inspect:
    """Say what a checkpoint is, without loading or executing it."""

    file: Annotated[str, "positional"]
    """The file or folder."""


@dataclass(frozen=True)
class Report:
    """Write report.html of a run folder again from its files."""

    run: Annotated[str, "positional"]
    """The run folder."""


@dataclass(frozen=True)
class List:
    """List experiments, recipes, toys and what else can be named."""

    what: Annotated[Literal["all", "solvers", "grids"], "positional"] = "all"
    """solvers: what each can do; grids: their options."""


@dataclass(frozen=True)
class Command:
    """A sub-command: its one-line help; ``options(args)``: its option type, a default of it, its full name and the arguments left; ``act``."""

    help: str
    options: Callable[[list[str]], "Parsed"]
    act: Callable[[Any], None]


@dataclass(frozen=True)
class Parsed:
    """What is left to parse once the names in front (experiment, recipe) are known."""

    kind: Any
    args: list[str]
    prog: str
    default: Any = None


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
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to continue", 130)
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
    command.act(chosen)


def _all(whole: bool) -> Any:
    """The union of all commands: with their options for shell completion, else only with what the help shows."""
    import tyro

    members = []
    for key, command in COMMANDS.items():
        kind, default = make_dataclass(key.title(), [], namespace={"__doc__": command.help}), {}
        if whole and key == "run":
            kind = make_dataclass("Run", [("experiment", _experiments())])
        elif whole:
            parsed = command.options([])
            kind, default = parsed.kind, {} if parsed.default is None else {"default": parsed.default}
        members.append(Annotated[kind, tyro.conf.subcommand(key, description=command.help, prefix_name=False, **default)])
    return Union[tuple(members)]  # noqa: UP007


def _experiments() -> Any:
    import tyro

    from contrastive_diffusion.experiments import load, summaries

    kinds = {key: load(key).Config for key in summaries()}
    return Union[  # noqa: UP007
        tuple(
            Annotated[kind, tyro.conf.subcommand(key, default=kind(), description=summaries()[key], prefix_name=False)] for key, kind in kinds.items()
        )
    ]


def _simple(cls: type, name: str) -> Callable[[list[str]], Parsed]:
    """Options of a dataclass of this module, whose fields marked "positional" are positional."""

    def options(args: list[str]) -> Parsed:
        import tyro

        for field in fields(cls):
            if get_args(field.type)[1:] == ("positional",):
                field.type = cls.__annotations__[field.name] = tyro.conf.Positional[get_args(field.type)[0]]
        return Parsed(cls, args, name)

    return options


def _take(args: list[str]) -> tuple[str | None, list[str]]:
    """The name in front, if there is one, and the other arguments."""
    return (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)


def _train_options(args: list[str]) -> Parsed:
    from contrastive_diffusion.recipes import Train, recipe

    name, args = _take(args)
    return Parsed(Train, args, "train", recipe(Train, name, "train-"))


def _finetune_options(args: list[str]) -> Parsed:
    import dataclasses

    from contrastive_diffusion.recipes import Train, recipe

    source, args = _take(args)
    if source is None:
        return Parsed(Train, args, "finetune SOURCE [RECIPE]", Train())
    name, args = _take(args)
    default = recipe(Train, name, "finetune-") if name else _as_trained(Path(source))
    out = "runs/finetuned" if default.out == Train.out else default.out
    return Parsed(Train, args, f"finetune {source}", dataclasses.replace(default, init=source, out=out))


def _as_trained(source: Path) -> Any:
    """The recipe a run was trained with, to be changed by options; the defaults for a model folder, with a network for images."""
    import json

    import yaml

    from contrastive_diffusion.recipes import Loss, Net, Train, validate

    if not (source / "recipe.yaml").is_file():
        require((source / "config.json").is_file(), f"{source}", "a run folder, or a model folder of cdl convert")
        ho = json.loads((source / "config.json").read_text()).get("net", {}).get("kind") == "ddpm"
        return Train(net=Net(kind="ddpm" if ho else "ddpm++"), loss=Loss(denoising="ddpm" if ho else "edm"))
    return validate(Train, yaml.safe_load((source / "recipe.yaml").read_text()) | {"out": "runs/finetuned", "init": None}, str(source))


def _run_options(args: list[str]) -> Parsed:
    from contrastive_diffusion.experiments import load, summaries
    from contrastive_diffusion.recipes import recipe

    name, args = _take(args)
    if name is None:
        require(HELP_FLAGS & set(args), "no experiment", f"one of {', '.join(summaries())}", "try cdl run dino")
        return Parsed(make_dataclass("Run", [("experiment", _experiments())]), args, "run")
    config = load(name).Config
    chosen, args = _take(args)
    return Parsed(config, args, f"run {name}", recipe(config, chosen, f"{name}-"))


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


def _list_solvers(known: "dict[str, Callable[..., Any]]") -> None:
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


def _act_train(config: Any) -> None:
    from contrastive_diffusion.runs import fit
    from contrastive_diffusion.training.processes import leave

    fit(config)
    leave()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trained: {config.out}\nnext: cdl sample {config.out} --parallel")


def _act_finetune(config: Any) -> None:
    require(config.init, "no source", "a run folder, or a model folder of cdl convert", "try cdl finetune runs/base --loss.contrastive 0.1")
    _act_train(config)


def _act_convert(options: Convert) -> None:
    from contrastive_diffusion.checkpoints import convert

    card = convert(options.source, options.out, options.weights, options.resolution)
    print(f"{options.out}: {card['net']['kind']}, {card['net']['resolution']} x {card['net']['resolution']}, {card['weights']} weights")
    print(f"licence: {card['licence']}\nnext: cdl sample {options.out}, or cdl finetune {options.out}")


def _act_inspect(options: Inspect) -> None:
    import yaml

    from contrastive_diffusion.checkpoints import inspect

    print(yaml.safe_dump(inspect(options.file), sort_keys=False, width=120).strip())


def _act_run(config: Any) -> None:
    import importlib

    from contrastive_diffusion.report import write
    from contrastive_diffusion.report.text import summary

    folder = importlib.import_module(type(config).__module__).run(config)
    page = write(folder)
    print(summary(folder))
    print(f"report: {page}")


def _act_sample(options: Sample) -> None:
    import io

    import numpy as np

    from contrastive_diffusion.files import write_atomic
    from contrastive_diffusion.parallel import Parallel
    from contrastive_diffusion.parallel.processes import first_process, world
    from contrastive_diffusion.runs import named_denoiser
    from contrastive_diffusion.sampling import Sequential, in_batches
    from contrastive_diffusion.solvers import solver as named_solver

    require(options.n >= 1, f"--n {options.n}", "at least 1")
    solver = named_solver(options.solver)
    levels = _levels(options, solver)
    denoiser, shape = named_denoiser(options.source, options.label)
    if hasattr(denoiser, "to"):
        denoiser = denoiser.to(options.device)  # pyright: ignore
    group = world(options.device) if options.parallel else None
    sampler = Parallel(solver, options.slope, options.window, options.tolerance, group=group) if options.parallel else Sequential(solver)
    with _bar(options, len(levels) - 1) as watch:
        drawn = in_batches(sampler, denoiser, levels, (options.n, *shape), options.seed, batch=options.batch, device=options.device, watch=watch)
    if not first_process(group):
        return
    buffer, n = io.BytesIO(), len(drawn.x)
    np.save(buffer, drawn.x.cpu().numpy())
    write_atomic(Path(options.out), buffer.getvalue())
    print(
        f"{n} samples in {options.out}: {drawn.evals:,} evaluations ({drawn.evals / n:,.0f} a sample), {drawn.rounds} rounds, {drawn.seconds:.2f} s"
    )
    if n < options.n:
        print(f"interrupted: {n} of {options.n} samples were finished")
        raise KeyboardInterrupt


def _levels(options: Sample, solver: Any) -> "Tensor":
    """The grid that --steps or --evals and --grid ask for."""
    from contrastive_diffusion.schedules import named_grid
    from contrastive_diffusion.solvers import natural_grid, natural_steps, steps_for

    require(options.steps is None or options.evals is None, "--steps and --evals", "one of the two")
    steps = steps_for(solver, options.evals) if options.evals is not None else options.steps
    grid = options.grid or natural_grid(solver)
    listed = not grid[:1].isalpha()
    return named_grid(grid, steps if steps is not None or listed else natural_steps(solver))


@contextmanager
def _bar(options: Sample, steps: int) -> "Iterator[Callable[[Any], None]]":
    """A progress bar over all batches, as what a sampler calls after each round."""
    from tqdm import tqdm

    batches = -(-options.n // max(options.batch, 1))
    with tqdm(total=steps * batches, desc="sample", unit="step", leave=False) as bar:
        seen = {"batch": 0}

        def watch(found: Any) -> None:
            seen["batch"] += found.number == 1
            place = (seen["batch"] - 1) * steps + min(found.begin, steps)
            bar.update(max(place - bar.n, 0))

        yield watch


def _act_estimate(options: EstimateCommand) -> None:
    import json

    from contrastive_diffusion.files import write_atomic
    from contrastive_diffusion.runs.estimate import estimate

    require(options.n >= 1, f"--n {options.n}", "at least 1")
    names, rows, header, more = estimate(options)
    width = max(16, *(len(name) for name in names))
    print("  ".join([f"{'x':>{width}}", *(f"{name:>16}" for name in header)]))
    for name, row in zip(names, rows, strict=True):
        print("  ".join([f"{name:>{width}}", *(f"{v:>16.4f}" for v in row)]))
    if options.out:
        named = [dict(zip(header, row, strict=True)) | {"x": name} | extra for name, row, extra in zip(names, rows, more, strict=True)]
        write_atomic(Path(options.out), json.dumps({"what": options.what, "source": options.source, "evals": options.evals, "rows": named}, indent=1))


def _act_report(options: Report) -> None:
    from contrastive_diffusion.report import write

    print(f"report: {write(options.run)}")


COMMANDS: dict[str, Command] = {
    "run": Command("Run an experiment, a table or figure of the paper: cdl run NAME [RECIPE].", _run_options, _act_run),
    "train": Command("Train a denoiser, or resume: cdl train [RECIPE].", _train_options, _act_train),
    "finetune": Command("Train on from a run or a converted checkpoint: cdl finetune SOURCE [RECIPE].", _finetune_options, _act_finetune),
    "convert": Command("Turn a foreign checkpoint into a model folder, executing nothing.", _simple(Convert, "convert"), _act_convert),
    "inspect": Command("Say what a checkpoint is.", _simple(Inspect, "inspect"), _act_inspect),
    "sample": Command("Draw samples, in sequence or in parallel.", _simple(Sample, "sample"), _act_sample),
    "estimate": Command("Estimate likelihood ratios, likelihoods or noise levels.", _simple(EstimateCommand, "estimate"), _act_estimate),
    "report": Command("Write the HTML page of a run again.", _simple(Report, "report"), _act_report),
    "list": Command("List experiments, recipes, toys, solvers, grids.", _simple(List, "list"), _act_list),
}
