"""Recorded ATen operations, and programs of them that can be run again with other values.

An operation's arguments are templates: a `Ref` stands for a value computed before, a `Slot` for a parameter, a buffer
or a constant, which is read anew in every run. A `Program` runs a list of operations. The `StepContext` holds what
stays the same within a step, so that every evaluation is of one and the same energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mep.graph.closed_forms.activations import Activation
from mep.graph.closed_forms.maxima import MaxPool
from mep.guards import Noise


@dataclass(frozen=True)
class Ref:
    """Stands in an argument template for the value of that name."""

    name: str


@dataclass(frozen=True, eq=False)
class Slot:
    """Stands for the tensor `home[key]`: a parameter, a buffer, or a constant of the model, by its full name."""

    home: dict[str, Any]
    key: str
    name: str

    @property
    def value(self) -> Any:
        """The tensor that is there now."""
        return self.home[self.key]


@dataclass(eq=False)
class Op:
    """A recorded call of `target`.

    `activation` or `pool` is set where it has a closed form with branches. A `whole` target is a module or an autograd
    function that was kept as it is; it is also given the step's context. `module` is the path of the module that made
    the call, `where` the line of the model's source.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    activation: Activation | None = None
    pool: MaxPool | None = None
    whole: bool = False
    module: str = ""
    where: str = ""

    @property
    def label(self) -> str:
        """The operation's name as torch writes it."""
        packet = getattr(self.target, "_overloadpacket", self.target)
        return str(getattr(packet, "__name__", type(packet).__name__))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that this operation itself reads."""
        return [s.value for s in leaves_of((self.args, self.kwargs), Slot) if isinstance(s.value, nn.Parameter)]

    @property
    def piece(self) -> Activation | MaxPool | None:
        """The closed form, where it has branches that can be held."""
        return self.pool or (self.activation if self.activation and self.activation.piecewise else None)


def leaves_of(template: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    """The leaves of some types in nested tuples, lists, dicts and slices, in order."""
    if isinstance(template, kind):
        yield template
    elif isinstance(template, (tuple, list)):
        for t in template:
            yield from leaves_of(t, kind)
    elif isinstance(template, Mapping):
        for t in template.values():
            yield from leaves_of(t, kind)
    elif isinstance(template, slice):
        yield from leaves_of((template.start, template.stop, template.step), kind)


@dataclass
class StepContext:
    """Filled by the first evaluation of a step (`recording`), and read by all later ones.

    Attributes:
        freeze_branches: whether piecewise-linear operations stay on the branch of the free equilibrium; else kinks stay
            kinks.
        branches: by node and operation, where each of them stood. A branch that is not known yet is that of the first
            evaluation to read it.
        noise: the states of the random number generators before each stochastic node.
        clamped: the predictions of nodes that depend on the input alone.
        new_buffers: what the model writes to its buffers.
        branch_changes: None, or a list to which every frozen operation appends how many of its units are off their
            branch, and of how many.
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
        else:
            y = piece.linearized(x, self.branches.setdefault(key, x.detach()))
        if self.branch_changes is not None:
            branch = self.branches[key]
            self.branch_changes.append((piece.left_branch(x.detach(), branch).sum(), branch.numel()))
        return y


class Program:
    """Operations in order, as a function of named inputs that returns named results.

    Args:
        ops: each reads inputs, slots, and results of operations before it.
        inputs: the names of the values that are given.
        results: the names of the values that are returned.
        owner: the node's name, which together with the operation's is the key of its branch in the step's context.

    Example:
        >>> import torch
        >>> double = Op("twice", torch.add, (Ref("x"), Ref("x")))
        >>> Program([double], ["x"], ["twice"])(None, torch.ones(1))
        (tensor([2.]),)
    """

    def __init__(self, ops: Sequence[Op], inputs: Sequence[str], results: Sequence[str], owner: str = ""):
        self.ops, self.inputs, self.results, self.owner = tuple(ops), tuple(inputs), tuple(results), owner
        self._calls = [_Call(op, (owner, op.name)) for op in ops]

    def __call__(self, context: StepContext | None, *inputs: Any) -> tuple[Any, ...]:
        """The results; without a context no branch is held."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        for call in self._calls:
            # The arguments: as they were recorded, with the values of this run in their places.
            args = call.args.copy()
            for place, name in call.refs:
                args[place] = values[name]
            for place, slot in call.slots:
                args[place] = slot.home[slot.key]
            for place, template in call.nested:
                args[place] = _filled(template, values)
            kwargs = {key: _filled(template, values) for key, template in call.kwargs.items()}
            if call.piece is not None and context is not None and context.freeze_branches and not args[0].is_complex():
                result = context.on_branch(call.key, call.piece, args[0])
            elif call.whole:
                result = call.target(context, call.key, *args, **kwargs)
            else:
                result = call.target(*args, **kwargs)
            values[call.name] = result
        return tuple([values[name] for name in self.results])


class _Call:
    """An operation, with the places of its arguments that change from run to run."""

    def __init__(self, op: Op, key: tuple[str, str]):
        self.name, self.target, self.key, self.piece, self.whole = op.name, op.target, key, op.piece, op.whole
        self.args, self.kwargs = list(op.args), op.kwargs
        self.refs = [(i, a.name) for i, a in enumerate(op.args) if isinstance(a, Ref)]
        self.slots = [(i, a) for i, a in enumerate(op.args) if isinstance(a, Slot)]
        self.nested = [(i, a) for i, a in enumerate(op.args) if isinstance(a, (tuple, list, dict, slice))]


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    """An argument with the values that stand for its references and slots."""
    if isinstance(template, Ref):
        return values[template.name]
    if isinstance(template, Slot):
        return template.value
    if isinstance(template, (tuple, list)):
        return type(template)([_filled(t, values) for t in template])
    if isinstance(template, dict):
        return {key: _filled(t, values) for key, t in template.items()}
    if isinstance(template, slice):
        return slice(*(_filled(t, values) for t in (template.start, template.stop, template.step)))
    return template


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor with real or complex numbers, through which forces can flow."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
