"""Random models for property-based tests: any directed acyclic graph of layers, written down as a `Plan`.

A plan is a list of numbers and can always be built: what does not fit (a sum of two shapes) is left out. So hypothesis
never discards a case, and shrinks one that fails to the shortest list that still does.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 3
# One example's shape, with the layer that mixes its features, or channels.
SHAPES = {"flat": (3,), "sequence": (3, 2), "line": (2, 4), "image": (2, 3, 3)}
POINTWISE = {
    "tanh": torch.tanh,
    "sigmoid": lambda h: h.sigmoid(),
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "sine": torch.sin,
    "relu": F.relu,
    "relu in place": lambda h: F.relu(h.clone(), inplace=True),
    "leaky relu": lambda h: F.leaky_relu(h, 0.2),
    "hardtanh": lambda h: F.hardtanh(h, -0.4, 0.5),
    "relu6": F.relu6,
    "clamp": lambda h: h.clamp(-0.3, 0.6),
    "abs": abs,
    "halved": lambda h: h * 0.5 + 0.1,
}
MIXED = ("weighted", "weighted", "shared", "pointwise", "pointwise", "sum", "difference", "product")
MIXED += ("concatenation", "norm", "scale", "average", "maximum", "prelu", "depthwise")
NOISY = (*MIXED, "dropout", "batch norm")
UNREADABLE = (*MIXED, "branch", "slice", "detach", "numpy", "examples", "noise", "two results")


@dataclass(frozen=True)
class Layer:
    """What to do with the values `first` and `second`, counted from the latest; `size`: a width, or which variant."""

    kind: str
    first: int
    second: int
    size: int


@dataclass(frozen=True)
class Plan:
    family: str
    layers: tuple[Layer, ...]
    seed: int
    batch: int
    squashed: bool  # an output that is a parameter-free operation

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
        """The model and an input."""
        torch.manual_seed(self.seed)
        return Dag(self).to(dtype), torch.randn(self.batch, *SHAPES[self.family], dtype=dtype)


def plans(kinds: tuple[str, ...] = MIXED, longest: int = 7) -> st.SearchStrategy[Plan]:
    back = st.integers(0, 3)
    layers = st.lists(st.builds(Layer, st.sampled_from(kinds), back, back, st.integers(1, 16)), max_size=longest)
    seeds, batches = st.integers(0, 2**16), st.integers(2, 4)
    return st.builds(Plan, st.sampled_from(sorted(SHAPES)), layers.map(tuple), seeds, batches, st.booleans())


class Dag(nn.Module):
    """The model of a plan: its forward reads the plan once more, as users' models loop over their configuration."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.family = plan.family
        self.squashed = plan.squashed
        self.parts = nn.ModuleList()
        self.steps: list[tuple] = []
        self.scales = nn.ParameterList()
        values = [torch.zeros(2, *SHAPES[plan.family])]
        for layer in plan.layers:
            step = self._step(layer, values)
            if step is not None:
                self.steps.append(step)
                values.append(self._run(step, values))
        self._drop_dead_noise()
        flat = values[-1].flatten(1).shape[1]
        self.last = nn.Linear(flat, CLASSES)

    def forward(self, x):
        values = [x]
        for step in self.steps:
            values.append(self._run(step, values))
        output = self.last(values[-1].flatten(1))
        return torch.tanh(output) * 2 if self.squashed else output

    def _drop_dead_noise(self) -> None:
        """What nobody reads is not run: it would draw numbers and move statistics in the model alone."""
        live = {len(self.steps)}
        for i in reversed(range(len(self.steps))):
            kind, sources, part = self.steps[i]
            if i + 1 in live:
                live |= set(sources)
            elif kind == "weighted" and isinstance(self.parts[part], (nn.Dropout, nn.modules.batchnorm._BatchNorm)):
                self.steps[i] = "average", sources, None

    def _channels(self, value: Tensor) -> int:
        return value.shape[-1] if self.family == "sequence" else value.shape[1]

    def _keep(self, module: nn.Module) -> int:
        self.parts.append(module)
        return len(self.parts) - 1

    def _weighted(self, n: int, size: int) -> nn.Module:
        width = 1 + size % 5
        if self.family == "line":
            return nn.Conv1d(n, width, 1 + 2 * (size % 2), padding=size % 2)
        if self.family == "image":
            return nn.Conv2d(n, width, 1 + 2 * (size % 2), padding=size % 2, bias=size % 3 > 0)
        return nn.Linear(n, width, bias=size % 3 > 0)

    def _step(self, layer: Layer, values: list[Tensor]) -> tuple | None:
        """(kind, positions of the values that are read, what is done), None where it does not fit."""
        at = max(0, len(values) - 1 - layer.first)
        h, n = values[at], self._channels(values[at])
        alike = [i for i, v in enumerate(values) if v.shape == h.shape and i != at]
        other = alike[layer.second % len(alike)] if alike else at
        kind, size = layer.kind, layer.size
        if kind == "weighted":
            return kind, (at,), self._keep(self._weighted(n, size))
        if kind == "shared":
            weighted = [s[2] for s in self.steps if s[0] == "weighted"]
            fits = [i for i in weighted if _takes(self.parts[i]) == n]
            return ("weighted", (at,), fits[size % len(fits)]) if fits else None
        if kind == "pointwise":
            return kind, (at,), sorted(POINTWISE)[size % len(POINTWISE)]
        if kind in ("sum", "difference", "product", "maximum"):
            return kind, (at, other), size
        if kind == "concatenation":
            beside = [i for i, v in enumerate(values) if v.shape[2:] == h.shape[2:] and i != at]
            return (kind, (at, beside[layer.second % len(beside)]), None) if beside else None
        if kind == "norm":
            grouped = self.family in ("line", "image")
            return "weighted", (at,), self._keep(nn.GroupNorm(1, n) if grouped else nn.LayerNorm(n))
        if kind == "scale":
            self.scales.append(nn.Parameter(torch.randn(h.shape[1:]) * 0.5 + 1))
            return kind, (at,), len(self.scales) - 1
        if kind == "average" or (kind == "depthwise" and self.family in ("flat", "sequence")):
            pools = self.family in ("line", "image") and min(h.shape[2:]) > 1
            return "average", (at,), self.family if pools else None
        if kind == "depthwise":
            conv = nn.Conv1d if self.family == "line" else nn.Conv2d
            return "weighted", (at,), self._keep(conv(n, n, 1, groups=n))
        if kind == "prelu":
            return "weighted", (at,), self._keep(nn.PReLU())
        if kind == "dropout":
            return "weighted", (at,), self._keep(nn.Dropout(0.3))
        if kind == "batch norm":
            norms = {"flat": nn.BatchNorm1d, "sequence": nn.BatchNorm1d, "line": nn.BatchNorm1d}
            return "weighted", (at,), self._keep(norms.get(self.family, nn.BatchNorm2d)(h.shape[1]))
        if kind == "detach":
            return kind, (at,), self._keep(nn.Linear(n, n))
        return kind, (at,), None

    def _run(self, step: tuple, values: list[Tensor]) -> Tensor:
        kind, sources, detail = step
        h = values[sources[0]]
        if kind == "weighted":
            return self.parts[detail](h)
        if kind == "pointwise":
            return POINTWISE[detail](h)
        if kind == "scale":
            return h * self.scales[detail]
        if kind == "average":
            return _average(detail, h)
        if len(sources) == 2:
            other = values[sources[1]]
            return {
                "sum": lambda: h + other,
                "difference": lambda: h - 0.5 * other,
                "product": lambda: h * torch.sigmoid(other),
                "maximum": lambda: torch.maximum(_pool(self.family, h), other * 0.1 + 0.01 * detail),
                "concatenation": lambda: torch.cat([h, other], -1 if self.family == "sequence" else 1),
            }[kind]()
        return self._unreadable(kind, h, detail)

    def _unreadable(self, kind: str, h: Tensor, detail: int | None) -> Tensor:
        """What no graph can express, or what only seems to be of that kind."""
        if kind == "branch":
            return h.tanh() if h.sum() > 0 else h.sigmoid()
        if kind == "slice":
            h = h + 0.0
            h[:, 0] = 0
            return h
        if kind == "detach":
            module = self.parts[detail]
            mixed = h if self.family in ("flat", "sequence") else h.movedim(1, -1)
            mixed = F.linear(mixed, module.weight.detach(), module.bias)
            return mixed if self.family in ("flat", "sequence") else mixed.movedim(-1, 1)
        if kind == "numpy":
            return h + float(h.detach().abs().max())
        if kind == "noise":
            return h + torch.randn(h.shape[1:], dtype=h.dtype)
        if kind == "two results":
            return h + torch.max(h, 1).values.sum()
        return h + h.mean(0)  # examples that see each other, as in batch norm


def _takes(module: nn.Module) -> int | None:
    """How many channels a shared layer reads; None for those that cannot be shared."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.in_channels if isinstance(module, (nn.Conv1d, nn.Conv2d)) else None


def _average(pooled: str | None, h: Tensor) -> Tensor:
    if pooled is None:
        return h - 0.7 * h.mean(1, keepdim=True)
    return F.avg_pool1d(h, 2, 1) if pooled == "line" else F.avg_pool2d(h, 2, 1)


def _pool(family: str, h: Tensor) -> Tensor:
    if family == "line":
        return F.max_pool1d(h, 3, 1, 1)
    return F.max_pool2d(h, 3, 1, 1) if family == "image" else h
