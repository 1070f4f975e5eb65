import math

import pytest
import torch
from pydantic import ValidationError

from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.errors import RunError
from contrastive_diffusion.nets import MLP, NETS
from contrastive_diffusion.objectives import Contrastive, Denoising, Weighted
from contrastive_diffusion.schedules import uniform
from contrastive_diffusion.training import Rows, State, Training, stream, train

CONFIG = Training(steps=12, batch=16, lr=1e-2, warmup=3, ema=0.8, seed=4)
OBJECTIVE = Weighted({"denoising": (1.0, Denoising(uniform(-5, 5))), "contrastive": (0.1, Contrastive(share=0.5))})


def _state(config: Training = CONFIG) -> State:
    torch.manual_seed(0)
    return State(MLP(2, 16, 1), config)


def _same(a: State, b: State) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_resumed_is_uninterrupted_bit_for_bit(optimizer):
    config = Training(**{**CONFIG.__dict__, "optimizer": optimizer})
    whole, first = _state(config), _state(config)
    scalars = [step.scalars for step in train(whole, OBJECTIVE, dino())]
    for step in train(first, OBJECTIVE, dino()):
        if step.number == 5:
            break
    torch.manual_seed(99)  # the global stream has no say
    second = State(MLP(2, 16, 1), config)
    second.restore(first.tensors())
    assert [step.scalars for step in train(second, OBJECTIVE, dino())] == scalars[5:]
    assert _same(whole, second)


def test_a_restored_state_shares_no_memory():
    state = _state()
    next(train(state, Denoising(), dino()))
    tensors = state.tensors()
    kept = {k: v.clone() for k, v in tensors.items()}
    other = _state()
    other.restore(tensors)
    list(train(other, Denoising(), dino()))
    assert all(tensors[k].equal(kept[k]) for k in kept)


def test_the_average_is_the_recursion():
    state, decay = _state(), CONFIG.ema
    expected = None
    for _ in train(state, Denoising(), dino()):
        weights = torch.cat([p.detach().flatten() for p in state.net.parameters()])
        expected = weights.clone() if expected is None else decay * expected + (1 - decay) * weights
    averaged = torch.cat([p.detach().flatten() for p in state.averaged.parameters()])
    assert expected is not None
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-7)


def test_it_yields_after_the_optimizer_step():
    state = _state()
    before = state.net.outer.weight.detach().clone()
    step = next(train(state, Denoising(), dino()))
    assert (step.number, state.step) == (1, 1)
    assert not state.net.outer.weight.equal(before)
    assert {"loss", "lr", "grad_norm"} <= step.scalars.keys()


def test_rates():
    cosine, constant = Training(steps=100, lr=1.0, warmup=10), Training(steps=100, lr=1.0, warmup=10, rate="constant")
    assert constant.rate_at(0) == pytest.approx(0.1)
    assert [constant.rate_at(s) for s in (9, 50, 99)] == [1.0, 1.0, 1.0]
    assert cosine.rate_at(50) == pytest.approx(0.5)
    assert cosine.rate_at(99) < 1e-3
    assert Training(steps=10, lr=1.0, warmup=0).rate_at(0) == 1.0


def test_training_learns(generator):
    """A few hundred steps take the loss of N(0, 0.5^2) to its minimum, mean of sigmoid(alpha + log 0.25)."""
    x = 0.5 * torch.randn(5000, 2, generator=generator)
    torch.manual_seed(0)
    state = State(MLP(2, 32, 1, octaves=2), Training(steps=400, batch=256, lr=5e-3, warmup=20))
    losses = [step.scalars["loss"] for step in train(state, Denoising(uniform(-4, 4)), Rows(x))]
    levels = torch.linspace(-4, 4, 1001)
    assert sum(losses[-50:]) / 50 == pytest.approx(float(torch.sigmoid(levels + math.log(0.25)).mean()), rel=0.1)
    assert losses[0] > 1.2 * sum(losses[-50:]) / 50


def test_a_nonfinite_loss_stops_before_the_step_and_names_it():
    state, calls = _state(), 0

    def exploding(denoiser, x, generator=None):
        nonlocal calls
        calls += 1
        scalars = OBJECTIVE(denoiser, x, generator)
        return {"loss": scalars["loss"], "contrastive.loss": scalars["contrastive.loss"] / (0.0 if calls == 4 else 1.0)}

    exploding.evals = OBJECTIVE.evals
    steps = train(state, exploding, dino())
    for _ in range(3):
        next(steps)
    kept = state.tensors()
    with pytest.raises(RunError, match=r"given contrastive.loss = inf at step 4, expected finite"):
        next(steps)
    assert state.step == 3
    assert all(v.equal(kept[k]) for k, v in state.tensors().items())


def test_a_checkpoint_of_another_network_is_one_line():
    with pytest.raises(ValueError, match=r"differs in \d+ tensors, first net\."):
        State(MLP(2, 8, 1), CONFIG).restore(_state().tensors())


def test_streams_are_functions_of_their_names():
    draw = lambda *name: torch.rand(3, generator=stream(*name)).tolist()  # noqa: E731
    assert draw(1, "a", 2) == draw(1, "a", 2)
    assert len({tuple(draw(*name)) for name in ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3))}) == 4


def test_unknown_and_impossible_settings_are_refused():
    for bad in ({"step": 3}, {"steps": 0}, {"ema": 1.0}, {"rate": "linear"}):
        with pytest.raises(ValidationError):
            Training(**bad)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_networks_keep_the_contract(name, dim, generator):
    net = NETS[name](dim, 16, 2)
    z, level = torch.randn(7, dim, generator=generator), torch.linspace(-10, 14, 7)
    out = net(z, level)
    assert out.shape == z.shape
    assert out.isfinite().all()
    torch.testing.assert_close(net(z[2:5], level[2:5]), out[2:5])
    assert net.double()(z.double(), level.double()).dtype == torch.float64


def test_the_mlp_starts_as_the_denoiser_of_pure_noise(generator):
    z = torch.randn(4, 2, generator=generator)
    torch.testing.assert_close(MLP()(z, torch.full((4,), -12.0)), z, rtol=1e-4, atol=1e-4)
