"""Generated sets: the same samples whatever the batch, the processes, the format and the interruptions; nothing wrong is read or overwritten."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_parallel_processes import torchrun

from contrastive_diffusion.cli import main
from contrastive_diffusion.data.images import open_images
from contrastive_diffusion.errors import UsageError
from contrastive_diffusion.runs.generated import image_name, open_generated, to_bytes, to_floats
from contrastive_diffusion.runs.source import labels_of, open_source
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.schedules import ddpm, grid
from contrastive_diffusion.solvers import ddpm as ancestral

DINO = ["generate", "dino", "--n", "23", "--first", "990", "--shard", "5", "--steps", "15"]


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    """A tiny network of digits with classes, after a few steps."""
    pytest.importorskip("sklearn")
    out = str(tmp_path_factory.mktemp("generate") / "net")
    kind = ["--net.kind", "ddpm++", "--net.width", "8", "--net.blocks", "1", "--net.mult", "1", "--net.attention", "--net.sigma-data", "0.75"]
    training = ["--training.steps", "3", "--training.batch", "8", "--training.lr", "0.01"]
    assert main(["train", "--data", "digits", "--images.labels", "--loss.denoising", "edm", "--out", out, *kind, *training]) == 0
    return out


def _hashes(path) -> list[str]:
    return [entry["sha256"] for entry in open_generated(path).manifest["shards"]]


def test_samples_are_those_of_the_sampler_and_their_manifest_says_what_they_are(tmp_path, capsys):
    assert main([*DINO, "--out", str(tmp_path / "set"), "--seed", "3"]) == 0
    assert "23 samples in" in capsys.readouterr().out
    made = open_generated(tmp_path / "set")
    ids = torch.cat([shard.ids for shard in made.shards()])
    assert ids.tolist() == list(range(990, 1013))
    exact = Sequential(ancestral())(open_source("dino").denoiser(None), grid(ddpm(), 15), (23, 2), 3, first=990).x
    assert made.all().equal(exact)
    assert made.all(7).equal(exact[:7])
    told = {"n": 23, "solver": "ddpm", "steps": 15, "evals_per_sample": 15.0, "grid": "ddpm", "seed": 3, "sampler": "sequential", "weights": "exact"}
    assert told.items() <= made.manifest.items()
    assert made.manifest["source_hash"] == open_source("dino").sha256 != open_source("two-modes").sha256
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"manifest.json", *(f"shard-{k:06d}.npz" for k in range(5))}


def test_batches_and_rows_do_not_change_the_samples(tmp_path):
    for name, options in (("a", []), ("b", ["--batch", "3", "--rows", "2"]), ("c", ["--batch", "2", "--parallel", "--tolerance", "0"])):
        assert main([*DINO, "--out", str(tmp_path / name), *options]) == 0
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b") == _hashes(tmp_path / "c")


def test_two_processes_make_what_one_makes(tmp_path):
    options = [*DINO, "--format", "npz", "--out"]
    done = torchrun("", 2, "-m", "contrastive_diffusion.cli", *options, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("23 samples") == 1
    assert main([*options, str(tmp_path / "one")]) == 0
    assert _hashes(tmp_path / "one") == _hashes(tmp_path / "two")
    for k in range(5):
        assert (tmp_path / "one" / f"shard-{k:06d}.npz").read_bytes() == (tmp_path / "two" / f"shard-{k:06d}.npz").read_bytes()


def test_kill_9_and_start_again_neither_repeats_nor_loses_a_sample(tmp_path):
    options = ["generate", "dino", "--n", "240", "--shard", "20", "--batch", "20", "--steps", "400", "--out"]
    command = [sys.executable, "-m", "contrastive_diffusion.cli", *options, str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while process.poll() is None and not list((tmp_path / "killed").glob(".parts/000001.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("shard-*") if (p.parent / ".parts" / f"{p.stem[6:]}.json").exists()}
    assert 2 <= len(kept) < 12
    with pytest.raises(UsageError, match="a finished set"):
        open_generated(tmp_path / "killed")
    (tmp_path / "killed" / ".shard-000003.npz.abcdefgh").write_text("half")
    for name in ("killed", "whole"):
        assert main([*options, str(tmp_path / name)]) == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "killed").rglob("*")) == sorted(p.name for p in (tmp_path / "whole").rglob("*"))


def test_ctrl_c_says_to_go_on_and_a_lost_shard_is_made_again(tmp_path, capsys, monkeypatch):
    whole, count = Sequential.__call__, []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(Sequential, "__call__", interrupted)
    assert main([*DINO, "--out", str(tmp_path / "a")]) == 130
    assert capsys.readouterr().err.endswith("interrupted; run the same command again to continue\n")
    assert main([*DINO, "--out", str(tmp_path / "a")]) == 0
    assert len(count) == 3 + 3
    before = (tmp_path / "a" / "shard-000001.npz").read_bytes()
    (tmp_path / "a" / "shard-000001.npz").unlink()
    assert main([*DINO, "--out", str(tmp_path / "a")]) == 0
    assert (len(count), (tmp_path / "a" / "shard-000001.npz").read_bytes()) == (7, before)


def test_images_as_npz_and_png_are_the_same_and_can_be_read_as_data(net, tmp_path):
    options = ["generate", net, "--n", "7", "--first", "997", "--shard", "4", "--solver", "heun", "--steps", "4", "--label", "0,3,5"]
    for kind in ("npz", "png"):
        assert main([*options, "--format", kind, "--out", str(tmp_path / kind)]) == 0
    assert _hashes(tmp_path / "npz") == _hashes(tmp_path / "png")
    shards, others = (list(open_generated(tmp_path / kind).shards()) for kind in ("npz", "png"))
    assert all(a.data.equal(b.data) and a.labels.equal(b.labels) for a, b in zip(shards, others, strict=True))
    assert torch.cat([s.labels for s in shards]).tolist() == [(0, 3, 5)[i % 3] for i in range(997, 1004)]
    assert (tmp_path / "png" / "001000" / "001003.png").is_file()
    assert image_name(12345) == "012000/012345.png"
    read, labels = open_images(str(tmp_path / "png"), labels=True).all()
    torch.testing.assert_close(read, open_generated(tmp_path / "npz").all())
    assert labels is not None
    assert labels.argmax(1).tolist() == torch.cat([s.labels for s in shards]).tolist()


def test_bytes_stand_for_what_data_sets_say():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_bytes(to_floats(every)).equal(every)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    x = torch.linspace(-1, 1, 9999)
    assert float((to_floats(to_bytes(x)) - x).abs().max()) <= 0.5 / 127.5 + 1e-6


def test_a_network_gives_the_same_bytes_in_other_batches_up_to_rounding(net, tmp_path):
    options = ["generate", net, "--n", "12", "--solver", "heun", "--steps", "5", "--out"]
    for name, more in (("a", []), ("b", ["--batch", "5"]), ("c", ["--parallel", "--tolerance", "0"])):
        assert main([*options, str(tmp_path / name), *more]) == 0
    a, b, c = (next(iter(open_generated(tmp_path / name).shards())) for name in "abc")
    assert a.labels is not None
    assert a.labels.equal(labels_of("random", a.ids, 0, 10))
    for other in (b, c):
        assert int((a.data.int() - other.data.int()).abs().max()) <= 1
        assert other.labels is not None
        assert a.labels.equal(other.labels)


def test_classes_follow_the_id():
    ids = torch.arange(5, 4005)
    assert labels_of("balanced", ids, 0, 10).equal(ids % 10)
    assert labels_of("random", ids[100:110], 1, 10).equal(labels_of("random", ids, 1, 10)[100:110])
    counts = labels_of(None, ids, 1, 10).bincount(minlength=10)
    assert float((counts - 400.0).square().sum()) / 400 < 33.7  # chi-squared of 9 degrees, one in ten thousand
    assert labels_of("none", ids, 0, 10) is labels_of(None, ids, 0, 0) is None


def test_weights_of_runs_and_model_folders(net, tmp_path, capsys):
    for which in ("ema", "raw"):
        assert main(["convert", net, str(tmp_path / which), "--weights", which]) == 0
        z, level = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 3.0])
        run, folder = open_source(net, which), open_source(str(tmp_path / which))
        assert (run.weights, folder.weights) == (which, which)
        torch.testing.assert_close(run.denoiser(None)(z, level), folder.denoiser(None)(z, level))
    assert not open_source(net, "raw").denoiser(None)(z, level).equal(open_source(net).denoiser(None)(z, level))
    assert main(["generate", str(tmp_path / "ema"), "--weights", "raw", "--out", str(tmp_path / "x")]) == 2
    assert "given --weights raw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "shard-000001.npz").write_bytes((path / "shard-000002.npz").read_bytes()), "shard-000001.npz with content"),
        (lambda path: (path / "shard-000004.npz").write_bytes((path / "shard-000004.npz").read_bytes()[:200]), "shard-000004.npz, expected a whole"),
        (lambda path: (path / "shard-000000.npz").unlink(), "shard-000000.npz"),
        (lambda path: _edit(path, lambda m: m.update(n=24)), "whose shards hold 23 samples"),
        (lambda path: _edit(path, lambda m: m["shards"][3].update(sha256="0" * 64)), "shard-000003.npz with content"),
        (lambda path: _edit(path, lambda m: m.pop("shards")), "expected a whole manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "expected a whole manifest"),
        (lambda path: (path / "manifest.json").unlink(), "a finished set of cdl generate"),
    ],
)
def test_a_set_that_is_not_what_its_manifest_says_is_told(spoil, message, tmp_path):
    assert main([*DINO, "--out", str(tmp_path / "a")]) == 0
    spoil(tmp_path / "a")
    with pytest.raises(UsageError, match=message):
        list(open_generated(tmp_path / "a").shards())


def _edit(path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n", "24"], "of another request (n was 23, now 24)"),
        (["--seed", "1", "--solver", "heun"], "(solver was ddpm, now heun; grid was ddpm, now karras; seed was 0, now 1)"),
        (["--shard", "6"], "shard was 5, now 6"),
        (["--parallel"], "sampler was sequential, now parallel"),
        (["--out", "{tmp}/other"], "which holds something else"),
        (["--n", "0"], "--n 0"),
        (["--shard", "0"], "--shard 0"),
        (["--first", "-1"], "both >= 0"),
        (["--format", "png"], "expected images"),
        (["--label", "1"], "the network has no labels"),
        (["--solver", "huen"], "did you mean heun"),
        (["--evals", "9"], "one of the two"),
        (["--parallel", "--window", "0"], "window >= 1"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(args, message, tmp_path, capsys):
    assert main([*DINO, "--out", str(tmp_path / "a")]) == 0
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "x.npy", np.zeros(1))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert main([*DINO, "--out", str(tmp_path / "a"), *(a.replace("{tmp}", str(tmp_path)) for a in args)]) == 2
    error = capsys.readouterr().err.strip().replace("\r", "\n").split("\n")[-1]
    assert error.startswith("cdl: given")
    assert message in error
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("label", "message"), [("10", "classes 0 .. 9"), ("two", "classes 0 .. 9"), ("1,,2", "classes 0 .. 9")])
def test_unknown_classes_are_told(net, label, message, tmp_path, capsys):
    assert main(["generate", net, "--label", label, "--out", str(tmp_path / "a")]) == 2
    assert message in capsys.readouterr().err


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    import contrastive_diffusion.files as files

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert main([*DINO, "--out", str(tmp_path / "a")]) == 1
    assert "No space left on device; free space" in capsys.readouterr().err
