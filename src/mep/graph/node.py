"""The parts of a graph: what a node predicts from its parents, and the products with its Jacobians J = dmu/dparent.

    predict(parents, context) -> mu, saved               mu = f(parents)
    vjp(saved, force)         -> J^T force, one for each parent   (None where nothing flows)
    param_vjp(saved, force, weight) -> weight * (dmu/dtheta)^T force, one for each parameter
    jvp(saved, tangents)      -> sum over the parents of J tangent, where J is constant

A `Chain` has them in closed form: a sum of its parents or the only one of them, then one simple operation after the
other. An `AutogradNode` computes them for any operations through an autograd graph of its own, which lives as long as
`saved`. There is never a graph through more than one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mep.graph.closed_forms import FREE_STATE, Potential
from mep.graph.closed_forms.layers import LayerOp, Pointwise, Pool, WeightedOp
from mep.graph.closed_forms.table import layer_op_of, weighted_op
from mep.graph.ops import Op, Program, Ref, Slot, StepContext, is_tensor, leaves_of
from mep.guards import generators, set_generators, without_hooks
from mep.layout import as_laid_out, in_dtype, numbers_like, per_example

Beta = float | Tensor
"""A nudging strength: a number, a tensor without dimensions (where a step is compiled for any, and of complex ones), or
one each: [batch]."""


@dataclass(eq=False, repr=False)
class Node:
    """One prediction of the model, or a junction: a parameter-free value that several nodes read.

    `program` are the operations from the `parents` to the prediction, which is the value of `op`. `flows[i]` says
    whether a force may reach parent i (an input is clamped). `writes` are buffers of the model with the values, of this
    program, that they are to have. `potential` is the energy that a Hopfield state has by itself. `weighted` is the
    linear layer or convolution that has the node's parameters, where that is known. A junction owns no state: the sum
    of the forces of its children is its own force on its parents.
    """

    name: str
    parents: tuple[str, ...]
    flows: tuple[bool, ...]
    owns_state: bool
    program: tuple[Op, ...]
    parameters: tuple[nn.Parameter, ...]
    op: str = ""
    writes: tuple[tuple[Slot, str], ...] = ()
    potential: Potential = FREE_STATE
    weighted: WeightedOp | None = None
    shape: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.op = self.op or self.program[-1].name
        self.clamped = not any(self.flows)
        """Whether it depends on the input alone, so that its prediction never changes while settling."""
        self.runs_foreign_code = any(op.whole for op in self.program)
        """Whether it keeps a module or function whole."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, reading {', '.join(self.parents)}>"

    @property
    def box(self) -> tuple[float, float]:
        """The bounds of its state in a Hopfield network."""
        return self.potential.bounds

    @property
    def where(self) -> str:
        """Its name and the line of the model's source."""
        return f"node `{self.name}`" + (f" ({self.program[-1].where})" if self.program[-1].where else "")

    @property
    def is_affine_when_held(self) -> bool:
        """Whether J is constant while the branches are held, as far as is known."""
        return False

    @property
    def ends_in_weighted(self) -> bool:
        """Whether the prediction is what `weighted` returns."""
        return self.weighted is not None

    def weighted_input(self, saved: Any) -> Tensor:
        """What `weighted` was applied to."""
        raise NotImplementedError

    def weighted_error(self, saved: Any, error: Tensor) -> Tensor:
        """An error of the prediction as one of what `weighted` returned."""
        return error

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

    def param_vjp_along(self, saved: Any, tangent: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """How `param_vjp` of a force changes along `tangent`, the second result of `jvp`; where J is constant."""
        raise NotImplementedError

    def moved(self, saved: Any, tangent: Tensor, beta: Beta) -> Any:
        """`saved` after `weighted_input` has moved by `-beta * tangent`."""
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

    def jvp(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Any]:
        """By two backward passes: `J t` is the derivative along t of `J^T u`, which is linear in u."""
        inputs, mu, _ = saved
        moving = [i for i, t in enumerate(tangents) if t is not None and self.flows[i]]
        if not moving or not mu.requires_grad:
            return None, None
        with torch.enable_grad():
            u = torch.zeros_like(mu, requires_grad=True)
            found = torch.autograd.grad(mu, [inputs[i] for i in moving], u, create_graph=True, allow_unused=True)
            pairs = [(g, tangents[i]) for g, i in zip(found, moving, strict=True) if g is not None]
            if not pairs:
                return None, None
            (t,) = torch.autograd.grad([g for g, _ in pairs], u, [t for _, t in pairs])
        return t, tangents

    def param_vjp_along(self, saved: Any, tangent: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """The parameters' gradient of `<J^T force, tangent>`."""
        inputs, mu, _ = saved
        moving = [i for i, t in enumerate(tangent) if t is not None and self.flows[i]]
        trained = [p for p in self.parameters if p.requires_grad]
        force = as_laid_out(force, mu)
        with torch.enable_grad(), without_hooks(trained):
            found = torch.autograd.grad(mu, [inputs[i] for i in moving], force, create_graph=True, allow_unused=True)
            pairs = [(g, tangent[i]) for g, i in zip(found, moving, strict=True) if g is not None and g.requires_grad]
            if not pairs or not trained:
                return [None] * len(self.parameters)
            ends, along = [g for g, _ in pairs], [t for _, t in pairs]
            more = torch.autograd.grad(ends, trained, along, retain_graph=True, allow_unused=True)
        by = dict(zip(trained, more, strict=True))
        return [None if (g := by.get(p)) is None else g.to_dense() * weight for p in self.parameters]


def _grad(output: Tensor, inputs: Sequence[Tensor], force: Tensor) -> Sequence[Tensor | None]:
    if not inputs or not output.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(output, inputs, force, retain_graph=True, allow_unused=True)


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


class Saved(NamedTuple):
    """What each operation kept and the dtype of its result (autocast mixes them); shape and dtype of every parent."""

    kept: list[Any]
    dtypes: list[torch.dtype]
    terms: list[tuple[Sequence[int], torch.dtype]]


class Chain(Node):
    """`mu = f_k(... f_1(sum of the parents))`, each `f_i` an operation with a closed form.

    Where all their Jacobians are constant while branches are held (linear layers, convolutions, pooling, reshapes,
    piecewise-linear activations) the node is affine, and has `jvp` as well. As in autograd, a force has the dtype of
    its value.
    """

    def __init__(self, layers: Sequence[LayerOp], **fields: Any):
        super().__init__(**fields)
        self.layers = tuple(layers)
        self.place = next((i for i, layer in enumerate(layers) if _is_trained(layer)), len(layers) - 1)
        """Of the operation that has the parameters."""

    can_replace_rows = True

    @property
    def is_affine_when_held(self) -> bool:
        return all(layer.is_affine for layer in self.layers)

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        h = parents[0] if len(parents) == 1 else _sum(parents)
        kept, dtypes, terms = [], [], []
        for p in parents:
            terms.append((p.shape, p.dtype))
        for layer in self.layers:
            h, own = layer.value(h, context)
            kept.append(own)
            dtypes.append(h.dtype)
        return h, Saved(kept, dtypes, terms)

    @property
    def ends_in_weighted(self) -> bool:
        return self.weighted is not None and self.place == len(self.layers) - 1

    def weighted_input(self, saved: Any) -> Tensor:
        return saved.kept[self.place]

    def weighted_error(self, saved: Any, error: Tensor) -> Tensor:
        for i in range(len(self.layers) - 1, self.place, -1):
            error = self.layers[i].vjp(saved.kept[i], in_dtype(error, saved.dtypes[i]))
        return error

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        for i in range(len(self.layers) - 1, -1, -1):
            if force.dtype is not saved.dtypes[i]:
                force = force.to(saved.dtypes[i])
            force = self.layers[i].vjp(saved.kept[i], force)
        if len(saved.terms) == 1:
            dtype = saved.terms[0][1]
            return (force if force.dtype is dtype else force.to(dtype),)
        return [_fitting(force, *t) if flows else None for flows, t in zip(self.flows, saved.terms, strict=True)]

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        if not self.parameters:
            return ()
        layer, kept, dtype = self.layers[self.place], saved.kept[self.place], saved.dtypes[self.place]
        if self.place < len(self.layers) - 1:
            force = self.weighted_error(saved, force)
        found = layer.param_vjp(kept, force if force.dtype is dtype else force.to(dtype), weight)
        gradients = []
        for p, g in zip(layer.parameters, found, strict=True):
            if p is not None:
                gradients.append(g)
        return gradients

    def jvp(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        t, weighted = tangents[0] if len(tangents) == 1 else _sum(tangents), None
        if t is not None:
            for i, layer in enumerate(self.layers):
                if i == self.place:
                    weighted = t
                t = layer.jvp(saved.kept[i], t)
        return t, weighted if self.parameters else None

    def param_vjp_along(self, saved: Any, tangent: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """A bilinear form of weighted input and force: that of the tangent; biases have no part in it."""
        layer, dtype = self.layers[self.place], saved.dtypes[self.place]
        found = layer.param_vjp(tangent, in_dtype(self.weighted_error(saved, force), dtype), weight)
        pairs = zip(layer.parameters, found, strict=True)
        return [g if i == 0 else None for i, (p, g) in enumerate(pairs) if p is not None]

    def moved(self, saved: Any, tangent: Tensor, beta: Beta) -> Any:
        kept = list(saved.kept)
        kept[self.place] = state_from_error(kept[self.place], tangent, beta)
        return Saved(kept, saved.dtypes, saved.terms)

    def rows(self, saved: Any, index: Tensor) -> Any:
        kept = [layer.rows(own, index) for layer, own in zip(self.layers, saved.kept, strict=True)]
        terms = [((len(index), *shape[1:]), dtype) for shape, dtype in saved.terms]
        return saved._replace(kept=kept, terms=terms)


def make_node(program: Sequence[Op], parents: Sequence[str], op: str, **fields: Any) -> Node:
    """The closed form where there is one, the local autograd graph elsewhere."""
    last = next(o for o in program if o.name == op)
    fields |= {"program": tuple(program), "parents": tuple(parents), "op": op}
    layers = _layers(program, parents, fields["name"]) if last is program[-1] and not fields["writes"] else None
    if layers is None:
        return AutogradNode(weighted=weighted_op(last) if last is program[-1] else None, **fields)
    fields["parameters"] = tuple(p for layer in layers for p in layer.parameters if isinstance(p, nn.Parameter))
    heavy = [layer for layer in layers if isinstance(layer, WeightedOp) and layer.parameters[0] is not None]
    return Chain(layers, weighted=heavy[0] if heavy else None, **fields)


def _layers(program: Sequence[Op], parents: Sequence[str], name: str) -> list[LayerOp] | None:
    """The closed forms of a program of which each operation reads only the one before it; None if some has none."""
    operations = list(program)
    if len(parents) > 1:
        if not _is_sum(operations[0], parents):
            return None
        previous = operations.pop(0).name
    elif not parents:
        return None
    else:
        previous = parents[0]
    layers: list[LayerOp] = []
    for op in operations:
        layer = layer_op_of(op, (name, op.name))
        if layer is None or _read(op) != [previous] or (_is_trained(layer) and any(map(_is_trained, layers))):
            return None  # one operation has the parameters
        layers.append(layer)
        previous = op.name
    return _pooled_early(layers) if all(layer.is_affine for layer in layers) else layers


def _is_trained(layer: LayerOp) -> bool:
    """Whether an operation has parameters of the model."""
    return any(isinstance(p, nn.Parameter) for p in layer.parameters)


def _read(op: Op) -> list[str]:
    """The values that an operation reads, once each time."""
    return [ref.name for ref in leaves_of((op.args, op.kwargs), Ref)]


def _pooled_early(layers: list[LayerOp]) -> list[LayerOp]:
    """The same operations with max pooling before an activation that never falls: equal winners, less work.

    Where it is flat it may find other winners, of equal values and with J = 0.
    """
    for i in range(1, len(layers)):
        before, layer = layers[i - 1], layers[i]
        if isinstance(layer, Pool) and isinstance(before, Pointwise) and before.never_falls:
            layers[i - 1], layers[i] = layer, before
    return layers


def _is_sum(op: Op, parents: Sequence[str]) -> bool:
    """Whether an operation adds up the parents, each once, and does nothing else."""
    return op.label == "add" and not op.kwargs and sorted(_read(op)) == sorted(parents) and len(op.args) == len(parents)


def _sum(tensors: Sequence[Tensor | None]) -> Any:
    """The sum of those that are not None, None if all are."""
    total = None
    for t in tensors:
        if t is not None:
            total = t if total is None else total + t
    return total


def _fitting(force: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a force on a sum is for a term, which may have been broadcast or promoted."""
    return in_dtype(force if force.shape == shape else force.sum_to_size(shape), dtype)


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
    if beta.ndim:
        is_alike = beta.shape[0] == like.shape[0]
        beta = beta.view(-1, *[1] * (like.ndim - 1)) if is_alike else per_example(beta, like)
    return beta.to(numbers_like(like, beta) if beta.is_complex() else like.dtype)


def select_beta(beta: Beta, rows: Tensor) -> Beta:
    """The strength of some of the examples."""
    return beta.index_select(0, rows) if isinstance(beta, Tensor) and beta.ndim else beta
