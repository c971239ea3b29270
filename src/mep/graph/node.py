"""The parts of a graph: what a node predicts from its parents, and how a force on it pulls on them.

    predict(parents, held) -> mu, saved      mu = f(parents)
    pull(saved, force)     -> one force a parent: J^T force, J = dmu/dparent   (None where nothing flows)
    contract(saved, force, weight) -> one gradient a parameter: weight * (dmu/dtheta)^T force
    push(saved, tangents)  -> sum over the parents of J tangent, where J is constant

`AutogradNode` does this for any operations through an autograd graph of its own, which lives as long as `saved`;
`mep.graph.chain.Chain` does it in closed form. There is never a graph through more than one node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mep.graph.closed_forms import Activation, MaxPool
from mep.graph.ops import Op, Program, Slot, is_tensor
from mep.hooks import without_hooks
from mep.layout import as_laid_out, per_example
from mep.noise import Noise, generators, set_generators

if TYPE_CHECKING:
    from mep.graph.closed_forms.weighted import WeightedOp

Beta = float | Tensor
"""A nudging strength: a number, a tensor without dimensions where a step is compiled for any, or one each: [batch]."""


@dataclass
class StepContext:
    """What stays the same within a step, so that every evaluation sees one and the same energy.

    `branches`: where each piecewise-linear operation stood at the free equilibrium; `noise`: the state of the random
    number generators before each stochastic node; `clamped`: the predictions of nodes that see only the input;
    `new_buffers`: what the model writes to its buffers. The first evaluation (`recording`) fills it. With
    `freeze_branches=False` kinks stay kinks; a branch not yet known is that of the first evaluation to read it. While
    `branch_changes` is a list, every frozen operation appends how many of its units left their branch, and of how many.
    """

    freeze_branches: bool = True
    recording: bool = True
    branch_changes: list[tuple[Tensor, int]] | None = None
    branches: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    noise: dict[str, Noise] = field(default_factory=dict)
    clamped: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    new_buffers: dict[Slot, Tensor] = field(default_factory=dict)

    def on_branch(self, key: tuple[str, str], piece: Activation | MaxPool, x: Tensor) -> Tensor:
        """The operation on the branch of that key, which is that of `x` if it is not known yet."""
        if key not in self.branches and isinstance(piece, MaxPool):
            y, self.branches[key] = piece.value_and_branch(x)
            self.count(piece, x, self.branches[key])
            return y
        x0 = self.branches.setdefault(key, x.detach())
        self.count(piece, x, x0)
        return piece.linearized(x, x0)

    def count(self, piece: Activation | MaxPool, x: Tensor, branch: Tensor) -> None:
        """Note how many units of `x` are off the branch on which they are held."""
        if self.branch_changes is not None:
            self.branch_changes.append((piece.left_branch(x.detach(), branch).sum(), branch.numel()))


@dataclass(eq=False, repr=False)
class Node:
    """One prediction of the model, or a junction: a parameter-free value that several nodes read.

    `program` are the operations from the `parents` to the prediction, which is the value of `op`. `flows[i]` says
    whether a force may reach parent i (an input is clamped). `writes` are buffers of the model with the values, of this
    program, that they are to have. `box` bounds the state of a Hopfield node. `weighted` is the linear layer or
    convolution that the program ends in, if it does. A junction owns no state: forces pass through it.
    """

    name: str
    parents: tuple[str, ...]
    flows: tuple[bool, ...]
    owns_state: bool
    program: tuple[Op, ...]
    parameters: tuple[nn.Parameter, ...]
    op: str = ""
    writes: tuple[tuple[Slot, str], ...] = ()
    box: tuple[float, float] = (-math.inf, math.inf)
    weighted: WeightedOp | None = None
    shape: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.op = self.op or self.program[-1].name
        self.clamped = not any(self.flows)
        """Whether it sees only the input, so that its prediction never changes while settling."""
        self.runs_foreign_code = any(op.whole for op in self.program)
        """Whether it keeps a module or function whole."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, reading {', '.join(self.parents)}>"

    @property
    def where(self) -> str:
        """Its name and the line of the model's source."""
        return f"node `{self.name}`" + (f" ({self.program[-1].where})" if self.program[-1].where else "")

    @property
    def is_affine_when_held(self) -> bool:
        """Whether J is constant while the branches are held, as far as is known."""
        return False

    def weighted_input(self, saved: Any) -> Tensor:
        """What `weighted` was applied to."""
        raise NotImplementedError

    def evaluate(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        """`predict`, once a step where the parents are clamped."""
        if not self.clamped:
            return self.predict(parents, context)
        if self.name not in context.clamped:
            context.clamped[self.name] = self.predict(parents, context)
        return context.clamped[self.name]

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        """mu and whatever `vjp` and `param_vjp` need."""
        raise NotImplementedError

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        """J^T force for every parent."""
        raise NotImplementedError

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """weight * (dmu/dtheta)^T force for every parameter, in the order of `parameters`; never an alias."""
        raise NotImplementedError

    def jvp(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
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


class AutogradNode(Node):
    """Any operations, through a small autograd graph local to the node.

    A clamped node's graph is kept over the sweeps of a step, hence `retain_graph`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = self.weighted.reads if self.weighted else self.op
        self._run = Program(self.program, self.parents, [self.op, reads], self.name)
        self._run_and_write = Program(
            self.program, self.parents, [self.op, reads, *(value for _, value in self.writes)], self.name
        )

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        """Run the recorded operations on detached parents."""
        run = self._run_and_write if context.recording and self.writes else self._run
        with torch.enable_grad():
            inputs = [
                p.detach().requires_grad_() if flows and is_tensor(p) else p
                for p, flows in zip(parents, self.flows, strict=True)
            ]
            with _same_noise(self, context):
                mu, h, *new = run(context, *inputs)
        context.new_buffers.update((slot, value.detach()) for (slot, _), value in zip(self.writes, new, strict=False))
        return mu.detach(), (inputs, mu, h.detach() if self.weighted else None)

    def weighted_input(self, saved: Any) -> Tensor:
        """Kept by the autograd graph anyway."""
        return saved[2]

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        """One backward pass through this node."""
        inputs, mu, _ = saved
        wanted = [i for i, p in enumerate(inputs) if isinstance(p, Tensor) and p.requires_grad and self.flows[i]]
        found = _grad(mu, [inputs[i] for i in wanted], as_laid_out(force, mu))
        incoming_forces: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(wanted, found, strict=True):
            incoming_forces[i] = g
        return incoming_forces

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """One backward pass to this node's parameters."""
        _, mu, _ = saved
        wanted = [p for p in self.parameters if p.requires_grad]
        with without_hooks(wanted):
            found = dict(zip(wanted, _grad(mu, wanted, as_laid_out(force, mu)), strict=True))
        return [None if (g := found.get(p)) is None else g.to_dense() * weight for p in self.parameters]


def _grad(output: Tensor, inputs: Sequence[Tensor], force: Tensor) -> Sequence[Tensor | None]:
    if not inputs or not output.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(output, inputs, force, retain_graph=True, allow_unused=True)


def state_from_error(mu: Tensor, error: Tensor, beta: Beta) -> Tensor:
    """`mu - beta error`."""
    strength = expand_beta(beta, error)
    if isinstance(strength, Tensor):
        return torch.addcmul(mu, error, strength, value=-1)
    return torch.add(mu, error, alpha=-strength)


def expand_beta(beta: Beta, like: Tensor) -> Beta:
    """A strength ready to be multiplied with a state."""
    if not isinstance(beta, Tensor):
        return beta
    return (per_example(beta, like) if beta.ndim else beta).to(like.dtype)


def select_beta(beta: Beta, rows: Tensor) -> Beta:
    """The strength of some of the examples."""
    return beta.index_select(0, rows) if isinstance(beta, Tensor) and beta.ndim else beta


class _same_noise:
    """Gives a stochastic node the same random numbers in every evaluation of a step.

    A node counts as stochastic when its first evaluation moved a generator. Later evaluations start from where that
    one started, and leave the generators as they found them: a step draws its noise once, as backprop does.
    """

    def __init__(self, node: Node, context: StepContext):
        self.node, self.context = node, context

    def __enter__(self) -> None:
        if self.context.recording or self.node.name in self.context.noise:
            self.before = generators(self.node.runs_foreign_code)
        if not self.context.recording and self.node.name in self.context.noise:
            set_generators(self.context.noise[self.node.name])

    def __exit__(self, *exception: object) -> None:
        if self.context.recording:
            if self.before.differs(generators(self.node.runs_foreign_code)):
                self.context.noise[self.node.name] = self.before
        elif self.node.name in self.context.noise:
            set_generators(self.before)
