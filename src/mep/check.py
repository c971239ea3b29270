"""A proof, on a batch, that a graph is its model: same output, and every parameter reached by the nodes that use it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mep.errors import TraceError
from mep.graph import Graph
from mep.nodes import Node
from mep.snapshot import Buffers, generators_kept


def check_graph(graph: Graph, x: Any, against_model: bool = True) -> None:
    """Evaluate graph and model side by side.

    1. Every state is a tensor whose rows are the examples.
    2. The parameters that autograd finds behind each node's prediction are exactly those the graph lists for it.
    3. The parameters that autograd finds behind the model's output are those of all nodes together.
    4. The outputs are equal.

    The model, its buffers and the random number generators are left as they were. With `against_model=False` (a
    Hopfield network is not the model's forward pass) only 1 and 2 are checked.

    Raises:
        TraceError: naming the node or the parameter.
    """
    inputs = graph.bind(x)
    batch = len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    buffers = Buffers(graph.model)
    try:
        with generators_kept():
            expected, reached = _model(graph, inputs) if against_model else (None, None)
        buffers.rewind()
        with generators_kept():
            output = _nodes(graph, inputs, batch)
        buffers.rewind()
        with generators_kept():  # a dimension that is as long as the batch only now is not the batch
            _larger(graph, inputs, batch)
    finally:
        buffers.undo()
        graph.snapshot.allow_notes()
    if expected is None or reached is None:
        return
    _compare_parameters(graph, reached)
    scale = float(expected.nan_to_num(0, 0, 0).abs().max()) + 1  # what is not finite is told later, with its cause
    close = output.shape == expected.shape and torch.allclose(output, expected, atol=scale * 1e-4, equal_nan=True)
    if not close:
        raise TraceError(
            f"The graph of {type(graph.model).__name__} does not compute what its forward does: that has effects "
            "that tracing cannot see (an in-place write to an alias, a value read outside torch). Way out: keep the "
            "module that does so whole with leaves=(ThatModule,)."
        )


def _model(graph: Graph, inputs: dict[str, Any]) -> tuple[Tensor, set[nn.Parameter]]:
    with torch.enable_grad():
        names = inspect.signature(graph.model.forward).parameters
        by_name = {n: inputs[n] for n in graph.inputs if n in names}
        rest = [inputs[n] for n in graph.inputs if n not in names]
        output = graph.model(*rest, **by_name)
    if not isinstance(output, Tensor):
        raise TraceError(
            f"{type(graph.model).__name__} returns {type(output).__name__}; the output must be one tensor. Way out: "
            "wrap the model in a module that returns that tensor."
        )
    return output.detach(), _behind(output)


def _nodes(graph: Graph, inputs: dict[str, Any], batch: int) -> Tensor:
    values = dict(inputs)
    for node in graph.nodes:
        parents = [v.detach() if isinstance(v, Tensor) else v for v in (values[p] for p in node.parents)]
        mu = _run(node, parents)
        if node.owns_state and isinstance(mu, Tensor) and not mu.is_floating_point():
            raise TraceError(
                f"Node `{node.name}` predicts {mu.dtype}; a state must be real floating-point. Way out: "
                "torch.view_as_real for complex numbers, and no argmax or rounding in the model that is trained."
            )
        if not isinstance(mu, Tensor) or (node.owns_state and (mu.ndim == 0 or len(mu) % batch)):
            shape = tuple(mu.shape) if isinstance(mu, Tensor) else type(mu).__name__
            raise TraceError(
                f"Node `{node.name}` predicts {shape} for {batch} examples; it must be a tensor, and that of a state "
                "must have the batch as its first dimension. Way out: put the batch first, or keep the module around "
                "it whole with leaves."
            )
        wrong = _behind(mu) ^ {p for p in node.parameters if p.requires_grad}
        if wrong:
            raise TraceError(
                f"Node `{node.name}` and the graph disagree about {_named(graph, wrong)}: a parameter is used outside "
                "what the graph sees, or listed and not used (detached, or switched off). Way out: use it through its "
                "own module, freeze it with requires_grad_(False), or keep the module whole with leaves."
            )
        values[node.name] = mu
    return values[graph.output].detach()


def _larger(graph: Graph, inputs: dict[str, Any], batch: int) -> None:
    """Evaluate with one example more. An input as long as the batch by chance (a mask) may have to stay as it is."""
    many = [name for name, v in inputs.items() if isinstance(v, Tensor) and v.ndim and len(v) == batch]
    for longer in [many] if len(many) == 1 else [many, many[:1]]:
        try:
            _nodes(graph, inputs | {n: torch.cat([inputs[n], inputs[n][:1]]) for n in longer}, batch + 1)
            return
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, TraceError):
                raise
            failed = error
    raise TraceError(
        f"{type(graph.model).__name__} was traced with {batch} examples and fails with {batch + 1}: {failed}. Way out: "
        "take the size of the batch from the input, as in x.view(x.size(0), -1), or x.flatten(1)."
    ) from failed


def _run(node: Node, parents: list[Any]) -> Any:
    values = dict(zip(node.parents, parents, strict=True))
    with torch.enable_grad():
        for op in node.program:
            values[op.name] = op.run(values)
    return values[node.program[-1].name]


def _behind(output: Any) -> set[nn.Parameter]:
    """The leaves of an autograd graph."""
    found: set[nn.Parameter] = set()
    seen: set[Any] = set()
    stack = [output.grad_fn] if isinstance(output, Tensor) else []
    if isinstance(output, nn.Parameter):
        found.add(output)
    while stack:
        fn = stack.pop()
        if fn is None or fn in seen:
            continue
        seen.add(fn)
        if hasattr(fn, "variable"):
            found.add(fn.variable)
        stack.extend(f for f, _ in fn.next_functions)
    return found


def _compare_parameters(graph: Graph, reached: set[nn.Parameter]) -> None:
    wrong = reached ^ {p for p in graph.parameters if p.requires_grad}
    if wrong:
        raise TraceError(
            f"{_named(graph, wrong)}: the model's output and the graph disagree on whether it is used. Way out: use it "
            "through its own module, or keep the module that uses it whole with leaves=(ThatModule,)."
        )


def _named(graph: Graph, parameters: set[nn.Parameter]) -> str:
    names = {p: n for n, p in graph.model.named_parameters()}
    return "parameter " + ", ".join(sorted(f"`{names.get(p, tuple(p.shape))}`" for p in parameters))
