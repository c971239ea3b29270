"""Whether examples are coupled: found from one batch, whatever couples them; then they settle as one group."""

import pytest
import torch
from cases import MODELS, free_energy, mlp, settled
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.solvers.networks import are_independent


@torch.no_grad()
def independent(model, x):
    energy, point = free_energy(model, x)
    output = energy.output(point)
    return are_independent(nudge(energy, make_cost("mse")(output, torch.zeros_like(output)), 1.0), point)


@pytest.mark.parametrize("name", ["mlp tanh", "attention", "embedded", "layer norm", "scaled"])
def test_examples_of_most_networks_are_independent(name):
    model, x, _ = MODELS[name].build()
    assert independent(model, x)


class Shared(nn.Module):
    """A softmax at the end, and the mean over the batch before it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return torch.softmax(self.last(h + h.mean(0)), 1)


class Neighbours(nn.Module):
    """Every example depends on one other."""

    def __init__(self, step):
        super().__init__()
        self.step, self.first, self.last = step, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + h.roll(self.step, 0))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [2, 6, 8])
def test_any_two_may_be_coupled(step, batch):
    torch.manual_seed(0)
    assert independent(Neighbours(step), torch.randn(batch, 4)) == (step % batch == 0)


class Reading(nn.Module):
    """One example depends on another."""

    def __init__(self, reader, read):
        super().__init__()
        self.read, self.first, self.last = read, nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("place", nn.functional.one_hot(torch.tensor(reader), 6)[:, None].float())

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + self.place * h[self.read])


@pytest.mark.parametrize(("reader", "read"), [(0, 5), (5, 0), (1, 3), (3, 1)])
def test_one_may_depend_on_another_that_does_not_depend_on_it(reader, read):
    torch.manual_seed(0)
    assert not independent(Reading(reader, read), torch.randn(6, 4))


def test_those_of_some_are_not():
    torch.manual_seed(0)
    normal, x = mlp(nn.Tanh, 4, 6, 3), torch.randn(6, 4)
    normal.insert(1, nn.BatchNorm1d(6))
    assert not independent(normal, x) and not independent(Shared(), x)
    assert independent(normal.eval(), x)


def test_one_example_alone_says_nothing_of_larger_batches():
    torch.manual_seed(0)
    with torch.no_grad():
        energy, point = free_energy(Shared(), torch.randn(1, 4))
        assert are_independent(energy, point) and energy.graph.is_separable is None


@pytest.mark.parametrize("beta", [1e-3, 0.01])
def test_coupled_examples_settle_as_one_group(beta):
    """Eight layers with batch normalisation."""
    torch.manual_seed(0)
    hidden = (m for _ in range(8) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()))
    model, x, y = nn.Sequential(*hidden, nn.Linear(16, 3)).double(), torch.randn(32, 16), torch.randint(3, (32,))
    _, found = settled(model, x.double(), y, "cross_entropy", beta, mep.Sweep())
    assert found.result is mep.Result.CONVERGED
