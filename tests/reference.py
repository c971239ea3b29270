"""Slow, obviously right: energies by autograd over whole networks, dense solves, brute force. float64 throughout.

A network is a function `predict(states) -> {name: mu}` of all its states at once; everything else follows from it.
"""

import itertools
import math
from functools import partial

import torch
from torch import nn
from torch.func import jvp

from mep.graph.ops import Ref, Slot

FREE = (-math.inf, math.inf)


# Predictions, written down twice: from the list of modules, and from the operations that tracing recorded.


def predictions_of_modules(layers, x, behind=False, activate=lambda module, h: module(h)):
    """mu of every Linear of an nn.Sequential; states stand before the activations, or `behind` them (Hopfield)."""

    def predict(states):
        found, h = {}, x
        for name, module in layers.named_children():
            if isinstance(module, nn.Linear):
                found[name] = module(h)
                h = states[name]
            elif not behind:
                h = activate(module, h)
        return found

    return predict


def run(op, values):
    """The result of a recorded operation, by hand: every `Ref` and `Slot` in its arguments replaced by what it is."""

    def filled(t):
        if isinstance(t, Ref):
            return values[t.name]
        if isinstance(t, Slot):
            return t.value
        if isinstance(t, (tuple, list)):
            return type(t)(map(filled, t))
        return {k: filled(v) for k, v in t.items()} if isinstance(t, dict) else t

    args = filled(op.args)
    return op.target(*((None, None) if op.whole else ()), *args, **filled(dict(op.kwargs)))


def predictions_of_graph(graph, inputs, free=None, side=0):
    """mu of every node that owns a state, from its recorded operations.

    `free`: the states on whose branches piecewise-linear operations are held, f(x0) + f'(x0) (x - x0).
    `side`: from which side their derivative is taken at a kink, -1 or 1.
    """

    def predict(states):
        values, at_rest, found = dict(inputs), dict(inputs), {}
        for node in graph.nodes:
            for op in node.program:
                kinked = op.pool is not None or (op.activation is not None and op.activation.kinks)
                if free is not None:
                    at_rest[op.name] = run(op, at_rest)
                if kinked and (free is not None or side):
                    x = values[op.args[0].name]
                    x0 = at_rest[op.args[0].name] if free is not None else x
                    values[op.name] = line(lambda h, op=op: run(op, {op.args[0].name: h}), x0, x, side)
                else:
                    values[op.name] = run(op, values)
            if node.owns_state:
                found[node.name] = values[node.name]
                values[node.name] = states[node.name]
                at_rest[node.name] = (free or states)[node.name]
        return found

    return predict


def line(f, x0, x, side=0):
    """The straight line that touches f at x0 (from one side), at x."""
    x0 = x0.detach()
    return f(x0) + jvp(f, (x0 + 1e-9 * side,), (x - x0,))[1]


# Energies.


def energy(predict, states, coupling="prediction"):
    """E of every example."""
    total = 0
    for name, mu in predict(states).items():
        s = states[name]
        e = 0.5 * (s - mu) ** 2 if coupling == "prediction" else 0.5 * s**2 - s * mu
        total = total + e.reshape(_batch(states), -1).sum(1)
    return total


def nudged_energy(predict, output, cost, target, beta, coupling="prediction"):
    """states -> F = E + beta C, of every example."""
    return lambda s: energy(predict, s, coupling) + beta * cost(s[output], target)


def forces(total, states):
    """dF/ds of every state."""
    leaves = {n: s.detach().clone().requires_grad_() for n, s in states.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(total(leaves).sum(), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(s) if g is None else g for (n, s), g in zip(states.items(), found, strict=True)}


def residual(predict, total, states):
    """|dF/ds| / max of the two sides that balance at equilibrium, the worst node of every example.

    The sides are the error s - mu and the pull of the children.
    """
    found, mus = [], predict(states)
    for name, g in forces(total, states).items():
        s = states[name]
        side = s - mus[name].detach()
        n = _batch(states)
        rounding = 10 * torch.finfo(s.dtype).eps * _norm(s, n)
        scale = torch.stack([_norm(side, n), _norm(side - g, n), rounding]).amax(0)
        found.append(_norm(g, _batch(states)) / scale)
    return torch.stack(found).amax(0)


def swept_residual(predict, output, cost, target, beta, states):
    """`|S_n - delta_n|` over the larger of the two, the worst node of every example: what a sweep would change.

    `delta_n = (mu_n - s_n) / beta` are the errors, and `S_n = sum_c J_c^T S_c` those that backpropagation of dC/ds_out
    finds where the states are.
    """
    leaves = {n: s.detach().clone().requires_grad_() for n, s in states.items()}
    with torch.enable_grad():
        mus = predict(leaves)
        (gradient,) = torch.autograd.grad(cost(leaves[output], target).sum(), [leaves[output]])
        swept = {n: torch.zeros_like(s) for n, s in states.items()}
        for _ in states:  # each time the errors come one node further
            total = sum((swept[n] * mu).sum() for n, mu in mus.items())
            pulled = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
            swept = {n: torch.zeros_like(states[n]) if g is None else g for n, g in zip(states, pulled, strict=True)}
            swept[output] = swept[output] + gradient
    found = []
    for n, mu in mus.items():
        delta = (mu.detach() - states[n]) / _per_example(beta, mu, _batch(states))
        size = torch.maximum(_norm(swept[n], _batch(states)), _norm(delta, _batch(states)))
        scale = size.clamp_min(torch.finfo(mu.dtype).tiny)
        found.append(_norm(swept[n] - delta, _batch(states)) / scale)
    return torch.stack(found).amax(0)


def _per_example(beta, like, batch):
    if not (torch.is_tensor(beta) and beta.ndim):
        return beta
    return beta.repeat_interleave(len(like) // batch).view(-1, *[1] * (like.ndim - 1))


def residual_in_boxes(total, states, free, leftovers, share, boxes):
    """The same of a Hopfield energy whose free equilibrium `free` was left with forces on its states.

    `total` has them as a constant part. The sides are the state and where its force would put it in its box, both less
    the free state. What a side may be off by rounding adds to both, and a share of what was left over.
    """
    found = []
    for name, g in forces(total, states).items():
        s = states[name]
        side, other = s - free[name], (s - g).clamp(*boxes[name]) - free[name]
        unknown = torch.finfo(s.dtype).eps * _norm(s) + share * _norm(leftovers[name])
        scale = torch.maximum(_norm(side), _norm(other))
        has_signal = scale > 10 * torch.finfo(s.dtype).eps * _norm(s)
        found.append(torch.where(has_signal, (_norm(side - other) + unknown) / (scale + unknown), 0))
    return torch.stack(found).amax(0)


def _batch(states):
    """How many examples there are; a state may have several rows of each, one after another."""
    return min(map(len, states.values()))


def _norm(t, batch=None):
    return t.reshape(batch or len(t), -1).norm(dim=1)


# Equilibria.


def descend(total, states, steps, lr, momentum, boxes=None):
    """v <- m v + dF/ds, s <- s - lr v, projected on the box; the states after every step."""
    velocity = {n: torch.zeros_like(s) for n, s in states.items()}
    for _ in range(steps):
        g = forces(total, states)
        velocity = {n: momentum * velocity[n] + g[n] for n in states}
        states = {n: (s - lr * velocity[n]).clamp(*(boxes or {}).get(n, FREE)) for n, s in states.items()}
        yield states


def dense_equilibrium(total, states, fixed=None):
    """The stationary point of a quadratic energy: one dense solve over all states of all examples at once.

    `fixed`: {name: mask} of the units that stay where `states` has them.
    """
    names, sizes = list(states), [s.numel() for s in states.values()]

    def unpack(flat):
        return {n: v.view_as(states[n]) for n, v in zip(names, flat.split(sizes), strict=True)}

    start = torch.cat([states[n].flatten() for n in names]).detach()
    held = torch.cat([(fixed or {}).get(n, torch.zeros_like(states[n], dtype=torch.bool)).flatten() for n in names])
    gradient, hessian = _derivatives(lambda flat: total(unpack(flat)).sum(), start)
    step = torch.zeros_like(start)
    step[~held] = torch.linalg.solve(hessian[~held][:, ~held], -gradient[~held])
    return unpack(start + step)


def _derivatives(f, at):
    return torch.autograd.functional.jacobian(f, at), torch.autograd.functional.hessian(f, at, vectorize=True)


def distance_to_rest(left, right):
    """How far zero is from the interval between two one-sided derivatives; a maximum is no rest."""
    return torch.where(left <= right, torch.relu(left) + torch.relu(-right), left.abs())


def kinked_equilibria(total, states, name):
    """Every equilibrium of one example's energy, quadratic but for ReLUs behind the state `name`, by brute force.

    `total(states, slopes)` is the energy with the ReLU's slopes given. Yields `(where, states)`; where[j] is -1 (unit j
    below zero), 0 (at rest on the kink) or 1 (above).
    """
    for where in itertools.product((-1, 0, 1), repeat=states[name].numel()):
        where = torch.tensor(where).view_as(states[name])
        slopes = (where > 0).to(states[name].dtype)
        start = {**states, name: states[name].masked_fill(where == 0, 0)}
        s = dense_equilibrium(partial(total, slopes=slopes), start, {name: where == 0})
        left = forces(partial(total, slopes=slopes), s)[name]
        right = forces(partial(total, slopes=slopes.masked_fill(where == 0, 1)), s)[name]
        if torch.where(where == 0, distance_to_rest(left, right) < 1e-12, s[name] * where >= 0).all():
            yield where, s


# Gradients.


def backprop(model, loss):
    """{parameter: gradient} of a loss; None where it does not depend on a trained parameter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
    return {p: found.get(p) for p in model.parameters()}


def implicit_gradient(total, cost, states, parameters, boxes):
    """d mean cost / d theta at an equilibrium in boxes: -dC/ds H^-1 d2E/(ds dtheta), over the units off the walls."""
    names, sizes = list(states), [s.numel() for s in states.values()]
    batch = len(next(iter(states.values())))
    flat = torch.cat([states[n].flatten() for n in names]).detach().requires_grad_()

    def unpack(flat):
        return {n: v.view_as(states[n]) for n, v in zip(names, flat.split(sizes), strict=True)}

    inside = torch.cat([((s > boxes[n][0]) & (s < boxes[n][1])).flatten() for n, s in states.items()])
    total_of = lambda f: total(unpack(f)).sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(total_of, flat.detach(), vectorize=True)[inside][:, inside]
    with torch.enable_grad():
        (c,) = torch.autograd.grad(cost(unpack(flat)).sum() / batch, flat)
        adjoint = torch.zeros_like(flat)
        adjoint[inside] = torch.linalg.solve(hessian, c[inside])
        (force,) = torch.autograd.grad(total(unpack(flat)).sum(), flat, create_graph=True)
        return torch.autograd.grad(-(force * adjoint).sum(), parameters)
