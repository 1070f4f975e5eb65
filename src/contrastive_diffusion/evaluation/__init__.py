"""Generated sets against references: what is compared (samples), in which features (extractors), against what (references), and how (score).

Samples become bytes before any feature is taken, as they would be on a disk. Nothing in an extractor's file is executed before its operators
have been read, and only Inception's features may be called FID's.
"""

from contrastive_diffusion.evaluation.extractors import EXTRACTORS, Extractor, extractor
from contrastive_diffusion.evaluation.references import Reference, features, reference
from contrastive_diffusion.evaluation.samples import Samples, open_samples
from contrastive_diffusion.evaluation.score import METRICS, Measure, compare, evaluate

__all__ = [
    "EXTRACTORS", "METRICS", "Extractor", "Measure", "Reference", "Samples", "compare", "evaluate", "extractor", "features", "open_samples", "reference",
]  # fmt: skip
