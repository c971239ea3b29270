"""Block relaxation settles Hopfield networks: against dense solves, L-BFGS and implicit differentiation in float64."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, free_energy, mlp
from reference import energy as energy_of
from reference import forces, implicit_gradient, predictions_of_graph
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import Free, nudge
from mep.estimators import equilibrium
from mep.settle import Result, settle
from mep.solvers.relaxation import Displacement

TIGHT = mep.Relaxation(tol=1e-11, settle_steps=500)


class Skip(nn.Module):
    """A skip before an activation, one behind it, a state read by two layers, and two parents of one layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.last = (nn.Linear(m, n) for m, n in ((6, 8), (8, 8), (8, 8), (8, 3)))

    def forward(self, x):
        h = F.hardtanh(self.one(x), 0, 1)
        g = F.relu6(self.two(h) + h)
        return self.last(torch.clamp(self.three(g), 0, 1) + h)


class Shared(nn.Module):
    """One layer used twice, and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.one, self.shared, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = F.hardtanh(self.one(x), 0, 1)
        h = F.hardtanh(self.shared(h), 0, 1)
        return self.last(F.hardtanh(self.shared(h), 0, 1))


class Triangle(nn.Module):
    """Three layers, each coupled to both others."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(8, 3), nn.Linear(7, 3)

    def forward(self, x):
        h = F.hardtanh(self.one(x), 0, 1)
        return self.left(h) + self.right(F.hardtanh(self.two(h), 0, 1))


def convolution(*layers):
    return lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *(make() for make in layers))


NETWORKS = {
    "hard sigmoid": (lambda: mlp(lambda: nn.Hardtanh(0.0, 1.0), 6, 8, 7, 3), 6),
    "hardtanh": (lambda: mlp(nn.Hardtanh, 6, 8, 7, 3), 6),
    "relu": (lambda: mlp(nn.ReLU, 6, 8, 3), 6),
    "relu6": (lambda: mlp(nn.ReLU6, 6, 8, 7, 3), 6),
    "skip": (Skip, 6),
    "triangle": (Triangle, 6),
    "shared": (Shared, 6),
    "max pooling": (
        convolution(
            lambda: nn.Conv2d(1, 3, 3, padding=1), lambda: nn.Hardtanh(0.0, 1.0), lambda: nn.MaxPool2d(2),
            lambda: nn.Conv2d(3, 4, 2), nn.ReLU6, nn.Flatten, lambda: nn.Linear(16, 3),
        ),
        36,
    ),
    "max pooling first": (
        convolution(
            lambda: nn.Conv2d(1, 3, 3, padding=1), lambda: nn.Hardtanh(0.0, 1.0),
            lambda: nn.Conv2d(3, 4, 3, padding=1, stride=1), lambda: nn.MaxPool2d(3), lambda: nn.Hardtanh(0.0, 1.0),
            nn.Flatten, lambda: nn.Linear(16, 3),
        ),
        36,
    ),
    "average pooling, grouped": (
        convolution(
            lambda: nn.Conv2d(1, 4, 3), lambda: nn.Hardtanh(0.0, 1.0), lambda: nn.AvgPool2d(2),
            lambda: nn.Conv2d(4, 4, 2, groups=2), lambda: nn.Hardtanh(0.0, 1.0), nn.Flatten, lambda: nn.Linear(4, 3),
        ),
        36,
    ),
    "batch normalisation": (
        convolution(
            lambda: nn.Conv2d(1, 3, 3), lambda: nn.BatchNorm2d(3), lambda: nn.Hardtanh(0.0, 1.0),
            lambda: nn.Conv2d(3, 4, 3, stride=2), lambda: nn.BatchNorm2d(4), lambda: nn.Hardtanh(0.0, 1.0),
            nn.Flatten, lambda: nn.Linear(4, 3),
        ),
        36,
    ),
}  # fmt: skip


def build(name, cost="mse", batch=5, scale=0.7):
    """A network whose couplings are weak enough for one equilibrium, an input and a target, float64."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    for p in model.parameters():
        p.data.mul_(scale if p.ndim > 1 else 1.0)
        p.data.add_(0.2 if p.ndim == 1 else 0.0)
    if name == "max pooling":  # winners that are pushed down give way to others: there is no equilibrium but on a kink
        model[4].weight.data.abs_().mul_(0.5)
    x = torch.rand(batch, size).double()
    return model, x, COSTS[cost].target(torch.zeros(batch, 3).double())


@torch.no_grad()
def free_states(energy, point, solver):
    """Where the free phase ends that begins at a point."""
    settled = settle(energy, point, solver)
    assert settled.result is Result.CONVERGED
    return {n: s.contiguous() for n, s in energy.state(settled.point).items()}


class Written:
    """The Hopfield energy of a batch written down: its free equilibrium, and nudged ones with the same faces held."""

    def __init__(self, model, x, y, cost):
        self.model, self.batch, self.y = model, len(x), y
        self.cost = COSTS[cost].value
        energy, point = free_energy(model, x, "hopfield")
        self.graph, self.inputs = energy.graph, energy.inputs
        self.boxes = {node.name: node.box for node in energy.graph.states}
        found = free_states(energy, point, TIGHT)
        self.inside = {n: (s > self.boxes[n][0]) & (s < self.boxes[n][1]) for n, s in found.items()}
        predict = predictions_of_graph(self.graph, self.inputs)
        self.free_energy = lambda s: energy_of(predict, s, "hopfield")
        self.free = self.solve(self.free_energy, found)
        held = predictions_of_graph(self.graph, self.inputs, free=self.free)
        self.held_energy = lambda s: energy_of(held, s, "hopfield")

    def solve(self, total, states):
        """Newton's method over the units inside their boxes, all at once."""
        flat = torch.cat([s.flatten() for s in states.values()])
        (inside,) = torch.cat([m.flatten() for m in self.inside.values()]).nonzero(as_tuple=True)

        def unpack(part):
            whole = flat.index_put((inside,), part)
            sizes = [s.numel() for s in states.values()]
            return {n: v.view_as(s) for (n, s), v in zip(states.items(), whole.split(sizes), strict=True)}

        part = flat[inside]
        for _ in range(6):
            summed = lambda p: total(unpack(p)).sum()  # noqa: E731
            gradient = torch.autograd.functional.jacobian(summed, part)
            step = torch.linalg.solve(torch.autograd.functional.hessian(summed, part, vectorize=True), gradient)
            part = part - step
            if step.norm() <= 1e-14 * part.norm():
                break
        return unpack(part.detach())

    def contrast(self, *multiples_and_weights):
        """`sum w_k dE/dtheta(s_k)`, the mean over the batch; rows are (beta_k, w_k)."""
        parameters = list(self.model.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        for beta, weight in multiples_and_weights:
            value = lambda s, beta=beta: self.held_energy(s) + beta * self.cost(s[self.graph.output], self.y)  # noqa: E731
            s = self.free if beta == 0 else self.solve(value, self.free)
            mean = self.held_energy(s).sum() / self.batch
            for t, g in zip(total, torch.autograd.grad(mean, parameters, allow_unused=True), strict=True):
                t += 0 if g is None else weight * g
        return total

    def one_sided(self, beta):
        return self.contrast((0.0, -1 / beta), (beta, 1 / beta))

    def exact(self):
        """The derivative of the free equilibrium's mean cost, by implicit differentiation."""
        cost = lambda s: self.cost(s[self.graph.output], self.y)  # noqa: E731
        return implicit_gradient(self.free_energy, cost, self.free, list(self.model.parameters()), self.boxes)


def gradients(model, x, y, cost, betas, solver=None, **settings):
    """The gradient at each beta in turn, and its estimate; the model is read once."""
    ep = mep.EquilibriumPropagation(
        model, COSTS[cost].argument, solver=solver, energy="hopfield", on_unsettled="ignore", **settings
    )
    for ep.beta in betas:
        found, estimate = ep.gradients(x, y)
        yield [found[p] for p in model.parameters()], estimate


def gradient(model, x, y, cost, beta, solver=None, **settings):
    return next(gradients(model, x, y, cost, [beta], solver, **settings))


def distance(found, exact):
    found, exact = (torch.cat([g.flatten().double() for g in gs]) for gs in (found, exact))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("phases", "order"), [("one-sided", 1), ("centered", 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_error_falls_with_beta_as_the_order_promises(name, phases, order, cost):
    model, x, y = build(name, cost)
    exact, errors, betas = Written(model, x, y, cost).exact(), [], (0.1, 0.05)
    for beta, (found, estimate) in zip(betas, gradients(model, x, y, cost, betas, TIGHT, phases=phases), strict=True):
        assert estimate.converged and estimate.beta == beta
        errors.append(distance(found, exact))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15 * order
    assert errors[1] < 0.2


@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_single_precision_any_beta_keeps_its_digits(name, cost):
    """Within 5 tol of the contrast at that beta wherever "converged" is said, and it is said in 9 of 10."""
    model, x, y = build(name, cost)
    written, single = Written(model, x, y, cost), copy.deepcopy(model).float()
    target = y.float() if y.is_floating_point() else y
    certified, betas = [], (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    for beta, (found, estimate) in zip(betas, gradients(single, x.float(), target, cost, betas), strict=True):
        if estimate.converged:
            certified.append(beta)
            # In float64 a difference of two equilibria keeps enough digits down to 1e-5.
            assert distance(found, written.one_sided(max(beta, 1e-5))) < 5e-2, beta
    assert len(certified) >= 5


def test_strong_nudges_are_as_asked():
    model, x, y = build("hard sigmoid", "cross_entropy")
    written, betas = Written(model, x, y, "cross_entropy"), (0.5, 2.0, 20.0)
    for beta, (found, estimate) in zip(betas, gradients(model, x, y, "cross_entropy", betas, TIGHT), strict=True):
        assert estimate.converged and distance(found, written.one_sided(beta)) < 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_free_equilibrium_is_that_of_lbfgs(name):
    model, x, y = build(name)
    written = Written(model, x, y, "mse")
    energy, point = free_energy(model, x, "hopfield")
    found = free_states(energy, point, mep.Relaxation(tol=1e-9))
    # L-BFGS over the units inside their boxes, from zero
    start = {n: torch.zeros_like(s) for n, s in found.items()}
    total = written.held_energy if "max" in name else written.free_energy  # other winners, other equilibria
    free = {n: s.clone().requires_grad_() for n, s in start.items()}
    inside = {n: m.double() for n, m in written.inside.items()}
    states = lambda: {n: inside[n] * u + (1 - inside[n]) * found[n] for n, u in free.items()}  # noqa: E731
    optimizer = torch.optim.LBFGS(list(free.values()), max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = total(states()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    for name_, s in states().items():
        torch.testing.assert_close(s.detach(), found[name_], rtol=1e-6, atol=1e-6)
    # and no force leads from a face into the box
    for n, g in forces(written.free_energy, found).items():
        s, (low, high) = found[n], written.boxes[n]
        assert g.masked_fill(((s <= low) & (g > 0)) | ((s >= high) & (g < 0)), 0).abs().max() < 1e-7


def assert_starts_agree(model, x):
    """The free equilibria from zeros, ones and noise."""
    energy, point = free_energy(model, x, "hopfield")
    ends = []
    for make in (torch.zeros_like, torch.ones_like, torch.rand_like):
        with torch.no_grad():
            start = energy.at({n.name: make(point.values[n.name]) for n in energy.graph.states})
        ends.append(free_states(energy, start, mep.Relaxation(tol=1e-9)))
    for end in ends[1:]:
        for n, s in end.items():
            torch.testing.assert_close(s, ends[0][n], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["hard sigmoid", "hardtanh", "relu6", "average pooling, grouped"])
def test_starts_from_zeros_ones_and_noise_agree(name):
    model, x, y = build(name, scale=0.4)
    assert gradient(model, x, y, "mse", 1e-3)[1].coupling < 0.9
    assert_starts_agree(model, x)


@pytest.mark.parametrize("branches", ["held", "exact"])
@pytest.mark.parametrize("sweeps", [1, 2, 5])
@torch.no_grad()
def test_residual_in_displacements_is_that_of_the_energy(branches, sweeps):
    """The same number from displacements as from states, where states have digits enough for it."""
    model, x, y = build("hard sigmoid", "mse")
    energy, point = free_energy(model, x, "hopfield")
    free = settle(energy, point, mep.Relaxation(tol=1e-3)).point
    forces = energy.forces(free)
    noted = {}
    for node in energy.graph.states:
        s, force = free.values[node.name], forces[node.name]
        noted[node.name] = Free(s, torch.where(s == (s - force).clamp(*node.box), 0, force))
    energy.context.freeze_branches = branches == "held"
    for beta in (0.5, 0.05):
        nudged = nudge(energy, make_cost("mse")(energy.output(free), y), beta, noted)
        moved = Displacement(nudged, free)
        for _ in range(sweeps):
            moved.sweep(1.1)
        assert moved.residuals().keys() == noted.keys()
        of_states = nudged.residuals(energy.at(energy.state(moved.point)))
        moved.left = {n: nudged.free_share / beta * f.leftover.norm(dim=1) for n, f in noted.items()}
        for name, r in moved.residuals().items():
            torch.testing.assert_close(r, of_states[name], rtol=1e-5, atol=1e-9)


def test_no_equilibrium_is_reported_and_never_a_huge_number():
    model, x, y = build("hard sigmoid", "mse")
    small, _ = gradient(model, x, y, "mse", 1e-3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    found, estimate = gradient(model, x, y, "mse", 1e-3)
    assert torch.cat([g.flatten() for g in found]).norm() < 1e3 * torch.cat([g.flatten() for g in small]).norm()
    assert estimate.converged or not estimate.settled.all()
    # away from the target by more than the energy holds back: C'' = 2/3
    model, x, y = build("hard sigmoid", "mse")
    with pytest.raises(mep.NotConvergedError):
        mep.EquilibriumPropagation(
            model, "mse", 2.0, energy="hopfield", phases="centered", on_unsettled="raise"
        ).gradients(x, y)


def test_an_indefinite_coupling_is_not_called_converged():
    """Two layers of ReLU without an upper face, coupled by an eigenvalue above one."""
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 3, 4, 4, 2).double()
    with torch.no_grad():
        model[2].weight.copy_(1.5 * torch.eye(4))
        model[0].bias.fill_(1.0)
    ep = mep.EquilibriumPropagation(model, energy="hopfield", on_unsettled="raise")
    with pytest.raises((mep.DivergedError, mep.NotConvergedError)):
        ep.gradients(torch.rand(3, 3).double(), torch.tensor([0, 1, 0]))


def test_the_coupling_and_the_boxes_are_reported_and_warned_of():
    model, x, y = build("hard sigmoid", "mse")
    _, estimate = gradient(model, x, y, "mse", 1e-3)
    written = Written(model, x, y, "mse")
    count = [m for n, m in written.inside.items() if n != written.graph.output]
    share = sum(int(m.sum()) for m in count) / sum(m.numel() for m in count)
    assert math.isclose(estimate.inside, share)
    flat = torch.cat([s.flatten() for s in written.free.values()])
    sizes, inside = (
        [s.numel() for s in written.free.values()],
        torch.cat([m.flatten() for m in written.inside.values()]),
    )
    unpack = lambda f: {n: v.view_as(s) for (n, s), v in zip(written.free.items(), f.split(sizes), strict=True)}  # noqa: E731
    summed = lambda f: written.free_energy(unpack(f)).sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(summed, flat, vectorize=True)[inside][:, inside]
    largest = float(1 - torch.linalg.eigvalsh(hessian).min())
    assert 0.9 * largest < estimate.coupling <= largest * (1 + 1e-9)
    with torch.no_grad():
        model[0].bias.fill_(100.0)
        model[2].bias.fill_(100.0)
    with pytest.warns(UserWarning, match="inside their boxes"):
        mep.EquilibriumPropagation(model, "mse", energy="hopfield")(x, y)


@pytest.mark.parametrize("preset", [mep.eqprop, mep.smep, mep.smep_fast, mep.sdmep])
def test_presets_need_nothing_but_the_energy(preset):
    torch.manual_seed(0)
    model = mlp(lambda: nn.Hardtanh(0.0, 1.0), 8, 32, 3)
    x = torch.rand(64, 8)
    y = x[:, :3].argmax(1)
    optimizer = preset(model.parameters(), model=model, energy="hopfield")
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            losses.append(float(optimizer.step(x=x, target=y)))
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.last.residual is not None and optimizer.last.coupling is not None


def test_what_is_carried_over_is_neither_compared_nor_pickled():
    solver = mep.Relaxation()
    model, x, y = build("hard sigmoid", "mse")
    gradient(model, x, y, "mse", 1e-3, solver)
    assert solver.memory.gains and solver == mep.Relaxation()
    for twin in (pickle.loads(pickle.dumps(solver)), copy.deepcopy(solver)):
        assert twin == solver and not twin.memory.gains


def _trained(steps, between=lambda model, optimizer, x, y: None, start=None):
    """A Hopfield network after some steps, or continued from where another one had come."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Hardtanh(0, 1), nn.Linear(16, 16), nn.Hardtanh(0, 1), nn.Linear(16, 3))
    optimizer = mep.eqprop(model.parameters(), model=model.double(), energy="hopfield")
    if start:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
    made = torch.Generator().manual_seed(1)
    data = [(torch.rand(12, 8, generator=made).double(), torch.randint(3, (12,), generator=made)) for _ in range(24)]
    for x, y in data[steps]:
        optimizer.step(x=x, target=y)
        between(model, optimizer, *data[-1])
    return model, optimizer


LOOKS = {
    "settle": lambda model, optimizer, x, y: optimizer.estimator.settle(x, y),
    "record": lambda model, optimizer, x, y: optimizer.estimator.settle(3 * x, y, record=True),
    "predict": lambda model, optimizer, x, y: optimizer.predict(10 * x),
}


@pytest.mark.parametrize("look", LOOKS)
def test_training_is_the_same_whatever_is_looked_at_in_between(look):
    (plain, _), (seen, _) = _trained(slice(0, 20)), _trained(slice(0, 20), LOOKS[look])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), seen.parameters(), strict=True))


def _refused(model, optimizer, x, y):
    """Steps that raise: one that has not settled, and one that is interrupted."""
    ep = optimizer.estimator
    ep.on_unsettled, ep.phases, ep.beta = "raise", "centered", 1e3  # away from the target there is no equilibrium
    with pytest.raises(mep.NotConvergedError):
        optimizer.step(x=3 * x, target=y)
    ep.on_unsettled, ep.phases, ep.beta = "warn", "one-sided", None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(equilibrium, "total_gradient", _interrupted)
        optimizer.step(x=2 * x, target=y)


def _interrupted(*_):
    raise KeyboardInterrupt


def test_refused_steps_leave_what_the_solver_carries_as_it_was():
    (plain, _), (refused, _) = _trained(slice(0, 20)), _trained(slice(0, 20), _refused)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), refused.parameters(), strict=True))


@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_training_is_continued_bit_for_bit(way):
    whole, _ = _trained(slice(0, 20))
    model, optimizer = _trained(slice(0, 10))
    if way == "deepcopy":
        state = copy.deepcopy(optimizer)
        found = state.model.state_dict(), state.state_dict()
    else:
        found = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed, _ = _trained(slice(10, 20), start=found)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_products_of_states_are_relaxed_as_states():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(0.5 * F.hardtanh(self.one(x), 0, 1) * F.hardtanh(self.two(x), 0, 1))

    torch.manual_seed(0)
    model, x, y = Gated().double(), torch.rand(5, 4).double(), torch.randint(3, (5,))
    found, estimate = gradient(model, x, y, "cross_entropy", 1e-2, mep.Relaxation(tol=1e-8))
    slow, of_descent = gradient(
        model, x, y, "cross_entropy", 1e-2, mep.Descent(5000, settle_lr=0.2, adaptive=True, tol=1e-8)
    )
    assert estimate.converged and of_descent.converged and distance(found, slow) < 1e-5


def test_only_hopfield_networks():
    with pytest.raises(mep.ArgumentError, match="layer by layer"):
        mep.EquilibriumPropagation(mlp(nn.ReLU, 4, 5, 3), solver=mep.Relaxation())
    with pytest.raises(mep.ArgumentError, match="omega"):
        mep.Relaxation(omega=2.0)


def test_negative_curvature_is_given_up():
    """Relaxation diverges there: it is not called converged, and nothing is huge."""
    torch.manual_seed(0)
    model = mlp(lambda: nn.Hardtanh(-1e3, 1e3), 3, 4, 4, 2).double()
    with torch.no_grad():
        model[2].weight.copy_(0.5 * torch.eye(4))
    x, y = torch.rand(3, 3).double(), torch.tensor([0, 1, 0])
    sound, _ = gradient(model, x, y, "cross_entropy", 1e-3)
    free = free_energy(model, x, "hopfield")
    energy, point = free[0], free[1]
    with torch.no_grad():
        point = settle(energy, point, TIGHT).point
        forces = energy.forces(point)
        noted = {n: Free(point.values[n], torch.zeros_like(f)) for n, f in forces.items()}
        model[2].weight.copy_(1.5 * torch.eye(4))  # seen by the nudged phase alone
        energy.context.freeze_branches = True
        nudged = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), 1e-3, noted)
        found = settle(nudged, point, mep.Relaxation())
    assert found.result is not Result.CONVERGED
    sizes = [float(d.norm()) for d in found.point.displacement.delta.values()]
    assert max(sizes) < 1e3 * torch.cat([g.flatten() for g in sound]).norm()


def rows_of_layers(model, x, y, **given):
    """What a natural gradient observes, and the gradient of the same step."""
    seen = []
    ep = mep.EquilibriumPropagation(model, "one_hot_mse", energy="hopfield", observe=seen.extend, **given)
    gradients, estimate = ep.gradients(x, y)
    assert estimate.converged
    return seen, gradients


@pytest.mark.parametrize("given", [{"solver": TIGHT}, {"solver": TIGHT, "phases": "centered"}, {"solver": mep.Descent(
    settle_steps=3000, settle_lr=0.3, tol=1e-9, adaptive=True), "beta": 0.01}])  # fmt: skip
@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(lambda: nn.Hardtanh(0.0, 1.0), 36, 8, 7, 3),
        convolution(
            lambda: nn.Conv2d(1, 4, 3), lambda: nn.MaxPool2d(2), nn.ReLU6, nn.Flatten, lambda: nn.Linear(16, 3)
        ),
    ],
)
def test_a_layer_on_the_input_is_observed_as_its_gradient(make, given):
    """Its input does not move, so that errors and inputs make the whole gradient; of one phase, or of two."""
    torch.manual_seed(0)
    model, x, y = make().double(), torch.rand(5, 36).double(), torch.tensor([0, 1, 2, 0, 1])
    seen, gradients = rows_of_layers(model, x, y, **given)
    first = next(p for p in model.parameters() if p.ndim > 1)
    layer = next(layer for layer in seen if layer.weight is first)
    inputs, errors = layer.rows()
    whole = (errors.T @ inputs / layer.examples).view_as(first)
    assert len(seen) == sum(p.ndim > 1 for p in model.parameters())
    assert distance({first: whole}, {first: gradients[first]}) < 1e-6


@pytest.mark.parametrize("preset", ["eqprop", "smep", "smep_fast", "sdmep", "natural_ep"])
def test_presets_train_with_nothing_else_given(preset):
    torch.manual_seed(0)
    x, y = torch.rand(256, 20), torch.arange(256) % 4
    x[torch.arange(256), y] += 1.0
    net = nn.Sequential(nn.Linear(20, 32), nn.Hardtanh(0, 1), nn.Linear(32, 4))
    opt = getattr(mep, preset)(net.parameters(), model=net, energy="hopfield")
    for i in range(120):
        rows = torch.arange(32 * i, 32 * i + 32) % 256
        opt.step(x=x[rows], target=y[rows])
    assert opt.last.converged and opt.predict(x).argmax(1).eq(y).float().mean() > 0.9


@pytest.mark.parametrize("omega", [0.8, 1.0, 1.2, 1.6])
def test_exact_boxes_settle_with_any_omega_at_the_same_point(omega):
    """The outward pull on a face is relaxed with all other pulls."""
    torch.manual_seed(3)
    model = mlp(lambda: nn.Hardtanh(0.0, 1.0), 5, 9, 8, 4).double()
    x, y = torch.rand(4, 5).double(), torch.tensor([0, 1, 2, 3])

    def at(omega):
        solver = mep.Relaxation(adaptive=False, settle_steps=400, omega=omega)
        given = {"energy": "hopfield", "branches": "exact", "beta": 0.1, "solver": solver}
        return mep.EquilibriumPropagation(model, "one_hot_mse", **given).gradients(x, y)

    (found, estimate), (plain, _) = at(omega), at(1.0)
    assert estimate.residual.max() < 1e-12 and distance(found, plain) < 1e-10


@pytest.mark.parametrize(
    ("make", "scale"),
    [(nn.Sigmoid, 10.0), (nn.Tanh, 3.0), (lambda: nn.Softmax(-1), 10.0), (lambda: nn.Hardtanh(0.0, 1.0), 0.7)],
)
@pytest.mark.parametrize("seed", range(4))
def test_examples_whose_displacements_are_small_settle_too(make, scale, seed):
    """The free phase is settled beside the smallest displacements of late, saturated units among them."""
    torch.manual_seed(seed)
    model = mlp(make, 5, 9, 8, 4)
    for p in model.parameters():
        p.data.mul_(scale)
    x, y = torch.rand(4, 5), torch.eye(4)
    steady = mep.Relaxation(adaptive=False, settle_steps=60)
    if gradient(model, x, y, "mse", None, steady)[1].residual.max() > 1e-4:
        return  # there are several equilibria
    ep = mep.EquilibriumPropagation(model, "one_hot_mse", energy="hopfield", on_unsettled="ignore")
    estimates = [ep.gradients(x, y)[1] for _ in range(4)]
    assert estimates[-1].converged


def test_patience_takes_so_many_more_sweeps():
    model, x, y = build("hard sigmoid")
    found = []
    for patience in (1, 2, 3):
        ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield", solver=mep.Relaxation(patience=patience))
        ep.gradients(x, y)
        found.append(ep.gradients(x, y)[1].iterations)
    assert found == [found[0], found[0] + 1, found[0] + 2]


@pytest.mark.parametrize("steepness", [1.0, 50.0, 5000.0])
def test_the_default_beta_falls_with_the_curvature_of_a_cost_of_ones_own(steepness):
    """A thousandth, over its largest eigenvalue if that exceeds 1; measured along the gradient."""
    model, x, y = build("hard sigmoid")
    cost = lambda out, target: steepness * (out - target).square().sum(1) / 2  # noqa: E731
    ep = mep.EquilibriumPropagation(model, cost, energy="hopfield")
    assert ep.gradients(x, y)[1].beta == pytest.approx(0.001 / max(1.0, steepness), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_strong_couplings_are_called_converged_only_within_five_tolerances(scale):
    """Errors are residuals over 1 - mu: the tolerance falls with it, from the first batch on."""
    torch.manual_seed(0)
    sizes = nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)
    model = nn.Sequential(*sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    x, y, twin = torch.rand(16, 20), torch.arange(16) % 4, copy.deepcopy(model).double()
    given = {"beta": 0.1, "energy": "hopfield", "on_unsettled": "ignore"}
    ep = mep.EquilibriumPropagation(model, "one_hot_mse", solver=mep.Relaxation(settle_steps=400), **given)
    exact = mep.EquilibriumPropagation(twin, "one_hot_mse", solver=mep.Relaxation(1000, 1e-9), **given)
    wanted, _ = exact.gradients(x.double(), y)
    found = []
    for _ in range(3):
        gradients, estimate = ep.gradients(x, y)
        if estimate.converged:
            found.append(distance([g.double() for g in gradients.values()], list(wanted.values())))
    assert found and max(found) < 5e-2
    assert estimate.coupling > 0.9 and estimate.tol < 0.01
