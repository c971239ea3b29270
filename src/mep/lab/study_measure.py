"""Networks that differ in one thing at a time, and how each of them settles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import mep
from mep.runs.data import load
from mep.runs.models import PreNorm

Row = dict[str, Any]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
FAMILIES = (
    # shortcuts, activation, initialisation: plain ones, what initialisation changes, what shortcuts change
    ("plain", "relu", "torch"),
    ("plain", "relu", "he"),
    ("plain", "tanh", "torch"),
    ("plain", "tanh", "xavier"),
    ("plain", "gelu", "he"),
    ("residual", "relu", "torch"),
    ("residual", "gelu", "torch"),
)


def network(family: tuple[str, str, str], depth: int, width: int, features: int, classes: int) -> nn.Module:
    """A multilayer perceptron with so many hidden layers, freshly initialised from torch's random state."""
    shortcuts, activation, start = family
    act = ACTIVATIONS[activation]
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(features, width), act()]
    for _ in range(depth - 1):
        inner = nn.Linear(width, width), act()
        layers += [PreNorm(width, nn.Sequential(*inner))] if shortcuts == "residual" else inner
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    for module in model.modules():
        if isinstance(module, nn.Linear) and start == "he":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear) and start == "xavier":
            nn.init.xavier_normal_(module.weight)
    return model


def run_study(
    cases: Sequence[tuple[int, Sequence[float | None]]],
    *,
    width: int,
    batch_size: int,
    train_steps: int,
    tol: float,
    seed: int,
    console: Console,
) -> list[Row]:
    """One row for every network, stage of training and beta; see `measure`.

    cases: depths, and the betas to settle at with each, None for the default.
    """
    data = load("digits")
    torch.manual_seed(seed)
    order = torch.randperm(len(data.train_x))
    x, y = data.train_x[order], data.train_y[order]
    rows: list[Row] = []
    every = list(product(FAMILIES, cases))
    for family, (depth, betas) in track(every, "", console=console, transient=True, disable=not console.is_terminal):
        torch.manual_seed(seed)
        model = network(family, depth, width, x[0].numel(), data.classes)
        about = dict(zip(("shortcuts", "activation", "start"), family, strict=True))
        for stage in ("initial", "trained"):
            if stage == "trained":
                torch.manual_seed(seed)
                _train(model, x, y, train_steps, batch_size)
            for beta in betas:
                found = measure(model, x[:batch_size], y[:batch_size], beta, tol)
                rows.append({**about, "depth": depth, "stage": stage, "beta": beta, **found})
    return rows


def _train(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch_size: int) -> None:
    """Some steps of Adam and backprop."""
    update = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,))
        update.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        update.step()


MEASURED = ("loss", "gradient", "error", "first_error", "median_beta", "sweeps", "settled", "residual")


def measure(model: nn.Module, x: Tensor, y: Tensor, beta: float | None, tol: float) -> Row:
    """How a network settles on a batch; the fields `MEASURED`, and `why`: how settling ended.

    loss, gradient: the mean cost, and the norm of its gradient by backprop. error, first_error: relative, of the whole
    EP gradient and of the first weight's, whether or not all examples have settled. median_beta: over the examples; the
    beta itself if one was named. sweeps: of an example, mean. settled: the share of examples. residual: the largest.
    """
    ep = mep.EquilibriumPropagation(model, beta=beta, solver=mep.Sweep(tol=tol), on_unsettled="ignore")
    try:
        wanted, _ = mep.Backprop(model).gradients(x, y)
        found, estimate = ep.gradients(x, y)
    except mep.MepError as error:
        return {**dict.fromkeys(MEASURED), "why": type(error).__name__}
    norm = _norm(wanted.values())
    apart = {p: found[p] - g for p, g in wanted.items()}
    first = next(p for p in model.parameters() if p.ndim > 1)
    return {
        "loss": float(estimate.loss),
        "gradient": norm,
        "error": _norm(apart.values()) / norm if norm else None,
        "first_error": float(apart[first].norm() / wanted[first].norm()) if wanted[first].any() else None,
        "median_beta": estimate.median_beta,
        "sweeps": float(estimate.counts.double().mean()),
        "settled": float(estimate.settled.double().mean()),
        "residual": float(estimate.residual.max()),
        "why": str(estimate.result),
    }


def _norm(tensors: Any) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())
