"""Recipes and run folders: killed anywhere, continued to the same bits; nothing of another recipe is touched."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive_diffusion import checkpoints
from contrastive_diffusion.errors import RunError, UsageError
from contrastive_diffusion.experiments import summaries
from contrastive_diffusion.recipes import Loss, Net, Train, load_array, load_data, plain, recipe
from contrastive_diffusion.runs import Run, fit, load_denoiser, named_denoiser, work
from contrastive_diffusion.training import Training


def _config(out: Path, **training) -> Train:
    loss = Loss(contrastive=0.1, points=4)
    return Train(
        out=str(out), net=Net(width=8, blocks=1), loss=loss, training=Training(**{"steps": 40, "batch": 16, **training}), checkpoint_every=10
    )


def _final(out: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(sorted((out / "checkpoints").glob("*"))[-1])[0]


def test_a_finished_run_has_its_files_and_is_not_run_again(tmp_path):
    config = _config(tmp_path / "run")
    fit(config)
    names = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert names == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints/step-00000030.safetensors", "checkpoints/step-00000040.safetensors",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert {"loss", "denoising.loss", "contrastive.loss", "contrastive.accuracy", "lr", "grad_norm"} <= lines[0].keys()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    fit(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


KILLED = """
import sys
from contrastive_diffusion.recipes import recipe, Train
from contrastive_diffusion.runs import fit
fit(recipe(Train, sys.argv[1]))
"""


def test_kill_9_and_start_again_ends_in_the_same_bits(tmp_path):
    """Killed as a checkpoint appears, and between two of them; then left to finish."""
    fit(_config(tmp_path / "whole", steps=120))
    text = (tmp_path / "whole" / "recipe.yaml").read_text().replace(str(tmp_path / "whole"), str(tmp_path / "killed"))
    (tmp_path / "killed.yaml").write_text(text)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed.yaml")]
    newest = lambda: max((p.name for p in (tmp_path / "killed").rglob("step-*.safetensors")), default="")  # noqa: E731
    killed = 0
    for delay in (0.0, 0.04):
        start = newest()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while process.poll() is None and newest() == start and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, other = _final(tmp_path / "whole"), _final(tmp_path / "killed")
    assert all(one[k].equal(other[k]) for k in one)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "killed" / "metrics.jsonl").read_text()


def test_lines_after_the_last_checkpoint_are_written_again(tmp_path):
    config = _config(tmp_path / "run")
    fit(config)
    log = tmp_path / "run" / "metrics.jsonl"
    whole = log.read_text()
    (tmp_path / "run" / "checkpoints" / "step-00000040.safetensors").unlink()
    log.write_text(whole + '{"step": 41, "lo')
    fit(config)
    assert log.read_text() == whole


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    fit(_config(tmp_path / "run"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"another recipe \(training.lr was 0.002, now 0.5\)"):
        fit(_config(tmp_path / "run", lr=0.5))
    assert {p: p.read_bytes() for p in before} == before


def test_a_diverging_run_keeps_its_last_checkpoint(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 2)))
    config = _config(tmp_path / "run", lr=1e30, clip=1e30, warmup=0)
    with pytest.raises(RunError, match=r"at step \d+, expected finite numbers"):
        fit(Train(**{**config.__dict__, "data": str(tmp_path / "x.npy"), "checkpoint_every": 1}))
    assert all(v.isfinite().all() for v in _final(tmp_path / "run").values())


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected to write there"):
        fit(_config(tmp_path / "file" / "run"))


def test_fine_tuning_starts_from_the_average_and_checks_the_network(tmp_path):
    fit(_config(tmp_path / "base"))
    config = Train(**{**_config(tmp_path / "tuned", steps=1, lr=1e-12).__dict__, "init": str(tmp_path / "base")})
    tuned = fit(config)
    base, _ = load_denoiser(tmp_path / "base")
    z, level = torch.randn(5, 2), torch.linspace(-5, 12, 5)
    torch.testing.assert_close(tuned(z, level), base(z, level), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="the network of this recipe"):
        fit(Train(**{**config.__dict__, "net": Net(width=9, blocks=1), "out": str(tmp_path / "other")}))


def test_names_of_denoisers(tmp_path):
    assert named_denoiser("dino")[1] == (2,)
    with pytest.raises(UsageError, match="a toy whose law is a mixture"):
        named_denoiser("moons")
    with pytest.raises(UsageError, match="expected a run folder or one of"):
        named_denoiser("dinoo")
    with pytest.raises(UsageError, match=r"expected a folder with recipe.yaml"):
        named_denoiser(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {stepz: 3}", r"unknown key 'training.stepz', expected one of steps"),
        ("los: {}", "unknown key 'los', expected one of loss"),
        ("training: {steps: 0}", "training.steps = 0, expected: Input should be greater than or equal to 1"),
        ("net: {kind: cnn}", "net.kind = 'cnn'"),
        ("- 1", "holding a list, expected a mapping"),
        ("{", "expected YAML"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        recipe(Train, str(tmp_path / "r.yaml"))
    assert "\n" not in str(caught.value)


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean edm"):
        recipe(Train, "edmm", "train-")
    with pytest.raises(UsageError, match="an existing YAML file"):
        recipe(Train, "nowhere.yaml")


def test_bundled_recipes_are_valid_and_round_trip():
    import contrastive_diffusion.experiments as experiments

    assert recipe(Train, "edm", "train-").loss.denoising == "edm"
    assert recipe(Train, "contrastive", "train-").loss.contrastive > 0
    for name in summaries():
        config = experiments.load(name).Config
        quick = recipe(config, "quick", f"{name}-")
        assert quick != config()
        assert type(quick)(**plain(quick)) == quick


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n3,zz\n", "expected a numeric array"),
        ("a.csv", "", "N >= 1"),
        ("a.npy", b"\x93NUMPY junk", "expected a numeric array"),
        ("a.npy", None, "an existing .npy or .csv file"),
        ("a.csv", "x,y\n1,2\nnan,2\n", "1 non-finite"),
    ],
)
def test_bad_data_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        load_data(str(tmp_path / name))


def test_arrays_are_read_with_and_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4e0\n")
    (tmp_path / "b.csv").write_text("1e0,2\n3,4\n")
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert load_array(tmp_path / "a.csv").equal(expected)
    assert load_array(tmp_path / "b.csv").equal(expected)
    np.save(tmp_path / "c.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UsageError, match="expected a numeric array"):
        load_array(tmp_path / "c.npy")


def _square(x: int, position: int) -> int:
    if x == 13:
        raise RunError("given 13")
    return x * x


def test_work_is_done_in_order_by_processes_and_its_failure_is_raised():
    assert work([(_square, (i,)) for i in range(4)], 2) == [0, 1, 4, 9]
    with pytest.raises(RunError, match="given 13"):
        work([(_square, (i,)) for i in (1, 13, 2)], 2)


def test_parts_are_made_once(tmp_path):
    run, made = Run(tmp_path), []

    def make():
        made.append(1)
        return {"a": torch.ones(2)}, {"n": 1}

    for _ in range(2):
        tensors, meta = run.part("p", make)
        assert tensors["a"].equal(torch.ones(2))
        assert meta == {"n": 1}
    assert made == [1]


def _sleep(seconds: float, position: int) -> float:
    time.sleep(seconds)
    return seconds


def test_a_failure_ends_the_work_of_the_others_at_once():
    start = time.monotonic()
    with pytest.raises(RunError, match="given 13"):
        work([(_sleep, (120.0,)), (_square, (13,))], 2)
    assert time.monotonic() - start < 60


INTERRUPTED = """
import sys
from contrastive_diffusion.cli import main
sys.exit(main(["run", "two-modes", "quick", "--out", sys.argv[1], "--base.steps", "1000000"]))
"""


def test_ctrl_c_in_the_middle_of_a_run_is_one_line_and_leaves_no_process(tmp_path):
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background of a shell is born deaf to ctrl-C
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "base" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.replace("\r", "\n").strip().split("\n")[-1] == "cdl: interrupted; run the same command again to continue"
    assert "Traceback" not in error
    deadline = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_sweep_runs_and_continues(tmp_path):
    """Every solver, grid and churn of `cdl run edm-sweep quick`; run again it changes nothing."""
    from contrastive_diffusion.experiments.edm_sweep import Config, run

    config = dataclasses.replace(recipe(Config, "quick", "edm-sweep-"), out=str(tmp_path / "sweep"), jobs=1)
    results = (run(config) / "results.json").read_bytes()
    numbers = json.loads(results)["numbers"]
    exact = numbers["dino"]["deterministic"]["35"]["log density"]
    assert abs(exact["mean"] - numbers["true samples"]["mean"]) < 5 * (exact["stderr"] + numbers["true samples"]["stderr"])
    assert (run(config) / "results.json").read_bytes() == results
