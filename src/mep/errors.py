"""Every error that `mep` raises on purpose: what was asked, why it cannot be, what to do."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast


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


class NotConvergedError(MepError, RuntimeError):
    """Some example did not settle (`on_unsettled="raise"`); nothing was written."""


class RemovedArgumentError(ArgumentError, TypeError):
    """An argument of an earlier version; the message has the new way."""


class UnknownArgumentError(ArgumentError, TypeError):
    """A keyword that a preset does not have."""


class NotConvergedWarning(UserWarning):
    """Some example did not settle (`on_unsettled="warn"`); its estimate was used."""


def require(call: str, name: str, value: Any, holds: Callable[[Any], bool], what: str) -> None:
    """Raise an ArgumentError unless `holds(value)`; a value of another type, with which that fails, does not hold.

    Example:
        >>> require("draw", "size", "3", lambda size: size > 0, "a positive number")
        Traceback (most recent call last):
            ...
        mep.errors.ArgumentError: draw(size='3'): must be a positive number.
    """
    try:
        is_right = bool(holds(value))
    except (TypeError, ValueError, RuntimeError):
        is_right = False
    if not is_right:
        raise ArgumentError(f"{call}({name}={value!r}): must be {what}.")


def one_of(choices: Iterable[str]) -> tuple[Callable[[Any], bool], str]:
    """That a value is one of these, as the last two arguments of `require`."""
    listed = list(choices)
    return lambda value: value in listed, "one of " + ", ".join(map(repr, listed))


A_FLAG = (lambda value: isinstance(value, bool), "True or False")
"""The last two arguments of `require` for what is switched on or off."""


def whole_number(least: int) -> tuple[Callable[[Any], bool], str]:
    """That a value is a whole number, as the last two arguments of `require`."""
    return (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"a whole number of at least {least}",
    )


def warn(message: str, category: type[Warning]) -> None:
    """A warning at the line of the caller's own code that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mep", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


_Call = TypeVar("_Call", bound=Callable[..., Any])


def removed_arguments(**new_ways: str) -> Callable[[_Call], _Call]:
    """A decorator of functions and classes: the arguments named here raise, with the new way as the message.

    Example:
        >>> @removed_arguments(size="Pass width and height.")
        ... def draw(width): ...
        >>> draw(size=3)
        Traceback (most recent call last):
            ...
        mep.errors.RemovedArgumentError: draw(size=...) is gone. Pass width and height.
    """

    def decorate(call: _Call) -> _Call:
        plain: Any = call.__init__ if isinstance(call, type) else call  # type: ignore[misc]

        @functools.wraps(plain)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in new_ways.keys() & kwargs.keys():
                raise RemovedArgumentError(f"{call.__name__}({name}=...) is gone. {new_ways[name]}")
            return plain(*args, **kwargs)

        if not isinstance(call, type):
            return cast(_Call, checked)
        call.__init__ = checked  # type: ignore[misc]
        return call

    return decorate
