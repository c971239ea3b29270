"""`trace(module)`: read a model as a graph of nodes.

A **node** is a parametrised operation together with the parameter-free operations that feed it; it owns a state. The
output owns one too. A parameter-free value that several nodes read becomes a **junction**: computed once, no state.
Parameter expressions and shape queries are repeated in every node that reads them.

    Linear -> ReLU -> Linear           nodes: (Linear) (ReLU, Linear)
    h = fc1(x);  fc2(h) + h            nodes: (fc1) (fc2) (add: the output)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mep.graph import Graph
from mep.recording import Leaves as Leaves
from mep.tracing.kinks import read_kinks
from mep.tracing.reading import Reading


def trace(module: nn.Module, leaves: Leaves = (), inputs: Sequence[str] | None = None) -> Graph:
    """The graph of a model: nodes, junctions and what connects them.

    Args:
        module: any module that `torch.fx` can trace symbolically. It is not changed.
        leaves: module types, or qualified names, that are kept whole: autograd inside, equilibrium between.
        inputs: the arguments of `forward` that will be given, by default those that must be; others keep their
            defaults.

    Raises:
        TraceError: the model cannot be represented; the message names the place and the way out.

    Example:
        >>> import mep
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(node.name, node.parents) for node in mep.trace(net).nodes]
        [('0', ('input',)), ('2', ('0',))]
    """
    return Reading(module, leaves, inputs).graph()


def trace_kinks(module: nn.Module, leaves: Leaves = (), inputs: Sequence[str] | None = None) -> Graph:
    """As `trace`, but every piecewise-linear operation is a junction of its own, directly behind a state.

    Where there is no state that this kink alone reads, one is put: the value of a sum before a ReLU, the windows of a
    max pooling. It adds its term to the energy; the free equilibrium stays the forward pass.

    Raises:
        TraceError: an operation has kinks for which there is no rule (sorting, a maximum over the examples).

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 2))
        >>> graph = trace_kinks(net)
        >>> [node.name for node in graph.states], list(graph.kinks)
        (['0', 'windows_state', '4'], ['1', 'largest'])
    """
    return read_kinks(Reading(module, leaves, inputs))


def trace_activations(module: nn.Module, leaves: Leaves = (), inputs: Sequence[str] | None = None) -> Graph:
    """The Hopfield reading: states stand behind the activations, each in the interval onto which that projects.

    Raises:
        TraceError: an activation is no projection (tanh, GELU...), or a value is read before and behind it.
    """
    reading = Reading(module, leaves, inputs)
    reading.move_states_behind_activations()
    return reading.graph()


def argument_names(module: nn.Module, x: Any) -> tuple[str, ...] | None:
    """The arguments of `forward` that an input gives: a tensor the first, a tuple the first few, a dict those named."""
    known = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in known):
        return None
    if isinstance(x, Mapping):
        return tuple(p.name for p in known if p.name in x)
    return tuple(p.name for p in known)[: len(x) if isinstance(x, (tuple, list)) else 1]
