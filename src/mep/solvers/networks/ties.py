"""Where the units of a maximum rest: each by itself, or together at a tie.

The K units of a window, the last dimension, minimise

    1/2 |s - m|^2 + c max_k s_k          m = mu - beta f,   c = beta u

`f` pulls on the units themselves, `u` on their maximum.

- c > 0 pulls the largest down, until it ties with the runner-up: there both rest, and sink together until the third...
  The subdifferential of the maximum is the convex hull of its winners, and the energy is convex, with one minimum

      s = min(m, t),     sum_k max(m_k - t, 0) = c

  (Moreau: s = m - c w, with w the projection of m / c on the probability simplex).
- c < 0 pushes one unit up, and a tie is a ridge on which nothing rests: `s_i = m_i + |c|` for one winner i, s = m else,
  is a minimum for each i whose s_i is the largest. The unit that wins in the free equilibrium stays the winner as long
  as that is a minimum; after it the largest of m is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mep.graph.node import Beta


def relax(mu: Tensor, f: Tensor, u: Tensor, beta: Beta, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled errors `(mu - s) / beta` at the window's equilibrium, and where units tie (NaN: they do not).

    `mu`, `f`, and the free states `x0` are `[..., K]`, `u` is `[..., 1]`.

    Example: the winner, 1.0, is pulled down by 0.5 and meets the other at 0.8; both share the rest of the pull.
        >>> mu = torch.tensor([1.0, 0.8])
        >>> delta, rest = relax(mu, torch.zeros(2), torch.tensor([5.0]), 0.1, mu)
        >>> mu - 0.1 * delta, rest
        (tensor([0.6500, 0.6500]), tensor([0.6500, 0.6500]))
    """
    m, c = mu - beta * f, beta * u
    sunk, level = _sunk(m, c)
    tied = sunk & (sunk.sum(-1, keepdim=True) > 1) & (c > 0)
    alone = torch.where(c > 0, sunk & ~tied, _one_hot(_pushed(m, c, x0), m))
    delta = torch.where(tied, (mu - level) / beta, f + alone * u)
    return delta, torch.where(tied, level, math.nan)


def _sunk(m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Which units a pull c > 0 on the maximum reaches, and down to which level t."""
    falling = m.sort(-1, descending=True).values
    count = torch.arange(1, m.shape[-1] + 1, dtype=m.dtype, device=m.device)
    levels = (falling.cumsum(-1) - c) / count
    last = (falling > levels).sum(-1, keepdim=True).clamp_min(1) - 1
    sunk = m >= falling.gather(-1, last)
    return sunk, levels.gather(-1, last)


def _pushed(m: Tensor, c: Tensor, x0: Tensor) -> Tensor:
    """The unit that a push up raises: [..., 1]."""
    home, best = x0.argmax(-1, keepdim=True), m.argmax(-1, keepdim=True)
    stays = m.gather(-1, home) - c >= m.gather(-1, best)
    return torch.where(stays, home, best)


def _one_hot(winner: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device) == winner


def balancing_force(s: Tensor, delta: Tensor, f: Tensor, u: Tensor, beta: Beta) -> Tensor:
    """`f + w u` with the w that comes nearest to `delta`: of the simplex over the winners, one of them if u pushes."""
    winners = s == s.amax(-1, keepdim=True)
    size = torch.where(u == 0, 1.0, u)
    wanted = torch.where(winners, (delta - f) / size, -math.inf)
    _, level = _sunk(wanted, torch.ones_like(u))
    shared = (wanted - level).clamp_min(0)
    single = _one_hot(wanted.argmax(-1, keepdim=True), s)
    return f + torch.where(beta * u > 0, shared, single) * u


def mean_at_tie(s: Tensor, rest: Tensor) -> Tensor:
    """The mean of `s` over the units of a window that tie: [..., 1]."""
    tied = ~rest.isnan()
    return (s * tied).sum(-1, keepdim=True) / tied.sum(-1, keepdim=True).clamp_min(1)
