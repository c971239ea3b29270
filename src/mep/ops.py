"""One operation of a traced model, and how it is run again with other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from mep.activations import Activation, MaxPool


@dataclass(frozen=True)
class Ref:
    """Stands in an argument template for the value of that name."""

    name: str


@dataclass(eq=False)
class Op:
    """A recorded call: `kind` is "module", "function", "method" or "attribute".

    `target` is the module, the function, the method's name, or the attribute's name (of `owner`). `args` and `kwargs`
    are templates with a `Ref` for every value. `activation` or `pool` is set when the call has a closed form; then
    it is run through that, never in place. `where` is the line of the model's `forward`, for messages.
    """

    name: str
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    owner: nn.Module | SimpleNamespace | None = None
    activation: Activation | None = None
    pool: MaxPool | None = None
    where: str = ""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that this operation itself reads."""
        if self.kind == "module":
            return list(self.target.parameters())
        if self.kind == "attribute":
            value = getattr(self.owner, self.target)
            return [value] if isinstance(value, nn.Parameter) else []
        return []

    def run(self, values: Mapping[str, Any]) -> Any:
        """The result of the call, with every `Ref` replaced by its value."""
        if self.kind == "attribute":
            return getattr(self.owner, self.target)
        args = [fill(a, values) for a in self.args]
        kwargs = {k: fill(v, values) for k, v in (self.kwargs or {}).items()}
        if self.activation is not None:
            return self.activation.value(args[0])
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        if self.kind == "module" and writes_in_place(self.target):
            args = [a.clone() if isinstance(a, Tensor) else a for a in args]
        call: Callable[..., Any] = self.target
        return call(*args, **kwargs)


def writes_in_place(module: nn.Module) -> bool:
    """Whether a module kept whole may overwrite its input."""
    return any(getattr(m, "inplace", False) for m in module.modules())


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, h) for h in hooks)


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """`template` with every `Ref` replaced, inside tuples, lists, dicts and slices too."""
    if isinstance(template, Ref):
        return values[template.name]
    if isinstance(template, (tuple, list)):
        return type(template)(fill(t, values) for t in template)
    if isinstance(template, dict):
        return {k: fill(v, values) for k, v in template.items()}
    if isinstance(template, slice):
        return slice(fill(template.start, values), fill(template.stop, values), fill(template.step, values))
    return template


def references(template: Any) -> Iterator[str]:
    """The names that a template reads, in order, with repetitions."""
    if isinstance(template, Ref):
        yield template.name
    elif isinstance(template, (tuple, list)):
        for t in template:
            yield from references(t)
    elif isinstance(template, Mapping):
        for t in template.values():
            yield from references(t)
    elif isinstance(template, slice):
        yield from references((template.start, template.stop, template.step))
