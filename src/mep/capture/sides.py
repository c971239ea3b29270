"""The two sides of a proof: what the user's model computes on a batch, and what a graph does.

The model's side is the user's own model and cost, run as they are, and autograd through them. The graph's side is the
free equilibrium, backpropagation's errors carried back by the nodes' own `vjp`, and `param_vjp`: the limit of
equilibrium propagation for beta -> 0, by the very operations that settling uses. Never autograd over the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture.cost import cost_of
from mep.cost import make_cost, mean_cost
from mep.energy import Energy, add_gradients, make_node_energy
from mep.errors import InputError, TraceError
from mep.graph.graph import Graph
from mep.graph.inputs import call_model, flattened, mapped
from mep.graph.ops import StepContext
from mep.guards import without_hooks

Gradients = Mapping[nn.Parameter, Tensor]


def loss_of(model: nn.Module, cost: Any, x: Any, target: Any) -> Tensor:
    """The mean cost of a batch by the model itself, with autograd's graph if that is on."""
    return mean_cost(cost, call_model(model, x), target)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors that `loss.backward()` would give a gradient."""
    waiting, seen, found = [loss.grad_fn], set[Any](), []
    while waiting:
        step: Any = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            found += [step.variable] if hasattr(step, "variable") else []
            waiting += [before for before, _ in step.next_functions]
    return found


def by_autograd(
    model: nn.Module, cost: Any, x: Any, target: Any, trained: Sequence[nn.Parameter]
) -> tuple[float, Gradients, list[Tensor]]:
    """Loss and gradient of a batch by the model itself, and the leaves of autograd's graph.

    The model may write to buffers, and hooks on parameters do not run.
    """
    with torch.enable_grad(), without_hooks(trained):
        loss = loss_of(model, cost, mapped(x, Tensor.clone), target)
        found: Sequence[Tensor | None] = [None] * len(trained)
        leaves = leaves_of(loss)
        try:
            if loss.requires_grad:
                found = torch.autograd.grad(loss, trained, allow_unused=True)
        except RuntimeError as error:
            raise TraceError(
                f"There is no gradient of {type(model).__name__} to compare with, for torch.autograd.grad says: "
                f"{error} Way out: checkpoint(..., use_reentrant=False) where that is it, else mend forward until "
                "torch.autograd.grad(loss, list(model.parameters())) works."
            ) from error
    gradients = {p: g.to_dense().detach() for p, g in zip(trained, found, strict=True) if g is not None}
    return float(loss.detach()), gradients, leaves


@torch.no_grad()
def by_graph(graph: Graph, cost: Any, x: Any, target: Any, energy_name: str, held: bool) -> tuple[float, Gradients]:
    """Loss and gradient of a batch by a graph, for beta -> 0: new values of buffers are written."""
    batch = len(first_tensor(x))
    context = StepContext(freeze_branches=held)
    energy = Energy(graph, make_node_energy(energy_name), graph.bind(x), context, batch)
    free = energy.free_point()
    context.recording = False
    output = energy.output(free)
    if len(output) != batch:
        raise wrong_rows(len(output), batch)
    of_batch = cost_of(graph, make_cost(cost), energy.inputs, output, target)
    errors = {name: torch.zeros_like(s) for name, s in energy.state(free).items()}
    errors |= energy.backpropagated(free, of_batch.gradient(output))
    gradients = graph.param_vjp(free, errors, 1 / batch)
    add_gradients(gradients, of_batch.parameter_gradient(output, 1 / batch))
    loss = float(of_batch.value(output).mean())
    for slot, value in context.new_buffers.items():
        slot.home[slot.key].copy_(value)
    return loss, gradients


def wrong_rows(rows: int, batch: int) -> InputError:
    """Of an output that has other rows than the examples."""
    return InputError(
        f"The output has {rows} rows for {batch} examples; dimension 0 is the batch. Way out: a cost function, which "
        "may return the mean of all rows: cost=lambda out, y: F.cross_entropy(out, y)."
    )


def first_tensor(x: Any) -> Tensor:
    """That whose rows are the examples."""
    return next(t for t in flattened(x)[0] if isinstance(t, Tensor))
