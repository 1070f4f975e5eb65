"""Generated sets against references: extractors that execute nothing, features taken once, numbers with intervals, and the commands."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive_diffusion import checkpoints, evaluation
from contrastive_diffusion.cli import main
from contrastive_diffusion.data.images import digit_labels, digits, open_images
from contrastive_diffusion.errors import UsageError
from contrastive_diffusion.evaluation import extractors, references, samples, score
from contrastive_diffusion.evaluation.classifier import FILE, HELD, accuracy, load_classifier, train


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5] / 255


class Reads(torch.nn.Module):
    def forward(self, x):
        return torch.from_file("/etc/hostname", False, 4).reshape(1, 4) + x.flatten(1)[:, :4]


class ReadsWhenLoaded(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)

    @torch.jit.export
    def __getstate__(self):
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        self.training = state[1]
        torch.save(state[0], "WRITTEN")


class Inception(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False):
        assert x.shape[1] == 3
        assert return_features
        return x.float().flatten(1)[:, :5]


def _scripted(module, path):
    torch.jit.script(module).save(str(path))
    return path


# --- extractors


def test_the_bundled_classifier_is_as_good_as_its_file_says():
    net, meta = load_classifier(FILE)
    held = open_images("digits").split(HELD)[1]
    assert accuracy(net, held.all()[0], digit_labels()[torch.from_numpy(held.index)]) == pytest.approx(meta["accuracy"]["held-out"])
    assert meta["accuracy"]["held-out"] > 0.98


@pytest.mark.slow
def test_the_bundled_classifier_can_be_trained_again():
    kept, held = open_images("digits").split(HELD)
    labels = digit_labels()
    net = train(kept.all()[0], labels[torch.from_numpy(kept.index)])
    assert accuracy(net, held.all()[0], labels[torch.from_numpy(held.index)]) > 0.98


@pytest.mark.parametrize("name", extractors.EXTRACTORS)
def test_features_have_full_rank_and_are_those_of_each_sample_alone(name):
    extractor, x = evaluation.extractor(name), samples.as_bytes(digits()[:300])
    found = extractor(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[7:9], extractor(x[7:9]), rtol=1e-4, atol=1e-5)
    rank = int(torch.linalg.matrix_rank(torch.cov(found.double().T)))
    assert rank == (32 if name == "digits" else int((x.flatten(1).float().std(0) > 0).sum()))


def test_a_torchscript_module_is_given_its_bytes_and_nothing_is_called_fid(tmp_path):
    path = _scripted(Scaled(), tmp_path / "m.pt")
    extractor, x = evaluation.extractor(f"torchscript:{path}"), samples.as_bytes(digits()[:4])
    torch.testing.assert_close(extractor(x), x.flatten(1)[:, :5] / 255)
    assert extractor.frechet == "Frechet distance"
    assert extractor.id.startswith("torchscript-")


def test_only_inceptions_own_file_is_called_fid(tmp_path, monkeypatch):
    path = _scripted(Inception(), tmp_path / "inception.pt")
    monkeypatch.setattr(extractors, "INCEPTION", extractors.file_hash(path))
    extractor = evaluation.extractor(f"torchscript:{path}")
    assert (extractor.frechet, extractor.id) == ("FID", "inception-2015-12-05")
    assert extractor(samples.as_bytes(digits()[:4])).shape == (4, 5)
    monkeypatch.setattr(extractors, "INCEPTION_WEIGHTS", extractors.file_hash(path))
    with pytest.raises(UsageError, match="weights without a network"):
        evaluation.extractor(f"torchscript:{path}")


class Pickled:
    def __reduce__(self):
        return exec, ("open('WRITTEN', 'w')",)


def _pickle(path):
    path.write_bytes(pickle.dumps(Pickled()))


def _torch_pickle(path):
    torch.save({"a": Pickled()}, path)


def _foreign_ops(path):
    _patched(path, "return", "ops.evil.run()\n    return")


def _foreign_class(path):
    _patched(path, "return", "__torch__.torch.classes.evil.Shell()\n    return")


def _not_python(path):
    _patched(path, "return", "^PythonOp()(x)\n    return")


def _patched(path, old, new):
    """A TorchScript archive whose code was changed."""
    whole = _scripted(Scaled(), path.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as out:
        for name in source.namelist():
            content = source.read(name)
            out.writestr(name, content.decode().replace(old, new).encode() if name.endswith(".py") else content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_pickle, "not a Python pickle"),
        (_torch_pickle, "a Python pickle, reading which may execute anything"),
        (lambda p: _scripted(Reads(), p), r"calls torch.from_file|calls ops.aten.from_file"),
        (lambda p: _scripted(ReadsWhenLoaded(), p), r"calls torch.save|calls ops.aten.save"),
        (_foreign_ops, "calls ops.evil.run"),
        (_foreign_class, "calls __torch__.torch.classes.evil"),
        (_not_python, "no TorchScript"),
        (lambda p: p.write_bytes(b"garbage"), "expected a TorchScript archive"),
    ],
)
def test_an_extractor_that_could_do_more_than_arithmetic_is_refused_unexecuted(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m.pt")
    with pytest.raises(UsageError, match=message):
        evaluation.extractor(f"torchscript:{tmp_path / 'm.pt'}")
    assert not (tmp_path / "WRITTEN").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "expected one of digits, pixels"), ("torchscript:none.pt", "an existing file"), ("safetensors:none", "an existing file")],
)
def test_unknown_extractors_are_one_line(name, message):
    with pytest.raises(UsageError, match=message):
        evaluation.extractor(name)


def test_a_users_classifier_is_an_extractor(tmp_path):
    net, meta = load_classifier(FILE)
    checkpoints.save(tmp_path / "c.safetensors", {k: 2 * v for k, v in net.state_dict().items()}, meta)
    assert evaluation.extractor(f"safetensors:{tmp_path / 'c.safetensors'}")(samples.as_bytes(digits()[:3])).shape == (3, 32)
    with pytest.raises(UsageError, match=r"images \(1, 8, 8\)"):
        evaluation.extractor("digits")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


# --- features and references


def _set(n, d=3, shift=0.0, seed=0):
    return samples.of_tensor(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift, f"set {seed}")


def test_features_are_taken_once_and_go_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "PART", 40)
    x, calls = _set(100), []

    def call(rows):
        calls.append(len(rows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rows

    extractor = extractors.Extractor("id", call)
    with pytest.raises(KeyboardInterrupt):
        evaluation.features(x, extractor, tmp_path, batch=15)
    found = evaluation.features(x, extractor, tmp_path, batch=15)
    assert calls == [15, 15, 10, 15, 15, 15, 10, 15, 5]  # the first part once, the second again
    torch.testing.assert_close(found[0:100], x.read(0, 100))
    torch.testing.assert_close(found[35:85], x.read(35, 85))
    evaluation.features(x, extractor, tmp_path)
    assert len(calls) == 9
    evaluation.features(x, extractors.Extractor("another", call), tmp_path)
    assert len(calls) == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x / 0, "not finite, first in row 0"),
        (lambda x: x[:-1], "one row for each"),
        (lambda x: x.sum(), "one row for each"),
        (lambda x: x @ torch.zeros(7, 7), "expected images or vectors"),
    ],
)
def test_features_that_are_none_are_refused(call, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        evaluation.features(_set(60), extractors.Extractor("id", call), tmp_path)


def test_edms_reference_files_give_the_frechet_distance_and_no_more(tmp_path):
    x, y, pixels = _set(200), _set(300, seed=1), evaluation.extractor("pixels")
    real = y.read(0, 300).double()
    np.savez(tmp_path / "ref.npz", mu=real.mean(0).numpy(), sigma=torch.cov(real.T).numpy())
    assert references.is_moments(str(tmp_path / "ref.npz"))
    found = evaluation.features(x, pixels, tmp_path)
    whole = evaluation.reference(y, pixels, tmp_path)
    measures, left = evaluation.evaluate(found, evaluation.reference(tmp_path / "ref.npz", pixels, tmp_path), pixels)
    assert [m.key for m in measures] == ["frechet"]
    assert set(left) == {"kid", "mmd", "nearest", "prdc", "sliced"}
    assert measures[0].value == pytest.approx(evaluation.evaluate(found, whole, pixels, ["frechet"])[0][0].value, rel=1e-9)
    with pytest.raises(UsageError, match="known by its mean and covariance"):
        evaluation.evaluate(found, evaluation.reference(tmp_path / "ref.npz", pixels, tmp_path), pixels, ["kid"])


@pytest.mark.parametrize(
    ("mu", "sigma"), [(np.zeros(3), np.eye(4)), (np.zeros(3), np.full((3, 3), np.nan)), (np.zeros(2), np.array([[1.0, 5], [0, 1]]))]
)
def test_broken_reference_files_are_one_line(mu, sigma, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    with pytest.raises(UsageError, match=r"expected mu|a covariance"):
        evaluation.reference(tmp_path / "ref.npz", evaluation.extractor("pixels"), tmp_path)


# --- numbers


def _evaluated(x, y, tmp_path, **options):
    pixels = evaluation.extractor("pixels")
    return evaluation.evaluate(evaluation.features(x, pixels, tmp_path), evaluation.reference(y, pixels, tmp_path), pixels, **options)


def test_measures_of_a_shift_are_its_closed_forms(tmp_path):
    shift, d = 0.5, 3
    measures = {m.key: m for m in _evaluated(_set(2000, d, shift, seed=5), _set(4000, d, seed=6), tmp_path)[0]}
    assert set(measures) == {"frechet", "kid", "mmd", "nearest", "copies", "sliced", "precision", "recall", "density", "coverage"}
    for key, truth in (("frechet", d * shift**2), ("sliced", shift**2)):
        assert measures[key].unbiased.low - 0.02 < truth < measures[key].unbiased.high + 0.02  # the reference is a sample too
    width = float(measures["mmd"].note.split()[1].rstrip(","))
    kernel = (1 + 2 / width**2) ** (-d / 2)
    truth = 2 * kernel * (1 - np.exp(-d * shift**2 / (2 * (width**2 + 2))))
    assert measures["mmd"].value == pytest.approx(truth, rel=0.15)
    assert measures["nearest"].value > 1
    assert all(m.low < m.value < m.high for m in measures.values() if m.key != "copies")


@pytest.mark.parametrize(
    ("n", "d", "options", "message"),
    [
        (40, 3, {}, "40 samples, expected at least 50"),
        (60, 3, {"blocks": 40}, "expected at least 80"),
        (60, 58, {"names": ["frechet"]}, "60 samples for a covariance of 58 features, expected more than 58 without a block"),
        (60, 3, {"names": ["fid"]}, "given metric 'fid'"),
        (60, 3, {"neighbours": 70}, "expected one dimension and 1 <= k <= 53"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(n, d, options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        _evaluated(_set(n, d), _set(200, d, seed=1), tmp_path, **options)


def test_what_cannot_be_had_is_left_out_with_its_reason(tmp_path):
    measures, left = _evaluated(_set(60, 58), _set(200, 58, seed=1), tmp_path)
    assert "frechet" not in {m.key for m in measures}
    assert "generate more than 66" in left["frechet"]


def test_features_of_another_dimension_are_refused(tmp_path):
    pixels = evaluation.extractor("pixels")
    with pytest.raises(UsageError, match="dimension 3 for a reference of dimension 4"):
        evaluation.evaluate(evaluation.features(_set(60, 3), pixels, tmp_path), evaluation.reference(_set(60, 4), pixels, tmp_path), pixels)


def test_a_comparison_says_who_is_better_only_where_its_interval_does(tmp_path):
    y = _set(2000, seed=9)
    near, far, again = (_evaluated(_set(1000, 3, s, seed), y, tmp_path, names=["frechet", "prdc"])[0] for s, seed in ((0.1, 1), (0.4, 1), (0.1, 2)))
    differences = evaluation.compare(near, far, paired=True)
    verdicts = {d.key: d.verdict for d in differences}
    assert verdicts["frechet"] == verdicts["coverage"] == "A"
    assert "B" not in verdicts.values()
    assert score.verdict(differences, 1000).startswith("A is better by Frechet distance")
    assert next(d for d in evaluation.compare(far, near, paired=True) if d.key == "frechet").verdict == "B"
    frechet = evaluation.compare(near, again, paired=False)[0]
    assert frechet.verdict == "none"
    assert frechet.low < 0 < frechet.high
    assert score.verdict([frechet], 1000) == "No difference between A and B that 1,000 samples of each can show, in 1 measures."


# --- sets


def _images(folder, sizes, modes):
    folder.mkdir()
    for i, (size, mode) in enumerate(zip(sizes, modes, strict=True)):
        Image.fromarray(np.zeros((size, size) if mode == "L" else (size, size, 3), np.uint8)).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: _images(p / "f", (8, 8, 9), "LLL"), "2.png, grey of 9 x 9 pixels, expected grey of 8 x 8 like the first"),
        (lambda p: _images(p / "f", (8, 8), ("RGB", "L")), "1.png, grey of 8 x 8 pixels, expected colour"),
        (lambda p: str(p / "none"), "an existing file or folder"),
        (lambda p: _saved(p, np.full((4, 2), np.nan)), "not finite, first in sample 0"),
        (lambda p: _saved(p, np.full((4, 1, 8, 8), 255.0)), "scale bytes by v / 127.5 - 1"),
        (lambda p: _saved(p, np.zeros((4, 5, 8, 8))), "1 or 3, H, W"),
    ],
)
def test_sets_that_are_none_are_refused(make, message, tmp_path):
    name = make(tmp_path)
    with pytest.raises(UsageError, match=message):
        samples.open_samples(name).read(0, 3)


def _saved(folder, array):
    np.save(folder / "x.npy", array)
    return str(folder / "x.npy")


def test_fewer_samples_than_asked_are_refused(tmp_path):
    assert samples.open_samples(_saved(tmp_path, np.zeros((5, 2))), 3).n == 3
    with pytest.raises(UsageError, match=r"6 samples of .*, expected at most the 5"):
        samples.open_samples(_saved(tmp_path, np.zeros((5, 2))), 6)


def test_bundled_digits_become_the_bytes_a_saved_sample_would():
    found = samples.open_samples("digits")
    assert found.read(0, 50).equal(samples.as_bytes(digits()[:50]))
    assert found.hash == samples.open_samples("digits").hash


# --- commands


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Three files of noised digits: two alike, one worse; references are kept in the folder."""
    monkeypatch.setenv("CDL_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    for name, noise in (("a", 0.1), ("b", 0.1), ("c", 0.6)):
        at = torch.randint(1797, (300,), generator=generator)
        np.save(tmp_path / f"{name}.npy", (digits()[at] + noise * torch.randn(300, 1, 8, 8, generator=generator)).numpy())
    return {name: str(tmp_path / f"{name}.npy") for name in "abc"}


def test_evaluate_writes_a_record_and_a_page(sets, tmp_path, capsys):
    command = ["evaluate", sets["a"], "--data", "digits", "--extractor", "digits", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    record = json.loads((tmp_path / "run" / "results.json").read_text())["record"]
    assert "Frechet distance" in capsys.readouterr().out
    assert record["extractor"].startswith("digits-")
    assert record["reference"]["n"] == 1797
    one = record["sets"][0]
    assert (one["n"], len(one["hash"])) == (300, 64)
    found = {m["key"]: m for m in one["measures"]}
    assert found["copies"]["value"] > 0.1
    assert found["frechet"]["unbiased"]["mean"] < found["frechet"]["value"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(page) < 5e6
    assert "Nearest in the reference" in page
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["record"] == record


def test_evaluate_averages_over_sets_and_never_takes_the_best(sets, tmp_path):
    assert main(["evaluate", sets["a"], sets["b"], "--data", "digits", "--metrics", "frechet", "--out", str(tmp_path / "run"), "--n", "200"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    table = next(b for b in results["blocks"] if b.get("title") == "Measures")
    values = [row[1]["mean"] for row in table["rows"]]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    assert {s["n"] for s in results["record"]["sets"]} == {200}


def test_compare_of_files_gives_a_verdict(sets, tmp_path, capsys):
    options = ["--data", "digits", "--extractor", "digits", "--metrics", "frechet", "kid", "--out"]
    assert main(["compare", sets["a"], sets["c"], *options, str(tmp_path / "ac")]) == 0
    assert "A is better by Frechet distance, kernel distance" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "ac" / "results.json").read_text())["record"]
    assert record["paired"] is False
    assert all(d["high"] < 0 for d in record["differences"])
    assert main(["compare", sets["a"], sets["b"], *options, str(tmp_path / "ab")]) == 0
    assert "No difference between A and B that 300 samples of each can show" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "a", "a", "--data", "digits"], "2 sets with the same samples"),
        (["evaluate", "a", "--data", "digits", "--n", "301"], "301 samples of"),
        (["evaluate", "a", "--data", "patches"], "samples of shape"),
        (["evaluate", "a", "--data", "nothing"], "given 'nothing'"),
        (["evaluate", "nothing", "--data", "digits"], "generated set 'nothing'"),
        (["evaluate", "a", "--data", "digits", "--metrics", "fid"], "given metric 'fid'"),
        (["compare", "a", "a", "--data", "digits"], "the same samples"),
    ],
)
def test_wrong_commands_are_one_line(command, message, sets, tmp_path, capsys):
    named = [sets.get(word, word) for word in command]
    assert main([*named, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def generated(tmp_path, monkeypatch):
    monkeypatch.setenv("CDL_CACHE", str(tmp_path / "cache"))
    for name, steps in (("fine", "30"), ("coarse", "3")):
        assert main(["generate", "dino", "--n", "250", "--shard", "100", "--steps", steps, "--out", str(tmp_path / name)]) == 0
    return tmp_path


def test_generated_sets_are_paired_by_their_seeds(generated, capsys):
    command = [
        "compare",
        str(generated / "fine"),
        str(generated / "coarse"),
        "--data",
        "dino",
        "--reference-n",
        "1000",
        "--out",
        str(generated / "run"),
    ]
    assert main(command) == 0
    record = json.loads((generated / "run" / "results.json").read_text())["record"]
    assert record["paired"] is True
    assert "A is better by" in record["verdict"]
    origin = record["A"]["origin"]
    assert (origin["steps"], origin["seed"], origin["solver"]) == (30, 0, "ddpm")


def test_a_manifest_that_disagrees_with_its_shards_is_told(generated, capsys):
    path = next((generated / "fine").glob("shard-000001*"))
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["x"][3] += 1
    np.savez(path, **arrays)
    assert main(["evaluate", str(generated / "fine"), "--data", "dino", "--out", str(generated / "run")]) == 2
    assert "manifest.json says" in capsys.readouterr().err


def test_checkpoints_are_compared_on_samples_of_the_same_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDL_CACHE", str(tmp_path / "cache"))
    tiny = ["--net.width", "16", "--net.blocks", "1", "--training.batch", "64"]
    for name, steps in (("short", "2"), ("long", "150")):
        assert main(["train", "--data", "two-modes", "--out", str(tmp_path / name), *tiny, "--training.steps", steps]) == 0
    out = str(tmp_path / "run")
    options = ["--n", "300", "--solver", "ddim", "--steps", "10", "--metrics", "frechet", "--reference-n", "2000", "--out", out]
    assert main(["compare", str(tmp_path / "short"), str(tmp_path / "long"), "--data", "two-modes", *options]) == 0
    record = json.loads((tmp_path / "run" / "results.json").read_text())["record"]
    assert record["paired"] is True
    assert "B is better by Frechet distance" in record["verdict"]
    assert record["B"]["origin"]["weights"] == "ema"
