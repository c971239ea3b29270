"""Images are computed with their channels last, and whoever may count on another layout gets that."""

import copy

import pytest
import torch
from torch import nn

import mep
from mep.capture import trace
from mep.graph.node import AutogradNode, Chain
from mep.graph.ops import StepContext
from mep.layout import as_laid_out, layout, rows_of


class Viewed(nn.Module):
    """Reads the memory of an image as if it were contiguous, as `view` does."""

    def forward(self, h):
        return h.view(h.shape[0], -1)


def images(*inside):
    inside = copy.deepcopy(inside)
    return nn.Sequential(nn.Conv2d(2, 4, 3), *inside, nn.Conv2d(4, 3, 2), nn.ReLU(), Viewed(), nn.Linear(12, 3))


INSIDE = {
    "pointwise": (nn.ReLU(), nn.MaxPool2d(2)),
    "average": (nn.LeakyReLU(), nn.AvgPool2d(2)),
    "batch norm": (nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
    "group norm": (nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_gradients_are_those_of_backprop(inside):
    torch.manual_seed(0)
    net = images(*inside).double()
    x, y = torch.randn(5, 2, 8, 8).double(), torch.randint(0, 3, (5,))
    twin = copy.deepcopy(net)
    nn.functional.cross_entropy(twin(x), y).backward()
    gradients, estimate = mep.EquilibriumPropagation(net, beta=1e-5, solver=mep.Sweep(tol=1e-6)).gradients(x, y)
    assert estimate.converged
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(gradients[p], q.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_closed_forms_see_channels_last_and_foreign_code_does_not(inside):
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8, 8)
    graph = trace(images(*inside), x)
    with torch.no_grad():
        point = graph.evaluate(graph.bind(x), StepContext())
    first, *_, viewing = graph.nodes
    assert layout(point.values[first.name]) is torch.channels_last
    assert isinstance(viewing, AutogradNode | Chain)


def test_a_layout_is_kept():
    t = torch.arange(120.0).view(3, 2, 4, 5)
    last = t.contiguous(memory_format=torch.channels_last)
    assert layout(t) is torch.contiguous_format and layout(last) is torch.channels_last
    assert layout(t.flatten(1)) is torch.contiguous_format
    for like in (t, last):
        assert layout(as_laid_out(t, like)) is layout(as_laid_out(last, like)) is layout(like)
        assert layout(rows_of(like, torch.tensor([2, 0]))) is layout(like)
        torch.testing.assert_close(rows_of(like, torch.tensor([2, 0])), t[[2, 0]])
