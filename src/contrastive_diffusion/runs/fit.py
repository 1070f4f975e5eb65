"""Training in a run folder: resumed where it stands, logged, checkpointed, looked at on the way; on one process or several."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contrastive_diffusion import __version__, checkpoints
from contrastive_diffusion.denoisers import Bounded
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.recipes import Train, plain
from contrastive_diffusion.runs.folder import Run
from contrastive_diffusion.runs.start import Start, described, start
from contrastive_diffusion.runs.watching import Logger, look, open_logger
from contrastive_diffusion.training import Processes, State, Step, join, train


def fit(config: Train, *, position: int = 0, label: str = "train", out: str | None = None) -> Bounded:
    """Trains as ``config`` says in its run folder, resuming what is there, and returns the averaged denoiser (without labels).

    Under torchrun every process calls this; the first one writes.

    Args:
        position, label: of the progress bar. out: the run folder, ``config.out`` by default.
    """
    processes = join(config.device)
    begun = start(config)
    run = _open(processes, config, begun, out or config.out)
    net = begun.net.to(processes.device)
    state = State(net, config.training, processes)
    latest = run.latest()
    if latest:
        state.restore(latest[0])
    processes.wait()
    metrics = _trim(run.path / "metrics.jsonl", state.step) if processes.first else run.path / "metrics.jsonl"
    bar = tqdm(
        total=config.training.steps, initial=state.step, desc=label, position=position, unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10, disable=not processes.first,
    )  # fmt: skip
    try:
        with (
            open(metrics if processes.first else os.devnull, "a") as log,
            open_logger(config.watch.logger if processes.first else "none", run.path) as logger,
        ):
            for step in train(state, config.loss.build(_sigma_data(config, begun)), begun.feed, config.loss.bounded, processes):
                bar.update()
                if processes.first:
                    _record(config, step, log, logger, bar)
                _save(config, run, state, begun, processes, log)
                _look(config, run, state, begun, processes, logger)
    except OSError as error:
        raise RunError(f"given run folder {run.path}, expected to write there: {error.strerror}; free space or choose another --out") from error
    finally:
        bar.close()
    return config.loss.bounded(state.averaged).eval()


def _sigma_data(config: Train, begun: Start) -> float:
    """Of EDM's weight: the network's own for images, 1 for standardised vectors."""
    return 1.0 if begun.spec is None else begun.spec.sigma_data


def _open(processes: Processes, config: Train, begun: Start, out: str) -> Run:
    """The run folder, made by the first process; a set of images must be the one it was begun with."""
    if processes.first:
        run = Run.open(out, config, accept=config.changed == "accept")
        source = getattr(begun.feed.data, "source", None)
        if source is not None:
            file, found = run.path / "data.json", {"sha256": source.content_hash(), "images": len(source)}
            before = json.loads(file.read_text()) if file.exists() else found
            accepted = before == found or config.changed == "accept"
            require(
                accepted,
                f"{config.data} with {found['images']} images, content {found['sha256'][:12]}",
                f"that of {file}, {before['sha256'][:12]}",
                "go on with --changed accept",
            )
            write_atomic(file, json.dumps(found))
    processes.wait()
    return Run(Path(out))


def _record(config: Train, step: Step, log: Any, logger: Logger, bar: tqdm) -> None:
    if step.number % max(1, config.training.steps // 200) == 0:
        bar.set_postfix(loss=f"{step.scalars['loss']:.3f}", refresh=False)
        log.write(json.dumps({"step": step.number} | step.scalars) + "\n")
        logger.scalars(step.number, step.scalars)


def _save(config: Train, run: Run, state: State, begun: Start, processes: Processes, log: Any, keep: int = 2) -> None:
    """A checkpoint, where one is due."""
    if state.step % config.checkpoint_every and state.step != config.training.steps:
        return
    with processes.watched():
        tensors = state.tensors() if processes.first or state.sharded else {}
    if not processes.first:
        return
    log.flush()
    meta = {"recipe": plain(config), "step": state.step, "package": __version__, **described(begun, config)}
    checkpoints.save(run.path / "checkpoints" / f"step-{state.step:08d}.safetensors", tensors, meta)
    for old in run.checkpoints()[:-keep]:
        old.unlink()


def _look(config: Train, run: Run, state: State, begun: Start, processes: Processes, logger: Logger) -> None:
    """Validation and a grid of samples, where they are due; the other processes wait."""
    if not config.watch.every or begun.spec is None or (state.step % config.watch.every and state.step != config.training.steps):
        return
    averaged = state.averaged
    if processes.first:
        mode = state.net.training
        scalars = look(config, begun, averaged.eval(), run.path, state.step)
        logger.scalars(state.step, scalars)
        state.net.train(mode)
    processes.wait()


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
