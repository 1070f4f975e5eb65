"""``cdl generate``."""

from typing import Any

from contrastive_diffusion.cli._command import Command, Parsed, simple


def _options(args: list[str]) -> Parsed:
    from contrastive_diffusion.runs.generate import Request

    return simple(Request, "generate")(args)


def _act(options: Any) -> None:
    from contrastive_diffusion.runs.generate import generate
    from contrastive_diffusion.training.processes import leave

    made = generate(options)
    leave()
    if made is not None:
        about = made.manifest
        print(f"{len(made)} samples in {options.out}: {about['evals_per_sample']:,.0f} evaluations a sample, {about['seconds']:,.2f} s in samplers")


COMMAND = Command("Generate a set of samples in shards, in several processes, resumable.", _options, _act, resumes=True)
