"""Images: every kind of source read to the byte, every kind of damage told by name, augmentation that is exact where it can be."""

import io
import json
import math
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive_diffusion.data import augment as augmentation
from contrastive_diffusion.data.archives import Array, open_source
from contrastive_diffusion.data.augment import augment, resample
from contrastive_diffusion.data.images import Images, open_images
from contrastive_diffusion.errors import UsageError
from contrastive_diffusion.training import Feed, Training
from contrastive_diffusion.training.feed import order

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
LABELS = [3, 0, 2, 1, 3, 0, 2]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _files(labels: bool = True) -> dict[str, bytes]:
    """The layout of EDM's archives."""
    names = [f"00000/img{i:08d}.png" for i in range(len(PIXELS))]
    listed = [[n, label] for n, label in zip(names, LABELS, strict=True)] if labels else None
    return dict(zip(names, map(_png, PIXELS), strict=True)) | {"dataset.json": json.dumps({"labels": listed}).encode()}


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _cifar(path: Path, binary: bool, images: np.ndarray, labels: list[int]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            x, y = images[2 * index : 2 * index + 2], labels[2 * index : 2 * index + 2]
            if binary:
                raw = b"".join(bytes([label]) + image.tobytes() for image, label in zip(x, y, strict=True))
            else:
                raw = pickle.dumps({b"data": x.reshape(len(x), -1), b"labels": y, b"batch_label": b"x"}, protocol=2)
                raw = pickle.dumps({k.decode(): v for k, v in pickle.loads(raw).items()}, protocol=2)
            info = tarfile.TarInfo(f"cifar/{name}{'.bin' if binary else ''}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "npy"])
def test_the_same_images_from_every_source(kind, tmp_path):
    if kind == "folder":
        name = _folder(tmp_path / "f", _files())
    elif kind == "zip":
        name = _zip(tmp_path / "f.zip", _files())
    elif kind == "npz":
        np.savez(name := tmp_path / "f.npz", images=PIXELS.transpose(0, 2, 3, 1), labels=LABELS)
    else:
        np.save(name := tmp_path / "f.npy", PIXELS)
    found = open_images(str(name), labels=kind != "npy")
    x, labels = found.all()
    assert x.equal(torch.from_numpy(PIXELS).float() * (2 / 255) - 1)
    assert found.shape == (3, 8, 8)
    if kind != "npy":
        assert labels is not None
        assert labels.equal(torch.nn.functional.one_hot(torch.tensor(LABELS)).float())
    assert open_source(name).content_hash() == open_source(name).content_hash()


def test_class_folders_make_labels_and_the_content_hash_sees_a_changed_byte(tmp_path):
    folder = _folder(tmp_path / "f", {f"{'cat' if i % 2 else 'bird'}/{i}.png": _png(p) for i, p in enumerate(PIXELS)})
    source = open_source(folder)
    assert source.labels is not None
    assert source.labels.tolist() == [0] * 4 + [1] * 3
    before = source.content_hash()
    (folder / "cat" / "1.png").write_bytes(_png(PIXELS[0]))
    assert open_source(folder).content_hash() != before
    with pytest.raises(UsageError, match=r"without labels.*dataset\.json or class folders"):
        open_images(str(_folder(tmp_path / "g", _files(labels=False))), labels=True)


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_cifar_archives(binary, tmp_path):
    images, labels = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), [*range(10), 0, 1]
    path = _cifar(tmp_path / "cifar.tar.gz", binary, images, labels)
    found, test = open_images(str(path), labels=True), open_images(str(path), labels=True, test=True)
    assert found.all()[0].equal(torch.from_numpy(images[:10]).float() * (2 / 255) - 1)
    assert test.all()[0].equal(torch.from_numpy(images[10:]).float() * (2 / 255) - 1)
    assert found.label_dim == 10
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "open", filter="data")
    assert open_images(str(tmp_path / "open")).all()[0].equal(found.all()[0])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"a whole tar archive|a batch of CIFAR-10|the whole archive"):
        open_images(str(path))


def test_a_hostile_cifar_batch_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("code was executed",)

    for name in (f"data_batch_{i}" for i in range(1, 6)):
        (tmp_path / name).write_bytes(pickle.dumps({"data": Bomb()}))
    with pytest.raises(UsageError, match="expected only numpy's; nothing was executed"):
        open_images(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"00000/img00000003.png": b"\x89PNG junk"}, r"img00000003\.png, expected a whole image.*set images\.corrupt to skip"),
        ({"00000/img00000003.png": _png(PIXELS[0])[:60]}, r"img00000003\.png, expected a whole image"),
        ({"00000/img00000003.png": _png(PIXELS[0, :, :, :5])}, r"img00000003\.png of 5 x 8 pixels, expected 8 x 8; set images\.resolution"),
        ({"dataset.json": b'{"labels": [["00000/img00000000.png", 1]]}'}, r"without a label for 00000/img00000001\.png and 5 more"),
        ({"dataset.json": json.dumps({"labels": [[f"00000/img{i:08d}.png", -1] for i in range(7)]}).encode()}, r"label -1, expected labels in 0"),
        ({"dataset.json": b"{"}, r"dataset\.json, expected"),
    ],
)
def test_damage_is_named(change, message, tmp_path):
    folder = _folder(tmp_path / "f", _files() | change)
    with pytest.raises(UsageError, match=message) as caught:
        open_images(str(folder), labels=True).all()
    assert "\n" not in str(caught.value)


def test_channels_are_not_mixed_and_grey_becomes_colour_only(tmp_path):
    folder = _folder(tmp_path / "f", {"a.png": _png(PIXELS[0]), "b.png": _png(PIXELS[1, :1])})
    assert open_images(str(folder)).all()[0][1].equal(torch.from_numpy(PIXELS[1, :1]).float().repeat(3, 1, 1) * (2 / 255) - 1)
    with pytest.raises(UsageError, match=r"a\.png with 3 channels, expected 1"):
        open_images(str(folder), channels=1).all()


def test_broken_images_are_skipped_on_request(tmp_path):
    folder = _folder(tmp_path / "f", _files() | {"00000/img00000003.png": b"junk"})
    found = open_images(str(folder), corrupt="skip", labels=True)
    with pytest.warns(UserWarning, match=r"skipped: .*img00000003"):
        x, labels = found.rows(torch.tensor([3, 3, 4]))
    assert x[0].equal(x[2])
    assert labels is not None
    assert labels[0].equal(labels[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.rows(torch.tensor([3]))  # told once


def test_resizing_crops_the_centre_and_antialiases(tmp_path):
    stripes = np.zeros((3, 40, 64), np.uint8)
    stripes[:, :, ::2] = 255
    folder = _folder(tmp_path / "f", {"a.png": _png(stripes)})
    with pytest.raises(UsageError, match="expected square ones"):
        open_images(str(folder))
    x = open_images(str(folder), resolution=8).all()[0]
    assert x.shape == (1, 3, 8, 8)
    assert float(x.abs().max()) < 0.1  # without antialiasing some stripes would survive


def test_splits_are_disjoint_and_whole():
    data = Images(Array(np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1), None, "x"), (1, 1, 1), 0, False, "stop", np.arange(60))
    kept, held = data.split(13)
    assert len(held) == 13
    assert sorted([*kept.index, *held.index]) == list(range(60))
    assert data.split(13)[1].index.tolist() == held.index.tolist()
    with pytest.raises(UsageError, match="less than the whole set"):
        data.split(60)


def test_bundled_sets():
    pytest.importorskip("sklearn")
    from contrastive_diffusion.data.images import digit_labels, digits

    found = open_images("digits", labels=True)
    x, labels = found.all()
    assert x.equal(digits())
    assert (x.shape, float(x.min()), float(x.max())) == ((1797, 1, 8, 8), -1.0, 1.0)
    assert labels is not None
    assert labels.argmax(1).equal(digit_labels())
    pytest.importorskip("skimage")
    patches = open_images("patches")
    assert patches.shape == (3, 32, 32)
    assert len(patches) > 5000


def test_sym6_is_an_orthogonal_wavelet_with_six_vanishing_moments():
    h = torch.tensor(augmentation.SYM6, dtype=torch.float64)
    assert float(h.sum()) == pytest.approx(math.sqrt(2))
    for m in range(1, 6):
        assert abs(float((h[: 12 - 2 * m] * h[2 * m :]).sum())) < 1e-11
    for k in range(6):
        assert abs(float((h * (-1.0) ** torch.arange(12) * torch.arange(12.0, dtype=torch.float64) ** k).sum())) < 1e-8


def _smooth(n: int = 4, size: int = 32) -> torch.Tensor:
    """Images without detail at the pixel's scale."""
    u = torch.linspace(0, 2 * math.pi, size, dtype=torch.float64)
    waves = [torch.sin((k % 3 + 1) * u)[:, None] * torch.cos((k % 2 + 1) * u + k)[None] for k in range(n)]
    return torch.stack(waves)[:, None]


def test_resampling_is_exact_for_the_identity_whole_shifts_and_close_for_turns():
    x = _smooth()
    zero = torch.zeros(len(x), dtype=torch.float64)
    inverse = augmentation._inverse
    torch.testing.assert_close(resample(x, inverse(zero, zero, zero, zero, zero, zero)), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(resample(x, inverse(zero, zero, zero, zero, zero + 3, zero))[..., 3:], x[..., :-3], atol=1e-9, rtol=0)
    torch.testing.assert_close(resample(x, inverse(zero, zero, zero, zero, zero, zero + 2))[..., 2:, :], x[..., :-2, :], atol=1e-9, rtol=0)
    # sym6 is not quite symmetric: half a turn moves the image by 0.1 pixels, and the steepest wave rises by 0.6 a pixel.
    turned = resample(x, inverse(zero, zero + math.pi, zero, zero, zero, zero))
    torch.testing.assert_close(turned[..., 4:-4, 4:-4], x.flip(2).flip(3)[..., 4:-4, 4:-4], atol=0.06, rtol=0)
    quarter = resample(x, inverse(zero, zero + math.pi / 2, zero, zero, zero, zero))
    torch.testing.assert_close(quarter[..., 4:-4, 4:-4], x.rot90(1, (2, 3))[..., 4:-4, 4:-4], atol=0.06, rtol=0)
    # A quadratic blob of radius r, scaled by s, has radius r s; scaled along an axis only there.
    u = torch.arange(32, dtype=torch.float64) - 15.5
    blob = torch.exp(-(u[:, None] ** 2 + u[None] ** 2) / (2 * 3.0**2))[None, None]
    for change, along, across in (
        ((2.5, 0.0, 0.0), 2**0.5, 2**0.5),
        ((0.0, 2.5, 0.0), 2**0.5, 0.5**0.5),
        ((0.0, 2.5, math.pi / 2), 0.5**0.5, 2**0.5),
    ):
        one = torch.zeros(1, dtype=torch.float64)
        scale, ratio, axis = (one + v for v in change)
        out = resample(blob, inverse(scale, one, ratio, axis, one, one))[0, 0]
        for profile, factor in ((out[15:17].mean(0), along), (out[:, 15:17].mean(1), across)):
            middle = profile[8:24]  # without the reflections that a shrunken image shows at its border
            expected = torch.exp(-(u**2) / (2 * (3 * factor) ** 2))[8:24]
            torch.testing.assert_close(middle / middle.max(), expected / expected.max(), atol=0.02, rtol=0)


def test_augmentation_labels_say_what_was_done(generator):
    x = _smooth(400, 8).float()
    y, labels = augment(x, 0.12, generator)
    assert labels.shape == (400, 9)
    assert float(labels[:, 0].mean()) == pytest.approx(0.5, abs=0.1)
    assert float(labels[:, 1].mean()) == pytest.approx(0.06, abs=0.04)
    for columns in ([2], [3, 4], [5, 6], [7, 8]):
        assert float((labels[:, columns] != 0).any(1).float().mean()) == pytest.approx(0.12, abs=0.06)
    untouched = (labels == 0).all(1)
    torch.testing.assert_close(y[untouched], x[untouched], atol=1e-5, rtol=0)
    flipped = (labels[:, 0] == 1) & (labels[:, 1:] == 0).all(1)
    torch.testing.assert_close(y[flipped], x[flipped].flip(3), atol=1e-5, rtol=0)
    again, same = augment(x, 0.12, torch.Generator().manual_seed(0))
    assert again.equal(y)
    assert same.equal(labels)
    none, zero = augment(x, 0.0, generator)
    assert bool((zero[:, 1:] == 0).all())
    assert none.equal(torch.where(zero[:, 0].bool()[:, None, None, None], x.flip(3), x))


def test_order_is_epochs_without_repeats_and_independent_of_how_it_is_cut():
    whole = order(3, 10, 0, 35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    assert torch.cat([order(3, 10, s, 7) for s in range(0, 35, 7)]).equal(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_feeds_with_workers_see_the_same(workers, tmp_path):
    data = open_images(str(_zip(tmp_path / "f.zip", _files())), labels=True)
    config = Training(batch=6, micro=3, steps=4, workers=workers, label_dropout=0.3)
    numbers = [5, 0, 3]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = list(Feed(data, config, augment=0.5).passes(numbers))
    assert before.equal(torch.get_rng_state())
    for number, (batch, generator) in zip(numbers, found, strict=True):
        expected, stream = Feed(data, Training(**{**config.__dict__, "workers": 0}), augment=0.5).read(number)
        assert batch.x.equal(expected.x)
        assert batch.augment_labels.equal(expected.augment_labels)
        assert batch.class_labels.equal(expected.class_labels)
        assert torch.rand(3, generator=generator).equal(torch.rand(3, generator=stream))
