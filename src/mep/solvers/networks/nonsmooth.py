"""Graphs with kinks (`branches="exact"`): the equilibrium of the nonsmooth energy, where units may rest at a kink.

A *kink* is a place where a piecewise-linear function a(s) behind a state has no derivative: zero for ReLU, a tie for a
maximum. With everything else fixed, a unit there minimises over its own s

    1/2 (s - mu)^2 + beta (f s + u a(s))

where `f` is the force on s itself and `u` the force on a(s), both scaled by 1/beta. On a piece with slope k the minimum
is at `s = mu - beta (f + k u)`, if that lies on the piece. A kink is a minimum if the energy rises to both sides of it:
the unit *rests* there, with an error `(mu - s) / beta` between those of the two pieces, f + k u with k on the left and
on the right. Of several minima the one is taken to which descent leads from the free equilibrium.

So the error of such a unit is that of its minimum, not a step toward it. That leaves the output error x as the only
unknown, with the residual `r = dC/ds_out - x`; a sweep computes

    backward   delta_n = sum_c J_c^T delta_c, at a kink the error of the unit's minimum
    forward    s_n = mu_n - beta delta_n, at the kink if the unit rests there; r at the output

Parts of this file: the minimum of a unit, that of the units of a maximum, and the network that uses both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm, relative_residual
from mep.graph import Graph, Point
from mep.graph.closed_forms import Activation, Kink, Largest, Windows
from mep.graph.node import Beta, Node, expand_beta, state_from_error
from mep.layout import per_example
from mep.settle import Response
from mep.solvers.networks import Network, are_independent, length_by_gain, output_residual, spread_length

BehindKink = dict[str, tuple[Tensor, Kink]]
"""State -> the force on the value behind its kink, or the place where it rests; and the operation with the kink."""


# One unit.


def unit_minimum(
    mu: Tensor,
    f: Tensor,
    u: Tensor,
    beta: Beta,
    kink: Kink,
    x0: Tensor,
    before: Tensor | None = None,
    gain: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The scaled error `(mu - s) / beta` at the minimum of each unit, and where it rests (NaN: at no kink).

    Args:
        mu, f, u: as at the head of this file.
        beta: a number, or expanded to the shape of mu.
        kink: the operation behind the units.
        x0: their states at the free equilibrium, where descent to a minimum starts.
        before: their scaled errors when mu was computed; None for zero.
        gain: how far an error returns to mu through the layers below (`self_gains`): with the error delta, mu would be
            `mu + gain beta (before - delta)`. It is counted only at kinks that attract: there a unit would else jump
            from one side to the other for ever.

    Example: mu = 0.1, pulled down by 3 through a ReLU; the unit stops at zero.
        >>> from mep.graph.closed_forms import activation_of
        >>> one = torch.ones(1)
        >>> unit_minimum(0.1 * one, 0 * one, 3 * one, 0.1, activation_of("relu"), one)
        (tensor([1.]), tensor([0.]))
    """
    # With mu' = mu + gain beta before and beta' = beta (1 + gain) the condition is that of the plain problem,
    # s = mu' - beta' (f + k u).
    gain = gain * (beta * u * _bend(mu, kink) > 0).to(mu.dtype)
    beta_eff = beta * (1 + gain)
    mu = mu if before is None else mu + beta * gain * before
    if isinstance(kink, Largest):
        return window_minimum(mu, f, u, beta_eff, x0)

    # Descent from x0 goes this way, and takes the first minimum that it meets.
    downhill = -torch.sign(x0 - mu + beta_eff * (f + _slope(x0, kink, right=False) * u))
    delta, rest = torch.zeros_like(mu), torch.full_like(mu, math.nan)
    nearest = torch.full_like(mu, math.inf)

    def consider(s: Tensor, error: Tensor, place: float, is_minimum: Tensor) -> None:
        nonlocal delta, rest, nearest
        way = torch.where(downhill == 0, (s - x0).abs(), (s - x0) * downhill)
        rounding = 4 * torch.finfo(s.dtype).eps * (s.abs() + x0.abs())
        better = is_minimum & (way >= -rounding) & (way < nearest)
        delta, nearest = torch.where(better, error, delta), torch.where(better, way, nearest)
        rest = torch.where(better, place, rest)

    # On each piece: s = mu - beta (f + k u), if that lies on the piece.
    for slope, low, high in zip(kink.slopes, (-math.inf, *kink.kinks), (*kink.kinks, math.inf), strict=True):
        error = f + slope * u
        s = mu - beta_eff * error
        consider(s, error, math.nan, (s >= low) & (s <= high))
    # At each kink: the error that leads there, if it lies between those of the pieces beside it.
    for i, place in enumerate(kink.kinks):
        error = (mu - place) / beta_eff
        low_error, high_error = _ordered(f + kink.slopes[i] * u, f + kink.slopes[i + 1] * u, beta)
        consider(torch.full_like(mu, place), error, place, (low_error <= error) & (error <= high_error))
    return delta, rest


def nearest_force(s: Tensor, delta: Tensor, f: Tensor, u: Tensor, kink: Kink, beta: Beta) -> Tensor:
    """`f + k u` with the slope k that comes nearest to `delta`: on a piece its own, at a kink any that lies between."""
    if isinstance(kink, Largest):
        return nearest_window_force(s, delta, f, u, beta)
    left, right = (f + _slope(s, kink, right=side) * u for side in (False, True))
    low, high = _ordered(left, right, beta)
    return torch.where(low < high, delta.clamp(low, high), left)


def at_rest(s: Tensor, rest: Tensor, kink: Kink) -> Tensor:
    """The states `s`, with units at rest put on their kink exactly: those that tie to the mean of where they are."""
    resting = ~rest.isnan()
    if isinstance(kink, Largest):
        rest = (s * resting).sum(-1, keepdim=True) / resting.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(resting, rest, s)


def self_gains(graph: Graph, free: Point) -> dict[str, Tensor | float]:
    """How far the error of each value returns to its prediction through the layers below, per unit or on the average.

    Unit i of a linear layer or convolution: `|W_i|^2` times what each value that it reads moves with its own error: a
    state by 1 and what returns to it, the value behind a kink by the mean squared slope of that. Other operations are
    taken to pass on what they read.
    """
    gains: dict[str, Tensor | float] = {}
    moves: dict[str, float] = {}
    for node in graph.nodes:
        below = sum(moves.get(p, 0.0) for p in node.parents)
        if node.clamped:
            gains[node.name] = 0.0
        elif node.weighted is not None and node.ends_in_weighted and node.weighted.has_rows:
            weight = node.weighted.weight.detach()
            squares = below * weight.flatten(1).square().sum(1)
            gains[node.name] = squares.view(-1, *[1] * (weight.ndim - 2))
        else:
            overlaps = [op.target.overlap() for op in node.program if isinstance(op.target, Windows)]
            gains[node.name] = below * math.prod(overlaps)
        moves[node.name] = float(torch.as_tensor(gains[node.name]).mean()) + node.owns_state
        kink = graph.kinks.get(node.name)
        if isinstance(kink, Activation):
            moves[node.name] *= float(_slope(free.values[node.parents[0]], kink, right=False).square().mean())
    return gains


def _bend(mu: Tensor, kink: Kink) -> Tensor | float:
    """By how much the slope grows at the kink nearest to mu; that of a maximum grows at every tie."""
    if isinstance(kink, Largest):
        return 1.0
    bends = torch.tensor(kink.slopes, dtype=mu.dtype, device=mu.device).diff()
    edges = torch.tensor(kink.kinks, dtype=mu.dtype, device=mu.device)
    return bends[(mu.unsqueeze(-1) - edges).abs().argmin(-1)]


def _slope(s: Tensor, activation: Activation, right: bool) -> Tensor:
    """The slope of the activation at s; at a kink that of its left or right piece."""
    edges = torch.tensor(activation.kinks, dtype=s.dtype, device=s.device)
    slopes = torch.tensor(activation.slopes, dtype=s.dtype, device=s.device)
    return slopes[torch.bucketize(s.contiguous(), edges, right=right)]


def _ordered(left: Tensor, right: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
    """The errors on the left and right piece of a kink as (low, high): between them the kink is a minimum, if any is.

    For beta > 0 these are (left, right), for beta < 0 the other way round; low > high where the kink repels.
    """
    if isinstance(beta, Tensor):
        return torch.where(beta > 0, left, right), torch.where(beta > 0, right, left)
    return (left, right) if beta > 0 else (right, left)


# The units of a maximum: each rests by itself, or together with others at a tie.


def window_minimum(mu: Tensor, f: Tensor, u: Tensor, beta: Beta, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled errors `(mu - s) / beta` at the minimum of each window, and where units tie (NaN: they do not).

    The K units of a window, the last dimension, minimise `1/2 |s - m|^2 + c max_k s_k` with `m = mu - beta f` and
    `c = beta u`:

    - c > 0 pulls the largest down, until it ties with the runner-up: there both rest, and sink together until the
      third... The energy is convex, with one minimum (Moreau: s = m - c w, with w the projection of m / c on the
      probability simplex, the subdifferential of the maximum),

          s = min(m, t),     sum_k max(m_k - t, 0) = c

    - c < 0 pushes one unit up, and nothing rests at a tie: for every winner i whose s_i is then the largest,
      `s_i = m_i + |c|`, s = m else, is a minimum. The winner of the free equilibrium stays the winner where that is a
      minimum; else the largest of m is.

    `mu`, `f`, and the free states `x0` are `[..., K]`, `u` is `[..., 1]`.

    Example: the winner, 1.0, is pulled down by 0.5 and meets the other at 0.8; both share the rest of the pull.
        >>> mu = torch.tensor([1.0, 0.8])
        >>> delta, rest = window_minimum(mu, torch.zeros(2), torch.tensor([5.0]), 0.1, mu)
        >>> mu - 0.1 * delta, rest
        (tensor([0.6500, 0.6500]), tensor([0.6500, 0.6500]))
    """
    m, c = mu - beta * f, beta * u
    # c > 0: the units above the level t sink to it; two or more of them tie.
    sinks, level = _level(m, c)
    ties = sinks & (sinks.sum(-1, keepdim=True) > 1) & (c > 0)
    # c < 0: one unit rises.
    home, best = x0.argmax(-1, keepdim=True), m.argmax(-1, keepdim=True)
    winner = torch.where(m.gather(-1, home) - c >= m.gather(-1, best), home, best)
    alone = torch.where(c > 0, sinks & ~ties, _one_hot(winner, m))  # which unit the whole of u acts on
    delta = torch.where(ties, (mu - level) / beta, f + alone * u)
    return delta, torch.where(ties, level, math.nan)


def nearest_window_force(s: Tensor, delta: Tensor, f: Tensor, u: Tensor, beta: Beta) -> Tensor:
    """`f + w u` with the weights w nearest to `delta`, of the simplex over the winners; one-hot where beta u < 0."""
    winners = s == s.amax(-1, keepdim=True)
    w = torch.where(winners, (delta - f) / torch.where(u == 0, 1.0, u), -math.inf)
    _, level = _level(w, torch.ones_like(u))  # the projection of w on the simplex is max(w - level, 0)
    shared = (w - level).clamp_min(0)
    single = _one_hot(w.argmax(-1, keepdim=True), s)
    return f + torch.where(beta * u > 0, shared, single) * u


def _level(m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The level t with `sum_k max(m_k - t, 0) = c > 0`, [..., 1], and which units lie above it.

    If these are the k largest, `t = (m_(1) + ... + m_(k) - c) / k`; k is the largest number with m_(k) above that.
    """
    falling = m.sort(-1, descending=True).values
    count = torch.arange(1, m.shape[-1] + 1, dtype=m.dtype, device=m.device)
    levels = (falling.cumsum(-1) - c) / count
    last = (falling > levels).sum(-1, keepdim=True).clamp_min(1) - 1
    return m >= falling.gather(-1, last), levels.gather(-1, last)


def _one_hot(winner: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device) == winner


# The network.


class NonsmoothNetwork(Network):
    """The output error x, and the point and errors that follow from it.

    Attributes:
        now: the point.
        errors: the scaled errors that its states have.
        backward_errors: the errors that the last walk backward found: those that the states follow where none rests.
        resting: for every state before a kink where its units rest (NaN: at none), and the kink.
        gains: see `self_gains`.
    """

    def __init__(self, energy: Energy, free: Point, response: Response):
        super().__init__(energy, free, response)
        self.is_coupled = not are_independent(energy, free)
        self.now = free
        self.x: Tensor | None = None
        self.r = self.r_before = response.error
        self.errors: State = {}
        self.backward_errors: State = {}
        self.resting: BehindKink = {}
        self.gains = self_gains(energy.graph, free)

    def error_size(self) -> Tensor:
        assert self.x is not None
        return example_norm(self.x, len(self.x))

    def first_move(self, tol: float, may_stop: bool) -> Tensor:
        a = length_by_gain(self.energy, self.free, self.response, self.is_coupled)
        self.move(a)
        return a

    def products(self) -> tuple[Tensor, Tensor]:
        """`<r, y>` and `<y, y>` as in `general.py`, of the output alone."""
        r, y = self.r_before, self.r_before - self.r
        along, square = example_dot(r, y, self.energy.batch), example_dot(y, y, self.energy.batch)
        return (along.sum(), square.sum()) if self.is_coupled else (along, square)

    def move(self, a: Tensor) -> None:
        """`x <- x + a r`, a walk backward and one forward. In examples with a = 0 all errors stay as they are."""
        step = self.r * spread_length(a, self.r)
        self.x = step if self.x is None else self.x + step
        self.backward_errors, self.resting = self._backward(self.x, a != 0 if a.ndim else None)
        self.now, self.errors = self._forward()
        self.r_before, self.r = self.r, self.energy.wanted_error(self.now) - self.x
        self.note(worst_residual(self.energy, self.now, self.errors))

    def result(self) -> tuple[Point, Mapping[str, Tensor]]:
        return self.now, self.errors

    def _backward(self, x: Tensor, active: Tensor | None) -> tuple[State, BehindKink]:
        """The errors of all states that follow from the output's, and where units come to rest at a kink."""
        energy = self.energy
        errors: State = {}
        resting: BehindKink = {}
        behind_kink: BehindKink = {}

        def where_active(new: Tensor, old: Tensor | None) -> Tensor:
            return new if active is None or old is None else torch.where(per_example(active, new), new, old)

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if _stops_at_kink(energy, node, force, behind_kink):
                return None
            if not node.owns_state:
                return force
            name, mu = node.name, self.now.predictions[node.name]
            delta = x if name == energy.graph.output else torch.zeros_like(mu) if force is None else force
            before = self.backward_errors.get(name)
            if name in behind_kink:
                u, kink = behind_kink[name]
                beta, x0 = expand_beta(energy.beta, mu), self.free.values[name]
                delta, rest = unit_minimum(mu, delta, u, beta, kink, x0, before, self.gains[name])
                rested = self.resting.get(name)
                resting[name] = where_active(rest, rested[0] if rested else None), kink
            errors[name] = where_active(delta, before)
            return errors[name]

        energy.graph.vjp(self.now.saved, None, transmit)
        return errors, resting

    def _forward(self) -> tuple[Point, State]:
        """The states that follow the errors, and the errors that they then have: others where a unit rests."""
        energy, errors = self.energy, dict(self.backward_errors)

        def place(node: Node, mu: Tensor) -> Tensor:
            s = state_from_error(mu, errors[node.name], energy.beta)
            if node.name in self.resting:
                rest, kink = self.resting[node.name]
                s = at_rest(s, rest, kink)
                error = (mu - s) / expand_beta(energy.beta, s)
                errors[node.name] = torch.where(rest.isnan(), errors[node.name], error)
            return s

        return energy.graph.evaluate(energy.inputs, energy.context, place), errors


def worst_residual(energy: Energy, point: Point, errors: State) -> Tensor:
    """The residual of each example's worst node, from its errors as they are: one walk backward, [batch]."""
    batch, gradient = energy.batch, energy.wanted_error(point)
    found: list[Tensor] = []
    behind_kink: BehindKink = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if _stops_at_kink(energy, node, force, behind_kink):
            return None
        if not node.owns_state:
            return force
        name, s, delta = node.name, point.values[node.name], errors[node.name]
        if name == energy.graph.output:
            found.append(output_residual(delta, gradient))
            return delta
        incoming = torch.zeros_like(s) if force is None else force
        if name in behind_kink:
            incoming = nearest_force(s, delta, incoming, *behind_kink[name], expand_beta(energy.beta, s))
        found.append(relative_residual(delta, incoming, batch))
        return delta

    energy.graph.vjp(point.saved, None, transmit)
    return torch.stack(found).amax(0)


def _stops_at_kink(energy: Energy, node: Node, force: Tensor | None, behind_kink: BehindKink) -> bool:
    """Whether a node is a kink: its vjp depends on where the state before it will rest, so that force is kept there."""
    kink = energy.kinks.get(node.name)
    if kink is not None and force is not None:
        behind_kink[node.parents[0]] = force, kink
    return kink is not None
