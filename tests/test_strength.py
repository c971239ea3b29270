"""A beta for every example: less where its equilibrium is out of reach, and nobody else notices."""

import math
from dataclasses import replace

import pytest
import torch
from cases import MODELS, free_energy, mlp, settled
from reference import energy as written_energy
from reference import nudged_energy, predictions_of_graph, residual
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.estimators.phases import settle_phases
from mep.settle import Known, Settled
from mep.solvers.strength import alike, are_separate, higher, lower, stalled, within_reach
from mep.solvers.weakening import relieved

HARD, BETA = 2, 0.5
SOLVER = mep.Sweep(tol=1e-4, settle_steps=60, strength=2.0)


class Steep(nn.Module):
    """The larger an input, the more strongly it is answered, and the more the layers bend."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h * torch.tanh(self.second(h)))


def case(hard=60.0):
    """One hard example among easy ones."""
    torch.manual_seed(0)
    model, x, y = Steep().double(), torch.randn(7, 5).double(), torch.randint(3, (7,))
    x[HARD] *= hard
    y[HARD] = model(x)[HARD].argmin()  # what it takes for less likely than anything
    return model, x, y


def estimated(model, x, y, **options):
    return mep.EquilibriumPropagation(model, **{"beta": BETA, "solver": SOLVER, **options}).gradients(x, y)


# What an estimate is then.


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_one_is_nudged_less_and_the_others_as_asked(cost):
    model, x, y = case()
    target = y if cost == "cross_entropy" else nn.functional.one_hot(y, 3).double()
    _, estimate = estimated(model, x, target, cost=cost)
    others = torch.arange(len(x)) != HARD
    assert estimate.converged and (estimate.residual <= SOLVER.tol).all()
    assert (estimate.betas[others] == BETA).all() and estimate.betas[HARD] < BETA / 4
    assert estimate.beta == estimate.betas[HARD]


def test_without_a_hard_one_all_are_nudged_as_asked():
    model, x, y = case(hard=1.0)
    _, estimate = estimated(model, x, y)
    assert estimate.converged and estimate.beta == BETA and estimate.betas is None


def test_states_are_at_the_equilibrium_of_these_nudges():
    """By autograd on the energy written down with a beta for every example, and so is the gradient."""
    model, x, y = case()
    energy, found = settled(model, x, y, "cross_entropy", BETA, SOLVER)
    with torch.no_grad():
        states = energy.state(found.point)
    predict = predictions_of_graph(energy.graph, energy.inputs)
    cost = lambda s, t: nn.functional.cross_entropy(s, t, reduction="none")  # noqa: E731
    total = nudged_energy(predict, energy.graph.output, cost, y, energy.beta)
    assert energy.beta[HARD] < BETA and (residual(predict, total, states) <= SOLVER.tol * 1.001).all()
    gradients = energy.parameter_gradient(found.point, found.errors, 1)
    exact = torch.autograd.grad((written_energy(predict, states) / energy.beta).sum(), list(gradients))
    for g, e in zip(gradients.values(), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
def test_each_has_the_gradient_and_the_beta_that_it_has_alone(phases):
    model, x, y = case()
    together, estimate = estimated(model, x, y, phases=phases)
    alone = [estimated(model, x[i : i + 1], y[i : i + 1], phases=phases) for i in range(len(x))]
    assert [e.beta for _, e in alone] == pytest.approx(estimate.betas.tolist())
    for p, g in together.items():
        torch.testing.assert_close(g, sum(a[p] for a, _ in alone) / len(x), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_both_phases_have_the_same_nudges():
    """Away from the target an equilibrium is lost sooner, and with two strengths the error would be of first order."""
    model, x, y = case()
    energy, point = free_energy(model, x)
    free = Settled(energy, point, torch.zeros(len(x)), 0, mep.Result.CONVERGED)
    cost = make_cost("cross_entropy")(energy.output(point), y)
    _, phases = settle_phases(energy, free, cost, SOLVER, "centered", BETA, Known())
    (_, away, _), (_, toward, _) = phases
    assert torch.equal(away.beta, -toward.beta) and 0 < toward.beta[HARD] < BETA / 4


def test_natural_gradient_observes_each_at_its_own():
    model, x, y = case()
    seen = []
    mep.EquilibriumPropagation(model, beta=BETA, solver=SOLVER, observe=seen.append).gradients(x, y)
    gradients, _ = estimated(model, x, y)
    for layer in seen[0]:
        inputs, errors = layer.rows()
        torch.testing.assert_close(-errors.T @ inputs / len(x), -gradients[layer.weight])


# When.


@pytest.mark.parametrize(
    ("solver", "beta", "strength"),
    [
        (mep.Sweep(), 0.01, 0.02),
        (mep.Sweep(strength=0.3), 0.01, 0.3),
        (mep.Local(), 0.01, None),
        (mep.Descent(), 0.1, None),
    ],
    ids=str,
)
def test_what_is_usual(solver, beta, strength):
    ep = mep.EquilibriumPropagation(mlp(nn.ReLU, 5, 8, 3), solver=solver)
    assert ep.beta == beta and getattr(ep.solver, "strength", None) == strength


@pytest.mark.parametrize(("beta", "strength"), [(0.1, 0.2), (0.25, 0.5), (3.0, 0.5)])
def test_the_usual_strength_grows_with_beta(beta, strength):
    """Who asks for a stronger nudge gets it; beyond 0.5 the estimate would say little of the gradient."""
    assert mep.EquilibriumPropagation(mlp(nn.ReLU, 5, 8, 3), beta=beta).solver.strength == strength


@pytest.mark.parametrize("depth", [2, 10, 30])
@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_strength_bounds_what_the_answer_takes_back(depth, cost):
    """`|dC(s) - dC(s_free)| <= L |s - s_free| = beta L |M x|`; and so one sweep is enough, or two."""
    torch.manual_seed(depth)
    model = mlp(nn.ReLU, *[12] * depth, 5)
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    x, y = 5 * torch.randn(40, 12).double(), torch.randint(5, (40,))
    target, solver = (y if cost == "cross_entropy" else nn.functional.one_hot(y, 5).double()), mep.Sweep(strength=0.02)
    energy, found = settled(model.double(), x, target, cost, 0.1, solver)
    with torch.no_grad():
        _, free = free_energy(model, x)
        now, before, nudged = energy.cost_gradient(found.point), energy.cost_gradient(free), energy.beta
    assert (nudged > 0).all() and (nudged < 0.1).any()
    assert ((now - before).norm(dim=1) <= 0.02 * now.norm(dim=1)).all()
    assert (found.residual <= solver.tol).all() and found.iterations <= 2


def test_where_examples_see_each_other_all_are_nudged_less():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[3].weight.mul_(40)
    x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
    _, estimate = estimated(model, x, y)
    assert estimate.converged and estimate.beta < BETA and estimate.betas is None


def test_a_fixed_number_of_sweeps_is_made_at_the_beta_asked_for():
    model, x, y = case()
    _, estimate = estimated(model, x, y, solver=mep.Sweep(3, adaptive=False))
    assert estimate.beta == BETA and estimate.betas is None and estimate.iterations == 3


def test_steps_learn_how_strong_a_nudge_may_be():
    """At first the equilibria of many are hard to find; later they are nudged so that they settle soon."""
    torch.manual_seed(0)
    model, x, y = Steep(), 20 * torch.randn(32, 5), torch.randint(3, (32,))
    ep = mep.EquilibriumPropagation(model, beta=BETA)
    sweeps = [ep.gradients(x, y)[1].iterations for _ in range(30)]
    assert sweeps[0] > 4 and max(sweeps[-3:]) <= 4
    other = mep.EquilibriumPropagation(model, beta=BETA)
    other.load_state_dict(ep.state_dict())
    for (p, g), (_, h) in zip(ep.gradients(x, y)[0].items(), other.gradients(x, y)[0].items(), strict=True):
        assert torch.equal(g, h), p.shape


def test_what_is_learnt_rises_again_and_stays_within_limits():
    most = higher(None, 0.5)
    for _ in range(100):
        most = lower(most, 0.5)
    assert 0 < most < 0.01 and 0.5 > higher(most, 0.5) > most and higher(None, 0.5) == higher(100.0, 0.5) == 0.5
    assert lower(math.inf, math.inf) == higher(math.inf, math.inf) == math.inf


def test_nudges_are_weakened_to_the_largest_strength():
    model, x, y = case()
    energy, _ = settled(model, x, y, "cross_entropy", BETA, SOLVER)
    cost = energy.nudge.cost
    assert cost.smoothness == 0.5
    strength = torch.tensor([0.0, 1.0, 3.9, 4.0, 8.0, 400.0, float("nan"), float("inf")])
    torch.testing.assert_close(within_reach(cost, strength, 2.0), torch.tensor([1, 1, 1, 1, 0.4, 0.008, 1, 1]))
    torch.testing.assert_close(within_reach(cost, -strength[:5], math.inf), torch.tensor([1, 1, 0.8 / 3.9, 0.2, 0.1]))
    assert within_reach(cost, strength[:4], 2.0) is None
    for signed in (strength, -strength):  # in a program one may not look
        for most in (2.0, 0.25):
            torch.testing.assert_close(within_reach(cost, signed, torch.tensor(most)), within_reach(cost, signed, most))
    torch.testing.assert_close(within_reach(cost, strength[:3], 0.25), torch.tensor([1, 0.4, 0.4 / 3.9]))


def test_who_is_brought_down_too_little_stalls():
    before = torch.tensor([1.0, 1.0, 0.5, 0.02, 0.1])
    now = torch.tensor([0.4, 0.6, 0.009, 0.011, 0.5])
    assert stalled(now, before, 1e-4).tolist() == [1, 0.125, 1, 0.125, 0.125]
    assert stalled(now, before, 0.1).tolist() == [1, 0.125, 1, 1, 0.125]
    assert stalled(now[:1], before[:1], 1e-4) is None


def test_errors_that_come_back_otherwise_tell_who_went_too_far():
    """In the second node errors change by 0, 0.5, 0.5 and 3 of their size, those of the output by 0, 0, 0.4 and 3."""
    output, inner = torch.tensor([[2.0], [2.0], [2.0], [2.0]]), torch.tensor([[0.1], [0.1], [0.1], [0.1]])
    first = {"output": output, "inner": inner}
    second = {
        "output": output * torch.tensor([[1.0], [1], [1.4], [4]]),
        "inner": inner * torch.tensor([[1.0], [0.5], [1.5], [4]]),
    }
    assert alike(first, second, "output", 4, 1.0).tolist() == [1, 0.125, 1, 1]
    assert alike(first, first, "output", 4, 1.0) is None
    doubles = [{name: error.double() for name, error in errors.items()} for errors in (first, second)]
    assert alike(*doubles, "output", 4, 1.0).dtype == torch.float64  # or the betas of the others would be rounded
    assert alike(first, first, "output", 4, torch.tensor(1.0)).tolist() == [1, 1, 1, 1]  # in a program one may not look


@torch.no_grad()
def test_who_went_where_the_network_bends_keeps_its_first_errors():
    """Weakly nudged it answers these as a linear network would; the others go on."""
    model, x, y = case()
    energy, point = free_energy(model, x)
    nudged = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    iterate = SOLVER.advance(nudged, SOLVER.start(nudged, point, Known()), None)
    walks, first = iterate.memory.answers, dict(iterate.memory.answers.sent)
    before, trial = walks.energy.beta.clone(), iterate.memory.trials[0]
    iterate = SOLVER.advance(nudged, iterate, None)
    others = torch.arange(len(x)) != HARD
    now = walks.energy.beta
    torch.testing.assert_close(now[HARD], before[HARD] / 8)
    assert torch.equal(now[others], before[others])
    for name, error in walks.sent.items():
        assert torch.equal(error[HARD], first[name][HARD]) and not torch.equal(error[others], first[name][others])
    output, s = iterate.memory.free[HARD], iterate.memory.trials[0][1][HARD]
    torch.testing.assert_close(output - s, (output - trial[1][HARD]) / 8)  # retold
    assert torch.equal(iterate.memory.trials[1][0][HARD], trial[0][HARD])
    assert iterate.residual[HARD] < 0.5


def test_without_a_limit_nudges_are_as_asked_wherever_there_is_an_equilibrium():
    model, x, y = case(hard=1.0)
    _, limited = estimated(model, 10 * x, y, beta=0.1)
    _, asked = estimated(model, 10 * x, y, beta=0.1, solver=replace(SOLVER, strength=math.inf))
    assert limited.beta < 0.1 and asked.converged and asked.beta == 0.1 and asked.betas is None


@torch.no_grad()
def test_who_asks_next_to_nothing_is_nudged_as_asked():
    """Its error is so small that its square is zero, while the errors that follow are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.SiLU(), nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    x = torch.randn(64, 5).double()
    y = model(x).argmax(1)  # rather sure of them
    estimator = mep.EquilibriumPropagation(model, solver=mep.Sweep(tol=1e-3))
    _, estimate = estimator.gradients(x, y)
    assert estimate.beta > 0 and math.isfinite(estimator.state_dict()["gain"])


@torch.no_grad()
def test_who_is_nudged_less_is_given_a_sweep_to_show_for_it():
    """How far it is from the new equilibrium is not known until then."""
    model, x, y = case()
    energy, point = free_energy(model, x)
    nudged = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), 1e-3)
    iterate = SOLVER.start(nudged, point, Known())
    for _ in range(2):
        iterate = SOLVER.advance(nudged, iterate, None)
    assert (iterate.residual < 0.5).all()
    stuck = replace(iterate, residual=torch.where(torch.arange(len(x)) == HARD, 0.4, iterate.residual))
    stuck.memory = replace(stuck.memory, sweeps=3)
    spared = relieved(stuck, stuck.residual, SOLVER.tol, SOLVER.settle_steps)
    others = torch.arange(len(x)) != HARD
    assert spared.residual[HARD] == 1 and torch.equal(spared.residual[others], iterate.residual[others])
    assert spared.memory.beta[HARD] == 1e-3 / 8 and (spared.memory.beta[others] == 1e-3).all()
    assert relieved(spared, stuck.residual, SOLVER.tol, SOLVER.settle_steps).memory.beta[HARD] == 1e-3 / 64


# Who sees whom.


@torch.no_grad()
def separate(model, x):
    return are_separate(*free_energy(model, x))


@pytest.mark.parametrize("name", ["mlp tanh", "attention", "embedded", "layer norm", "scaled"])
def test_examples_of_most_networks_are_separate(name):
    model, x, _ = MODELS[name].build()
    assert separate(model, x)


class Shared(nn.Module):
    """A softmax at the end, and the mean over the batch before it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return torch.softmax(self.last(h + h.mean(0)), 1)


class Neighbours(nn.Module):
    """Every example sees one other; of two views, the other one."""

    def __init__(self, step):
        super().__init__()
        self.step, self.first, self.last = step, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + h.roll(self.step, 0))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [2, 6, 8])
def test_any_two_may_see_each_other(step, batch):
    torch.manual_seed(0)
    assert separate(Neighbours(step), torch.randn(batch, 4)) == (step % batch == 0)


class Seeing(nn.Module):
    """One example sees another."""

    def __init__(self, seeing, seen):
        super().__init__()
        self.seen, self.first, self.last = seen, nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("place", nn.functional.one_hot(torch.tensor(seeing), 6)[:, None].float())

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + self.place * h[self.seen])


@pytest.mark.parametrize(("seeing", "seen"), [(0, 5), (5, 0), (1, 3), (3, 1)])
def test_one_may_see_another_that_does_not_see_it(seeing, seen):
    torch.manual_seed(0)
    assert not separate(Seeing(seeing, seen), torch.randn(6, 4))


def test_and_of_others_are_not():
    torch.manual_seed(0)
    normal, x = mlp(nn.Tanh, 4, 6, 3), torch.randn(6, 4)
    normal.insert(1, nn.BatchNorm1d(6))
    assert not separate(normal, x) and not separate(Shared(), x)
    assert separate(normal.eval(), x)


def test_one_example_alone_tells_nothing_of_others():
    torch.manual_seed(0)
    with torch.no_grad():
        energy, point = free_energy(Shared(), torch.randn(1, 4))
        assert are_separate(energy, point) and energy.graph.is_separable is None
