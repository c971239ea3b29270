r"""The energy that a state of a Hopfield network has by itself, one entry for each activation.

    e(s, mu) = G(s) - <s, mu>,        G'(s) = f^-1(s)

With all other states fixed, the sum of all e is least at `s = f(pull)`, the activation f of all that acts on the state.
G is convex, since f does not fall, and the Legendre transform of F with F' = f.

| f(a)                     | G(s)                                          | s in     |
|--------------------------|-----------------------------------------------|----------|
| a, clipped to [low, high]| s^2 / 2                                       | the box  |
| a/6 + 1/2, clipped       | 3 (s - 1/2)^2                                 | [0, 1]   |
| sigmoid                  | s log s + (1 - s) log(1 - s)                  | (0, 1)   |
| tanh                     | ((1 + s) log(1 + s) + (1 - s) log(1 - s)) / 2 | (-1, 1)  |
| softplus                 | s^2 / 2 + Li2(e^-s) - pi^2 / 6                | (0, inf) |
| softmax over a dimension | sum s log s                                   | simplex  |

`displacement` is `(f(a + beta q) - f(a)) / beta` with `f(a) = s`: in closed form from s, without a difference of nearly
equal numbers, so that no beta is too small for its digits. Open domains are not left by rounding: states stay between
the least positive normal number, or the last number before 1, and the other end.

Sources: Hopfield 1984, https://doi.org/10.1073/pnas.81.10.3088, eq. 7 (the integral of the inverse); Krotov and
Hopfield 2021, arXiv:2008.06996 (softmax).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Bounds = tuple[float, float]
FREE: Bounds = (-math.inf, math.inf)
_RESPONDS = 0.01
"""A unit is counted as saturated if the slope of its activation is less than this share of the largest slope."""


class Potential(ABC):
    """G of a state, and the activation f whose inverse is its derivative. Pulls are arguments of f."""

    def __str__(self) -> str:
        return type(self).__name__.lower()

    @property
    def bounds(self) -> Bounds:
        """The faces on which a state may lie; none where the domain is open."""
        return FREE

    @property
    def domain(self) -> Bounds:
        """The least and the largest number at which G is finite."""
        return self.bounds

    @property
    def is_identity(self) -> bool:
        """Whether `f(a) = a` between the faces."""
        return False

    @property
    def is_bounded(self) -> bool:
        """Whether states cannot grow without bound."""
        return True

    @property
    def steepest(self) -> float:
        """The largest eigenvalue of the Jacobian f'."""
        return 1.0

    @abstractmethod
    def respond(self, pull: Tensor, held_at: Tensor | None = None) -> Tensor:
        """f(pull). Units that are on a face at `held_at` stay there, and others leave their box if drawn so far."""

    @abstractmethod
    def inverse(self, s: Tensor) -> Tensor:
        """The pull at which s is the response: G'(s)."""

    def within(self, s: Tensor) -> Tensor:
        """s, and the nearest number of an open domain where rounding has led out of it."""
        return s

    @abstractmethod
    def value(self, s: Tensor) -> Tensor:
        """G, unit by unit."""

    @abstractmethod
    def slope(self, s: Tensor, v: Tensor) -> Tensor:
        """f' v, with f' where f is s; as if there were no faces."""

    @abstractmethod
    def displacement(self, s: Tensor, q: Tensor, beta: float | Tensor, held: bool) -> Tensor:
        """`(f(a + beta q) - f(a)) / beta` with `f(a) = s`, of a complex beta, too.

        `held`: units on a face stay there, and others may leave.
        """

    def force(self, s: Tensor, pull: Tensor) -> Tensor:
        """The derivative of `G(s) - <s, pull>`."""
        return self.inverse(s) - pull

    def without_faces(self, s: Tensor, force: Tensor) -> Tensor:
        """The force on a state, less what a face holds back."""
        return force

    def hold(self, s: Tensor, v: Tensor) -> Tensor:
        """v, and 0 where s is on a face."""
        return v

    def inside(self, s: Tensor) -> Tensor | None:
        """Which units are off the faces, or are not saturated; None where there are neither."""
        return self.slope(s, torch.ones_like(s)) > _RESPONDS * self.steepest


@dataclass(frozen=True)
class Quadratic(Potential):
    """f(a) = rate a + offset, clipped to [low, high]: G = (s - offset)^2 / (2 rate)."""

    low: float = -math.inf
    high: float = math.inf
    rate: float = 1.0
    offset: float = 0.0

    def __str__(self) -> str:
        return f"box [{self.low:g}, {self.high:g}]"

    @property
    def bounds(self) -> Bounds:
        return self.low, self.high

    @property
    def is_identity(self) -> bool:
        return self.rate == 1 and self.offset == 0

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def steepest(self) -> float:
        return self.rate

    def respond(self, pull: Tensor, held_at: Tensor | None = None) -> Tensor:
        s = pull if self.is_identity else pull * self.rate + self.offset
        if self.bounds == FREE:
            return s
        if held_at is None:
            return s.clamp(self.low, self.high)
        return torch.where((held_at > self.low) & (held_at < self.high), s, held_at)

    def inverse(self, s: Tensor) -> Tensor:
        return s if self.is_identity else (s - self.offset) / self.rate

    def value(self, s: Tensor) -> Tensor:
        return (s - self.offset).square() / (2 * self.rate)

    def slope(self, s: Tensor, v: Tensor) -> Tensor:
        return v if self.rate == 1 else v * self.rate

    def displacement(self, s: Tensor, q: Tensor, beta: float | Tensor, held: bool) -> Tensor:
        moved = self.slope(s, q)
        if held or self.bounds == FREE:
            return self.hold(s, moved)
        one, two = (self.low - s) / beta, (self.high - s) / beta
        return moved.clamp(torch.minimum(one, two), torch.maximum(one, two))

    def without_faces(self, s: Tensor, force: Tensor) -> Tensor:
        return torch.where(s == self.respond(self.inverse(s) - force), 0, force)

    def hold(self, s: Tensor, v: Tensor) -> Tensor:
        if self.bounds == FREE:
            return v
        if v.is_complex():
            return torch.where((s > self.low) & (s < self.high), v, 0)
        held: Tensor = aten.hardtanh_backward(v, s, self.low, self.high)
        return held

    def inside(self, s: Tensor) -> Tensor | None:
        return None if self.bounds == FREE else (s > self.low) & (s < self.high)


@dataclass(frozen=True)
class Sigmoid(Potential):
    """f(a) = 1 / (1 + exp(-a)): G is the negative binary entropy."""

    @property
    def domain(self) -> Bounds:
        return 0.0, 1.0

    @property
    def steepest(self) -> float:
        return 0.25

    def respond(self, pull: Tensor, held_at: Tensor | None = None) -> Tensor:
        return self.within(pull.sigmoid())

    def inverse(self, s: Tensor) -> Tensor:
        return self.within(s).logit()

    def within(self, s: Tensor) -> Tensor:
        limits = torch.finfo(s.dtype)
        return s.clamp(limits.tiny, 1 - limits.eps / 2)

    def value(self, s: Tensor) -> Tensor:
        return -(_entropy(s) + _entropy(1 - s))

    def slope(self, s: Tensor, v: Tensor) -> Tensor:
        return s * (1 - s) * v

    def displacement(self, s: Tensor, q: Tensor, beta: float | Tensor, held: bool) -> Tensor:
        return logistic_change(s, 1 - s, beta * q) / beta


@dataclass(frozen=True)
class Tanh(Potential):
    """f(a) = tanh(a), which is 2 sigmoid(2 a) - 1."""

    @property
    def domain(self) -> Bounds:
        return -1.0, 1.0

    def respond(self, pull: Tensor, held_at: Tensor | None = None) -> Tensor:
        return self.within(pull.tanh())

    def inverse(self, s: Tensor) -> Tensor:
        return self.within(s).atanh()

    def within(self, s: Tensor) -> Tensor:
        largest = 1 - torch.finfo(s.dtype).eps / 2
        return s.clamp(-largest, largest)

    def value(self, s: Tensor) -> Tensor:
        return -0.5 * (_entropy(1 + s) + _entropy(1 - s))

    def slope(self, s: Tensor, v: Tensor) -> Tensor:
        return (1 - s) * (1 + s) * v

    def displacement(self, s: Tensor, q: Tensor, beta: float | Tensor, held: bool) -> Tensor:
        return 2 * logistic_change((1 + s) / 2, (1 - s) / 2, 2 * beta * q) / beta


@dataclass(frozen=True)
class Softplus(Potential):
    """f(a) = log(1 + exp(b a)) / b with sharpness b: G is that of b = 1 at b s, over b^2."""

    sharpness: float = 1.0

    @property
    def domain(self) -> Bounds:
        return 0.0, math.inf

    @property
    def is_bounded(self) -> bool:
        return False

    def respond(self, pull: Tensor, held_at: Tensor | None = None) -> Tensor:
        return _softplus(self.sharpness * pull) / self.sharpness

    def inverse(self, s: Tensor) -> Tensor:
        s = self.within(s)
        return s + torch.log(self._rate(s)) / self.sharpness

    def within(self, s: Tensor) -> Tensor:
        return _positive(s)

    def value(self, s: Tensor) -> Tensor:
        return softplus_energy(self.sharpness * s) / self.sharpness**2

    def slope(self, s: Tensor, v: Tensor) -> Tensor:
        return self._rate(s) * v

    def displacement(self, s: Tensor, q: Tensor, beta: float | Tensor, held: bool) -> Tensor:
        h = self.sharpness * beta * q
        if h.is_complex():
            return torch.log1p(self._rate(s) * torch.expm1(h)) / (self.sharpness * beta)
        small = torch.log1p(self._rate(s) * torch.expm1(h.clamp(-1, 1)))
        # A difference of numbers that are far from equal loses nothing.
        large = _softplus(self.sharpness * self.inverse(s) + h) - self.sharpness * s
        return torch.where(h.abs() < 1, small, large) / (self.sharpness * beta)

    def _rate(self, s: Tensor) -> Tensor:
        """f' = sigmoid(b a), from s."""
        return -torch.expm1(-self.sharpness * s)


@dataclass(frozen=True)
class Softmax(Potential):
    """f(a) = exp(a) / sum exp(a) over a dimension: G is the negative entropy, on the simplex."""

    dim: int = -1

    @property
    def domain(self) -> Bounds:
        """Of each unit; all together are 1."""
        return 0.0, 1.0

    @property
    def steepest(self) -> float:
        return 0.5

    def respond(self, pull: Tensor, held_at: Tensor | None = None) -> Tensor:
        return self.within(pull.softmax(self.dim))

    def inverse(self, s: Tensor) -> Tensor:
        return self.within(s).log()

    def within(self, s: Tensor) -> Tensor:
        return _positive(s)

    def force(self, s: Tensor, pull: Tensor) -> Tensor:
        """Along the simplex: its sum is 0."""
        force = self.inverse(s) - pull
        return force - force.mean(self.dim, keepdim=True)

    def value(self, s: Tensor) -> Tensor:
        return -_entropy(s)

    def slope(self, s: Tensor, v: Tensor) -> Tensor:
        return s * (v - (s * v).sum(self.dim, keepdim=True))

    def displacement(self, s: Tensor, q: Tensor, beta: float | Tensor, held: bool) -> Tensor:
        # s_i exp(h_i) / sum_j s_j exp(h_j) - s_i = s_i (exp(h_i - c) - 1), c = log sum_j s_j exp(h_j); h up to a number
        h = beta * q
        if h.is_complex():
            return s * torch.expm1(h - torch.log1p((s * torch.expm1(h)).sum(self.dim, keepdim=True))) / beta
        h = h - h.amax(self.dim, keepdim=True)
        less = (s * torch.expm1(h)).sum(self.dim, keepdim=True)
        c = torch.where(less > -0.5, torch.log1p(less), (s * h.exp()).sum(self.dim, keepdim=True).log())
        return s * torch.expm1(h - c) / beta

    def inside(self, s: Tensor) -> Tensor:
        return s * (1 - s) > _RESPONDS * 0.25


FREE_STATE = Quadratic()
"""That of a state without an activation, such as the output: G = s^2 / 2."""


def softmax_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int) -> Softmax | None:
    """That of an operation with these arguments after its input of so many dimensions; None if it is no softmax.

    Example:
        >>> softmax_of("softmax", (-1,), {}, 2)
        Softmax(dim=1)
    """
    if name not in SOFTMAXES:
        return None
    given = dict(zip(("dim", "dtype"), args, strict=False)) | dict(kwargs)
    dim = given.get("dim")
    return Softmax(dim % rank) if isinstance(dim, int) and dim % rank and not given.get("dtype") else None


SOFTMAXES = ("softmax", "_softmax", "special_softmax")
"""The names of the operation."""


def logistic_change(up: Tensor, down: Tensor, h: Tensor) -> Tensor:
    """`sigmoid(a + h) - sigmoid(a)`, given `up = sigmoid(a)` and `down = 1 - up`, for any h.

    Example:
        >>> a = torch.tensor([1.0, -3.0])
        >>> logistic_change(a.sigmoid(), (-a).sigmoid(), torch.tensor([1e-20, 200.0]))
        tensor([1.9661e-21, 9.5257e-01])
    """
    if h.is_complex():
        return up * down * torch.expm1(h) / (down + up * h.exp())
    # up down (1 - e^-|h|) / (near + far e^-|h|) in the direction of h, near being the side from which it comes
    less = torch.expm1(-h.abs())
    near, far = torch.where(h < 0, down, up), torch.where(h < 0, up, down)
    return up * down * torch.copysign(less, h) / (near + far * (1 + less))


def softplus_energy(s: Tensor) -> Tensor:
    """The integral of log(exp(t) - 1) from 0 to s: `s^2 / 2 + Li2(exp(-s)) - pi^2 / 6`.

    The dilogarithm is a series of Bernoulli numbers, `Li2(1 - exp(-u)) = sum_n B_n u^(n+1) / (n+1)!`, here for u up to
    log 2; below s = log 2 its reflection, `Li2(z) + Li2(1 - z) = pi^2 / 6 - log(z) log(1 - z)`, leads there, and
    cancels pi^2 / 6 (Lewin 1981, Polylogarithms and associated functions, chapter 1).
    """
    s = s if s.is_complex() else _positive(s)
    small = s.real < math.log(2)
    log = torch.log(-torch.expm1(-s))
    u = torch.where(small, s, -log)
    series, power = u - u.square() / 4, u
    for n, bernoulli in enumerate(_BERNOULLI, 1):
        power = power * u.square()
        series = series + power * (bernoulli / math.factorial(2 * n + 1))
    return s.square() / 2 + torch.where(small, s * log - series, series - math.pi**2 / 6)


_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)
"""B_2, B_4, ..., B_16: what is left out is below 1e-18."""


def _softplus(a: Tensor) -> Tensor:
    """log(1 + exp(a)), without the straight line that torch takes from a threshold on."""
    return _positive(a.clamp(min=0) + torch.log1p(torch.exp(-a.abs())))


def _entropy(s: Tensor) -> Tensor:
    """-s log s, 0 at 0."""
    return -s * s.log() if s.is_complex() else torch.special.entr(s)


def _positive(s: Tensor) -> Tensor:
    return s.clamp(min=torch.finfo(s.dtype).tiny)
