"""Recorded ATen operations, and programs of them that can be run again with other values.

An operation's arguments are templates: a `Ref` stands for a value computed before, a `Slot` for a parameter, a buffer
or a constant, which is read anew in every run. A `Program` is a list of operations as one Python function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mep.graph.closed_forms.maxima import MaxPool
from mep.graph.closed_forms.pointwise import Activation


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


class Program:
    """Operations in order, as one Python function of named inputs that returns named results.

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
        self._constants: dict[str, Any] = {}
        self._variables: dict[str, str] = {}
        for name in (*inputs, *(op.name for op in ops)):
            self._variables.setdefault(name, f"v{len(self._variables)}")
        lines = [f"    {self._variables[op.name]} = {self._call(op, owner)}" for op in ops]
        given = ", ".join(["context", *(self._variables[name] for name in inputs)])
        returned = ", ".join(self._variables[name] for name in results)
        source = "\n".join([f"def run({given}):", *lines, f"    return ({returned},)"])
        exec(compile(source, f"<program of {owner or 'a graph'}>", "exec"), self._constants)
        self._run = self._constants.pop("run")

    def __call__(self, context: Any, *inputs: Any) -> tuple[Any, ...]:
        """The results; `context` holds the branches of the step (`mep.graph.node.StepContext`), None for none."""
        found: tuple[Any, ...] = self._run(context, *inputs)
        return found

    def _call(self, op: Op, owner: str) -> str:
        args = [self._written(a) for a in op.args]
        args += [f"{key}={self._written(value)}" for key, value in op.kwargs.items()]
        target = self._constant(op.target)
        if op.whole:
            return f"{target}(context, {self._constant((owner, op.name))}, {', '.join(args)})"
        if op.piece is None:
            return f"{target}({', '.join(args)})"
        key, piece, x = self._constant((owner, op.name)), self._constant(op.piece), args[0]
        frozen = f"context.on_branch({key}, {piece}, {x})"
        return (
            f"{frozen} if context and context.freeze_branches and not {x}.is_complex() else {target}({', '.join(args)})"
        )

    def _written(self, template: Any) -> str:
        """Python source for an argument."""
        if isinstance(template, Ref):
            return self._variables[template.name]
        if isinstance(template, Slot):
            return f"{self._constant(template.home)}[{template.key!r}]"
        if isinstance(template, (tuple, list)):
            inside = "".join(f"{self._written(t)}, " for t in template)
            return f"({inside})" if isinstance(template, tuple) else f"[{inside}]"
        if isinstance(template, dict):
            return "{" + ", ".join(f"{k!r}: {self._written(v)}" for k, v in template.items()) + "}"
        if isinstance(template, slice):
            return f"slice({', '.join(map(self._written, (template.start, template.stop, template.step)))})"
        return repr(template) if template is None or type(template) in (bool, int) else self._constant(template)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor with real or complex numbers, through which forces can flow."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
