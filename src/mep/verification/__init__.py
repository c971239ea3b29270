"""Proof on a batch that a model trains correctly by equilibrium propagation, or where it does not."""

from mep.verification.branches import Branching, compare_branches
from mep.verification.report import Report
from mep.verification.verifying import verify

__all__ = ["Branching", "Report", "compare_branches", "verify"]
