"""`compile=True`: a compiled step is the same step, to rounding, and whatever it cannot do is done without it."""

import copy
import pickle

import pytest
import torch
from cases import convolutional
from torch import nn

import mep
from mep.estimators import compiled_step as programs
from mep.estimators.compiled_step import CompiledSteps

STEPS = 10


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x + nn.functional.gelu(self.inner(self.norm(x))))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.LeakyReLU(), nn.Linear(7, 3))


def normalised():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


MODELS = {"mlp": mlp, "convolutional": convolutional, "residual": Residual, "batch norm": normalised}


@pytest.fixture
def without(monkeypatch):
    """Grows by one with every step that an estimator with programs makes without."""
    steps, learn = [], CompiledSteps.record_eager_step
    monkeypatch.setattr(CompiledSteps, "record_eager_step", lambda *args: (steps.append(1), learn(*args)))
    return steps


def batches(n, count=STEPS, size=20):
    generator = torch.Generator().manual_seed(n)
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 3, (size,), generator=generator)


def pair(make, seed=0, **options):
    """The same optimizer twice: without programs, and with them."""
    torch.manual_seed(seed)
    model = make().double()
    twin = copy.deepcopy(model)
    return [
        mep.eqprop(m.parameters(), model=m, lr=0.05, compile=c, **options) for m, c in ((model, False), (twin, True))
    ]


def assert_equal_states(plain, quick, **tolerances):
    for (name, a), b in zip(plain.model.state_dict().items(), quick.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_same_steps_as_without(uncompiled, make, cost, phases):
    plain, quick = pair(make, cost=cost, phases=phases, settle_steps=2, adaptive=False)
    for x, y in batches(1):
        target = nn.functional.one_hot(y, 3).double() if cost == "mse" else y
        losses = [opt.step(x=x, target=target) for opt in (plain, quick)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(plain.last.residual, quick.last.residual, rtol=1e-4, atol=1e-10)
        assert (plain.last.iterations, plain.last.result) == (quick.last.iterations, quick.last.result)
    assert len(quick.estimator.compiled_steps) == 1
    assert_equal_states(plain, quick, rtol=1e-9, atol=1e-10)


def test_settles_each_example_as_without(uncompiled):
    plain, quick = pair(mlp, seed=2, beta=0.5, tol=1e-4)
    for x, y in batches(2, count=20):
        for opt in (plain, quick):
            opt.step(x=x, target=y)
        assert quick.last.converged
        assert quick.last.residual.max() <= 1e-4
        assert plain.last.iterations == quick.last.iterations
    assert len(quick.estimator.compiled_steps) >= 1
    assert_equal_states(plain, quick, rtol=1e-8, atol=1e-9)


def pictures():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


FIXED = {"cost": "mse", "phases": "centered", "settle_steps": 1, "adaptive": False}
SHORT = {"cost": "mse", "settle_steps": 1, "adaptive": False}


@pytest.mark.parametrize(("make", "options"), [(convolutional, FIXED), (pictures, SHORT)])
def test_by_inductor(make, options):
    """In the first case inductor would write over what is still to be read, if it were allowed to.

    In the second it lays out pictures otherwise than they were when the step was traced.
    """
    plain, quick = pair(make, **options)
    for x, y in batches(3):
        for opt in (plain, quick):
            opt.step(x=x, target=nn.functional.one_hot(y, 3).double())
        torch.testing.assert_close(plain.last.residual, quick.last.residual, rtol=1e-4, atol=1e-9)
    assert len(quick.estimator.compiled_steps) == 1
    assert_equal_states(plain, quick, rtol=1e-8, atol=1e-9)


def test_one_program_for_one_shape(uncompiled):
    _, quick = pair(mlp, settle_steps=3, adaptive=False)
    for x, y in batches(4, count=30):
        quick.step(x=x, target=y)
    assert len(quick.estimator.compiled_steps) == 1
    for x, y in batches(5, count=6, size=11):
        quick.step(x=x, target=y)
    assert len(quick.estimator.compiled_steps) == 2


def needed(opt, sweeps):
    """As if steps of late had needed so many."""
    own = opt.estimator.compiled_steps
    own.recent_sweeps.clear()
    own.recent_sweeps.extend(sweeps)


def test_programs_are_made_for_few_numbers_of_sweeps(uncompiled):
    """For five as for six, and none for more than twelve."""
    plain, quick = pair(mlp, seed=6)
    made = []
    for number, (x, y) in enumerate(batches(6, count=12)):
        if number > 3:
            needed(quick, [(3, 3, 5, 6, 13, 2, 1, 4)[number - 4]])
        for opt in (plain, quick):
            opt.step(x=x, target=y)
        made.append(len(quick.estimator.compiled_steps))
    assert made == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 5]
    assert_equal_states(plain, quick, rtol=1e-8, atol=1e-9)


def test_rare_steps_that_sweep_often_do_not_count(uncompiled):
    _, quick = pair(mlp, seed=6)
    for x, y in batches(6, count=4):
        quick.step(x=x, target=y)
    for rare, made in ((3, 0), (2, 1)):
        needed(quick, [13] * rare + [2] * (20 - rare))
        quick.step(x=x, target=y)
        assert len(quick.estimator.compiled_steps) == made


def test_what_does_not_settle_is_done_without(uncompiled):
    """A beta for which the programs so far sweep too little, and then one for which they are not made."""
    plain, quick = pair(mlp, seed=6, beta=0.01)
    for x, y in batches(6):
        for opt in (plain, quick):
            opt.step(x=x, target=y)
    counted = len(quick.estimator.compiled_steps.recent_sweeps)
    for beta in (0.5, 20.0):
        x, y = next(batches(7, count=1))
        for opt in (plain, quick):
            opt.estimator.beta = beta
            opt.step(x=x, target=y)
            assert opt.last.converged and opt.last.beta == beta
        assert len(quick.estimator.compiled_steps.recent_sweeps) == counted + 1, "a step that is made twice counts once"
        counted += 1
        assert plain.last.iterations == quick.last.iterations
        assert torch.equal(plain.last.counts, quick.last.counts)
        assert_equal_states(plain, quick, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [None, 0.1])
@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("target", ["labels", "totals of 0.7", "mse"])
@pytest.mark.parametrize("make", [mlp, Residual, normalised], ids=["affine", "curved", "coupled"])
def test_betas_and_counts_of_examples_are_those_of_steps_without(uncompiled, without, make, target, phases, beta):
    torch.manual_seed(5)
    model, solver = make().double(), mep.Sweep(tol=1e-4)
    plain, quick = (
        mep.EquilibriumPropagation(
            twin, "mse" if target == "mse" else "cross_entropy", beta, solver, phases=phases, compile=compile
        )
        for twin, compile in ((model, False), (copy.deepcopy(model), True))
    )
    for x, y in batches(6, count=10):
        t = y if target == "labels" else 0.7 * nn.functional.one_hot(y, 3).double()
        (one, a), (other, b) = plain.gradients(x, t), quick.gradients(x, t)
        torch.testing.assert_close(a.betas, b.betas, check_dtype=False)
        assert torch.equal(a.counts, b.counts)
        for g, h in zip(one.values(), other.values(), strict=True):
            torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-9)
    assert len(without) < 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite_and_changes_nothing(uncompiled, value):
    _, quick = pair(normalised)
    for x, y in batches(8):
        quick.step(x=x, target=y)
    before = copy.deepcopy(quick.model.state_dict())
    x, y = next(batches(9, count=1))
    x[3, 2] = value
    with pytest.raises(mep.InputError, match="NaN or Inf"):
        quick.step(x=x, target=y)
    with pytest.raises(mep.InputError, match="labels lie in"):
        quick.step(x=next(batches(9, count=1))[0], target=y + 3)
    for name, value in quick.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sees_what_changes_in_the_model(uncompiled):
    plain, quick = pair(normalised, settle_steps=2, adaptive=False)

    def steps(seed):
        for x, y in batches(seed, count=7):
            for opt in (plain, quick):
                opt.step(x=x, target=y)
        assert_equal_states(plain, quick, rtol=1e-8, atol=1e-9)

    steps(10)
    for opt in (plain, quick):
        opt.model[0].weight.requires_grad_(False)
    steps(11)
    for opt in (plain, quick):
        opt.model.eval()
    steps(12)
    for opt in (plain, quick):
        opt.model[1].running_mean = torch.zeros(8, dtype=torch.float64)
    steps(13)
    for opt in (plain, quick):
        with torch.no_grad():
            opt.model[3].weight.mul_(0.5)
    steps(14)

    def double(module, *args):
        return (2 * args[0][0],) if len(args) == 1 else 2 * args[1]

    hooks = [opt.model[0].register_forward_pre_hook(double) for opt in (plain, quick)]
    steps(15)
    for opt, hook in zip((plain, quick), hooks, strict=True):
        hook.remove()
        opt.model[0].register_forward_hook(double)
    steps(16)


def test_a_copy_has_programs_of_its_own(uncompiled):
    plain, quick = pair(mlp, settle_steps=3, adaptive=False)
    for x, y in batches(15):
        plain.step(x=x, target=y)
        quick.step(x=x, target=y)
    twin = copy.deepcopy(quick)
    assert len(twin.estimator.compiled_steps) == 0
    for x, y in batches(16):
        plain.step(x=x, target=y)
        twin.step(x=x, target=y)
    assert_equal_states(plain, twin, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_natural_gradient_observes_the_same(uncompiled, make):
    torch.manual_seed(0)
    model = make().double()
    twin = copy.deepcopy(model)
    plain, quick = (
        mep.natural_ep(
            m.parameters(),
            model=m,
            factors_every=1,
            inverse_every=1,
            rank=None,
            settle_steps=4,
            adaptive=False,
            compile=c,
        )
        for m, c in ((model, False), (twin, True))
    )
    for x, y in batches(17):
        plain.step(x=x, target=y)
        quick.step(x=x, target=y)
    assert len(quick.estimator.compiled_steps) == 1
    assert_equal_states(plain, quick, rtol=1e-7, atol=1e-8)


def test_several_inputs(uncompiled):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
            self.out = nn.Linear(5, 3)

        def forward(self, left, right):
            return self.out(torch.tanh(self.a(left) + self.b(right)))

    plain, quick = pair(Two, settle_steps=3, adaptive=False)
    for x, y in batches(18):
        for opt in (plain, quick):
            opt.step(x={"left": x, "right": x.flip(1)}, target=y)
    assert len(quick.estimator.compiled_steps) == 1
    assert_equal_states(plain, quick, rtol=1e-9, atol=1e-10)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, scale):
        return self.head(torch.relu(self.inner(x) * scale))


class ScaledByFirst(Scaled):
    def forward(self, x, scale):
        return super().forward(x, scale[0])


@pytest.mark.parametrize("make", [Scaled, ScaledByFirst], ids=["plain", "in a list"])
def test_inputs_that_are_no_tensors(uncompiled, make):
    plain, quick = pair(make, settle_steps=3, adaptive=False)
    for scale in (2.0, 5.0):
        for x, y in batches(18, count=6):
            for opt in (plain, quick):
                opt.step(x={"x": x, "scale": [scale] if make is ScaledByFirst else scale}, target=y)
    assert len(quick.estimator.compiled_steps) == 2
    assert_equal_states(plain, quick, rtol=1e-9, atol=1e-10)


def test_only_so_many_kinds_of_step_are_remembered(uncompiled, monkeypatch):
    monkeypatch.setattr(programs, "_KINDS", 3)
    _, quick = pair(Scaled, settle_steps=3, adaptive=False)
    x, y = next(batches(18, count=1))
    for step in range(9):
        quick.step(x={"x": x, "scale": float(step)}, target=y)
    assert len(quick.estimator.compiled_steps._seen) == 3


def test_tensors_may_lie_in_memory_as_they_like():
    """By inductor, too, and by the default settings."""
    plain, quick = pair(mlp)
    for number, (x, y) in enumerate(batches(18, count=8)):
        if number > 5:
            x, y = x.t().contiguous().t(), torch.stack([y, y], 1)[:, 0]
        for opt in (plain, quick):
            if number == 7:
                opt.model[0].weight.data = opt.model[0].weight.data.t().contiguous().t()
            opt.step(x=x, target=y)
        torch.testing.assert_close(plain.last.residual, quick.last.residual, rtol=1e-4, atol=1e-9)
    assert len(quick.estimator.compiled_steps) == 1
    assert_equal_states(plain, quick, rtol=1e-8, atol=1e-9)


def test_an_estimator_with_programs_is_pickled_without(uncompiled):
    _, quick = pair(mlp, settle_steps=3, adaptive=False)
    for x, y in batches(18, count=6):
        quick.step(x=x, target=y)
    assert len(quick.estimator.compiled_steps) == 1
    twin = pickle.loads(pickle.dumps(quick))
    assert len(twin.estimator.compiled_steps) == 0
    assert torch.equal(twin.step(x=x, target=y), quick.step(x=x, target=y))


def test_noise_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    opt = mep.eqprop(model.parameters(), model=model, compile=True)
    x, y = next(batches(19, count=1))
    state = torch.get_rng_state()
    with pytest.raises(mep.ArgumentError, match="random numbers"):
        opt.step(x=x, target=y)
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    for x, y in batches(19, count=3):
        opt.step(x=x, target=y)


def test_decisions_by_number_are_refused(uncompiled):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else -self.a(x)

    model = nn.Sequential(Branching(), nn.Tanh(), nn.Linear(3, 3)).double()
    opt = mep.eqprop(model.parameters(), model=model, leaves=(Branching,), compile=True)
    with pytest.raises(mep.ArgumentError, match="cannot be compiled"):
        for x, y in batches(20):
            opt.step(x=x, target=y)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"solver": mep.Descent()}, r"are compiled: mep\.Sweep"),
        ({"solver": mep.Sweep(patience=2)}, "patience must be 1"),
        ({"solver": mep.Sweep(adaptive=False)}, "at most 12 sweeps"),
        ({"branches": "exact"}, "held branches"),
        ({"diagnostics": True}, "one of the two"),
        ({"cost": lambda output, target: output.sum(1)}, "are compiled"),
        ({"energy": "hopfield", "solver": mep.Descent()}, r"mep\.Sweep and mep\.Relaxation"),
    ],
)
def test_refused_at_once(options, reason):
    with pytest.raises(mep.ArgumentError, match=reason):
        mep.EquilibriumPropagation(mlp(), compile=True, **options)


# Hopfield networks: the free phase is a part of the program.


def hard_sigmoids():
    return nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(0, 1), nn.Linear(8, 7), nn.ReLU6(), nn.Linear(7, 3))


def smooth():
    return nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def pooled():
    layers = nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 3, padding=1), nn.Hardtanh(0, 1), nn.Conv2d(3, 4, 3, padding=1)
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.ReLU6(), nn.Flatten(), nn.Linear(4, 3))


HOPFIELD = {"hard sigmoids": hard_sigmoids, "smooth": smooth, "pooled": pooled}


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("beta", [None, 0.1])
@pytest.mark.parametrize("cost", ["one_hot_mse", "cross_entropy"])
@pytest.mark.parametrize("make", HOPFIELD.values(), ids=HOPFIELD)
def test_same_steps_of_hopfield_networks(uncompiled, without, make, cost, beta, phases):
    given = {"cost": cost, "beta": beta, "phases": phases, "settle_steps": 2, "adaptive": False}
    plain, quick = pair(make, energy="hopfield", **given)
    for x, y in batches(1, count=7):  # in the next one the coupling is measured again, and omega another
        losses = [opt.step(x=x, target=y) for opt in (plain, quick)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(plain.last.residual, quick.last.residual, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(plain.last.betas.double(), quick.last.betas.double())
    assert len(without) == 4 and quick.last.coupling is not None
    assert_equal_states(plain, quick, rtol=1e-8, atol=1e-9)


def test_hopfield_steps_settle_and_are_measured_now_and_then(uncompiled, without):
    """They settle; a program that sweeps too little is followed by a step without; the coupling is measured anew."""
    plain, quick = pair(hard_sigmoids, energy="hopfield", on_unsettled="ignore")
    for number, (x, y) in enumerate(batches(3, count=130)):
        for opt in (plain, quick):
            opt.step(x=x, target=y)
            assert opt.last.settled.sum() >= 18
        if number in (63, 127):
            quick.estimator.solver.memory.coupling = None
            count = len(without)
    assert len(without) == count + 1 < 40 and quick.last.coupling is not None
    assert_equal_states(plain, quick, rtol=1e-2, atol=5e-3)


def test_a_hopfield_nudge_without_a_minimum_is_not_called_settled(uncompiled):
    """Away from the target by more than the energy holds back, 2 beta / 3 > 1: reported, not found by a program."""
    _, quick = pair(hard_sigmoids, energy="hopfield", phases="centered", beta=2.0, on_unsettled="ignore")
    quick.estimator.solver.memory.batches = 1
    for x, y in batches(3, count=8):
        quick.step(x=x, target=y)
        assert not quick.last.converged


def test_hopfield_jacobians_that_change_are_refused(uncompiled):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.c(nn.functional.relu6(self.a(x)) * nn.functional.relu6(self.b(x)))

    model = Product().double()
    given = {"energy": "hopfield", "compile": True, "lr": 1e-3, "settle_steps": 3, "adaptive": False}
    opt = mep.eqprop(model.parameters(), model=model, **given)
    with pytest.raises(mep.ArgumentError, match="Jacobians"):
        for x, y in batches(20):
            opt.step(x=x, target=y)
