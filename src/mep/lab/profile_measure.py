"""What a step of every recipe costs, where its time goes, and how exact its gradient is.

The exact EP gradient `g*` is that of the same contrast with the same beta for every example, its equilibria settled to
1e-9 in float64. With b the gradient by backprop:

    gap  = |g - g*| / |g*|      the error that is left because settling stopped early
    bias = |g* - b| / |b|       the error that beta causes, however long one settles

Times are taken in turns, see `mep.lab.timing`. Reading the clock between phases costs time itself (a GPU must be waited
for), so each turn has whole steps first, and then steps whose regions are timed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import mep
from mep.estimators.contrast import contrast, make_contrast, settle_phases
from mep.guards import watch_regions
from mep.lab.recipes import BASELINE, Recipe, recipes_of
from mep.lab.timing import Batch, TimedRecipe, batches_of, build, estimator_of, in_turns, relative
from mep.settle import Result, Settled
from mep.verification.case import Case, Config
from mep.verification.equilibrium import Equilibria

Row = dict[str, Any]

EXACT = mep.Sweep(settle_steps=500, tol=1e-9)  # far below what float32 resolves, far above the rounding of float64
TURN, UNCOUNTED = 8, 3  # steps in a turn, and those at its head that fill the caches

COMPARED = ("cosine", "size", "first_cosine", "first_size", "gap", "bias", "backprop_cosine")
FIELDS = ("iterations", "beta", "settled", "residual", "residual_max", *COMPARED)


def profile(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    cost: str = "cross_entropy",
    rounds: int = 20,
    recipes: Sequence[Recipe] | None = None,
    console: Console | None = None,
) -> list[Row]:
    """What a step of every recipe costs and buys, at the model's parameters as they are; they stay so.

    Args:
        model: any module that `mep.trace` can read.
        batches: pairs `(x, target)`. The gradients are compared on all of them, and the steps take them in turn.
        cost: "cross_entropy" or "mse".
        rounds: turns of each recipe, of 5 timed steps.
        recipes: what to compare, after the baseline, backprop and SGD. The tables alone show how they settle: examples
            that do not settle are not warned of. Default: those of `mep profile`.
        console: where to show progress, if it is a terminal.

    Returns:
        For each recipe its own fields, those of `gradient_errors`, `time_steps` and `gain_per_step`, and `error`: None,
        or why there are none of them. Where the exact gradient cannot be had, that is an error, too.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> rows = profile(net, [batch], rounds=2, recipes=[Recipe("EP", "eqprop", {"tol": 1e-3})])
        >>> [row["label"] for row in rows], rows[1]["cosine"] > 0.999, rows[1]["ratio"]["median"] > 0
        (['Backprop + SGD', 'EP'], True, True)
    """
    if rounds < 2 or not batches:
        raise mep.ArgumentError(
            f"profile(rounds={rounds}, batches={len(batches)}): give 2 rounds and 1 batch at least."
        )
    recipes = recipes_of("profile") if recipes is None else recipes
    compared = [BASELINE, *(recipe for recipe in recipes if recipe is not BASELINE)]
    reference = Reference.of(model, batches, cost)
    rows: list[Row] = [{**recipe.as_row(), "error": None} for recipe in compared]
    for row, recipe in zip(rows, compared, strict=True):
        try:
            row.update(gradient_errors(recipe, model, batches, reference, cost))
        except mep.MepError as error:
            row["error"] = str(error)
    able = [(row, recipe) for row, recipe in zip(rows, compared, strict=True) if row["error"] is None]
    hidden = console is None or not console.is_terminal
    turns = track(range(rounds), "", console=console, transient=True, disable=hidden)
    times = time_steps([recipe for _, recipe in able], model, batches, cost, turns)
    for (row, _), found in zip(able, times, strict=True):
        row.update(found)
    gain_per_step([row for row, _ in able])
    return rows


# What settling buys


def gain_per_step(rows: Sequence[Row]) -> None:
    """Add to every row of a settle series by how much its steps reduce the gap, beyond those of the row before.

    bought: the error reduction, the factor by which the gap fell. idle: the gap was below the bias of beta before, so
    that the gradient of the loss is known no better now. Of the first row of a series, and of rows of none, None.
    """
    for row in rows:
        row.update(bought=None, idle=None)
    for before, row in pairwise(rows):
        if row["ladder"] and row["ladder"] == before["ladder"]:
            error_reduction = before["gap"] / row["gap"]
            below_bias = bool(before["idle"]) or before["gap"] <= before["bias"]
            row.update(bought=error_reduction, idle=below_bias)


@dataclass(frozen=True)
class Reference:
    """A float64 copy of a model and of some batches, and backprop's gradients of them."""

    model: nn.Module
    batches: list[Batch]
    backprop: list[Tensor]
    known: dict[Any, Equilibria] = field(default_factory=dict)
    """By the batch and what decides the graph: the cost is one for all."""

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch], cost: str) -> Reference:
        """The reference for this model and these batches."""
        model = copy.deepcopy(model).double()
        doubled = [(_double(x), _double(target)) for x, target in batches]
        backprop = mep.Backprop(model, cost)
        return cls(model, doubled, [_flat(model, backprop.gradients(*batch)[0]) for batch in doubled])

    @torch.no_grad()
    def equilibrium(self, estimator: mep.EquilibriumPropagation, betas: Tensor, place: int) -> Tensor:
        """The exact EP gradient of one batch, of the estimator's contrast, with these betas: [batch].

        Raises:
            NotConvergedError: some example did not settle at its beta.
            ArgumentError: there is no such reference: the energy is another one, the model draws random numbers, or the
                gradient is zero.
        """
        if estimator.node_energy.name != "prediction":
            raise mep.ArgumentError(
                f"energy={estimator.node_energy.name!r}: only 'prediction' has an exact gradient here."
            )
        key = place, estimator.branches, tuple(estimator.leaves)
        if key not in self.known:
            config = Config(estimator.cost, EXACT, estimator.branches, estimator.leaves, estimator.node_energy)
            self.known[key] = Equilibria(Case(self.model, *self.batches[place], config, dtype=None))
        equilibria = self.known[key]
        energy, point = equilibria.energy, equilibria.free
        if energy.context.noise:
            raise mep.ArgumentError(
                f"Node {', '.join(map(repr, energy.context.noise))} draws random numbers in every step, so no two "
                "gradients can be compared. Way out: model.eval()."
            )
        zeros = betas.new_zeros(energy.batch, dtype=torch.float64)
        free = Settled(point, zeros, 0, Result.CONVERGED, zeros, EXACT.tol)
        nudge = equilibria.nudged(1.0).nudge
        assert nudge is not None
        # A random sign is in the betas already.
        phases_of = "one-sided" if estimator.phases == "random-sign" else estimator.phases
        table = make_contrast(phases_of, estimator.points)
        phases = settle_phases(energy, free, nudge.cost, EXACT, table, betas.double())
        for _, nudged, settled in phases:
            if settled.result is not Result.CONVERGED:
                raise mep.NotConvergedError(
                    f"The exact gradient is not known: {int((settled.residual > EXACT.tol).sum())} of {nudged.batch} "
                    f"examples did not settle to {EXACT.tol:g} in float64, at beta {float(betas.min()):.3g} to "
                    f"{float(betas.max()):.3g}. Way out: a smaller beta, or beta=None."
                )
        exact = _flat(equilibria.case.model, contrast(phases, energy.batch))
        if not exact.any():
            raise mep.ArgumentError(
                "The exact gradient is zero: there is nothing to compare. Way out: other weights or data."
            )
        return exact


def gradient_errors(
    recipe: Recipe, model: nn.Module, batches: Sequence[Batch], reference: Reference, cost: str
) -> dict[str, float | None]:
    """Means over the batches, of `residual_max` the largest; of backprop `backprop_cosine` alone, the others None.

    iterations: of an example, mean. beta: the median over the examples. settled: the share of the examples. cosine,
    size: `<g, g*> / |g| |g*|` and `|g| / |g*|`; with `first_`, of the first parameter of two or more dimensions alone,
    which a signal from the output reaches last. backprop_cosine: of g with backprop's gradient.
    """
    estimator = estimator_of(build(recipe, copy.deepcopy(model), cost))
    if estimator is None:
        return dict.fromkeys(FIELDS) | {"backprop_cosine": 1.0}
    first = first_weight(estimator.model)
    found: list[dict[str, float]] = []
    for place, batch in enumerate(batches):
        gradients, estimate = estimator.gradients(*batch)
        exact = reference.equilibrium(estimator, estimate.betas, place)
        found.append(
            {
                "iterations": float(estimate.counts.double().mean()),
                "beta": estimate.median_beta,
                "settled": float(estimate.settled.double().mean()),
                "residual": float(estimate.residual.mean()),
                "residual_max": float(estimate.residual.max()),
                **compare(_flat(estimator.model, gradients), exact, reference.backprop[place], first),
            }
        )
    summaries = {field: max if field == "residual_max" else statistics.fmean for field in FIELDS}
    return {field: summary(one[field] for one in found) for field, summary in summaries.items()}


def compare(gradient: Tensor, exact: Tensor, backprop: Tensor, first: slice) -> dict[str, float]:
    """The fields `COMPARED` of one gradient, all rows flat."""
    return {
        "cosine": _cosine(gradient, exact),
        "size": _ratio(gradient, exact),
        "first_cosine": _cosine(gradient[first], exact[first]),
        "first_size": _ratio(gradient[first], exact[first]),
        "gap": _ratio(gradient - exact, exact),
        "bias": _ratio(exact - backprop, backprop),
        "backprop_cosine": _cosine(gradient, backprop),
    }


def first_weight(model: nn.Module) -> slice:
    """Where the first parameter of two or more dimensions stands in a row of all; all of it if there is none."""
    start = 0
    for p in model.parameters():
        if p.ndim > 1:
            return slice(start, start + p.numel())
        start += p.numel()
    return slice(None)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _flat(model: nn.Module, gradients: dict[Any, Tensor]) -> Tensor:
    """All gradients in one float64 row, in the order of the parameters."""
    rows = [gradients[p] if p in gradients else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([row.detach().double().flatten() for row in rows])


def _cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of the two vanishes."""
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.norm() / b.norm())


# Where the time goes

PHASES = {"free phase": "free", "settling": "settle", "contrast": "contrast"}
"""Regions of a step of EP, and what records call them."""


def time_steps(
    recipes: Sequence[Recipe], model: nn.Module, batches: Sequence[Batch], cost: str, rounds: Iterable[int]
) -> list[dict[str, Any]]:
    """For every recipe the seconds of a step, their ratio to those of the first recipe, and the shares of its phases.

    Medians with quartiles: of the seconds over all steps, of the ratio over the rounds. `running` is the share of the
    time in which the machine was not busy with something else.
    """
    runs = [TimedRecipe(recipe, model, cost) for recipe in recipes]
    phases: list[list[dict[str, float]]] = [[] for _ in runs]

    def turn(place: int, number: int) -> list[float]:
        run, chosen = runs[place], batches_of(batches, number, TURN)
        seconds = [run.step(*batch) for batch in chosen][UNCOUNTED:]
        phases[place] += [phase_times(run, *batch) for batch in chosen][UNCOUNTED:]
        return seconds

    seconds = in_turns([partial(turn, place) for place in range(len(runs))], rounds)
    return [
        {**relative(own, seconds[0]), "shares": _shares(steps), "running": run.running_share}
        for own, steps, run in zip(seconds, phases, runs, strict=True)
    ]


def phase_times(run: TimedRecipe, x: Tensor, target: Tensor) -> dict[str, float]:
    """The seconds of every phase of one step: free, settle, contrast, update with its constraints, rest.

    For backprop there are two, backprop and update.
    """
    seconds: dict[str, float] = {}
    begun: list[float] = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = run.now()
        yield
        seconds[PHASES[name]] = run.now() - start

    optimizer: Any = run.optimizer
    update = optimizer.update if isinstance(optimizer, mep.EPOptimizer) else optimizer.updates[0]
    hook = update.register_step_pre_hook(lambda *_: begun.append(run.now()))
    try:
        with watch_regions(timed):
            start = run.now()
            optimizer.step(x=x, target=target)
            end = run.now()
    finally:
        hook.remove()
    run.put_back()
    seconds["update"] = end - begun[0]
    rest = "backprop" if estimator_of(optimizer) is None else "rest"
    return {**seconds, rest: end - start - sum(seconds.values())}


def _shares(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median seconds of every phase, as fractions of their sum."""
    medians = {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}
    return {phase: median / sum(medians.values()) for phase, median in medians.items()}
