"""How errors lead to errors in a graph, and the response of its free equilibrium to the cost."""

from __future__ import annotations

from mep.energy import Energy
from mep.graph import Point
from mep.settle import Response
from mep.solvers.networks.affine import AffineNetwork, walk
from mep.solvers.networks.checkpointed import CheckpointedNetwork, CheckpointedPoint, Recomputed
from mep.solvers.networks.coupling import are_independent
from mep.solvers.networks.general import GeneralNetwork
from mep.solvers.networks.network import Network
from mep.solvers.networks.nonsmooth import NonsmoothNetwork

__all__ = ["CheckpointedPoint", "Network", "are_independent", "linear_response", "make_network"]


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
    if energy.is_affine and energy.coupling.vanishes_when_free:
        errors, Mx, arriving = walk(energy, free, x)
        return Response(energy.batch, x, errors, Mx, arriving)
    return Response(energy.batch, x, energy.errors_back(free.saved, x, free.predictions))
