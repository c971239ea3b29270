"""Estimators fill `p.grad` from a batch, the way `loss.backward()` does."""

from mep.estimators.backprop import Backprop
from mep.estimators.clamping import FreeEquilibrium
from mep.estimators.equilibrium import EquilibriumPropagation
from mep.estimators.estimate import Estimate
from mep.estimators.view import Equilibrium

__all__ = ["Backprop", "Equilibrium", "EquilibriumPropagation", "Estimate", "FreeEquilibrium"]
