"""The image experiments from training to page, at the smallest budget."""

import json

import pytest

from contrastive_diffusion.cli import main

pytest.importorskip("sklearn")
TINY = [
    "--base.steps",
    "2",
    "--base.batch",
    "8",
    "--branch.steps",
    "2",
    "--branch.batch",
    "8",
    "--rows",
    "2",
    "--evals",
    "16",
    "--steps",
    "3",
    "--samples",
    "2",
    "--jobs",
    "1",
]


def test_digits_from_training_to_page(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "digits", "quick", "--out", str(out), *TINY]) == 0
    assert "Plain and contrastive fine-tuning" in capsys.readouterr().out
    numbers = json.loads((out / "results.json").read_text())["numbers"]
    assert numbers["rows"].keys() == {f"{net}, {branch}" for net in ("ddpm++", "ddpm") for branch in ("plain", "contrastive")}
    for spent in numbers["denoiser evaluations"].values():
        assert spent["plain"] == spent["contrastive"]
    page = (out / "report.html").read_text()
    assert "data:image/png" in page
    assert "Ratio accuracy" in page
    # Continued: nothing is made again.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors") if p.name != "arrays.safetensors"}
    assert main(["run", "digits", "quick", "--out", str(out), *TINY]) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_checkpoint_commands(tmp_path, capsys):
    run, model = tmp_path / "run", tmp_path / "model"
    small = ["--net.width", "8", "--training.steps", "2", "--training.batch", "8", "--watch.every", "0"]
    assert main(["train", "digits", "--out", str(run), *small]) == 0
    assert main(["convert", str(run), str(model)]) == 0
    assert "next: cdl sample" in capsys.readouterr().out
    assert main(["inspect", str(model)]) == 0
    assert "kind: a model folder" in capsys.readouterr().out
    assert main(["sample", str(model), "--n", "2", "--steps", "3", "--out", str(tmp_path / "x.npy")]) == 0
    for source in (run, model):
        tuned = tmp_path / f"tuned-{source.name}"
        options = ["--data", "digits", "--loss.contrastive", "0.01", "--training.steps", "1", "--training.batch", "8"]
        assert main(["finetune", str(source), "--out", str(tuned), *options, *(["--watch.every", "0"] if source == run else [])]) == 0
        assert "contrastive.loss" in (tuned / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["finetune"], "given no source"),
        (["finetune", "{tmp}"], "a run folder, or a model folder"),
        (["finetune", "{tmp}", "cifar"], "did you mean cifar10"),
        (["convert", "{tmp}/none", "{tmp}/out"], "an existing file or folder"),
        (["convert", "{tmp}/x.pkl", "{tmp}/out"], "a pickle of something else"),
        (["inspect", "{tmp}/none"], "an existing file or folder"),
        (["train", "digits", "--out", "{tmp}/r", "--images.holdout", "1797"], "less than the whole set"),
        (["train", "digits", "--out", "{tmp}/r", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_wrong_input_is_one_line(args, message, tmp_path, capsys):
    import torch

    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04N.")
    assert main([a.replace("{tmp}", str(tmp_path)) for a in args]) == 2
    error = capsys.readouterr().err.strip().replace("\r", "\n").split("\n")[-1]
    assert error.startswith("cdl: given")
    assert message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pkl"]
