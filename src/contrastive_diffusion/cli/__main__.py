"""``python -m contrastive_diffusion.cli``, as torchrun starts it."""

import sys

from contrastive_diffusion.cli import main

sys.exit(main())
