"""Updates: `torch.optim.Optimizer` classes that read `p.grad` and use no energy, and a bound on the weights."""

from mep.updates.constraints import spectral_bound
from mep.updates.dion import Dion
from mep.updates.muon import Muon
from mep.updates.natural import NaturalGradient
from mep.updates.orthogonal import METHODS, orthogonalise

__all__ = ["METHODS", "Dion", "Muon", "NaturalGradient", "orthogonalise", "spectral_bound"]
