"""A gradient from equilibria: which ones, at which beta, and with which weights.

    dC/dtheta ~ sum_k w_k dE/dtheta(s*(beta_k))

Every variant of equilibrium propagation is a table of `(beta_k / beta, w_k beta)`. One-sided (Scellier and Bengio 2017,
eq. 10) errs by O(beta), centered (Laborieux et al. 2021, arXiv:2006.03824, eq. 6) by O(beta^2). One-sided with a random
sign of beta in every step (the same two papers) is the centered estimate in expectation, from one nudged phase a step.

**Holomorphic** (Laborieux and Zenke 2022, arXiv:2209.00530): N points `beta_k = beta e^(i t_k)`, evenly on a circle,

    dC/dtheta = 1/N sum_k dE/dtheta(s*(beta_k)) / beta_k + O(beta^N)

since of the powers of beta_k in dE/dtheta all up to the N-th cancel, but the first. Energy and cost are real where beta
is, so equilibria at conjugate betas are conjugate, and so are their terms: one of each pair is settled, and its real
part counts twice. For even N the circle is turned so that no point is real, `t_k = (2k + 1) pi / N`: N/2 phases. With
N = 2 that is the one point `i beta`, of the order of the two of the centered contrast. For odd N one point is beta.

**Which beta**, if none is named: as strong as the bias allows, chosen before any state has moved. At beta the cost's
gradient at the output changes by `|dC(s_beta) - dC(s_free)| <= L |s_beta - s_free|`, with L the cost's smoothness, and
the output has moved by `beta |M g|` to first order, g = dC(s_free). So the relative bias of the output's error is about
`beta k L`, with `k = |M g| / |g|`, and

    beta = largest / max(1, k L)

keeps it at `largest` for each example, whatever the contrast: 0.1 for gradient descent, whose states have to stand out
from their rounding; 0.01 for solvers that carry errors, for which no beta is too small (so there is nothing to gain
from a larger one where the order is higher: it takes more sweeps). Where Jacobians are constant the response M g of the
free equilibrium is known before any state has moved; then the bound is exact, and a tolerance of 0.01 takes one sweep.
Elsewhere k is the gain `<g, M g> / <g, g> = sum_n |A_n^T g|^2 / |g|^2`, which the first backward walk gives exactly and
which is no larger, and the Jacobians move as well: the gradient as a whole may be biased tens of times as much as the
output's error. There `largest` is 0.0002. Where L is not known it is measured, and again over the way that the beta so
found leads, until the bias over that way is the one wanted. Examples that are coupled have one beta, from the gain of
all together.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache as cached
from functools import partial

import torch
from torch import Tensor, nn

from mep.cost import BatchCost
from mep.energy import Energy, Free, State, add_gradients, example_norm, nudge
from mep.errors import DivergedError
from mep.estimators.estimate import Gradients
from mep.graph import Point
from mep.graph.holomorphic import complex_graph
from mep.graph.node import Beta
from mep.settle import Iterate, Response, Result, Settled, Solver, Start, settle
from mep.solvers.networks import are_independent, spread_length
from mep.solvers.networks.affine import LazyMapping
from mep.solvers.relaxation import FreePoint, cost_curvature, has_constant_jacobians
from mep.solvers.sweep import linear_response

Contrast = tuple[tuple[complex, float], ...]
"""Of every phase, the free one at 0: `beta_k / beta`, and `w_k beta_k`, or `w_k beta` of the free one."""

Phase = tuple[float, Energy, Settled | Iterate]
"""The weight of an equilibrium, its energy, and the equilibrium."""
SettledPhase = tuple[float, Energy, Settled]
"""The same with all that settling reports."""

CONTRASTS: dict[str, Contrast] = {
    "one-sided": ((0.0, -1.0), (1.0, 1.0)),
    "centered": ((-1.0, 0.5), (1.0, 0.5)),
}
"""Those that are the same in every step."""
PHASES = (*CONTRASTS, "random-sign", "holomorphic")
POINTS = 4
"""The default number of points on the circle: two phases."""


def make_contrast(phases: str, points: int | None = None) -> Contrast:
    """The contrast of one step; "random-sign" draws its sign from torch's generator on the CPU.

    Example:
        >>> make_contrast("one-sided")
        ((0.0, -1.0), (1.0, 1.0))
        >>> make_contrast("holomorphic", points=2)
        ((1j, 1.0),)
    """
    if phases == "holomorphic":
        return _circle(POINTS if points is None else points)
    if phases == "random-sign":
        sign = 1.0 - 2.0 * int(torch.randint(2, ()))
        return (0.0, -sign), (sign, 1.0)
    return CONTRASTS[phases]


def _circle(points: int) -> Contrast:
    """One of each pair of conjugate points, with the weight of both; the one nearest to beta last."""
    if points == 1:
        return CONTRASTS["one-sided"]
    if points % 2 == 0:
        places = [(2 * k + 1) / points for k in range(points // 2)]
        return tuple((_at(place), 2 / points) for place in reversed(places))
    places = [2 * k / points for k in range(1, points // 2 + 1)]
    return (*((_at(place), 2 / points) for place in reversed(places)), (1.0, 1 / points))


def _at(place: float) -> complex:
    """`e^(i pi place)`; i is exactly that."""
    return 1j if place == 0.5 else cmath.exp(1j * math.pi * place)


Watch = Callable[[complex, Energy, int, Iterate], None]


def settle_phases(
    energy: Energy,
    free: Settled,
    cost: BatchCost,
    solver: Solver,
    contrast: Contrast,
    beta: Beta | None,
    errors: State | None = None,
    watch: Watch | None = None,
) -> list[SettledPhase]:
    """Settle every phase of the contrast at exactly its multiple of beta.

    Args:
        energy: without a nudge, and `free` its equilibrium.
        cost: of the batch.
        solver: for all phases.
        contrast: which phases.
        beta: that of every example, or one each, [batch]; None to choose it, see above.
        errors: scaled errors to begin with, for solvers that use warm starts.
        watch: called with the multiple of beta, the nudged energy, the number of iterations, and each iterate.

    Raises:
        DivergedError: settling a phase leads out of the finite numbers.
    """
    is_forward = energy.is_forward
    noted = None if is_forward else noted_free(energy, free.point)
    unit = nudge(energy, cost, 1.0, noted)
    beta, response = beta_and_response(unit, free.point, solver, beta)
    found: list[SettledPhase] = []
    for i, (multiple, weight) in enumerate(contrast):
        if not multiple and is_forward:
            continue  # there dE/dtheta is zero
        if isinstance(multiple, complex):
            at = torch.as_tensor(beta, dtype=torch.float64, device=energy.output(free.point).device) * multiple
            nudged = nudge(replace(energy, graph=complex_graph(energy.graph)), cost, at, noted)
        else:
            nudged = nudge(energy, cost, (multiple or 1.0) * beta, noted)
        settled = free
        if multiple:
            start = Start(response if response is None or i == len(contrast) - 1 else response.copy(), errors)
            settled = settle(nudged, free.point, solver, start, watch and partial(watch, multiple, nudged))
        found.append((weight, nudged, settled))
        if found[-1][2].result is Result.DIVERGED:
            lost = (~found[-1][2].residual.isfinite()).nonzero().flatten().tolist()
            where = f" in {len(lost)} of {energy.batch} examples, {str(lost[:5])[1:-1]}," if lost else ""
            raise DivergedError(
                f"Settling diverged{where} at {_named(beta)} with {solver}. Nothing was changed. Way out: "
                + solver.failure_hint(nudged, free.point)
            )
    if found[-1][2].point.displacement is not None:  # the free phase is a part of its difference
        return [phase for phase in found if phase[2] is not free]
    return found


def beta_and_response(energy: Energy, free: Point, solver: Solver, beta: Beta | None) -> tuple[Beta, Response | None]:
    """The beta that is given, or the one that is chosen, and the response of the free equilibrium if that is of use.

    `energy` is nudged with beta 1.
    """
    is_weak = not energy.is_forward and solver.carries_errors
    needs_response = solver.uses_response or (beta is None and not is_weak)
    response = linear_response(energy, free) if needs_response else None
    if beta is None:
        beta = weak_beta(energy, free) if response is None else chosen_beta(energy, free, response, solver)
    return beta, response


def noted_free(energy: Energy, point: Point) -> Mapping[str, Free]:
    """The free equilibrium, node by node, and the forces left there; what a face of the box holds back is none."""
    forces = cached(point.forces if isinstance(point, FreePoint) else partial(energy.forces, point))

    def note(name: str) -> Free:
        s, potential = point.values[name], energy.potential_of(energy.graph.by_name[name])
        return Free(s, potential.without_faces(s, forces()[name]))

    return LazyMapping(point.predictions, note)


def weak_beta(energy: Energy, free: Point) -> Tensor:
    """One number for all examples, where no beta is too small for the digits of the solver: a bias of about 0.1%."""
    strongest = torch.as_tensor(cost_curvature(energy, energy.output(free), energy.wanted_error(free))).clamp(min=1.0)
    return (0.001 if has_constant_jacobians(energy, free) else 0.02) / strongest


def _named(beta: Beta) -> str:
    return f"beta={float(beta.min()):.3g} and more" if isinstance(beta, Tensor) else f"beta={beta:g}"


def chosen_beta(energy: Energy, free: Point, response: Response, solver: Solver) -> Tensor:
    """One beta an example ([batch]), or one for all where examples are coupled (0-dim)."""
    assert energy.nudge is not None
    largest = (0.01 if energy.is_affine else 0.0002) if solver.carries_errors else 0.1
    independent = are_independent(energy, free)
    k = response.amplification if independent else response.group_gain
    smoothness = energy.nudge.cost.smoothness
    if smoothness is not None:
        return (k * (smoothness / largest)).nan_to_num(0.0).clamp(min=1 / largest).reciprocal()
    cost, output, beta = energy.nudge.cost, energy.output(free), torch.full_like(k, largest)
    least = torch.zeros_like(beta)
    while True:
        bias = measured_bias(cost, output, response, k * beta).nan_to_num(0.0)
        bias = bias if independent else bias.max()
        beta = torch.maximum(beta * largest / bias.clamp(min=largest), least)
        least = torch.where(least > 0, least, beta * torch.finfo(beta.dtype).eps)  # of a gradient that jumps right here
        if not bool(((bias > 2 * largest) & (beta > least)).any()):  # else the cost may be more curved over this way
            return beta


def measured_bias(cost: BatchCost, output: Tensor, response: Response, reach: Tensor) -> Tensor:
    """`|dC(s) - dC(s - reach g)| / |g|` of every example, [batch]; 1 where there is no gradient so far away."""
    g, batch = response.error, response.batch
    change = example_norm(cost.gradient(output - g * spread_length(reach, g)) - g, batch)
    size = example_norm(g, batch).add_(torch.finfo(change.dtype).tiny)
    return torch.where(change.isfinite(), change / size, 1.0)


def contrast(phases: Iterable[Phase], batch: int) -> Gradients:
    """`sum_k w_k dE/dtheta`, the mean over the batch; a weight is over the beta of its energy, the free phase's too."""
    total: Gradients = {}
    for weight, energy, settled in phases:
        found = energy.parameter_gradient(settled.point, settled.errors, weight / batch)
        if total:
            add_gradients(total, found)
        else:
            total = found
    return total


def total_gradient(phases: Sequence[Phase], output: Tensor, batch: int) -> Gradients:
    """`dC/dtheta` of the mean cost: the contrast, and where the cost itself reads theta, its own derivative.

    That is taken at the free output, where it is exact: `dC(s_free(theta), theta)/dtheta` has no other such part.
    """
    total, nudged = contrast(phases, batch), phases[0][1].nudge
    if nudged and nudged.cost.parameters:
        add_gradients(total, nudged.cost.parameter_gradient(output, 1 / batch))
    return total


def iter_gradients(phases: Sequence[Phase], output: Tensor, batch: int) -> Iterator[Gradients]:
    """The same, finished, node by node: every gradient once, as soon as the last node that uses the parameter is done.

    Only gradients that are not complete are held. A weight may be changed once its gradient was there: no later one
    depends on it.
    """
    nodes = phases[0][1].graph.states
    last = {p: node for node in nodes for p in node.parameters}
    unfinished: Gradients = {}
    nudged = phases[0][1].nudge
    if nudged and nudged.cost.parameters:
        with torch.no_grad():
            unfinished = nudged.cost.parameter_gradient(output, 1 / batch)
    with torch.no_grad():
        for weight, energy, settled in phases:
            add_gradients(unfinished, energy.groups_gradient(settled.point, weight / batch))
    alone = finished({p: unfinished.pop(p) for p in list(unfinished) if p not in last})
    if alone:
        yield alone
    for node in nodes:
        with torch.no_grad():
            for weight, energy, settled in phases:
                own = [energy.graph.by_name[node.name]]
                part = energy.parameter_gradient(settled.point, settled.errors, weight / batch, own)
                add_gradients(unfinished, part)
                del part
            found = finished({p: unfinished.pop(p) for p in list(unfinished) if last[p] is node})
        if found:
            yield found
        del found  # before the next is made


def betas_of(beta: Beta, batch: int, device: torch.device) -> Tensor:
    """The strengths of all examples, below 0 where a random sign leads away from the target; moduli of complex ones."""
    if isinstance(beta, Tensor):
        return (beta.abs() if beta.is_complex() else beta).expand(batch)
    return torch.full((batch,), beta, dtype=torch.float64, device=device)


def finished(gradients: Gradients) -> Gradients:
    """The gradients in the dtypes of their parameters, after checking that every number is finite.

    A norm is finite only if all its terms are; only if it is not does the slower exact test decide.
    """
    if gradients and not math.isfinite(sum(map(Tensor.item, torch._foreach_norm(list(gradients.values()))))):
        broken = [tuple(p.shape) for p, g in gradients.items() if not torch.isfinite(g).all()]
        if broken:
            raise DivergedError(
                f"The gradient of parameters of shapes {broken} is not finite. Nothing was changed. Way out: a smaller "
                "learning rate, or look for exploding weights."
            )
    return {p: g.to(p.dtype) for p, g in gradients.items()}


def accumulate(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Add to `p.grad` what `loss.backward()` would add, through the hooks of the parameters."""
    for p, g in gradients.items():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            p.backward(g)
        elif p.grad is None:
            p.grad = g
        else:
            p.grad.add_(g)
