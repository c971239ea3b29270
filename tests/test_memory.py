"""What a step holds: gradients node by node with `low_memory=True`, and activations, whatever the number of sweeps."""

import copy
from collections import deque
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from cases import convolutional
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import mep
from mep.lab.timing import PeakMemory

WIDTH, BATCH = 64, 64
UNIT = WIDTH * BATCH * 4
"""Bytes of one activation."""


def network(depth, width=WIDTH, classes=10):
    torch.manual_seed(0)
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def batch(size=BATCH, width=WIDTH, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(size, width, dtype=dtype), torch.randint(3, (size,))


# Gradients: `low_memory=True`.


class Shared(nn.Module):
    """One weight is used by three nodes, one bias by two; a layer is frozen, and one part sees only the input."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.frozen, self.tied = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.twice.weight
        for p in self.frozen.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        h = h + self.frozen(self.twice(torch.tanh(self.twice(h))))
        return self.last(torch.relu(self.tied(h)))


MODELS = {"mlp": lambda: network(4, 6, 3), "convolutional": convolutional, "shared": Shared}
UPDATES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "muon": lambda params: mep.Muon(params, lr=0.02, weight_decay=0.1),
    "dion": lambda params: mep.Dion(params, lr=0.02, dion_threshold=0),
}
VARIANTS = {
    "one-sided": {},
    "centered": {"phases": "centered"},
    "hopfield": {"energy": "hopfield", "solver": mep.Descent(settle_steps=20, settle_lr=0.2)},
}


def pair(make, update, constraints: Sequence = (), **options):
    """The same optimizer twice, without and with `low_memory`; two groups, and one parameter in neither."""
    torch.manual_seed(0)
    model = make().double()
    found = []
    for low_memory in (False, True):
        net = copy.deepcopy(model)
        params = list(net.parameters())
        groups = [{"params": params[1::2]}, {"params": params[2::2], "lr": 0.05}]
        estimator = mep.EquilibriumPropagation(net, **options)
        found.append(mep.EPOptimizer(estimator, update(groups), constraints, low_memory=low_memory))
    return found


def numbers(state):
    """All tensors of an optimizer's `state_dict`, in order."""
    return [v for key in sorted(state["state"]) for v in state["state"][key].values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("model", MODELS)
def test_low_memory_trains_the_same(model, update):
    plain, lean = pair(MODELS[model], UPDATES[update], [mep.spectral_bound(0.5)])
    for step in range(3):
        x, y = batch(7, 6, torch.float64)
        losses = [opt.step(x=x + step, target=y) for opt in (plain, lean)]
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(list(lean.model.parameters()), list(plain.model.parameters()))
    torch.testing.assert_close(numbers(lean.state_dict()), numbers(plain.state_dict()))
    assert all(p.grad is None for p in lean.model.parameters())
    assert [len(g["params"]) for g in lean.param_groups] == [len(g["params"]) for g in plain.param_groups]


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_memory_trains_the_same_by_every_contrast(variant):
    model = "mlp" if variant == "hopfield" else "shared"
    plain, lean = pair(MODELS[model], UPDATES["sgd"], **VARIANTS[variant])
    x, y = batch(7, 6, torch.float64)
    for opt in (plain, lean):
        before = [p.detach().clone() for p in opt.model.parameters()]
        opt.step(x=x, target=y)
    assert not torch.equal(before[1], list(lean.model.parameters())[1])
    torch.testing.assert_close(list(lean.model.parameters()), list(plain.model.parameters()))


def test_pieces_are_the_gradient_each_parameter_once():
    net = Shared().double()
    ep, (x, y) = mep.EquilibriumPropagation(net), batch(7, 6, torch.float64)
    expected, _ = ep.gradients(x, y)
    pieces = list(mep.EquilibriumPropagation(net).iter_gradients(x, y)[0])
    found = [p for piece in pieces for p in piece]
    assert len(found) == len(set(found)) and set(found) == set(expected) == {
        p for p in net.parameters() if p.requires_grad
    }
    for piece in pieces:
        for p, g in piece.items():
            torch.testing.assert_close(g, expected[p])
    assert net.twice.weight in pieces[-2]  # with the last of the three nodes that use it


def test_low_memory_changes_nothing_if_a_late_gradient_is_not_finite(monkeypatch):
    opt = pair(MODELS["mlp"], UPDATES["sgd"])[1]
    x, y = batch(7, 6, torch.float64)
    opt.step(x=x, target=y)
    before = copy.deepcopy((list(opt.model.parameters()), opt.state_dict()))
    right, last = mep.graph.node.Node.__subclasses__()[1].param_vjp, opt.estimator._graphs.graphs[0].nodes[-1]

    def broken(self, saved, force, weight):
        return [g * float("nan") if self is last else g for g in right(self, saved, force, weight)]

    monkeypatch.setattr(type(last), "param_vjp", broken)
    with pytest.raises(mep.DivergedError, match="Nothing was changed"):
        opt.step(x=x, target=y)
    torch.testing.assert_close((list(opt.model.parameters()), opt.state_dict()), before, rtol=0, atol=0)


def test_low_memory_is_a_torch_citizen():
    """Its own hooks and schedulers count steps; those of the update count pieces; a copy steps alike."""
    opt = pair(MODELS["mlp"], UPDATES["sgd"])[1]
    counts = {"step": 0, "piece": 0}
    opt.register_step_post_hook(lambda *_: counts.update(step=counts["step"] + 1))
    opt.update.register_step_post_hook(lambda *_: counts.update(piece=counts["piece"] + 1))
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    x, y = batch(7, 6, torch.float64)
    opt.step(x=x, target=y)
    schedule.step()
    assert counts == {"step": 1, "piece": 5} and [g["lr"] for g in opt.param_groups] == [0.05, 0.025]
    twin = copy.deepcopy(opt)
    for one in (opt, twin):
        one.step(x=x, target=y)
    torch.testing.assert_close(list(twin.model.parameters()), list(opt.model.parameters()))
    assert all(p.grad is None for p in twin.model.parameters())


def test_groups_are_whole_again_after_an_update_that_fails():
    opt = pair(MODELS["mlp"], UPDATES["sgd"])[1]
    whole = [list(g["params"]) for g in opt.param_groups]

    def fail(*_):
        raise KeyboardInterrupt

    opt.update.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        opt.step(x=batch(7, 6, torch.float64)[0], target=batch(7, 6)[1])
    assert [[id(p) for p in g["params"]] for g in opt.param_groups] == [[id(p) for p in ps] for ps in whole]
    assert all(p.grad is None for p in opt.model.parameters())


class Coupled(torch.optim.SGD):
    couples_parameters = True


def test_low_memory_refuses_what_needs_all_gradients():
    net, sgd = network(2, 6, 3), UPDATES["sgd"]
    ep = mep.EquilibriumPropagation(net)
    opt = mep.EPOptimizer(ep, sgd(net.parameters()), low_memory=True)
    for call in (opt.step, lambda: opt.step(lambda: 0.0)):
        with pytest.raises(mep.ArgumentError, match="low_memory=True makes its own gradients"):
            call()
    with pytest.raises(mep.ArgumentError, match=r"Backprop.*all gradients at once"):
        mep.EPOptimizer(mep.Backprop(net), sgd(net.parameters()), low_memory=True)
    with pytest.raises(mep.ArgumentError, match="Leave out low_memory or compile"):
        mep.eqprop(net.parameters(), model=net, compile=True, low_memory=True)
    with pytest.raises(mep.ArgumentError, match=r"Coupled.*all gradients at once"):
        mep.EPOptimizer(ep, Coupled(net.parameters(), lr=0.1), low_memory=True)


@pytest.mark.parametrize("preset", [mep.eqprop, mep.smep, mep.smep_fast, mep.sdmep, mep.O1MemoryEPv2, mep.local_ep])
def test_presets_hand_it_on(preset):
    net = network(2, 6, 3)
    opt = preset(net.parameters(), model=net, low_memory=True)
    opt.step(x=batch(7, 6)[0], target=batch(7, 6)[1])
    assert opt.low_memory and all(p.grad is None for p in net.parameters())


def gradient_bytes(low_memory):
    """The peak of a step that settles a batch of two, whose activations are small, beside that of settling alone."""
    net, (x, y) = network(20), batch(2)
    ep = mep.EquilibriumPropagation(net)
    opt = mep.EPOptimizer(ep, torch.optim.SGD(net.parameters(), lr=1e-3), low_memory=low_memory)
    opt.step(x=x, target=y)
    with PeakMemory() as memory:
        opt.step(x=x, target=y)
    return memory.peak


def test_low_memory_holds_the_gradient_of_one_node():
    net = network(20)
    node, every = (sum(p.numel() * 4 for p in m.parameters()) for m in (net[0], net))
    assert gradient_bytes(False) > every
    activations = 6 * 20 * 2 * WIDTH * 4
    assert node < gradient_bytes(True) < 1.1 * node + activations < every / 4


# Activations. Peaks without the gradients: those of a step that makes them node by node, with one node's among them.


def peak_of_settling(depth, **options):
    """Bytes, while a step settles and makes its gradients one after the other."""
    net, (x, y) = network(depth), batch()
    solver = mep.Sweep(settle_steps=options.pop("sweeps"), adaptive=False)
    ep = mep.EquilibriumPropagation(net, solver=solver, **options)
    ep.gradients(x, y)  # the first step also checks the graph
    with PeakMemory() as memory:
        deque(ep.iter_gradients(x, y)[0], maxlen=0)
    return memory.peak


def peak_of_backprop(forward, depth):
    """Bytes, where the gradients have a place already."""
    net, (x, y) = network(depth), batch()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with PeakMemory() as memory:
        F.cross_entropy(forward(net, x), y).backward()
    return memory.peak


@pytest.mark.parametrize("depth", [10, 100])
def test_a_sweep_holds_three_numbers_a_unit(depth):
    """Backprop holds one. The output and its last errors are small, and one node's gradient is as large as a layer."""
    few, many = (peak_of_settling(depth, sweeps=n) for n in (2, 8))
    assert 3 * depth * UNIT < few < (3 * depth + 5) * UNIT
    assert many - few < 8 * UNIT  # the last outputs, their errors and gradients
    assert few < 3.6 * peak_of_backprop(lambda net, x: net(x), depth)


def test_a_checkpointed_step_holds_the_cube_root_of_the_depth():
    peaks = {depth: peak_of_settling(depth, sweeps=2, checkpoint=True) for depth in (30, 100, 300)}
    assert all(peak < 6.5 * depth ** (1 / 3) * UNIT for depth, peak in peaks.items())
    assert peaks[300] - peaks[100] < 10 * UNIT
    assert peaks[100] < 0.3 * peak_of_backprop(lambda net, x: net(x), 100)
    segments = round(300**0.5)
    plain = peak_of_backprop(lambda net, x: checkpoint_sequential(net, segments, x, use_reentrant=False), 300)
    assert peaks[300] < plain


class Residual(nn.Module):
    """Values with two readers, and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        h = self.first(x)
        for block in [*self.blocks, self.blocks[0]]:
            h = h + block(torch.relu(h))
        return self.last(torch.relu(h))


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("make", [lambda: network(9, 6, 3), convolutional, Residual], ids=["mlp", "conv", "residual"])
def test_checkpoint_finds_the_same(make, phases):
    torch.manual_seed(0)
    net, (x, y) = make().double(), batch(7, 6, torch.float64)
    found = []
    for checkpoint in (False, True):
        options = {"phases": phases, "solver": mep.Sweep(tol=1e-8), "checkpoint": checkpoint}
        found.append(mep.EquilibriumPropagation(net, beta=0.05, **options).gradients(x, y))
    (expected, plain), (gradients, estimate) = found
    assert estimate.converged and estimate.iterations == plain.iterations > 1
    torch.testing.assert_close(estimate.residual, plain.residual, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(estimate.loss, plain.loss)
    assert set(gradients) == set(expected)
    for p, g in expected.items():
        torch.testing.assert_close(gradients[p], g)


def test_checkpoint_and_low_memory_train_the_same():
    plain, _ = pair(MODELS["mlp"], UPDATES["sgd"])
    _, lean = pair(MODELS["mlp"], UPDATES["sgd"], checkpoint=True)
    x, y = batch(7, 6, torch.float64)
    for _ in range(3):
        plain.step(x=x, target=y)
        lean.step(x=x, target=y)
    torch.testing.assert_close(list(lean.model.parameters()), list(plain.model.parameters()))


@pytest.mark.parametrize(
    "options",
    [{"solver": mep.Descent()}, {"branches": "exact"}, {"compile": True}, {"diagnostics": True}, {"observe": print}],
    ids=lambda options: next(iter(options)),
)
def test_checkpoint_refuses_what_needs_all_states(options):
    with pytest.raises(mep.ArgumentError, match=r"checkpoint=True, .* Leave out one of the two"):
        mep.EquilibriumPropagation(network(2, 6, 3), checkpoint=True, **options)


def test_checkpoint_refuses_graphs_that_are_not_affine():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    ep = mep.EquilibriumPropagation(net, checkpoint=True)
    with pytest.raises(mep.ArgumentError, match=r"the Jacobian of \['2'\] changes with the state"):
        ep(*batch(7, 6))
    assert all(p.grad is None for p in net.parameters())
