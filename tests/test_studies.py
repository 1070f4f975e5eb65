"""The larger experiments end to end at a tiny budget: their numbers are finite, they continue where they stopped, their pages are written."""

import json
import math

import pytest

from contrastive_diffusion.experiments import contrastive_study, noise_classifier
from contrastive_diffusion.experiments._study_measures import matched_range, off_level_map
from contrastive_diffusion.recipes import recipe
from contrastive_diffusion.report import write
from contrastive_diffusion.training import Training


def _finite(value) -> bool:
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    if isinstance(value, list):
        return all(_finite(v) for v in value)
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.slow
def test_the_contrastive_study_runs_and_continues(tmp_path):
    values = {"laws": {"two-modes": {"base": 12, "branch": 4}, "digits": {"base": 12, "branch": 4}}, "out": str(tmp_path / "s"), "seeds": 2}
    config = contrastive_study.Config(**values, factor_seeds=2, samples=12, steps=(20, 5), batch=64, jobs=1)  # pyright: ignore
    folder = contrastive_study.run(config)
    results = json.loads((folder / "results.json").read_text())
    assert _finite(results["numbers"]["changes"])
    arms = results["numbers"]["measured"]["two-modes"]
    spent = {name: runs[0]["evals"] for name, runs in arms.items()}
    equal = {v for k, v in spent.items() if k not in ("plain, equal steps", "contrastive, from scratch")}
    assert max(equal) - min(equal) <= 64 * 2, "arms at equal evaluations"
    before = (folder / "two-modes/0/plain/measured.json").stat().st_mtime_ns
    (folder / "two-modes/1/uniform/measured.json").unlink()
    contrastive_study.run(config)
    assert json.loads((folder / "results.json").read_text())["numbers"] == results["numbers"]
    assert (folder / "two-modes/0/plain/measured.json").stat().st_mtime_ns == before
    assert "two-modes: where the parallel sampler looks" in write(folder).read_text()


@pytest.mark.slow
def test_the_noise_classifier_runs(tmp_path):
    config = noise_classifier.Config(
        out=str(tmp_path / "n"), base=Training(steps=30, batch=64), branch=Training(steps=8, batch=64), points=60, evals=272, jobs=1
    )
    folder = noise_classifier.run(config)
    numbers = json.loads((folder / "results.json").read_text())["numbers"]
    assert numbers["exact denoiser"]["total variation to Bayes"]["mean"] < 0.25
    assert numbers["Bayes"]["total variation to Bayes"]["mean"] == 0
    assert numbers["exact denoiser"]["auc -6"]["mean"] > 0.95
    assert "Calibration" in write(folder).read_text()


def test_where_the_parallel_sampler_looks_is_noisier_than_it_claims():
    """Picard's first iterates of clean steps are copies of noise: their likeliest level lies far below the nominal one."""
    found = off_level_map("two-modes")
    low, high = matched_range(found)
    assert low < high < 9.2
    early = found["offset.3"][found["steps.3"] > 4]
    assert float(early[early.isfinite()].mean()) < -1
    assert len(found["points.z"]) == len(found["points.logsnr"])


def test_quick_recipes_are_valid():
    for name, kind in (("contrastive-study", contrastive_study.Config), ("noise-classifier", noise_classifier.Config)):
        assert recipe(kind, "quick", f"{name}-").out.endswith(name)
