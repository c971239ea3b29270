"""How an affine graph answers an output error: through its constant Jacobians, without evaluating anything anew.

While branches are held, a network of linear layers, convolutions, pooling and piecewise-linear activations is affine:

    delta_n = sum_c J_c^T delta_c            backward
    t_n     = delta_n + sum_p J_p t_p        forward: how far the states move, s_n = free_n - beta t_n

are the same equations as in `walks.py`, to rounding and without its cancellation: t is of order 1 for every beta. All
nodes but the output balance exactly. Examples do not see each other, so those that have settled are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from mep.energy import Energy, State
from mep.graph import Point
from mep.layout import per_example
from mep.nodes import Node, Strength, displaced, of_rows
from mep.solvers.gram import Gram, in_parts
from mep.solvers.output import Answer
from mep.solvers.strength import are_separate, limited


class Response:
    """The errors so far, and how far they have moved what the weights are applied to (`arriving`).

    With the weighted inputs that `free` keeps, that is all that is held: three numbers a unit, after any number of
    sweeps. A sweep of some examples holds their share of it twice.

    Args:
        energy: nudged, of an affine graph.
        free: its free equilibrium; a lean one will do.
        most: the largest strength, to which the first answer limits nudges; None if there is no limit.
    """

    def __init__(self, energy: Energy, free: Point, most: Strength | None = None):
        self.energy, self.free, self.most = energy, free, most
        self._errors: State = {}
        self.arriving: State = {}
        self.scale: Tensor | None = None
        """What both are to be multiplied by, [batch]."""
        self.narrows = False
        """Whether examples can be left out, once there are errors: the rows of every state are the examples."""

    @property
    def weakens(self) -> bool:
        """Whether examples can be nudged less than others."""
        return self.narrows

    def answer(self, x: Tensor, rows: Tensor | None, active: Tensor | None) -> Answer:
        """What follows the output error x of these rows (None: all)."""
        energy, factor = self.energy, None
        free, saved = energy.output(self.free), self.free.saved
        if rows is None:
            self._errors = self.arriving = {}  # the old ones are gone before there are new ones
            self._errors = self._pulled(saved, x)
            moved, self.arriving = energy.graph.push(saved, self._errors, forget=True)
            self.narrows = all(len(error) == energy.batch for error in self._errors.values()) and are_separate(
                energy, self.free
            )
            self.scale = None
            if self.narrows and self.most is not None:
                self.energy, factor = limited(energy, x, moved[energy.graph.output], self.most)
            self.most = None
        else:
            free, saved = free.index_select(0, rows), energy.graph.rows(saved, rows)
            errors = self._pulled(saved, x)
            moved, arriving = energy.graph.push(saved, errors, forget=True)
            for known, new in ((self._errors, errors), (self.arriving, arriving)):
                for name, value in new.items():
                    known[name].index_copy_(0, rows, value)
            if self.scale is not None:
                self.scale = self.scale.index_fill(0, rows, 1)
        beta = self.energy.beta if rows is None else of_rows(self.energy.beta, rows)
        return Answer(x, displaced(free, moved[energy.graph.output], beta), factor)

    def gains(self, rows: Tensor) -> Tensor:
        """`M = sum_n A_n A_n^T` of these examples: one backward walk, from every unit of the output.

        Returns:
            `[examples, units, units]`: `output = free - beta M x` without asking the network.
        """
        return in_parts(self._gains, rows, self.energy.output(self.free))

    def _gains(self, rows: Tensor) -> Tensor:
        energy, saved = self.energy, self.free.saved
        total = Gram(energy.output(self.free), len(rows))
        each = rows.repeat_interleave(total.units)

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            force = total.every if node.name == energy.graph.output else force
            if node.owns_state and force is not None:
                total.add(force)
            return force

        energy.graph.pull(
            OnDemand(saved, lambda name: energy.graph.by_name[name].rows(saved[name], each)), None, transmit
        )
        return total.sum

    def _pulled(self, saved: Mapping[str, Any], x: Tensor) -> State:
        """The errors of all nodes that balance the output error x."""
        errors: State = {}
        output = self.energy.graph.output

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if node.name == output:
                force = x
            if node.owns_state:
                if force is None:
                    force = x.new_zeros(len(x), *self.free.values[node.name].shape[1:])
                errors[node.name] = force
            return force

        self.energy.graph.pull(saved, None, transmit)
        return errors

    @property
    def work(self) -> int:
        """Multiplications of a walk of all examples."""
        return sum(multiplications(node, self._errors[node.name]) for node in self.energy.graph.states)

    def rescale(self, a: Tensor, rows: Tensor | None) -> None:
        """As if the output errors of these rows (None: all), just answered, had been `a` times as large."""
        if rows is not None:
            known = a.new_ones(self.energy.batch) if self.scale is None else self.scale
            a = known.index_copy(0, rows, a)
        self.scale = a

    def scaled(self, of: State, name: str) -> Tensor:
        """The errors of one node, or what arrives there, as they are to be."""
        value = of[name]
        return value if self.scale is None else value * per_example(self.scale, value)

    @property
    def errors(self) -> Mapping[str, Tensor]:
        """The errors of all states."""
        return OnDemand(self._errors, lambda name: self.scaled(self._errors, name))

    @property
    def point(self) -> Point:
        """Where the states are now."""
        arriving = OnDemand(self.arriving, lambda name: self.scaled(self.arriving, name))
        return Moved(self.energy, self.free, self.errors, arriving)


def multiplications(node: Node, error: Tensor | None) -> int:
    """What it takes to push or pull something like `error` through a node."""
    if error is None or node.clamped or not node.weighted:
        return 0
    return error.numel() * node.parameters[0][0].numel()


class OnDemand(Mapping[str, Any]):
    """The keys of another mapping; each value is made anew whenever it is asked for, and held by nobody."""

    def __init__(self, like: Mapping[str, Any], make: Callable[[str], Any]):
        self.like, self.make = like, make

    def __getitem__(self, name: str) -> Any:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def saved_after(energy: Energy, free: Point, arriving: Mapping[str, Tensor]) -> OnDemand:
    """What `pull` and `contract` need of every node once its weighted input has moved by `-beta arriving`."""

    def make(name: str) -> Any:
        saved, moved = free.saved[name], arriving.get(name)
        return saved if moved is None else energy.graph.by_name[name].moved(saved, moved, energy.beta)

    return OnDemand(free.saved, make)


class Moved(Point):
    """An affine graph after its states have followed the errors; what nobody asks for is not computed."""

    def __init__(self, energy: Energy, free: Point, errors: Mapping[str, Tensor], arriving: Mapping[str, Tensor]):
        self.energy, self.free, self.errors = energy, free, errors
        self.saved = saved_after(energy, free, arriving)

    @cached_property
    def _walked(self) -> Point:
        return self.energy.following(self.errors)

    @property
    def values(self) -> dict[str, Any]:  # type: ignore[override]
        """Of every node and input."""
        return self._walked.values

    @property
    def predictions(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Of every state."""
        return self._walked.predictions
