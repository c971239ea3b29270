"""`check_graph` proves on a batch that the graph is the model, and leaves everything as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, call
from test_tracing import Net
from torch import nn

import mep
from mep.check import check_graph
from mep.tracing import trace


@pytest.mark.parametrize("name", MODELS)
def test_every_model_passes_and_is_left_as_it_was(name):
    case = MODELS[name]
    model, x, _ = case.build()
    graph = trace(model, case.leaves)
    before = copy.deepcopy(model.state_dict())
    buffers = {n: id(b) for n, b in model.named_buffers()}
    noise = torch.get_rng_state()
    check_graph(graph, x)
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {n: id(b) for n, b in model.named_buffers()} == buffers
    assert all(p.grad is None for p in model.parameters())
    assert {m.training for m in model.modules()} == {True}


def test_forward_gives_the_same_before_and_after_a_step():
    for case in MODELS.values():
        model, x, y = case.build()
        model.eval()
        before = call(model, x)
        mep.EquilibriumPropagation(model, leaves=case.leaves)(x, y)
        assert torch.equal(call(model, x), before)


@pytest.mark.parametrize("outer", [True, False], ids=["train", "eval outside, train inside"])
def test_running_statistics_move_once_a_step(outer):
    model, x, y = MODELS["batch norm"].build()
    model.train(outer)
    for m in model:
        m.train()
    expected = copy.deepcopy(model)
    expected(x)
    mep.EquilibriumPropagation(model, solver=mep.Sweep(tol=1e-6))(x, y)
    for (name, b), (_, e) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        torch.testing.assert_close(b, e, msg=name)


NOISY = {
    "chain": lambda n, x: n.c(F.dropout(n.b(F.dropout(torch.tanh(n.a(x)))))),
    "input last": lambda n, x: n.c(n.b(F.dropout(n.a(x))) + n.d(F.dropout(x))),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_drawn_once_a_step_as_backprop_draws_it(name):
    torch.manual_seed(0)
    model = Net(NOISY[name], d=nn.Linear(4, 4)) if name == "input last" else Net(NOISY[name])
    model, x, y = model.double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    ep = mep.EquilibriumPropagation(model, beta=1e-6, solver=mep.Sweep(tol=1e-9))
    for _ in range(2):
        noise = torch.get_rng_state()
        found, _ = ep.gradients(x, y)
        after = torch.get_rng_state()
        torch.set_rng_state(noise)
        exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        assert torch.equal(torch.get_rng_state(), after)
        for p, g in zip(model.parameters(), exact, strict=True):
            torch.testing.assert_close(found[p], g, rtol=1e-3, atol=1e-6)


def test_noise_in_two_branches_is_drawn_in_the_order_of_the_model_or_refused():
    torch.manual_seed(0)

    def forward(n, x):
        left, right = F.dropout(n.a(x)), F.dropout(n.b(x))
        return n.c(right) + n.d(left)

    model, x, y = Net(forward, d=nn.Linear(4, 3)).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    noise = torch.get_rng_state()
    found, _ = mep.EquilibriumPropagation(model, beta=1e-6).gradients(x, y)
    torch.set_rng_state(noise)
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for p, g in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(found[p], g, rtol=1e-3, atol=1e-6)


class TimeFirst(nn.Module):
    """Inside, the first dimension is time; here there are as many steps as examples."""

    def __init__(self):
        super().__init__()
        self.first, self.attend = nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.attend(self.first(x).transpose(0, 1)).transpose(0, 1).mean(1))


def test_as_many_time_steps_as_examples_are_no_examples():
    torch.manual_seed(0)
    with pytest.raises(mep.TraceError, match=r"`attend`.*batch first"):
        check_graph(trace(TimeFirst()), torch.randn(5, 5, 4))


def aliased(n, x):
    h = n.a(x)
    h.view(-1).relu_()
    return n.c(h)


def remembered(n, x):
    h = g = n.a(x)
    g += 1.0
    return n.c(h)


def folded_into_rows(n, x):
    return n.c(n.a(x).transpose(0, 1)[:3].reshape(3, -1)[:, :4])


def detached(n, x):
    return n.c(n.a(x).detach() + x)


def switched_off(n, x):
    with torch.no_grad():
        h = n.a(x)
    return n.c(h)


REFUSED = {
    "view written in place": (aliased, r"does not compute what its forward does.*leaves="),
    "name bound twice, written in place": (remembered, r"does not compute what its forward does.*leaves="),
    "rows that are no examples": (folded_into_rows, r"`c` predicts \(3, 3\) for 5 examples.*batch first"),
    "detached": (detached, r"`a\.bias`, `a\.weight`.*disagree.*Way out"),
    "switched off": (switched_off, r"`a\.bias`, `a\.weight`.*disagree.*Way out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tracing_cannot_see_is_refused_with_a_way_out(name):
    forward, message = REFUSED[name]
    torch.manual_seed(0)
    model, x = Net(forward), torch.randn(5, 4)
    graph = trace(model)
    with pytest.raises(mep.TraceError, match=rf"(?s){message}"):
        check_graph(graph, x)


def test_a_parameter_that_a_kept_module_does_not_use_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    graph = trace(Net(lambda n, x: n.c(n.part(x)), part=Half()), (Half,))
    with pytest.raises(mep.TraceError, match=r"`part\.idle\.bias`, `part\.idle\.weight`"):
        check_graph(graph, torch.randn(5, 4))


def test_a_graph_that_lost_a_parameter_is_refused():
    model, x, _ = MODELS["mlp tanh"].build()
    graph = trace(model)
    graph.nodes[1].parameters = graph.nodes[1].parameters[:1]
    with pytest.raises(mep.TraceError, match=r"`2\.bias`"):
        check_graph(graph, x)
