"""Models by name: `mlp`, `mlp256` (wider), `cnn`, or the import path of a factory of yours, `package.module:factory`.

A factory is called with `input_shape=` ([channels, height, width]) and `classes=`, each only if it has a
parameter of that name, and returns a module that maps [batch, *input_shape] to [batch, classes].
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from functools import partial

from torch import nn

from mep.data import DataSet
from mep.errors import ArgumentError


def mlp(input_shape: tuple[int, ...], classes: int, widths: tuple[int, int] = (128, 64)) -> nn.Module:
    """The multilayer perceptron of the benchmarks, 784-128-64-10 for 28 x 28 digits."""
    first, second = widths
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, classes),
    )


def cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions, each followed by a max pool that halves the picture, and a linear readout."""
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), classes),
    )


NAMED: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "mlp256": partial(mlp, widths=(256, 256)), "cnn": cnn}


def build(name: str, data: DataSet) -> nn.Module:
    """The model called `name` for this data, freshly initialised from torch's random state."""
    factory = NAMED[name] if name in NAMED else _imported(name)
    offered = {"input_shape": tuple(data.train_x.shape[1:]), "classes": data.classes}
    wanted = inspect.signature(factory).parameters
    model = factory(**{key: value for key, value in offered.items() if key in wanted})
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"--model {name} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def _imported(path: str) -> Callable[..., nn.Module]:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        names = ", ".join(NAMED)
        raise ArgumentError(f"Unknown --model {path!r}. Named models: {names}; your own: package.module:factory.")
    if "" not in sys.path:  # the installed command, unlike `python -m mep`, does not look in the current directory
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"Cannot load --model {path}: {error}. Run from the folder that holds `{module_name}`, or install it."
        ) from error
    if not callable(factory):
        raise ArgumentError(f"--model {path} is a {type(factory).__name__}; it must be callable and return a module.")
    return factory
