"""Closed forms against autograd: value, `J^T g`, `J t`, parameter gradients, and all of them for some rows only."""

import pytest
import torch
from torch import nn
from torch.func import jvp

import mep
from mep.capture import trace
from mep.graph.node import AutogradNode, Chain
from mep.graph.ops import StepContext

BATCH = 3
FLAT, SIGNAL, IMAGE, VOLUME = (4,), (2, 9), (2, 7, 8), (2, 5, 4, 5)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Product(nn.Module):
    """`x W`, with the inputs along the rows of W."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 20).view(4, 5))

    def forward(self, x):
        return x @ self.weight


CLOSED = {
    "linear": (nn.Linear(4, 5), FLAT),
    "linear over positions, no bias": (nn.Linear(4, 5, bias=False), (2, 3, 4)),
    "stride": (nn.Conv2d(2, 4, 3, stride=2), IMAGE),
    "pairs": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), IMAGE),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5)),
    "dilation, no bias": (nn.Conv2d(2, 4, 3, dilation=2, bias=False), IMAGE),
    "Conv1d": (nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=2), SIGNAL),
    "Conv3d": (nn.Conv3d(2, 4, 2, stride=2), VOLUME),
    "layer norm": (nn.LayerNorm(4), (3, 4)),
    "layer norm over two dimensions": (nn.LayerNorm((3, 4)), (3, 4)),
    "layer norm, not affine": (nn.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "layer norm, no bias": (nn.LayerNorm(4, bias=False), (3, 4)),
    "max pooling, overlapping, padded": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max pooling, dilated": (nn.MaxPool2d(2, 1, dilation=2), IMAGE),
    "max pooling, ceil mode": (nn.MaxPool2d(3, 2, ceil_mode=True), IMAGE),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1), SIGNAL),
    "MaxPool3d": (nn.MaxPool3d(2), VOLUME),
    "adaptive max pooling": (nn.AdaptiveMaxPool2d((2, 3)), IMAGE),
    "max pooling of ReLU": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2)), IMAGE),
    "max pooling where it is flat": (nn.Sequential(nn.Hardtanh(-0.1, 0.1), nn.MaxPool2d(2)), IMAGE),
    "max pooling of falling units": (nn.Sequential(nn.LeakyReLU(-0.5), nn.MaxPool2d(2)), IMAGE),
    "average pooling, padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "average pooling, ceil mode": (nn.AvgPool2d((3, 2), 2, ceil_mode=True), IMAGE),
    "average pooling, divisor": (nn.AvgPool2d(2, divisor_override=3), IMAGE),
    "adaptive average pooling": (nn.AdaptiveAvgPool2d((None, 3)), IMAGE),
    "flatten": (nn.Flatten(), IMAGE),
    "flatten the middle": (Call(lambda x: torch.flatten(x, 1, -2)), IMAGE),
    "flatten into rows": (Call(lambda x: x.flatten(0, 1)), IMAGE),
    "same": (nn.Conv2d(2, 4, 3, padding="same"), IMAGE),
    "reshape": (Call(lambda x: x.reshape(x.shape[0], -1)), IMAGE),
    "unsqueeze": (Call(lambda x: x.unsqueeze(1)), FLAT),
    "mean over positions": (Call(lambda x: x.mean((1, 2), keepdim=True)), IMAGE),
    "mean over features": (Call(lambda x: x.mean(-1)), IMAGE),
    "matrix product": (Product(), (3, 4)),
    "leaky ReLU, slope below zero": (nn.LeakyReLU(-0.5), FLAT),
    "clamp on one side": (Call(lambda x: x.clamp(min=0.1)), FLAT),
    "hardtanh": (nn.Hardtanh(-0.3, 0.5), FLAT),
    "tanh": (nn.Tanh(), FLAT),
    "GELU": (nn.GELU("tanh"), FLAT),
    "softplus": (nn.Softplus(2.0, 1.0), FLAT),
}
BY_AUTOGRAD = {
    "circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1), IMAGE),
    "abs": (Call(torch.abs), FLAT),
    "AvgPool1d": (nn.AvgPool1d(2), SIGNAL),
    "matrix of its own, batched": (Call(lambda x: x @ x.transpose(-1, -2)), (3, 4)),
}
KINDS = {"plain": {}, "one example": {"batch": 1}, "channels last": {"last": True}, "kinks": {"hold": False}}
TOLERANCES = {torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 6e-3}


def node_of(operation, shape, dtype, batch, last, hold):
    """The node of an operation behind a linear layer, its parent, and what it predicts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[-1], shape[-1]), operation).to(dtype)
    x = torch.randn(batch, *shape).to(dtype)
    if last and x.ndim == 4:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    graph, held = trace(net, x), StepContext(freeze_branches=hold)
    with torch.no_grad():
        point = graph.evaluate(graph.bind(x), held)
    assert graph.nodes[-1].parents == ("0",)
    return graph.nodes[-1], point.values["0"], point.predictions[graph.output], point.saved[graph.output]


def assert_same(found, expected, tolerance):
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-30


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CLOSED, *BY_AUTOGRAD])
def test_jacobian_from_both_sides(name, kind, dtype):
    operation, shape = (CLOSED | BY_AUTOGRAD)[name]
    options = {"batch": BATCH, "last": False, "hold": True} | KINDS[kind]
    node, h, mu, saved = node_of(operation, shape, dtype, **options)
    assert isinstance(node, Chain if name in CLOSED else AutogradNode)
    tolerance, force, weight = TOLERANCES[dtype], torch.randn_like(mu), 0.7
    leaf = h.clone().requires_grad_()
    expected = operation(leaf)
    pulled, *gradients = torch.autograd.grad(expected, [leaf, *node.parameters], force)
    with torch.no_grad():
        assert_same(mu, expected.detach(), tolerance)
        assert_same(node.vjp(saved, force)[0], pulled, tolerance)
        for found, exact in zip(node.param_vjp(saved, force, weight), gradients, strict=True):
            assert_same(found, weight * exact, tolerance)
        if not (node.is_affine_when_held and options["hold"] and dtype is torch.float64):
            return
        tangent = torch.randn_like(h)
        pushed = node.jvp(saved, [tangent])[0]
        assert_same(pushed, jvp(operation, (h,), (tangent,))[1], tolerance)
        if len(mu) == len(h):
            some = torch.tensor([len(h) - 1])
            rows = node.rows(saved, some)
            assert_same(node.vjp(rows, force[some])[0], pulled[some], tolerance)
            assert_same(node.jvp(rows, [tangent[some]])[0], pushed[some], tolerance)


class Sum(nn.Module):
    """A sum over which terms of different shapes are spread."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(self.a(x) + self.b(x[:, :1]))


def test_force_on_a_term_that_was_spread_is_summed():
    torch.manual_seed(0)
    net, x = Sum().double(), torch.randn(BATCH, 5, 4).double()
    graph = trace(net, x)
    with torch.no_grad():
        point = graph.evaluate(graph.bind(x), StepContext())
    node, saved = graph.nodes[-1], point.saved[graph.output]
    assert isinstance(node, Chain) and len(node.parents) == 2
    terms = [point.values[p].clone().requires_grad_() for p in node.parents]
    force, some = torch.randn(BATCH, 5, 3).double(), torch.tensor([2, 0])
    exact = torch.autograd.grad(net.c(terms[0] + terms[1]), terms, force)
    for found, few, expected in zip(
        node.vjp(saved, force), node.vjp(node.rows(saved, some), force[some]), exact, strict=True
    ):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(few, expected[some])


class Scale(nn.Module):
    """Float32 from whatever comes in: products are promoted, not cast."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return x * self.scale


MIXED = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 3), Scale(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ),
    "norms and sums": lambda: nn.Sequential(
        nn.Flatten(), nn.LayerNorm(25), nn.LayerNorm(25, elementwise_affine=False), nn.Linear(25, 8), Residual()
    ),
}  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.outer, self.last = (
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = x + self.outer(torch.tanh(self.inner(self.norm(x))))
        return self.last(self.norm(x))


@pytest.mark.parametrize("name", MIXED)
def test_autocast_mixes_dtypes_as_backprop_does(name):
    """Values in bfloat16 and float32 side by side; the gradient is as near to float32's as backprop's is."""
    torch.manual_seed(0)
    model, x, target = MIXED[name](), torch.randn(BATCH, 1, 5, 5), torch.arange(BATCH)
    exact = gradient(model, x, target)
    with torch.autocast("cpu", torch.bfloat16):
        found, estimate = mep.EquilibriumPropagation(model, beta=1e-3).gradients(x, target)
        coarse = gradient(model, x, target)
    assert estimate.converged
    assert all(g.dtype is torch.float32 for g in found.values())
    ours = torch.cat([found[p].flatten() for p in model.parameters()])
    assert (ours - exact).norm() < 3 * (coarse - exact).norm() + 0.02 * exact.norm()
    assert (coarse - exact).norm() > 1e-4 * exact.norm()


def gradient(model, x, target):
    loss = nn.functional.cross_entropy(model(x), target)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@torch.no_grad()
def test_force_has_the_dtype_of_its_value():
    with torch.autocast("cpu", torch.bfloat16):
        node, h, mu, saved = node_of(nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), FLAT, torch.float32, BATCH, False, True)
        single = node.vjp(saved, mu)[0]
        terms = [torch.ones(BATCH, 4), torch.ones(BATCH, 4, dtype=torch.bfloat16)]
        last = trace(Sum(), torch.ones(BATCH, 5, 4)).nodes[-1]
        double = last.vjp(last.predict(terms, StepContext())[1], torch.ones(BATCH, 3))
    assert single.dtype is h.dtype is torch.bfloat16
    assert [force.dtype for force in double] == [torch.float32, torch.bfloat16]
