"""Diffusion models whose denoiser is right where samplers actually go.

The package reads in import order: ``errors``, ``files``, ``channel``, ``schedules``, ``denoisers``, ``likelihood``, ``objectives``,
``nets``, ``data``, ``training``, ``solvers``, ``sampling``, ``parallel``, ``metrics``, ``checkpoints``, ``recipes``,
``runs``, ``experiments``, ``report``, ``cli``. Import the module you need; nothing is loaded here, so ``cdl --help`` stays instant.
"""

__version__ = "0.1.0"
