"""Models as people write them train unchanged: order in beta, residual at the defaults, buffers, and a falling loss."""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import backprop
from torch import nn
from zoo import BATCH, VOCABULARY, ZOO, Branching, Cubed, Entry, call, labels_of_tokens, mlp, next_tokens, tokens

import mep

SWEEP = mep.Sweep(tol=1e-12, settle_steps=100)
ORDERS = {"one-sided": (1, 1), "centered": (2, 8)}


def transformers(name):
    """A module of that library, or a skip. It imports torchvision, and one built for another torch breaks it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


class Bert(nn.Module):
    """BERT for classification, its result unpacked."""

    def __init__(self):
        super().__init__()
        config = transformers("bert").BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8, num_labels=3,
        )  # fmt: skip
        self.bert = transformers("bert").BertForSequenceClassification(config)

    def forward(self, ids):
        return self.bert(ids).logits


class GPT2(nn.Module):
    """GPT-2's parts in its order: its own forward inspects masks in ways that cannot be traced."""

    def __init__(self):
        super().__init__()
        config = transformers("gpt2").GPT2Config(
            vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        self.gpt = transformers("gpt2").GPT2LMHeadModel(config)
        for p in self.gpt.parameters():  # as after some training
            nn.init.normal_(p, std=0.4)

    def forward(self, ids):
        parts = self.gpt.transformer
        h = parts.drop(parts.wte(ids) + parts.wpe(torch.arange(ids.size(1))))
        for block in parts.h:
            h = block(h)
        return self.gpt.lm_head(parts.ln_f(h))


def entry(name):
    if name == "BERT":
        module = transformers("bert")
        return Entry(Bert, tokens, leaves=(module.BertLayer, module.BertEmbeddings))
    if name == "GPT-2":
        blocks = (transformers("gpt2").GPT2Block,)
        return Entry(GPT2, tokens, labels_of_tokens, next_tokens, blocks, beta=1e-4)
    return ZOO[name]


NAMES = [*ZOO, "BERT", "GPT-2"]


def seeded(function, *args):
    torch.manual_seed(7)
    return function(*args)


def error(found, exact):
    pairs = [(found[p], g) for p, g in exact.items() if g is not None]
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())


@pytest.fixture(params=NAMES, scope="module")
def built(request):
    """An entry, an estimator of its model that reads it once for all tests, and a batch."""
    case = entry(request.param)
    model, x, target = case.build()
    return case, mep.EquilibriumPropagation(model, case.cost, leaves=case.leaves), x, target, model.state_dict()


@pytest.fixture
def as_built(built):
    """The same: what another test has moved is put back."""
    case, ep, x, target, state = built
    before = copy.deepcopy(state)
    ep.beta, ep.phases, ep.solver = None, "one-sided", mep.Sweep()
    yield case, ep, x, target
    ep.model.load_state_dict(before)
    ep.model.train()


def test_error_falls_with_the_order_of_the_contrast(as_built):
    case, ep, x, target = as_built
    model, ep.solver = ep.model, SWEEP
    twin = copy.deepcopy(model)
    exact = backprop(twin, seeded(case.loss, twin, x, target))
    exact = dict(zip(model.parameters(), exact.values(), strict=True))
    before = copy.deepcopy(model.state_dict())
    for ep.phases, (order, factor) in ORDERS.items():
        errors = []
        for beta in (factor * case.beta, factor * case.beta / 2):
            ep.beta = beta
            model.load_state_dict(before)
            found, estimate = seeded(ep.gradients, x, target)
            assert estimate.converged and estimate.beta == beta
            assert set(found) == {p for p, g in exact.items() if g is not None}
            errors.append(error(found, exact))
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.05 * order
        assert errors[1] < 0.02


def test_step_leaves_buffers_and_random_numbers_as_backprop_does(as_built):
    case, ep, x, target = as_built
    model = ep.model
    twin = copy.deepcopy(model)
    loss = seeded(ep.gradients, x, target)[1].loss
    drawn = torch.rand(1)
    torch.testing.assert_close(loss, seeded(case.loss, twin, x, target).detach())
    assert torch.equal(drawn, torch.rand(1))
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert torch.equal(seeded(call, model, x), seeded(call, twin, x))
    torch.testing.assert_close(call(model.eval(), x), call(twin.eval(), x))


@pytest.mark.parametrize("name", NAMES)
def test_default_settings_settle_and_lower_the_loss(name):
    case = entry(name)
    model, x, target = case.build(torch.float32)
    opt = mep.eqprop(model.parameters(), model=model, cost=case.cost, leaves=case.leaves, lr=0.02, momentum=0.5)
    losses = []
    for _ in range(4):
        losses.append(float(seeded(lambda: opt.step(x=x, target=target))))
        assert opt.last.converged and opt.last.residual.max() <= 1e-2
        assert 0 < opt.last.beta <= 0.1
    assert losses[-1] < losses[0] - 1e-4


# Refused, with the line and the fix; or followed where others lose their way.


class Net(nn.Module):
    """Layers `a`, `b`, `c` around a forward given as a function of (self, x)."""

    def __init__(self, forward, **modules):
        super().__init__()
        layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 3)}
        for name, module in (layers | modules).items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def noisy_depth(n, x):
    return n.c(n.a(x) if torch.rand(()) < 2 else x)


def cells(n, x):
    h = c = torch.zeros_like(x)
    for _ in range(2):
        h, c = n.cell(x, (h, c))
    return n.c(h)


REFUSED = {
    "control flow": (
        lambda: mlp(Branching()),
        r"zoo\.py, line \d+ in forward: for _ in range\(2 if x\.mean\(\).*keep `1` whole, leaves=\(Branching,\)",
    ),
    "control flow at the top": (
        lambda: Net(lambda n, x: n.c(n.a(x) if x.sum() > 0 else n.b(x))),
        r"test_zoo\.py, line \d+.*into a module of its own.*leaves=\(ThatModule,\)",
    ),
    "frozen noise": (lambda: Net(noisy_depth), r"depends on the values of tensors.*line \d+ in noisy_depth.*leaves="),
    "several outputs": (
        lambda: Net(lambda n, x: {"class": n.c(x), "place": n.a(x)}),
        r"returns a dict of 2 tensors.*one tensor.*Way out",
    ),
    "leaf with several outputs": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 3)),
        r"returns a tuple of 2 tensors.*Way out",
    ),
    "complex output": (lambda: Net(lambda n, x: torch.fft.fft(n.c(x))), r"torch.complex64.*real numbers.*Way out"),
    "labels as output": (lambda: Net(lambda n, x: n.c(x).argmax(1)), r"torch.int64.*real numbers.*Way out"),
    "kink without a rule": (
        lambda: Net(lambda n, x: n.c(n.a(x).sort(1).values)),
        r"no rule for node `sort` \(test_zoo\.py:\d+.*Way out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_line_and_the_fix(name):
    model, message = REFUSED[name]
    branches = "exact" if "kink" in name else "held"
    with pytest.raises(mep.TraceError, match=rf"(?s){message}"):
        mep.EquilibriumPropagation(model(), branches=branches).gradients(torch.randn(BATCH, 4), torch.arange(BATCH) % 3)


class StraightThrough(torch.autograd.Function):
    """Rounds forward, and passes the gradient on as if it had not."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


def guarded(n, x):
    batch, width = x.shape
    assert width == 4, f"{width}"
    assert batch < 1000 and x.dim() == 2
    if x.shape[-1] != 4:
        raise ValueError(f"{width}")
    return n.c(n.a(x).tanh())


def spectrum(n, x):
    """A complex junction, read twice."""
    h = torch.fft.fft(n.a(x))
    return n.c(n.b(h.abs()) + h.real + h.imag.tanh())


FOLLOWED = {
    "both states of a cell": lambda: Net(cells, cell=nn.LSTMCell(4, 4)),
    "batch size written into the model": lambda: Net(lambda n, x: n.c(n.a(x).view(BATCH, 2, 2).tanh().flatten(1))),
    "compiled": lambda: torch.compile(mlp(nn.Tanh())),
    "autograd.Function outside a leaf": lambda: Net(lambda n, x: n.c(StraightThrough.apply(n.a(x)))),
    "autograd.Function within a module": lambda: mlp(Cubed(), nn.Linear(6, 6)),
    "assertions on shapes": lambda: Net(guarded),
    "complex values": lambda: Net(spectrum),
    "iterated chunks": lambda: Net(lambda n, x: n.c(torch.cat([h.tanh() for h in n.a(x).chunk(2, dim=1)], 1))),
    "sequence first inside": lambda: Net(
        lambda n, x: n.c(n.rnn(n.a(x).view(-1, 2, 2).transpose(0, 1))[1][0][-1]), rnn=nn.LSTM(2, 4)
    ),
    "broadcast means over the batch": lambda: Net(
        lambda n, x: n.c((h := n.a(x)) + (m := h.tanh().mean(0, keepdim=True))) + n.c(n.b(h + m))
    ),
    "broadcast mean over everything": lambda: Net(
        lambda n, x: n.c((h := n.a(x)) + (m := h.tanh().mean())) + n.c(n.b(h + m))
    ),
    "affine, its first node by autograd": lambda: Net(lambda n, x: n.c(torch.relu(n.a(x.sin())))),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_gradient_is_backprop_s_where_beta_vanishes(name):
    torch.manual_seed(0)
    model, x, target = FOLLOWED[name]().double(), torch.randn(BATCH, 4).double(), torch.arange(BATCH) % 3
    exact = backprop(model, F.cross_entropy(model(x), target))
    found, estimate = mep.EquilibriumPropagation(model, beta=1e-6, solver=SWEEP).gradients(x, target)
    assert estimate.converged
    assert set(found) == {p for p, g in exact.items() if g is not None}
    assert error(found, exact) < 1e-4


def test_mask_as_long_as_the_batch_is_not_taken_for_examples():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))

    mask = torch.ones(BATCH, BATCH).triu(1).bool()
    x, target = torch.randn(BATCH, BATCH, 4), torch.arange(BATCH) % 3
    assert mep.EquilibriumPropagation(Attending())((x, mask), target).converged


@pytest.mark.parametrize("read", [lambda r: r["logits"], lambda r: r.logits], ids=["item", "attribute"])
def test_one_element_of_a_leaf_s_record_is_its_state(read):
    class Record(dict):
        logits = property(lambda self: self["logits"])

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return Record(logits=self.inner(x).tanh(), size=4)

    model = Net(lambda n, x: n.c(read(n.record(n.a(x)))), record=Recording()).double()
    x, target = torch.randn(BATCH, 4).double(), torch.arange(BATCH) % 3
    exact = backprop(model, F.cross_entropy(model(x), target))
    found, _ = mep.EquilibriumPropagation(model, beta=1e-6, solver=SWEEP, leaves=(Recording,)).gradients(x, target)
    assert error(found, exact) < 1e-4


# Kinks: what settles exactly.


@pytest.mark.parametrize(("name", "beta"), [("VGG", 0.1), ("U-Net", 1e-3), ("MobileNet", 1e-4), ("ResNet-18", 1e-5)])
def test_exact_kinks_settle_at_the_beta_that_is_named(name, beta):
    model, x, target = ZOO[name].build(torch.float32)
    estimate = mep.EquilibriumPropagation(model, branches="exact", beta=beta)(x, target)
    assert estimate.converged and estimate.residual.max() <= 1e-2 and (estimate.betas == beta).all()
