"""Runs: the folder (``folder``), training in it (``fit``), what it is worth on the way (``watching``), and work in processes (``pool``).

Every file of a run is written whole or not at all, so a run can be killed at any moment; the same command continues it, and ends in the
same bits as an uninterrupted run.
"""

from contrastive_diffusion.runs.fit import fit
from contrastive_diffusion.runs.folder import RESULTS_SCHEMA, Run, environment
from contrastive_diffusion.runs.pool import Task, tune_process, work
from contrastive_diffusion.runs.start import Trained, load_denoiser, load_trained, named_denoiser, start_net

__all__ = [
    "RESULTS_SCHEMA", "Run", "Task", "Trained", "environment", "fit", "load_denoiser", "load_trained", "named_denoiser", "start_net", "tune_process", "work",
]  # fmt: skip
