"""Checkpoints: our own (safetensors with JSON in the header) and those of others, converted without executing anything in them.

``checkpoints.model.Model`` is a converted or trained network with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.
"""

from contrastive_diffusion.checkpoints.foreign import convert, inspect
from contrastive_diffusion.checkpoints.store import FORMAT, VERSION, load, save

__all__ = ["FORMAT", "VERSION", "convert", "inspect", "load", "save"]
