"""Every public name, once: type checkers read this file, and `import mep` loads each name from it on first use."""

from .capture import trace
from .cost import BatchCost
from .energy import GroupEnergy, NodeEnergy
from .errors import (
    ArgumentError,
    DataError,
    DivergedError,
    InputError,
    MepError,
    NotConvergedError,
    NotConvergedWarning,
    ParameterError,
    TraceError,
)
from .estimators import Backprop, Equilibrium, EquilibriumPropagation, Estimate, FreeEquilibrium
from .optimizer import EPOptimizer
from .presets import O1MemoryEPv2, eqprop, local_ep, muon_backprop, natural_ep, sdmep, smep, smep_fast
from .settle import Iterate, Result, Solver, Start
from .solvers import Descent, Local, Relaxation, Sweep
from .updates import Dion, Muon, NaturalGradient, orthogonalise, spectral_bound
from .verification import verify

__version__: str

__all__ = [
    "ArgumentError",
    "Backprop",
    "BatchCost",
    "DataError",
    "Descent",
    "Dion",
    "DivergedError",
    "EPOptimizer",
    "Equilibrium",
    "EquilibriumPropagation",
    "Estimate",
    "FreeEquilibrium",
    "GroupEnergy",
    "InputError",
    "Iterate",
    "Local",
    "MepError",
    "Muon",
    "NaturalGradient",
    "NodeEnergy",
    "NotConvergedError",
    "NotConvergedWarning",
    "O1MemoryEPv2",
    "ParameterError",
    "Relaxation",
    "Result",
    "Solver",
    "Start",
    "Sweep",
    "TraceError",
    "eqprop",
    "local_ep",
    "muon_backprop",
    "natural_ep",
    "orthogonalise",
    "sdmep",
    "smep",
    "smep_fast",
    "spectral_bound",
    "trace",
    "verify",
]
