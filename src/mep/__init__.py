"""`mep` trains neural networks by equilibrium propagation, without backpropagating through the network.

opt = mep.smep(model.parameters(), model=model)
loss = opt.step(x=x, target=y)
opt.last                                       # residual, sweeps, beta, converged or why not
"""

from mep.constraints import spectral_bound
from mep.errors import (
    ArgumentError,
    DataError,
    DivergedError,
    InputError,
    MepError,
    ParameterError,
    TraceError,
)
from mep.estimators import Backprop, EquilibriumPropagation, Estimate
from mep.optimizer import EPOptimizer
from mep.presets import eqprop, muon_backprop, smep, smep_fast
from mep.settle import Result, Solver
from mep.solvers import Descent, Sweep
from mep.tracing import trace
from mep.updates import Muon, orthogonalise

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Backprop",
    "DataError",
    "Descent",
    "DivergedError",
    "EPOptimizer",
    "EquilibriumPropagation",
    "Estimate",
    "InputError",
    "MepError",
    "Muon",
    "ParameterError",
    "Result",
    "Solver",
    "Sweep",
    "TraceError",
    "eqprop",
    "muon_backprop",
    "orthogonalise",
    "smep",
    "smep_fast",
    "spectral_bound",
    "trace",
]
