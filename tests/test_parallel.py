"""Parallel-in-time sampling against the sequential sampler: to the bit at tolerance 0, within the tolerance otherwise, at a bounded cost."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, eight_gaussians, two_modes
from contrastive_diffusion.denoisers import Counted
from contrastive_diffusion.errors import RunError
from contrastive_diffusion.parallel import SLOPES, Paradigms, Parallel, Parareal, Trace
from contrastive_diffusion.parallel import task as task_module
from contrastive_diffusion.parallel.scan import block_of, scan, slots_for
from contrastive_diffusion.parallel.slopes import tables
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.solvers import SOLVERS, StepMap

GRID = schedules.grid(schedules.ddpm(), 60)
FAMILY = {name: make() for name, make in SOLVERS.items() if not make().alone} | {"ddpm-beta": solvers.ddpm("beta"), "ddim-0.5": solvers.ddim(0.5), "ddim-1": solvers.ddim(1.0)}  # fmt: skip
every = pytest.mark.parametrize("solver", FAMILY.values(), ids=FAMILY)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 17, 65])
def test_the_scan_is_the_recursion(size, generator):
    slots = slots_for(size)
    assert size <= slots < size + math.isqrt(size) + 1
    r = torch.randn(slots, 3, 2, 5, generator=generator, dtype=torch.float64)
    m = torch.rand(slots, 3, 2, generator=generator, dtype=torch.float64)
    start = torch.tensor([0, slots // 2, slots - 1])  # every lane begins elsewhere in the ring
    m[start, torch.arange(3)] = 0
    expected = torch.empty_like(r)
    for lane in range(3):
        d = torch.zeros(2, 5, dtype=torch.float64)
        for j in range(slots):
            s = (int(start[lane]) + j) % slots
            d = expected[s, lane] = r[s, lane] + m[s, lane, :, None] * d
    torch.testing.assert_close(scan(r.clone(), m, block_of(size)), expected)


def test_what_stands_still_stays_exactly_zero_in_the_scan(generator):
    r, m = torch.randn(72, 4, 1, 3, generator=generator), torch.rand(72, 4, 1, generator=generator)
    m[40], r[40:64] = 0, 0
    assert bool((scan(r, m, 8)[40:64] == 0).all())


@every
def test_slopes_are_derivatives_of_the_step(solver):
    """For denoisers eps_hat = c z the step's slope is the table's, at c = 0, noise (standard normal data) and 1 / noise (x_hat = 0)."""
    step = StepMap(solver, lambda z, logsnr: z, GRID)
    if step.table is None:
        return
    t, i = tables(step), torch.arange(60)
    one = torch.ones(60, 1, dtype=torch.float64)
    for name, c in (("eps", 0 * t.sigma), ("gauss", t.sigma), ("x0", 1 / t.sigma)):
        step = StepMap(solver, lambda z, logsnr, c=c: c[:, None] * z, GRID)
        output = step.read(one, i)
        moved = step.combine(one, i, [output] * (step.memory + 1), 0 * one) - step.combine(0 * one, i, [0 * output] * (step.memory + 1), 0 * one)
        torch.testing.assert_close(getattr(t, name), moved[:, 0])


@every
@pytest.mark.parametrize("window", ["all", 1, 7])
def test_tolerance_zero_is_the_sequential_path_bit_for_bit(solver, window):
    exact = Sequential(solver)(dino(), GRID, (5, 2), seed=1, path=True)
    counted = Counted(dino())
    drawn = Parallel(solver, window=window, tolerance=0.0)(counted, GRID, (5, 2), seed=1, path=True)
    assert exact.path is not None
    assert drawn.path is not None
    assert drawn.path.equal(exact.path)
    assert drawn.x.equal(exact.x)
    assert drawn.evals == counted.rows
    assert drawn.evals == int(drawn.sample_evals.sum()) if solver.evals == 1 else drawn.evals <= int(drawn.sample_evals.sum())
    assert drawn.rounds <= exact.rounds + (solver.evals > 1)
    if window == 1:
        assert drawn.evals == exact.evals
        assert drawn.rounds == exact.rounds


@every
def test_no_slope_changes_the_bits_of_any_solver(solver):
    exact = Sequential(solver)(dino(), GRID, (2, 2), seed=2)
    for slope in set(SLOPES) - {"secant"}:
        assert Parallel(solver, slope, 16, 0.0)(dino(), GRID, (2, 2), seed=2).x.equal(exact.x)


@pytest.mark.parametrize(("steps", "window"), [(5, 5), (60, 60), (100, 64)])
def test_the_default_window_is_64_or_all_of_a_shorter_grid(steps, window):
    assert Parallel(solvers.ddpm())(two_modes(), schedules.grid(schedules.ddpm(), steps), (2, 1)).window == window


@pytest.mark.parametrize("options", [*({"slope": s} for s in SLOPES), {"anderson": 3}, {"anderson": 1, "slope": "picard"}, {"lanes": 2}, {"static_rows": True},
                                     {"max_rows": 5}, {"fallback": False}, {"per_channel": True}], ids=str)  # fmt: skip
def test_every_option_is_exact_at_tolerance_zero(options):
    exact = Sequential(solvers.ddpm())(dino(), GRID, (5, 2), seed=1)
    assert Parallel(solvers.ddpm(), **{"window": 16, "tolerance": 0.0} | options)(dino(), GRID, (5, 2), seed=1).x.equal(exact.x)


@pytest.mark.parametrize("guess", ["gauss", "constant", "path"])
def test_every_guess_is_exact_and_the_answer_itself_takes_one_round_a_window(guess):
    exact = Sequential(solvers.ddpm())(dino(), GRID, (5, 2), seed=1, path=True)
    assert exact.path is not None
    given = exact.path if guess == "path" else guess
    drawn = Parallel(solvers.ddpm(), window=20, tolerance=0.0)(dino(), GRID, (5, 2), seed=1, guess=given)
    assert drawn.x.equal(exact.x)
    if guess == "path":
        assert (drawn.rounds, drawn.evals) == (3, exact.evals)


def test_samples_do_not_depend_on_batch_lanes_or_window():
    whole = Parallel(solvers.ddpm(), window=16, tolerance=0.0)(dino(), GRID, (7, 2), seed=3).x
    assert Parallel(solvers.ddpm(), window=5, tolerance=0.0, max_rows=3)(dino(), GRID, (3, 2), seed=3, first=2).x.equal(whole[2:5])
    loose = Parallel(solvers.ddpm(), window=16, tolerance=0.1)
    assert loose(dino(), GRID, (1, 2), seed=3, first=4).x.equal(loose(dino(), GRID, (7, 2), seed=3).x[4:5])
    assert Parallel(solvers.ddpm(), window=16, tolerance=0.1, lanes=2)(dino(), GRID, (7, 2), seed=3).x.equal(loose(dino(), GRID, (7, 2), seed=3).x)


def test_a_host_that_hears_one_round_late_changes_nothing_but_evaluations(monkeypatch):
    """What happens on a GPU, where the host reads frontiers one round late."""
    prompt = {key: Parallel(solvers.ddpm(), window=16, **key_options)(dino(), GRID, (7, 2), seed=3, path=True) for key, key_options in LATE.items()}
    monkeypatch.setattr(task_module, "LAG", {"cpu": 1})
    for key, options in LATE.items():
        late = Parallel(solvers.ddpm(), window=16, **options)(dino(), GRID, (7, 2), seed=3, path=True)
        assert late.path is not None
        assert late.path.equal(prompt[key].path)
        assert late.x.equal(prompt[key].x)


LATE = {"plain": {"fallback": False}, "exact": {"tolerance": 0.0, "fallback": False}, "lanes": {"lanes": 3, "fallback": False}}


def test_images_and_per_channel_slopes(generator):
    law = GaussianMixture(torch.randn(4, 3, 4, 4, generator=generator), 0.2)
    exact = Sequential(solvers.ddpm())(law, GRID, (7, 3, 4, 4), seed=0)
    for options in ({}, {"per_channel": True}):
        assert Parallel(solvers.ddpm(), tolerance=0.0, **options)(law, GRID, (7, 3, 4, 4), seed=0).x.equal(exact.x)
        close = Parallel(solvers.ddpm(), **options)(law, GRID, (7, 3, 4, 4), seed=0)
        # The median: a sample that hesitates between two modes may end in the other one.
        assert (close.x - exact.x).abs().flatten(1).amax(1).median() < 0.002


def test_after_k_rounds_k_steps_are_exact():
    exact = Sequential(solvers.ddpm())(dino(), GRID, (1, 2), seed=1, path=True).path
    assert exact is not None
    seen = []
    Parallel(solvers.ddpm(), "picard", "all", 0.0, fallback=False)(dino(), GRID, (1, 2), seed=1, watch=seen.append)
    for r in seen:
        reached = r.states[: max(0, r.number + 1 - r.begin)]
        assert reached.equal(exact[r.begin : r.begin + len(reached)])


def test_tolerance_trades_evals_for_error():
    grid = schedules.grid(schedules.ddpm(), 300)
    exact = Sequential(solvers.ddpm())(dino(), grid, (16, 2), seed=0)
    runs = [Parallel(solvers.ddpm(), tolerance=t)(dino(), grid, (16, 2), seed=0, verify=True) for t in (0.3, 0.1, 0.01, 0.001)]
    errors = [float((r.x - exact.x).abs().max()) for r in runs]
    assert errors[1] < 0.02
    assert errors[3] < 2e-4
    assert [r.evals for r in runs] == sorted(r.evals for r in runs)
    for run, tolerance in zip(runs, (0.3, 0.1, 0.01, 0.001), strict=True):
        assert run.defect is not None
        assert float(run.defect.median()) < tolerance / 5
        assert float(run.defect.max()) < 3 * tolerance  # it is the error before the last correction that was tested


def test_verify_reports_defects_of_the_path_and_zero_for_the_sequential_one():
    drawn = Parallel(solvers.ddpm(), tolerance=0.2)(dino(), GRID, (4, 2), seed=0, path=True, verify=True)
    assert drawn.path is not None
    assert drawn.defect is not None
    step, t = StepMap(solvers.ddpm(), dino(), GRID), tables(StepMap(solvers.ddpm(), dino(), GRID))
    from contrastive_diffusion.sampling import normal

    worst = torch.zeros(4)
    for i in range(60):
        target = step(drawn.path[i], i, normal(0, torch.arange(4), torch.full((4,), i), (2,)))
        worst = torch.maximum(worst, (target - drawn.path[i + 1]).square().mean(1).sqrt() / float(t.variance[i].sqrt()))
    torch.testing.assert_close(drawn.defect, worst)
    exact = Parallel(solvers.ddpm(), tolerance=0.0)(dino(), GRID, (4, 2), seed=0, verify=True)
    assert exact.defect is not None
    assert float(exact.defect.max()) == 0.0


def test_the_measured_slope_needs_half_the_rounds_of_picard_and_a_third_of_the_evaluations():
    grid = schedules.grid(schedules.ddpm(), 1000)
    exact = Sequential(solvers.ddpm())(eight_gaussians(), grid, (16, 2), seed=0)
    theirs = Paradigms(solvers.ddpm())(eight_gaussians(), grid, (16, 2), seed=0)
    ours = Parallel(solvers.ddpm(), window="all", tolerance=0.1)(eight_gaussians(), grid, (16, 2), seed=0)
    assert ours.rounds < 0.6 * theirs.rounds
    assert ours.evals < 0.25 * theirs.evals
    for drawn in (ours, theirs):
        assert (drawn.x - exact.x).abs().max() < 5e-3


def test_a_half_precision_network_takes_no_more_rounds():
    law, grid = eight_gaussians(), schedules.grid(schedules.ddpm(), 500)
    full = Parallel(solvers.ddpm(), tolerance=1e-3)(law, grid, (8, 2), seed=0)
    half = Parallel(solvers.ddpm(), tolerance=1e-3, precision=torch.float16)(law, grid, (8, 2), seed=0)
    assert half.x.dtype == torch.float32
    assert half.rounds <= 1.25 * full.rounds


def test_memory_does_not_grow_with_the_grid(monkeypatch):
    made = []
    monkeypatch.setattr(task_module, "Ring", lambda *a, **k: made.append(ring := RING(*a, **k)) or ring)
    for steps in (100, 400):
        Parallel(solvers.ddpm(), window=16)(two_modes(), schedules.grid(schedules.ddpm(), steps), (2, 1))
    assert made[0].x.shape == made[1].x.shape
    assert len(made[0].x) <= 21


RING = task_module.Ring


class _Syncs(TorchDispatchMode):
    """Operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.__name__ for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select", "unique")):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.0}, {"anderson": 2}, {"lanes": 2}], ids=str)
def test_no_round_waits_for_the_device(options):
    mode, last = _Syncs(), []

    def denoiser(z, logsnr):
        last.append(len(mode.found))
        return z * 0.9

    with mode:
        Parallel(solvers.ddpm(), window=8, **options)(denoiser, GRID, (3, 2))
    assert last[-1] == last[0]


@pytest.mark.parametrize(("slope", "tolerance", "windows"), [("picard", 1e-3, 20), ("secant", 1e-3, 20), ("secant", 0.0, 60)])
def test_a_chaotic_map_falls_back_at_a_bounded_price(slope, tolerance, windows):
    """1.2 evaluations a step and the windows it takes to find out: more of them where not a bit may change."""
    steps, window = 400, 16
    grid = schedules.grid(schedules.ddpm(), steps)
    chaos = lambda z, logsnr: torch.sin(1e4 * z)  # noqa: E731
    drawn = Parallel(solvers.ddim(), slope, window, tolerance)(chaos, grid, (4, 2), seed=0)
    assert int(drawn.sample_evals.max()) <= 1.2 * steps + windows * window
    assert int(drawn.sample_rounds.min()) > 0.5 * steps  # nothing to gain
    free = Parallel(solvers.ddim(), slope, window, tolerance, fallback=False)(chaos, grid, (4, 2), seed=0)
    assert int(free.sample_evals.max()) > 5 * steps


def test_rows_of_a_call_are_bounded_and_equal_if_asked_for():
    calls = []

    def denoiser(z, logsnr):
        calls.append(len(z))
        return dino()(z, logsnr)

    Parallel(solvers.ddpm(), window=16, max_rows=37)(denoiser, GRID, (5, 2))
    assert max(calls) == 37
    calls.clear()
    Parallel(solvers.ddpm(), window=16, static_rows=True)(denoiser, GRID, (5, 2))
    assert set(calls) == {80}


def test_the_automatic_window_says_what_it_expects():
    with pytest.warns(UserWarning, match="sequential sampler is faster here"):
        busy = Parallel(solvers.ddpm(), window="auto")(_costly, GRID, (2, 1))
    assert busy.window == 1
    assert busy.gain == 1.0
    idle = Parallel(solvers.ddpm(), window="auto")(_flat, schedules.grid(schedules.ddpm(), 200), (1, 1))
    assert idle.window > 8
    assert idle.gain is not None
    assert idle.gain > 2
    assert "lower latency" in idle.notes[0]


def _costly(z, logsnr):
    import time

    time.sleep(2e-3 * len(z))
    return two_modes()(z, logsnr)


def _flat(z, logsnr):
    import time

    time.sleep(2e-3)
    return z * 0.5


def test_a_trace_is_what_happened_and_changes_nothing():
    trace = Trace(ids=(1, 2), states=True)
    traced = Parallel(solvers.ddpm(), window=12)(dino(), GRID, (4, 2), seed=0, trace=trace)
    plain = Parallel(solvers.ddpm(), window=12)(dino(), GRID, (4, 2), seed=0)
    assert traced.x.equal(plain.x)
    for sample in (1, 2):
        records = trace.of(sample)
        assert len(records) == int(traced.sample_rounds[sample])
        assert sum(len(r["error"]) for r in records) == int(traced.sample_evals[sample])
        assert [r["base"] for r in records[1:]] == [r["after"] for r in records[:-1]]
        assert records[-1]["after"] == 60
        assert trace.heat(sample, 60).shape == (len(records), 60)
    short = Trace(limit=3)
    Parallel(solvers.ddpm(), window=12)(dino(), GRID, (4, 2), seed=0, trace=short)
    assert len(short.records) == 3


def test_a_nan_stops_and_says_where():
    def broken(z, logsnr):
        return torch.where((logsnr > 3)[:, None] & (z > 0), math.nan, two_modes()(z, logsnr))

    with pytest.raises(RunError, match=r"non-finite state of sample 10\d at step \d+, round \d+"):
        Parallel(solvers.ddpm(), window=8, lanes=3)(broken, GRID, (8, 1), first=100)


def test_paradigms_is_the_published_rule():
    """Written again from the paper's code, with prefix sums, for one step of bookkeeping after another."""
    grid = schedules.grid(schedules.ddpm(), 200)
    for window in (200, 32):
        drawn = Paradigms(solvers.ddpm(), window)(dino(), grid, (8, 2), seed=0)
        rounds, evals, x = _published(dino(), grid, 8, window, 0.1)
        assert (drawn.rounds, drawn.evals) == (rounds, evals)
        assert (drawn.x - x).abs().max() < 1e-4


def _published(denoiser, grid, batch, window, tolerance):
    from contrastive_diffusion.sampling import START, normal

    steps, ids = len(grid) - 1, torch.arange(batch)
    a, b, c = solvers.ddpm().coefficients(grid[:-1], grid[1:])
    states = torch.stack([normal(0, ids, torch.full((batch,), START), (2,)).double()] * (steps + 1))
    noise = torch.stack([normal(0, ids, torch.full((batch,), i), (2,)).double() * c[i] for i in range(steps)])
    variance = torch.cat([c.square(), torch.zeros(1)])
    begin, end, rounds, evals = 0, window, 0, 0
    while begin < steps:
        i = torch.arange(begin, end)
        eps_hat = denoiser(states[begin:end].flatten(0, 1), grid[i].repeat_interleave(batch)).view(len(i), batch, 2)
        drift = (a[i] - 1)[:, None, None] * states[begin:end] + b[i][:, None, None] * eps_hat
        new = states[begin] + (drift + noise[begin:end]).cumsum(0)
        error = (new - states[begin + 1 : end + 1]).square().mean(2)
        bad = (error > tolerance**2 * variance[begin + 1 : end + 1, None]).any(1).tolist()
        states[begin + 1 : end + 1], rounds, evals = new, rounds + 1, evals + len(i) * batch
        begin = begin + min(1 + (bad.index(True) if any(bad) else len(bad)), len(i))
        old, end = end, min(begin + window, steps)
        states[old + 1 : end + 1] = states[old]
    return rounds, evals, states[-1]


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("solver", [solvers.ddpm(), solvers.ddim(), solvers.heun()], ids=lambda s: s.name)
def test_paradigms_at_tolerance_zero_is_sequential(solver, window):
    exact = Sequential(solver)(dino(), GRID, (5, 2), seed=1, path=True)
    drawn = Paradigms(solver, window, 0.0)(dino(), GRID, (5, 2), seed=1, path=True)
    assert drawn.path is not None
    assert drawn.path.equal(exact.path)


def test_parareal_converges_to_the_sequential_sample_and_takes_at_most_its_blocks():
    exact = Sequential(solvers.ddim())(dino(), GRID, (5, 2), seed=1)
    whole = Parareal(solvers.ddim(), tolerance=0.0)(dino(), GRID, (5, 2), seed=1)
    assert (whole.x - exact.x).abs().max() < 1e-4
    early = Parareal(solvers.ddim(), tolerance=0.05)(dino(), GRID, (5, 2), seed=1)
    assert early.rounds < whole.rounds
    assert (early.x - exact.x).abs().max() < 0.5
    with pytest.raises(ValueError, match="draws noise"):
        Parareal(solvers.ddpm())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Parallel(solvers.ddpm(), window=0), "given window = 0, expected window >= 1"),
        (lambda: Parallel(solvers.ddpm(), window=61)(dino(), GRID, (2, 2)), "given window = 61, expected at most the 60 steps"),
        (lambda: Paradigms(solvers.ddpm(), window=61)(dino(), GRID, (2, 2)), "given window = 61, expected at most the 60 steps"),
        (lambda: Parallel(solvers.ddpm(), tolerance=-1.0), "tolerance >= 0"),
        (lambda: Parallel(solvers.ddpm(), tolerance=math.nan), "tolerance >= 0"),
        (lambda: Parallel(solvers.ddpm(), "picart"), "did you mean picard"),
        (lambda: Parallel(solvers.ddpm(), anderson=-1), "0 to 8"),
        (lambda: Parallel(solvers.ddpm(), lanes=0), "lanes >= 1"),
        *((lambda kind=kind: kind(SOLVERS["adaptive"]()), "each sample chooses its own steps") for kind in (Parallel, Paradigms, Parareal)),
        *((lambda kind=kind: kind(solvers.ddim(), tolerance=math.inf), "a finite tolerance >= 0") for kind in (Parallel, Paradigms, Parareal)),
        (lambda: Parallel(solvers.ddpm())(dino(), GRID, (2, 2), dtype=torch.float16), "float32 or float64"),
        (lambda: Parallel(solvers.ddpm())(dino(), GRID, (2, 2), guess="gaus"), "did you mean gauss"),
        (lambda: Parallel(solvers.ddpm())(dino(), GRID, (2, 2), guess=torch.zeros(3, 2, 2)), r"\(61, 2, 2\)"),
        (lambda: Parallel(solvers.ddpm())(lambda z, a: z[:, :1], GRID, (2, 2)), "the shape of z"),
    ],
)
def test_bad_tasks_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
