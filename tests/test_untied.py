"""Feedback weights of their own: states at rest in a vector field, and its learning rule, against slow oracles."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call

import mep


def tight():
    """A solver whose memory is its own."""
    return mep.Relaxation(tol=1e-12, settle_steps=2000, omega=1.0)


def dense():
    return nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(0, 1), nn.Linear(8, 6), nn.Hardtanh(0, 1), nn.Linear(6, 3))


def smooth():
    return nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutions():
    strided = nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Hardtanh(0, 1),
        nn.AvgPool2d(2),
        strided,
        nn.Hardtanh(0, 1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


SHAPES = {dense: (4,), smooth: (4,), convolutions: (2, 8, 8)}
WEIGHTED = (nn.Linear, nn.Conv2d)


def cost(out, y):
    return 0.5 * (out - y).square().sum(1)


def problem(make, batch=5, asymmetry=0.1):
    """A network with states inside and at the faces of their boxes, a batch, and feedback weights near the weights."""
    torch.manual_seed(0)
    model = make().double()
    x, y = torch.rand(batch, *SHAPES[make]).double(), torch.randn(batch, 3).double()
    names = [f"{name}.weight" for name, m in model.named_children() if isinstance(m, WEIGHTED)][1:]
    weights = {name: model.get_parameter(name) for name in names}
    feedback = {n: nn.Parameter((w + asymmetry * torch.randn_like(w)).detach()) for n, w in weights.items()}
    return model, x, y, feedback


def estimator(model, feedback, **options):
    options = {"cost": cost, "solver": tight(), "beta": 1e-3, "branches": "exact", **options}
    return mep.EquilibriumPropagation(model, energy="hopfield", feedback=feedback, **options)


class Field:
    """The pulls of a chain of layers, written out: `mu_n + B^T s_(n+1)`, messages by autograd through a copy with B."""

    def __init__(self, model, feedback):
        self.parameters = {n: p.detach() for n, p in model.named_parameters()}
        self.feedback = {n: b.detach() for n, b in feedback.items()}
        self.blocks, self.activations, block = [], [], []
        for name, module in model.named_children():
            if isinstance(module, (nn.Hardtanh, nn.Sigmoid, nn.Tanh)):
                self.blocks.append(block)
                self.activations.append(module)
                block = []
            else:
                block.append((name, module))
        self.blocks.append(block)
        self.activations.append(nn.Identity())

    def layer(self, i, h, weights):
        for name, module in self.blocks[i]:
            own = {n.partition(".")[2]: w for n, w in weights.items() if n.startswith(f"{name}.")}
            h = functional_call(module, own, (h,))
        return h

    def message(self, i, h, s, feedback):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            mu = self.layer(i, h, {**self.parameters, **feedback})
            return torch.autograd.grad(mu, h, s, create_graph=True)[0]

    def pulls(self, x, states, parameters, feedback):
        found = []
        for i in range(len(self.blocks)):
            pull = self.layer(i, x if i == 0 else states[i - 1], parameters)
            if i + 1 < len(self.blocks):
                pull = pull + self.message(i + 1, states[i], states[i + 1], feedback)
            found.append(pull)
        return found

    def rest(self, x, y, beta):
        """All layers at once, to where their pulls put them, until nothing moves."""
        states, h = [], x
        for i, f in enumerate(self.activations):
            h = f(self.layer(i, h, self.parameters))
            states.append(h.detach())
        before = [s + 1 for s in states]
        while max((a - b).abs().max() for a, b in zip(before, states, strict=True)) > 1e-15:
            pulls = [p.detach() for p in self.pulls(x, states, self.parameters, self.feedback)]
            pulls[-1] = pulls[-1] - beta * (states[-1] - y)
            before, states = states, [f(p) for f, p in zip(self.activations, pulls, strict=True)]
        return states


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("batch", [5, 1])
def test_rests_where_the_vector_field_vanishes_and_learns_by_its_rule(make, batch):
    model, x, y, feedback = problem(make, batch)
    beta, field = 1e-2, Field(model, feedback)
    free, nudged = field.rest(x, y, 0.0), field.rest(x, y, beta)
    ep = estimator(model, feedback, beta=beta)
    eq = ep.settle(x, y)
    assert eq.estimate.converged
    for found, s_free in zip(eq.free.states.values(), free, strict=True):
        torch.testing.assert_close(found, s_free, rtol=0, atol=1e-11)
    for found, s_beta in zip(eq.nudged.states.values(), nudged, strict=True):
        torch.testing.assert_close(found, s_beta, rtol=0, atol=1e-11)
    torch.testing.assert_close(ep.predict(x), free[-1], rtol=0, atol=1e-11)

    # W and b from the field of their own layer, -ds h^T; B from that of its parents, -s dh^T.
    found, _ = ep.gradients(x, y)
    move = [(a - b) / beta for a, b in zip(nudged, free, strict=True)]
    with torch.enable_grad():
        trained = {n: p.clone().requires_grad_() for n, p in field.parameters.items()}
        back = {n: b.clone().requires_grad_() for n, b in field.feedback.items()}
        forward = backward = 0.0
        for i, ds in enumerate(move):
            forward = forward - (field.layer(i, x if i == 0 else free[i - 1], trained) * ds).sum() / batch
            if i:
                dh = field.message(i, free[i - 1], nudged[i], back) * move[i - 1]
                backward = backward - dh.sum() / batch
        of_weights = torch.autograd.grad(forward, list(trained.values()))
        of_feedback = torch.autograd.grad(backward, list(back.values()))
    for (name, p), g in zip(model.named_parameters(), of_weights, strict=True):
        torch.testing.assert_close(found[p], g, rtol=0, atol=1e-9, msg=name)
    for name, g in zip(feedback, of_feedback, strict=True):
        torch.testing.assert_close(found[feedback[name]], g, rtol=0, atol=1e-9, msg=name)
        assert g.abs().max() > 1e-4
    assert len(found) == len(of_weights) + len(feedback)


@pytest.mark.parametrize(("phases", "beta", "tol"), [("centered", 1e-4, 1e-6), ("holomorphic", 0.01, 1e-5)])
def test_tends_to_the_rule_and_not_to_the_gradient(phases, beta, tol):
    """`-(dF/dtheta)^T J^-1 dC/ds`, J the Jacobian of the field F; the gradient has `J^-T`."""
    model, x, y, feedback = problem(dense, 1, asymmetry=0.2)
    field = Field(model, feedback)
    free = field.rest(x, y, 0.0)
    sizes, parameters = (
        [s.numel() for s in free],
        {**field.parameters, **{f"B{n}": b for n, b in field.feedback.items()}},
    )

    def vector_field(flat, parameters):
        states = [t.unsqueeze(0) for t in flat.split(sizes)]
        own = {n: p for n, p in parameters.items() if not n.startswith("B")}
        back = {n[1:]: p for n, p in parameters.items() if n.startswith("B")}
        h, found = [x, *states], []
        for i, name in enumerate(("0", "2", "4")):
            pull = h[i] @ own[f"{name}.weight"].T + own[f"{name}.bias"]
            if i < 2:
                pull = pull + h[i + 2] @ back[f"{2 * i + 2}.weight"]
                pull = pull.clamp(0, 1)
            found.append(pull - h[i + 1])
        return torch.cat(found, 1).flatten()

    flat = torch.cat(free, 1).flatten()
    assert vector_field(flat, parameters).abs().max() < 1e-13
    jacobian = torch.func.jacrev(vector_field)(flat, parameters)
    by_parameter = torch.func.jacrev(vector_field, 1)(flat, parameters)
    pull = torch.cat([torch.zeros(sum(sizes[:-1])).double(), (free[-1] - y).flatten()])
    rule, exact = (
        torch.cat([-(j.flatten(1).T @ torch.linalg.solve(m, pull)) for j in by_parameter.values()])
        for m in (jacobian, jacobian.T)
    )
    found, estimate = estimator(model, feedback, phases=phases, beta=beta, branches="held").gradients(x, y)
    assert estimate.converged and estimate.coupling is None
    tensors = [*model.parameters(), *feedback.values()]
    contrast = torch.cat([found[p].flatten() for p in tensors])
    torch.testing.assert_close(contrast, rule, rtol=0, atol=tol)
    assert (contrast - exact).norm() > 1e-2 * exact.norm()


EQUAL = [(make, phases) for phases in ("one-sided", "centered", "random-sign") for make in SHAPES]


@pytest.mark.parametrize(("make", "phases"), [*EQUAL, (dense, "holomorphic"), (convolutions, "holomorphic")])
def test_equal_weights_are_a_hopfield_network(make, phases):
    model, x, y, feedback = problem(make, asymmetry=0.0)
    options = {"phases": phases, "branches": "held"}
    torch.manual_seed(1)
    tied, _ = estimator(model, None, **options).gradients(x, y)
    torch.manual_seed(1)
    untied, _ = estimator(model, feedback, **options).gradients(x, y)
    same, _ = estimator(model, {n: model.get_parameter(n) for n in feedback}, **options).gradients(x, y)
    for name, p in model.named_parameters():
        both = untied[p] + untied[feedback[name]] if name in feedback else untied[p]
        torch.testing.assert_close(both, tied[p], rtol=0, atol=1e-11, msg=name)
        if phases != "random-sign":
            torch.testing.assert_close(same[p], tied[p], rtol=0, atol=1e-11, msg=name)


def test_one_layer_of_several_may_be_untied():
    model, x, y, feedback = problem(dense)
    ep = estimator(model, {"4.weight": feedback["4.weight"]})
    every = {"2.weight": model.get_parameter("2.weight"), "4.weight": feedback["4.weight"]}
    found, other = ep.gradients(x, y)[0], estimator(model, every).gradients(x, y)[0]
    for p in [*model.parameters(), feedback["4.weight"]]:
        torch.testing.assert_close(found[p], other[p], rtol=0, atol=1e-12)
    assert feedback["2.weight"] not in found


class Skip(nn.Module):
    """Two layers that read one state, one layer used twice, and a sum of two parents."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.one(x).clamp(0, 1)
        g = self.two(h).clamp(0, 1)
        return self.last(self.two(g + h).clamp(0, 1) + h)


def test_skips_and_a_layer_used_twice():
    torch.manual_seed(0)
    model, x, y = Skip().double(), torch.rand(5, 4).double(), torch.randn(5, 3).double()
    feedback = {n: nn.Parameter(0.5 * torch.randn_like(model.get_parameter(n))) for n in ("two.weight", "last.weight")}
    two, last = (b.detach() for b in feedback.values())
    a, b, c, d = (*torch.zeros(3, 5, 6).double().unbind(), torch.zeros(5, 3).double())
    with torch.no_grad():
        for _ in range(300):
            a, b, c, d = (
                (model.one(x) + b @ two + c @ two + d @ last).clamp(0, 1),
                (model.two(a) + c @ two).clamp(0, 1),
                (model.two(a + b) + d @ last).clamp(0, 1),
                model.last(c + a),
            )
    ep = estimator(model, feedback)
    torch.testing.assert_close(ep.predict(x), d, rtol=0, atol=1e-11)
    assert set(ep.gradients(x, y)[0]) == {*model.parameters(), *feedback.values()}


def test_frozen_weights_and_fixed_feedback_have_no_gradient():
    model, x, y, feedback = problem(dense)
    every, _ = estimator(model, feedback).gradients(x, y)
    model[2].weight.requires_grad_(False)
    fixed = {"2.weight": feedback["2.weight"], "4.weight": feedback["4.weight"].detach()}
    found, _ = estimator(model, fixed).gradients(x, y)
    assert set(found) == {*model.parameters(), feedback["2.weight"]} - {model[2].weight}
    for p, g in found.items():
        torch.testing.assert_close(g, every[p], rtol=0, atol=1e-12)


def test_feedback_is_read_anew_and_low_memory_steps_are_the_same():
    model, x, y, feedback = problem(dense)
    ep = estimator(model, feedback)
    before = ep.gradients(x, y)[0]
    pieces = {p: g for piece in ep.iter_gradients(x, y)[0] for p, g in piece.items()}
    assert pieces.keys() == before.keys()
    for p, g in before.items():
        torch.testing.assert_close(pieces[p], g, rtol=0, atol=1e-11)
    with torch.no_grad():
        feedback["2.weight"].add_(0.1)
    changed = ep.gradients(x, y)[0]
    new, _ = estimator(model, feedback).gradients(x, y)
    assert not torch.allclose(changed[model[0].weight], before[model[0].weight])
    torch.testing.assert_close(changed[model[0].weight], new[model[0].weight], rtol=0, atol=1e-12)
    for p in model.parameters():
        p.grad = None
    ep(x, y)
    assert feedback["2.weight"].grad is not None


@pytest.mark.parametrize("seed", range(3))
def test_opposite_feedback_settles_under_relaxed(seed):
    """The coupling has imaginary eigenvalues i m; the best omega for these, `2 / (1 + sqrt(1 + m^2))`, is below 1."""
    torch.manual_seed(seed)
    model, x, y = dense(), torch.rand(5, 4), torch.randn(5, 3)
    feedback = {n: -3 * model.get_parameter(n).detach() for n in ("2.weight", "4.weight")}
    settled = [
        estimator(model, feedback, solver=mep.Relaxation(omega=omega), on_unsettled="ignore")
        .gradients(x, y)[1]
        .converged
        for omega in (None, 0.7)
    ]
    assert settled == [False, True]


def test_there_is_no_energy_to_look_at():
    model, x, y, feedback = problem(dense)
    eq = estimator(model, feedback).settle(x, y, record=True)
    for phase in (eq.free, eq.nudged):
        assert all(e.shape == (5,) and e.isnan().all() for e in phase.energies.values())
        assert all((r < 1e-11).all() for r in phase.residuals.values())
    assert "nan" in str(eq) and eq.nudged.course


def test_copies_have_weights_of_their_own():
    model, x, y, feedback = problem(dense)
    ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield", solver=tight(), beta=1e-3, feedback=feedback)
    found, _ = ep.gradients(x, y)
    buffer = io.BytesIO()
    torch.save(ep, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ep), torch.load(buffer, weights_only=False)):
        for name, b in twin.feedback.items():
            assert b is not feedback[name]
            torch.testing.assert_close(twin.gradients(x, y)[0][b], found[feedback[name]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_trained", [False, True])
def test_random_feedback_trains_all_layers(is_trained):
    """Feedback alignment: the output layer turns toward B, and layers behind which it stands learn."""
    losses = []
    for hidden_learns in (True, False):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(20, 64), nn.Hardtanh(0, 1), nn.Linear(64, 5))
        net[0].requires_grad_(hidden_learns)
        b = nn.Parameter(0.1 * torch.randn(5, 64), requires_grad=is_trained)
        ep = mep.EquilibriumPropagation(
            net, "one_hot_mse", energy="hopfield", feedback={"2.weight": b}, on_unsettled="raise"
        )
        own = [p for p in (*net.parameters(), b) if p.requires_grad]
        opt = mep.EPOptimizer(ep, torch.optim.SGD(own, lr=0.1))
        y = torch.arange(200) % 5
        x = torch.randn(5, 20)[y] + 0.3 * torch.randn(200, 20)
        start, aligned = b.detach().clone(), torch.cosine_similarity(net[2].weight.detach(), b.detach(), -1).mean()
        for _ in range(100):
            loss = opt.step(x=x, target=y)
        losses.append(float(loss))
        assert torch.equal(b, start) is not is_trained
        if hidden_learns:
            assert opt.predict(x).argmax(1).eq(y).float().mean() > 0.9
            assert torch.cosine_similarity(net[2].weight.detach(), b.detach(), -1).mean() > aligned + 0.1
    assert losses[0] < 0.7 * losses[1]


def test_what_does_not_go_with_it_is_refused():
    model, x, y, feedback = problem(dense)
    b = feedback["2.weight"]

    def refuses(match, given=feedback, net=model, **options):
        with pytest.raises(mep.errors.ArgumentError, match=match):
            estimator(net, given, **options).gradients(x, y)

    refuses("nothing is sent back", {"0.weight": model[0].weight})
    refuses("not the weight of", {"2.bias": model[2].bias})
    refuses("must be one of", {"3.weight": b})
    refuses("must be like the weight", {"4.weight": b})
    refuses("must be like the weight", {"2.weight": b.detach().float()})
    refuses("without requires_grad", {"2.weight": b.detach().requires_grad_()})
    refuses("must be a mapping", {})
    refuses("must be a mapping", [b])
    refuses("no energy to descend", solver=mep.Descent(10, 0.1))
    refuses("leave out one", compile=True, branches="held", cost="mse")
    refuses("leave out one", observe=print)
    refuses("Leave out one", checkpoint=True, branches="held")
    with pytest.raises(mep.errors.ArgumentError, match="energy='prediction'"):
        mep.EquilibriumPropagation(model, feedback=feedback)
    with pytest.raises(mep.errors.ArgumentError, match="relax"):
        estimator(model, feedback).relax(clamp={"output": y}, box=(0, 1))
    with pytest.raises(TypeError, match="feedback"):
        mep.eqprop(model.parameters(), model=model, energy="hopfield", feedback=feedback)


def test_trained_feedback_belongs_in_the_optimizer():
    model, x, y, feedback = problem(dense)
    feedback["2.weight"].requires_grad_(False)
    ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield", feedback=feedback)
    with pytest.raises(mep.errors.ParameterError, match=r"for 4.weight are not in the optimizer"):
        mep.EPOptimizer(ep, torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [{"params": list(model.parameters())}, {"params": [feedback["4.weight"]]}]
    opt = mep.EPOptimizer(ep, torch.optim.SGD(groups, lr=0.1))
    before = feedback["4.weight"].detach().clone()
    opt.step(x=x, target=y)
    assert not torch.equal(feedback["4.weight"], before)
    twin = copy.deepcopy(opt)
    twin.step(x=x, target=y)
    assert any(p is twin.estimator.feedback["4.weight"] for p in twin.param_groups[1]["params"])


class Gated(Skip):
    def forward(self, x):
        h = self.one(x).clamp(0, 1)
        g = self.two(h).clamp(0, 1)
        return self.last(h * g)


def test_jacobians_that_change_are_refused():
    model = Gated().double()
    x, y = torch.rand(5, 4).double(), torch.randn(5, 3).double()
    b = {"two.weight": torch.zeros(6, 6).double()}
    with pytest.raises(mep.errors.ArgumentError, match="Jacobians of Gated change"):
        estimator(model, b).gradients(x, y)
    with pytest.raises(mep.errors.ArgumentError, match=r"last.weight.*no linear layer"):
        estimator(model, {"last.weight": model.last.weight}).gradients(x, y)
