"""Proof on a batch that a model trains correctly by equilibrium propagation, or where it does not."""

from mep.verification.report import Report
from mep.verification.verifying import verify

__all__ = ["Report", "verify"]
