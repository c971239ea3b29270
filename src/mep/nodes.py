"""The parts of a graph: what a node predicts from its parents, and how a force on it pulls on them.

    predict(parents, held) -> mu, saved      mu = f(parents)
    pull(saved, force)     -> one force a parent: J^T force, J = dmu/dparent   (None where nothing flows)
    contract(saved, force, weight) -> one gradient a parameter: weight * (dmu/dtheta)^T force
    push(saved, tangents)  -> sum over the parents of J tangent, where J is constant

`Local` does this for any operations through an autograd graph of its own, which lives as long as `saved`;
`mep.chain.Chain` does it in closed form. There is never a graph through more than one node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mep.activations import Activation, MaxPool, kink_of_call
from mep.layout import as_laid_out, per_example
from mep.ops import Op, has_hooks
from mep.snapshot import Buffers, Noise, generators, set_generators

Beta = float | Tensor
"""A nudging strength: a number, a tensor without dimensions where a step is compiled for any, or one each: [batch]."""

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose parameter gradient is a sum of outer products of their input and the error of their output."""


@dataclass
class Held:
    """What stays the same within a step, so that every evaluation sees one and the same energy.

    `branches`: where each piecewise-linear operation stood at the free equilibrium; `noise`: the state of the random
    number generators before each stochastic node; `clamped`: the predictions of nodes that see only the input.
    The first evaluation (`recording`) fills it. With `hold_branches=False` kinks stay kinks; a branch not yet known is
    that of the evaluation in which it is first asked for. While `departures` is a
    list, every held operation appends how many of its units are off their branch, and how many it has.
    """

    hold_branches: bool = True
    recording: bool = True
    departures: list[tuple[Tensor, int]] | None = None
    branches: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    noise: dict[str, Noise] = field(default_factory=dict)
    clamped: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    buffers: Buffers | None = None

    def on_branch(self, key: tuple[str, str], piece: Activation | MaxPool, x: Tensor) -> Tensor:
        """The operation on the branch of that key, which is that of `x` if it is not known yet."""
        if key not in self.branches and isinstance(piece, MaxPool):
            y, self.branches[key] = piece.value_and_branch(x)
            self.count(piece, x, self.branches[key])
            return y
        x0 = self.branches.setdefault(key, x.detach())
        self.count(piece, x, x0)
        return piece.held(x, x0)

    def count(self, piece: Activation | MaxPool, x: Tensor, branch: Tensor) -> None:
        """Note how many units of `x` are off the branch on which they are held."""
        if self.departures is not None:
            self.departures.append((piece.left_branch(x.detach(), branch).sum(), branch.numel()))


@dataclass(eq=False)
class Node:
    """One prediction of the model, or a junction: a parameter-free value that several nodes read.

    `parents` names the values it reads; `flows[i]` says whether a force may reach parent i (an input is clamped).
    `box` bounds the state of a Hopfield node. A junction owns no state: forces pass through it.
    """

    name: str
    parents: tuple[str, ...]
    flows: tuple[bool, ...]
    owns_state: bool
    program: tuple[Op, ...]
    parameters: tuple[nn.Parameter, ...]
    box: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        self.clamped = not any(self.flows)
        """Whether it sees only the input, so that its prediction never changes while settling."""
        self.runs_foreign_code = any(op.kind == "module" and _is_foreign(op.target) for op in self.program)
        """Whether it keeps a module whole that is not torch's own."""

    @property
    def is_affine_when_held(self) -> bool:
        """Whether J is constant while the branches are held, as far as is known."""
        return False

    @property
    def weighted(self) -> nn.Module | None:
        """The linear layer or convolution that the program ends in, if it does; see `weighted_input`."""
        last = self.program[-1]
        plain = last.kind == "module" and type(last.target) in WEIGHTED and not has_hooks(last.target)
        return last.target if plain else None

    def weighted_input(self, saved: Any) -> Tensor:
        """What `weighted` was applied to."""
        raise NotImplementedError

    def evaluate(self, parents: Sequence[Any], held: Held) -> tuple[Tensor, Any]:
        """`predict`, once a step where the parents are clamped."""
        if not self.clamped:
            return self.predict(parents, held)
        if self.name not in held.clamped:
            held.clamped[self.name] = self.predict(parents, held)
        return held.clamped[self.name]

    def predict(self, parents: Sequence[Any], held: Held) -> tuple[Tensor, Any]:
        """mu and whatever `pull` and `contract` need."""
        raise NotImplementedError

    def pull(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        """J^T force for every parent."""
        raise NotImplementedError

    def contract(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """weight * (dmu/dtheta)^T force for every parameter, in the order of `parameters`; never an alias."""
        raise NotImplementedError

    def push(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """`sum J t` over the parents' tangents t (None: at rest), and the tangent of `weighted_input`.

        Only where `is_affine_when_held`, as `moved` and `rows`.
        """
        raise NotImplementedError

    def moved(self, saved: Any, arriving: Tensor, beta: Beta) -> Any:
        """`saved` after `weighted_input` has moved by `-beta * arriving`."""
        raise NotImplementedError

    def rows(self, saved: Any, index: Tensor) -> Any:
        """`saved` of some of the examples."""
        raise NotImplementedError

    can_replace_rows = False
    """Whether `saved` consists of tensors whose rows are the examples, see `mep.layout.replace_rows_`."""


class Local(Node):
    """Any operations, through a small autograd graph local to the node.

    A clamped node's graph is kept over the sweeps of a step, hence `retain_graph`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.takes_any_layout = all(
            op.kind == "module" and type(op.target) is nn.BatchNorm2d and not has_hooks(op.target)
            for op in self.program
        )
        """Whether it is as fast, and the same, with channels last: else it gets what `view` needs."""

    def predict(self, parents: Sequence[Any], held: Held) -> tuple[Tensor, Any]:
        """Run the recorded operations on detached parents."""
        with torch.enable_grad():
            inputs = [
                self._laid_out(p).detach().requires_grad_()
                if flows and (p.is_floating_point() or p.is_complex())
                else p
                for p, flows in zip(parents, self.flows, strict=True)
            ]
            values = dict(zip(self.parents, inputs, strict=True))
            with _same_noise(self, held):
                for op in self.program:
                    with HeldInside(self.name, op, held) if _is_opaque(op) and held.hold_branches else nullcontext():
                        values[op.name] = self._run(op, values, held)
            last = self.program[-1]
            h = values[last.args[0].name].detach() if self.weighted else None
            mu = values[last.name]
        return mu.detach(), (inputs, mu, h)

    def _laid_out(self, p: Tensor) -> Tensor:
        return p if self.takes_any_layout else p.contiguous()

    def weighted_input(self, saved: Any) -> Tensor:
        """Kept by the autograd graph anyway."""
        return saved[2]

    def _run(self, op: Op, values: dict[str, Any], held: Held) -> Any:
        piece = op.pool or (op.activation if op.activation and op.activation.piecewise else None)
        if piece is None or not held.hold_branches:
            return op.run(values)
        x = values[op.args[0].name]
        return op.run(values) if x.is_complex() else held.on_branch((self.name, op.name), piece, x)

    def pull(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        """One backward pass through this node."""
        inputs, mu, _ = saved
        wanted = [i for i, p in enumerate(inputs) if isinstance(p, Tensor) and p.requires_grad and self.flows[i]]
        found = _grad(mu, [inputs[i] for i in wanted], as_laid_out(force, mu))
        pulls: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(wanted, found, strict=True):
            pulls[i] = g
        return pulls

    def contract(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """One backward pass to this node's parameters."""
        _, mu, _ = saved
        wanted = [p for p in self.parameters if p.requires_grad]
        found = dict(zip(wanted, _grad(mu, wanted, as_laid_out(force, mu)), strict=True))
        return [None if (g := found.get(p)) is None else g * weight for p in self.parameters]


class HeldInside(TorchFunctionMode):
    """Holds the kinks inside a module that is kept whole: its calls of ReLU, max pooling... in their order."""

    def __init__(self, node: str, op: Op, held: Held):
        super().__init__()
        self.node, self.op, self.held, self.calls = node, op, held, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = name if getattr(Tensor, name, None) is func else func
        piece = kink_of_call(target, args, kwargs) if args and isinstance(args[0], Tensor) else None
        if piece is None:
            return func(*args, **kwargs)
        self.calls += 1
        return self.held.on_branch((self.node, f"{self.op.name}/{self.calls}"), piece, args[0])


def _is_foreign(module: nn.Module) -> bool:
    return any(not type(m).__module__.startswith("torch.") for m in module.modules())


def _is_opaque(op: Op) -> bool:
    """Whether a module is kept whole that is more than one operation."""
    return op.kind == "module" and any(True for _ in op.target.children())


def _grad(output: Tensor, inputs: Sequence[Tensor], force: Tensor) -> Sequence[Tensor | None]:
    if not inputs or not output.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(output, inputs, force, retain_graph=True, allow_unused=True)


def displaced(mu: Tensor, error: Tensor, beta: Beta) -> Tensor:
    """`mu - beta error`."""
    strength = spread(beta, error)
    if isinstance(strength, Tensor):
        return torch.addcmul(mu, error, strength, value=-1)
    return torch.add(mu, error, alpha=-strength)


def spread(beta: Beta, like: Tensor) -> Beta:
    """A strength ready to be multiplied with a state."""
    if not isinstance(beta, Tensor):
        return beta
    return (per_example(beta, like) if beta.ndim else beta).to(like.dtype)


def of_rows(beta: Beta, rows: Tensor) -> Beta:
    """The strength of some of the examples."""
    return beta.index_select(0, rows) if isinstance(beta, Tensor) and beta.ndim else beta


class _same_noise:
    """Gives a stochastic node the same random numbers in every evaluation of a step.

    A node counts as stochastic when its first evaluation moved a generator. Later evaluations start from where that
    one started, and leave the generators as they found them: a step draws its noise once, as backprop does.
    """

    def __init__(self, node: Node, held: Held):
        self.node, self.held = node, held

    def __enter__(self) -> None:
        if self.held.recording or self.node.name in self.held.noise:
            self.before = generators(self.node.runs_foreign_code)
        if not self.held.recording and self.node.name in self.held.noise:
            set_generators(self.held.noise[self.node.name])

    def __exit__(self, *exception: object) -> None:
        if self.held.recording:
            if self.before.differs(generators(self.node.runs_foreign_code)):
                self.held.noise[self.node.name] = self.before
        elif self.node.name in self.held.noise:
            set_generators(self.before)
