"""Training of image networks: one process or two, accumulated, labelled, resumed, killed; all the same steps."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from contrastive_diffusion import channel, checkpoints, schedules
from contrastive_diffusion.checkpoints import convert
from contrastive_diffusion.checkpoints.model import Model
from contrastive_diffusion.combinators import guided
from contrastive_diffusion.data.archives import Array
from contrastive_diffusion.data.images import Images as ImageSet
from contrastive_diffusion.denoisers import from_edm
from contrastive_diffusion.errors import RunError, UsageError
from contrastive_diffusion.nets.preconditioning import PRECONDITIONING, Preconditioned
from contrastive_diffusion.objectives import WEIGHTINGS, Contrastive, Denoising, Weighted
from contrastive_diffusion.recipes import Images, Loss, Net, Train, Watch, plain, recipe
from contrastive_diffusion.runs import fit, load_denoiser, load_trained
from contrastive_diffusion.schedules import uniform
from contrastive_diffusion.training import Batch, Feed, Processes, State, Training, stream, train
from contrastive_diffusion.training.loop import Loss as LossModule

pytest.importorskip("sklearn")
NET = Net(kind="ddpm++", width=8, blocks=1, mult=(1, 2), attention=(4,), sigma_data=0.75, dropout=0.2)


def _config(out: Path, images: dict | None = None, watch: dict | None = None, **training) -> Train:
    loss = Loss(denoising="edm", contrastive=0.02, points=4)
    settings = Training(**{"steps": 6, "batch": 16, "micro": 8, "warmup": 2, "lr": 1e-3, **training})
    return Train(
        data="digits", out=str(out), net=NET, loss=loss, training=settings, images=Images(**{"holdout": 97, **(images or {})}),
        watch=Watch(**{"rows": 4, "evals": 16, "samples": 4, "steps": 3, **(watch or {})}), checkpoint_every=2,
    )  # fmt: skip


def _final(out: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(sorted((out / "checkpoints").glob("*"))[-1])[0]


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


WORKER = """
import sys
from contrastive_diffusion.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def _write(config: Train, path: Path) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(plain(config)))
    return path


def _start(recipe_file: Path, world: int) -> list[subprocess.Popen]:
    """Processes as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, str(recipe_file)]
    return [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]


STEPS = 10


def _all_options(out: Path) -> Train:
    return _config(out, {"labels": True, "augment": 0.2}, {"every": 5}, label_dropout=0.1, steps=STEPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(_all_options(out))
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The same run by two processes."""
    folder = tmp_path_factory.mktemp("pair")
    workers = _start(_write(_all_options(folder / "run"), folder / "run.yaml"), 2)
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert "trained" in outputs[0][0]
    assert "trained" not in outputs[1][0]
    return folder / "run"


def test_two_processes_train_as_one(whole, pair):
    """The same rows, levels, noise and dropout masks; gradients differ by the order of one sum: losses agree to 1e-4 over the run."""
    one, two = _lines(whole), _lines(pair)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-7)
    assert (pair / "samples" / f"step-{STEPS:08d}.png").exists()


def _together(config: Train, file: Path) -> None:
    workers = _start(_write(config, file), 2)
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs


def test_a_network_shared_out_over_processes_trains_as_one_and_resumes_to_the_same_bits(whole, tmp_path):
    """FSDP: the same losses, and whole checkpoints: average and optimizer too; one process could go on with them."""
    config = _all_options(tmp_path / "run")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, shard=True))
    _together(config, tmp_path / "run.yaml")
    one, two = _lines(whole), _lines(tmp_path / "run")
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[0])["step"] == 5
    plain, shared = _final(whole), _final(tmp_path / "run")
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in shared.items()}
    assert any(k.startswith("optimizer.") for k in shared)
    far = [k for k in plain if not torch.allclose(plain[k].float(), shared[k].float(), rtol=0.02, atol=2e-4)]
    assert not far
    for file in sorted((tmp_path / "run" / "checkpoints").glob("*"))[1:]:
        file.unlink()  # as if killed after the first of them
    _together(config, tmp_path / "run.yaml")
    again = _final(tmp_path / "run")
    assert all(shared[k].equal(again[k]) for k in shared)


def test_a_lost_process_is_one_line_and_the_run_continues_to_the_same_bits(pair, tmp_path):
    file = _write(_all_options(tmp_path / "run"), tmp_path / "run.yaml")
    first, second = _start(file, 2)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").rglob("step-*.safetensors")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    _, error = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 1, error
    line = next(text for text in error.replace("\r", "\n").split("\n") if text.startswith("cdl: "))
    assert "expected all alive, but process 0 lost another" in line
    assert "continue from the last checkpoint" in line
    assert len(_lines(tmp_path / "run")) < STEPS
    workers = _start(file, 2)
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    one, other = _final(pair), _final(tmp_path / "run")
    assert all(one[k].equal(other[k]) for k in one)


def test_resumed_is_uninterrupted_bit_for_bit_with_dropout_labels_and_augmentation(whole, tmp_path):
    config = _all_options(tmp_path / "run")
    fit(config)
    for file in sorted((tmp_path / "run" / "checkpoints").glob("*"))[1:]:
        file.unlink()  # as if killed after the first of them
    torch.manual_seed(77)
    fit(config)
    one, other = _final(whole), _final(tmp_path / "run")
    assert all(one[k].equal(other[k]) for k in one)
    assert (whole / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()


def test_accumulated_gradients_are_those_of_the_whole(tmp_path):
    """With a loss that draws nothing, passes of 4 rows sum to the pass of 16."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))

    def plain_loss(denoiser, batch, generator=None):
        return {"loss": (denoiser(batch, torch.zeros(len(batch))) - batch).square().mean()}

    class Set:
        def __len__(self):
            return len(x)

        def rows(self, index):
            return x[index], None

    ends = []
    for micro in (None, 4):
        torch.manual_seed(0)
        net = nn.Linear(3, 3)
        net.forward = lambda z, logsnr, net=net: nn.functional.linear(z, net.weight, net.bias)
        state = State(net, Training(steps=5, batch=16, micro=micro, lr=1e-2))
        losses = [step.scalars["loss"] for step in train(state, plain_loss, Set())]
        ends.append((losses, net.weight.detach().clone()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    torch.testing.assert_close(ends[0][1], ends[1][1])


class Echo(nn.Module):
    """A network that answers with its labels and remembers which row got which."""

    label_dim, convention, sigma_min = 2, "edm", 0.0

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, y, sigma, class_labels=None, augment_labels=None):
        assert class_labels is not None
        self.seen.append((y.detach(), class_labels))
        return y


@pytest.mark.parametrize("share", [1 / 16, 0.5, 1.0])
def test_labels_stay_with_their_rows_in_every_objective(share):
    """Rows of value +-1000 and labels that say which: whatever rows an objective draws, repeats or noises, the label is the row's."""
    sign = torch.where(torch.rand(32, generator=stream(0, "signs")) < 0.5, 1.0, -1.0)
    x = 1000 * sign.reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    labels = torch.stack([sign, -sign], 1)
    net = Echo()
    objective = Weighted({"denoising": (1.0, Denoising(uniform(-2, 8))), "contrastive": (1.0, Contrastive(uniform(-2, 8), points=4, share=share))})
    objective(from_edm(net, labels), x, stream(0, "x"))
    assert len(net.seen) == 2
    for y, given in net.seen:
        assert y.mean((1, 2, 3)).sign().equal(given[:, 0])


def test_label_dropout_drops_its_share():
    data = ImageSet(
        Array(torch.zeros(50, 1, 1, 1, dtype=torch.uint8).numpy(), torch.arange(50).numpy() % 5, "x"),
        (1, 1, 1),
        5,
        False,
        "stop",
        torch.arange(50).numpy(),
    )
    feed = Feed(data, Training(batch=1000, label_dropout=0.25))
    labels = feed[0].class_labels
    assert labels is not None
    assert float((labels.sum(1) == 0).float().mean()) == pytest.approx(0.25, abs=0.05)


def test_the_average_of_a_half_life_is_edm_s():
    config = Training(batch=128, ema_half_life=500_000)
    assert config.decay_at(0) == 0.0
    assert config.decay_at(100) == pytest.approx(0.5 ** (128 / (0.05 * 12800)))
    assert config.decay_at(10**6) == pytest.approx(0.5 ** (128 / 500_000))
    steady = Training(batch=128, ema_half_life=500_000, ema_rampup=None)
    # Half of the start is left after a half-life, as in the paper's fine-tuning.
    assert steady.decay_at(0) ** 3906 == pytest.approx(0.5, rel=1e-3)


def test_bfloat16_and_channels_last_train_alike():
    losses = []
    for options in ({}, {"precision": "bfloat16"}, {"channels_last": True}):
        torch.manual_seed(0)
        spec = NET.spec((1, 8, 8))
        assert spec is not None
        net = spec.build()
        state = State(net, Training(steps=2, batch=8, **options))
        data = ImageSet(Array(torch.zeros(8, 1, 8, 8, dtype=torch.uint8).numpy(), None, "x"), (1, 8, 8), 0, False, "stop", torch.arange(8).numpy())
        losses.append([step.scalars["loss"] for step in train(state, Denoising(uniform(-4, 4)), data, lambda net: from_edm(net))])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", PRECONDITIONING)
def test_the_loss_of_each_preconditioning_has_its_law_and_effective_weight_one(kind):
    """EDM's Table 1: lambda(sigma) c_out(sigma)^2 = 1, so a network that says nothing has unit loss; its levels are those the net is trusted on."""
    loss = Loss(denoising=kind)
    net = Preconditioned(nn.Identity(), kind)
    logsnr, _ = schedules.draw(loss.law(), 64, stream(0, "levels"))
    sigma = channel.sigma_of_logsnr(logsnr)
    objective = loss.build(net.sigma_data)
    assert isinstance(objective, Denoising)
    weight = WEIGHTINGS[objective.weighting](logsnr, net.sigma_data) / sigma.square()  # on the squared error of x
    torch.testing.assert_close(weight * PRECONDITIONING[kind](net, sigma).out.square(), torch.ones(64, dtype=torch.float64))
    if kind != "edm":
        low, high = schedules.ends(loss.law())
        assert math.exp(-high / 2) == pytest.approx(net.sigma_min, rel=1e-3)
        assert math.exp(-low / 2) == pytest.approx(net.sigma_max, rel=1e-3)


@pytest.mark.parametrize("kind", ["vp", "ve", "iddpm"])
def test_every_preconditioning_is_trained_by_a_recipe(kind, tmp_path):
    config = _config(tmp_path / "run", {}, steps=2)
    net = dataclasses.replace(config.net, precondition=kind)
    denoiser = fit(dataclasses.replace(config, net=net, loss=Loss(denoising=kind)))
    assert _lines(tmp_path / "run")[0]["loss"] == pytest.approx(1.0, abs=0.15)  # an untrained network says nothing
    assert denoiser(torch.zeros(2, 1, 8, 8), torch.zeros(2)).isfinite().all()


def test_what_a_run_shows_on_the_way(whole):
    lines = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, STEPS]
    assert {"error per dimension", "nll, nats per dimension", "ratio accuracy"} <= lines[0].keys()
    assert (whole / "samples" / "step-00000010.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((whole / "data.json").read_text())["sha256"]) == 64


def test_validation_knows_the_exact_denoiser():
    """For N(0, 1) data the error is sigmoid(logsnr) per dimension and the nll is the entropy's."""
    from contrastive_diffusion.runs.watching import LEVELS, validation

    x = torch.randn(256, 1, 4, 4, generator=stream(0, "x"))
    found = validation(lambda z, logsnr: torch.sigmoid(-logsnr).sqrt().reshape(-1, 1, 1, 1) * z, x, 64)
    for level, (mean, error) in zip(LEVELS, found["error per dimension"], strict=True):
        assert mean == pytest.approx(float(torch.sigmoid(torch.tensor(level))), abs=4 * error + 1e-4)
    mean, error = found["nll, nats per dimension"]
    assert mean == pytest.approx(float(0.5 * (x.square().mean() + torch.log(torch.tensor(2 * torch.pi)))), abs=5 * error + 0.01)
    assert found["ratio accuracy"][0][0] < 0.75  # noised N(0, 1) is N(0, 1): nothing to tell apart


def test_a_run_converts_to_a_model_and_is_fine_tuned(whole, tmp_path):
    card = convert(whole, tmp_path / "model")
    assert (card["weights"], card["net"]["label_dim"], card["net"]["augment_dim"]) == ("ema", 10, 9)
    model, trained = Model.from_pretrained(tmp_path / "model"), load_trained(whole)
    z, level = torch.randn(2, 1, 8, 8), torch.tensor([-3.0, 4.0])
    one = torch.eye(10)[3:4]
    with torch.no_grad():
        assert model.denoiser(one)(z, level).equal(trained.denoiser(one)(z, level))
        assert model(z, level).equal(load_denoiser(tmp_path / "model")[0](z, level))
    raw = convert(whole, tmp_path / "raw", weights="raw")
    assert raw["weights"] == "raw"
    config = _config(tmp_path / "tuned", {"labels": True}, steps=1, lr=1e-12)
    fit(Train(**{**config.__dict__, "init": str(tmp_path / "model"), "net": Net(kind="ddpm++")}))
    tuned = load_denoiser(tmp_path / "tuned")[0]
    with torch.no_grad():
        torch.testing.assert_close(tuned(z, level), model(z, level), rtol=1e-4, atol=1e-5)


def test_a_network_trained_with_label_dropout_is_guided(whole):
    trained = load_trained(whole)
    conditional, unconditional = trained.of_class(3), trained.of_class(None)
    z, level = torch.randn(3, 1, 8, 8, generator=stream(0, "z")), torch.tensor([-3.0, 0.0, 4.0])
    with torch.no_grad():
        a, b = conditional(z, level), unconditional(z, level)
        assert not a.equal(b)
        torch.testing.assert_close(guided(conditional, unconditional, 2.5)(z, level), b + 2.5 * (a - b), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"label 10, expected 0 \.\. 9"):
        trained.of_class(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": Images()}, r"labels of length 0 for .*, expected 10, its own; set images\.labels"),
        ({"data": "patches", "images": Images()}, r"images of shape \(3, 32, 32\) for .*, expected \(1, 8, 8\)"),
    ],
)
def test_fine_tuning_on_data_that_does_not_fit_is_one_line(whole, tmp_path, change, message):
    if change.get("data"):
        pytest.importorskip("skimage")
    convert(whole, tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        fit(Train(**{**_config(tmp_path / "t").__dict__, "init": str(tmp_path / "model"), **change}))
    assert not (tmp_path / "t").exists()


def test_a_changed_recipe_is_told_refused_and_accepted_on_request(tmp_path):
    fit(_config(tmp_path / "run", steps=2))
    longer = _config(tmp_path / "run", steps=4)
    with pytest.raises(UsageError, match=r"training\.steps was 2, now 4.*--changed accept"):
        fit(longer)
    fit(Train(**{**longer.__dict__, "changed": "accept"}))
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "recipe.before-0.yaml").exists()


def test_changed_images_are_refused(tmp_path):
    fit(_config(tmp_path / "run", steps=2))
    file = tmp_path / "run" / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(UsageError, match=r"digits with 1797 images, content .*expected that of"):
        fit(_config(tmp_path / "run", steps=2))


def test_memory_that_runs_out_names_the_knob():
    def greedy(denoiser, x, generator=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    state = State(nn.Linear(2, 2), Training(steps=1, batch=4))
    with pytest.raises(RunError, match=r"passes of 4 rows.*lower training\.micro.*net\.checkpointing"):
        next(
            train(
                state,
                greedy,
                ImageSet(Array(torch.zeros(4, 1, 1, 1, dtype=torch.uint8).numpy(), None, "x"), (1, 1, 1), 0, False, "stop", torch.arange(4).numpy()),
            )
        )


def test_processes_must_divide_the_passes():
    state = State(nn.Linear(2, 2), Training(steps=1, batch=4))
    with pytest.raises(UsageError, match=r"1 passes of 4 rows for 2 processes, expected a multiple of 2 passes; set training\.micro to 2"):
        next(train(state, Denoising(), None, processes=Processes(0, 2)))  # pyright: ignore
    with pytest.raises(ValidationError, match="micro to divide batch"):
        Training(batch=10, micro=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "digits"}, "for a network of vectors"),
        ({"net": Net(kind="ddpm++"), "data": "nowhere"}, "an existing file or folder"),
        ({"net": Net(kind="ddpm"), "images": Images(labels=True), "data": "digits"}, "given labels for a ddpm network"),
        ({"net": Net(kind="ddpm", width=30), "data": "digits"}, "a multiple of 32"),
        ({"net": Net(kind="ddpm++", mult=(1, 2, 2, 2, 2)), "data": "digits"}, "resolution 8 for 5 levels"),
    ],
)
def test_recipes_that_do_not_fit_together_are_one_line(values, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        fit(Train(out=str(tmp_path / "run"), **values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_augmentation_labels_reach_a_network_that_takes_them():
    spec = NET.spec((1, 8, 8), augment=True)
    assert spec is not None
    module = LossModule(spec.build(), Denoising(uniform(-4, 4)), from_edm, Training(batch=4))
    module(Batch(torch.zeros(4, 1, 8, 8)), stream(0, "x"))["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())  # also without labels: processes wait for every gradient


def test_the_recipes_of_the_papers_checkpoints_are_valid():
    from importlib.resources import files

    names = sorted(
        f.name.removesuffix(".yaml") for f in files("contrastive_diffusion.recipes").iterdir() if f.name.startswith(("finetune-", "train-"))
    )
    assert {
        "finetune-cifar10",
        "finetune-cifar10-cond",
        "finetune-ffhq",
        "finetune-afhqv2",
        "finetune-ddpm-cifar10",
        "finetune-ddpm-cifar10-ema",
    } <= set(names)
    for name in names:
        kind, _, rest = name.partition("-")
        config = recipe(Train, rest, f"{kind}-")
        assert config != Train()
        config.loss.build(config.net.sigma_data)
    edm = recipe(Train, "cifar10", "finetune-").training
    # Table 5 as EDM's tool reads it: half a million images at a rate that has risen to 5 % of its nominal value.
    assert edm.steps * edm.batch == pytest.approx(500_000, rel=1e-3)
    assert edm.rate_at(edm.steps - 1) == pytest.approx(0.05 * 2e-4, rel=1e-3)


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    fit(_config(tmp_path / "run", watch={"logger": "tensorboard"}, steps=2))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
