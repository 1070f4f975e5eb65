"""The bundled classifier of 8 x 8 digits whose features the evaluation uses, and the command that trained it.

python -m contrastive_diffusion.evaluation.classifier OUT.safetensors

Two convolutions and two linear layers, 9,000 numbers, trained for half a minute on the digits of scikit-learn less the 297 that `cdl run digits`
holds out: the file says its accuracy on both. Its features are the 32 activations below the last layer; SiLU, so that none is dead and
their covariance has full rank.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contrastive_diffusion import checkpoints
from contrastive_diffusion.data.images import digit_labels, open_images
from contrastive_diffusion.errors import require

FILE = Path(__file__).with_name("digits.safetensors")
HELD = 297


class Classifier(nn.Module):
    """Grey images (n, 1, R, R) in [-1, 1], R a multiple of 4 -> logits (n, classes)."""

    def __init__(self, resolution: int = 8, channels: int = 1, width: int = 32, classes: int = 10):
        super().__init__()
        self.meta = {"kind": "classifier", "resolution": resolution, "channels": channels, "width": width, "classes": classes}
        self.body = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(width // 2, width, 3, padding=1), nn.SiLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(width * (resolution // 4) ** 2, width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier of this architecture and what its file says about it."""
    tensors, meta = checkpoints.load(path)
    require(
        meta.get("kind") == "classifier",
        f"{path} of kind {meta.get('kind')!r}",
        "a classifier written by contrastive_diffusion.evaluation.classifier",
    )
    net = Classifier(*(int(meta[key]) for key in ("resolution", "channels", "width", "classes")))
    same = {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    require(same, f"{path} with tensors of other shapes", "those its header describes")
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False), meta


def train(x: Tensor, labels: Tensor, seed: int = 0, epochs: int = 80, batch: int = 64) -> Classifier:
    """A classifier of images x (n, 1, 8, 8) in [-1, 1] and their labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        at = torch.randint(len(x), (batch,), generator=generator)
        loss = cross_entropy(net(x[at]), labels[at], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def accuracy(net: Classifier, x: Tensor, labels: Tensor) -> float:
    return float((net(x).argmax(1) == labels).double().mean())


def main(out: str) -> None:
    kept, held = open_images("digits").split(HELD)
    labels = digit_labels()
    net = train(kept.all()[0], labels[torch.from_numpy(kept.index)])
    found = {name: accuracy(net, part.all()[0], labels[torch.from_numpy(part.index)]) for name, part in (("train", kept), ("held-out", held))}
    checkpoints.save(out, {k: v.contiguous() for k, v in net.state_dict().items()}, net.meta | {"data": "digits", "held": HELD, "accuracy": found})
    print(f"{out}: accuracy {found['held-out']:.4f} on {HELD} held-out digits, {found['train']:.4f} on the others")


if __name__ == "__main__":
    main(sys.argv[1])
