"""`EPOptimizer` is a `torch.optim.Optimizer`: whatever torch does with an optimizer works, for every preset."""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import mep
from mep import presets

PRESETS = [f for f in vars(presets).values() if inspect.isfunction(f) and f.__module__ == presets.__name__]
PRESETS = [f for f in PRESETS if not f.__name__.startswith("_")]
TWO_PHASES = [f for f in PRESETS if "beta" in inspect.signature(f).parameters]
DESCENDING = [mep.O1MemoryEPv2]
SWEEPING = [f for f in TWO_PHASES if f not in DESCENDING]
FILLED = [f for f in PRESETS if f is not mep.natural_ep]  # that one refuses gradients without factors


@pytest.fixture(params=PRESETS, ids=lambda f: f.__name__)
def preset(request):
    return request.param


class Net(nn.Module):
    """Layers that remember (BatchNorm), that draw random numbers, and that ask for the mode themselves."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.drop(self.norm(self.first(x)).tanh())
        return self.last(F.dropout(torch.tanh(self.second(x)), 0.2, training=self.training))


def net():
    torch.manual_seed(0)
    return Net()


def batches(count, size=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


def keywords(preset):
    return inspect.signature(preset).parameters


def train(opt, batches, seed=2):
    """The losses of a few steps, always with the same noise."""
    torch.manual_seed(seed)
    return torch.stack([opt.step(x=x, target=y) for x, y in batches])


def fill(model, seed=3):
    """Any gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def values(model):
    """Copies of parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def differing(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


# Groups


def test_is_an_optimizer(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    assert isinstance(opt, torch.optim.Optimizer)
    assert [p for group in opt.param_groups for p in group["params"]] == list(model.parameters())


@pytest.mark.parametrize("preset", FILLED)
def test_groups_have_their_own_lr_and_momentum(preset):
    """Two groups move as two optimizers do, each with the options of one group."""
    options = [{"lr": 0.01, "momentum": 0.5}, {"lr": 0.03, "momentum": 0.8}]

    def trained(groups):
        model = net()
        opt = preset(groups(model), model=model)
        for seed in (3, 4):
            fill(model, seed)
            opt.step()
        return values(model)

    both = trained(lambda m: [{"params": p, **options[i % 2]} for i, p in enumerate(m.parameters())])
    alone = [trained(lambda m, o=o: [{"params": m.parameters(), **o}]) for o in options]
    for i, (name, _) in enumerate(net().named_parameters()):
        torch.testing.assert_close(both[name], alone[i % 2][name])
        assert not torch.allclose(both[name], alone[1 - i % 2][name])


@pytest.mark.parametrize("preset", FILLED)
def test_added_group_is_trained_with_its_own_options(preset):
    model = net()
    start = values(model)
    opt = preset(model.first.parameters(), model=model, lr=0.01)
    fill(model)
    opt.step()
    assert differing(values(model), start) == {"first.weight", "first.bias"}

    opt.add_param_group({"params": model.last.parameters(), "lr": 0.5})
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.5]
    middle = values(model)
    opt.step()
    assert differing(values(model), middle) == {f"{m}.{p}" for m in ("first", "last") for p in ("weight", "bias")}


def test_foreign_parameters_are_refused_and_change_nothing(preset):
    model, stranger = net(), nn.Linear(2, 7)
    opt = preset(model.first.parameters(), model=model)
    train(opt, batches(1))
    before, groups = pickle.dumps(opt.state_dict()), [*opt.param_groups]
    with pytest.raises(mep.ParameterError, match=r"\(7, 2\).*Net.*model\.parameters\(\)"):
        opt.add_param_group({"params": [model.last.weight, stranger.weight]})
    assert pickle.dumps(opt.state_dict()) == before
    assert opt.param_groups == groups
    opt.add_param_group({"params": [model.last.weight]})
    train(opt, batches(1))


@pytest.mark.parametrize("preset", [f for f in PRESETS if f not in (mep.eqprop, mep.local_ep)])  # torch's SGD does not
def test_added_group_is_checked_like_the_first(preset):
    model = net()
    opt = preset(model.first.parameters(), model=model)
    with pytest.raises(mep.ArgumentError, match="momentum=5"):
        opt.add_param_group({"params": model.last.parameters(), "momentum": 5})
    assert len(opt.param_groups) == 1


def test_group_with_lr_zero_stays_even_under_the_spectral_bound(preset):
    model = net()
    with torch.no_grad():
        model.second.weight.mul_(10)
    start = values(model)
    rest = [p for name, p in model.named_parameters() if not name.startswith("second")]
    short_step = {"settle_lr": 0.01} if preset in DESCENDING else {}  # so large a weight is steep
    opt = preset([{"params": rest}, {"params": model.second.parameters(), "lr": 0.0}], model=model, **short_step)
    train(opt, batches(3))
    moved = differing(values(model), start)
    assert not {"second.weight", "second.bias"} & moved
    assert {"first.weight", "last.weight"} <= moved


def test_frozen_parameters_stay(preset):
    model = net()
    model.first.requires_grad_(False)
    start = values(model)
    opt = preset(model.parameters(), model=model)
    train(opt, batches(3))
    assert all(p.grad is None for p in model.first.parameters())
    assert not {"first.weight", "first.bias"} & differing(values(model), start)

    model.first.requires_grad_(True)  # and thawed they move
    model.last.requires_grad_(False)
    middle = values(model)
    train(opt, batches(2))
    assert {"first.weight", "last.weight"} & differing(values(model), middle) == {"first.weight"}


# Schedulers and hooks

SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=7),
    "OneCycleLR, lr alone": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=7, cycle_momentum=False),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("preset", FILLED)
def test_scheduler_drives_the_update(preset, name):
    """A scheduled optimizer moves as one whose lr and momentum are set by hand."""
    driven, by_hand = net(), net()
    opt, follower = (preset(m.parameters(), model=m) for m in (driven, by_hand))
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](opt)
        for step in range(6):
            now = {key: opt.param_groups[0][key] for key in ("lr", "momentum")}
            follower.param_groups[0].update(now)
            seen.append(tuple(now.values()))
            for model, optimizer in ((driven, opt), (by_hand, follower)):
                fill(model, step)
                optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert_equal(values(driven), values(by_hand))
    assert len({lr for lr, _ in seen}) > 1
    assert (len({momentum for _, momentum in seen}) > 1) == (name in ("OneCycleLR", "CyclicLR"))


def test_hooks_run_once_a_step_around_it(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    start, seen = values(model), []

    def note(optimizer, args, kwargs):
        assert optimizer is opt and set(kwargs) == {"x", "target"}
        seen.append(bool(differing(values(model), start)))

    handles = opt.register_step_pre_hook(note), opt.register_step_post_hook(note)
    train(opt, batches(1))
    assert seen == [False, True]
    for handle in handles:
        handle.remove()
    train(opt, batches(1))
    assert len(seen) == 2


# Gradients: where they come from and what may happen to them


def test_step_is_the_gradient_and_then_the_update(preset):
    """`step(x=x, target=y)` = `ep(x, y)` and `step()` = a closure that does the former."""
    models = [net() for _ in range(3)]
    a, b, c = (preset(m.parameters(), model=m) for m in models)
    train(a, batches(3))

    torch.manual_seed(2)
    for x, y in batches(3):
        b.zero_grad()
        b.estimator(x, y)
        assert b.step() is None

    def closure():
        assert torch.is_grad_enabled()
        c.zero_grad()
        return c.estimator(x, y).loss

    torch.manual_seed(2)
    losses = []
    for x, y in batches(3):  # noqa: B007 the closure reads it
        losses.append(c.step(closure))
    assert all(isinstance(loss, torch.Tensor) and loss.shape == () for loss in losses)
    assert_equal(values(models[0]), values(models[1]))
    assert_equal(values(models[0]), values(models[2]))


@pytest.mark.parametrize("preset", FILLED)
def test_step_takes_gradients_of_backward(preset):
    """Only the update counts then: presets with the same update agree, eqprop is SGD."""
    model, twin = net(), net()
    opt = preset(model.parameters(), model=model, **({"gamma": 100.0} if "gamma" in keywords(preset) else {}))
    options = {k: v for k, v in opt.update.defaults.items() if k in inspect.signature(type(opt.update)).parameters}
    bare = type(opt.update)(twin.parameters(), **options)
    for x, y in batches(2):
        for m, optimizer in ((model, opt), (twin, bare)):
            torch.manual_seed(0)
            optimizer.zero_grad()
            F.cross_entropy(m(x), y).backward()
            optimizer.step()
    assert_equal(values(model), values(twin))
    assert opt.last is None


def test_step_replaces_old_gradients_and_zero_grad_clears_them(preset):
    model, twin = net(), net()
    opt, fresh = preset(model.parameters(), model=model), preset(twin.parameters(), model=twin)
    fill(model)
    torch.testing.assert_close(train(opt, batches(1)), train(fresh, batches(1)))
    assert_equal(values(model), values(twin))
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_step_with_nothing_to_do_is_an_error(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    ((x, y),) = batches(1)
    with pytest.raises(mep.ArgumentError, match=r"nothing to do.*step\(x=inputs, target=labels\)"):
        opt.step()
    for given in ({"x": x}, {"target": y}):
        with pytest.raises(mep.ArgumentError, match="x and target together"):
            opt.step(**given)


def test_forgotten_keyword_does_not_make_the_batch_a_closure(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    with pytest.raises(mep.ArgumentError, match=r"x=.*target="):
        opt.step(torch.ones(8, 5))


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_gradients_accumulate_like_those_of_backward(preset, cost):
    model = net().eval()
    ep = preset(model.parameters(), model=model, cost=cost).estimator
    one, two = ((x, y if cost == "cross_entropy" else F.one_hot(y, 3).float()) for x, y in batches(2))
    fresh = ep.state_dict()
    alone = []
    for batch in (one, two):
        model.zero_grad()
        ep(*batch)
        alone.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    ep.load_state_dict(fresh)
    ep(*one)
    kept = [p.grad for p in model.parameters()]
    ep(*two)
    for p, before, first, second in zip(model.parameters(), kept, *alone, strict=True):
        assert p.grad is before  # in place: whoever holds p.grad sees the sum
        assert torch.equal(p.grad, first + second)


def test_clipping_between_estimate_and_step(preset):
    model, twin = net().eval(), net().eval()
    opt, by_hand = preset(model.parameters(), model=model), preset(twin.parameters(), model=twin)
    ((x, y),) = batches(1)
    opt.estimator(x, y), by_hand.estimator(x, y)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    assert norm > 1e-2
    for p in twin.parameters():
        p.grad *= 1e-2 / (norm + 1e-6)
    opt.step()
    by_hand.step()
    assert_equal(values(model), values(twin))


FOREIGN = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
    "mep.Muon": lambda m: mep.Muon(m.parameters()),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=0.02),
}


@pytest.mark.parametrize("name", [n for n in FOREIGN if hasattr(torch.optim, n) or "." in n])
def test_any_optimizer_trains_on_the_estimate(name):
    model = net().eval()
    ep, optimizer = mep.EquilibriumPropagation(model), FOREIGN[name](model)
    ((x, y),) = batches(1)

    def closure():
        optimizer.zero_grad()
        return ep(x, y).loss

    losses = [float(optimizer.step(closure)) for _ in range(30)]
    assert losses[-1] < losses[0] / 2


def test_loss_and_gradients_under_autocast(preset):
    """bfloat16 inside, float32 parameters outside, and the gradient still points the right way."""
    found = []
    for enabled in (False, True):
        model = net().eval()
        # Descent takes s - mu, which grows with beta, from states rounded to bfloat16; sweeps carry the error itself.
        opt = preset(model.parameters(), model=model, **({"beta": 1.0} if preset in DESCENDING else {}))
        ((x, y),) = batches(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            opt.step(x=x, target=y)
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision(preset, dtype):
    """Where one sweep does not suffice, too."""
    model = net().eval().to(dtype)
    strong = {"beta": 2.0, "tol": 1e-2} if preset in TWO_PHASES else {}
    opt = preset(model.parameters(), model=model, **strong)
    for x, y in batches(3):
        assert opt.step(x=x.to(dtype), target=y).isfinite()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in model.parameters())


WAYS = {
    "x that requires a gradient": lambda opt, x, y: opt.step(x=x.clone().requires_grad_(), target=y),
    "without gradients": lambda opt, x, y: torch.no_grad()(opt.step)(x=x, target=y),
    "labels in int32": lambda opt, x, y: opt.step(x=x, target=y.int()),
    "x not contiguous": lambda opt, x, y: opt.step(x=x.t().contiguous().t(), target=y),
    "x in a tuple": lambda opt, x, y: opt.step(x=(x,), target=y),
    "x by name": lambda opt, x, y: opt.step(x={"x": x}, target=y),
}


@pytest.mark.parametrize("way", WAYS)
def test_legal_call_is_the_same_however_it_is_made(preset, way):
    model, twin = net().double(), net().double()
    opt, plain = (preset(m.parameters(), model=m) for m in (model, twin))
    for seed, (x, y) in enumerate(batches(2)):
        x = x.double()
        torch.manual_seed(seed)
        loss = WAYS[way](opt, x, y)
        assert not loss.requires_grad
        torch.manual_seed(seed)
        torch.testing.assert_close(loss, plain.step(x=x, target=y))
    torch.testing.assert_close(values(model), values(twin))


def test_inputs_that_may_be_left_out(preset):
    """As `forward` has them: by position, by name, by name only."""

    class Masked(Net):
        def forward(self, x, mask=None, *, scale=1.0):
            x = super().forward(x) * scale
            return x if mask is None else x * mask

    ((x, y),) = batches(1)
    for given in (x, {"x": x}, {"x": x, "scale": 2.0}, {"x": x, "mask": torch.ones(8, 3)}):
        torch.manual_seed(0)
        model = Masked().eval()
        opt = preset(model.parameters(), model=model, lr=0.0)
        expected = model(**given) if isinstance(given, dict) else model(given)
        torch.testing.assert_close(opt.step(x=given, target=y), F.cross_entropy(expected, y).detach())


# Copies and checkpoints


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["in memory", "through a file"])
def test_state_dict_continues_bit_for_bit(preset, carry):
    model = net()
    opt = preset(model.parameters(), model=model)
    first, *rest = batches(4)
    train(opt, [first])
    weights, state = carry(model.state_dict()), carry(opt.state_dict())
    expected = train(opt, rest)

    other = net()
    other.load_state_dict(weights)
    resumed = preset(other.parameters(), model=other, lr=0.9)
    resumed.load_state_dict(state)
    assert torch.equal(train(resumed, rest), expected)
    assert_equal(values(model), values(other))


@pytest.mark.parametrize("preset", SWEEPING)
def test_a_named_beta_is_that_of_every_step(preset):
    """Whether it settles or not, before a checkpoint and after it."""
    model = net()
    with torch.no_grad():
        model.last.weight.mul_(10)
    given = {"beta": 0.5, "tol": 1e-3, "lr": 1e-4, "on_unsettled": "ignore"}
    opt = preset(model.parameters(), model=model, **given)
    first, *rest = batches(4)
    train(opt, [first])
    weights, state = copy.deepcopy(model.state_dict()), through_a_file(opt.state_dict())
    other = net()
    resumed = preset(other.parameters(), model=other, **given)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for batch in rest:
        assert torch.equal(train(opt, [batch]), train(resumed, [batch]))
        for last in (opt.last, resumed.last):
            assert (last.betas == 0.5).all() and last.converged == bool((last.residual <= 1e-3).all())
    assert_equal(values(model), values(other))


def test_state_dict_of_the_bare_update_fits(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    train(opt, batches(1))
    bare = copy.deepcopy(opt.update.state_dict())
    train(opt, batches(1))
    opt.load_state_dict(bare)
    loaded = opt.update.state_dict()["state"]
    assert bare["state"] and bare["state"].keys() == loaded.keys()
    for index, kept in bare["state"].items():
        tensors = ({k: v for k, v in state.items() if isinstance(v, torch.Tensor)} for state in (kept, loaded[index]))
        assert_equal(*tensors)


COPIES = {
    "deepcopy of the optimizer": lambda model, opt: copy.deepcopy(opt),
    "deepcopy of model and optimizer": lambda model, opt: copy.deepcopy((model, opt))[1],
    "deepcopy of optimizer and model": lambda model, opt: copy.deepcopy([opt, model])[0],
    "pickle": lambda model, opt: pickle.loads(pickle.dumps((model, opt)))[1],
}


@pytest.mark.parametrize("way", COPIES)
def test_copy_is_bound_to_its_own_model_and_goes_its_own_way(preset, way):
    model = net()
    opt = preset(model.parameters(), model=model)
    first, *rest = batches(4)
    train(opt, [first])
    twin = COPIES[way](model, opt)

    assert twin.model is not model
    assert [id(p) for group in twin.param_groups for p in group["params"]] == [id(p) for p in twin.model.parameters()]
    start = values(model)
    losses = train(twin, rest)
    assert_equal(values(model), start)
    assert torch.equal(train(opt, rest), losses)
    assert_equal(values(model), values(twin.model))


def test_deepcopy_of_model_and_optimizer_keeps_them_together(preset):
    model = net()
    model_copy, opt_copy = copy.deepcopy((model, preset(model.parameters(), model=model)))
    assert opt_copy.model is model_copy


def test_deepcopy_keeps_scheduled_and_constrained(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    scheduler = lr_scheduler.StepLR(opt, 1, gamma=0.1)
    train(opt, batches(1))
    scheduler.step()
    twin = copy.deepcopy(opt)
    assert twin.param_groups[0]["lr"] == opt.param_groups[0]["lr"] < opt.param_groups[0]["initial_lr"]
    twin.param_groups[0]["lr"] = 0.0
    start = values(twin.model)
    fill(twin.model)
    twin.step()
    assert_equal(values(twin.model), start)
    assert opt.param_groups[0]["lr"] > 0


# Modes, buffers and noise


def test_running_statistics_move_once_a_step_as_under_backprop(preset):
    model, reference = net(), net()
    opt = preset(model.parameters(), model=model, lr=0.0)
    for steps, (x, y) in enumerate(batches(4), 1):
        opt.step(x=x, target=y)
        reference(x)
        assert model.norm.num_batches_tracked == steps
        torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_running_statistics_follow_the_mode_of_their_own_module(preset):
    """`model.eval()` and then `norm.train()`, or the reverse, as in fine-tuning."""
    model = net().eval()
    opt = preset(model.parameters(), model=model, lr=0.0)
    model.norm.train()
    for steps, (x, y) in enumerate(batches(3), 1):
        opt.step(x=x, target=y)
        assert model.norm.num_batches_tracked == steps
    model.train()
    model.norm.eval()
    start = values(model)
    train(opt, batches(2))
    assert_equal(values(model), start)


def test_mode_decides_about_dropout_at_every_step(preset):
    model = net()
    opt = preset(model.parameters(), model=model, lr=0.0)
    ((x, y),) = batches(1)
    for mode in (True, False, True, True, False):
        model.train(mode)
        losses = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            losses.append(opt.step(x=x, target=y))
            torch.manual_seed(seed)
            with torch.no_grad():
                torch.testing.assert_close(losses[-1], F.cross_entropy(copy.deepcopy(model)(x), y))
        assert (losses[0] == losses[1]) == (not mode)


class Counter(nn.Module):
    """A layer with a memory of its own: how often it was called."""

    def __init__(self, rebinds):
        super().__init__()
        self.linear, self.rebinds = nn.Linear(16, 16), rebinds
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.rebinds:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return self.linear(x).tanh()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rebinds", [False, True], ids=["in place", "rebound"])
def test_buffers_of_any_module_move_once_a_step(preset, rebinds, training):
    model = nn.Sequential(nn.Linear(5, 16), Counter(rebinds), nn.Linear(16, 3)).train(training)
    opt = preset(model.parameters(), model=model, **({"leaves": (Counter,)} if "leaves" in keywords(preset) else {}))
    for steps, (x, y) in enumerate(batches(3), 1):
        opt.step(x=x, target=y)
        assert model[1].calls == steps


def test_training_goes_on_in_eval_mode(preset):
    model = net().eval()
    opt = preset(model.parameters(), model=model)
    start = values(model)
    train(opt, batches(1))
    assert differing(values(model), start) == {name for name, _ in model.named_parameters()}


def test_step_draws_as_many_random_numbers_as_one_forward_pass(preset):
    model = net()
    opt = preset(model.parameters(), model=model)
    for x, y in batches(3):
        torch.manual_seed(7)
        copy.deepcopy(model)(x)
        expected = torch.get_rng_state()
        torch.manual_seed(7)
        opt.step(x=x, target=y)
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("phases,order", [("one-sided", 1), ("centered", 2)])
def test_one_dropout_mask_serves_a_whole_step(phases, order):
    """With another mask in another phase the contrast would not even tend to the gradient."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5)
    model = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    ((x, y),) = batches(1)
    x = x.double()
    torch.manual_seed(4)
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    def error(beta):
        ep = mep.EquilibriumPropagation(model, beta=beta, phases=phases, solver=mep.Sweep(100, tol=1e-10))
        torch.manual_seed(4)
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and estimate.beta == beta
        return sum((found[p] - g).square().sum() for p, g in zip(model.parameters(), exact, strict=True)).sqrt()

    errors = [error(beta) for beta in (0.04, 0.02, 0.01)]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.9 < torch.log2(coarse / fine) / order < 1.1


def test_building_an_optimizer_leaves_the_model_as_it_was(preset):
    model, untouched = net(), net()
    ((x, y),) = batches(1)
    rng = torch.get_rng_state()
    opt = preset(model.parameters(), model=model)
    assert torch.equal(torch.get_rng_state(), rng)
    opt.estimator.gradients(x, y)
    model.load_state_dict(untouched.state_dict())
    assert torch.equal(model.eval()(x), untouched.eval()(x))
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in untouched.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_predict_is_the_model(preset):
    model = net().eval()
    opt = preset(model.parameters(), model=model)
    ((x, _),) = batches(1)
    for given in (x, (x,), {"x": x}):
        torch.testing.assert_close(opt.predict(given), model(x).detach())
        assert not opt.predict(given).requires_grad


KEPT = {
    "a number": lambda old, h: h.shape[1],
    "a tensor": lambda old, h: h,
    "tensors in a tuple": lambda old, h: (h, h),
    "tensors in a list": lambda old, h: [h],
    "tensors in a dict": lambda old, h: {"h": h},
}


@pytest.mark.parametrize("whole", [False, True], ids=["traced", "kept whole"])
@pytest.mark.parametrize("kept", KEPT)
def test_module_may_keep_what_it_saw(preset, kept, whole):
    """Attention maps, caches, counters: they are no reason to fail, or to trace the model again at every step."""
    forwards = []

    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.kept = nn.Linear(16, 16), None

        def forward(self, x):
            forwards.append(type(x))
            h = self.linear(x).tanh()
            self.kept = KEPT[kept](self.kept, h)
            return h

    model = nn.Sequential(nn.Linear(5, 16), Keeper(), nn.Linear(16, 3))
    opt = preset(model.parameters(), model=model, **({"leaves": (Keeper,)} if whole and preset in TWO_PHASES else {}))
    ((x, y),) = batches(1)
    for step in range(3):  # the model itself runs again for the proof before the fourth
        expected = F.cross_entropy(model(x), y).detach()
        forwards.clear()
        torch.testing.assert_close(opt.step(x=x, target=y), expected)
        if step > 1 and not whole and preset in TWO_PHASES:
            assert not forwards


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left, right):
        return self.a(left).tanh() + self.b(right)


@pytest.mark.parametrize("pack", [tuple, list, lambda pair: dict(zip(("left", "right"), pair, strict=True))])
def test_a_model_is_traced_once(pack, monkeypatch):
    """However its inputs are given: tracing again at every step would be right, and slow."""
    from mep.capture import cache

    traced = []
    capture = cache.capture
    monkeypatch.setattr(cache, "capture", lambda *given: traced.append(given) or capture(*given))
    model = Two()
    opt = mep.eqprop(model.parameters(), model=model)
    for _ in range(4):
        opt.step(x=pack((torch.randn(5, 3), torch.randn(5, 2))), target=torch.zeros(5, dtype=torch.long))
    assert len(traced) == 1
