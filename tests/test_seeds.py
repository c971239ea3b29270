"""The calls that the first documents of `mep` print, letter for letter: each trains on real digits as it says."""

import ast
from functools import cache

import pytest
import torch
from torch import nn

import mep
from mep.runs.data import load

DEFAULT_AND_OPTIMIZED = """
# Default (13x slower)
optimizer = smep(model.parameters(), model=model, settle_steps=30)

# Optimized (4-6x slower)
optimizer = smep(model.parameters(), model=model, settle_steps=10, settle_lr=0.2)

# Or use preset
from mep import smep_fast
optimizer = smep_fast(model.parameters(), model=model)
"""

ANALYTIC_GRADIENTS = """
from mep.optimizers import O1MemoryEPv2
optimizer = O1MemoryEPv2(model.parameters(), model=model, settle_steps=10)
"""

ADAPTIVE = """
# Stop when energy converges (not yet implemented)
optimizer = smep(..., adaptive=True, tol=1e-4, patience=5)
"""

SMEP_FAST = """
from mep import smep_fast

optimizer = smep_fast(
    model.parameters(),
    model=model,
    lr=0.01,
    settle_steps=10,  # vs 30 default
    settle_lr=0.2,    # vs 0.15 default
)
"""

RESEARCH = """
from mep import smep
optimizer = smep(model.parameters(), model=model, settle_steps=30)
"""

PROTOTYPING = """
from mep import smep_fast
optimizer = smep_fast(model.parameters(), model=model)
"""

PRODUCTION = """
from mep.optimizers import O1MemoryEPv2
optimizer = O1MemoryEPv2(model.parameters(), model=model, settle_steps=15)
"""

# The solver of every optimizer that a block builds. Without `settle_lr` sweeps run until `tol`; with it, descent makes
# all its steps and says how far it came.
BLOCKS = {
    "default and optimized": (
        DEFAULT_AND_OPTIMIZED,
        [mep.Sweep(30), mep.Descent(10, settle_lr=0.2), mep.Sweep(10, tol=1e-1)],
    ),
    "analytic gradients": (ANALYTIC_GRADIENTS, [mep.Descent(10, settle_lr=0.15)]),
    "adaptive": (ADAPTIVE, [mep.Sweep(100, tol=1e-4, patience=5)]),
    "smep_fast": (SMEP_FAST, [mep.Descent(10, settle_lr=0.2, tol=1e-1)]),
    "research": (RESEARCH, [mep.Sweep(30)]),
    "prototyping": (PROTOTYPING, [mep.Sweep(10, tol=1e-1)]),
    "production": (PRODUCTION, [mep.Descent(15, settle_lr=0.15)]),
}
CALLS = [(name, place) for name, (_, solvers) in BLOCKS.items() for place in range(len(solvers))]

# For every argument that the blocks give, a value that must train differently.
OTHER = {"settle_steps": 1, "settle_lr": 0.1, "lr": 0.02, "adaptive": False, "tol": 1e-1, "patience": 1}
PLACEHOLDER = "model.parameters(), model=model"  # what stands for `...`


class OtherValue(ast.NodeTransformer):
    """Gives one argument another value."""

    def __init__(self, keyword):
        self.keyword, self.found = keyword, 0

    def visit_keyword(self, node):
        if node.arg == self.keyword:
            self.found += 1
            node.value = ast.copy_location(ast.Constant(OTHER[node.arg]), node.value)
        return node


def calls(block):
    """The statements of a block, and those among them that build an optimizer."""
    statements = ast.parse(block.replace("...", PLACEHOLDER)).body
    return statements, [s for s in statements if isinstance(s, ast.Assign)]


def keywords(call):
    return [k.arg for k in call.value.keywords if k.arg != "model"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def built(block, place, model, keyword=None):
    """The optimizer that the block builds at this place, after running all that stands before it."""
    statements, made = calls(block)
    if keyword:
        change = OtherValue(keyword)
        change.visit(made[place])
        assert change.found == 1
    names = {"model": model, "smep": mep.smep}
    last = statements.index(made[place])
    exec(compile(ast.Module(statements[: last + 1], []), "seeds", "exec"), names)
    return names["optimizer"]


@cache
def digits():
    data = load("digits")
    return list(zip(data.train_x.split(32), data.train_y.split(32), strict=True))


def train(optimizer, batches):
    estimates = []
    for x, y in batches:
        optimizer.step(x=x, target=y)
        estimates.append(optimizer.last)
    return estimates


@pytest.mark.parametrize("name,place", CALLS)
def test_block_trains_and_says_how_well_it_settled(name, place):
    block, solvers = BLOCKS[name]
    model = network()
    optimizer = built(block, place, model)
    solver = solvers[place]
    assert optimizer.estimator.solver == solver
    estimates = train(optimizer, digits())
    losses = torch.stack([estimate.loss for estimate in estimates])
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    for estimate, (x, _) in zip(estimates, digits(), strict=True):
        assert estimate.residual.shape == (len(x),) and estimate.residual.isfinite().all()
        if solver.adaptive:
            assert estimate.converged and estimate.residual.max() <= solver.tol
            assert estimate.iterations >= solver.patience
        else:
            assert estimate.iterations == solver.settle_steps and estimate.residual.max() > 0


@pytest.mark.parametrize(
    "name,place,keyword", [(n, i, k) for n, i in CALLS for k in keywords(calls(BLOCKS[n][0])[1][i])]
)
def test_every_argument_does_something(name, place, keyword):
    def trained(changed):
        model = network()
        optimizer = built(BLOCKS[name][0], place, model, changed)
        if isinstance(optimizer.estimator.solver, mep.Sweep):
            optimizer.estimator.beta = 0.5  # else one sweep is enough
        estimates = train(optimizer, digits()[:4])
        return [*model.parameters(), *(torch.tensor([e.iterations, e.beta]) for e in estimates)]

    as_printed = trained(None)
    if keyword == "adaptive":
        with pytest.raises(mep.ArgumentError, match="patience=5 does something only with adaptive=True"):
            trained(keyword)
        return
    otherwise = trained(keyword)
    assert any(not torch.equal(a, b) for a, b in zip(as_printed, otherwise, strict=True))


def test_the_whole_block_runs():
    for block, solvers in BLOCKS.values():
        names = {"model": network(), "smep": mep.smep}
        exec(block.replace("...", PLACEHOLDER), names)
        assert names["optimizer"].estimator.solver == solvers[-1]
