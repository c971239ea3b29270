"""Constant Jacobians: all errors follow from the output's, and nothing is evaluated anew.

While branches are held, a network of linear layers, convolutions, pooling and piecewise-linear activations is affine:

    delta_n = sum_c J_c^T delta_c            backward, from delta_out = x:  delta_n = A_n^T x
    t_n     = delta_n + sum_p J_p t_p        forward: how far the states move, s_n = free_n - beta t_n

are the equations of `general.py`, to rounding and without their cancellation: t is of order 1 for every beta. The
output moves by `-beta M x`, `M = sum_n A_n A_n^T`. All nodes but the output balance exactly, so `r_n = A_n^T r` with
`r = dC - x` at the output, and the inner products over all nodes are those of the output in the metric M:

    <r, r'>_all = <r, M r'>                  M r = (M x' - M x) / a from the last move x' = x + a r
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm
from mep.graph import Graph, Point
from mep.graph.node import Beta, expand_beta, select_beta, state_from_error
from mep.settle import Response
from mep.solvers.networks import (
    Network,
    are_independent,
    length_along,
    no_autocast,
    output_residual,
    spread_length,
)


class AffineNetwork(Network):
    """The output error x of the examples in play, and the errors of all states that follow it.

    The errors and `input_tangents` (see `Graph.jvp`) stand as the last walk left them, to be multiplied by `scale`
    ([batch]): the first move is along one ray and needs no walk of its own. With the weighted inputs that `free` keeps
    that is all that is held, three numbers a unit. A walk of some examples holds their share of it twice.
    """

    def __init__(self, energy: Energy, free: Point, response: Response):
        super().__init__(energy, free, response)
        assert energy.nudge is not None and response.shift is not None
        self.is_coupled = not are_independent(energy, free)
        self.cost, self.output = energy.nudge.cost, free.values[energy.graph.output]
        self.beta = energy.nudge.beta
        self.x: Tensor | None = None
        """None at the free point, where every error is zero."""
        self.Mx = response.shift
        self.r = self.r_before = response.error
        self.Mr_before = response.shift
        self.scale: Tensor | None = None
        self._hold(response)

    def error_size(self) -> Tensor:
        assert self.x is not None
        return example_norm(self.x, len(self.x))

    def first_move(self, tol: float, may_stop: bool) -> Tensor:
        """Along backpropagation's errors, whose response is known: any length costs a few operations on the output."""
        x, Mx = self.response.error, self.Mx
        shift = Mx * expand_beta(self.beta, Mx)
        wanted = self.cost.gradient(self.output - shift)
        residual = output_residual(x, wanted)
        if may_stop and bool((residual <= tol).all()):
            self.x, self.r = x, wanted - x
            self.note(residual)
            return residual.new_ones(()) if self.is_coupled else torch.ones_like(residual)
        with no_autocast(x.device):
            a = length_along(self.cost, self.output, x, shift, Mx, self.is_coupled, wanted)
        if not self.is_coupled:
            a = torch.where(residual <= tol, 1, a)
        length = spread_length(a, x)
        self.x, self.Mx, self.scale = x * length, Mx * length, a
        self._look()
        return a

    def products(self) -> tuple[Tensor, Tensor]:
        """`<r, M r>` and `<M r, y>`, with y the change of r: the longer of the two lengths of Barzilai and Borwein.

        The shorter one would take M y, and so one more walk.
        """
        r, Mr, batch = self.r_before, self.Mr_before, len(self.r)
        size, curvature = example_dot(r, Mr, batch), example_dot(Mr, r - self.r, batch)
        return (size.sum(), curvature.sum()) if self.is_coupled else (size, curvature)

    def move(self, a: Tensor) -> None:
        assert self.x is not None
        length, Mx = spread_length(a, self.r), self.Mx
        self.x = self.x + self.r * length
        self.Mx = self._walk(self.x)
        is_moving = length != 0
        self.Mr_before = torch.where(is_moving, (self.Mx - Mx) / torch.where(is_moving, length, 1), self.Mr_before)
        self._look()

    def _look(self) -> None:
        """The residual at the output, which is that of the whole network."""
        assert self.x is not None
        wanted = self.cost.gradient(state_from_error(self.output, self.Mx, self.beta))
        self.r_before, self.r = self.r, wanted - self.x
        self.note(output_residual(self.x, wanted))

    def narrow(self, active: Tensor) -> Tensor | None:
        """Where the rows of every state are the examples."""
        if self.is_coupled or not self._can_select() or (found := self.remaining(active)) is None:
            return None
        self.rows, picked = found
        assert self.x is not None
        self.x, self.Mx, self.r, self.r_before, self.Mr_before, self.output = (
            t.index_select(0, picked) for t in (self.x, self.Mx, self.r, self.r_before, self.Mr_before, self.output)
        )
        self.cost, self.beta = self.cost.of(picked), select_beta(self.beta, picked)
        return picked

    def result(self) -> tuple[Point, Mapping[str, Tensor]]:
        errors: Mapping[str, Tensor] = self._errors
        beta, scale = self.energy.beta, self.scale
        if scale is not None:
            unscaled, beta = errors, beta * scale
            errors = LazyMapping(unscaled, lambda name: unscaled[name] * spread_length(scale, unscaled[name]))
        saved = _MovedInputs(self.energy.graph, self.free.saved, self._input_tangents, beta)
        return PerturbedPoint(self.energy, errors, saved), errors

    def _hold(self, response: Response) -> None:
        """The response's errors; the dictionaries are this network's own, the tensors may be another phase's too."""
        assert response.errors is not None and response.input_tangents is not None
        self._errors, self._input_tangents, self._is_ours = response.errors, response.input_tangents, False

    def _walk(self, x: Tensor) -> Tensor:
        """The errors that follow the output errors of the examples in play, and `M x`."""
        graph, rows = self.energy.graph, self.rows
        if rows is None:
            self._errors.clear()  # the old ones are gone before there are new ones
            self._input_tangents.clear()
            self._errors, Mx, self._input_tangents = walk(self.energy, self.free, x)
            self.scale, self._is_ours = None, True
            return Mx
        errors, Mx, input_tangents = walk(self.energy, self.free, x, graph.rows(self.free.saved, rows))
        for whole, some in ((self._errors, errors), (self._input_tangents, input_tangents)):
            for name, value in some.items():
                # Those of the response are real, and belong to it.
                held = whole[name].to(value.dtype, copy=not self._is_ours)
                whole[name] = held.index_copy_(0, rows, value)
        self._is_ours = True
        if self.scale is not None:
            self.scale = self.scale.index_fill(0, rows, 1)
        return Mx

    def _can_select(self) -> bool:
        return self.cost.narrows and all(len(error) == self.energy.batch for error in self._errors.values())


def walk(energy: Energy, free: Point, x: Tensor, saved: Mapping[str, Any] | None = None) -> tuple[State, Tensor, State]:
    """The errors `A_n^T x`, the response `M x`, and how far the weighted inputs move; for the rows of `saved`."""
    saved = free.saved if saved is None else saved
    errors = energy.errors_back(saved, x, free.values)
    tangents, input_tangents = energy.graph.jvp(saved, errors, forget=True)
    return errors, tangents[energy.graph.output], input_tangents


class LazyMapping(Mapping[str, Any]):
    """The keys of another mapping; values are computed on each access and not cached."""

    def __init__(self, like: Mapping[str, Any], make: Callable[[str], Any]):
        self._like, self._make = like, make

    def __getitem__(self, name: str) -> Any:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


class _MovedInputs(LazyMapping):
    """What a point saves, after the weighted inputs have moved by `-beta input_tangents`."""

    def __init__(self, graph: Graph, saved: Mapping[str, Any], input_tangents: Mapping[str, Tensor], beta: Beta):
        self._graph, self._like, self._input_tangents, self._beta = graph, saved, input_tangents, beta

    def __getitem__(self, name: str) -> Any:
        saved, tangent = self._like[name], self._input_tangents.get(name)
        return saved if tangent is None else self._graph.by_name[name].moved(saved, tangent, self._beta)


class PerturbedPoint(Point):
    """An affine graph after its states have followed the errors; values that are not read are not computed."""

    def __init__(self, energy: Energy, errors: Mapping[str, Tensor], saved: Mapping[str, Any]):
        self.energy, self.errors, self.saved = energy, errors, saved

    @cached_property
    def _walked(self) -> Point:
        return self.energy.at_errors(self.errors)

    @property
    def values(self) -> dict[str, Any]:  # type: ignore[override]
        """Of every node and input."""
        return self._walked.values

    @property
    def predictions(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Of every state."""
        return self._walked.predictions
