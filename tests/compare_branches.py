"""Held branches beside exact ones: where the two equilibria of one energy differ, and by how much.

    python tests/compare_branches.py          prints the table of docs/concepts.md

Both are computed for the states of `branches="exact"`, from the same free equilibrium. With the branches held the
energy is smooth; where no unit is pushed over its kink the two equilibria are the same. The table: networks with He's
initialisation and batches of random numbers, in float64, settled to 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mep.estimators.contrast import contrast
from mep.graph.closed_forms import Largest
from mep.settle import Result
from mep.solvers import Sweep
from mep.verification.case import Case, Config
from mep.verification.equilibrium import Equilibria
from mep.verification.gradients import cosine, run_backprop


@dataclass(frozen=True)
class Branching:
    """Both equilibria at one beta.

    Attributes:
        beta: the nudging strength.
        settled: whether (held, exact) reached the tolerance; if not, what follows compares where they stopped.
        beyond: the fraction of units at kinks that are on another branch than in the free equilibrium, (held, exact).
        resting: the fraction that rests exactly on a kink or tie, at the exact equilibrium.
        distance: `|s_held - s_exact| / |s_exact - s_free|` over all states.
        cosine: between the two estimates of the gradient (one-sided contrast).
        difference: `|g_held - g_exact| / |g_exact|`.
        error: `|g - b| / |b|` against backprop's gradient b, of (held, exact).
    """

    beta: float
    settled: tuple[bool, bool]
    beyond: tuple[float, float]
    resting: float
    distance: float
    cosine: float
    difference: float
    error: tuple[float, float]


def compare_branches(model, x, y, betas=(0.5, 0.1, 0.01, 0.001), cost="cross_entropy", tol=1e-6, settle_steps=200):
    """A `Branching` for every beta, in float64; the model is not changed."""
    with Case(model, x, y, Config(cost, Sweep(settle_steps, tol=tol), "exact", ()), torch.float64) as case:
        backprop = run_backprop(case)
        both = [Equilibria(case, freeze_branches) for freeze_branches in (True, False)]
        return [_compared(case, backprop, both, beta) for beta in betas]


@torch.no_grad()
def _compared(case, backprop, both, beta):
    graph, free = both[1].energy.graph, both[1].free
    before = {node.name: node.parents[0] for node in graph.nodes if node.name in graph.kinks}  # the states kinks read

    def solve(equilibria):
        energy, settled = equilibria.settle(beta, case.config.solver)
        gradients = contrast([(1.0, energy, settled)], case.batch)
        return settled, _flat(gradients.get(p, torch.zeros_like(p)) for p in backprop)

    def beyond(point):
        """The fraction of units that are on another branch than in the free equilibrium."""
        masks = []
        for name, kink in graph.kinks.items():
            s, s0 = point.values[before[name]], free.values[before[name]]
            masks.append(kink.left_branch(s, s0.argmax(-1, keepdim=True) if isinstance(kink, Largest) else s0))
        return _fraction(masks)

    def rests(name, kink):
        """Where units rest on a kink, or a maximum is a tie."""
        s = exact.point.values[before[name]]
        if isinstance(kink, Largest):
            return (s == s.amax(-1, keepdim=True)).sum(-1) > 1
        return torch.isin(s, torch.tensor(kink.kinks, dtype=s.dtype))

    (held, g_held), (exact, g_exact) = map(solve, both)
    names = [node.name for node in graph.states]
    s_free, s_held, s_exact = (_flat(point.values[n] for n in names) for point in (free, held.point, exact.point))
    b = _flat(backprop.values())
    return Branching(
        beta=beta,
        settled=tuple(found.result is Result.CONVERGED for found in (held, exact)),
        beyond=(beyond(held.point), beyond(exact.point)),
        resting=_fraction([rests(*pair) for pair in graph.kinks.items()]),
        distance=_ratio(s_held - s_exact, s_exact - s_free),
        cosine=cosine(g_held, g_exact),
        difference=_ratio(g_held - g_exact, g_exact),
        error=(_ratio(g_held - b, b), _ratio(g_exact - b, b)),
    )


def _fraction(masks):
    """Of all units the fraction that is marked; 0 where there are none."""
    return sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))


def _ratio(a, b):
    return float(a.norm()) / max(float(b.norm()), torch.finfo(b.dtype).tiny)


def _flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


# The table.


class Block(nn.Module):
    """The rectified sum of a shortcut and two layers."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def mlp(depth):
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 10))


def vgg(kernel, padding):
    layers = []
    for channels, width in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel, 2, padding)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))


MODELS = {
    "ReLU, 2 layers": (lambda: mlp(2), (32,)),
    "ReLU, 6 layers": (lambda: mlp(6), (32,)),
    "residual, 3 blocks": (lambda: nn.Sequential(*(Block(32) for _ in range(3)), nn.Linear(32, 10)), (32,)),
    "VGG, windows apart": (lambda: vgg(2, 0), (1, 8, 8)),
    "VGG, windows overlap": (lambda: vgg(3, 1), (1, 8, 8)),
}
COLUMNS = "| model | beta | beyond: held | exact | resting | states | cosine | gradient | to backprop: held | exact |"


def main():
    """Print the table."""
    print(COLUMNS, "|---" * 10 + "|", sep="\n")
    for name, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        for p in model.parameters():
            nn.init.kaiming_normal_(p, nonlinearity="relu") if p.ndim > 1 else nn.init.zeros_(p)
        for row in compare_branches(model, torch.randn(16, *shape), torch.randint(10, (16,)), betas=(0.1, 0.01, 0.001)):
            if all(row.settled):
                numbers = (*row.beyond, row.resting, row.distance, row.difference, *row.error)
                cells = [f"{x:.2g}" for x in numbers]
                cells.insert(4, f"{row.cosine:.5f}")
            else:
                failed = [kind for kind, ok in zip(("held", "exact"), row.settled, strict=True) if not ok]
                cells = [f"{' and '.join(failed)} did not settle", *[""] * 7]
            print("|", " | ".join([name, f"{row.beta:g}", *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
