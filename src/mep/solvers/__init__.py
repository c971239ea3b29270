"""Solvers: one algorithm a file."""

from mep.solvers.descent import Descent
from mep.solvers.sweep import Sweep

__all__ = ["Descent", "Sweep"]
