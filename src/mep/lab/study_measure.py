"""Networks that differ in one thing at a time, and how each of them settles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import mep
from mep.energy import make_node_energy
from mep.runs.data import load
from mep.runs.models import PreNorm
from mep.verification.case import Case, Config
from mep.verification.recurrent import FixedPoint

Row = dict[str, Any]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "boxes": partial(nn.Hardtanh, 0.0, 1.0),
}
HOPFIELD = "hopfield"
FAMILIES = (
    # kind, activation, initialisation: plain ones, what initialisation changes, what shortcuts and feedback change
    ("plain", "relu", "torch"),
    ("plain", "relu", "he"),
    ("plain", "tanh", "torch"),
    ("plain", "tanh", "xavier"),
    ("plain", "gelu", "he"),
    ("residual", "relu", "torch"),
    ("residual", "gelu", "torch"),
    (HOPFIELD, "boxes", "halved"),  # with torch's weights as they are it has several equilibria
)


def network(family: tuple[str, str, str], depth: int, width: int, features: int, classes: int) -> nn.Module:
    """A multilayer perceptron with so many hidden layers, freshly initialised from torch's random state."""
    kind, activation, start = family
    act = ACTIVATIONS[activation]
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(features, width), act()]
    for _ in range(depth - 1):
        inner = nn.Linear(width, width), act()
        layers += [PreNorm(width, nn.Sequential(*inner))] if kind == "residual" else inner
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    for module in model.modules():
        if isinstance(module, nn.Linear) and start == "he":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear) and start == "xavier":
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Linear) and start == "halved":
            with torch.no_grad():
                module.weight.mul_(0.5)
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
        about = dict(zip(("kind", "activation", "start"), family, strict=True))
        energy = HOPFIELD if family[0] == HOPFIELD else "prediction"
        for stage in ("initial", "trained"):
            if stage == "trained":
                torch.manual_seed(seed)
                _train(model, x, y, train_steps, batch_size, energy)
            for found in measure(model, x[:batch_size], y[:batch_size], betas, tol, energy):
                rows.append({**about, "depth": depth, "stage": stage, **found})
    return rows


def _train(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch_size: int, energy: str) -> None:
    """Some steps of Adam, by backprop, or where there is no forward pass by equilibrium propagation."""
    update = torch.optim.Adam(model.parameters(), lr=1e-3)
    ep = mep.EquilibriumPropagation(model, COSTS[energy], energy=energy, on_unsettled="ignore")
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,))
        update.zero_grad()
        if energy == HOPFIELD:
            ep(x[rows], y[rows])
        else:
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        update.step()


COSTS = {"prediction": "cross_entropy", HOPFIELD: "one_hot_mse"}
MEASURED = ("loss", "gradient", "error", "first_error", "median_beta", "sweeps", "settled", "residual")


def measure(
    model: nn.Module, x: Tensor, y: Tensor, betas: Sequence[float | None], tol: float, energy: str = "prediction"
) -> list[Row]:
    """How a network settles on a batch at each beta: the fields `MEASURED`, and `why`: how settling ended.

    loss, gradient: the mean cost, and the norm of its gradient by backprop, of a Hopfield network by recurrent backprop
    at its equilibrium. error, first_error: relative, of the whole EP gradient and of the first weight's, whether or not
    all examples have settled. median_beta: over the examples; the beta itself if one was named. sweeps: of an example,
    mean. settled: the share of examples. residual: the largest.
    """
    solver = mep.Relaxation(tol=tol) if energy == HOPFIELD else mep.Sweep(tol=tol)
    unknown = dict.fromkeys(MEASURED)
    wanted: dict[nn.Parameter, Tensor] | None = None
    try:
        wanted = _recurrent(model, x, y) if energy == HOPFIELD else mep.Backprop(model).gradients(x, y)[0]
    except mep.MepError as error:
        if energy != HOPFIELD:
            return [{"beta": beta, **unknown, "why": type(error).__name__} for beta in betas]
    norm, rows = None if wanted is None else _norm(wanted.values()), []
    first = next(p for p in model.parameters() if p.ndim > 1)
    for beta in betas:
        ep = mep.EquilibriumPropagation(model, COSTS[energy], beta, solver, energy, on_unsettled="ignore")
        try:
            found, estimate = ep.gradients(x, y)
        except mep.MepError as error:
            rows.append({"beta": beta, **unknown, "why": type(error).__name__})
            continue
        apart = {p: found[p] - g for p, g in wanted.items()} if wanted else {}
        rows.append(
            {
                "beta": beta,
                "loss": float(estimate.loss),
                "gradient": norm,
                "error": _norm(apart.values()) / norm if norm else None,
                "first_error": float(apart[first].norm() / wanted[first].norm())
                if wanted and wanted[first].any()
                else None,
                "median_beta": estimate.median_beta,
                "sweeps": float(estimate.counts.double().mean()),
                "settled": float(estimate.settled.double().mean()),
                "residual": float(estimate.residual.max()),
                "why": str(estimate.result),
            }
        )
    return rows


def _recurrent(model: nn.Module, x: Tensor, y: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient at the equilibrium of a Hopfield network, in double precision."""
    config = Config(COSTS[HOPFIELD], mep.Relaxation(), "held", (), make_node_energy(HOPFIELD))
    with Case(model, x, y, config, torch.float64) as case:
        found = {case.names[p]: g for p, g in FixedPoint(case).gradients().items()}
    return {p: found[name].to(p.dtype) for name, p in model.named_parameters()}


def _norm(tensors: Any) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())
