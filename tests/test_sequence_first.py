"""Values with the examples in another dimension than the first, [time, batch, features]: their states stand on rows."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mep


class Sequence(nn.Module):
    """A model of three steps in time of four features, which come first after `forward` has exchanged dimensions."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in ({"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "o": nn.Linear(6, 3)} | modules).items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x.view(-1, 3, 4).transpose(0, 1))


def box(h):
    return h.clamp(0.0, 1.0)


def encoder():
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)


MODELS = {
    "linear": (lambda m, x: m.o(torch.tanh(m.b(torch.tanh(m.a(x)))).mean(0)), {}),
    "shortcut": (lambda m, x: m.o((lambda h: h + torch.tanh(m.b(h)))(torch.tanh(m.a(x)))[-1]), {}),
    "transformer": (lambda m, x: m.o(m.t(m.a(x)).mean(0)), {"t": encoder()}),
    "last state": (lambda m, x: m.o(m.r(x)[1][-1]), {"r": nn.GRU(4, 6)}),
    "outputs": (lambda m, x: m.o(m.r(x)[0].mean(0)), {"r": nn.LSTM(4, 6)}),
    "features first": (lambda m, x: m.o(torch.tanh(m.a.weight @ x[0].T + m.a.bias[:, None]).T), {}),
    "time and batch in one": (lambda m, x: m.o(torch.tanh(m.a(x.reshape(-1, 4))).view(3, -1, 6).mean(0)), {}),
}


def made(name, batch):
    torch.manual_seed(0)
    forward, modules = MODELS[name]
    return Sequence(forward, **copy.deepcopy(modules)).double(), torch.rand(batch, 12).double(), torch.arange(batch) % 3


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_a_state_with_the_examples_as_rows(name):
    model, x, y = made(name, 5)
    graph = mep.trace(model, x)
    recurrent = sum(p.numel() for p in model.r.parameters()) if hasattr(model, "r") else 0
    assert len(graph.states) > 1 and graph.share_kept[0] == recurrent
    assert all(len(s) == 5 for s in mep.EquilibriumPropagation(model).settle(x, y).free.states.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_gradient_tends_to_backprop_s(name, batch):
    """Also where there are as many examples as steps in time."""
    report = mep.verify(*made(name, batch), samples=0)
    assert report.ok, report


@pytest.mark.parametrize("name", MODELS)
def test_an_example_has_the_same_gradient_alone_as_among_others(name):
    """With a strong nudge, which moves states by much."""
    model, x, y = made(name, 4)
    ep = mep.EquilibriumPropagation(model, beta=0.1, solver=mep.Sweep(tol=1e-9, settle_steps=2000))
    together, estimate = ep.gradients(x, y)
    assert estimate.converged
    alone = [ep.gradients(x[i : i + 1], y[i : i + 1])[0] for i in range(4)]
    for p, g in together.items():
        torch.testing.assert_close(g, sum(one[p] for one in alone) / 4, rtol=1e-6, atol=1e-9)


HOPFIELD = {
    "layers": (lambda m, x: m.o(box(m.b(box(m.a(x)))).mean(0)), {}),
    "a sum before the activation": (lambda m, x: m.o(box(m.a(x) + m.b(box(m.a(x))))[-1]), {}),
    "sigmoid": (lambda m, x: m.o(torch.sigmoid(m.a(x)).sum(0)), {}),
}


@pytest.mark.parametrize("name", HOPFIELD)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_hopfield_networks(name, batch):
    torch.manual_seed(0)
    model = Sequence(HOPFIELD[name][0]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    x = torch.rand(batch, 12).double()
    graph = mep.trace(model, x, energy="hopfield")
    assert all(str(node.shape[0]) == str(graph.sizes[0][0][0]) for node in graph.states)
    report = mep.verify(model, x, torch.arange(batch) % 3, cost="one_hot_mse", energy="hopfield", samples=0)
    assert report.ok, report


def views(m, x):
    """Two views of every example, all of the one before all of the other."""
    h = torch.tanh(m.b(box(m.a(torch.cat([x[0], x[1]])))))
    return m.o(h.chunk(2)[0] * h.chunk(2)[1])


def test_layers_without_a_state_are_named():
    """No dimension has the examples: the gradient is right, and that autograd has made most of it is said."""
    torch.manual_seed(0)
    model, x, y = Sequence(views), torch.rand(5, 12), torch.arange(5) % 3
    ep = mep.EquilibriumPropagation(model)
    with pytest.warns(UserWarning, match="Layers without a state of their own: `linear`"):
        estimate = ep(x, y)
    inside = sum(p.numel() for p in (*model.a.parameters(), *model.b.parameters()))
    assert estimate.in_leaves == (inside, sum(p.numel() for p in model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ep(x, y)  # once
        paired = Sequence(lambda m, x: m.o(torch.tanh(m.a(x[:2].transpose(0, 1).flatten(0, 1))).view(-1, 2, 6).sum(1)))
        assert mep.EquilibriumPropagation(paired)(x, y).in_leaves[0] == 0


class Recurrent(nn.Module):
    """All steps of a recurrent layer in one operation, or one after the other."""

    def __init__(self, course=None, cell=None):
        super().__init__()
        self.course, self.cell, self.o = course, cell, nn.Linear(6, 3)

    def forward(self, x):
        if self.course is not None:
            return self.o(self.course(x)[0][:, -1])
        h = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.o(h)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_counted_as_learning_by_backprop(make):
    """Autograd goes back through the steps inside of the operation. Cells in a loop have a state at every step."""
    torch.manual_seed(0)
    x, y = torch.rand(5, 4, 2), torch.arange(5) % 3
    model = Recurrent(course=make(2, 6, num_layers=2, batch_first=True))
    inside = sum(p.numel() for p in model.course.parameters())
    with pytest.warns(UserWarning, match="without a state of their own: `.*in node `course`"):
        estimate = mep.EquilibriumPropagation(model)(x, y)
    assert estimate.in_leaves == (inside, inside + 21)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mep.EquilibriumPropagation(model, leaves=(make,))(x, y).in_leaves == (inside, inside + 21)
        looped = Recurrent(cell=nn.GRUCell(2, 6))
        assert mep.EquilibriumPropagation(looped)(x, y).in_leaves[0] == 0
    assert len(mep.trace(looped, x).states) == 5


def test_hopfield_networks_without_rows_of_examples_are_refused():
    model, x, y = Sequence(views), torch.rand(5, 12), torch.arange(5) % 3
    with pytest.raises(mep.TraceError, match="the rows are not the examples"):
        mep.EquilibriumPropagation(model, "one_hot_mse", energy="hopfield")(x, y)
