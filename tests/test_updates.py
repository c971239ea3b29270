"""What the updates promise alike; what each computes is in test_muon.py, test_dion.py and test_natural.py."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from mep.errors import ArgumentError
from mep.updates import METHODS, Dion, Muon, NaturalGradient

UPDATES = (Muon, Dion, NaturalGradient)


def parameter(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def gradient(p, step):
    generator = torch.Generator().manual_seed(100 + step + p.numel())
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer, steps, first=0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(p, step)
        optimizer.step()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 5)).double()


def each(*updates, **of_dion):
    """Every one of these classes with its defaults, but Dion with these keywords."""
    cases = [(update, of_dion if update is Dion else {}) for update in updates]
    return pytest.mark.parametrize(("update", "keywords"), cases, ids=[update.__name__ for update in updates])


@each(Muon, Dion, dion_threshold=0, rank_fraction=0.5)
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (13, 3, 2, 2)])
def test_memory_format_does_not_matter(update, keywords, shape):
    plain, last = parameter(*shape), parameter(*shape)
    last.data = last.data.to(memory_format=torch.channels_last)
    run(update([plain], **keywords), 3)
    run(update([last], **keywords), 3)
    torch.testing.assert_close(plain.detach(), last.detach().contiguous())
    plain, strided = parameter(5, 4), parameter(5, 4)
    strided.data = strided.data.T.contiguous().T
    run(update([plain], **keywords), 3)
    run(update([strided], **keywords), 3)
    torch.testing.assert_close(plain.detach(), strided.detach())


@each(Muon, Dion, dion_threshold=30, rank_fraction=0.5)
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_it_goes_down(update, keywords, method):
    torch.manual_seed(0)
    net, x, y = network(), torch.randn(16, 2, 4, 4).double(), torch.randn(16, 5).double()
    optimizer = update(net.parameters(), lr=0.02, method=method, **keywords)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad  # computed with gradients enabled
    for _ in range(100):
        last = optimizer.step(closure)
    assert last < 0.3 * first


@each(Muon, Dion, dion_threshold=0)
def test_parameters_without_gradient_stay(update, keywords):
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = update(net.parameters(), weight_decay=0.1, **keywords)
    assert optimizer.step() is None
    net[2].weight.grad = torch.ones_like(net[2].weight)
    optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "2.weight")
    assert set(optimizer.state) == {net[2].weight}


@each(*UPDATES, dion_threshold=0)
def test_parameters_without_elements_are_no_trouble(update, keywords):
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    update([empty], **keywords).step()


@each(Muon, Dion, dion_threshold=16, rank_fraction=0.25)
def test_a_schedule_drives_matrices_and_vectors(update, keywords):
    large, small, vector = parameter(4, 4), parameter(3, 4), parameter(3)
    optimizer = update([large, small, vector], lr=1.0, momentum=0.0, vector_scale=0.5, **keywords)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for step, lr in enumerate((1.0, 0.1, 0.01)):
        old = [p.detach().clone() for p in (large, small, vector)]
        run(optimizer, 1, first=step)
        scheduler.step()
        moved = [before - p.detach() for before, p in zip(old, (large, small, vector), strict=True)]
        assert [torch.linalg.matrix_norm(m, 2).item() for m in moved[:2]] == pytest.approx([lr, lr], rel=1e-6)
        torch.testing.assert_close(moved[2], 0.5 * lr * gradient(vector, step))


@each(Muon, Dion, dion_threshold=20)
def test_lr_may_be_a_tensor(update, keywords):
    ours, theirs = [parameter(5, 4), parameter(3, 4), parameter(3)], [parameter(5, 4), parameter(3, 4), parameter(3)]
    run(update(ours, lr=torch.tensor(0.125), **keywords), 2)
    run(update(theirs, lr=0.125, **keywords), 2)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def continued(make_copy, update, keywords, dtype):
    """Six steps, and three steps, a copy, three more."""
    straight = network().to(dtype)
    run(update(straight.parameters(), lr=0.05, **keywords), 6)
    net = network().to(dtype)
    optimizer = update(net.parameters(), lr=0.05, **keywords)
    run(optimizer, 3)
    net, optimizer = make_copy(net, optimizer)
    run(optimizer, 3, first=3)
    for one, other in zip(straight.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


@each(Muon, Dion, dion_threshold=30, rank_fraction=0.5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_for_bit(update, keywords, dtype):
    def load(net, optimizer):
        saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))
        fresh = network().to(dtype)
        fresh.load_state_dict(saved[0])
        loaded = update(fresh.parameters(), lr=9.0, momentum=0.1)
        loaded.load_state_dict(saved[1])
        again = loaded.state_dict()["state"]
        for index, state in saved[1]["state"].items():
            assert again[index].keys() == state.keys()
            assert all(torch.equal(torch.as_tensor(again[index][name]), torch.as_tensor(state[name])) for name in state)
        return fresh, loaded

    continued(load, update, keywords, dtype)


@each(Muon, Dion, dion_threshold=30, rank_fraction=0.5)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_continues_bit_for_bit_and_apart(update, keywords, make):
    def duplicate(net, optimizer):
        twin = make((net, optimizer))
        run(optimizer, 1)  # the original goes elsewhere and takes nothing along
        return twin

    continued(duplicate, update, keywords, torch.float64)


@pytest.mark.parametrize(
    ("update", "keyword"), [(Muon, "vector_scale"), (Dion, "rank_fraction"), (NaturalGradient, "damping")]
)
def test_state_of_an_older_version_gets_the_defaults(update, keyword):
    optimizer = update([parameter(3, 4)], **{keyword: 0.25})
    saved = optimizer.state_dict()
    del saved["param_groups"][0][keyword]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][keyword] == 0.25


@each(Muon, Dion, dion_threshold=20)
@pytest.mark.parametrize("shape", [(5, 4), (3, 4), (5, 2, 2)])
def test_autocast_does_not_reach_inside(update, keywords, shape):
    one, other = parameter(*shape, dtype=torch.float32), parameter(*shape, dtype=torch.float32)
    run(update([one], **keywords), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(update([other], **keywords), 2)
    assert torch.equal(one, other)


BAD = {
    UPDATES: {
        "lr": (-1.0, math.nan, math.inf),
        "momentum": (1.0, -0.1),
        "weight_decay": (-0.1,),
        "vector_scale": (-1,),
        "nesterov": (0.9, 1, None),
    },
    (Dion,): {
        "rank_fraction": (0.0, 1.5, math.nan),
        "dion_threshold": (-1, 10.5),
        "power_iterations": (0, True),
    },
    (NaturalGradient,): {
        "damping": (0.0, -1.0, math.nan, math.inf),
        "kl_clip": (0.0, -1.0, math.nan),
        "decay": (-0.1, 1.0, math.nan),
        "factors_every": (0, 1.5, True),
        "inverse_every": (0, 1.5, True),
        "rank": (0, 1.5, True),
        "use_diagonal_fisher": (1, None),
        "orthogonalise": (1, None),
    },
}
EXPLAINED = {
    UPDATES: [({"lr": torch.zeros(2)}, r"lr=\.\.\..*\[2\]")],
    (Muon, Dion): [
        ({"scale": "frobenius"}, r"scale='frobenius'.*spectral.*rms.*none"),
        ({"method": "cubic"}, r"method='cubic'.*newton_schulz"),
        ({"method": "newton_schulz", "steps": 0}, r"steps=0"),
        ({"steps": 3}, r"steps=3.*no effect.*'auto'"),
    ],
}
REFUSED = [
    (update, {keyword: value}, re.escape(f"{keyword}={value!r}"))
    for updates, bad in BAD.items()
    for update in updates
    for keyword, values in bad.items()
    for value in values
]
REFUSED += [(update, *row) for updates, rows in EXPLAINED.items() for update in updates for row in rows]


@pytest.mark.parametrize(("update", "keywords", "message"), REFUSED)
def test_refusals_name_the_call_and_the_value(update, keywords, message):
    weight = parameter(3, 4)
    with pytest.raises(ArgumentError, match=rf"^{update.__name__}\({message}"):
        update([weight], **keywords)
    with pytest.raises(ArgumentError, match=rf"^{update.__name__}\({message}"):
        update([{"params": [weight], **keywords}])
    optimizer = update([weight])
    with pytest.raises(ArgumentError, match=rf"^{update.__name__}\({message}"):
        optimizer.add_param_group({"params": [parameter(2, 2)], **keywords})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("update", "keyword"), [(Muon, "ns_steps"), (Dion, "rank"), (NaturalGradient, "scale")])
def test_unknown_keywords_are_type_errors(update, keyword):
    with pytest.raises(TypeError, match=keyword):
        update([parameter(3, 4)], **{keyword: 3})


@each(*UPDATES, dion_threshold=0)
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_before_anything_moves(update, keywords, kind):
    weight, bad = parameter(3, 4), parameter(3, 4)
    if kind == "sparse":
        bad.grad = torch.eye(3, 4, dtype=torch.float64).to_sparse()
    else:
        bad = nn.Parameter(torch.zeros(3, 4, dtype=torch.cfloat))
        bad.grad = torch.ones_like(bad)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer = update([{"params": [weight]}, {"params": [bad]}], **keywords)
    with pytest.raises(ArgumentError, match=rf"^{update.__name__}\.step: .*\[3, 4\] is {kind}"):
        optimizer.step()
    assert torch.equal(weight, before) and not optimizer.state
