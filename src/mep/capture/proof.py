"""The proof, on a batch, that a graph is its model: the same loss, the same new buffers, the same gradient.

What the model computes and what the graph does is in `sides.py`. Here the two are compared, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves, capture
from mep.capture.sides import Gradients, by_autograd, by_graph, first_tensor, leaves_of, loss_of
from mep.capture.state import copied_together, trained_parameters, untouched
from mep.capture.surroundings import Snapshot
from mep.cost import recorded_function
from mep.errors import MepError, TraceError, warn
from mep.graph.graph import Graph, lengths_of
from mep.graph.inputs import flattened, mapped, warn_of_inputs
from mep.guards import generators, same, set_generators


@dataclass(frozen=True)
class Bounds:
    """How far two gradients of one parameter may differ: `relative` to its norm, plus `absolute` of all together."""

    relative: float
    absolute: float
    loose: float
    """What passes where no more accurate comparison is possible."""


BOUNDS = {
    torch.float64: Bounds(1e-7, 1e-11, 1e-7),
    torch.float32: Bounds(1e-3, 1e-5, 2e-2),
    torch.bfloat16: Bounds(5e-2, 5e-2, 0.3),
    torch.float16: Bounds(1e-2, 1e-2, 0.3),
}
"""By the least accurate dtype of the parameters, or of autocast. What exceeds them is compared again in float64."""


@dataclass(frozen=True, eq=False)
class Proof:
    """What is compared: a graph, and the model and cost that it is to be."""

    model: nn.Module
    graph: Graph
    cost: Any
    energy: str
    branches: str
    leaves: Leaves
    snapshot: Snapshot | None = None
    is_known: bool = False
    """Whether the graph was proven before."""


@dataclass(frozen=True)
class Side:
    """What one of the two computes on a batch."""

    loss: float
    gradients: Gradients
    buffers: Sequence[Tensor]


def prove(proof: Proof, x: Any, target: Any, rows: int | None = None) -> bool:
    """Compare the two sides; False where the loss is not finite, so that nothing can be compared.

    Args:
        proof: what is compared.
        x: the input of a batch.
        target: its target.
        rows: compare on so many of the first examples only, where sizes of the batch are free.

    Raises:
        TraceError: they differ; the message names the parameter, the node and the source line.
    """
    batch = first_tensor(x).shape[0]
    if rows is not None and rows < batch and _takes(proof.graph, x, target, rows):
        x, target = (mapped(v, lambda t: t[:rows] if t.ndim and len(t) == batch else t) for v in (x, target))
    wanted, found = _sides(proof, x, target)
    if not math.isfinite(wanted.loss):
        return False
    bounds = _bounds(proof.model, x)
    difference = _difference(proof, wanted, found, bounds.relative, bounds.absolute)
    # Near a kink, or in low precision, rounding alone may explain it: in float64 it does not.
    if difference is not None and bounds.relative > BOUNDS[torch.float64].relative:
        difference = _in_double(proof, x, target)
        if difference is _IMPOSSIBLE:
            difference = _difference(proof, wanted, found, bounds.loose, bounds.loose)
    if difference is not None:
        raise TraceError(difference)
    return True


def _takes(graph: Graph, x: Any, target: Any, rows: int) -> bool:
    """Whether a graph is for so many examples of a batch as well."""
    free = graph.sizes[0][0] if graph.sizes and graph.sizes[0] else None
    if not isinstance(free, tuple) or rows < free[1]:
        return False
    return graph.allows(lengths_of(graph.sizes, x, target) | {free[0]: rows})


def _sides(proof: Proof, x: Any, target: Any) -> tuple[Side, Side]:
    """The model run twice, and the graph once: same batch, same buffers, same random numbers; nothing is changed."""
    name, snapshot = type(proof.model).__name__, proof.snapshot
    way_out = "no graph can hold it. Way out: keep it in a buffer (register_buffer), or give it to forward as an input."
    kept = [(p, p._version, p.detach().clone()) for p in proof.graph.kept]
    trained = dict.fromkeys(trained_parameters(proof.model, proof.cost))
    trained |= dict.fromkeys(p for p in proof.graph.parameters if p.requires_grad)
    with untouched(proof.model, *([proof.cost] if callable(proof.cost) else [])) as buffers:
        noise = generators(everyones=True)
        loss, gradients, leaves = by_autograd(proof.model, proof.cost, x, target, list(trained))
        wanted = Side(loss, gradients, buffers.values())
        written = [(p, old) for p, version, old in kept if p._version != version or not torch.equal(p, old)]
        if written:
            with torch.no_grad():
                for p, old in written:
                    p.copy_(old)
            raise TraceError(
                f"{name} writes to its parameter `{_named(proof, written[0][0])}` in forward, inside a module kept "
                "whole, in every evaluation. Way out: write after the step, or make it a buffer."
            )
        drawn, first = generators(everyones=True), snapshot.now() if snapshot else []

        # A second run must do what the first one did; what a model notes down once and for all may stay.
        buffers.undo()
        set_generators(noise)
        with torch.enable_grad():  # forward may hook what it computes
            loss_again = loss_of(proof.model, proof.cost, mapped(x, Tensor.clone), target)
        if not proof.is_known and not warn_of_inputs(name, x):
            _warn_of(name, leaves, leaves_of(loss_again), [*trained, *flattened(x)[0], *flattened(target)[0]])
        again = float(loss_again.detach())
        moved = snapshot.moved(first, snapshot.now()) if snapshot else None
        if moved is not None:
            raise TraceError(f"{moved} of {name} changes whenever forward runs: {way_out}")
        if math.isfinite(again) and not abs(again - wanted.loss) <= 1e-5 * (1 + abs(again)):
            raise TraceError(
                f"{name} computes something else when it is run a second time on the same batch with the same random "
                f"numbers (loss {wanted.loss:.6g}, then {again:.6g}): it keeps state that is no buffer, and {way_out}"
            )

        once = buffers.values()
        if not all(map(same, wanted.buffers, once)):
            # The backward pass has written, too. Where that was forward run again (torch.utils.checkpoint), it wrote
            # what a second forward pass writes. A step writes once.
            set_generators(noise)
            loss_of(proof.model, proof.cost, mapped(x, Tensor.clone), target)
            triples = zip(wanted.buffers, once, buffers.values(), strict=True)
            wanted = replace(wanted, buffers=[first if same(b, second) else b for b, first, second in triples])

        buffers.undo()
        set_generators(noise)
        held = proof.branches == "held" and proof.energy == "prediction"
        found = Side(*by_graph(proof.graph, proof.cost, x, target, proof.energy, held), buffers.values())
        if drawn.differs(generators(everyones=True)):
            raise TraceError(
                f"{name} draws random numbers that its graph does not: from Python's or NumPy's generator, or in code "
                "that was not recorded. Way out: torch.rand_like(x), nn.Dropout, or keep the module that draws them "
                "whole, leaves=(ThatModule,)."
            )
    return wanted, found


def _warn_of(name: str, first: Sequence[Tensor], second: Sequence[Tensor], given: Sequence[Any]) -> None:
    """Warn of tensors that two runs of a model have read and would train, other than those given."""
    known, both = {id(t) for t in given}, {id(t) for t in second}
    lost = [tuple(t.shape) for t in first if id(t) in both and id(t) not in known]
    if lost:
        warn(
            f"{name} or its cost reads {len(lost)} tensors that require a gradient and are not among their parameters, "
            f"of shapes {lost[:3]}. They get none here. Way out: register them (nn.Parameter, nn.ModuleList, a cost "
            "that is a module), or requires_grad_(False) where they are not to be trained.",
            UserWarning,
        )


def _difference(proof: Proof, wanted: Side, found: Side, relative: float, absolute: float) -> str | None:
    """What differs, or None."""
    name = type(proof.model).__name__
    is_not, way_out = f"The graph of {name} is not {name}:", "whole, leaves=(ThatModule,)."

    def double(gradients: Gradients, p: nn.Parameter) -> Tensor:
        g = gradients.get(p, torch.zeros_like(p)).detach()
        return (torch.view_as_real(g) if g.is_complex() else g).double()

    total = math.sqrt(sum(float(double(wanted.gradients, p).square().sum()) for p in wanted.gradients))
    worst, where, share = 1.0, None, 0.0
    for p in dict.fromkeys((*wanted.gradients, *found.gradients)):
        b, g = double(wanted.gradients, p), double(found.gradients, p)
        size, off = float(b.norm()), float((g - b).norm())
        if not (excess := off / (relative * size + absolute * total + 1e-300)) <= worst:  # or no number
            worst, where, share = excess, p, off / max(size, 1e-300)
    if where is not None:
        nodes = [node.where for node in proof.graph.nodes if any(q is where for q in node.parameters)]
        return (
            f"{is_not} the gradient of `{_named(proof, where)}` differs from autograd's by {share:.2g} of its size, in "
            f"{', '.join(nodes[:3]) or 'no node: nothing that was recorded reads it'}. Something in forward is not "
            "seen: a value written in place, a gradient changed by hand. Way out: keep the module that does so "
            f"{way_out}"
        )
    if not abs(wanted.loss - found.loss) <= (relative + absolute) * (1 + abs(wanted.loss)):
        return (
            f"{is_not} its loss is {found.loss:.6g} and the model's {wanted.loss:.6g}. Way out: keep the module that "
            f"is not seen {way_out}"
        )
    # A mean of a batch may be nothing but rounding.
    ours, theirs = ([b.to_dense() for b in side.buffers] for side in (found, wanted))
    largest = [float(b.double().abs().max()) for b in theirs if b.numel() and not b.is_complex()]
    slack = absolute * max([1.0, *largest])
    for b, g in zip(theirs, ours, strict=True):
        if b.shape != g.shape or not torch.allclose(b, g, rtol=relative, atol=slack, equal_nan=True):
            which = next((n for n, own in proof.model.named_buffers() if own.shape == b.shape), "?")
            return f"{is_not} a buffer like `{which}` is written otherwise. Way out: keep what writes it {way_out}"
    return None


def _bounds(model: nn.Module, x: Any) -> Bounds:
    device = first_tensor(x).device.type
    dtypes = [p.dtype.to_real() for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max((BOUNDS.get(dtype, BOUNDS[torch.float32]) for dtype in dtypes), key=lambda b: b.relative)


_IMPOSSIBLE = "no copy in double precision"


def _in_double(proof: Proof, x: Any, target: Any) -> str | None:
    """The same comparison of a copy in float64, captured anew."""
    with torch.autocast(first_tensor(x).device.type, enabled=False):
        try:
            twin, cost = copied_together(proof.model, proof.cost)
            twin.double()
            if isinstance(cost, nn.Module):
                cost.double()
            x, target = (mapped(v, lambda t: t.double() if t.is_floating_point() else t) for v in (x, target))
            function = recorded_function(cost) if proof.graph.cost else None
            graph = capture(twin, x, proof.leaves, proof.energy, proof.branches, function, target)
            again = Proof(twin, graph, cost, proof.energy, proof.branches, proof.leaves, is_known=True)
            wanted, found = _sides(again, x, target)
        except (RuntimeError, TypeError, MepError):
            return _IMPOSSIBLE
        bounds = BOUNDS[torch.float64]
        return _difference(again, wanted, found, bounds.relative, bounds.absolute)


def _named(proof: Proof, p: nn.Parameter) -> str:
    return next((name for name, own in proof.model.named_parameters() if own is p), f"a parameter of {tuple(p.shape)}")
