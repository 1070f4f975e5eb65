"""A common start and branches at equal denoiser evaluations: what the comparisons of plain and contrastive training share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from contrastive_diffusion.recipes import Loss, Net, Train
from contrastive_diffusion.runs import Task, fit, work
from contrastive_diffusion.training import Training


class Branching(Protocol):
    """The fields of an experiment's recipe that describe its training."""

    @property
    def out(self) -> str: ...
    @property
    def net(self) -> Net: ...
    @property
    def base(self) -> Training: ...
    @property
    def branch(self) -> Training: ...
    @property
    def loss(self) -> Loss: ...


def branch_recipes(config: Branching, data: str, names: Sequence[str]) -> dict[str, Train]:
    """Recipes of "base" and of each branch; every branch takes as many steps as cost the evaluations of the contrastive one.

    "plain" continues as the base was trained; "uniform" the same with levels uniform in log-SNR; "contrastive" adds the contrastive loss.
    """
    plain = Loss(denoising=config.loss.denoising)
    losses = {"plain": plain, "uniform": Loss(denoising="uniform"), "contrastive": config.loss}
    start = f"{config.out}/base"
    recipes = {"base": Train(data=data, out=start, net=config.net, loss=plain, training=settled(config.base))}
    for name in names:
        training = settled(at_equal_evals(config.branch, config.loss, losses[name]))
        recipes[name] = Train(data=data, out=f"{config.out}/{name}", init=start, net=config.net, loss=losses[name], training=training)
    return recipes


def at_equal_evals(training: Training, reference: Loss, loss: Loss) -> Training:
    """``training`` with ``loss`` for as many steps as cost the evaluations of its own steps with ``reference``."""
    budget = training.steps * reference.build().evals(training.batch)
    return dataclasses.replace(training, steps=round(budget / loss.build().evals(training.batch)))


def settled(training: Training) -> Training:
    """With an average whose half-life is a twentieth of the training: one of fixed decay would lag in a branch of fewer, dearer steps."""
    return dataclasses.replace(training, ema_half_life=0.05 * training.steps * training.batch)


def train_branches(recipes: dict[str, Train], jobs: int, meanwhile: list[Task] | None = None) -> None:
    """Trains the base, beside ``meanwhile``, then the branches side by side; finished ones are left as they are."""
    work([(fit_branch, (recipes["base"],)), *(meanwhile or [])], jobs)
    work([(fit_branch, (recipe,)) for name, recipe in recipes.items() if name != "base"], jobs)


def fit_branch(recipe: Train, position: int = 0) -> None:
    fit(recipe, position=position, label=f"train {Path(recipe.out).name}")


def spent(recipes: dict[str, Train]) -> dict[str, int]:
    """Denoiser evaluations of each branch after the common start."""
    return {name: evals_of(recipe) for name, recipe in recipes.items() if name != "base"}


def evals_of(recipe: Train) -> int:
    """Denoiser evaluations of a training."""
    return recipe.training.steps * recipe.loss.build().evals(recipe.training.batch)


def made_before() -> NoReturn:
    """In place of the maker of a part that a worker process has made."""
    raise AssertionError("this part should have been made by a worker")
