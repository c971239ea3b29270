"""Nudged equilibria and their contrasts without a solver of the package: Newton's method on an energy written down.

Dense, damped, float64. Energies come from `reference.py`; so does the word `predict`.
"""

import torch
from reference import FREE, energy, forces, nudged_energy, predictions_of_modules
from torch import nn


class Written:
    """An nn.Sequential of linear layers and activations as the energy of one batch.

    `kind`: "smooth", "held" (ReLUs keep the branch of the forward pass) or "hopfield" (states behind the activations,
    in the box of each). `cost(output, target)` is one number per example.
    """

    def __init__(self, kind, model, x, cost, target):
        self.model, self.cost, self.target, self.batch = model, cost, target, len(x)
        self.node_energy = "hopfield" if kind == "hopfield" else "prediction"
        activate = _held(model, x) if kind == "held" else lambda module, h: module(h)
        self.predict = predictions_of_modules(model, x, kind == "hopfield", activate)
        names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
        self.output, self.boxes = names[-1], dict.fromkeys(names, FREE)
        if kind == "hopfield":
            layers = list(model)
            for i, walls in ((i, m) for i, m in enumerate(layers) if isinstance(m, nn.Hardtanh)):
                self.boxes[names[sum(isinstance(m, nn.Linear) for m in layers[:i]) - 1]] = walls.min_val, walls.max_val
        with torch.no_grad():
            forward, h = {}, x
            for name, module in model.named_children():
                h = module(h)
                forward[name] = h
            behind = {n: forward[str(int(n) + 1)] if self.boxes[n] != FREE else forward[n] for n in names}
        self.free = behind if kind != "hopfield" else equilibrium(self.total(0.0), behind, self.boxes)

    def total(self, beta):
        """states -> F of every example."""
        return nudged_energy(self.predict, self.output, self.cost, self.target, beta, self.node_energy)

    def nudged(self, beta):
        """The equilibrium at beta."""
        return equilibrium(self.total(beta), self.free, self.boxes)

    def contrast(self, multiples_and_weights):
        """`sum w_k dE/dtheta(s_k)`, the mean over the batch, of every parameter; rows are `(beta_k, w_k)`."""
        found = {p: torch.zeros_like(p) for p in self.model.parameters()}
        for beta, weight in multiples_and_weights:
            s = self.free if beta == 0 else self.nudged(beta)
            value = energy(self.predict, s, self.node_energy).sum() / self.batch
            for p, g in zip(found, torch.autograd.grad(value, list(found)), strict=True):
                found[p] += weight * g
        return found

    def one_sided(self, beta):
        return self.contrast(((0.0, -1 / beta), (beta, 1 / beta)))

    def centered(self, beta):
        return self.contrast(((-beta, -0.5 / beta), (beta, 0.5 / beta)))

    def curvatures(self, beta):
        """The eigenvalues of d2F/ds2 at the equilibrium, over the units that are off the walls of their boxes."""
        s = self.nudged(beta)
        flat, unpack, low, high = _flat(s, self.boxes)
        inside = (flat > low) & (flat < high)
        return torch.linalg.eigvalsh(hessian(self.total(beta), unpack, flat)[inside][:, inside])


def _held(model, x):
    """Activations on the branches of the forward pass."""
    gates, h = {}, x
    for module in model:
        if isinstance(module, nn.ReLU):
            gates[module] = (h > 0).to(h.dtype).detach()
        h = module(h)
    return lambda module, h: h * gates[module] if module in gates else module(h)


def equilibrium(total, states, boxes=None, steps=200):
    """A local minimum of an energy of all states of all examples, in their boxes, downhill from `states`.

    Newton's method with the absolute values of the eigenvalues, and half the step as long as it leads uphill. Units at
    a wall against which they are pushed stay there.
    """
    s, unpack, low, high = _flat(states, boxes)
    summed = lambda at: total(unpack(at)).sum()  # noqa: E731
    for _ in range(steps):
        g = torch.cat([f.flatten() for f in forces(total, unpack(s)).values()])
        inside = ~((s <= low) & (g > 0) | (s >= high) & (g < 0))
        curvature, ways = torch.linalg.eigh(hessian(total, unpack, s)[inside][:, inside])
        step = torch.zeros_like(s)
        step[inside] = -ways @ ((ways.T @ g[inside]) / curvature.abs().clamp(min=1e-9))
        here, length = summed(s), 1.0
        # A step at the limit of rounding need not lead downhill.
        while summed((s + length * step).clamp(low, high)) > here + 1e-14 * here.abs() and length > 1e-9:
            length /= 2
        before, s = s, (s + length * step).clamp(low, high)
        if (s - before).norm() <= 1e-15 * s.norm():
            break
    return unpack(s)


def hessian(total, unpack, at):
    return torch.func.jacrev(torch.func.grad(lambda flat: total(unpack(flat)).sum()))(at.detach()).detach()


def _flat(states, boxes):
    """The states as one vector, the way back, and the walls."""
    names, sizes = list(states), [s.numel() for s in states.values()]

    def unpack(flat):
        return {n: v.view_as(states[n]) for n, v in zip(names, flat.split(sizes), strict=True)}

    low, high = (
        torch.cat([torch.full_like(states[n].flatten(), (boxes or {}).get(n, FREE)[side]) for n in names])
        for side in (0, 1)
    )
    return torch.cat([s.flatten() for s in states.values()]).detach(), unpack, low, high


def vector(model, gradients):
    """The gradients of all parameters in one vector."""
    return torch.cat([gradients.get(p, torch.zeros_like(p)).flatten().double() for p in model.parameters()])


def distance(model, found, exact):
    """`|found - exact| / |exact|` over all parameters at once."""
    found, exact = vector(model, found), vector(model, exact)
    return float((found - exact).norm() / exact.norm())
