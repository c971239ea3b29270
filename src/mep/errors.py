"""Every error that `mep` raises on purpose: what was asked, why it cannot be, what to do."""


class MepError(Exception):
    """The base of all of them: `except MepError` catches what this library refuses, and nothing else."""


class ArgumentError(MepError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class TraceError(MepError, ValueError):
    """The model cannot be represented as a graph of nodes."""


class ParameterError(MepError, ValueError):
    """The optimizer and the model do not agree on the parameters."""


class InputError(MepError, ValueError):
    """A batch is empty, not finite, or its target does not fit the output."""


class DivergedError(MepError, ArithmeticError):
    """Settling ran away, or numbers are not finite; nothing was written."""


class DataError(MepError, ValueError):
    """A data set is missing, incomplete or corrupt."""
