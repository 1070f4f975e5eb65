"""Training: one loop as a generator, on one process or many, with every draw a function of (seed, step).

``config`` is how to train, ``feed`` what each pass sees, ``processes`` who does it, ``loop`` the step itself.
"""

from contrastive_diffusion.training.config import Training
from contrastive_diffusion.training.feed import Batch, Data, Feed, Rows, stream
from contrastive_diffusion.training.loop import State, Step, train
from contrastive_diffusion.training.processes import ALONE, Processes, join

__all__ = ["ALONE", "Batch", "Data", "Feed", "Processes", "Rows", "State", "Step", "Training", "join", "stream", "train"]
