"""The models and costs on which everything must hold: `MODELS x COSTS`. Tiny, float64, seeded."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mep.capture import capture
from mep.capture.cache import Graphs
from mep.cost import PerExample, make_cost
from mep.energy import Box, Energy, Free, GroupEnergy, NodeEnergy, make_node_energy, nudge
from mep.graph.ops import StepContext
from mep.settle import Solver, settle

BATCH, CLASSES = 5, 3


def without_compiler(patch: pytest.MonkeyPatch) -> None:
    """Functions run as they were traced: minutes of compilation would show nothing more."""
    patch.setattr(torch, "compile", lambda function, **_: function)
    patch.setattr("torch._inductor.compile", lambda module, *_, **__: module)


def mlp(activation: Callable[[], nn.Module], *widths: int) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Of six features."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


class Lateral(nn.Module, GroupEnergy):
    """Units of one layer that act on each other: e = s^T (W + W^T) s / 4."""

    nodes = ("0",)

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def energy(self, s):
        return 0.25 * ((s @ (self.weight + self.weight.T)) * s).sum(1)


def inhibiting(width, strength):
    """Every unit acts on every other one: e = strength sum_(i < j) s_i s_j, without parameters that learn."""
    weight = strength * (1 - torch.eye(width, dtype=torch.float64))
    return Lateral(weight).requires_grad_(False)


class Quartic(NodeEnergy):
    """That of the docstring of `mep.NodeEnergy`."""

    is_forward = True

    def energy(self, s, mu):
        return (s - mu) ** 2 / 2 + (s - mu) ** 4 / 4

    def ds(self, s, mu):
        return (s - mu) + (s - mu) ** 3

    def dmu(self, s, mu):
        return -self.ds(s, mu)

    def state(self, mu, force):
        return mu + 2 / 3**0.5 * torch.sinh(torch.asinh(1.5 * 3**0.5 * force) / 3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.second(torch.tanh(h)))


class Functional(nn.Module):
    """Functional activations, an in-place sum, and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.first(x)
        h += self.second(torch.relu(h))
        return self.last(F.relu(h).mean(1))


class Twice(nn.Module):
    """One layer used twice, and one activation module used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last, self.act = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Linear(6, CLASSES),
            nn.SiLU(),
        )

    def forward(self, x):
        return self.last(self.shared(self.act(self.shared(self.act(self.first(x))))))


class Transposed(nn.Module):
    """The decoder is the encoder transposed."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(F.linear(self.inner(x).tanh(), self.inner.weight.t())))


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(11, CLASSES)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return self.last(torch.cat([left.tanh(), F.gelu(right), x], 1))


class Attention(nn.Module):
    """Multi-head attention whose two results are unpacked."""

    def __init__(self):
        super().__init__()
        self.first, self.attend, self.last = (
            nn.Linear(4, 6),
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        h = self.first(x)
        mixed, _ = self.attend(h, h, h)
        return self.last((h + mixed).mean(1))


class Embedded(nn.Module):
    """Tokens, a positional parameter, and an encoder layer of torch's own."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(7, 6), nn.Parameter(torch.randn(1, 3, 6))
        self.encode = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, tokens):
        return self.last(self.encode(self.embed(tokens) + self.position)[:, 0])


class Block(nn.Module):
    """Its forward branches on a value: it cannot be traced, only kept whole."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.outer(self.inner(x).tanh()) if x.isfinite().all() else x


class Scaled(nn.Module):
    """A bare parameter in the forward, and an output that is a parameter-free operation."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(4, 6), nn.Linear(6, CLASSES), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return torch.tanh(self.last(self.first(x).tanh() * self.scale))


class Partial(nn.Module):
    """Two inputs, a frozen weight, and a layer that the forward never calls."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Bilinear(6, 2, 6), nn.Linear(6, CLASSES)
        self.unused = nn.Linear(3, 3)
        self.second.weight.requires_grad_(False)

    def forward(self, x, context):
        return self.last(self.second(self.first(x).tanh(), context).tanh())


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    tokens: int = 0
    context: tuple[int, ...] = ()
    leaves: tuple[type[nn.Module], ...] = ()
    mixes_examples: bool = False

    def build(self, cost: str = "cross_entropy", batch: int = BATCH, seed: int = 0):
        """The model, an input and a target for the cost."""
        torch.manual_seed(seed)
        model = self.model().double()
        x = torch.randn(batch, *self.shape).double()
        if self.tokens:
            x = torch.randint(self.tokens, (batch, *self.shape))
        if self.context:
            x = (x, torch.randn(batch, *self.context).double())
        with torch.no_grad():
            return model, x, COSTS[cost].target(call(model, x))


MODELS: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(4, CLASSES)),
    "mlp tanh": Case(lambda: mlp(nn.Tanh, 4, 6, 6, CLASSES)),
    "mlp relu": Case(lambda: mlp(nn.ReLU, 4, 8, 8, CLASSES)),
    "conv relu maxpool": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(4, CLASSES),
        ),
        (1, 4, 4),
    ),
    "conv gelu avgpool": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2, groups=1), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
        ),
        (1, 6, 6),
    ),
    "conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.LeakyReLU(0.1), nn.AdaptiveMaxPool1d(2), nn.Conv1d(4, 4, 2), nn.ReLU6(),
            nn.Flatten(), nn.Linear(4, CLASSES),
        ),
        (2, 7),
    ),
    "one output per position": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, CLASSES, 1)), (2, 5)
    ),
    "residual": Case(Residual),
    "functional": Case(Functional, (2, 4)),
    "twice": Case(Twice),
    "transposed": Case(Transposed),
    "concatenating": Case(Concatenating),
    "batch norm": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(),
            nn.Linear(5, CLASSES),
        ),
        mixes_examples=True,
    ),
    "layer norm": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6), nn.ELU(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, CLASSES)
        )
    ),
    "prelu softplus hardtanh": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 6), nn.Softplus(2.0), nn.Linear(6, 6), nn.Hardtanh(-0.3, 0.4),
            nn.Linear(6, CLASSES),
        )
    ),
    "attention": Case(Attention, (3, 4)),
    "embedded": Case(Embedded, (3,), tokens=7),
    "leaves": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), Block(), nn.Tanh(), Block(), nn.Linear(6, CLASSES)), leaves=(Block,)
    ),
    "weight norm": Case(
        lambda: nn.Sequential(
            weight_norm(nn.Linear(4, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, CLASSES)
        )
    ),
    "scaled": Case(Scaled),
    "partial": Case(Partial, context=(2,)),
}  # fmt: skip


@dataclass(frozen=True)
class CostCase:
    """What is passed as `cost`, a target for an output, and the same cost written down independently, per example."""

    argument: str | PerExample
    target: Callable[[Tensor], Tensor]
    value: PerExample


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).cosh().log().flatten(1).sum(1)


COSTS: dict[str, CostCase] = {
    "cross_entropy": CostCase(
        "cross_entropy",
        lambda output: torch.randint(output.shape[1], (len(output), *output.shape[2:])),
        lambda s, y: -s.log_softmax(1).gather(1, y.unsqueeze(1)).flatten(1).mean(1),
    ),
    "mse": CostCase("mse", torch.randn_like, lambda s, y: (s - y).pow(2).flatten(1).mean(1)),
    "custom": CostCase(log_cosh, torch.randn_like, log_cosh),
}


def of_module(module: nn.Module):
    """The closed form of an activation module, as it is found when a model is read; None if there is none."""
    graph = capture(nn.Sequential(nn.Linear(2, 2), module, nn.Linear(2, 2)), torch.ones(3, 2))
    return next((op.activation for op in graph.nodes[-1].program if op.activation), None)


READINGS = {"held": ("prediction", "held"), "exact": ("prediction", "exact"), "hopfield": ("hopfield", "held")}
"""The energy and the branches of each reading of a model."""


def call(model: nn.Module, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def rows(x, chosen):
    """Some of the examples of an input."""
    return tuple(t[chosen] for t in x) if isinstance(x, tuple) else x[chosen]


@functools.lru_cache(maxsize=4)
def _graphs_of(model: nn.Module, reading: str, leaves) -> Graphs:
    """The graphs of a model: one for all batches that it fits."""
    return Graphs(model, leaves, *READINGS[reading], "cross_entropy", "never")


@torch.no_grad()
def free_energy(model: nn.Module, x, reading: str = "held", leaves=()):
    """The free energy of a batch and its equilibrium where that is the forward pass (`hopfield`: where it starts)."""
    graph = _graphs_of(model, reading, leaves).of(x)
    coupling = make_node_energy("hopfield" if reading == "hopfield" else "prediction")
    batch = len(x[0] if isinstance(x, tuple) else x)
    energy = Energy(graph, coupling, graph.bind(x), StepContext(freeze_branches=reading == "held"), batch)
    point = energy.free_point()
    energy.context.recording = False
    return energy, point


@torch.no_grad()
def settled(model: nn.Module, x, target, cost, beta: float, solver: Solver, reading: str = "held", leaves=()):
    """The nudged energy, and where the solver settles; a Hopfield network settles freely first."""
    energy, point = free_energy(model, x, reading, leaves)
    free = None
    if reading == "hopfield":
        point = settle(energy, point, solver).point
        forces = energy.forces(point)
        boxes = {node.name: node.box for node in energy.graph.states}
        free = {name: Free(s, leftover(s, forces[name], boxes[name])) for name, s in energy.state(point).items()}
    nudged = nudge(energy, make_cost(cost)(energy.output(point), target), beta, free)
    return nudged, settle(nudged, point, solver)


def leftover(s: Tensor, force: Tensor, box: Box) -> Tensor:
    """The force on a state, without what a face of its box holds back."""
    low, high = box
    return force.masked_fill(((s <= low) & (force > 0)) | ((s >= high) & (force < 0)), 0)
