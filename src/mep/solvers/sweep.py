"""Sweeps in error form: the nudged equilibrium of the prediction energy as an ordinary minimisation.

With the scaled errors `delta_n = (mu_n - s_n) / beta` the nudged energy over beta is, with `s_n = mu_n - beta delta_n`,

    Phi(delta) = C(s_out) + beta/2 sum_n |delta_n|^2

A **sweep** walks forward, injecting the errors, and backward from dC/ds_out, collecting new ones, S(delta). Then

    r = S(delta) - delta = -dPhi/ddelta / beta

is at once the way downhill and the residual of every node. So settling is gradient descent, with the step of Barzilai
and Borwein (IMA J. Numer. Anal. 8, 1988), whose length follows from the curvature that the last step met:

    delta <- delta + a r,      y = r - r',      a <- a <r, y> / <y, y>      where <r, y> > 0

one length for each independent group of examples: each example, or all where batch normalisation couples them. It
starts at the free equilibrium, delta = 0, where S gives backpropagation's errors. How long the first step along them
should be is known before any state has moved (`length_by_gain` in `mep.solvers.networks`): were the network its gain,
M = k I, the errors `a S(0)` would balance along the output's error x where `a x = dC(s_free - beta k a x)`.

Plain iteration, a = 1, diverges once beta times the gain exceeds one. These steps do not, toward the target.

With a complex beta errors, residuals and lengths are complex, and `<u, v> = sum conj(u) v`: `a <y, r> / <y, y>` is then
the complex number t that makes `|r - t y / a|` least, as it is the real one for a real beta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.energy import Energy, NodeEnergy
from mep.errors import ArgumentError, removed_arguments
from mep.graph import Point
from mep.settle import Iterate, Response, Solver, Start
from mep.solvers.networks import Network, within
from mep.solvers.networks.affine import AffineNetwork, walk
from mep.solvers.networks.checkpointed import CheckpointedNetwork, CheckpointedPoint, Recomputed
from mep.solvers.networks.general import GeneralNetwork
from mep.solvers.networks.nonsmooth import NonsmoothNetwork


@removed_arguments(
    history="Settling takes Barzilai and Borwein's step now, which needs no history. Leave it out.",
    strength="No nudge is weakened any more: beta is used as given. beta=None chooses one for each example.",
)
@dataclass(frozen=True)
class Sweep(Solver):
    """Backward and forward walks in error form, with Barzilai and Borwein's step, at exactly the beta of the energy.

    Args:
        settle_steps: the largest number of sweeps, or with `adaptive=False` the exact one.
        tol: residual at which an example has settled.
        patience: consecutive sweeps at or below `tol`.
        adaptive: stop when every example has settled.

    Only for `energy="prediction"`. Examples that have settled are left out of later sweeps where the graph can be
    evaluated without them. A nudge away from the target (beta < 0) may have no equilibrium; then it diverges, or stays
    unsettled.

    Source: Barzilai and Borwein 1988, https://doi.org/10.1093/imanum/8.1.141.

    Example:
        >>> Sweep(tol=1e-3).settle_steps
        100
    """

    settle_steps: int = 100
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = True

    carries_errors = True
    uses_response = True
    compiles = True
    checkpoints = True
    settles_complex = True

    def check(self, node_energy: NodeEnergy) -> None:
        if not node_energy.has_state:
            raise ArgumentError(
                f"{type(self).__name__} does not settle energy={node_energy.name!r}: it works with the errors de/dmu, "
                "and so with energies that have `state` (see mep.NodeEnergy). Use solver=mep.Descent(...)."
            )

    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """The free equilibrium: every error is zero, and the residual of the output is all of dC/ds."""
        network = make_network(energy, point, start.response or linear_response(energy, point))
        return Iterate(network.residual, point, exact=False, state=(network, None))

    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One sweep of the examples that are active."""
        network, a = iterate.state
        if a is None:
            a = network.first_move(self.tol, self.adaptive)
            return replace(iterate, residual=network.residual, state=(network, a))
        if active is not None and (picked := network.narrow(active)) is not None:
            a = a.index_select(0, picked)
        a = barzilai_borwein(a, *network.products())
        if active is not None and a.ndim:
            a = torch.where(network.mine(active), a, 0)
        network.move(a)
        diverging = network.runs_away()
        return replace(iterate, residual=network.residual, state=(network, a), diverging=diverging)

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        network, a = iterate.state
        if a is None:
            return iterate
        point, errors = network.result()
        return replace(iterate, point=point, errors=errors, exact=True)

    def unrolled(self, energy: Energy, point: Point, start: Start, sweeps: int) -> tuple[Iterate, Tensor]:
        """Where so many sweeps lead, and the residuals after each, [sweeps, batch]; without decisions, to compile."""
        iterate, course = self.init(energy, point, start), list[Tensor]()
        network, _ = iterate.state
        a = network.first_move(self.tol, False)
        course.append(network.residual)
        for _ in range(sweeps - 1):
            a = barzilai_borwein(a, *network.products())
            if self.adaptive:
                unsettled = network.residual > self.tol
                a = torch.where(unsettled if a.ndim else unsettled.any(), a, 0)
            network.move(a)
            course.append(network.residual)
        return self.finalize(energy, replace(iterate, residual=course[-1], state=(network, a))), torch.stack(course)


def barzilai_borwein(a: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The next length after a, `a numerator / denominator`; where the curvature is not positive, a again.

    Example:
        >>> one = torch.tensor([1.0])
        >>> barzilai_borwein(one, one, 2 * one), barzilai_borwein(one, -one, one)
        (tensor([0.5000]), tensor([1.]))
    """
    longer = a * (numerator / denominator)
    if longer.is_complex():  # of any direction: no curvature 1 + beta m with a real m is near 0, for beta far from real
        return within(torch.where((numerator != 0) & (denominator != 0), longer, a))
    return within(torch.where((numerator > 0) & (denominator > 0), longer, a))


def make_network(energy: Energy, free: Point, response: Response) -> Network:
    """The network that fits a nudged energy."""
    if isinstance(free, CheckpointedPoint):
        return CheckpointedNetwork(energy, free, response)
    if energy.is_affine:
        return AffineNetwork(energy, free, response)
    return NonsmoothNetwork(energy, free, response) if energy.kinks else GeneralNetwork(energy, free, response)


def linear_response(energy: Energy, free: Point) -> Response:
    """The response of the free equilibrium to the cost of a nudged energy, whatever its beta."""
    x = energy.wanted_error(free)
    if isinstance(free, CheckpointedPoint):
        return Response(energy.batch, x, shift=Recomputed(energy, x).shift())
    if energy.is_affine:
        errors, Mx, input_tangents = walk(energy, free, x)
        return Response(energy.batch, x, errors, Mx, input_tangents)
    return Response(energy.batch, x, energy.errors_back(free.saved, x, free.predictions))
