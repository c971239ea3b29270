"""Solvers: one algorithm a file."""

from mep.solvers.descent import Descent
from mep.solvers.local import Local
from mep.solvers.relaxation import Relaxation
from mep.solvers.sweep import Sweep

__all__ = ["Descent", "Local", "Relaxation", "Sweep"]
