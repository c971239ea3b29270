"""Networks at rest with some units held: against projected gradient descent on the energy, written down; float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import inhibiting
from reference import energy as energy_of
from reference import forces, predictions_of_graph
from test_relaxation import NETWORKS, build
from torch import nn

import mep
from mep.capture import capture

TIGHT = mep.Relaxation(tol=1e-9, settle_steps=2000)
DESCENT = mep.Descent(20000, settle_lr=0.2, adaptive=True, tol=1e-9)


class Written:
    """The energy of states and of the inputs that are free, `1/2 |x|^2` added, and the bounds of all of them."""

    def __init__(self, model, x, free, box, groups=()):
        self.graph = capture(model, x, energy="hopfield")
        self.inputs = dict(zip(self.graph.inputs, x if isinstance(x, tuple) else (x,), strict=True))
        self.free, self.groups = free, groups
        self.boxes = {node.name: node.box for node in self.graph.states} | dict.fromkeys(free, box)

    def __call__(self, states):
        predict = predictions_of_graph(self.graph, {**self.inputs, **{n: states[n] for n in self.free}})
        own = {n: s for n, s in states.items() if n not in self.free}
        squares = sum(0.5 * states[n].square().flatten(1).sum(1) for n in self.free)
        more = sum(group.energy(*(states[n] for n in group.nodes)) for group in self.groups)
        return energy_of(predict, own, "hopfield") + squares + more

    def bounds(self, states, held):
        """The lowest and highest value of every unit: its own where it is held."""
        found = {}
        for name, s in states.items():
            low, high = (torch.full_like(s, bound) for bound in self.boxes[name])
            mask = held.get(name, torch.zeros_like(s, dtype=torch.bool))
            found[name] = torch.where(mask, s, low), torch.where(mask, s, high)
        return found

    def drawn(self, states, held):
        """By how much each unit would move along its force, inside its bounds."""
        bounds, pulled = self.bounds(states, held), forces(self, states)
        return {n: (s - pulled[n]).clamp(*bounds[n]) - s for n, s in states.items()}

    def descend(self, states, held, steps=800, lr=0.3):
        bounds = self.bounds(states, held)
        for _ in range(steps):
            pulled = forces(self, states)
            states = {n: (s - lr * pulled[n]).clamp(*bounds[n]) for n, s in states.items()}
        return states


def estimator(model, solver=TIGHT, **settings):
    return mep.EquilibriumPropagation(model, "mse", energy="hopfield", solver=solver, **settings)


def all_of(value):
    return torch.ones_like(value, dtype=torch.bool)


SOLVERS = pytest.mark.parametrize("solver", [TIGHT, DESCENT], ids=["relaxation", "descent"])


CASES = [(name, TIGHT) for name in NETWORKS if "max" not in name]


@pytest.mark.parametrize(("name", "solver"), [*CASES, ("hard sigmoid", DESCENT)], ids=str)
def test_from_a_label_it_settles_at_the_minimum_over_states_and_input(name, solver):
    model, x, y = build(name, scale=0.4)
    ep = estimator(model, solver)
    ep.predict(x)
    found = ep.relax(clamp={"output": y}, box=(0, 1))
    written = Written(model, x, capture(model, x).inputs, (0, 1))
    held = {written.graph.output: all_of(y)}
    assert found.converged and set(found.states) == set(written.boxes)
    assert torch.equal(found["output"], y) and found["input"].shape == x.shape
    assert max(float(move.abs().max()) for move in written.drawn(found.states, held).values()) < 1e-7
    start = {n: s if n in held else torch.rand_like(s) for n, s in found.states.items()}
    for n, s in written.descend(start, held).items():
        torch.testing.assert_close(found.states[n], s, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.energy, written(found.states))
    inside = (found["input"] > 0) & (found["input"] < 1)
    assert inside.any()


@SOLVERS
@pytest.mark.parametrize("name", ["skip", "average pooling, grouped"])
def test_parts_of_input_hidden_layer_and_output_are_held(name, solver):
    model, x, y = build(name, scale=0.4)
    ep = estimator(model, solver)
    ep.predict(x)
    (image,) = capture(model, x).inputs
    written = Written(model, x, [image], (-0.5, 2))
    hidden = written.graph.states[0].name
    h = torch.rand_like(ep.relax({"input": x})[hidden])
    values = {image: x, hidden: h, written.graph.output: y}
    masks = {image: x > 0.3, hidden: h > 0.5}
    found = ep.relax(clamp={"input": x, hidden: h, "output": y}, held=masks, box=(-0.5, 2))
    held = {**masks, written.graph.output: all_of(y)}
    assert found.converged
    for n, mask in held.items():
        assert torch.equal(found.states[n][mask], values[n][mask])
    assert max(float(move.abs().max()) for move in written.drawn(found.states, held).values()) < 1e-7
    assert set(found.residuals) == set(written.boxes) - {written.graph.output}


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_converged_is_what_the_forces_say(steps):
    model, x, y = build("hard sigmoid")
    solver = mep.Relaxation(steps, tol=1e-3, adaptive=False)
    ep = estimator(model, solver)
    ep.predict(x)
    found = ep.relax(clamp={"output": y}, box=(0, 1))
    written = Written(model, x, ["input"], (0, 1))
    drawn = written.drawn(found.states, {written.graph.output: all_of(y)})
    for name, r in found.residuals.items():
        s, there = found.states[name], found.states[name] + drawn[name]
        larger = torch.maximum(s.norm(dim=1), there.norm(dim=1))
        torch.testing.assert_close(r, (s - there).norm(dim=1) / larger)
    worst = torch.stack(list(found.residuals.values())).amax(0)
    assert torch.equal(found.settled, worst <= 1e-3) and found.converged == bool((worst <= 1e-3).all())
    assert found.iterations == steps and (steps > 1 or not found.converged)


@pytest.mark.parametrize(("seed", "scale", "rests"), [(10, 1.5, True), (0, 0.7, False), (2, 0.7, False)])
def test_winners_of_max_pooling_are_those_at_the_end(seed, scale, rests):
    """Two units that push each other down alternate: the solver holds one of them, and that is no point of rest."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.Hardtanh(0.0, 1.0), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU6()
    model = nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *layers, nn.Flatten(), nn.Linear(16, 3)).double()
    for p in model.parameters():
        p.data.mul_(scale if p.ndim > 1 else 1).add_(0.2 if p.ndim == 1 else 0)
    x, y = torch.rand(5, 36).double(), torch.randn(5, 3).double()
    ep = estimator(model, mep.Relaxation(tol=1e-6, settle_steps=300))
    found = ep.relax(clamp={"output": y}, start={"input": x}, box=(0, 1))
    written = Written(model, x, ["input"], (0, 1))
    drawn = written.drawn(found.states, {written.graph.output: all_of(y)})
    assert found.converged == rests == (max(float(move.abs().max()) for move in drawn.values()) < 1e-6)


class Prepared(nn.Module):
    """What two layers read of the input is a value between, with no state."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        z = torch.sin(2 * x - 1)
        return self.last(F.hardtanh(self.left(z), 0, 1) + F.hardtanh(self.right(z), 0, 1))


def test_messages_reach_the_input_through_what_prepares_it():
    torch.manual_seed(0)
    model, x, y = Prepared().double(), torch.rand(5, 6).double(), torch.rand(5, 3).double()
    ep = estimator(model, mep.Descent(20000, settle_lr=0.1, adaptive=True, tol=1e-9))
    ep.predict(x)
    found = ep.relax(clamp={"output": y}, start={"x": x}, box=(-1, 1))
    drawn = Written(model, x, ["x"], (-1, 1)).drawn(found.states, {"last": all_of(y)})
    assert found.converged and max(float(move.abs().max()) for move in drawn.values()) < 1e-7
    assert ((found["x"] > -1) & (found["x"] < 1)).float().mean() > 0.5


def test_with_all_inputs_held_it_is_the_prediction():
    for name in NETWORKS:
        model, x, _ = build(name)
        ep = estimator(model)
        for clamp in ({"input": x}, {"input": x[:1]}):
            torch.testing.assert_close(ep.relax(clamp)["output"], ep.predict(clamp["input"]), rtol=1e-7, atol=1e-9)


def test_all_held_is_at_rest():
    model, x, y = build("hard sigmoid")
    ep = estimator(model)
    states = dict(ep.settle(x, y).free.states)
    found = ep.relax({"input": x, **states})
    assert found.converged and not found.residuals
    assert all(torch.equal(found[n], s) for n, s in states.items())


def test_start_decides_where_there_are_two_points_of_rest():
    """One unit coupled to itself through the input by more than one: it is drawn to either face."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Hardtanh(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.5), model[2].weight.zero_()
    ep, zero = estimator(model), torch.zeros(1, 1).double()
    for start in (0.1, -0.1):
        found = ep.relax(clamp={"output": zero}, start={"input": zero + start}, box=(-1, 1))
        assert found.converged and float(found["input"]) == math.copysign(1, start) == float(found["0"])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, image, context):
        h = F.hardtanh(self.left(image) + self.right(context), 0, 1)
        return self.last(h)


@pytest.mark.parametrize("as_dict", [False, True])
def test_of_two_inputs_one_is_free(as_dict):
    torch.manual_seed(0)
    model, x = Two().double(), (torch.rand(5, 4).double(), torch.rand(5, 3).double())
    y = torch.rand(5, 2).double()
    ep = estimator(model)
    ep.predict({"image": x[0], "context": x[1]} if as_dict else x)
    found = ep.relax(clamp={"context": x[1], "output": y}, box={"image": (0, 1)})
    written = Written(model, x, ["image"], (0, 1))
    assert found.converged and torch.equal(found["context"], x[1])
    drawn = written.drawn({n: s for n, s in found.states.items() if n != "context"}, {"last": all_of(y)})
    assert max(float(move.abs().max()) for move in drawn.values()) < 1e-7
    with pytest.raises(mep.ArgumentError, match="'input' is no input"):
        ep.relax(clamp={"input": x[0]})


def test_energies_of_groups_act_as_well():
    model, x, y = build("hard sigmoid", scale=0.4)
    ep = estimator(model, DESCENT, groups=[inhibiting(8, 0.1)])
    ep.predict(x)
    found = ep.relax(clamp={"output": y}, box=(0, 1))
    written = Written(model, x, ["input"], (0, 1), [inhibiting(8, 0.1)])
    drawn = written.drawn(found.states, {written.graph.output: all_of(y)})
    assert found.converged and max(float(move.abs().max()) for move in drawn.values()) < 1e-7
    torch.testing.assert_close(found.energy, written(found.states))


def test_nothing_changes():
    model, x, y = build("hard sigmoid")
    model = nn.Sequential(nn.Dropout(0.3), *model).train()
    one, two = (estimator(copy.deepcopy(model), mep.Relaxation()) for _ in range(2))
    noise = torch.get_rng_state()
    for ep in (one, two):
        torch.set_rng_state(noise)
        ep(x, y)
    state = torch.get_rng_state()
    two.relax(clamp={"output": y}, box=(0, 1))
    assert torch.equal(torch.get_rng_state(), state) and not torch.is_inference_mode_enabled()
    for ep in (one, two):
        torch.set_rng_state(state)
        ep(x, y)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) and torch.equal(p, q)


def test_in_single_precision_and_for_one_example():
    model, x, y = build("average pooling, grouped", scale=0.4)
    found = estimator(model).relax(clamp={"output": y}, start={"input": 0 * x}, box=(0, 1))
    single = estimator(model.float(), mep.Relaxation())
    one = single.relax(clamp={"output": y[:1].float()}, start={"input": 0 * x[:1].float()}, box=(0, 1))
    assert one.converged and one["input"].dtype == torch.float32
    torch.testing.assert_close(one["input"], found["input"][:1].float(), rtol=1e-3, atol=1e-4)
    labels = F.one_hot(torch.tensor([0, 2]), 3)  # integers
    assert single.relax(clamp={"output": labels}, box=(0, 1))["output"].dtype == torch.float32
    found = single.relax(clamp={"input": torch.ones(2, 36, dtype=torch.bool), "output": labels})
    torch.testing.assert_close(found["input"], torch.ones(2, 36))


PATTERNS = torch.tensor(
    [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]]
)


def test_a_trained_network_recalls_patterns_from_labels_and_from_halves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Hardtanh(0, 1), nn.Linear(24, 3))
    with torch.no_grad():  # small at first: what was not learnt leaves traces in what is recalled
        for p in model.parameters():
            p.mul_(0.1)
        model[0].bias.add_(0.3)
    optimizer = mep.eqprop(model.parameters(), model=model, energy="hopfield")
    patterns = PATTERNS.float()
    for _ in range(200):
        y = torch.randint(3, (32,))
        optimizer.step(x=(patterns[y] + 0.2 * torch.randn(32, 12)).clamp(0, 1), target=y)
    ep = optimizer.estimator
    found = ep.relax(clamp={"output": F.one_hot(torch.arange(3), 3)}, box=(0, 1))
    assert found.converged
    assert torch.equal(found["input"] > 0.4 * found["input"].amax(1, keepdim=True), patterns > 0)
    known = torch.arange(12) % 4 < 2
    found = ep.relax(clamp={"input": patterns * known}, held={"input": known}, box=(0, 1))
    assert found.converged and torch.equal(found["output"].argmax(1), torch.arange(3))
    assert torch.equal(found["input"] > 0.1, patterns > 0)


CLAMP = {"output": torch.zeros(5, 3).double()}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"clamp": {"outputs": CLAMP["output"]}},
            mep.ArgumentError,
            "'outputs' is no input and no node.*input, 0, 2, 4",
        ),
        ({"clamp": CLAMP}, mep.ArgumentError, "'input' is free, so it needs a box"),
        ({"clamp": CLAMP, "box": (1, 0)}, mep.ArgumentError, "needs a box"),
        ({"clamp": CLAMP, "box": 1.0}, mep.ArgumentError, "needs a box"),
        ({"clamp": CLAMP, "box": {"input": (0, 1), "0": (0, 1)}}, mep.ArgumentError, "'0' is no input that is free"),
        ({"clamp": {"input": torch.zeros(5, 6).double()}, "box": (0, 1)}, mep.ArgumentError, "all are held"),
        (
            {"clamp": {"output": torch.zeros(5, 4)}, "box": (0, 1)},
            mep.InputError,
            r"shape \(5, 4\), the state \(5, 3\)",
        ),
        ({"clamp": {"output": torch.zeros(5).long()}, "box": (0, 1)}, mep.InputError, "one_hot"),
        ({"clamp": {"output": CLAMP["output"] / 0}, "box": (0, 1)}, mep.InputError, "NaN or Inf"),
        ({"clamp": {}}, mep.ArgumentError, "nothing is given"),
        ({"clamp": CLAMP, "start": CLAMP, "box": (0, 1)}, mep.ArgumentError, "it is held"),
        (
            {"clamp": CLAMP, "held": {"input": torch.ones(6) > 0}, "box": (0, 1)},
            mep.ArgumentError,
            "values are missing",
        ),
        ({"clamp": CLAMP, "held": {"output": torch.ones(3)}, "box": (0, 1)}, mep.InputError, "boolean mask"),
        ({"clamp": CLAMP, "held": {"output": torch.ones(4) > 0}, "box": (0, 1)}, mep.InputError, "boolean mask"),
        ({"clamp": {**CLAMP, "4": CLAMP["output"]}}, mep.ArgumentError, "one and the same"),
        ({"clamp": {"output": 1.0}}, mep.ArgumentError, "mapping from names to tensors"),
    ],
)
def test_what_cannot_be_held_is_refused(given, error, message):
    model, x, _ = build("hard sigmoid")
    ep = estimator(model)
    ep.predict(x)
    with pytest.raises(error, match=message):
        ep.relax(**given)


def test_what_has_no_input_yet_or_no_such_energy_is_refused():
    model, _, _ = build("hard sigmoid")
    with pytest.raises(mep.InputError, match=r"not known yet.*predict"):
        estimator(model).relax(clamp=CLAMP, box=(0, 1))
    with pytest.raises(mep.ArgumentError, match="energy='hopfield'"):
        mep.EquilibriumPropagation(model).relax(clamp=CLAMP, box=(0, 1))


def test_tokens_cannot_be_free():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.last = nn.Embedding(7, 6), nn.Linear(6, 3)

        def forward(self, tokens):
            return self.last(F.hardtanh(self.embed(tokens), 0, 1))

    model, tokens = Embedded().double(), torch.tensor([1, 2])
    ep = estimator(model)
    ep.predict(tokens)
    with pytest.raises(mep.InputError, match=r"torch.int64.*Clamp it"):
        ep.relax(clamp={"output": torch.zeros(2, 3).double()}, box=(0, 1))


def test_a_batch_that_was_refused_is_forgotten():
    torch.manual_seed(0)
    model, x, labels = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)), torch.rand(4, 5), torch.eye(4)
    ep = mep.EquilibriumPropagation(model, "one_hot_mse", energy="hopfield")
    ep.predict(x)
    for refused in (lambda: ep(x.double(), torch.arange(4)), lambda: ep.predict(x.double())):
        with pytest.raises(mep.InputError, match="dtype"):
            refused()
        assert ep.relax(clamp={"output": labels}, box=(0, 1)).converged
    with pytest.raises(mep.ArgumentError, match="box"):
        ep.relax(clamp={"output": labels}, box=("a", "b"))
