"""The experiment on slopes at a tiny budget: its page holds every method, a second run starts from what is there, trained networks can be given."""

import json

import pytest
import torch

from contrastive_diffusion.cli import main
from contrastive_diffusion.experiments._laws import LAWS
from contrastive_diffusion.experiments._parallel_page import METHODS, at_error
from contrastive_diffusion.experiments.parallel import Config, _nets
from contrastive_diffusion.parallel import Trace
from contrastive_diffusion.sampling import normal


def test_the_experiment_runs_and_is_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "parallel", "quick", "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())["numbers"]
    assert set(found["denoisers"]) == {"ring", "plain", "contrastive", "digits"}
    for methods in found["denoisers"].values():
        assert set(methods) == set(METHODS)
        assert methods["secant"]["ddpm rounds to 1e-2"]["mean"] <= methods["paradigms"]["ddpm rounds to 1e-2"]["mean"]
        assert methods["secant"]["window all"]["evals"]["mean"] <= methods["paradigms"]["window all"]["evals"]["mean"]
    assert set(found["equal error"]) == {"plain", "contrastive", "digits"}
    page = (out / "report.html").read_text()
    titles = {block["title"]: block["kind"] for block in json.loads((out / "results.json").read_text())["blocks"] if "title" in block}
    assert page.count("<svg ") == sum(kind != "table" for kind in titles.values())
    assert set(titles.values()) == {"table", "lines", "heat", "maps"}
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert main(["run", "parallel", "quick", "--out", str(out)]) == 0
    assert parts == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert "Secant against ParaDiGMS" in capsys.readouterr().out


def test_given_networks_are_not_trained(tmp_path):
    given = tuple(f"{name}={tmp_path}/{name}" for name in ("mine", "plain", "contrastive", "digits"))
    assert _nets(Config(out=str(tmp_path / "run"), nets=given)) == {n.split("=")[0]: n.split("=")[1] for n in given}
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        Config(nets=("runs/dino/plain",))
    with pytest.raises(ValueError, match="did you mean ring"):
        Config(laws=("rnig",))
    with pytest.raises(ValueError, match="different tolerances"):
        Config(sweep=(0.1, 0.01))


def test_rounds_at_equal_error_are_interpolated_in_the_logarithm_and_never_extrapolated():
    points = [(1e-4, 20.0, 8.0), (1e-2, 10.0, 4.0), (1e-3, 9.0, 3.0), (1.0, 2.0, 1.0)]
    assert at_error(points, 1e-3) == pytest.approx((15.0, 6.0))
    assert at_error(points, 0.1) == pytest.approx((5.5, 2.0))  # the looser run's luck does not count
    assert at_error(points, 5e-5) is None
    assert at_error(points, 2.0) is None
    assert at_error([(0.0, 20.0, 8.0), (1.0, 2.0, 1.0)], 1e-6) == pytest.approx((11.0, 4.5))


def test_a_trace_knows_what_each_round_cost_and_how_far_it_got():
    trace = Trace(ids=(3, 5))
    for number, sample, base, after, width in ((1, 3, 0, 4, 6), (1, 5, 0, 2, 6), (2, 3, 4, 10, 6), (3, 5, 2, 10, 8)):
        trace.records.append({"round": number, "sample": sample, "base": base, "after": after, "error": torch.zeros(width)})
    assert trace.rows().tolist() == [12, 6, 8]
    assert trace.frontiers().tolist() == [3.0, 6.0, 10.0]


@pytest.mark.parametrize("name", LAWS)
def test_the_laws_have_the_shapes_they_say(name):
    make, item, _ = LAWS[name]
    z = normal(0, torch.arange(3), torch.zeros(3, dtype=torch.int64), item)
    out = make()(z, torch.zeros(3))
    assert out.shape == z.shape
    assert bool(out.isfinite().all())
