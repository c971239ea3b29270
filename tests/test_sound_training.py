"""Training is sound: what hooks, wrappers, closures, dtypes and torch's own modules do to a step is right, or refused.

Right means: the whole gradient is autograd's through the user's own model and cost, with the same random numbers, and
the better the weaker the nudge; buffers move once, bit for bit; random numbers are drawn as by one forward pass. What
cannot be right is refused in a sentence, and then nothing has changed.
"""

import collections
import copy
import functools
import inspect
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import mep
from mep import presets

SOLVER = mep.Sweep(tol=1e-8, settle_steps=200)
PRESETS = {name: f for name, f in vars(presets).items() if getattr(f, "__module__", "") == presets.__name__}
PRESETS = {name: f for name, f in PRESETS.items() if name[0] != "_" and inspect.isfunction(f)}
BY_EP = {name: f for name, f in PRESETS.items() if f is not mep.muon_backprop}
BATCH = 5
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


@pytest.fixture(autouse=True)
def _same_noise():
    torch.manual_seed(0)


class Net(nn.Module):
    """Layers `a`, `b`, `c` and others around a `forward` given as a function of the module and the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 3)}
        for name, module in (layers | modules).items():
            setattr(self, name, module)
        self.written = forward

    def forward(self, *x):
        return self.written(self, *x)


def net(dtype=torch.float64):
    """With a layer that remembers and one that draws random numbers."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
    return nn.Sequential(*layers).to(dtype)


def fresh(model):
    """A copy of a model of a table, in float64, with weights that are always the same."""
    model = copy.deepcopy(model).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def batch(seed=1, dtype=torch.float64, size=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator, dtype=dtype), torch.arange(size) % 3


def run(model, x):
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def flat(gradients, parameters):
    """The whole gradient as one vector; what is missing is zero."""
    found = [gradients.get(p) for p in parameters]
    found = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.detach().flatten() for g in found])


def by_autograd(model, x, y, cost="cross_entropy"):
    """The loss, and the gradient of every parameter."""
    loss = LOSSES.get(cost, cost)(run(model, x), y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
    return loss.detach().mean(), dict(zip(parameters, found, strict=True))


def everything(model):
    """All that a refusal must leave alone."""
    tensors = {f"{kind} {name}": t for kind, own in kinds_of(model).items() for name, t in own.items()}
    values = {name: None if t is None else t.clone() for name, t in tensors.items()}
    plain = {
        f"{name}.{key}": id(value)
        for name, m in model.named_modules()
        for key, value in vars(m).items()
        if key[0] != "_"
    }
    return {**values, **plain, "noise": torch.get_rng_state(), "modes": [m.training for m in model.modules()]}


def kinds_of(model):
    parameters = dict(model.named_parameters())
    grads = {name: p.grad for name, p in parameters.items()}
    return {"parameter": parameters, "gradient": grads, "buffer": dict(model.named_buffers())}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = (
            torch.equal(value, other[name])
            if torch.is_tensor(value) and torch.is_tensor(other[name])
            else (value == other[name])
        )
        assert same, f"{name} changed"


def assert_right(model, x, y, cost="cross_entropy", leaves=()):
    """By four strengths of the nudge: the error of the whole gradient, the buffers, and the random numbers."""
    buffers, noise = list(model.buffers()), torch.get_rng_state()
    start = [b.clone() for b in buffers]
    loss, exact = by_autograd(model, x, y, cost)
    after, drawn = [b.clone() for b in model.buffers()], torch.get_rng_state()
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = flat(exact, parameters)
    ep = mep.EquilibriumPropagation(model, cost, solver=SOLVER, leaves=leaves)
    errors = {}
    for beta in (None, 1e-3, 1e-4, 1e-5):
        for b, value in zip(buffers, start, strict=True):
            b.copy_(value)
        torch.set_rng_state(noise)
        ep.beta = beta
        found, estimate = ep.gradients(x, y)
        torch.testing.assert_close(estimate.loss, loss)
        assert all(map(torch.equal, model.buffers(), after)), "a buffer is written otherwise"
        assert torch.equal(torch.get_rng_state(), drawn), "other random numbers were drawn"
        errors[beta] = float((flat(found, parameters) - exact).norm() / exact.norm())
    assert errors[None] < 0.06 and errors[1e-5] < 1e-3, errors
    assert errors[1e-4] < 1e-7 or 5 < errors[1e-3] / errors[1e-4] < 20, errors


def assert_refused(attempt, model, *words, error=mep.MepError):
    """By an error of our own that has all the words, and a way out; nothing has changed."""
    before = everything(model)
    with pytest.raises(error) as raised:
        attempt()
    assert_same(everything(model), before)
    for word in words:
        assert word in str(raised.value)
    return str(raised.value)


def assert_right_or_refused(model, x, y, cost="cross_entropy", leaves=()):
    try:
        assert_right(model, x, y, cost, leaves)
    except mep.MepError as error:
        assert "Way out" in str(error)


def given(preset, **wanted):
    """Those of the keywords that a preset takes."""
    names = inspect.signature(preset).parameters
    return {name: value for name, value in wanted.items() if name in names}


# Hooks on parameters

HOOKS = {
    "a mask": lambda g: g * (torch.arange(g.numel()).view_as(g) % 2),
    "a frozen row": lambda g: torch.cat([torch.zeros_like(g[:1]), g[1:]]),
    "scaling": lambda g: 3 * g,
    "clipping": lambda g: g.clamp(-0.02, 0.02),
    "clipping by norm": lambda g: g * min(1.0, 0.01 / float(g.norm())),
    "looking": lambda g: None,
}


def estimating(model, **settings):
    """Steps by `ep(x, y)`; the gradient is what is in `p.grad`."""
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, **settings)

    def step(x, y, p):
        model.zero_grad()
        ep(x, y)
        return p.grad

    return step


def optimizing(model, low_memory=False, **settings):
    """Steps by an optimizer; the gradient is what has moved the weight."""
    update = torch.optim.SGD(model.parameters(), lr=0.5)
    opt = mep.EPOptimizer(mep.EquilibriumPropagation(model, solver=SOLVER, **settings), update, (), low_memory)

    def step(x, y, p):
        before = p.detach().clone()
        opt.step(x=x, target=y)
        moved = (before - p.detach()) / 0.5
        assert (p.grad is None) if low_memory else torch.allclose(p.grad, moved, atol=1e-12)
        return moved

    return step


def by_backprop(model):
    opt = mep.EPOptimizer(mep.Backprop(model), torch.optim.SGD(model.parameters(), lr=0.5))

    def step(x, y, p):
        opt.step(x=x, target=y)
        return p.grad

    return step


WAYS = {
    "ep(x, y)": estimating,
    "ep(x, y), always proven": functools.partial(estimating, proof="always"),
    "opt.step": optimizing,
    "opt.step, always proven": functools.partial(optimizing, proof="always"),
    "opt.step, low memory": functools.partial(optimizing, low_memory=True),
    "opt.step, low memory, always proven": functools.partial(optimizing, low_memory=True, proof="always"),
    "backprop": by_backprop,
}


def quiet_net():
    """Without noise, and without a memory."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def without_noise(step, x, y, p):
    """Where the random numbers stand afterwards is where they stood."""
    noise = torch.get_rng_state()
    found = step(x, y, p).clone()
    torch.set_rng_state(noise)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_hook_sees_the_gradient_of_a_step_once_and_has_the_last_word(way):
    """That of a copy, to which hooks are not copied."""
    model, seen = quiet_net(), []
    twin = copy.deepcopy(model)
    step, bare = WAYS[way](model), WAYS[way](twin)
    p, q = model[2].weight, twin[2].weight
    for seed, hook in enumerate(HOOKS.values()):
        x, y = batch(seed)
        twin.load_state_dict(model.state_dict())
        wanted = without_noise(bare, x, y, q)
        handle = p.register_hook(lambda g, hook=hook: seen.append(g.clone()) or hook(g))
        found = step(x, y, p)
        handle.remove()
        assert len(seen) == 1
        torch.testing.assert_close(seen.pop(), wanted)
        made = hook(wanted)
        torch.testing.assert_close(found, wanted if made is None else made)


AFTER = {
    "a mask": lambda p: p.grad.mul_(torch.arange(p.numel()).view_as(p) % 2),
    "scaling": lambda p: setattr(p, "grad", 3 * p.grad),
    "clipping": lambda p: nn.utils.clip_grad_value_([p], 0.02),
    "looking": lambda p: None,
}


def looking_before(hook, seen):
    def watched(p):
        seen.append(p.grad.clone())
        hook(p)

    return watched


@pytest.mark.parametrize("way", WAYS)
def test_hook_after_accumulation_runs_once_a_step_on_its_gradient(way):
    model, seen = quiet_net(), []
    twin = copy.deepcopy(model)
    step, bare = WAYS[way](model), WAYS[way](twin)
    p, q = model[0].weight, twin[0].weight
    for seed, hook in enumerate(AFTER.values()):
        x, y = batch(seed)
        twin.load_state_dict(model.state_dict())
        wanted = without_noise(bare, x, y, q)
        handle = p.register_post_accumulate_grad_hook(looking_before(hook, seen))
        found = step(x, y, p)
        handle.remove()
        assert len(seen) == 1
        torch.testing.assert_close(seen.pop(), wanted)
        holder = nn.Parameter(torch.zeros_like(p))
        holder.grad = wanted.clone()
        hook(holder)
        torch.testing.assert_close(found, holder.grad)


REMEMBERING = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("layer", REMEMBERING)
def test_a_step_in_low_memory_is_that_of_one_with_all_gradients(layer):
    """Buffers are written before the last gradient is made."""
    model = nn.Sequential(nn.Linear(4, 6), REMEMBERING[layer](), nn.Tanh(), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    one, other = (mep.eqprop(m.parameters(), model=m, low_memory=low) for m, low in ((model, True), (twin, False)))
    for seed in range(2):
        x, y = batch(seed)
        torch.testing.assert_close(one.step(x=x, target=y), other.step(x=x, target=y))
        torch.testing.assert_close(model.state_dict(), twin.state_dict())


class Squashed(nn.Module):
    """Kept whole as a leaf."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x)) * x


def penalised(model):
    return lambda out, y: F.cross_entropy(out, y, reduction="none") + 0.1 * model.b.weight.square().sum()


HOMES = {
    "a layer": (Net(lambda net, x: net.c(net.b(net.a(x)).tanh())), "b.weight"),
    "a bias": (Net(lambda net, x: net.c(net.b(net.a(x)).tanh())), "b.bias"),
    "a layer used twice": (Net(lambda net, x: net.c(net.b(net.b(net.a(x)).tanh()).tanh())), "b.weight"),
    "a layer behind noise": (
        Net(lambda net, x: net.c(net.b(net.drop(net.a(x))).tanh()), drop=nn.Dropout(0.2)), "b.weight"
    ),
    "a formula": (Net(lambda net, x: net.c(torch.sin(net.a(x) * net.scale.exp())), scale=nn.Parameter(torch.randn(6))),
                  "scale"),
    "a parametrisation": (
        Net(lambda net, x: net.c(net.b(net.a(x)).tanh()), b=nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        "b.parametrizations.weight.original1",
    ),
    "a convolution": (
        Net(lambda net, x: net.c(net.b(net.a(x)[:, None]).tanh().mean(1)), b=nn.Conv1d(1, 2, 3, padding=1)), "b.weight"
    ),
    "an LSTM": (
        Net(lambda net, x: net.c(net.b(net.a(x).view(-1, 2, 3))[0].mean(1)), b=nn.LSTM(3, 6, batch_first=True)),
        "b.weight_hh_l0",
    ),
    "a leaf": (Net(lambda net, x: net.c(net.b(net.a(x))), b=Squashed()), "b.inner.weight"),
    "the cost, too": (Net(lambda net, x: net.c(net.b(net.a(x)).tanh())), "b.weight"),
}  # fmt: skip


@pytest.mark.parametrize("home", HOMES)
def test_hooks_run_once_wherever_their_parameter_stands(home):
    model, name = HOMES[home]
    model, cost = fresh(model), "cross_entropy"
    if home == "the cost, too":
        cost = penalised(model)
    leaves = (Squashed,) if home == "a leaf" else ()
    x, y = batch()
    ep = mep.EquilibriumPropagation(model, cost, solver=SOLVER, leaves=leaves)
    p, before, after = model.get_parameter(name), [], []
    torch.manual_seed(1)
    wanted = ep.gradients(x, y)[0][p]
    p.register_hook(lambda g: before.append(g.clone()) or 2 * g)
    p.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        ep(x, y)
        assert len(before) == len(after) == 1
        torch.testing.assert_close(before.pop(), wanted)
        torch.testing.assert_close(after.pop(), 2 * wanted)
        torch.testing.assert_close(p.grad, 2 * wanted)
    ep.gradients(x, y)
    ep.predict(x)
    assert not before and not after, "they are for what reaches p.grad"


def test_gradients_that_are_accumulated_pass_a_hook_one_by_one():
    model = net().eval()
    ep, p = mep.EquilibriumPropagation(model, solver=SOLVER), model[4].weight
    each = [ep.gradients(*batch(seed))[0][p] for seed in range(3)]
    p.register_hook(lambda g: g.clamp(-0.02, 0.02))
    for seed in range(3):
        ep(*batch(seed))
    torch.testing.assert_close(p.grad, sum(g.clamp(-0.02, 0.02) for g in each))


@pytest.mark.parametrize("way", ["ep(x, y)", "opt.step"])
def test_an_optimizer_of_each_parameter_may_live_in_its_hook(way):
    """Its step takes the gradient away: each weight has moved once, and nothing is left for a second update."""
    model = net().eval()
    x, y = batch()
    found, _ = mep.EquilibriumPropagation(model, solver=SOLVER).gradients(x, y)
    wanted = {name: p.detach() - 0.1 * found[p] for name, p in model.named_parameters()}

    def hooked(own):
        def hook(p):
            own.step()
            own.zero_grad()

        return hook

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hooked(torch.optim.SGD([p], lr=0.1)))
    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    if way == "ep(x, y)":
        ep(x, y)
    else:
        mep.EPOptimizer(ep, torch.optim.SGD(model.parameters(), lr=0.1)).step(x=x, target=y)
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close({name: p.detach() for name, p in model.named_parameters()}, wanted)


# Hooks on modules

BACKWARD_HOOKS = {
    "full": lambda m: m.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "full, that looks": lambda m: m.register_full_backward_hook(lambda m, i, o: None),
    "full, before": lambda m: m.register_full_backward_pre_hook(lambda m, o: (2 * o[0],)),
    "of every module": lambda m: torch.nn.modules.module.register_module_full_backward_hook(lambda m, i, o: None),
    "of every module, before": lambda m: torch.nn.modules.module.register_module_full_backward_pre_hook(
        lambda m, o: None
    ),
    "of old": lambda m: m.register_backward_hook(lambda m, i, o: None),
}


@pytest.mark.parametrize("hook", BACKWARD_HOOKS)
def test_backward_hooks_of_modules_are_refused_by_name(hook):
    """There is no backward pass in which they would run."""
    model = quiet_net()
    x, y = batch()
    opt = mep.eqprop(model.parameters(), model=model)
    opt.step(x=x, target=y)
    for place in ("", "2"):
        handle = BACKWARD_HOOKS[hook](model.get_submodule(place))
        try:
            for attempt in (
                lambda: mep.eqprop(model.parameters(), model=model),
                lambda: mep.EquilibriumPropagation(model),
                lambda: mep.trace(model, x),
                lambda: opt.step(x=x, target=y),
            ):
                assert_refused(attempt, model, "backward hook", "Way out", error=mep.TraceError)
        finally:
            handle.remove()
        assert opt.step(x=x, target=y).isfinite()


class Recorder:
    """What hooks of objects leave behind."""

    def __init__(self):
        self.seen, self.last = [torch.ones(1)], None

    def __call__(self, module, args, output):
        self.seen.append(output)

    def method(self, module, args, output):
        self.seen.append(output)
        self.last = output


RECORD = [torch.ones(1)]
LATEST = torch.ones(1)


def into_a_list(layer):
    store = [torch.ones(1)]
    layer.register_forward_hook(lambda m, a, out: store.append(out))
    return lambda: store


def into_a_list_detached(layer):
    store = []
    layer.register_forward_hook(lambda m, a, out: store.append(out.detach()))
    return lambda: store


def shapes_into_a_list(layer):
    store = []
    layer.register_forward_hook(lambda m, a, out: store.append((out.shape, out.numel())))
    return lambda: store


def into_a_dictionary(layer):
    store = {"before": torch.ones(1)}
    layer.register_forward_hook(lambda m, a, out: store.update(h=out))
    return lambda: store


def into_lists_of_a_dictionary(layer):
    store = collections.defaultdict(list, known=[torch.ones(1)])
    layer.register_forward_hook(lambda m, a, out: store["h"].append(out) or store["known"].append(out))
    return lambda: store


def into_a_deque(layer):
    store = collections.deque([torch.ones(1)], maxlen=2)
    layer.register_forward_hook(lambda m, a, out: store.append(out))
    return lambda: store


def into_a_global_list(layer):
    layer.register_forward_hook(lambda m, a, out: RECORD.append(out))
    return lambda: RECORD


def into_a_global(layer):
    def hook(module, args, output):
        global LATEST
        LATEST = output

    layer.register_forward_hook(hook)
    return lambda: [LATEST]


def into_a_variable_of_a_function(layer):
    latest = None

    def hook(module, args, output):
        nonlocal latest
        latest = output

    layer.register_forward_hook(hook)
    return lambda: [latest]


def into_an_object_that_is_called(layer):
    recorder = Recorder()
    layer.register_forward_hook(recorder)
    return lambda: [*recorder.seen, recorder.last]


def into_an_object_by_its_method(layer):
    recorder = Recorder()
    layer.register_forward_hook(recorder.method)
    return lambda: [*recorder.seen, recorder.last]


def into_an_object_by_a_function(layer):
    recorder = Recorder()
    layer.register_forward_hook(lambda m, a, out: recorder.method(m, a, out))
    return lambda: [*recorder.seen, recorder.last]


def through_a_partial(layer):
    store = [torch.ones(1)]
    layer.register_forward_hook(functools.partial(lambda store, m, a, out: store.append(out), store))
    return lambda: store


def through_an_argument(layer):
    store = [torch.ones(1)]

    def hook(module, args, output, store=store):
        store.append(output)

    layer.register_forward_hook(hook)
    return lambda: store


def before_forward(layer):
    store = [torch.ones(1)]
    layer.register_forward_pre_hook(lambda m, args: store.append(args[0]))
    return lambda: store


def before_forward_with_names(layer):
    store = [torch.ones(1)]
    layer.register_forward_pre_hook(lambda m, args, kwargs: store.append((args, kwargs)), with_kwargs=True)
    return lambda: store


def within_forward(layer):
    store, forward = [torch.ones(1)], layer.forward

    def recording(x):
        store.append(x)
        return forward(x)

    layer.forward = recording
    return lambda: store


RECORDINGS = [
    into_a_list, into_a_list_detached, shapes_into_a_list, into_a_dictionary, into_lists_of_a_dictionary, into_a_deque,
    into_a_global_list, into_a_global, into_a_variable_of_a_function, into_an_object_that_is_called,
    into_an_object_by_its_method, into_an_object_by_a_function, through_a_partial, through_an_argument, before_forward,
    before_forward_with_names, within_forward,
]  # fmt: skip


def named(store):
    """What a store holds, by identity."""
    leaves = store.items() if isinstance(store, dict) else enumerate(store)
    return {key: [id(v) for v in value] if isinstance(value, list) else id(value) for key, value in leaves}


def tensors_in(value):
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple, collections.deque)):
        return [t for v in value for t in tensors_in(v)]
    return [value]


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda f: f.__name__.replace("_", " "))
def test_what_hooks_record_elsewhere_is_as_before(recording):
    """No tensors without numbers are left behind, and none of the runs that a proof needs."""
    model = quiet_net()
    x, y = batch()
    later = mep.eqprop(model.parameters(), model=model)
    later.step(x=x, target=y)
    store = recording(model[0])
    before, held = named(store()), tensors_in(store())
    for run in (
        lambda: mep.trace(model, x),
        lambda: later.step(x=x, target=y),
        lambda: later.step(x=x[:3], target=y[:3]),
    ):
        run()
        found = tensors_in(store())
        assert not [t for t in found if isinstance(t, (FakeTensor, torch.SymInt))]
        assert named(store()) == before and len(held) == len(found)


def doubled(model):
    model.b.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def doubled_without_a_tuple(model):
    model.b.register_forward_pre_hook(lambda m, args: 2 * args[0])


def doubled_by_name(model):
    model.b.register_forward_pre_hook(lambda m, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)


def squashed_at_the_door(model):
    model.register_forward_pre_hook(lambda m, args: (args[0].tanh(), *args[1:]))


def in_turn(model):
    model.b.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    model.b.register_forward_pre_hook(lambda m, args: (args[0].sin(),), prepend=True)


def with_noise(model):
    model.b.register_forward_pre_hook(lambda m, args: (args[0] + 0.1 * torch.randn_like(args[0]),))


def on_the_result(model):
    model.b.register_forward_hook(lambda m, args, out: out * torch.sigmoid(args[0]))
    model.register_forward_hook(lambda m, args, out: 2 * out)


def of_every_linear_layer(model):
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(1, keepdim=True),))


def with_a_parameter(model):
    model.gain = nn.Parameter(torch.randn(6).double())
    model.b.register_forward_pre_hook(lambda m, args: (args[0] * model.gain,))


CHANGING = [
    doubled, doubled_without_a_tuple, doubled_by_name, squashed_at_the_door, in_turn, with_noise, on_the_result,
    of_every_linear_layer, with_a_parameter,
]  # fmt: skip


@pytest.mark.parametrize("hook", CHANGING, ids=lambda f: f.__name__.replace("_", " "))
def test_hooks_that_change_what_a_module_takes_or_gives_are_part_of_the_model(hook):
    model = Net(lambda net, x: net.c(net.b(net.a(x).tanh()).tanh())).double()
    hook(model)
    assert_right(model, *batch())


# Parameters that the model no longer has


class Headed(nn.Module):
    """A body, a head, and a layer that forward never calls."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.1)
        self.inner, self.head, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x):
        h = self.drop(torch.tanh(self.norm(self.body(x))))
        return self.head(h + torch.tanh(self.inner(h)))


def headed():
    torch.manual_seed(0)
    return Headed()


def loaded_by_assigning(model):
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def head_replaced(model):
    model.head = nn.Linear(6, 3)


def weight_replaced(model):
    model.head.weight = nn.Parameter(torch.randn(3, 6))


def bias_removed(model):
    model.head.bias = None


def layer_removed(model):
    del model.unused


def tied_later(model):
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())
    model.inner.bias = model.body.bias


def made_a_buffer(model):
    weight = model.inner.weight.detach()
    del model.inner.weight
    model.inner.register_buffer("weight", weight)


def copied_in_place(model):
    model.inner = copy.deepcopy(model.inner)


def norm_converted(model):
    model.norm = nn.LayerNorm(6)


LOST = [
    loaded_by_assigning, head_replaced, weight_replaced, bias_removed, layer_removed, tied_later, made_a_buffer,
    copied_in_place, norm_converted,
]  # fmt: skip

MOVING = {
    "eqprop": mep.eqprop,
    "eqprop, low memory": functools.partial(mep.eqprop, low_memory=True),
    "smep": mep.smep,
    "sdmep": mep.sdmep,
    "natural_ep": mep.natural_ep,
    "muon_backprop": mep.muon_backprop,
    "AdamW": lambda params, model: mep.EPOptimizer(
        mep.EquilibriumPropagation(model), torch.optim.AdamW(model.parameters())
    ),
}
"""With momentum, so that there is something to spoil."""


def state_of(opt):
    """What a refused step must leave alone in the optimizer, tensors as tuples."""

    def frozen(value):
        if torch.is_tensor(value):
            return tuple(value.flatten().tolist())
        if isinstance(value, dict):
            return {key: frozen(v) for key, v in value.items()}
        return [frozen(v) for v in value] if isinstance(value, (list, tuple)) else value

    return frozen(opt.state_dict())


LOSSES_OF_PARAMETERS = [(way, lose) for way in MOVING for lose in (LOST if way == "eqprop" else (head_replaced,))]


@pytest.mark.parametrize("way,lose", LOSSES_OF_PARAMETERS, ids=lambda v: getattr(v, "__name__", v).replace("_", " "))
def test_optimizer_refuses_parameters_that_the_model_no_longer_has(way, lose):
    """It would train what nobody uses, and leave alone what is used."""
    model = headed().eval()
    opt = MOVING[way](model.parameters(), model=model)
    x, y = batch(dtype=torch.float32)
    opt.step(x=x, target=y)
    lose(model)
    grads = [p.grad if p.grad is None else p.grad.clone() for p in opt._parameters()]
    before, last = state_of(opt), opt.last
    for _ in range(2):
        assert_refused(lambda: opt.step(x=x, target=y), model, "Way out", "Headed", error=mep.ParameterError)
        assert state_of(opt) == before and opt.last is last
        for p, g in zip(opt._parameters(), grads, strict=True):
            assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    if lose is head_replaced:
        assert MOVING[way](model.parameters(), model=model).step(x=x, target=y).isfinite()


@pytest.mark.parametrize("part", ["norm", "drop"])
@pytest.mark.parametrize("way", ["eqprop", "eqprop, low memory", "muon_backprop"])
def test_such_a_refusal_moves_neither_buffers_nor_random_numbers(way, part):
    model = headed().eval()
    model.get_submodule(part).train()
    opt = MOVING[way](model.parameters(), model=model)
    head_replaced(model)
    x, y = batch(dtype=torch.float32)
    assert_refused(lambda: opt.step(x=x, target=y), model, "Nothing was changed", error=mep.ParameterError)


# Distributed wrappers


@pytest.fixture
def process_group(tmp_path):
    """One process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class _FabricModule(nn.Module):
    """As Lightning's wrapper is named."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Derived(nn.DataParallel):
    """A wrapper with another name."""


def sharded(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


def fully_sharded(module):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DistributedDataParallel, static": lambda m: nn.parallel.DistributedDataParallel(m, static_graph=True),
    "DataParallel": nn.DataParallel,
    "DataParallel, derived": Derived,
    "FullyShardedDataParallel": fully_sharded,
    "FSDP": sharded,
    "Fabric": _FabricModule,
}


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_distributed_wrappers_are_refused_by_name(wrapper, whole, process_group):
    """Gradients that are not made by backward() are not averaged: replicas would drift apart in silence."""
    inner = quiet_net().float()
    wrapped = WRAPPERS[wrapper](inner)
    model = wrapped if whole else nn.Sequential(wrapped, nn.Linear(3, 3))
    words = (type(wrapped).__name__, "Way out")
    attempts = [lambda: mep.EquilibriumPropagation(model), lambda: mep.trace(model, torch.ones(2, 4))]
    attempts += [lambda f=f: f(model.parameters(), model=model) for f in (mep.smep, mep.natural_ep, mep.local_ep)]
    for attempt in attempts:
        assert_refused(attempt, model, *words, error=mep.TraceError)


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FSDP"])
def test_distributed_wrappers_are_refused_by_backprop_too(wrapper, process_group):
    """It takes gradients by torch.autograd.grad, which averages nothing either."""
    model = WRAPPERS[wrapper](quiet_net().float())
    for attempt in (lambda: mep.Backprop(model), lambda: mep.muon_backprop(model.parameters(), model=model)):
        assert_refused(attempt, model, type(model).__name__, "Way out", error=mep.MepError)


# Closures


def closure_of(model, opt, x, y, calls):
    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = 7 * F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("preset", [p for p in BY_EP if p != "natural_ep"])
def test_a_closure_alone_is_backprop_and_a_warning_says_so_once(preset):
    model = net(torch.float32)
    opt = BY_EP[preset](model.parameters(), model=model, lr=0.01)
    calls = []
    closure = closure_of(model, opt, *batch(dtype=torch.float32), calls)
    with pytest.warns(UserWarning, match=r"backprop.*x=inputs.*loss\.backward\(\)") as said:
        opt.step(closure)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = opt.step(closure)
        copy.deepcopy(opt).step(closure)
    assert calls == [True] * 3 and loss.requires_grad


def test_a_closure_of_backprop_is_not_warned_of():
    model = net(torch.float32)
    opt = mep.muon_backprop(model.parameters(), model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure_of(model, opt, *batch(dtype=torch.float32), []))


CLOSED = {
    "eqprop": mep.eqprop,
    "eqprop, low memory": functools.partial(mep.eqprop, low_memory=True),
    "natural_ep": mep.natural_ep,
    "backprop": mep.muon_backprop,
}


@pytest.mark.parametrize("preset", CLOSED)
def test_a_closure_beside_the_batch_is_called_once_and_the_gradients_are_the_estimators(preset):
    """As trainers of frameworks do: its value is returned; its gradient, seven times too large, is not used."""
    model, twin = (net(torch.float32) for _ in range(2))
    for m in (model, twin):
        m[3].eval()  # a closure draws noise of its own
        if "low memory" in preset:
            m[1].eval()
    opt, plain = (CLOSED[preset](m.parameters(), model=m) for m in (model, twin))
    for steps in range(1, 3):
        x, y = batch(steps, torch.float32)
        calls = []
        closure = closure_of(model, opt, x, y, calls)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = opt.step(closure, x=x, target=y)
        loss = plain.step(x=x, target=y)
        assert calls == [True]
        torch.testing.assert_close(value.detach(), 7 * loss)
        torch.testing.assert_close(opt.last.loss, plain.last.loss)
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
        assert model[1].num_batches_tracked == (0 if "low memory" in preset else steps)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)


def test_what_a_closure_beside_the_batch_leaves_is_the_gradient_of_the_estimator():
    model = net().eval()
    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    x, y = batch()
    wanted, _ = ep.gradients(x, y)
    opt = mep.EPOptimizer(ep, torch.optim.SGD(model.parameters(), lr=0.1))
    opt.step(closure_of(model, opt, x, y, []), x=x, target=y)
    for p in model.parameters():
        torch.testing.assert_close(p.grad, wanted[p])


def test_whatever_a_closure_returns_is_returned():
    model = quiet_net().float()
    opt = mep.eqprop(model.parameters(), model=model)
    x, y = batch(dtype=torch.float32)
    for value in (None, 1.5, torch.tensor(2.0), {"loss": 1.0}):
        assert opt.step(lambda value=value: value, x=x, target=y) is value


POSITIONAL = {
    "x and target": lambda opt, x, y: opt.step(x, y),
    "x alone": lambda opt, x, y: opt.step(x),
    "x, and target by name": lambda opt, x, y: opt.step(x, target=y),
    "a closure, and then the batch": lambda opt, x, y: opt.step(lambda: None, x, y),
    "a batch in a tuple": lambda opt, x, y: opt.step((x, y)),
    "x without a target": lambda opt, x, y: opt.step(x=x),
    "a target without x": lambda opt, x, y: opt.step(target=y),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("call", POSITIONAL)
def test_batches_go_by_name(call, preset):
    model = net(torch.float32)
    opt = PRESETS[preset](model.parameters(), model=model)
    x, y = batch(dtype=torch.float32)
    assert_refused(lambda: POSITIONAL[call](opt, x, y), model, "target", error=mep.ArgumentError)


# What torch's modules do: right


def tokens(*shape, seed=1):
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))


def sequences(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(BATCH) % 3


def looked_up(**settings):
    return Net(lambda net, x: net.c(net.a(x).tanh().mean(1)), a=nn.Embedding(7, 6, **settings))


SPARSE = {
    "an embedding": lambda: looked_up(sparse=True),
    "an embedding with padding": lambda: looked_up(sparse=True, padding_idx=0),
    "an embedding by frequency": lambda: looked_up(scale_grad_by_freq=True),
    "a bag": lambda: Net(lambda net, x: net.c(net.a(x).tanh()), a=nn.EmbeddingBag(7, 6, mode="sum", sparse=True)),
    "an embedding used twice": lambda: Net(
        lambda net, x: net.c(torch.sin(net.a(x[:, 0]) * net.a(x[:, 1]))), a=nn.Embedding(7, 6, sparse=True)
    ),
    "a function": lambda: Net(
        lambda net, x: net.c(F.embedding(x, net.table, sparse=True).tanh().sum(1)),
        table=nn.Parameter(torch.randn(7, 6)),
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_are_right(name):
    assert_right(SPARSE[name]().double(), tokens(BATCH, 3), LABELS)


@pytest.mark.parametrize("preset", PRESETS)
def test_sparse_embeddings_train(preset):
    """Their gradients come dense, so that every update takes them."""
    model = SPARSE["an embedding"]()
    opt = PRESETS[preset](model.parameters(), model=model, **given(PRESETS[preset], settle_lr=0.1))
    before = model.a.weight.detach().clone()
    first = opt.step(x=tokens(BATCH, 3), target=LABELS)
    for _ in range(10):
        last = opt.step(x=tokens(BATCH, 3), target=LABELS)
    assert last < first and not torch.equal(model.a.weight, before)
    assert model.a.weight.grad is None or model.a.weight.grad.layout == torch.strided


FLAGS = {
    "inside": lambda net, x: net.c(net.b(net.a(x).requires_grad_().tanh())),
    "twice": lambda net, x: net.c(net.b(net.a(x).requires_grad_().tanh()).requires_grad_(True)),
    "at the door": lambda net, x: net.c(net.b(net.a(x.requires_grad_()).tanh())),
    "of a copy of the input": lambda net, x: net.c(net.b(net.a(x.detach().clone().requires_grad_()).tanh())),
    "retained": lambda net, x: (h := net.a(x).tanh(), h.retain_grad(), net.c(net.b(h)))[2],
    "of a constant": lambda net, x: net.c(net.b(net.a(x).tanh() + torch.ones(6, dtype=x.dtype, requires_grad=True))),
}


@pytest.mark.parametrize("name", FLAGS)
def test_forward_may_ask_for_gradients_of_what_is_inside(name):
    assert_right(Net(FLAGS[name]).double(), *batch())


class Halving(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        x.mul_(0.5)
        return self.inner(x)


class Rectifying(Halving):
    def forward(self, x):
        return self.inner(F.relu(x, inplace=True))


class Zeroing(Halving):
    def forward(self, x):
        x[:, 0] = 0
        return self.inner(x).tanh()


class Adding(Halving):
    def forward(self, x):
        x += self.inner(x.clone())
        return x


class Choosing(Halving):
    def forward(self, x):
        if x.sum() > 100:
            return x
        x.clamp_(-0.5, 0.5)
        return self.inner(x)


class Filling(Halving):
    """Writes to the second of two inputs."""

    def forward(self, x, scratch):
        scratch.mul_(x)
        return self.inner(scratch)


IN_PLACE = [Halving, Rectifying, Zeroing, Adding, Choosing]


@pytest.mark.parametrize("leaf", IN_PLACE)
def test_leaves_may_write_to_their_input(leaf):
    assert_right(Net(lambda net, x: net.c(net.b(net.a(x)).tanh()), b=leaf()).double(), *batch(), leaves=(leaf,))


@pytest.mark.parametrize("leaf", [Halving, Adding])
def test_a_leaf_that_writes_to_its_input_may_be_used_twice(leaf):
    model = Net(lambda net, x: net.c(net.b(1 * net.b(net.a(x)).tanh())), b=leaf()).double()
    assert_right(model, *batch(), leaves=("b",))


def test_a_leaf_may_write_to_one_of_two_inputs():
    model = Net(lambda net, x: net.c(net.b(net.a(x).tanh(), net.d(x))), b=Filling(), d=nn.Linear(4, 6)).double()
    assert_right(model, *batch(), leaves=(Filling,))


@pytest.mark.parametrize("leaf", IN_PLACE)
def test_what_a_leaf_writes_is_seen_by_others_that_read_it_or_refused(leaf):
    def forward(net, x):
        h = net.a(x)
        return net.c(net.b(h).tanh() + h)

    assert_right_or_refused(Net(forward, b=leaf()).double(), *batch(), leaves=(leaf,))


# Dtypes


@pytest.mark.parametrize("preset", PRESETS)
def test_dtype_may_change_between_steps(preset):
    """The gradient is that of a new optimizer; a batch of another dtype is refused by an error of our own."""
    model = quiet_net().float()
    opt = PRESETS[preset](model.parameters(), model=model, **given(PRESETS[preset], settle_lr=0.1))
    x, y = batch()
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        twin = copy.deepcopy(model)
        anew = PRESETS[preset](twin.parameters(), model=twin, **given(PRESETS[preset], settle_lr=0.1))
        torch.testing.assert_close(opt.step(x=x.to(dtype), target=y), anew.step(x=x.to(dtype), target=y))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.dtype == p.grad.dtype == dtype and p.isfinite().all()
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("wrong", [torch.float64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("way", ["opt.step", "ep(x, y)", "backprop"])
def test_batch_of_another_dtype_is_refused_by_an_error_of_our_own(way, wrong):
    """Here by a linear layer; the sentence has torch's reason. At first, and later."""
    model = quiet_net().float()
    x, y = batch(dtype=torch.float32)
    step = ESTIMATING[way](model)
    for _ in range(2):
        assert_refused(lambda: step(x.to(wrong), y), model, "dtype")
        step(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["eqprop", "eqprop, low memory", "smep", "AdamW"])
def test_a_step_under_autocast(way, dtype):
    """Parameters and gradients stay in float32, and the gradient has autograd's direction under the same autocast."""
    model = headed()
    model.drop.eval()
    model.norm.eval()
    x, y = batch(dtype=torch.float32, size=16)
    with torch.autocast("cpu", dtype=dtype):
        try:
            loss, exact = by_autograd(model, x, y)
        except RuntimeError:
            pytest.skip(f"no {dtype} on this CPU")
        used = [p for p, g in exact.items() if g is not None]
        before = [p.detach().clone() for p in used]
        opt = MOVING[way](model.parameters(), model=model)
        torch.testing.assert_close(opt.step(x=x, target=y).float(), loss.float(), rtol=2e-2, atol=2e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if "low memory" in way:
        found = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, used, strict=True)])
    else:
        assert {p.grad.dtype for p in used} == {torch.float32}
        found = torch.cat([p.grad.flatten() for p in used])
    assert F.cosine_similarity(found, torch.cat([exact[p].flatten() for p in used]), dim=0) > 0.99


def cast_inside(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        h = net.b(torch.tanh(net.a(x)))
    return net.c(h.float())


def uncast_inside(net, x):
    h = net.a(x)
    with torch.autocast("cpu", enabled=False):
        h = net.b(torch.tanh(h.float()))
    return net.c(h).float()


@pytest.mark.parametrize("outside", [False, True], ids=["", "and around the step"])
@pytest.mark.parametrize("forward", [cast_inside, uncast_inside], ids=["within", "without"])
def test_autocast_inside_forward(forward, outside):
    model = Net(forward)
    x, y = batch(dtype=torch.float32, size=16)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        loss, exact = by_autograd(model, x, y)
        try:
            found, estimate = mep.EquilibriumPropagation(model).gradients(x, y)
        except mep.TraceError as error:
            assert "Way out" in str(error)
            return
    torch.testing.assert_close(estimate.loss.float(), loss.float(), rtol=2e-2, atol=2e-2)
    parameters = list(model.parameters())
    assert F.cosine_similarity(flat(found, parameters), flat(exact, parameters), dim=0) > 0.99


# What is refused at the door, and with what advice


def numeric(preset):
    """Keywords that take a number."""
    known = "lr momentum weight_decay gamma beta settle_steps settle_lr tol patience damping kl_clip decay rank"
    known += " factors_every inverse_every rank_fraction dion_threshold"
    return [name for name in inspect.signature(preset).parameters if name in known.split()]


KEYWORDS = [(preset, name) for preset, f in PRESETS.items() for name in numeric(f)]


@pytest.mark.parametrize("preset,name", KEYWORDS)
def test_what_is_no_number_is_refused_by_name(preset, name):
    """As it comes from a file of settings."""
    model = quiet_net()
    for value in ("0.1", [0.1]):
        with pytest.raises(mep.ArgumentError, match=rf"{name}=.*0\.1"):
            PRESETS[preset](model.parameters(), model=model, **{name: value})


@pytest.mark.parametrize("preset", [p for p in PRESETS if "nesterov" in inspect.signature(PRESETS[p]).parameters])
def test_nesterov_without_momentum_is_refused_or_trains(preset):
    model = quiet_net()
    try:
        opt = PRESETS[preset](model.parameters(), model=model, nesterov=True, momentum=0.0)
    except mep.ArgumentError as error:
        assert "nesterov" in str(error).lower() and "momentum" in str(error)
    else:
        assert opt.step(**dict(zip(("x", "target"), batch(), strict=True))).isfinite()


class MyLBFGS(torch.optim.LBFGS):
    """Of one's own."""


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, MyLBFGS])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("estimator", [mep.EquilibriumPropagation, mep.Backprop])
def test_lbfgs_is_no_update(kind, low_memory, estimator):
    if low_memory and estimator is mep.Backprop:
        return
    model = quiet_net()
    with pytest.raises(mep.ArgumentError, match=r"LBFGS.*Way out"):
        mep.EPOptimizer(estimator(model), kind(model.parameters()), low_memory=low_memory)


def test_the_way_out_of_lbfgs_trains():
    model = quiet_net()
    x, y = batch()
    ep, opt = mep.EquilibriumPropagation(model, solver=SOLVER), torch.optim.LBFGS(model.parameters(), max_iter=5)

    def closure():
        opt.zero_grad()
        return ep(x, y).loss

    first = opt.step(closure)
    assert opt.step(closure) < first / 2


def classifier(*shape):
    """Of four features, with an output [batch, *shape]."""
    size = torch.Size(shape).numel()
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, size), nn.Unflatten(1, shape or (1,)))


class Squeezed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze(1)


def eight(*shape):
    return torch.zeros(8, *shape)


CLASS = torch.arange(8) % 3
WITH_GAPS = CLASS.clone().index_fill(0, torch.tensor([0, 4]), -100)

MISSHAPEN = {
    "a vector for a column": ("mse", classifier(1), eight(), r"target\[:, None\]"),
    "integers for a column": ("mse", classifier(1), eight().long(), r"target\[:, None\]"),
    "a column for a vector": ("mse", Squeezed(nn.Linear(4, 1)), eight(1), r"\(8, 1\).*\(8,\)"),
    "a row for a column": ("mse", classifier(1), eight()[None], r"\(1, 8\).*\(8, 1\)"),
    "labels for a vector of classes": ("mse", classifier(3), CLASS, "one_hot"),
    "labels in a column": ("cross_entropy", classifier(3), CLASS[:, None], r"labels\.squeeze\(-?1\)"),
    "labels in a column of bytes": ("cross_entropy", classifier(3), CLASS[:, None].byte(), r"labels\.squeeze\(-?1\)"),
    "one-hot integers": ("cross_entropy", classifier(3), F.one_hot(CLASS, 3), r"labels\.argmax\(1\)"),
    "one-hot bytes": ("cross_entropy", classifier(3), F.one_hot(CLASS, 3).byte(), r"labels\.argmax\(1\)"),
    "one-hot booleans": ("cross_entropy", classifier(3), F.one_hot(CLASS, 3) > 0, "integers"),
    "one-hot positions": (
        "cross_entropy", classifier(3, 2), F.one_hot(CLASS, 3)[:, :, None].expand(-1, -1, 2), r"labels\.argmax\(1\)"
    ),
    "positions in a column": (
        "cross_entropy", classifier(3, 2), CLASS[:, None, None].expand(-1, 2, 1), r"labels\.squeeze\(-1\)"
    ),
    "classes last": ("cross_entropy", classifier(2, 3), CLASS[:, None].expand(-1, 2), "transpose"),
    "a label to ignore": ("cross_entropy", classifier(3), WITH_GAPS, "ignore.*reduction"),
    "only labels to ignore": ("cross_entropy", classifier(3), torch.full((8,), -100), "ignore.*reduction"),
    "positions to ignore": (
        "cross_entropy", classifier(3, 2), torch.stack([CLASS, torch.full((8,), -100)], 1), "ignore.*reduction"
    ),
}  # fmt: skip


@pytest.mark.parametrize("estimator", [mep.EquilibriumPropagation, mep.Backprop])
@pytest.mark.parametrize("name", MISSHAPEN)
def test_targets_that_do_not_fit_are_refused_and_the_advice_helps(name, estimator):
    """Broadcast they would train on every pair of examples."""
    cost, model, y, advice = MISSHAPEN[name]
    model, x = fresh(model), torch.randn(8, 4).double()
    ep = estimator(model, cost)
    message = assert_refused(lambda: ep(x, y), model, error=mep.InputError)
    found = re.search(advice, message)
    assert found, message
    if found[0].startswith(("target", "labels")):
        ep(x, eval(found[0], {"target": y, "labels": y}))


def test_labels_are_ignored_on_request():
    """By the cost that the message names: ignored examples count, with nothing."""
    cost = lambda out, y: F.cross_entropy(out, y, reduction="none")  # noqa: E731
    assert_right(classifier(3).double(), torch.randn(8, 4).double(), WITH_GAPS, cost)


AVERAGING = {
    "F.cross_entropy": (F.cross_entropy, "cross_entropy"),
    "F.mse_loss": (F.mse_loss, "mse"),
    "nn.CrossEntropyLoss()": (nn.CrossEntropyLoss(), "cross_entropy"),
    "nn.MSELoss()": (nn.MSELoss(), "mse"),
    "nn.CrossEntropyLoss": (nn.CrossEntropyLoss, "cross_entropy"),
}


@pytest.mark.parametrize("call", [mep.EquilibriumPropagation, mep.Backprop, mep.smep, mep.muon_backprop])
@pytest.mark.parametrize("name", AVERAGING)
def test_costs_that_average_are_refused_with_the_name_of_the_one_that_is_meant(name, call):
    cost, meant = AVERAGING[name]
    model = quiet_net()
    args = () if isinstance(call, type) else (model.parameters(),)
    with pytest.raises(mep.ArgumentError, match=f"'{meant}'"):
        call(*args, model=model, cost=cost)


SCALAR = {
    "a partial function": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "a lambda": lambda out, y: F.cross_entropy(out, y),
    "F.nll_loss": F.nll_loss,
    "nn.MultiMarginLoss()": nn.MultiMarginLoss(),
    "with weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()),
}


@pytest.mark.parametrize("name", SCALAR)
def test_other_costs_of_a_batch_are_right_or_refused_with_a_hint(name):
    model = quiet_net()
    try:
        assert_right(model, *batch(), cost=SCALAR[name])
    except mep.MepError as error:
        assert "reduction='none'" in str(error)


# A softmax before the cost that has one

ENDING = {
    "a module": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "cross_entropy", True),
    "a function": (lambda: Net(lambda net, x: F.softmax(net.c(net.a(x)), -1)), "cross_entropy", True),
    "a method": (lambda: Net(lambda net, x: net.c(net.a(x)).softmax(dim=1)), "cross_entropy", True),
    "with another cost": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "mse", False),
    "log softmax": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), "cross_entropy", False),
    "inside": (lambda: Net(lambda net, x: net.c(net.a(x).softmax(1))), "cross_entropy", False),
    "none": (lambda: quiet_net().float(), "cross_entropy", False),
}


@pytest.mark.parametrize("name", ENDING)
def test_a_softmax_before_cross_entropy_is_warned_of_once(name):
    make, cost, warned = ENDING[name]
    model = make()
    opt = mep.eqprop(model.parameters(), model=model, cost=cost)
    x, y = batch(dtype=torch.float32)
    y = F.one_hot(y, 3).float()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for rows in (5, 5, 4):
            opt.step(x=x[:rows], target=y[:rows])
    texts = [str(w.message) for w in said]
    assert len(texts) == warned, texts
    assert all("softmax" in text and issubclass(w.category, UserWarning) for text, w in zip(texts, said, strict=True))


# Scripted, lazy and compiled modules


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x).tanh() * 2


@torch.jit.script
def scripted_function(x: torch.Tensor, scale: float) -> torch.Tensor:
    if scale > 1:
        x = x * scale
    return torch.sin(x)


SCRIPTED = {
    "a module": lambda: Net(lambda net, x: net.c(net.b(net.a(x)).tanh()), b=torch.jit.script(Doubling())),
    "a traced module": lambda: Net(
        lambda net, x: net.c(net.b(net.a(x)).tanh()), b=torch.jit.trace(Doubling(), torch.ones(2, 6))
    ),
    "a module used twice": lambda: Net(
        lambda net, x: net.c(net.b(net.b(net.a(x)).tanh())), b=torch.jit.script(Doubling())
    ),
    "one of several": lambda: nn.Sequential(
        nn.Linear(4, 6), torch.jit.script(nn.Sequential(nn.Tanh(), nn.Linear(6, 6))), nn.Tanh(), nn.Linear(6, 3)
    ),
    "a function": lambda: Net(lambda net, x: net.c(scripted_function(net.a(x), 1.5))),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_parts_are_right(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = SCRIPTED[name]().double()
    assert_right(model, *batch())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.Dropout])
def test_scripted_parts_that_remember_or_draw_are_right_or_refused(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), kind(6) if kind is nn.BatchNorm1d else kind(0.3)))
    assert_right_or_refused(Net(lambda net, x: net.c(net.b(net.a(x)).tanh()), b=scripted).double(), *batch())


@pytest.mark.parametrize("by", ["script", "trace"])
def test_a_scripted_model_is_refused(by):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = quiet_net().float()
        model = torch.jit.script(model) if by == "script" else torch.jit.trace(model, torch.ones(2, 4))
    for attempt in (
        lambda: mep.EquilibriumPropagation(model),
        lambda: mep.smep(model.parameters(), model=model),
        lambda: mep.natural_ep(model.parameters(), model=model),
        lambda: mep.trace(model, torch.ones(2, 4)),
    ):
        with pytest.raises(mep.TraceError, match="Way out"):
            attempt()


LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3)),
    "linear, in a part": lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.LazyLinear(3))),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.LazyConv1d(2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(6, 3)),
    "batch norm without parameters": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LazyBatchNorm1d(affine=False), nn.Tanh(), nn.Linear(6, 3)
    ),
}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_refused_until_they_know_their_shapes(name):
    model = LAZY[name]()
    x, y = batch(dtype=torch.float32)
    for attempt in (
        lambda: mep.EquilibriumPropagation(model),
        lambda: mep.smep(model.parameters(), model=model),
        lambda: mep.natural_ep(model.parameters(), model=model),
        lambda: mep.trace(model, x),
    ):
        with pytest.raises(mep.TraceError, match=r"(?s)lazy.*Way out"):
            attempt()
    model(x)  # the way out
    assert_right(model.double(), x.double(), y)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_part(model):
    model.b = torch.compile(model.b, backend="eager")
    return model


def compiled_forward(model):
    model.written = torch.compile(model.written, backend="eager")
    return model


COMPILED = [compiled, compiled_in_place, compiled_in_part, compiled_forward]


@pytest.mark.parametrize("make", COMPILED, ids=lambda f: f.__name__.replace("_", " "))
def test_compiled_models_are_right(make):
    model = make(Net(lambda net, x: net.c(net.norm(net.b(net.a(x).tanh())).tanh()), norm=nn.BatchNorm1d(6)).double())
    assert_right(model, *batch())


# Autograd functions


class Sign(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Clipped(torch.autograd.Function):
    """Straight through where the input is small."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 0.6)


class Product(torch.autograd.Function):
    """x W^T, asking what is needed; its gradient is twice what it should be."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        to_x = 2 * g @ w if ctx.needs_input_grad[0] else None
        to_w = 2 * g.t() @ x if ctx.needs_input_grad[1] else None
        return to_x, to_w


class Parts(torch.autograd.Function):
    """Two results."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0), x.clamp(max=0)

    @staticmethod
    def backward(ctx, up, down):
        (x,) = ctx.saved_tensors
        return up * torch.sigmoid(5 * x) + 0.5 * down


class Largest(torch.autograd.Function):
    """One of the two results has no gradient."""

    @staticmethod
    def forward(ctx, x):
        value, place = x.max(1, keepdim=True)
        ctx.mark_non_differentiable(place)
        ctx.save_for_backward(place)
        ctx.size = x.shape
        return value, place

    @staticmethod
    def backward(ctx, g, _):
        (place,) = ctx.saved_tensors
        return torch.zeros(ctx.size, dtype=g.dtype).scatter(1, place, 3 * g)


class Reversed(torch.autograd.Function):
    """With a number beside the tensor, in the style with a context of its own."""

    @staticmethod
    def forward(x, strength):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.strength = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return -ctx.strength * g, None


class Dirty(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Nested(torch.autograd.Function):
    """Its backward is another one's forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Sign.apply(g * 0 + 1) * g * torch.exp(-x * x)


class Unmaterialised(torch.autograd.Function):
    """Gradients of results that nobody reads are None."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, one, other):
        return (0 if one is None else 5 * one) + (0 if other is None else 7 * other)


bound_before = Sign.apply


class Quantised(nn.Module):
    """A leaf with a function inside."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return Clipped.apply(self.inner(x)) if x.isfinite().all() else x


class Quantising(nn.Linear):
    """A weight that is rounded in forward, and trained as if it were not."""

    def forward(self, x):
        return F.linear(x, Clipped.apply(3 * self.weight) / 3, self.bias)


def behind(function):
    return lambda net, x: net.c(function(net.b(net.a(x).tanh())) + net.a(x))


FUNCTIONS = {
    "straight through": (Net(behind(Sign.apply)), ()),
    "straight through, looked up in forward": (Net(behind(lambda h: Sign.apply(h))), ()),
    "bound at the top of a file": (Net(behind(lambda h: bound_before(h))), ()),
    "straight through where small": (Net(behind(lambda h: Clipped.apply(h))), ()),
    "twice": (Net(behind(lambda h: Sign.apply(Clipped.apply(h) + 0.1))), ()),
    "of a weight": (Net(behind(lambda h: h), b=Quantising(6, 6)), ()),
    "asking what is needed": (
        Net(lambda net, x: net.c(Product.apply(net.a(x).tanh(), net.b.weight) + net.b.bias)), ()
    ),
    "asking what is needed, of the input": (
        Net(lambda net, x: net.c(torch.tanh(Product.apply(x, net.a.weight)) + 0 * net.a(x)), b=None), ()
    ),
    "asking what is needed, of a constant": (
        Net(lambda net, x: net.c(Product.apply(net.a(x).tanh(), net.b.weight.detach()))), ()
    ),
    "in a leaf": (Net(lambda net, x: net.c(net.b(net.a(x)).tanh()), b=Quantised()), (Quantised,)),
    "two results": (Net(behind(lambda h: (p := Parts.apply(h))[0] - p[1])), ()),
    "one of two results": (Net(behind(lambda h: Parts.apply(h)[1])), ()),
    "one of two results, None for the other": (Net(behind(lambda h: Unmaterialised.apply(h)[1])), ()),
    "a result without a gradient": (Net(behind(lambda h: h * Largest.apply(h)[0] + Largest.apply(h)[1])), ()),
    "a context of its own": (Net(behind(lambda h: Reversed.apply(h, 0.7))), ()),
    "in place": (Net(behind(lambda h: Dirty.apply(h.clone()))), ()),
    "nested": (Net(behind(lambda h: Nested.apply(h))), ()),
    "before everything": (Net(lambda net, x: net.c(net.b(Sign.apply(net.a(x))).tanh()), a=nn.Linear(4, 6)), ()),
    "at the end": (Net(lambda net, x: Reversed.apply(net.c(net.a(x).tanh()), 2.0)), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_functions_keep_their_own_backward(name):
    model, leaves = FUNCTIONS[name]
    assert_right(fresh(model), *batch(), leaves=leaves)


def test_autograd_function_in_a_cost():
    cost = lambda out, y: F.cross_entropy(Reversed.apply(out, -0.5), y, reduction="none")  # noqa: E731
    assert_right(quiet_net(), *batch(), cost=cost)


# What no graph can hold


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x).tanh() if x.sum() > -1e6 else x


class OnAny(Branching):
    def forward(self, x):
        h = self.inner(x)
        if (h > 1e6).any():
            h = h.clamp(max=1e6)
        return h.tanh()


class Itemised(Branching):
    def forward(self, x):
        scale = x.detach().abs().max().item()
        return self.inner(x / scale).tanh()


class AsFloat(Branching):
    def forward(self, x):
        return self.inner(x).tanh() * (1.0 + float(x.detach().mean()) ** 2)


class Looping(Branching):
    def forward(self, x):
        h = self.inner(x)
        while h.norm() > 1:
            h = h / 2
        return h


class ByNumPy(Branching):
    def forward(self, x):
        top = torch.from_numpy(x.detach().numpy().max(1, keepdims=True))
        return self.inner(x).tanh() * top.tanh()


class Picking(Branching):
    def forward(self, x):
        h = self.inner(x).tanh()
        positive = h[x > 0]
        return h * positive.numel() / h.numel()


class Finding(Branching):
    def forward(self, x):
        rows, columns = torch.nonzero(x > 0, as_tuple=True)
        return self.inner(x).tanh().index_put((rows, columns), torch.zeros(len(rows), dtype=x.dtype))


class Around(nn.Module):
    """A larger module with the offender in it."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.offender = nn.Linear(6, 6), inner

    def forward(self, x):
        return x + self.offender(self.before(x).tanh())


OFFENDERS = [Branching, OnAny, Itemised, AsFloat, Looping, ByNumPy, Picking, Finding]


@pytest.mark.parametrize("kind", OFFENDERS, ids=lambda k: k.__name__)
def test_the_leaf_that_a_refusal_names_is_the_smallest_and_works(kind):
    """What depends on the values of tensors is refused, or right."""
    model = Net(lambda net, x: net.c(net.b(net.a(x)).tanh()), b=Around(kind())).double()
    x, y = batch()
    try:
        assert_right(model, x, y)
    except mep.TraceError:
        ep = mep.EquilibriumPropagation(model)
        message = assert_refused(lambda: ep(x, y), model, "Way out", f"leaves=({kind.__name__},)", error=mep.TraceError)
        assert "`b.offender`" in message
    else:
        assert kind not in (Branching, OnAny, Looping)
    assert_right(model, x, y, leaves=(kind,) if kind is not Branching else ("b.offender",))


def test_a_branch_in_the_model_itself_is_refused_with_a_way_out():
    model = Net(lambda net, x: net.c(net.a(x).tanh()) if x.sum() > -1e6 else net.c(net.a(x)))
    x, y = batch(dtype=torch.float32)
    message = assert_refused(lambda: mep.eqprop(model.parameters(), model=model).step(x=x, target=y), model, "Way out")
    assert "leaves=" in message


class Gradient(nn.Module):
    """The gradient of an energy, as in physics."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def energy(self, x):
        return torch.cosh(self.inner(x)).log().sum()

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


class FunctionalGradient(Gradient):
    def forward(self, x):
        return torch.func.grad(self.energy)(x)


class Jacobian(Gradient):
    def forward(self, x):
        return torch.func.jvp(lambda h: torch.tanh(self.inner(h)), (x,), (torch.ones_like(x),))[1]


class Backward(Gradient):
    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            leaf.sin().sum().backward()
        return self.inner(x) * leaf.grad


class Detaching(Gradient):
    def forward(self, x):
        return self.inner(x) * x.data


DIFFERENTIATING = [Gradient, FunctionalGradient, Jacobian, Backward, Detaching]


@pytest.mark.parametrize("kind", DIFFERENTIATING, ids=lambda k: k.__name__)
def test_autograd_inside_forward_is_refused_in_a_sentence_or_right(kind):
    """And as a leaf it is right, or refused."""
    model = Net(lambda net, x: net.c(net.b(net.a(x).tanh())), b=kind()).double()
    x, y = batch()
    try:
        assert_right(model, x, y)
    except mep.TraceError:
        ep = mep.EquilibriumPropagation(model)
        message = assert_refused(lambda: ep(x, y), model, "Way out", error=mep.TraceError)
        assert "autograd" in message
    else:
        assert kind is not Gradient
    assert_right_or_refused(model, x, y, leaves=(kind,))


ESTIMATING = {
    "opt.step": lambda model: lambda x, y: mep.eqprop(model.parameters(), model=model).step(x=x, target=y),
    "opt.step, low memory": lambda model: (
        lambda x, y: mep.eqprop(model.parameters(), model=model, low_memory=True).step(x=x, target=y)
    ),
    "ep(x, y)": mep.EquilibriumPropagation,
    "ep.gradients": lambda model: mep.EquilibriumPropagation(model).gradients,
    "ep.iter_gradients": lambda model: mep.EquilibriumPropagation(model).iter_gradients,
    "backprop": mep.Backprop,
}


@pytest.mark.parametrize("way", ESTIMATING)
def test_inference_mode_is_refused(way):
    model = quiet_net().float()
    x, y = batch(dtype=torch.float32)
    step = ESTIMATING[way](model)
    with torch.inference_mode():
        assert_refused(lambda: step(x, y), model, "inference_mode")
    step(x, y)


@pytest.mark.parametrize("way", ESTIMATING)
def test_batches_made_in_inference_mode_train_or_are_refused(way):
    """As an encoder that is not trained makes them."""
    model = quiet_net().float()
    x, y = batch(dtype=torch.float32)
    with torch.inference_mode():
        made_x, made_y = x.clone(), y.clone()
    step = ESTIMATING[way](model)
    for given in ((made_x, y), (x, made_y), (made_x, made_y)):
        before = everything(model)
        try:
            step(*given)
        except mep.MepError as error:
            assert "inference" in str(error)
            assert_same(everything(model), before)


# Noise, recurrence and masks


def attended(net, x):
    h = net.a(x)
    return net.c((h + net.m(h, h, h)[0]).mean(1))


def attended_without_weights(net, x):
    h = net.a(x)
    return net.c((h + net.m(h, h, h, need_weights=False)[0]).mean(1))


def dotted(net, x):
    h = net.a(x)
    return net.c(F.scaled_dot_product_attention(net.b(h), h, h.tanh(), dropout_p=0.3 if net.training else 0.0).mean(1))


def dotted_causally(net, x):
    h = net.a(x).unflatten(2, (2, 3)).transpose(1, 2)
    h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.3 if net.training else 0.0, is_causal=True)
    return net.c(h.transpose(1, 2).flatten(2).mean(1))


def relaxed(net, x):
    return net.c((net.b(net.a(x).tanh()) * F.gumbel_softmax(net.b(net.a(x)), dim=-1)).mean(1))


def jittered(net, x):
    h = net.a(x)
    return net.c(net.b((h + 0.3 * torch.randn_like(h)).tanh() * torch.bernoulli(torch.full_like(h, 0.7))).mean(1))


NOISY = {
    "attention": Net(attended, m=nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)),
    "attention without weights": Net(
        attended_without_weights, m=nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
    ),
    "dot product": Net(dotted),
    "dot product, causal": Net(dotted_causally),
    "an encoder layer": Net(
        lambda net, x: net.c(net.m(net.a(x)).mean(1)), m=nn.TransformerEncoderLayer(6, 2, 8, 0.2, batch_first=True)
    ),
    "dropout of channels": Net(lambda net, x: net.c(net.m(net.b(net.a(x)).tanh()).mean(1)), m=nn.Dropout1d(0.4)),
    "alpha dropout": Net(lambda net, x: net.c(net.m(net.b(net.a(x)).tanh()).mean(1)), m=nn.AlphaDropout(0.3)),
    "random slopes": Net(lambda net, x: net.c(net.m(net.b(net.a(x).tanh())).mean(1)), m=nn.RReLU()),
    "an LSTM of two layers": Net(
        lambda net, x: net.c(net.m(net.a(x))[0].mean(1)), m=nn.LSTM(6, 6, 2, batch_first=True, dropout=0.4)
    ),
    "a relaxed choice": Net(relaxed),
    "noise by hand": Net(jittered),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_drawn_once_a_step_as_by_forward(name):
    assert_right(fresh(NOISY[name]), sequences(BATCH, 3, 4), LABELS)


def both_read(net, x):
    out, h = net.m(net.a(x))
    h = h[0] if isinstance(h, tuple) else h
    return net.c(out.mean(1) + h[-1])


def cell_read(net, x):
    out, (h, c) = net.m(net.a(x))
    return net.c(out[:, 0] + h[0] * c[0])


def last_read(net, x):
    return net.c(net.m(net.a(x))[1][0][-1])


def both_directions(net, x):
    out, h = net.m(net.a(x))
    return net.c(out[:, -1, :3].repeat(1, 2) + h.transpose(0, 1).flatten(1))


def from_a_parameter(net, x):
    out, h = net.m(net.a(x), net.start.expand(1, x.shape[0], 6).contiguous())
    return net.c(out.sum(1) - h[0])


def by_cells(net, x):
    h = c = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    for t in range(x.shape[1]):
        h, c = net.m(net.a(x[:, t]), (h, c))
    return net.c(h + c)


def packed(net, x):
    lengths = torch.tensor([3, 2, 3, 1, 2])
    rows = nn.utils.rnn.pack_padded_sequence(net.a(x), lengths, batch_first=True, enforce_sorted=False)
    out, _ = nn.utils.rnn.pad_packed_sequence(net.m(rows)[0], batch_first=True)
    return net.c(out.sum(1))


RECURRENT = {
    "LSTM": (both_read, lambda: nn.LSTM(6, 6, batch_first=True)),
    "LSTM, its cell read": (cell_read, lambda: nn.LSTM(6, 6, batch_first=True)),
    "LSTM, its last state alone": (last_read, lambda: nn.LSTM(6, 6, batch_first=True)),
    "LSTM with a projection": (both_read, lambda: nn.LSTM(6, 8, proj_size=6, batch_first=True)),
    "GRU": (both_read, lambda: nn.GRU(6, 6, batch_first=True)),
    "GRU in both directions": (both_directions, lambda: nn.GRU(6, 3, batch_first=True, bidirectional=True)),
    "GRU from a parameter": (from_a_parameter, lambda: nn.GRU(6, 6, batch_first=True)),
    "cells": (by_cells, lambda: nn.LSTMCell(6, 6)),
}


WHOLE = [(name, False) for name in RECURRENT] + [(name, True) for name in ("LSTM", "GRU from a parameter", "cells")]


@pytest.mark.parametrize("name,whole", WHOLE)
def test_recurrent_layers_are_right(name, whole):
    forward, layer = RECURRENT[name]
    model = Net(forward, m=layer(), start=nn.Parameter(torch.randn(1, 1, 6))).double()
    assert_right(model, sequences(BATCH, 3, 4), LABELS, leaves=("m",) if whole else ())


def test_packed_sequences_are_right_or_refused():
    model = Net(packed, m=nn.LSTM(6, 6, batch_first=True)).double()
    assert_right_or_refused(model, sequences(BATCH, 3, 4), LABELS)


COUNTING = {
    "zeros": lambda net, x: net.c(net.a(x).tanh() + torch.zeros(len(x), 6, dtype=x.dtype)),
    "a view": lambda net, x: net.c(net.b(net.a(x).tanh()).view(len(x), -1)),
    "a mean by hand": lambda net, x: net.c(net.a(x).tanh() - net.b(x.repeat(1, 2)[:, :6]).sum(0) / len(x)),
    "a loop": lambda net, x: net.c(torch.stack([net.a(x[i]).tanh() for i in range(len(x))])),
    "a loop over rows": lambda net, x: net.c(torch.stack([net.a(row).tanh() for row in x])),
    "the size as a list": lambda net, x: net.c(net.a(x).tanh().reshape(next(iter(x.size())), 6)),
    "an index": lambda net, x: net.c(net.a(x).tanh()[torch.arange(len(x))]),
    "whether it is one": lambda net, x: net.c(net.a(x).tanh() if len(x) > 1 else net.a(x)),
}


@pytest.mark.parametrize("name", COUNTING)
def test_forward_may_ask_how_many_examples_there_are(name):
    """And another number of them is seen."""
    model = Net(COUNTING[name]).double()
    assert_right(model, *batch())
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5)
    for size in (BATCH, 3, 1):
        x, y = batch(size=size)
        exact = by_autograd(model, x, y)[1]
        parameters = list(model.parameters())
        error = flat(ep.gradients(x, y)[0], parameters) - flat(exact, parameters)
        assert error.norm() < 1e-3 * flat(exact, parameters).norm()


def by_parity(net, x):
    h = net.a(x)
    return net.c(torch.tanh(3 * h if x.shape[1] % 2 else h)).mean(1)


def by_number_of_tokens(net, x):
    h = net.a(x)
    return net.c(torch.tanh(3 * h if x.shape[0] * x.shape[1] > 21 else h)).mean(1)


def by_whether_it_is_square(net, x):
    h = net.a(x)
    return net.c(torch.tanh(3 * h if x.shape[0] == x.shape[1] else h)).mean(1)


def padded_to_pairs(net, x):
    """As windows of attention are."""
    h = F.pad(net.a(x), (0, 0, 0, -x.shape[1] % 2))
    return net.c(h.view(len(x), -1, 2, 6).tanh().sum(2).cumsum(1)[:, -1])


def by_a_key_of_text(net, x):
    return net.c(torch.tanh(net.a(x) * {"of 4": 1.0, "of 5": 3.0}.get(f"of {x.shape[1]}", 2.0))).mean(1)


DECIDING = {
    "a text": by_a_key_of_text,
    "parity": by_parity,
    "the number of tokens": by_number_of_tokens,
    "whether it is square": by_whether_it_is_square,
    "padding to pairs": padded_to_pairs,
}


@pytest.mark.parametrize("name", DECIDING)
def test_what_forward_decides_by_sizes_is_decided_again_for_others(name):
    """Also for shapes before which nothing is proven."""
    model = Net(DECIDING[name]).double()
    parameters = list(model.parameters())
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5)
    for seed, (size, length) in enumerate([(5, 4), (5, 6), (5, 5), (5, 3), (2, 4), (4, 6), (3, 3), (1, 3)]):
        x, y = sequences(size, length, 4, seed=seed), torch.arange(size) % 3
        loss, exact = by_autograd(model, x, y)
        found, estimate = ep.gradients(x, y)
        torch.testing.assert_close(estimate.loss, loss)
        exact = flat(exact, parameters)
        assert (flat(found, parameters) - exact).norm() < 1e-3 * exact.norm(), f"{size} examples of {length}"


def mean_cross_entropy(output, y):
    return F.cross_entropy(output, y)


SPLITTING = {
    "halves": lambda h: torch.cat(h.chunk(2)),
    "thirds in turn": lambda h: torch.cat(h.chunk(3)[::-1]),
    "twos": lambda h: torch.cat([part * (i + 1) for i, part in enumerate(h.split(2))]),
    "two columns": lambda h: torch.cat([h[:, :2], h[:, 2:]], 1),
}
PLACES = {
    "the input": lambda net, x, split: net.c(net.a(split(x)).tanh()),
    "a layer": lambda net, x, split: net.c(split(net.a(x)).tanh()),
}


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cost", ["cross_entropy", mean_cross_entropy])
def test_batches_that_forward_splits_are_split_again_where_sizes_differ(name, place, cost):
    """Also where the cost is recorded as well, whose target has the same number of examples."""
    model = Net(lambda net, x: PLACES[place](net, x, SPLITTING[name])).double()
    parameters = list(model.parameters())
    for sizes in (4, 1, 7), (1, 4):
        ep = mep.EquilibriumPropagation(model, cost, solver=SOLVER, beta=1e-5)
        for size in sizes:
            x, y = batch(size=size)
            loss, exact = by_autograd(model, x, y)
            found, estimate = ep.gradients(x, y)
            torch.testing.assert_close(estimate.loss, loss)
            exact = flat(exact, parameters)
            assert (flat(found, parameters) - exact).norm() < 1e-3 * exact.norm(), size


@pytest.mark.parametrize("size", [BATCH, 1])
@pytest.mark.parametrize("double", [lambda x: torch.cat([x, x.flip(0)]), lambda x: x.repeat(2, 1)])
def test_rows_that_are_no_examples_anywhere_are_refused_with_the_place_and_the_advice_helps(double, size):
    model, (x, y) = Net(lambda net, x: net.c(net.a(double(x)).tanh())).double(), batch(size=size)
    ep = mep.EquilibriumPropagation(model, mean_cross_entropy, solver=SOLVER)
    said = assert_refused(lambda: ep(x, y.repeat(2)), model, "node `a`", "torch.stack", "Way out")
    assert "cost=lambda" not in said
    by_example = Net(lambda net, x: net.c(net.a(torch.stack([x, x.flip(0)], 1).flatten(0, 1)).tanh())).double()
    assert_right(by_example, x, torch.stack([y, y.flip(0)], 1).flatten(), mean_cross_entropy)


CHECKPOINTED = {
    "normalised": lambda: [nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)],
    "normalised twice, with noise": lambda: [
        nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh()
    ],
    "normalised without statistics": lambda: [nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()],
    "with a count of its own": lambda: [Counting(), nn.Linear(6, 6)],
}  # fmt: skip


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.tanh()


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_buffers_of_a_checkpointed_block_are_written_once_a_step(name):
    """Backpropagation writes them twice: when it computes the block again."""
    block = nn.Sequential(*CHECKPOINTED[name]())
    before = nn.BatchNorm1d(6)
    run_again = functools.partial(checkpoint, block, use_reentrant=False)
    model = Net(lambda net, x: net.c(run_again(before(net.a(x)))), block=block, before=before).double()
    parameters = list(model.parameters())
    plain = nn.Sequential(model.a, before, block, model.c)
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5, proof="always")
    for seed in range(3):
        x, y = batch(seed)
        start, noise = [b.clone() for b in model.buffers()], torch.get_rng_state()
        loss, exact = by_autograd(plain, x, y)
        wanted = [b.clone() for b in model.buffers()]
        for b, value in zip(model.buffers(), start, strict=True):
            b.copy_(value)
        torch.set_rng_state(noise)
        found, estimate = ep.gradients(x, y)
        torch.testing.assert_close(estimate.loss, loss)
        assert all(map(torch.equal, model.buffers(), wanted))
        assert (flat(found, parameters) - flat(exact, parameters)).norm() < 1e-3 * flat(exact, parameters).norm()


def test_a_buffer_that_only_the_backward_pass_writes_is_refused():
    model = Net(lambda net, x: net.c(watched(net, net.a(x).tanh())))
    model.register_buffer("norm", torch.zeros(()))
    model = model.double()

    def watched(net, h):
        h.register_hook(lambda g: net.norm.copy_(g.norm()))
        return h

    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    assert_refused(lambda: ep(*batch()), model, "Way out")


def normal(net, h, **given):
    return distributions.Normal(h, net.b(h.tanh()).exp(), **given)


DISTRIBUTIONS = {
    "a sample": lambda net, h, **given: normal(net, h, **given).rsample(),
    "of independent numbers": lambda net, h, **given: (
        distributions.Independent(normal(net, h, **given), 1, **given).mean
    ),
    "of a transformed one": lambda net, h, **given: distributions.TransformedDistribution(
        normal(net, h, **given), [distributions.TanhTransform()], **given
    ).rsample(),
    "of correlated numbers": lambda net, h, **given: distributions.MultivariateNormal(
        h, scale_tril=torch.eye(6).double(), **given
    ).rsample(),
    "an entropy": lambda net, h, **given: h * distributions.Categorical(logits=net.b(h), **given).entropy()[:, None],
    "a probability": lambda net, h, **given: distributions.Laplace(h, 1.0, **given).log_prob(net.b(h)),
    "a divergence": lambda net, h, **given: distributions.kl_divergence(
        normal(net, h, **given), distributions.Normal(0.0, 1.0, **given)
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_that_check_are_refused_and_the_advice_helps(name, monkeypatch):
    """Whose message names the smallest change: `validate_args=False`."""
    monkeypatch.setattr(distributions.Distribution, "_validate_args", True)  # torch.compile sets it to False for good
    draw, (x, y) = DISTRIBUTIONS[name], batch()
    model = Net(lambda net, x: net.c(draw(net, net.a(x).tanh()))).double()
    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    assert_refused(lambda: ep(x, y), model, "Way out", "validate_args=False", "leaves=", error=mep.TraceError)
    assert_right(Net(lambda net, x: net.c(draw(net, net.a(x).tanh(), validate_args=False))).double(), x, y)


def test_other_decisions_by_values_are_not_laid_to_distributions():
    model = Net(lambda net, x: net.c(net.a(x).tanh() if net.a(x).sum() > 0 else net.a(x))).double()
    said = assert_refused(lambda: mep.EquilibriumPropagation(model)(*batch()), model, "Way out")
    assert "validate_args" not in said


def test_a_part_of_a_batch_is_compared_only_where_the_graph_is_for_it():
    """Forward reads the number of examples, and the proof of a later step takes every eighth of them alone."""
    model = Net(lambda net, x: net.c(torch.tanh(net.a(x) * (3 if len(x) % 2 else 1)))).double()
    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    for seed in range(5):
        ep.gradients(*batch(seed, size=24))


def hidden(made):
    """A model that reads a layer, or a tensor, which is none of its parameters; and the tensors."""
    model, other = quiet_net(), nn.Linear(3, 3).double()
    if made == "a tensor":
        model.scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
        model.append(Net(lambda net, x: x * model.scale))
        return model, "cross_entropy", [model.scale]
    if made == "a buffer":
        model.register_buffer("scale", torch.ones(3, dtype=torch.float64).requires_grad_())
        model.append(Net(lambda net, x: x * model.scale))
        return model, "cross_entropy", [model.scale]
    if made == "a list of layers":
        last = Net(lambda net, x: net.layers[0](x))
        last.layers = [other]
        return model.append(last), "cross_entropy", [*other.parameters()]
    return model, lambda out, y: F.cross_entropy(other(out), y, reduction="none"), [*other.parameters()]


HIDDEN = ["a tensor", "a buffer", "a list of layers", "a layer in the cost"]


@pytest.mark.parametrize("made", HIDDEN)
def test_what_would_be_trained_but_is_no_parameter_is_said_once(made):
    """Not where it is frozen, as the way out says."""
    model, cost, tensors = hidden(made)
    ep = mep.EquilibriumPropagation(model, cost, solver=SOLVER)
    with pytest.warns(UserWarning, match=rf"{len(tensors)} tensors that require a gradient.*Way out"):
        ep(*batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ep(*batch())
        for t in tensors:
            t.requires_grad_(False)
        mep.EquilibriumPropagation(model, cost, solver=SOLVER)(*batch())


def test_nothing_is_said_of_tensors_made_in_forward_of_detached_layers_or_of_the_batch():
    teacher = nn.Linear(4, 3).double()

    def forward(net, x):
        made = torch.ones(6, dtype=x.dtype, requires_grad=True)
        return net.c(net.a(x).tanh() * made) + teacher(x).detach()

    x, _ = batch()
    ep = mep.EquilibriumPropagation(Net(forward).double(), lambda out, y: (out - y).square().sum(1), solver=SOLVER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ep(x.requires_grad_(), torch.randn(BATCH, 3).double().requires_grad_())


def grown(net, x):
    if x.shape[1] > len(net.table):
        net.register_buffer("table", torch.ones(x.shape[1], 1, dtype=x.dtype))
    return net.c(torch.tanh(net.a(x) * net.table[: x.shape[1]])).mean(1)


def test_a_buffer_that_grows_in_forward_is_refused_and_may_be_grown_before():
    model, x = Net(grown).double(), sequences(BATCH, 4, 4)
    model.register_buffer("table", torch.ones(3, 1).double())
    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    assert_refused(lambda: ep.gradients(x, LABELS), model, "`table` anew", "Run the model once")
    model(x)
    assert_right(model, x, LABELS)


def test_a_sparse_buffer_may_be_multiplied_with():
    model, (x, y) = Net(lambda net, x: net.c(torch.sparse.mm(net.edges, torch.tanh(net.a(x))))).double(), batch()
    model.register_buffer("edges", torch.eye(BATCH).double().roll(1, 0).to_sparse())
    exact, parameters = by_autograd(model, x, y)[1], list(model.parameters())
    found, _ = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5).gradients(x, y)
    assert (flat(found, parameters) - flat(exact, parameters)).norm() < 1e-3 * flat(exact, parameters).norm()


def own_generator(net, x):
    return net.c(torch.tanh(net.a(x)) * torch.rand(6, generator=net.generator, dtype=x.dtype))


def test_a_generator_of_ones_own_is_refused():
    model = Net(own_generator, generator=torch.Generator()).double()
    ep = mep.EquilibriumPropagation(model)
    state = model.generator.get_state()
    assert_refused(lambda: ep.gradients(*batch()), model, "Generator", "Way out")
    assert torch.equal(model.generator.get_state(), state)


def attended_with_mask(net, x, mask):
    h = net.a(x)
    return net.c(F.scaled_dot_product_attention(h, h, h, attn_mask=mask).mean(1))


def without_missing_values(net, x):
    missing = x.isnan()
    return net.c(torch.tanh(net.a(x.nan_to_num()) + net.b(net.a(missing.to(x.dtype)))))


def test_masks_with_minus_infinity_may_be_inputs():
    model = Net(attended_with_mask).double()
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64).expand(BATCH, 3, 3)
    assert_right(model, (sequences(BATCH, 3, 4), mask), LABELS)


def test_missing_values_may_be_nan_where_forward_replaces_them():
    model, (x, y) = Net(without_missing_values).double(), batch()
    x[1, 2] = x[3, 0] = torch.nan
    assert_right(model, x, y)
    ep = mep.EquilibriumPropagation(model)
    torch.testing.assert_close(ep.predict(x), model(x))
    torch.testing.assert_close(mep.Backprop(model)(x, y).loss, by_autograd(model, x, y)[0])
    with pytest.raises(mep.InputError, match="NaN"):
        mep.EquilibriumPropagation(quiet_net()).predict(x)


def rows_of_tokens(net, x):
    """As a language model that flattens its output for the loss."""
    return net.c(net.a(x).tanh()).view(-1, 3)


def test_output_may_have_several_rows_an_example_for_a_cost_of_them_all():
    model = Net(rows_of_tokens).double()
    x, y = sequences(BATCH, 4, 4), torch.arange(BATCH * 4) % 3
    assert_right(model, x, y, lambda out, y: F.cross_entropy(out, y))
    ep = mep.EquilibriumPropagation(model)
    torch.testing.assert_close(ep.predict(x), model(x))
    with pytest.raises(mep.InputError, match=r"20 rows for 5 examples.*Way out"):
        ep(x, y)


class OfComplexNumbers(nn.Module):
    """Without a real parameter."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(4, 6, dtype=torch.complex128))
        self.w = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))

    def forward(self, x):
        return (torch.tanh(x @ self.v) @ self.w).abs()


def test_a_model_without_real_parameters_is_right():
    model, x, y = OfComplexNumbers(), sequences(BATCH, 4).to(torch.complex128), LABELS
    exact = by_autograd(model, x, y)[1]
    found, _ = mep.EquilibriumPropagation(model, beta=1e-5, solver=SOLVER).gradients(x, y)
    for p, g in exact.items():
        assert (found[p] - g).norm() < 1e-3 * g.norm()


LAYOUTS = {
    "of the input": lambda model, x, layout: x.to(memory_format=layout),
    "of the weights": lambda model, x, layout: model.to(memory_format=layout) and x,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_noise_is_drawn_in_the_order_of_memory_when_that_changes(name):
    """Dropout draws for values as they lie in memory, and convolutions lay them as they find input or weight."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)).double()
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5)
    for seed, layout in enumerate((torch.contiguous_format, torch.channels_last, torch.contiguous_format)):
        x = LAYOUTS[name](model, sequences(BATCH, 2, 4, 4, seed=seed), layout)
        torch.manual_seed(seed)
        loss, exact = by_autograd(model, x, LABELS)
        torch.manual_seed(seed)
        found, estimate = ep.gradients(x, LABELS)
        torch.testing.assert_close(estimate.loss, loss)
        parameters = list(model.parameters())
        exact = flat(exact, parameters)
        assert (flat(found, parameters) - exact).norm() < 1e-3 * exact.norm()


def test_parameters_may_grow_in_place():
    """As `.data` does, without a trace in any attribute."""
    model = Net(lambda net, x: F.linear(net.a(x).tanh().view(len(x), 2, -1).sum(1), net.head)).double()
    model.b = model.c = None
    model.head = nn.Parameter(torch.randn(3, 3).double())
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5)
    for width in (6, 8):
        shapes = {"a.weight": (width, 4), "a.bias": (width,), "head": (3, width // 2)}
        for name, shape in shapes.items():
            model.get_parameter(name).data = sequences(*shape)
        x, y = batch()
        exact = by_autograd(model, x, y)[1]
        parameters = list(model.parameters())
        assert (flat(ep.gradients(x, y)[0], parameters) - flat(exact, parameters)).norm() < 1e-3


def buffered(forward):
    model = Net(forward)
    model.register_buffer("kept", torch.tensor([True, False, True, True, False, True]))
    model.register_buffer("order", torch.tensor([5, 0, 2, 2, 1, 4]))
    return model


def assigned_by_mask(net, x):
    h = net.a(x).clone()
    h[x[:, :1].expand(-1, 6) > 0] = 0.0
    return net.c(h.tanh())


def pooled_by_mask(net, x):
    h, mask = net.a(x).tanh(), x > 0
    return net.c(torch.stack([net.b(h[i : i + 1])[:, :4][mask[i : i + 1]].sum() for i in range(BATCH)])[:, None] + h)


MASKED = {
    "filled": lambda net, x: net.c(net.b(net.a(x)).masked_fill(x[:, :1] > 0, 0.0).tanh()),
    "chosen": lambda net, x: net.c(torch.where(x[:, :1] > 0, net.a(x), net.b(net.a(x)))),
    "by a mask in a buffer": lambda net, x: net.c(F.pad(net.a(x)[:, net.kept], (0, 2)).tanh()),
    "by places in a buffer": lambda net, x: net.c(net.a(x)[:, net.order].tanh()),
    "by places of the input": lambda net, x: net.c(net.a(x).gather(1, x.abs().argsort(1).repeat(1, 2)[:, :6]).tanh()),
    "assigned by a mask in a buffer": lambda net, x: net.c(net.a(x).masked_scatter(net.kept, 0 * net.b(net.a(x)))),
    "multiplied": lambda net, x: net.c(net.a(x) * (net.a(x) > 0) * net.kept),
}

LOOSE = {
    "assigned by a mask": assigned_by_mask,
    "of every example": pooled_by_mask,
    "a sum over the chosen": lambda net, x: net.c(net.a(x).tanh() * net.a(x)[x[:, 0] > 0].detach().sum()),
    "selected": lambda net, x: net.c(net.a(x) + torch.masked_select(net.a(x), x[:, :1] > 0).mean()),
    "unique": lambda net, x: net.c(net.a(x) + torch.unique((x > 0).long(), dim=0).sum()),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_right(name):
    assert_right(buffered(MASKED[name]).double(), *batch())


@pytest.mark.parametrize("name", LOOSE)
def test_masks_that_decide_about_sizes_are_right_or_refused(name):
    assert_right_or_refused(buffered(LOOSE[name]).double(), *batch())


# Sequences whose first dimension is time inside

TIME = 5


def encoded(net, x):
    return net.c(net.m(net.a(x.transpose(0, 1))).mean(0))


def unrolled(net, x):
    out, (h, _) = net.m(net.a(x.transpose(0, 1)))
    return net.c(out[-1] + h[0])


def attended_in_time(net, x):
    h = net.a(x).permute(1, 0, 2)
    return net.c((h + net.m(h, h, h)[0])[0])


def averaged_in_time(net, x):
    return net.c(net.b(net.a(x.transpose(0, 1)).tanh()).mean(0))


def placed_in_time(net, x):
    h = net.a(x.transpose(0, 1)) + net.place[: x.shape[1]]
    return net.c(net.b(h.tanh()).amax(0))


def flattened_in_time(net, x):
    rows = x.transpose(0, 1).reshape(-1, 4)
    return net.c(net.b(net.a(rows).tanh()).view(x.shape[1], x.shape[0], 6).mean(0))


def stepped_in_time(net, x):
    h = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    for step in net.a(x.transpose(0, 1)).unbind(0):
        h = torch.tanh(net.b(h) + step)
    return net.c(h)


def convolved_in_time(net, x):
    h = net.a(x.transpose(0, 1)).permute(1, 2, 0)
    return net.c(net.m(h).tanh().permute(2, 0, 1)[-1])


TIMED = {
    "an encoder layer": (encoded, lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)),
    "an LSTM": (unrolled, lambda: nn.LSTM(6, 6)),
    "attention": (attended_in_time, lambda: nn.MultiheadAttention(6, 2)),
    "linear layers": (averaged_in_time, nn.Identity),
    "places": (placed_in_time, nn.Identity),
    "rows of time and batch": (flattened_in_time, nn.Identity),
    "steps": (stepped_in_time, nn.Identity),
    "a convolution": (convolved_in_time, lambda: nn.Conv1d(6, 6, 3, padding=1)),
}


SIZES = [(name, (1, TIME, 3)) for name in TIMED]
SIZES += [(name, sizes) for name in ("an LSTM", "places") for sizes in ((TIME, 1, 3), (3, TIME, 2))]


@pytest.mark.parametrize("name,sizes", SIZES, ids=str)
def test_time_first_is_not_mistaken_for_the_batch(name, sizes):
    """Whether the first batch has one example, as many as time steps, or another number."""
    forward, layer = TIMED[name]
    model = Net(forward, m=layer(), place=nn.Parameter(torch.randn(TIME, 1, 6))).double()
    parameters = list(model.parameters())
    ep = mep.EquilibriumPropagation(model, solver=SOLVER, beta=1e-5)
    for seed, size in enumerate(sizes):
        x, y = sequences(size, TIME, 4, seed=seed), torch.arange(size) % 3
        loss, exact = by_autograd(model, x, y)
        try:
            found, estimate = ep.gradients(x, y)
        except mep.MepError as error:
            assert "Way out" in str(error)
            continue
        torch.testing.assert_close(estimate.loss, loss)
        exact = flat(exact, parameters)
        assert (flat(found, parameters) - exact).norm() < 1e-3 * exact.norm(), f"with {size} examples"


# Updates near the largest number


class Seen:
    """A layer as it is observed for the Fisher matrix."""

    def __init__(self, weight, bias):
        self.weight, self.bias, self.examples = weight, bias, 4

    def rows(self):
        generator = torch.Generator().manual_seed(0)
        return (
            torch.randn(4, self.weight[0].numel(), generator=generator).to(self.weight),
            torch.randn(4, len(self.weight), generator=generator).to(self.weight),
        )


UPDATES = {
    "Muon": mep.Muon,
    "Muon, by products": functools.partial(mep.Muon, method="newton_schulz"),
    "Dion, small": mep.Dion,
    "Dion, large": functools.partial(mep.Dion, dion_threshold=0, rank_fraction=0.5),
    "Dion, large, of full rank": functools.partial(mep.Dion, dion_threshold=0, rank_fraction=1.0),
    "NaturalGradient": mep.NaturalGradient,
    "NaturalGradient, diagonal": functools.partial(mep.NaturalGradient, use_diagonal_fisher=True),
    "NaturalGradient, orthogonal": functools.partial(mep.NaturalGradient, orthogonalise=True),
}
SIGNS = {
    "all alike": lambda shape, step: torch.full(shape, 6e4),
    "in turn": lambda shape, step: torch.full(shape, 6e4 * (-1) ** step),
    "mixed": lambda shape, step: 6e4 * torch.randn(shape, generator=torch.Generator().manual_seed(step)).sign(),
    "one of them": lambda shape, step: F.pad(torch.tensor([6e4]), (0, shape.numel() - 1)).view(shape),
}


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("name", UPDATES)
def test_half_precision_gradients_near_the_largest_number_never_become_nan_or_inf(name, signs, nesterov):
    torch.manual_seed(0)
    shapes = [(4, 3), (3, 4), (6,), (), (2, 2, 3)]
    params = [nn.Parameter(torch.randn(shape).half()) for shape in shapes] + [nn.Parameter(torch.randn(4).half())]
    update = UPDATES[name](params, nesterov=nesterov, momentum=0.95)
    for step in range(8):
        if isinstance(update, mep.NaturalGradient):
            update.observe([Seen(params[0], params[-1]), Seen(params[1], None)])
        for p in params:
            p.grad = SIGNS[signs](p.shape, step).half()
        update.step()
        for p in params:
            assert p.isfinite().all(), f"{tuple(p.shape)}, step {step}"
            for key, value in update.state[p].items():
                assert not torch.is_tensor(value) or value.isfinite().all(), f"{key} of {tuple(p.shape)}, step {step}"


# The spectral bound says what it does

BOUNDING = {name: PRESETS[name] for name in ("smep", "smep_fast", "sdmep", "O1MemoryEPv2")}


def calm(preset):
    """Weights so large are steep: descent needs short steps."""
    return {"on_unsettled": "ignore", **({"settle_lr": 1e-3} if preset == "O1MemoryEPv2" else {})}


def messages(run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in said if "spectral_bound" in str(w.message)]


def stretched(factor, *names):
    model = quiet_net().float()
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.mul_(factor / torch.linalg.matrix_norm(weight, 2))
    return model


@pytest.mark.parametrize("preset", BOUNDING)
def test_the_first_weight_that_the_bound_changes_is_named_once(preset):
    model = stretched(12.0, "0.weight", "2.weight")
    opt = BOUNDING[preset](model.parameters(), model=model, gamma=2.0, **calm(preset))
    x, y = batch(dtype=torch.float32)
    (text,) = messages(lambda: opt.step(x=x, target=y))
    assert "`0.weight`" in text and "gamma=2" in text
    (sigma,) = re.findall(r"singular value of `0.weight` is ([\d.]+)", text)
    assert abs(float(sigma) - 12) < 0.5
    with torch.no_grad():
        model[0].weight.mul_(5)
    assert not messages(lambda: opt.step(x=x, target=y)), "a second time"
    assert not messages(lambda: copy.deepcopy(opt).step(x=x, target=y)), "a second time, by a copy"
    assert all(torch.linalg.matrix_norm(m.weight, 2) < 2.01 for m in (model[0], model[2]))


@pytest.mark.parametrize("preset", BOUNDING)
def test_nothing_is_said_while_the_bound_changes_nothing(preset):
    """Nor where a group stands still, nor of a weight that is changed by less than a hundredth."""
    x, y = batch(dtype=torch.float32)
    model = stretched(2.0, "0.weight", "2.weight")
    opt = BOUNDING[preset](model.parameters(), model=model)
    assert not messages(lambda: [opt.step(x=x, target=y) for _ in range(3)])
    model = stretched(12.0, "2.weight")
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    opt = BOUNDING[preset](groups, model=model, **calm(preset))
    assert not messages(lambda: opt.step(x=x, target=y))
    assert torch.linalg.matrix_norm(model[2].weight, 2) > 11.9


def test_a_change_of_less_than_a_hundredth_is_not_said_and_a_later_one_is():
    weight = nn.Parameter(torch.diag(torch.tensor([2.71, 2.0, 2.0])))
    opt = torch.optim.SGD([weight], lr=0.1)
    opt.register_step_post_hook(mep.spectral_bound(3.0))
    weight.grad = torch.zeros(3, 3)
    assert not messages(opt.step)
    torch.testing.assert_close(weight[0, 0].detach(), torch.tensor(2.7))
    with torch.no_grad():
        weight[0, 0] = 4.0
    (text,) = messages(opt.step)
    assert "(3, 3)" in text and "gamma=3" in text and " 4" in text


class Bag(nn.EmbeddingBag):
    """Of one token each."""

    def forward(self, x):
        return F.embedding(x, self.weight)


class MyEmbedding(nn.Embedding):
    """Of one's own."""


TABLES = {
    "an embedding": lambda: nn.Embedding(7, 6),
    "a bag": lambda: Bag(7, 6, mode="sum"),
    "an embedding of one's own": lambda: MyEmbedding(7, 6),
    "a sparse embedding": lambda: nn.Embedding(7, 6, sparse=True),
}


TABLED = [(preset, "an embedding") for preset in BOUNDING] + [("smep", table) for table in TABLES]


@pytest.mark.parametrize("preset,table", TABLED[:4] + TABLED[5:])
def test_embeddings_are_not_bounded(preset, table):
    """They stretch nothing; nor are those of a copy of the optimizer, or of one from a file."""
    model = Net(by_rows, a=TABLES[table]())
    with torch.no_grad():
        model.a.weight.mul_(100)
    start = model.a.weight.detach().clone()
    opt = BOUNDING[preset](model.parameters(), model=model, on_unsettled="ignore")
    twins = [opt, copy.deepcopy(opt), pickle.loads(pickle.dumps((model, opt)))[1]]
    for twin in twins:
        assert not messages(lambda twin=twin: twin.step(x=tokens(BATCH, 3), target=LABELS))
        assert (twin.model.a.weight - start).norm() < 1
        assert not torch.equal(twin.model.a.weight, start)


def by_rows(net, x):
    return net.c(net.a(x).flatten(1)[:, :6].tanh())


def test_an_embedding_that_is_added_later_is_not_bounded_either():
    torch.manual_seed(0)
    model = Net(by_rows, a=nn.Embedding(7, 6))
    opt = mep.smep(model.c.parameters(), model=model, on_unsettled="ignore")
    model.a = nn.Embedding(7, 6)
    with torch.no_grad():
        model.a.weight.mul_(100)
    start = model.a.weight.detach().clone()
    opt.add_param_group({"params": model.a.parameters()})
    opt.step(x=tokens(BATCH, 3), target=LABELS)
    assert (model.a.weight - start).norm() < 1


def test_a_property_in_the_place_of_a_slot_is_left_alone():
    """As mpmath's constants have: it makes a new object whenever it is read, and cannot be set."""

    class Slotted:
        __slots__ = ("value",)

    class Computed(Slotted):
        value = property(lambda self: [1.0])

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.constant = Computed()
    assert mep.EquilibriumPropagation(model)(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])).converged


SHARING = {
    "a sum of biases": lambda net, x: net.c(torch.tanh(net.a(x)) + (net.p + net.q)),
    "a difference of biases": lambda net, x: net.c(torch.tanh(net.a(x)) + (net.p - net.q)),
    "added to the output": lambda net, x: net.c(torch.tanh(net.a(x))) + net.p[:3] + net.q[:3],
    "a number added to each": lambda net, x: net.c(torch.tanh(net.a(x)) + net.p.sum() + net.q),
}


@pytest.mark.parametrize("estimator", [mep.EquilibriumPropagation, mep.Backprop])
@pytest.mark.parametrize("name", SHARING)
def test_every_gradient_has_memory_of_its_own(name, estimator):
    """Else gradients that are accumulated, or clipped, would be so twice."""
    model = Net(SHARING[name], p=nn.Parameter(torch.randn(6)), q=nn.Parameter(torch.randn(6))).double()
    ep, parameters = estimator(model), list(model.parameters())
    ep(*batch())
    once = {p: p.grad.clone() for p in parameters if p.grad is not None}
    ep(*batch())
    for p, g in once.items():
        torch.testing.assert_close(p.grad, 2 * g)
        p.grad.zero_()


@pytest.mark.parametrize("estimator", [mep.EquilibriumPropagation, mep.Backprop])
def test_inputs_that_require_a_gradient_are_warned_of_once(estimator):
    """An encoder in front of the model would not be trained."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    ep = estimator(head)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.warns(UserWarning, match="inputs of Sequential require a gradient") as said:
        ep(encoder(x), y)
    assert len([w for w in said if w.category is UserWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            ep(encoder(x), y)
    assert encoder.weight.grad is None and head[0].weight.grad is not None
