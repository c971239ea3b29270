"""Updates: `torch.optim.Optimizer` classes that see `p.grad` and know no energy."""

from mep.updates.dion import Dion
from mep.updates.muon import Muon
from mep.updates.natural import NaturalGradient
from mep.updates.orthogonal import METHODS, orthogonalise

__all__ = ["METHODS", "Dion", "Muon", "NaturalGradient", "orthogonalise"]
