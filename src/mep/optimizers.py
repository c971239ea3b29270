"""An import path of earlier code: `from mep.optimizers import O1MemoryEPv2`. See `mep.presets` for what it does."""

from mep.presets import O1MemoryEPv2

__all__ = ["O1MemoryEPv2"]
