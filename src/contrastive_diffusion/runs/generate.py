"""N samples of a source in shards, by one process or several, killed and resumed at will: what ``cdl generate`` does.

A sample is a function of (source, solver, grid, sampler, seed, id); its class one of (seed, id). So the processes need no communication: shard k
belongs to one of them, and a shard that is on disk is never made again. Bytes do not depend on batch size, number of processes or the
order of shards for a denoiser that is batch-invariant (the exact ones are); a network on the CPU or GPU may round differently in batches of
another size, which moves a few bytes by one.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from contrastive_diffusion import __version__
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.runs.generated import FORMAT, MANIFEST, STORAGE, VERSION, Generated, Shard, image_name, open_generated, to_bytes
from contrastive_diffusion.runs.pool import stepping
from contrastive_diffusion.runs.source import Source, labels_of, open_source
from contrastive_diffusion.sampling import Sampler, Sequential, Watch
from contrastive_diffusion.solvers import levels_for, natural_grid
from contrastive_diffusion.solvers import solver as named_solver
from contrastive_diffusion.training import Processes, join

PARTS = ".parts"  # what is known of an unfinished set
WAIT = 30 * 86400.0  # seconds that a process waits for the others at the end


@dataclass(frozen=True)
class Request:
    """Generate a set of samples in shards with a manifest; under torchrun, by all processes. The same command continues an interrupted one."""

    source: Annotated[str, "positional"]
    """A run folder, a model folder of cdl convert, or a toy whose law is a mixture."""
    out: str
    """The folder to write."""
    n: int = 50000
    """Number of samples."""
    solver: str = "ddpm"
    """Step map, with options if wanted: heun, ddim:eta=0.5, edm:churn=40,s_noise=1.007; see cdl list solvers."""
    steps: int | None = None
    """Steps of the grid; 1000 for ddpm and the like, 100 for deterministic and higher-order solvers."""
    evals: int | None = None
    """Denoiser evaluations per sample, instead of --steps: the most steps that they pay for."""
    grid: str | None = None
    """Noise levels: karras, uniform:low=-8,high=10, ... (cdl list grids), or log-SNRs "-8,-2,0,4"; the solver's usual one by default."""
    parallel: bool = False
    """Many steps of a sample at once instead of one after another."""
    slope: str = "secant"
    """Of --parallel: secant (measured), gauss, picard, ... (cdl list slopes)."""
    window: int | None = None
    """Steps of a sample worked on at once by --parallel; 64 by default, or all of a shorter grid."""
    tolerance: float = 0.02
    """Of --parallel; 0 is exactly the sequential sample."""
    seed: int = 0
    """Sample i of a seed is the same whatever n."""
    first: int = 0
    """The first sample id; the others follow. Ids play the part of EDM's seeds of single images."""
    label: str | None = None
    """Classes of a network trained on labels: random (default), balanced, none, or classes in turn as 0,3,5. Functions of the id."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged (default) or last weights of a run; a model folder has one kind."""
    format: Literal["npz", "png"] = "npz"
    """Shards of bytes (vectors: float32), or images in EDM's folders."""
    shard: int = 1000
    """Samples in a shard: what an interruption can cost."""
    batch: int = 250
    """Samples drawn at a time."""
    rows: int = 1024
    """Rows in a call of the network."""
    device: str = "cpu"
    """cpu, or cuda: under torchrun each process takes its own."""


FREE = ("source", "out", "batch", "rows", "device", "evals")  # what may change when a set is continued


@dataclass(frozen=True)
class Work:
    """A request with its names resolved."""

    request: Request
    source: Source
    sampler: Sampler
    levels: Tensor

    @property
    def path(self) -> Path:
        return Path(self.request.out)

    @property
    def shards(self) -> int:
        return -(-self.request.n // self.request.shard)

    def ids(self, number: int) -> Tensor:
        """The sample ids of a shard."""
        begin, size = number * self.request.shard, self.request.shard
        return torch.arange(begin, min(begin + size, self.request.n)) + self.request.first

    def labels(self, ids: Tensor) -> Tensor | None:
        return labels_of(self.request.label, ids, self.request.seed, self.source.label_dim)

    def identity(self) -> dict[str, Any]:
        """What the samples depend on, and how they are stored."""
        r = self.request
        kept = {key: value for key, value in asdict(r).items() if key not in (*FREE, "parallel", "slope", "window", "tolerance")}
        how = f"parallel:slope={r.slope},window={r.window},tolerance={r.tolerance}" if r.parallel else "sequential"
        label = r.label or ("random" if self.source.label_dim else "none")
        found = {"sampler": how, "source_hash": self.source.sha256, "weights": self.source.weights, "label": label, "shape": list(self.source.shape)}
        return kept | found | {"steps": len(self.levels) - 1, "grid": r.grid or natural_grid(named_solver(r.solver))}


def generate(request: Request, position: int = 0, label: str = "generate") -> Generated | None:
    """Does what is left of ``request`` and returns the finished set; None in all processes but the first. ``position``, ``label``: of the bar."""
    processes = join(request.device, WAIT)
    work = _prepare(request, processes)
    _begin(work, processes)
    missing = [number for number in range(work.shards) if _part(work, number) is None]
    processes.wait()  # until all have looked
    mine = missing[processes.rank :: processes.world]
    batches = sum(-(-len(work.ids(number)) // request.batch) for number in mine)
    label += f", process 1 of {processes.world}" if processes.world > 1 else ""
    with stepping(label, len(work.levels) - 1, batches, position, hidden=not processes.first or not mine) as watch:
        for number in mine:
            _make(work, number, processes, watch)
    processes.wait()
    return _finish(work) if processes.first else None


def _prepare(request: Request, processes: Processes) -> Work:
    """The request with its names resolved and its numbers checked."""
    for name in ("n", "shard", "batch", "rows"):
        require(getattr(request, name) >= 1, f"--{name} {getattr(request, name)}", "at least 1")
    require(request.seed >= 0 and request.first >= 0, f"--seed {request.seed} --first {request.first}", "both >= 0")
    solver = named_solver(request.solver)
    levels = levels_for(solver, request.steps, request.evals, request.grid)
    sampler: Sampler = Sequential(solver, request.rows)
    if request.parallel:
        sampler = Parallel(solver, request.slope, request.window, request.tolerance, max_rows=request.rows)
    source = open_source(request.source, request.weights, processes.device)
    require(request.format == "npz" or len(source.shape) == 3, f"--format png of samples of shape {source.shape}", "images", "use npz")
    require(request.format == "npz" or source.shape[0] in (1, 3), f"--format png of {source.shape[0]} channels", "1 or 3", "use npz")
    labels_of(request.label, torch.arange(1), request.seed, source.label_dim)
    return Work(request, source, sampler, levels)


def _begin(work: Work, processes: Processes) -> None:
    """Refuses a folder of another request; otherwise it is ours from here on."""
    path, wanted = work.path, work.identity()
    known = next((f for f in (path / MANIFEST, path / PARTS / "request.json") if f.is_file()), None)
    if known is None:
        require(not path.exists() or (path.is_dir() and not any(path.iterdir())), f"{path}, which holds something else", "a new or empty folder")
    else:
        found = _json(known)
        changed = [f"{key} was {_short(found.get(key))}, now {_short(value)}" for key, value in wanted.items() if found.get(key) != value]
        require(not changed, f"{path} of another request ({'; '.join(changed[:3])})", "the same request", "choose another --out or remove the folder")
    processes.wait()
    if processes.first and known is None:
        write_atomic(path / PARTS / "request.json", json.dumps(wanted))
    processes.wait()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}..."


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"given {path}, expected JSON: {error}; remove the folder") from error


def _part(work: Work, number: int) -> dict[str, Any] | None:
    """The manifest's entry of a shard that is there, None if it is to be made."""
    finished, file = work.path / MANIFEST, work.path / PARTS / f"{number:06d}.json"
    if not finished.is_file() and not file.is_file():
        return None
    entry = _json(finished)["shards"][number] if finished.is_file() and not file.is_file() else _json(file)
    return entry if all((work.path / name).is_file() for name in STORAGE[work.request.format].files(entry)) else None


def _make(work: Work, number: int, processes: Processes, watch: Watch) -> None:
    """Draws and writes a shard, then the word that it is there."""
    ids, drawn = work.ids(number), []
    labels = work.labels(ids)
    for index in torch.arange(len(ids)).split(work.request.batch):
        denoiser = work.source.denoiser(None if labels is None else one_hot(labels[index], work.source.label_dim).float().to(processes.device))
        shape, first = (len(index), *work.source.shape), int(ids[index[0]])
        drawn.append(work.sampler(denoiser, work.levels, shape, work.request.seed, first=first, device=processes.device, watch=watch))
    x = torch.cat([d.x.cpu() for d in drawn])
    shard = Shard(ids, to_bytes(x) if x.dim() == 4 else x, labels)
    file = STORAGE[work.request.format].write(work.path, number, shard)
    spent = {"evals": sum(d.evals for d in drawn), "seconds": round(sum(d.seconds for d in drawn), 3)}
    entry = {"file": file, "first": int(ids[0]), "n": len(ids), "sha256": shard.sha256(), **spent}
    write_atomic(work.path / PARTS / f"{number:06d}.json", json.dumps(entry))


def _finish(work: Work) -> Generated:
    """The manifest, once all shards are there; what was only needed on the way goes."""
    path = work.path
    if (path / PARTS).is_dir():
        shards = [part for number in range(work.shards) if (part := _part(work, number)) is not None]
        evals, seconds = (sum(entry[key] for entry in shards) for key in ("evals", "seconds"))
        labels = work.labels(torch.arange(work.request.n) + work.request.first)
        if work.request.format == "png" and labels is not None:
            named = [[image_name(i + work.request.first), label] for i, label in enumerate(labels.tolist())]
            write_atomic(path / "dataset.json", json.dumps({"labels": named}))
        about = {"type": FORMAT, "version": VERSION, "package": __version__, "torch": torch.__version__, "source": work.source.name}
        cost = {"evals_per_sample": evals / work.request.n, "seconds": seconds}
        write_atomic(path / MANIFEST, json.dumps(about | work.identity() | cost | {"shards": shards}, indent=1))
        shutil.rmtree(path / PARTS)
        for stray in (file for kind in ("npz", "png", "json") for file in path.rglob(f".*.{kind}.*")):  # half-written, of killed processes
            stray.unlink()
    return open_generated(path)
