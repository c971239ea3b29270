"""A graph for complex states: the nodes of a graph, continued as holomorphic functions of their parents.

    vjp   J^T f        the transpose, never the adjoint: the force on a state is dF/ds, without any conjugate
    param_vjp          Re (dmu/dtheta)^T f: parameters are real, and so are their gradients

Where J is constant and real (linear layers, convolutions, operations held on their branch) a node is applied to real
and imaginary parts, in closed form. Elsewhere the operations of `mep.graph.closed_forms.complex` run under autograd,
which finds the adjoint, conj(J)^T g: so forces are conjugated on the way in, and the results on the way out.

What a real point has saved is understood by the nodes of both graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mep.errors import ArgumentError, MepError
from mep.graph.closed_forms.complex import complex_ops
from mep.graph.graph import Graph
from mep.graph.node import AutogradNode, Beta, Node, expand_beta
from mep.graph.ops import StepContext
from mep.layout import as_laid_out, in_dtype

_TWINS: WeakKeyDictionary[Graph, Graph] = WeakKeyDictionary()


def complex_graph(graph: Graph) -> Graph:
    """The graph for complex states; the same one each time.

    Example:
        >>> import mep
        >>> graph = mep.trace(torch.nn.Linear(2, 1).double(), torch.zeros(3, 2).double())
        >>> complex_graph(graph) is complex_graph(graph)
        True
    """
    if graph not in _TWINS:
        nodes = [ComplexNode(n) if n.clamped or n.is_affine_when_held else CurvedNode(n) for n in graph.nodes]
        _TWINS[graph] = replace(graph, nodes=tuple(nodes))
    return _TWINS[graph]


def check_complex(graph: Graph, call: str) -> None:
    """Raise an ArgumentError if some operation of a node that is not linear has no complex form."""
    for node in complex_graph(graph).nodes:
        if isinstance(node, CurvedNode) and node.missing is not None:
            kept = ", which is kept whole," if node.missing.whole else ""
            raise _refused(node, f"{node.missing.label}{kept} has no complex form", call)


def _refused(node: Node, why: str, call: str) -> ArgumentError:
    return ArgumentError(
        f"{call}: {node.where}: {why}. Way out: phases='centered', or a smooth operation in its place."
    )


class Split(NamedTuple):
    """What a node with a constant Jacobian saves: its own at the real parts, and the imaginary weighted input."""

    own: Any
    imag: Any


class Evaluated(NamedTuple):
    """What autograd saves of a complex evaluation."""

    saved: Any


class ComplexNode(Node):
    """A node for complex parents, states and forces, where its Jacobian is constant and real."""

    def __init__(self, node: Node):
        self.node = node
        super().__init__(**{f.name: getattr(node, f.name) for f in fields(Node)})
        self.can_replace_rows = node.can_replace_rows

    @property
    def is_affine_when_held(self) -> bool:
        return self.node.is_affine_when_held

    def weighted_input(self, saved: Any) -> Tensor:
        """Its real part."""
        return self.node.weighted_input(_own(saved))

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        real, imag = _parts(parents)
        mu, saved = self.node.predict(real, context)
        if not any(t is not None for t in imag):
            return mu, saved
        t, into = self.node.jvp(saved, imag)
        return mu if t is None else torch.complex(mu, t), Split(saved, into)

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        real, imag = _parts([force])
        found = self.node.vjp(_own(saved), real[0])
        if imag[0] is None:
            return found
        return [_complex(a, b) for a, b in zip(found, self.node.vjp(_own(saved), imag[0]), strict=True)]

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        real, imag = _parts([force])
        found = self.node.param_vjp(_own(saved), real[0], weight)
        if imag[0] is None or not isinstance(saved, Split) or saved.imag is None:
            return found
        return _added(found, self.node.param_vjp_along(saved.own, saved.imag, imag[0], -weight))

    def jvp(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Any]:
        real, imag = _parts(tangents)
        t, into = self.node.jvp(_own(saved), real)
        if not any(t is not None for t in imag):
            return t, into
        more, into_more = self.node.jvp(_own(saved), imag)
        # Tangents of a weighted input, or, from autograd, lists of those of all parents.
        both = Split(into, into_more) if isinstance(into, (list, tuple)) else _complex(into, into_more)
        return _complex(t, more), both

    def param_vjp_along(self, saved: Any, tangent: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        forces = _parts([force])
        tangents = tangent if isinstance(tangent, Split) else [part[0] for part in _parts([tangent])]
        found: Sequence[Tensor | None] | None = None
        for t, (f,), sign in zip(tangents, forces, (1, -1), strict=True):
            if t is not None and f is not None:
                more = self.node.param_vjp_along(_own(saved), t, f, sign * weight)
                found = more if found is None else _added(found, more)
        return [None] * len(self.parameters) if found is None else found

    def moved(self, saved: Any, tangent: Tensor, beta: Beta) -> Any:
        (real,), (imag,) = _parts([tangent * expand_beta(beta, tangent)])
        return Split(self.node.moved(_own(saved), real, 1.0), None if imag is None else -imag)

    def rows(self, saved: Any, index: Tensor) -> Any:
        return self.node.rows(_own(saved), index)


class CurvedNode(ComplexNode):
    """A node whose Jacobian depends on its parents: its operations in their complex forms, through autograd.

    `missing` is the first operation that has none.
    """

    def __init__(self, node: Node):
        super().__init__(node)
        moving = [p for p, flows in zip(node.parents, node.flows, strict=True) if flows]
        ops, self.missing = complex_ops(node.program, moving)
        given = {f.name: getattr(node, f.name) for f in fields(Node)} | {"program": tuple(ops), "writes": ()}
        self._autograd = AutogradNode(**given)
        self.can_replace_rows = False

    def weighted_input(self, saved: Any) -> Tensor:
        if not isinstance(saved, Evaluated):
            return super().weighted_input(saved)
        return self._autograd.weighted_input(saved.saved).real

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        if not any(isinstance(p, Tensor) and p.is_complex() for p in parents):
            return self.node.predict(parents, context)
        try:
            mu, saved = self._autograd.predict(parents, context)
        except (MepError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ArithmeticError, AttributeError) as error:
            raise _refused(
                self, f"it cannot be evaluated at complex numbers, {error}", "phases='holomorphic'"
            ) from error
        return mu, Evaluated(saved)

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        if not isinstance(saved, Evaluated):
            return super().vjp(saved, force)
        found = self._autograd.vjp(saved.saved, _conjugate(force, saved.saved[1]))
        return [None if g is None else torch.conj_physical(g) for g in found]

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        if not isinstance(saved, Evaluated):
            return super().param_vjp(saved, force, weight)
        return self._autograd.param_vjp(saved.saved, _conjugate(force, saved.saved[1]), weight)


def _conjugate(force: Tensor, mu: Tensor) -> Tensor:
    return torch.conj_physical(in_dtype(force, mu.dtype))


def _own(saved: Any) -> Any:
    """What the node itself saved, at real parents or at the real parts of complex ones."""
    return saved.own if isinstance(saved, Split) else saved


def _parts(values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The real parts, and the imaginary ones: None of a real value."""
    real, imag = [], []
    for value in values:
        is_complex = isinstance(value, Tensor) and value.is_complex()
        real.append(as_laid_out(value.real, value) if is_complex else value)
        imag.append(as_laid_out(value.imag, value) if is_complex else None)
    return real, imag


def _complex(real: Tensor | None, imag: Tensor | None) -> Tensor | None:
    """The complex value of two parts; None is zero."""
    if real is None or imag is None:
        return real if imag is None else 1j * imag
    return torch.complex(real, imag)


def _added(one: Sequence[Tensor | None], two: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(one, two, strict=True)]
