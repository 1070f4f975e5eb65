"""The experiment on slopes at a tiny budget: its page holds every method, and a second run starts from what is there."""

import json

from contrastive_diffusion.cli import main
from contrastive_diffusion.experiments.parallel import METHODS, law
from contrastive_diffusion.sampling import normal


def test_the_experiment_runs_and_is_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "parallel", "quick", "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    for methods in found["numbers"].values():
        assert set(methods) == set(METHODS)
        assert methods["secant"]["rounds"]["mean"] <= methods["paradigms"]["rounds"]["mean"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert main(["run", "parallel", "quick", "--out", str(out)]) == 0
    assert parts == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert "Secant against ParaDiGMS" in capsys.readouterr().out


def test_the_laws_have_the_shapes_they_say():
    import torch

    for name in ("ring", "blobs64", "curve", "ring+error"):
        denoiser, item = law(name)
        z = normal(0, torch.arange(3), torch.zeros(3, dtype=torch.int64), item)
        assert denoiser(z, torch.zeros(3)).shape == z.shape
