"""The tables and figures of images and the ratios, from training to page at the smallest budget; their arithmetic against closed forms."""

import json
from pathlib import Path

import pytest
import torch

from contrastive_diffusion.cli import main
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.denoisers import noised
from contrastive_diffusion.experiments import _sets_page as show
from contrastive_diffusion.experiments._ratios_page import summarised
from contrastive_diffusion.experiments._sets import Arm, Checkpoints, Found, Point, Sets
from contrastive_diffusion.experiments.ratios import classified, on_grid
from contrastive_diffusion.experiments.table2 import PAPER, Config
from contrastive_diffusion.runs.generated import open_generated, to_floats
from contrastive_diffusion.training import stream

pytest.importorskip("sklearn")
NETS = [
    "--trained.base.steps",
    "2",
    "--trained.base.batch",
    "8",
    "--trained.branch.steps",
    "2",
    "--trained.branch.batch",
    "8",
    "--trained.edm.width",
    "8",
]
SETS = ["--sets.jobs", "1", "--sets.n", "50"]
FEW = {
    "table2": ["--steps", "3"], "table3": ["--evals", "5"], "table4": ["--steps", "3"], "fig6": ["--evals", "3", "5"],
    "fig7": ["--churn", "0", "5", "--s-noise", "1.007", "--steps", "3"], "samples": ["--steps", "3", "--evals", "5"],
}  # fmt: skip


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tables") / "digits"


def _run(name: str, out: Path, nets: Path, *options: str) -> int:
    return main(["run", name, "quick", "--out", str(out), "--trained.out", str(nets), *NETS, *SETS, *FEW[name], *options])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("table4", "fig6", "samples") else n for n in FEW])
def test_tables_and_figures_from_training_to_page(name, nets, tmp_path, capsys):
    assert _run(name, tmp_path / "run", nets) == 0
    printed = capsys.readouterr().out
    assert "contrastive" in printed
    assert f"report: {tmp_path}/run/report.html" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    if name == "samples":
        assert "data:image/png" in (tmp_path / "run" / "report.html").read_text()
        return
    for key, seeds in results["numbers"]["by seed"].items():
        arm, point = key.split(", ")
        made = open_generated(tmp_path / "run" / "sets" / f"{arm}-{point}-0")
        assert len(made) == 50
        assert made.manifest["weights"] == ("raw" if name == "table4" and point != "averaged" else "ema")
        assert len(seeds) == 2
        assert seeds[0]["evals"] == made.manifest["evals_per_sample"]
        assert all(0 < seed["frechet"] < 1e4 for seed in seeds)
    if name == "table2":
        # Continued: nothing is made again.
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix in (".npz", ".safetensors") and p.name != "arrays.safetensors"}
        assert _run(name, tmp_path / "run", nets) == 0
        assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_table_of_two_checkpoints_is_that_of_the_runs_they_come_from(nets, tmp_path):
    assert _run("table3", tmp_path / "own", nets) == 0
    for branch in ("plain", "contrastive"):
        assert main(["convert", str(nets / f"ddpm++-{branch}"), str(tmp_path / branch)]) == 0
    assert main(["generate", "two-modes", "--n", "2", "--steps", "2", "--out", str(tmp_path / "other")]) == 0
    given = ["--checkpoints.plain", str(tmp_path / "plain"), "--checkpoints.contrastive", str(tmp_path / "contrastive")]
    data = tmp_path / "data.npz"
    _digits(data)
    assert main(["run", "table3", "quick", "--out", str(tmp_path / "given"), *SETS, *FEW["table3"], *given, "--data", str(data)]) == 0
    own, other = (json.loads((tmp_path / name / "results.json").read_text())["numbers"]["by seed"] for name in ("own", "given"))
    for branch in ("plain", "contrastive"):
        mine, theirs = own[f"ddpm++-{branch}, 5"], other[f"checkpoints-{branch}, 5"]
        assert [seed["frechet"] for seed in mine] == pytest.approx([seed["frechet"] for seed in theirs], rel=1e-4)


def _digits(path: Path) -> None:
    """The digits that the quick networks were trained on, as bytes."""
    import numpy as np

    from contrastive_diffusion.recipes import Images, load_images
    from contrastive_diffusion.runs.generated import to_bytes

    np.savez(path, images=to_bytes(load_images("digits", Images(holdout=297))[0].all()[0]).numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoints.plain", "{tmp}"], "checkpoints.contrastive None"),
        (["--checkpoints.plain", "{tmp}", "--checkpoints.contrastive", "{tmp}"], "checkpoints without their data"),
        (["--data", "{tmp}"], "without checkpoints"),
        (["--sets.extractor", "inception"], "extractor"),
    ],
)
def test_wrong_input_is_one_line(options, message, nets, tmp_path, capsys):
    assert _run("table3", tmp_path / "run", nets, *(o.replace("{tmp}", str(tmp_path)) for o in options)) == 2
    error = capsys.readouterr().err.strip().replace("\r", "\n").split("\n")[-1]
    assert error.startswith("cdl: given")
    assert message in error


def _found(title: str = "FID") -> Found:
    """Two seeds of a pair whose numbers are known."""
    arms = [Arm("vp-cifar10", branch, "") for branch in ("plain", "contrastive")]
    scores = {("vp-cifar10-plain", "parallel"): [{"frechet": 3.0, "evals": 9.0}, {"frechet": 5.0, "evals": 9.0}],
              ("vp-cifar10-contrastive", "parallel"): [{"frechet": 2.0, "evals": 9.0}, {"frechet": 4.1, "evals": 9.0}]}  # fmt: skip
    return Found(arms, [Point("parallel", "in parallel", {})], scores, {}, {}, title, torch.empty(0), {})


def test_differences_are_paired_by_seed_and_the_verdict_follows_the_interval():
    found = _found()
    point = found.points[0]
    change = show.change(found, "vp-cifar10", point, "frechet")
    assert change.mean == pytest.approx(-0.95)
    assert change.high - change.mean == pytest.approx(12.7062 * 0.05, rel=1e-5)  # Student's quantile of one degree, times the error of the mean
    assert show.words(change) == "wins"
    assert "the contrastive network wins (in parallel)" in show.verdict(found)
    assert show.score(found, found.arms[0], point, "frechet").mean == 4.0


def test_the_papers_numbers_stand_beside_ours_only_where_they_compare():
    config = Config(checkpoints=Checkpoints(name="vp-cifar10"), sets=Sets(n=5000))
    shown = show.table(config, _found(), "t", {"parallel": PAPER})
    assert shown["columns"][4:6] == ["the paper's FID", "the paper's FID, CDL"]
    assert shown["rows"][0][4:6] == ["7.93 ± 0.07", "7.47 ± 0.07"]
    for other, found in ((config, _found("Frechet distance")), (Config(checkpoints=Checkpoints(name="mine")), _found())):
        assert not any("paper" in column for column in show.table(other, found, "t", {"parallel": PAPER})["columns"])


def test_ratios_from_training_to_page(nets, tmp_path, capsys):
    options = ["--jobs", "1", "--zetas", "0", "6", "--points", "30", "--evals", "16", "--sample-evals", "3"]
    assert main(["run", "ratios", "quick", "--out", str(tmp_path / "run"), "--trained.out", str(nets), *NETS, *options]) == 0
    assert "memorisation gap" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())["numbers"]
    assert numbers.keys() == {"plain", "contrastive"}
    for kinds in numbers.values():
        assert kinds.keys() == {"trained on", "held-out", "generated"}
        assert 0 <= kinds["generated"]["by zeta"]["6"]["accuracy"]["mean"] <= 1
    for what in ("Calibration", "Ratios at zeta 6: plain", "data:image/png"):
        assert what in (tmp_path / "run" / "report.html").read_text()
    given = ["--sources", str(nets / "ddpm++-plain"), "--generated", str(tmp_path / "run" / "sets" / "plain"), *options]
    assert main(["run", "ratios", "quick", "--out", str(tmp_path / "again"), *given]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())["numbers"]["ddpm++-plain"]
    assert again == numbers["plain"]


def test_networks_that_may_have_seen_the_held_out_images_are_refused(tmp_path, capsys):
    small = ["--net.kind", "ddpm", "--net.width", "32", "--net.blocks", "1", "--net.mult", "1", "--net.attention"]
    assert main(["train", "--out", str(tmp_path / "net"), "--data", "digits", *small, "--training.steps", "1", "--training.batch", "4"]) == 0
    assert main(["convert", str(tmp_path / "net"), str(tmp_path / "model")]) == 0
    assert main(["run", "ratios", "quick", "--out", str(tmp_path / "run"), "--sources", str(tmp_path / "model")]) == 2
    assert "may have been trained on all of digits" in capsys.readouterr().err


def test_the_exact_denoiser_is_an_accurate_and_calibrated_classifier(generator):
    """Of N(0, 0.3^2) images and their noised copies: accuracy, AUC and cross-entropy of the closed form; calibration as good as chance."""
    law = GaussianMixture(torch.zeros(1, 1, 2, 2), 0.3)
    x, zetas = law.sample(500, generator), (0.0, 3.0)
    found = summarised(classified(law, x, zetas, 128), zetas)["by zeta"]
    assert found.keys() == {"0", "3"}
    for zeta in zetas:
        dirty = noised(x, zeta, stream(0, f"ratios noise {zeta}"))
        ratios = {"clean": law.llr(x, zeta)[:, None].double(), "noised": law.llr(dirty, zeta)[:, None].double()}
        exact, told = summarised(ratios, (zeta,))["by zeta"][f"{zeta:g}"], found[f"{zeta:g}"]
        for key in ("accuracy", "auc", "cross-entropy"):
            assert abs(told[key].mean - exact[key].mean) < 0.02
        assert abs(told["calibration"].mean - told["calibration by chance"]) < 4 * told["calibration"].stderr


def test_images_are_put_on_the_grid_of_the_data():
    x = torch.tensor([-2.0, -1.0, -0.95, 0.01, 0.99, 3.0])
    assert on_grid(x, 16.0).tolist() == [-1.0, -1.0, -1.0, 0.0, 1.0, 1.0]
    every = to_floats(torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(on_grid(every, 255.0), every)
