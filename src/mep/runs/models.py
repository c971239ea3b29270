"""Models by name, see `NAMED`, or by the import path of a factory of yours, `package.module:factory`.

A factory is called with `input_shape=` ([channels, height, width]) and `classes=`, each only if it has a
parameter of that name, and returns a module that maps [batch, *input_shape] to [batch, classes].
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep.errors import ArgumentError
from mep.runs.data import DataSet


def mlp(input_shape: tuple[int, ...], classes: int, widths: Sequence[int] = (128, 64), he: bool = False) -> nn.Module:
    """The multilayer perceptron of the benchmarks, 784-128-64-10 for 28 x 28 digits.

    he: weights that keep the size of a signal through ReLUs (He et al. 2015, arXiv:1502.01852). Without it a network of
    many layers cannot be trained: torch's own start shrinks the signal at every one of them.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    before = math.prod(input_shape)
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    layers.append(nn.Linear(before, classes))
    for layer in layers if he else ():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


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


class PreNorm(nn.Module):
    """`x + inner(norm(x))`, over the last dimension, of size `width`."""

    def __init__(self, width: int, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), inner

    def forward(self, x: Tensor) -> Tensor:
        """[..., width]."""
        return x + self.inner(self.norm(x))


class Attention(nn.Module):
    """Self-attention with several heads, `width` a multiple of their number."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        split = (self.heads, -1)
        parts = (part(x).unflatten(-1, split).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Patches(nn.Module):
    """A picture as `side * side` tokens: a linear map of its patches, and a learned vector for each place."""

    def __init__(self, channels: int, width: int, size: tuple[int, int], side: int = 8):
        super().__init__()
        patch = (-(-size[0] // side), -(-size[1] // side))
        padding = ((side * patch[0] - size[0] + 1) // 2, (side * patch[1] - size[1] + 1) // 2)
        self.patch = nn.Conv2d(channels, width, patch, stride=patch, padding=padding)
        self.place = nn.Parameter(0.02 * torch.randn(side * side, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, tokens, features]."""
        return self.patch(x).flatten(2).transpose(1, 2) + self.place


class Mean(nn.Module):
    """The mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> [batch, width]."""
        return x.mean(1)


def residual(input_shape: tuple[int, ...], classes: int, width: int = 128, blocks: int = 24) -> nn.Module:
    """A residual multilayer perceptron, two layers a block."""
    inner = (nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks))
    stem = nn.Flatten(), nn.Linear(math.prod(input_shape), width)
    return nn.Sequential(*stem, *(PreNorm(width, f) for f in inner), nn.LayerNorm(width), nn.Linear(width, classes))


def transformer(
    input_shape: tuple[int, ...], classes: int, width: int = 64, heads: int = 4, blocks: int = 4
) -> nn.Module:
    """A pre-norm transformer on the 8 x 8 patches of a picture, 64 tokens, as in Dosovitskiy et al. 2020."""
    channels, height, across = input_shape
    layers: list[nn.Module] = [Patches(channels, width, (height, across))]
    for _ in range(blocks):
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        layers += [PreNorm(width, Attention(width, heads)), PreNorm(width, mlp)]
    return nn.Sequential(*layers, nn.LayerNorm(width), Mean(), nn.Linear(width, classes))


NAMED: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "mlp256": partial(mlp, widths=(256, 256)),
    "mlp512": partial(mlp, widths=(512, 256)),
    "mlp1024": partial(mlp, widths=3 * (1024,)),
    "mlp20": partial(mlp, widths=20 * (128,), he=True),
    "cnn": cnn,
    "residual": residual,
    "transformer": transformer,
}


def build(name: str, data: DataSet) -> nn.Module:
    """The model called `name` for this data, freshly initialised from torch's random state."""
    factory = NAMED[name] if name in NAMED else _imported(name)
    offered = {"input_shape": tuple(data.train_x.shape[1:]), "classes": data.classes}
    signature = inspect.signature(factory)
    given = {key: value for key, value in offered.items() if key in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ArgumentError(
            f"--model {name}: {error}. A factory is called with input_shape= and classes=, each if it has a parameter "
            "of that name, and with nothing else."
        ) from error
    model = factory(**given)
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
