"""The image networks equal the published ones: names, shapes, counts by fingerprint; values by golden vectors on a formula's weights."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contrastive_diffusion.nets import DDPMUNet, Preconditioned, SongUNet
from contrastive_diffusion.nets.layers import Conv, Resample
from contrastive_diffusion.nets.preconditioning import PRECONDITIONING, vp_sigma

NCSN = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "taps": (1, 3, 3, 1)}
CIFAR, LARGE = {"resolution": 32, "channel_mult": (2, 2, 2), "augment_dim": 9}, {"resolution": 64, "augment_dim": 9}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    lines = sorted(f"{name}\t{','.join(map(str, value.shape))}" for name, value in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fill(net: nn.Module) -> None:
    """Weights from a formula: uniform numbers that any implementation makes alike."""
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("resample_filter")}
    for k, name in enumerate(sorted(tensors)):
        value = tensors[name]
        r = np.sin(12.9898 * (np.arange(value.numel()) + 1.0) + 78.233 * (k + 1)) * 43758.5453
        u = 2 * (r - np.floor(r)) - 1
        if value.dim() >= 2:
            u *= math.sqrt(3 / math.prod(value.shape[1:]))
        elif not name.endswith("freqs"):
            u = 0.1 * u + ("norm" in name and name.endswith(".weight"))
        value.copy_(torch.from_numpy(u.reshape(value.shape)))


def wave() -> Tensor:
    return torch.cos(0.1 * torch.arange(1536, dtype=torch.float64)).reshape(2, 3, 16, 16).float()


@pytest.mark.parametrize(
    ("options", "parameters", "entries", "digest"),
    [
        (CIFAR, 55_733_891, 425, "d2d2ac16abddaac40374f6a4e754807b6e3d42a83e4dceb7061943eb0ab8a84d"),
        (CIFAR | {"label_dim": 10}, 55_735_299, 427, "6c2ce61dc35aa88731a7a387bdcad24c2cd0c6c7994500b472e57013a5508f82"),
        (LARGE, 61_805_571, 553, "505933aeb059e311d175a861faeec728f6b76905c4afc5e1054936314fc76fe1"),
        (CIFAR | NCSN, 56_397_827, 432, "7d4ec07efa7bd0d874aadb5e1a3f04ae81072d944eccb87a1a60f55523b778ae"),
        (CIFAR | NCSN | {"label_dim": 10}, 56_400_643, 434, "1e0b49e8cbc9378a74086d3920084dbb64bd3d516abe22f7af5a9c174b59f399"),
        (LARGE | NCSN, 62_761_091, 563, "5da206f2859fe29dd4cb4aaa1efc25e63ea6a09baf1120ce6a5cabf5f3202894"),
    ],
    ids=["cifar-vp", "cifar-cond-vp", "64-vp", "cifar-ve", "cifar-cond-ve", "64-ve"],
)
def test_the_published_edm_networks_by_fingerprint(options, parameters, entries, digest):
    with torch.device("meta"):
        net = Preconditioned(SongUNet(**options))
    tensors = net.state_dict()
    assert (sum(p.numel() for p in net.parameters()), len(tensors), fingerprint(tensors)) == (parameters, entries, digest)
    heads = list(dict.fromkeys(name.split(".")[1] for name in tensors))
    assert heads == [h for h in ("map_noise", "map_label", "map_augment", "map_layer0", "map_layer1", "enc", "dec") if h in heads]


def test_the_published_ddpm_network_by_fingerprint():
    with torch.device("meta"):
        net = DDPMUNet()
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (35_746_307, 328)
    assert fingerprint(net.state_dict()) == "e35039df837e48994daf7ead34b53e380078b32b6c1bac59ecb4ab5d4f8bd7af"


GOLDEN = {
    "ddpm++": (
        {}, (149, 750_307, "8e99edcac36c8f04"),
        ((0.591409, 0.730691, 0.883387, 0.756436, -0.046208, 0.123284, 0.308779, 0.495786, 0.197617),
         (0.416109, 0.635711, 0.741329, 0.665458, 0.015972, -0.001286, 0.229453, 0.508960, 0.264293),
         (0.479922, 0.501214, 0.856088, 0.949719, 0.174677, 0.360868, 0.283577, 0.492357, 0.105850)),
    ),
    "ncsn++": (
        NCSN, (153, 755_715, "b6eb4ab6aac75e80"),
        ((0.375361, 0.552992, 0.834377, 0.801123, 0.162289, -0.096571, 0.121313, 0.605491, -0.034494),
         (0.376728, 0.605022, 0.788834, 0.760063, -0.293781, -0.378068, 0.157596, 0.566232, 0.416591),
         (0.281832, 0.536052, 0.690469, 0.624518, 0.204304, -0.074588, 0.120052, 0.554964, -0.041120)),
    ),
}  # fmt: skip


@pytest.fixture(params=GOLDEN)
def golden(request) -> tuple[Preconditioned, tuple, tuple]:
    options, counts, values = GOLDEN[request.param]
    net = SongUNet(16, label_dim=3, model_channels=32, channel_mult=(1, 2), num_blocks=1, attention=(8,), augment_dim=9, **options)
    net = Preconditioned(net).eval()
    fill(net)
    return net, counts, values


def test_edm_networks_by_value(golden):
    net, counts, values = golden
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters()), fingerprint(net.state_dict())[:16]) == counts
    x, sigma = wave(), torch.tensor([0.5, 3.0])
    labels, augment = torch.eye(3)[[0, 2]], torch.sin(torch.arange(18.0)).reshape(2, 9)
    s = sigma.reshape(2, 1, 1, 1)
    for expected, (c, a) in zip(values, ((labels, None), (None, None), (labels, augment)), strict=True):
        with torch.no_grad():
            d = net(x, sigma, c, a)
        f = (d - x * 0.25 / (s**2 + 0.25)) / (s * 0.5 / (s**2 + 0.25).sqrt())
        found = [*f[0, 0, 0, :4].tolist(), *f[1, 2, 15, -2:].tolist(), float(f.mean()), float(f.std(correction=0)), float(d[1, 1, 7, 7])]
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_the_ddpm_network_by_value():
    net = DDPMUNet(16, 3, 32, (1, 2), 1, (8,)).eval()
    fill(net)
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters()), fingerprint(net.state_dict())[:16]) == (144, 702_499, "18b3e4126cd0abc1")
    with torch.no_grad():
        out = net(wave(), torch.tensor([10, 500.5]))
    found = [*out[0, 0, 0, :4].tolist(), *out[1, 2, 15, -2:].tolist(), float(out.mean()), float(out.std(correction=0))]
    np.testing.assert_allclose(found, (-0.119639, -0.713936, -0.520284, -0.696707, -0.326695, 0.372970, -0.002384, 0.515697), atol=2e-5, rtol=0)


def test_preconditioning_at_its_limits():
    """As sigma falls D(y) tends to y; as it grows D of EDM forgets y. c_noise of VP is 999 t."""

    class Zero(nn.Module):
        def forward(self, x, c_noise, *_):
            self.seen = c_noise
            return torch.zeros_like(x).repeat(1, 2, 1, 1)  # as many channels as iddpm's network has: the first half counts

    y = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for kind in PRECONDITIONING:
        net = Preconditioned(Zero(), kind)
        torch.testing.assert_close(net(y, 1e-6), y)
        assert net.sigma_min < 1 < net.sigma_max
    assert float(Preconditioned(Zero(), "edm")(y, 1e8).abs().max()) < 1e-10
    vp = Preconditioned(Zero(), "vp")
    vp(y, torch.tensor([vp_sigma(t) for t in (0.1, 0.5, 1.0)], dtype=torch.float64))
    torch.testing.assert_close(vp.model.seen, 999 * torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    iddpm = Preconditioned(Zero(), "iddpm")
    iddpm(y, iddpm.u[[0, 500, 999]].double())
    assert iddpm.model.seen.tolist() == [999, 499, 0]
    assert bool((iddpm.u.diff() < 0).all())


def test_resampling_keeps_constants_and_is_the_plain_one_for_the_box():
    x = torch.randn(2, 3, 8, 8)
    for taps in ((1, 1), (1, 3, 3, 1)):
        up, down = Resample(up=True, taps=taps), Resample(down=True, taps=taps)
        assert float((up(torch.ones(1, 1, 8, 8))[..., 2:-2, 2:-2] - 1).abs().max()) < 1e-6
        assert float((down(torch.ones(1, 1, 8, 8))[..., 1:-1, 1:-1] - 1).abs().max()) < 1e-6
    torch.testing.assert_close(Resample(down=True)(x), Resample(down=True, taps=(1, 1)).resample(x, padding=0))
    # Fused is the same linear map as one after the other, up to the border.
    one = Conv(3, 4, 3, down=True, taps=(1, 3, 3, 1), fused=True)
    two = nn.functional.conv2d(x, one.weight, padding=2)
    two = nn.functional.conv2d(two, one.resample_filter.expand(4, 1, 4, 4), groups=4, stride=2)
    torch.testing.assert_close(one(x), two)


SMALL = {
    "ddpm++": lambda **kw: SongUNet(8, 1, model_channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,), augment_dim=9, label_dim=2, **kw),
    "ncsn++": lambda **kw: SongUNet(8, 1, model_channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,), **NCSN, **kw),
    "skip": lambda **kw: SongUNet(8, 1, model_channels=16, channel_mult=(1, 2), num_blocks=1, attention=(), encoder="skip", decoder="skip", **kw),
    "ddpm": lambda **kw: DDPMUNet(8, 1, 32, (1, 2), 1, (4,), **kw),
}


@pytest.fixture(params=SMALL)
def build(request):
    def make(**options):
        torch.manual_seed(0)
        return SMALL[request.param](**options)

    return make


def test_rows_are_independent_and_layouts_and_precisions_agree(build):
    net = build(dropout=0.0)
    with torch.no_grad():
        for p in net.parameters():  # the layers that start at almost zero would hide everything else
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / max(1, math.prod(p.shape[1:])) ** 0.5)
        x, level = torch.randn(3, 1, 8, 8), torch.tensor([-1.0, 0.3, 2.0])
        out = net(x, level)
        torch.testing.assert_close(net(x[1:], level[1:]), out[1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), level), out, rtol=1e-4, atol=1e-5
        )
        for dtype, error in ((torch.bfloat16, 0.05), (torch.float16, 0.007)):
            with torch.autocast("cpu", dtype):
                low = net(x, level)
            assert float((low.float() - out).abs().max()) < error * float(out.abs().max())
        torch.testing.assert_close(net.double()(x.double(), level.double()).float(), out, rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient(build):
    gradients = []
    for checkpointing in (False, True):
        net = build(dropout=0.0, checkpointing=checkpointing)
        net(torch.ones(2, 1, 8, 8), torch.zeros(2)).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_compiled_networks_agree(build):
    net = build(dropout=0.0).eval()
    x, level = torch.randn(2, 1, 8, 8), torch.zeros(2)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net)(x, level), net(x, level), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 12, "channel_mult": (1, 1, 1, 1)}, "given resolution 12 for 4 levels, expected a multiple of 8"),
        ({"resolution": 8, "embedding": "cosine"}, "given embedding 'cosine', expected one of positional, fourier"),
        ({"resolution": 8, "model_channels": 18}, "expected a multiple of 4"),
        ({"resolution": 8, "model_channels": 132}, "given (132|264) channels"),
    ],
)
def test_impossible_networks_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        SongUNet(**options)
