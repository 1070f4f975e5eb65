"""The run folder: the resolved recipe, the environment, metrics as JSON lines, checkpoints by step, results.json, arrays, report.html.

Every file is written whole or not at all, so a run can be killed at any moment; the same command continues it, and ends in the same bits
as an uninterrupted run. A folder that belongs to another recipe is refused, never overwritten.
"""

import ctypes
import datetime
import json
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from contrastive_diffusion import __version__, checkpoints
from contrastive_diffusion.data.toys import TOYS, toy
from contrastive_diffusion.denoisers import Bounded, Denoiser
from contrastive_diffusion.errors import RunError, UsageError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.recipes import Train, load_data, plain, validate
from contrastive_diffusion.training import State, train

RESULTS_SCHEMA = 1


def environment() -> dict[str, Any]:
    """What a number depends on besides the recipe."""
    return {
        "package": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "cdl " + " ".join(sys.argv[1:]),
    }


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @staticmethod
    def open(path: str | Path, config: Any) -> "Run":
        """The folder at ``path`` for the recipe ``config``: a new one, or the same recipe's to be continued."""
        run, wanted = Run(Path(path)), plain(config)
        if run.recipe_file.exists():
            found = yaml.safe_load(run.recipe_file.read_text())
            changed = _differences(found, wanted)
            require(
                not changed,
                f"run folder {path} of another recipe ({'; '.join(changed[:3])})",
                "the same recipe",
                "choose another --out or remove the folder",
            )
        else:
            write_atomic(run.recipe_file, yaml.safe_dump(wanted, sort_keys=False))
        write_atomic(run.path / "environment.json", json.dumps(environment(), indent=1))
        return run

    @staticmethod
    def existing(path: str | Path, needs: str = "recipe.yaml") -> "Run":
        """The folder at ``path``, which must hold ``needs``."""
        require((Path(path) / needs).is_file(), f"run folder {path}", f"a folder with {needs}", "make one with cdl train or cdl run")
        return Run(Path(path))

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load(self.recipe_file.read_text())

    def environment(self) -> dict[str, Any]:
        return json.loads((self.path / "environment.json").read_text())

    def part(self, name: str, make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of work kept in ``parts/``: made once, loaded when the run is continued."""
        path = self.path / "parts" / f"{name}.safetensors"
        if not path.exists():
            checkpoints.save(path, *make())
        return checkpoints.load(path)

    def write_results(self, results: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        """results.json (with its schema version) and arrays.safetensors, what a report is made of."""
        checkpoints.save(self.path / "arrays.safetensors", {k: v.contiguous() for k, v in arrays.items()}, {})
        write_atomic(self.path / "results.json", json.dumps({"schema": RESULTS_SCHEMA} | results, indent=1))

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, None if there is none."""
        found = self.checkpoints()
        return checkpoints.load(found[-1]) if found else None

    def trained(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The newest checkpoint, which must be there."""
        latest = self.latest()
        if latest is None:
            raise UsageError(f"given run folder {self.path}, expected a folder with a checkpoint; train it first, or name one of its sub-folders")
        return latest


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [line for key in wanted | found for line in _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)]
    return [] if found == wanted else [f"{path} was {found}, now {wanted}"]


def fit(config: Train, *, position: int = 0, label: str = "train", out: str | None = None) -> Bounded:
    """Trains as ``config`` says in its run folder, resuming what is there, and returns the averaged denoiser.

    Args:
        position, label: of the progress bar. out: the run folder, ``config.out`` by default.
    """
    data = load_data(config.data)
    run = Run.open(out or config.out, config)
    dim = data.sample(1, torch.Generator().manual_seed(0)).shape[1]
    state = State(start_net(config, dim), config.training)
    latest = run.latest()
    if latest:
        state.restore(latest[0])
    metrics = _trim(run.path / "metrics.jsonl", state.step)
    every = max(1, config.training.steps // 200)
    bar = tqdm(
        total=config.training.steps, initial=state.step, desc=label, position=position, unit="step", mininterval=0.5 if sys.stderr.isatty() else 10
    )
    try:
        with open(metrics, "a") as log:
            for step in train(state, config.loss.build(), data, config.loss.bounded):
                bar.update()
                if step.number % every == 0:
                    bar.set_postfix(loss=f"{step.scalars['loss']:.3f}", refresh=False)
                    log.write(json.dumps({"step": step.number} | step.scalars) + "\n")
                if step.number % config.checkpoint_every == 0 or step.number == config.training.steps:
                    log.flush()
                    _checkpoint(run, state, config, dim)
    except OSError as error:
        raise RunError(f"given run folder {run.path}, expected to write there: {error.strerror}; free space or choose another --out") from error
    finally:
        bar.close()
    return config.loss.bounded(state.averaged).eval()


def start_net(config: Train, dim: int) -> nn.Module:
    """A fresh network, or that of the run ``config.init`` with its averaged weights."""
    net = config.net.build(dim, config.training.seed)
    if config.init is not None:
        _load_average(net, Run.existing(config.init).trained()[0], config.init)
    return net


def _load_average(net: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """The averaged weights of the checkpoint of the run folder ``path``, into ``net``."""
    weights = {k.removeprefix("ema.module."): v for k, v in tensors.items() if k.startswith("ema.module.")}
    same = {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in net.state_dict().items()}
    require(same, f"the network of {path}", "the network of this recipe (net.kind, width, blocks, octaves, dimension of the data)")
    net.load_state_dict(weights)


def load_denoiser(path: str | Path) -> tuple[Bounded, tuple[int, ...]]:
    """The averaged denoiser of a trained run folder, and the shape S of its data."""
    tensors, meta = Run.existing(path).trained()
    config, dim = validate(Train, meta["recipe"], str(path)), int(meta["dim"])
    net = config.net.build(dim, 0)
    _load_average(net, tensors, path)
    return config.loss.bounded(net).eval(), (dim,)


def named_denoiser(name: str) -> tuple[Denoiser, tuple[int, ...]]:
    """The denoiser of a run folder, or the exact one of a toy mixture."""
    if name in TOYS:
        law = toy(name)
        require(hasattr(law, "log_prob"), f"toy {name!r}", "a toy whose law is a mixture (circles, dino, eight-gaussians, two-modes)")
        return law, tuple(law.shape)  # pyright: ignore
    require(Path(name).exists(), f"{name!r}", f"a run folder or one of {', '.join(TOYS)}")
    return load_denoiser(name)


def _checkpoint(run: Run, state: State, config: Train, dim: int, keep: int = 2) -> None:
    meta = {"recipe": plain(config), "step": state.step, "dim": dim, "package": __version__}
    checkpoints.save(run.path / "checkpoints" / f"step-{state.step:08d}.safetensors", state.tensors(), meta)
    for old in run.checkpoints()[:-keep]:
        old.unlink()


def _trim(path: Path, step: int) -> Path:
    """Drops the lines that a killed run wrote after its last checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # a half-written last line
    write_atomic(path, "".join(kept))
    return path


def tune_process(threads: int = 1) -> None:
    """One OpenMP thread, and an allocator that keeps freed memory: the page faults of large temporaries halve the speed of small nets.

    For programs, not for libraries: the command and its worker processes call it.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
                mallopt(parameter, 2**30)


Task = tuple[Callable[..., Any], tuple[Any, ...]]


def work(tasks: list[Task], jobs: int) -> list[Any]:
    """Results of ``function(*args, position=slot)`` for each task, in order, over ``jobs`` processes of one thread; the first failure ends all."""
    if jobs == 1 or len(tasks) == 1:
        return [function(*args, position=0) for function, args in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _start_worker, (context.RLock(),)) as pool:
        futures = [pool.submit(function, *args, position=index % jobs) for index, (function, args) in enumerate(tasks)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for process in list((pool._processes or {}).values()):  # the others would otherwise run to their end
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _start_worker(lock: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all processes; the parent ends the workers, in one line
    tqdm.set_lock(lock)
    tune_process()
