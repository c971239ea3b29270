"""Every public name, once: type checkers read this file, and `import mep` loads each name from it on first use."""

from .constraints import spectral_bound
from .errors import (
    ArgumentError,
    DataError,
    DivergedError,
    InputError,
    MepError,
    ParameterError,
    TraceError,
)
from .estimators import Backprop, EquilibriumPropagation, Estimate
from .optimizer import EPOptimizer
from .presets import eqprop, muon_backprop, smep, smep_fast
from .settle import Result, Solver
from .solvers import Descent, Sweep
from .tracing import trace
from .updates import Muon, orthogonalise

__version__: str

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
