"""The proof on a batch that a graph is its model, which leaves everything as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, call
from test_capture import Net
from torch import nn

import mep
from mep.capture import proof, trace
from mep.capture.proof import BOUNDS, Proof, prove


def proven(model, graph, x, y, cost="cross_entropy", leaves=()):
    """Whether the graph is shown to be the model."""
    return prove(Proof(model, graph, cost, "prediction", "held", leaves), x, y)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_passes_and_is_left_as_it_was(name):
    case = MODELS[name]
    model, x, y = case.build()
    graph = trace(model, x, case.leaves)
    before = copy.deepcopy(model.state_dict())
    buffers = {n: id(b) for n, b in model.named_buffers()}
    noise = torch.get_rng_state()
    assert proven(model, graph, x, y, leaves=case.leaves)
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
    model, x, y = TimeFirst().double(), torch.randn(5, 5, 4).double(), torch.randint(3, (5,))
    assert_right(model, x, y)


def assert_right(model, x, y):
    """The gradient for a weak nudge is autograd's."""
    found, _ = mep.EquilibriumPropagation(model, beta=1e-6, solver=mep.Sweep(tol=1e-9)).gradients(x, y)
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), allow_unused=True)
    for p, g in zip(model.parameters(), exact, strict=True):
        g = torch.zeros_like(p) if g is None else g
        torch.testing.assert_close(found.get(p, torch.zeros_like(p)), g, rtol=1e-3, atol=1e-6)


def aliased(n, x):
    h = n.a(x)
    h.view(-1).relu_()
    return n.c(h)


def remembered(n, x):
    h = g = n.a(x)
    g += 1.0
    return n.c(h)


def detached(n, x):
    return n.c(n.a(x).detach() + n.b(x))


def switched_off(n, x):
    with torch.no_grad():
        h = n.a(x)
    return n.c(h)


@pytest.mark.parametrize("forward", [aliased, remembered, detached, switched_off])
def test_what_forward_does_to_a_value_is_seen(forward):
    torch.manual_seed(0)
    assert_right(Net(forward).double(), torch.randn(5, 4).double(), torch.randint(3, (5,)))


def test_rows_that_are_no_examples_are_refused():
    model = Net(lambda n, x: n.c(n.a(x).transpose(0, 1)[:3].reshape(3, -1)[:, :4]))
    with pytest.raises(mep.TraceError, match=r"examples as rows.*Way out"):
        trace(model, torch.randn(5, 4))


# The proof itself: every way of spoiling a graph is found, and the parameter or buffer is named.


def spoilt_chain(graph, monkeypatch):
    node = graph.nodes[1]
    pull = type(node).vjp
    monkeypatch.setattr(
        type(node), "vjp", lambda own, *a: [-g for g in pull(own, *a)] if own is node else pull(own, *a)
    )


def lost_parameter(graph, monkeypatch):
    graph.nodes[1].parameters = graph.nodes[1].parameters[:1]
    contract = type(graph.nodes[1]).param_vjp
    monkeypatch.setattr(type(graph.nodes[1]), "param_vjp", lambda own, *a: contract(own, *a)[: len(own.parameters)])


def scaled_contraction(graph, monkeypatch):
    node = graph.nodes[0]
    contract = type(node).param_vjp
    monkeypatch.setattr(type(node), "param_vjp", lambda own, saved, force, w: contract(own, saved, force, 1.001 * w))


SPOILT = {
    "a force with the wrong sign": (spoilt_chain, r"gradient of `0\.(weight|bias)`.*node `0`"),
    "a lost parameter": (lost_parameter, r"gradient of `2\.bias`.*no node"),
    "a thousandth too much": (scaled_contraction, r"differs from autograd's by 0\.001"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_graph_is_refused(name, monkeypatch):
    spoil, message = SPOILT[name]
    model, x, y = MODELS["mlp tanh"].build()
    graph = trace(model, x)
    assert proven(model, graph, x, y)
    spoil(graph, monkeypatch)
    with pytest.raises(mep.TraceError, match=rf"(?s){message}.*Way out"):
        proven(model, graph, x, y)


def test_a_buffer_that_is_not_written_is_refused():
    model, x, y = MODELS["batch norm"].build()
    graph = trace(model, x)
    for node in graph.nodes:
        node.writes, node._run_and_write = (), node._run if hasattr(node, "_run") else None
    with pytest.raises(mep.TraceError, match=r"a buffer like `.*running_mean` is written otherwise.*Way out"):
        proven(model, graph, x, y)


def test_another_loss_is_refused():
    model, x, y = MODELS["mlp tanh"].build()
    with pytest.raises(mep.TraceError, match=r"(?s)is not Sequential.*Way out"):
        proven(
            model,
            trace(model, x),
            x,
            y,
            cost=lambda s, t: F.cross_entropy(s, t, reduction="none") + model[0].bias.sum(),
        )


class Uncopied(nn.Sequential):
    """Of which there is no copy in double precision to compare."""

    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_loss_may_be_off_by_rounding_and_no_more(dtype, sign, monkeypatch):
    """The gradient is right. Inside a bound passes, and outside does not; without a copy the bound is looser."""
    torch.manual_seed(0)
    off, right = [0.0], proof.by_graph

    def shifted(*given):
        loss, gradients = right(*given)
        return loss + sign * off[0] * (1 + abs(loss)), gradients

    monkeypatch.setattr(proof, "by_graph", shifted)
    x, y, bounds = torch.randn(6, 4).to(dtype), torch.arange(6) % 3, BOUNDS[dtype]
    tight, loose = bounds.relative + bounds.absolute, 2 * bounds.loose
    for kind, largest in ((nn.Sequential, tight), (Uncopied, tight if dtype is torch.float64 else loose)):
        model = kind(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        graph = trace(model, x)
        # What exceeds a bound is compared again, to the looser one or in float64; rounding itself takes a part of it.
        for off[0] in (0.0, 0.5 * largest):
            assert proven(model, graph, x, y)
        off[0] = 1.5 * largest
        with pytest.raises(mep.TraceError, match=r"its loss is .* and the model's .*Way out"):
            proven(model, graph, x, y)


@pytest.mark.parametrize(
    ("when", "proven_at"), [("amortised", {1, 4, 16}), ("always", set(range(1, 21))), ("never", set())]
)
def test_a_graph_is_proven_before_the_first_step_and_ever_more_rarely(when, proven_at, monkeypatch):
    model, x, y = MODELS["mlp tanh"].build()
    step, seen = [0], set()
    monkeypatch.setattr("mep.capture.cache.prove", lambda *a: seen.add(step[0]) or True)
    ep = mep.EquilibriumPropagation(model, proof=when)
    for step[0] in range(1, 21):
        ep.gradients(x, y)
    assert seen == proven_at


def test_a_change_that_no_snapshot_sees_is_found_by_the_next_proof():
    torch.manual_seed(0)
    factor = torch.ones(1).double()
    model = Net(lambda n, x: n.c(torch.tanh(n.a(x)) * float(factor))).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    opt = mep.eqprop(model.parameters(), model=model)
    opt.step(x=x, target=y)
    factor.numpy()[0] = 2  # behind torch's back
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mep.TraceError, match=r"not Net.*proven \d steps ago; nothing was changed"):
        for _ in range(3):
            before = copy.deepcopy(model.state_dict())
            opt.step(x=x, target=y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_verify_refuses_what_the_proof_refuses(monkeypatch):
    model, x, y = MODELS["mlp tanh"].build()
    monkeypatch.setattr("mep.capture.proof._difference", lambda *a: "The graph is not the model.")
    with pytest.raises(mep.TraceError, match="is not the model"):
        mep.verify(model, x, y)
