"""What the page of the Dino experiment shows: its table, figures and verdict, from its numbers."""

from typing import Any, Protocol

from torch import Tensor

from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._look import heat, iterates, progress
from contrastive_diffusion.metrics import Score

BRANCHES = ("plain", "contrastive")
CONTROL = "uniform"  # trained and sampled in sequence beside them
ARMS = (*BRANCHES, CONTROL)
SAMPLERS = {"parallel": "Picard", "secant": "secant"}  # kind of a part -> what it is called
SHOWN = (
    ("round 20", "round20"),
    ("round 25", "round25"),
    ("Picard", "parallel"),
    ("secant", "secant"),
    ("sequential", "sequential"),
)
KERNEL_SCALE = 2.302943  # 1 / sqrt(2 pi 0.03), a factor in the paper's MMD values
# MMD after each Picard iteration stored with the paper's code (real Dino, 2,000 samples, one run each), in the paper's scale.
THEIRS = {
    "plain": [.0525, .0556, .0556, .0555, .0559, .0566, .0566, .0565, .0563, .0561, .0516, .0387, .0264, .0253, .0227, .0200, .0164, .0137, .0115, .0100,
              .0087, .0077, .0067, .0058, .0050, .0043, .0037, .0035] + [.0034] * 9,
    "contrastive": [.0522, .0556, .0563, .0562, .0565, .0565, .0566, .0568, .0569, .0567, .0548, .0491, .0346, .0251, .0199, .0179, .0149, .0138, .0102,
                    .0088, .0077, .0055, .0051, .0036, .0031, .0022, .0016, .0014, .0012] + [.0013] * 7,
}  # fmt: skip


class Shown(Protocol):
    """The fields of the recipe that the page mentions."""

    @property
    def seeds(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def jobs(self) -> int: ...


def _row(label: str, s: dict[str, Any]) -> list[Any]:
    """A row of Table 1."""
    reached = (s["rounds to threshold"] or "never") if "rounds to threshold" in s else ""
    quality = [page.cell(s["mmd"], 1e3), s["log density"], page.cell(s["off support"], 100)]
    return [label, reached, s["rounds"], s["evals per sample"], s.get("inefficiency", 1.0), s["seconds"], *quality]


def blocks(
    config: Shown,
    rows: dict[str, Any],
    errors: dict[str, Any],
    evals: dict[str, int],
    scan: dict[str, Any],
    last_level: float,
    arrays: dict[str, Tensor],
) -> list[page.Block]:
    truth = rows["plain"]["sequential"]["log density of truth"]
    runs = [(name, sampler) for name in BRANCHES for sampler in (*SAMPLERS, "sequential")] + [(CONTROL, "sequential"), ("dino", "sequential")]
    body = [_row(f"{'exact' if name == 'dino' else name}, {SAMPLERS.get(sampler, sampler)}", rows[name][sampler]) for name, sampler in runs]
    theirs = [
        ["theirs: DDPM, parallel", "never", 37, None, 14.4, 1.871, 3.4 / KERNEL_SCALE, None, None],
        ["theirs: CDL, parallel", 27, 36, None, 14.0, 1.368, 1.3 / KERNEL_SCALE, None, None],
    ]
    columns = ["", f"rounds to MMD ≤ {config.threshold * 1e3:.2f}e-3", "rounds to convergence", "evals per sample", "inefficiency", "seconds",
               "MMD² × 1000", "exact log-density, nats", "off support, %"]  # fmt: skip
    reached = ", ".join(
        f"{rows[name][sampler]['seeds that reached it']} of {config.seeds} ({name}, {title})"
        for name in BRANCHES
        for sampler, title in SAMPLERS.items()
    )
    table = page.table(
        "Table 1: DDPM sampling of Dino",
        columns,
        body + theirs,
        f"Mean ± standard error over {config.seeds} sampling seeds, {config.samples} samples in all, {config.steps} steps, Picard (ParaDiGMS) and the measured slope over the whole grid, "
        f"tolerance {config.tolerance:g}; seeds that reached the threshold: {reached}; rounds to it are means over those. "
        f"Inefficiency: evaluations over the sequential sampler's. Log-density: exact "
        f"log p at the last noisy level ({last_level:.2f}), of the state there; the truth scores {_pm(truth)}. Off support: share of "
        f"states less likely than the 0.1 % quantile of the truth. Seconds: per seed, {config.jobs} processes of one thread side by side. "
        f"Exact: the exact denoiser, sampled in sequence. Theirs: numbers stored with the paper's code (one run each, another network, a GPU), their MMD "
        f"divided by {KERNEL_SCALE:.3f}.",
    )
    off = [k for k in errors if float(k.split(";")[1]) >= 2 and float(k.split(";")[0]) >= 4]
    return [
        page.text(_verdict(rows, errors, off, evals)),
        page.math(
            r"\mathcal{L}_{CDL} = \mathbb{E}\,\mathrm{softplus}\left(y \cdot \tfrac12 \int \mathbb{E}_\epsilon\left[\|\epsilon-\hat\epsilon(z_\alpha,\alpha)\|^2 - "
            r"\|\epsilon-b\,\hat\epsilon(z_\alpha,\beta)\|^2\right] d\alpha\right)",
            "The contrastive loss: y = +1 for data, −1 for data noised to log-SNR ζ; (β, b) compose α with ζ.",
        ),
        table,
        page.lines(
            "MMD against rounds (Fig. 4)", "round", "MMD² to the truth",
            _over_rounds("mmd")
            + [page.series(f"paper's stored run, {name}, Picard", f"theirs.{name}.rounds", f"theirs.{name}", None, "dashed") for name in THEIRS],
            "Quality of the sample as it stands after each round. Bands: standard error over sampling seeds. Dashed: stored with the paper's code, rescaled.",
            logy=True, levels={"threshold": config.threshold}, ylim=[1e-5, 0.05],
        ),
        page.lines(
            "Exact log-density against rounds", "round", "mean log p at the last noisy level, nats",
            _over_rounds("log_density"),
            "MMD stops telling good samplers apart; the exact density does not.", levels={"truth": truth.mean}, ylim=[-40, 4],
        ),
        page.scatter(
            "Samples",
            [(f"{b}, {title}", f"{b}.{key}") for b in BRANCHES for title, key in SHOWN]
            + [(f"{CONTROL}, sequential", f"{CONTROL}.sequential"), ("exact denoiser, sequential", "dino.sequential"), ("truth", "truth")],
            "The branches and the exact denoiser, all with the same noise; and draws of the law.", limits=[-2.6, 2.6, -2.6, 2.6], columns=len(SHOWN),
        ),
        *[
            page.lines(
                f"Denoiser error at log-SNR {level:g}", "how much noisier than claimed the points are, nats", "mean squared error of eps-hat",
                [page.series(name, "offsets", f"error.{level:g}.{name}", f"error.{level:g}.{name}.err") for name in ARMS],
                "At 0 the points are the training distribution; to the right, what a sampler meets when it is off the path.", logy=True,
            )
            for level in (8.0, 4.0)
        ],
        *[
            block for name in BRANCHES for call, title in ((name, "Picard"), (f"{name}.secant", "secant"))
            for block in iterates(f"{name}, {title}", name, f"{call}.look", arrays)
        ],
        heat("plain, secant", "plain.secant.look"),
        *progress("plain", [("Picard", "plain.look"), ("secant", "plain.secant.look")]),
        page.table(
            "Denoiser error, exact", ["log-SNR; points noisier by", *ARMS, "contrastive / plain"],
            [[key.replace(";", "; "), *[scores[name] for name in ARMS], scores["ratio"]] for key, scores in errors.items()],
            "Mean squared error of eps-hat against the exact denoiser on 4,000 points, the same for all; the ratio's error is paired.",
        ),
        page.lines(
            "Choice of the MMD bandwidth (Fig. 8)", "kernel std", "MMD² of data against N(0, I)", [page.series("Dino against N(0, I)", "scan.bandwidth", "scan.mmd", "scan.err")],
            f"The paper's rule, the bandwidth of the largest MMD, gives {scan['bandwidth']:.2f} for the kernel it prints; its code uses a variance of 0.03, "
            f"a std of {0.03**0.5:.3f}, which this page follows.", logx=True,
        ),
    ]  # fmt: skip


def _over_rounds(key: str) -> list[dict[str, Any]]:
    """A curve over rounds of each branch and parallel sampler."""
    calls = [(f"{name}, {title}", name if kind == "parallel" else f"{name}.{kind}") for kind, title in SAMPLERS.items() for name in BRANCHES]
    return [page.series(label, f"{call}.rounds", f"{call}.{key}", f"{call}.{key}.err") for label, call in calls]


def _pm(score: Score, digits: int = 2) -> str:
    return f"{score.mean:.{digits}f} ± {score.stderr:.{digits}f}"


def _verdict(rows: dict[str, Any], errors: dict[str, Any], off: list[str], evals: dict[str, int]) -> str:
    """What came out, in words that follow the numbers."""
    gain = sum(errors[k]["ratio"].mean for k in off) / len(off)
    inside = errors["8;0"]["ratio"]
    parts = [
        f"After a common start the branches spent {', '.join(f'{n:,} ({name})' for name, n in evals.items())} denoiser evaluations.",
        f"Contrastive over plain denoiser error: {_pm(inside, 3)} on the training distribution at log-SNR 8; {gain:.2f} on average over points 2 nats or more too noisy.",
    ]
    for sampler in ("sequential", *SAMPLERS):
        a, b = rows["plain"][sampler]["log density"], rows["contrastive"][sampler]["log density"]
        difference = Score(b.mean - a.mean, (a.stderr**2 + b.stderr**2) ** 0.5)
        clear = abs(difference.mean) > 2 * difference.stderr
        word = ("higher" if difference.mean > 0 else "lower") if clear else "no different within two standard errors"
        parts.append(f"Exact log-density of {SAMPLERS.get(sampler, sampler)} samples: contrastive {_pm(b)}, plain {_pm(a)} ({word}).")
    control, exact = (rows[name]["sequential"]["log density"] for name in (CONTROL, "dino"))
    parts.append(f"The plain loss at levels uniform in log-SNR scores {_pm(control)} at the same evaluations, the exact denoiser {_pm(exact)}.")
    parts.append("One training seed: differences of this size between two trainings of the same branch cannot be excluded here.")
    return " ".join(parts)
