"""A model read as a graph: which operations own a state, what connects them, and what is refused, with a way out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, Block, Concatenating, Partial, Residual, Twice, call, mlp
from torch import nn

import mep
from mep.capture import capture, trace
from mep.graph.ops import Program, StepContext


class Net(nn.Module):
    """Layers `a`, `b`, `c` around a forward given as a function of (self, x)."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in ({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 3)} | modules).items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def shape_of(graph):
    """{name: (parents, whether it owns a state)}."""
    return {node.name: (node.parents, node.owns_state) for node in graph.nodes}


def owners(graph):
    """Parameter name -> the nodes that use it."""
    names = {p: n for n, p in graph.model.named_parameters()}
    found = {}
    for node in graph.nodes:
        for p in node.parameters:
            found.setdefault(names[p], []).append(node.name)
    return found


X = torch.linspace(-1, 1, 20).view(5, 4)


def both(name):
    return {f"{name}.weight", f"{name}.bias"}


def test_a_node_is_a_layer_with_what_feeds_it():
    graph = trace(
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Unflatten(1, (3, 1)), nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2)),
        X,
    )
    assert shape_of(graph) == {"0": (("input",), True), "3": (("0",), True), "5": (("3",), True)}
    assert [[op.name for op in node.program] for node in graph.nodes] == [["0"], ["1", "2", "3"], ["4", "5"]]
    assert graph.output == "5"


def test_the_output_owns_a_state_even_without_parameters():
    graph = trace(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), X)
    assert shape_of(graph) == {"0": (("input",), True), "1": (("0",), True)}
    graph = trace(Residual(), X)
    assert shape_of(graph)["last"] == (("first", "second"), True)


def test_a_value_that_several_nodes_read_is_a_junction():
    net = Net(lambda n, x: n.c((h := torch.tanh(n.a(x))) + n.b(h)))
    assert shape_of(trace(net, X)) == {
        "a": (("x",), True),
        "tanh": (("a",), False),
        "b": (("tanh",), True),
        "c": (("tanh", "b"), True),
    }


def test_branches_meet_in_one_node():
    shape = shape_of(trace(Concatenating(), X))
    assert shape["last"] == (("x", "left", "right"), True)


def test_a_module_used_twice_is_two_nodes_with_the_same_parameters():
    graph = trace(Twice(), X)
    assert shape_of(graph) == {
        "first": (("x",), True),
        "shared": (("first",), True),
        "shared#2": (("shared",), True),
        "last": (("shared#2",), True),
    }
    assert owners(graph)["shared.weight"] == ["shared", "shared#2"]


def test_parameter_expressions_belong_to_the_nodes_that_read_them():
    net = Net(lambda n, x: F.linear(n.b(F.linear(x, n.a.weight.t() * 2)), n.a.weight))
    assert owners(trace(net, X)) == {
        "a.weight": ["linear", "linear_2"],
        "b.weight": ["b"],
        "b.bias": ["b"],
    }


def test_a_shape_is_no_value():
    net = Net(lambda n, x: n.c(n.b(n.a(x)).view(x.size(0), -1)))
    assert [name for name, (_, owns) in shape_of(trace(net, X)).items() if owns] == ["a", "b", "c"]
    assert not [node for node in trace(net, X).nodes if not node.owns_state]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_reached_by_exactly_the_nodes_that_use_it(name):
    """Autograd through each node's own operations is the judge."""
    case = MODELS[name]
    model, x, _ = case.build()
    graph = trace(model, x, case.leaves)
    values, reached = graph.bind(x), set()
    with torch.enable_grad():
        for node in graph.nodes:
            (out,) = Program(node.program, node.parents, [node.op])(None, *(values[p] for p in node.parents))
            mu = values[node.name] = out.detach().requires_grad_()
            trained = [p for p in model.parameters() if p.requires_grad]
            found = torch.autograd.grad(out.sum(), trained, allow_unused=True) if out.requires_grad else []
            used = {p for p, g in zip(trained, found, strict=False) if g is not None}
            assert used == {p for p in node.parameters if p.requires_grad}, node.name
            assert not used or node.owns_state
            assert mu.shape == out.shape
            reached |= used
    output = call(model, x).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert reached == {
        p
        for p, g in zip(trained, torch.autograd.grad(output, trained, allow_unused=True), strict=True)
        if g is not None
    }


def test_layers_that_are_not_called_are_in_no_node():
    assert not both("unused") & set(owners(trace(Partial(), (X, X[:, :2]))))


@pytest.mark.parametrize("leaves", [(Block,), ("1", "3")])
def test_leaves_are_kept_whole(leaves):
    model = nn.Sequential(nn.Linear(4, 6), Block(), nn.Tanh(), Block(), nn.Linear(6, 3))
    graph = trace(model, X, leaves)
    assert [node.name for node in graph.nodes] == ["0", "1", "3", "4"]
    assert {n for n, nodes in owners(graph).items() if nodes == ["1"]} == both("1.inner") | both("1.outer")


def test_a_whole_model_may_be_a_leaf():
    model = Block()
    assert len(trace(model, torch.randn(5, 6), (Block,)).nodes) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.c(F.relu(n.b(F.relu_(n.a(x))), inplace=True)),
        lambda n, x: n.c(n.act(n.b(n.act(n.a(x))))),
        lambda n, x: n.c((h := n.a(x), h.relu_(), n.b(h) + h)[-1]),
        lambda n, x: n.c((h := n.a(x), h.add_(1.0).mul_(0.5), n.b(h) + h)[-1]),
        lambda n, x: n.c((h := n.a(x), n.act(h), n.b(h) + h)[-1]),
    ],
    ids=["functions", "modules", "method", "arithmetic", "read after it was overwritten"],
)
def test_in_place_operations_are_read_as_pure_ones(forward):
    torch.manual_seed(0)
    net, x = Net(forward, act=nn.ReLU(inplace=True)), torch.randn(5, 4)
    kept = x.clone()
    graph = trace(net, x)
    point = graph.evaluate(graph.bind(x), StepContext())
    torch.testing.assert_close(point.values[graph.output], net(x))
    assert torch.equal(x, kept)


def test_adding_in_place_is_read_as_adding():
    class Adding(Net):
        def forward(self, x):
            h = self.a(x)
            h += self.b(torch.tanh(h))
            return self.c(h)

    net, x = Adding(None), torch.randn(5, 4)
    graph = trace(net, x)
    torch.testing.assert_close(graph.evaluate(graph.bind(x), StepContext()).values["c"], net(x))


@pytest.mark.parametrize("reading", [("prediction", "held"), ("prediction", "exact"), ("hopfield", "held")])
def test_reading_leaves_the_model_as_it_was(reading):
    torch.manual_seed(0)
    model = Net(lambda n, x: n.c(F.relu(n.b(x + torch.ones(4)))))
    noise, attributes, values = torch.get_rng_state(), set(vars(model)), copy.deepcopy(model.state_dict())
    x = torch.randn(5, 4)
    torch.set_rng_state(noise)
    before = model(x)
    capture(model, x, (), *reading)
    assert torch.equal(torch.get_rng_state(), noise)
    assert torch.equal(model(x), before)
    assert set(vars(model)) == attributes
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_inputs_are_bound_by_position_or_name():
    x, context = torch.randn(2, 4), torch.randn(2, 2)
    graph = trace(Partial(), (x, context))
    by_name = trace(Partial(), {"context": context, "x": x})
    assert graph.inputs == ("x", "context")
    assert graph.bind((x, context)).keys() == by_name.bind({"context": context, "x": x}).keys()
    for wrong in (x, (x, context, x), {"x": x, "contxt": context}):
        with pytest.raises(mep.InputError, match="takes"):
            graph.bind(wrong)


def test_defaults_of_forward_are_inputs_that_may_be_left_out():
    class Defaulted(Net):
        def forward(self, x, gain=2.0):
            return self.c(self.a(x) * gain)

    model, x = Defaulted(None), torch.randn(5, 4)
    for given in (x, {"x": x, "gain": 3.0}):
        graph = trace(model, given)
        expected = model(**given) if isinstance(given, dict) else model(given)
        torch.testing.assert_close(graph.evaluate(graph.bind(given), StepContext()).values["c"], expected)


def branching(n, x):
    return n.a(x) if x.sum() > 0 else n.b(x)


REFUSED = {
    "control flow": (
        branching,
        r"depends on the values.*line \d+ in branching: return n.a\(x\) if x.sum\(\) > 0.*leaves=",
    ),
    "tuple output": (lambda n, x: (n.a(x), n.b(x)), r"must be one tensor.*Way out"),
    "constant output": (lambda n, x: n.c.weight * 2, r"computed from the input.*Way out"),
    "input as output": (lambda n, x: x, r"computed from the input.*Way out"),
    "autograd inside": (
        lambda n, x: n.c(torch.autograd.grad(n.a(x.requires_grad_()).sum(), x, create_graph=True)[0]),
        r"it differentiates.*line \d+ in .*leaves=",
    ),
    "a parameter is written": (
        lambda n, x: (n.a.weight.data.clamp_(-1, 1), n.c(n.a(x)))[1],
        r"writes to its parameter `a.weight`.*Way out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_with_a_way_out(name):
    forward, message = REFUSED[name]
    with pytest.raises(mep.TraceError, match=rf"(?s){message}"):
        trace(Net(forward), X)


def test_unknown_leaves_are_refused():
    for leaf in (nn.Conv2d, "second"):
        with pytest.raises(mep.TraceError, match=r"leaves=.*no module of Sequential"):
            trace(mlp(nn.ReLU, 4, 3), X, (leaf,))
    for leaves in ((3,), nn.ReLU, None, "0"):
        with pytest.raises(mep.ArgumentError, match=r"leaves=.*: must be a tuple of module types"):
            trace(mlp(nn.ReLU, 4, 3), X, leaves)


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.c(n.act(input=n.a(x))),
        lambda n, x: n.c((parts := n.a(x).chunk(2, 1))[0].repeat(1, 2) + n.b(torch.cat(parts, 1))),
        lambda n, x: n.c(F.dropout(n.a(x), 0.0, True, True)),
        lambda n, x: n.c(F.relu(input=n.a(x))),
    ],
    ids=["module called by keyword", "tuple read whole and in parts", "in place by position", "function by keyword"],
)
def test_unusual_calls_are_handled_or_refused_by_name(forward):
    torch.manual_seed(0)
    net, x, y = Net(forward, act=nn.ReLU()).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    try:
        found, _ = mep.EquilibriumPropagation(net, beta=1e-6).gradients(x, y)
    except mep.TraceError:
        return
    loss = F.cross_entropy(net(x), y)
    for p, g in found.items():
        torch.testing.assert_close(g, torch.autograd.grad(loss, p, retain_graph=True)[0], rtol=1e-3, atol=1e-5)


def test_the_table_of_a_graph_names_parameters_by_their_module():
    """Those of the node's own module without its path, tied ones of another module with it; no line is too wide."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    first, second = (line.split() for line in str(mep.trace(Tied(), torch.rand(3, 4))).splitlines()[1:3])
    assert first[:6] == ["first", "linear", "batchx4", "weight,", "bias", "x"]
    assert second[:7] == ["second", "tanh,", "linear", "batchx4", "first.weight,", "bias", "first"]
    plain = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    assert max(map(len, str(mep.trace(plain, torch.rand(2, 784))).splitlines())) <= 80
