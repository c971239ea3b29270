r"""Equilibria that are no forward pass: their gradient by recurrent backpropagation, and their residuals.

At an equilibrium every state is where all that acts on it puts it, `s = T(s, theta)`:

    energy="hopfield"    T_n = f_n(mu_n + sum_c J_c^T s_c),                f_n the activation
    other energies       T_n = s_n - a dE/ds_n, put into the state's box,  a a small step

A small change of theta moves the equilibrium by `ds = T_s ds + T_theta dtheta`, so that (Almeida 1987; Pineda 1987,
https://doi.org/10.1103/PhysRevLett.59.2229)

    dC/dtheta = T_theta^T v,        v = dC/ds + T_s^T v

Both s and v are found by iterating their equations, with Anderson's acceleration (Walker and Ni 2011,
https://doi.org/10.1137/10078356X). T follows from the energy as it is documented, by autograd through the
operations that were recorded: none of the closed forms, nothing of a solver, and no nudge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mep.capture.cost import cost_of
from mep.cost import make_cost
from mep.energy import NODE_ENERGIES, Energy, Hopfield, State
from mep.errors import DivergedError
from mep.estimators import Equilibrium
from mep.graph.ops import Program, StepContext
from mep.settle import Solver, Start, settle
from mep.verification.case import Case
from mep.verification.equilibrium import Residual, Residuals, worst_of
from mep.verification.report import CLOSE, ResidualTrace

_STEP = 0.3
"""a, the step of `mep.Descent` by default."""
_SHOWN = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 50, 100, 200, 500, 1000)
"""Steps after which residuals are shown, and the last."""
_ITERATIONS = 2000
_MEMORY = 5
_TIGHT = 1e3
"""States and v are iterated until they change by so many units in the last place."""


class FixedPoint:
    """The map T of a case, and the free equilibrium to which it leads from where the solver of the case has settled.

    Its methods `residual`, `trace` and `all_settle` are those of `Equilibria`, by way of `ep.settle`.
    """

    @torch.no_grad()
    def __init__(self, case: Case):
        self.case, config = case, case.config
        graph = case.graphs.of(case.x, case.target)
        case.restore()
        context = StepContext(freeze_branches=False)
        self.energy = Energy(graph, config.energy, graph.bind(case.x), context, case.batch, groups=config.groups)
        start = self.energy.free_point()
        context.recording = False
        output = self.energy.output(start)
        self.cost = cost_of(graph, make_cost(config.whole_cost), self.energy.inputs, output, case.target)
        self.programs = [Program(node.program, node.parents, [node.op], node.name) for node in graph.nodes]
        self.held: StepContext | None = None
        """Where max pooling and its like stand at the free equilibrium, if branches are held."""
        if not config.is_forward:
            start = settle(self.energy, start, config.solver.for_free_phase(), Start(cost=self.cost)).point
        self.states = self.settled(self.energy.state(start))
        if config.branches == "held":
            self.held = StepContext()
            self.total(self.states, self.held)

    def total(self, states: State, context: StepContext | None = None) -> Tensor:
        """The energy of all examples; of a Hopfield energy without the states' own part, `sum_n G(s_n)`."""
        energy, values = self.energy, dict(self.energy.inputs)
        is_hopfield = isinstance(energy.node_energy, Hopfield)
        self.case.restore()  # every evaluation draws the same noise
        total = torch.zeros((), dtype=states[energy.graph.output].dtype, device=states[energy.graph.output].device)
        for node, program in zip(energy.graph.nodes, self.programs, strict=True):
            (mu,) = program(context, *(values[parent] for parent in node.parents))
            values[node.name] = states[node.name] if node.owns_state else mu
            if node.owns_state:
                s = states[node.name]
                own = -s * mu if is_hopfield else energy.node_energy.at(node).energy(s, mu)
                total = total + own.sum()
        return total + sum(group.energy(*(states[name] for name in group.nodes)).sum() for group in energy.groups)

    def map(self, states: State, beta: float = 0.0, free: State | None = None) -> State:
        """T, with autograd's graph where that is on; nudged by beta, with branches held as they are at `free`."""
        energy, context, differentiable = self.energy, self.held if free is not None else None, torch.is_grad_enabled()
        with torch.enable_grad():
            given = {n: s if s.requires_grad else s.detach().requires_grad_() for n, s in states.items()}
            total = self.total(given, context)
            if beta:
                total = total + beta * self.cost.value(given[energy.graph.output]).sum()
            forces = torch.autograd.grad(
                total, list(given.values()), create_graph=differentiable, materialize_grads=True
            )
        found = {}
        for (name, s), force in zip(given.items(), forces, strict=True):
            pull = -force if isinstance(energy.node_energy, Hopfield) else s - _STEP * force
            potential = energy.potential_of(energy.graph.by_name[name])
            found[name] = potential.respond(pull, None if free is None or context is None else free[name])
        return found

    @torch.no_grad()
    def settled(self, states: State) -> State:
        """The fixed point of T, if the iteration from these states ends in one."""

        def step(values: list[Tensor]) -> list[Tensor]:
            return list(self.map(dict(zip(states, values, strict=True))).values())

        found = iterated(step, list(states.values()), self.energy.batch)
        if found is None:
            chooses = any(op.piece is not None for node in self.energy.graph.nodes for op in node.program)
            pooling = ", or average pooling: the winners of max pooling may push each other down in turn"
            raise DivergedError(
                "verify: the free equilibrium is not found by iterating s <- T(s), which ends where states pull on "
                f"each other by less than what holds them. Way out: smaller weights{pooling if chooses else ''}."
            )
        return dict(zip(states, found, strict=True))

    def mean_cost(self) -> float:
        """At the free equilibrium for the parameters as they are now."""
        with torch.no_grad():
            output = self.settled(self.states)[self.energy.graph.output]
            self.case.restore()
            return float(self.cost.value(output).mean())

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Of `mean_cost`, for every trained parameter that it depends on."""
        trained = [p for p in self.case.names if p.requires_grad]
        states = {n: s.detach().requires_grad_() for n, s in self.states.items()}
        leaves, output = list(states.values()), self.energy.graph.output
        with torch.enable_grad():
            self.case.restore()
            cost = self.cost.value(states[output]).mean()
            of_cost = torch.autograd.grad(cost, [states[output], *trained], allow_unused=True)
            image = list(self.map(states).values())
            start = [of_cost[0] if n == output else torch.zeros_like(s) for n, s in states.items()]

            def step(v: list[Tensor]) -> list[Tensor]:
                back = torch.autograd.grad(image, leaves, v, retain_graph=True, materialize_grads=True)
                return [c + b for c, b in zip(start, back, strict=True)]

            if (v := iterated(step, start, self.energy.batch)) is None:
                raise DivergedError(
                    "verify: the equilibrium has no derivative: the largest eigenvalue of its coupling is 1 or more, "
                    "so that there are several equilibria. Way out: smaller weights."
                )
            through = torch.autograd.grad(image, trained, v, allow_unused=True)
        found = {}
        for p, *parts in zip(trained, of_cost[1:], through, strict=True):
            known = [g.to_dense().detach() for g in parts if g is not None]
            if known:
                found[p] = sum(known[1:], known[0])
        return found

    @torch.no_grad()
    def residuals(self, states: State, beta: float, free: State) -> Residuals:
        """Of every node: how far T is from where the state is, `|T(s) - s|`, over `|s - s_free|`; the larger of both.

        What the free phase has left is a constant part of the nudged energy, so that it cancels here. It counts as it
        does in the cost's gradient, which it changes by `L |T(s_free) - s_free|`, L the cost's smoothness, beside the
        displacement over beta.
        """
        found, batch, smoothness = {}, self.energy.batch, self.cost.smoothness
        share = abs(beta) * (1.0 if smoothness is None else min(1.0, float(smoothness)))

        def norm(t: Tensor) -> Tensor:
            return t.reshape(batch, -1).double().norm(dim=1)

        at_rest, nudged = self.map(free, 0.0, free), self.map(states, beta, free)
        for name, s in states.items():
            s0, left = free[name], at_rest[name] - free[name]
            side, other = s - s0, nudged[name] - s0 - left
            larger = torch.maximum(norm(side), norm(other)).clamp_min(torch.finfo(torch.float64).tiny)
            rounding = 10 * torch.finfo(s.dtype).eps * norm(s)
            found[name] = (norm(side - other) + share * norm(left)) / larger, rounding / larger
        return found

    def wrong_derivatives(self) -> tuple[str, ...]:
        """A sentence on a derivative of one's own energy that is not that of `energy`, at states far from rest."""
        own, generator = self.energy.node_energy, torch.Generator().manual_seed(0)
        if type(own) in NODE_ENERGIES.values():
            return ()
        for name, like in self.states.items():
            noise = torch.randn(2, *like.shape, generator=generator).to(like)
            mu = noise[0].requires_grad_()
            s = like if own.behind_activations else (noise[0] + noise[1]).clamp(*own.box)
            s, at = s.detach().requires_grad_(), own.at(self.energy.graph.by_name[name])
            with torch.enable_grad():
                wanted = torch.autograd.grad(at.energy(s, mu).sum(), [s, mu], materialize_grads=True)
            for method, given, right in zip(("ds", "dmu"), (at.ds(s, mu), at.dmu(s, mu)), wanted, strict=True):
                apart = float((given - right).detach().norm() / right.norm().clamp_min(torch.finfo(s.dtype).tiny))
                if not apart < CLOSE:
                    return (
                        f"{type(own).__name__}.{method} is {apart:.1e} from autograd's derivative of its `energy`, at "
                        f"random states of node `{name}`. Way out: mend it; `mep.Descent` and gradients use it.",
                    )
        return ()

    @torch.no_grad()
    def residual(self, phases: str, beta: float) -> Residual:
        """Of all phases of a contrast, the residual of the worst node."""
        found = self._settle(phases, beta)
        states = dict(found.free.states)
        each = [self.residuals(dict(p.states), p.beta.real * beta, states) for p in found.phases]
        return max(map(worst_of, each), key=lambda residual: residual.excess)

    def trace(self, beta: float) -> ResidualTrace:
        """As the solver measures it, in the course of one settling."""
        course = self._settle("one-sided", beta, record=True).nudged.course
        last = len(course) - 1
        made = [steps for steps in _SHOWN if steps < last] + [last] * (last > 0)
        curves = {name: tuple(float(course[steps][name].max()) for steps in made) for name in course[0]}
        return ResidualTrace(beta, tuple(made), curves)

    def all_settle(self, phases: Sequence[str], beta: float, solver: Solver) -> bool:
        """Whether every example settles in every phase."""
        try:
            return all(self._settle(name, beta, solver).estimate.converged for name in phases)
        except DivergedError:
            return False

    def _settle(self, phases: str, beta: float, solver: Solver | None = None, record: bool = False) -> Equilibrium:
        self.case.restore()
        return self.case.estimator(phases, beta, solver).settle(self.case.x, self.case.target, record=record)


def iterated(step: Callable[[list[Tensor]], list[Tensor]], x: list[Tensor], batch: int) -> list[Tensor] | None:
    """The fixed point of a map, by Anderson's acceleration of `x <- step(x)`; None if it is not found.

    Of the last maps and their residuals `f_i = g_i - x_i` the next point is the `g - sum_i c_i (g - g_i)` for which
    `|f - sum_i c_i (f - f_i)|` is least, with coefficients for each of the examples.
    """

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(batch, -1) for t in tensors], 1)

    def shaped(rows: Tensor) -> list[Tensor]:
        return [part.reshape(like.shape) for part, like in zip(rows.split(sizes, 1), x, strict=True)]

    sizes = [t.numel() // batch for t in x]
    at = flat(x)
    maps: list[Tensor] = []
    residuals: list[Tensor] = []
    for _ in range(_ITERATIONS):
        g = flat(step(shaped(at)))
        f = g - at
        if not f.isfinite().all():
            return None
        if (f.norm(dim=1) <= _TIGHT * torch.finfo(f.dtype).eps * g.norm(dim=1)).all():
            return shaped(g)
        at = g
        if residuals:
            changes = torch.stack([f - before for before in residuals], 2)
            driver = "gelsd" if f.is_cpu else None
            c = torch.linalg.lstsq(changes, f.unsqueeze(2), driver=driver).solution
            at = g - (torch.stack([g - before for before in maps], 2) @ c).squeeze(2)
        maps, residuals = [*maps[-_MEMORY:], g], [*residuals[-_MEMORY:], f]
    return None
