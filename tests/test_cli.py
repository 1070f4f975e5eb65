"""The command as a user meets it: every sub-command, every wrong input one line with the right exit code."""

import json
from pathlib import Path

import numpy as np
import pytest

from contrastive_diffusion.cli import COMMANDS, main
from contrastive_diffusion.solvers import SOLVERS

TINY = ["--net.width", "32", "--net.blocks", "1", "--training.steps", "4", "--training.batch", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "contrastive", "--out", str(out), *TINY]) == 0
    return out


def test_train_writes_a_run_and_says_what_next(trained, capsys):
    assert main(["train", "contrastive", "--out", str(trained), *TINY]) == 0
    assert f"next: cdl sample {trained}" in capsys.readouterr().out
    assert "contrastive: 0.1" in (trained / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "options", [[], ["--parallel"], ["--parallel", "--window", "3", "--tolerance", "0"], ["--solver", "heun"], ["--solver", "ddim"]]
)
def test_sample(trained, tmp_path, capsys, options):
    out = tmp_path / "x.npy"
    assert main(["sample", str(trained), "--n", "5", "--steps", "10", "--out", str(out), *options]) == 0
    assert np.load(out).shape == (5, 2)
    assert "5 samples in" in capsys.readouterr().out


@pytest.mark.parametrize("name", SOLVERS)
def test_sample_with_every_solver(name, tmp_path, capsys):
    assert main(["sample", "two-modes", "--solver", name, "--n", "3", "--steps", "12", "--out", str(tmp_path / "x.npy")]) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 1)


def test_sample_by_evaluations_on_a_named_grid_in_batches(tmp_path, capsys):
    options = ["--solver", "edm:churn=5,s_noise=1.007", "--evals", "35", "--grid", "karras:rho=5"]
    for name, batch in (("a", "9"), ("b", "4")):
        assert main(["sample", "dino", "--n", "9", *options, "--batch", batch, "--out", str(tmp_path / name)]) == 0
        assert "(35 a sample)" in capsys.readouterr().out
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_ctrl_c_keeps_the_finished_batches(tmp_path, capsys, monkeypatch):
    import contrastive_diffusion.sampling as sampling

    whole, count = sampling.Sequential.__call__, []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(sampling.Sequential, "__call__", interrupted)
    assert main(["sample", "dino", "--n", "10", "--batch", "4", "--steps", "5", "--out", str(tmp_path / "x.npy")]) == 130
    assert "interrupted; 8 of 10 samples were finished and are saved" in capsys.readouterr().err
    assert np.load(tmp_path / "x.npy").shape == (8, 2)


def test_sequential_and_exact_parallel_samples_are_the_same_file(tmp_path):
    for name, options in (("a", []), ("b", ["--parallel", "--tolerance", "0"])):
        assert main(["sample", "dino", "--n", "4", "--steps", "20", "--out", str(tmp_path / name), *options]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("what", ["llr", "nll", "noise"])
def test_estimate(trained, tmp_path, capsys, what):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    out = tmp_path / "e.json"
    assert main(["estimate", what, str(trained), "--x", str(tmp_path / "x.npy"), "--evals", "96", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3
    if what == "noise":
        assert sum(rows[0]["posterior"].values()) == pytest.approx(1, abs=1e-5)
        assert rows[0]["from (90%)"] <= rows[0]["to"]
    assert main(["estimate", what, "two-modes", "--n", "2", "--corrupt", "3"]) == 0
    printed = capsys.readouterr().out
    assert "exact" in printed or what == "noise"


def test_estimate_agrees_with_the_closed_form(capsys):
    assert main(["estimate", "llr", "dino", "--n", "1", "--zeta", "9", "--evals", "20000"]) == 0
    mean, error, exact = (float(v) for v in capsys.readouterr().out.split("\n")[1].split()[-3:])
    assert abs(mean - exact) < 5 * error
    assert error < 0.05


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("dino", "two-modes", "train-edm", "checkerboard", "heun", "picard"):
        assert name in printed


def test_list_says_what_each_solver_can_do(capsys):
    assert main(["list", "solvers"]) == 0
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert set(printed) == set(SOLVERS)
    assert printed["heun"].split()[1:6] == ["2", "2", "no", "yes", "karras"]
    assert printed["adaptive"].split()[3:5] == ["yes", "no"]
    assert main(["list", "grids"]) == 0
    assert "sigma_max=80.0" in capsys.readouterr().out


def test_run_report_and_its_terminal_summary(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "two-modes", "quick", "--out", str(out), "--jobs", "1", "--base.steps", "20", "--branch.steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "Error and samples" in printed
    assert f"report: {out}/report.html" in printed
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == 1
    evals = results["numbers"]["denoiser evaluations"]
    assert evals["plain"] == evals["contrastive"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion_knows_every_command(shell, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--tyro-print-completion", shell])
    assert done.value.code in (0, None)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*COMMANDS, "two-modes", "tolerance"))


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["run", "dino", "--help"], ["sample", "--help"], ["train", "--help"]])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code in (0, None)
    assert "usage: cdl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "given command 'rnu', expected one of"),
        (["run"], "given no experiment, expected one of "),
        (["run", "dion"], "did you mean dino"),
        (["run", "dino", "qick"], "did you mean quick"),
        (["train", "nothere.yaml"], "an existing YAML file"),
        (["train", "--data", "dinosaur", "--out", "{tmp}/r"], "did you mean dino"),
        (["train", "--data", "{tmp}/none.npy", "--out", "{tmp}/r"], "an existing .npy or .csv file"),
        (["sample", "{tmp}"], "a folder with recipe.yaml"),
        (["sample", "nothing"], "a run folder or one of"),
        (["sample", "dino", "--n", "0"], "at least 1"),
        (["sample", "dino", "--steps", "0"], "steps >= 1"),
        (["sample", "dino", "--evals", "0"], "evals >= 1"),
        (["sample", "dino", "--evals", "9", "--steps", "9"], "given --steps and --evals, expected one of the two"),
        (["sample", "dino", "--solver", "huen"], "did you mean heun"),
        (["sample", "dino", "--solver", "ddim:eta=1.5"], "0 <= eta <= 1"),
        (["sample", "dino", "--solver", "adaptive", "--evals", "100"], "its tolerances"),
        (["sample", "dino", "--grid", "karas"], "did you mean karras"),
        (["sample", "dino", "--grid", "3,2,1"], "increasing log-SNRs"),
        (["sample", "dino", "--batch", "0"], "batch >= 1"),
        (["sample", "dino", "--parallel", "--window", "0"], "window >= 1"),
        (["sample", "dino", "--parallel", "--tolerance", "-1"], "tolerance >= 0"),
        (["sample", "dino", "--seed", "-1"], "both >= 0"),
        (["estimate", "llr", "dino", "--evals", "0"], "given evals = 0"),
        (["estimate", "llr", "dino", "--zeta", "99"], "given zeta = 99"),
        (["estimate", "llr", "moons"], "a toy whose law is a mixture"),
        (["estimate", "llr", "two-modes", "--x", "{tmp}/x.npy"], r"points of shape (3, 2), expected (N, 1)"),
        (["report", "{tmp}"], "a folder with results.json"),
        (["--threads", "0", "list"], "--threads 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(args, message, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    before = sorted(tmp_path.rglob("*"))
    assert main([a.replace("{tmp}", str(tmp_path)) for a in args]) == 2
    error = capsys.readouterr().err.strip().replace("\r", "\n").split("\n")[-1]
    assert error.startswith("cdl: given")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_options_that_do_not_parse_are_exit_code_2(capsys):
    for args in (["sample", "dino", "--sedd", "1"], ["sample", "dino", "--n", "many"], ["run", "dino", "--base.stepz", "1"]):
        with pytest.raises(SystemExit) as done:
            main(args)
        assert done.value.code == 2
    assert "Perhaps you meant" in capsys.readouterr().err


def test_failures_are_exit_code_1(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["sample", "dino", "--n", "1", "--steps", "2", "--out", str(tmp_path / "file" / "x.npy")]) == 1
    assert "expected to write there" in capsys.readouterr().err


def test_broken_checkpoints_and_results_are_one_line(trained, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    file = next((copy / "checkpoints").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    assert main(["sample", str(copy), "--n", "1"]) == 2
    assert "truncated" in capsys.readouterr().err
    (copy / "results.json").write_text("{")
    assert main(["report", str(copy)]) == 2
    assert "expected whole results" in capsys.readouterr().err


def test_ctrl_c_is_one_line_that_says_what_is_left(monkeypatch, capsys, tmp_path):
    import contrastive_diffusion.runs as runs
    import contrastive_diffusion.sampling as sampling

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling.Sequential, "__call__", interrupted)
    monkeypatch.setattr(runs, "fit", interrupted)
    for args, said in (
        (["sample", "dino", "--n", "1"], "nothing was written"),
        (["train", "--out", f"{tmp_path}/r"], "run the same command again to continue"),
    ):
        assert main(args) == 130
        assert capsys.readouterr().err.endswith(f"cdl: interrupted; {said}\n")


def _image_run(tmp_path):
    """A tiny network of 1 x 8 x 8 images, after one step."""
    recipe = ["--data", "digits", "--net.kind", "ddpm", "--net.width", "32", "--net.blocks", "1", "--net.mult", "1", "--net.attention"]
    assert main(["train", "--out", str(tmp_path / "net"), *recipe, "--training.steps", "1", "--training.batch", "4"]) == 0
    return str(tmp_path / "net")


def test_estimate_reads_images_and_folders_and_refuses_what_is_none(tmp_path, capsys):

    from PIL import Image

    net = _image_run(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / f"{i}.png")
    capsys.readouterr()
    for what in (["noise", net, "--x", str(folder)], ["nll", net, "--x", str(folder / "1.png"), "--likelihood", "discrete"]):
        assert main(["estimate", *what, "--evals", "32", *(["--logsnrs", "0", "4"] if what[0] == "noise" else [])]) == 0
        out = capsys.readouterr().out
        assert "1.png" in out
        assert ("from (90%)" in out) == (what[0] == "noise")
        assert ("bits per dim" in out) == (what[0] == "nll")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(folder / "3.png")
    np.save(tmp_path / "bytes.npy", np.full((2, 1, 8, 8), 200.0))
    np.save(tmp_path / "nan.npy", np.full((2, 1, 8, 8), np.nan))
    refused = {"empty": "without image files", "images": "3.png", "bytes.npy": "images in [-1, 1]", "nan.npy": "finite", "none": "existing"}
    for path, message in (refused | {"none.npy": "existing"}).items():
        assert main(["estimate", "nll", net, "--x", str(tmp_path / path), "--evals", "16"]) == 2
        assert message in capsys.readouterr().err
