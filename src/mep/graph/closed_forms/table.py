"""The table of closed forms: which ATen operation becomes which operation of a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mep.graph.closed_forms.layers import (
    AdaptiveAveragePool,
    AveragePool,
    Convolution,
    Key,
    LayerNorm,
    LayerOp,
    Linear,
    Mean,
    Pointwise,
    Pool,
    Reshape,
    WeightedOp,
)
from mep.graph.ops import Op, Ref, Slot


def layer_op_of(op: Op, key: Key) -> LayerOp | None:
    """The closed form of an operation on one value, or None; `key` is that of its branch."""
    if op.activation:  # of complex numbers, abs is not piecewise linear: `AutogradNode` sees what it gets
        return None if op.activation.name == "abs" else Pointwise(op.activation, key)
    if op.pool:
        return Pool(op.pool, key)
    make = TABLE.get(op.label)
    arguments = (*op.args, *op.kwargs.values())
    try:
        return make(*arguments) if make and not (op.kwargs and op.label in _POSITIONAL) else None
    except (TypeError, AttributeError):  # arguments that this closed form does not have
        return None


def weighted_op(op: Op) -> WeightedOp | None:
    """The linear layer or convolution with a parameter as its weight that an operation is, or None."""
    layer = layer_op_of(op, ("", "")) if op.label in _WEIGHTED else None
    return layer if isinstance(layer, WeightedOp) and layer.parameters[0] is not None else None


def _linear(h: Any, weight: Any, bias: Any = None) -> LayerOp | None:
    return Linear(h.name, weight, bias) if _fits(h, weight, bias) else None


def _matmul(h: Any, weight: Any) -> LayerOp | None:
    return Linear(h.name, weight, None, transposed=True) if _fits(h, weight, None) else None


def _addmm(bias: Any, h: Any, weight: Any) -> LayerOp | None:
    return Linear(h.name, weight, bias, transposed=True) if _fits(h, weight, bias) else None


def _convolution(
    h: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> LayerOp | None:
    if not _fits(h, weight, bias, None) or isinstance(padding, str):
        return None
    return Convolution(h.name, weight, bias, stride, padding, dilation, groups)


def _layer_norm(
    h: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: Any = None
) -> LayerOp | None:
    plain = isinstance(h, Ref) and all(isinstance(w, (Slot, type(None))) for w in (weight, bias))
    return LayerNorm(shape, weight, bias, eps) if plain else None


def _mean(h: Any, dims: Any = None, keepdim: bool = False) -> LayerOp | None:
    plain = dims and all(isinstance(d, int) and d < 0 for d in dims)
    return Mean(dims, keepdim) if plain else None


def _reshape(h: Any, sizes: Any) -> LayerOp | None:
    return Reshape(sizes) if sizes and all(isinstance(s, int) for s in sizes) and sizes[0] == -1 else None


def _average_pool(h: Any, *arguments: Any) -> LayerOp:
    return AveragePool(*arguments)


def _adaptive_average_pool(h: Any, size: Any) -> LayerOp:
    return AdaptiveAveragePool(size)


def _fits(h: Any, weight: Any, bias: Any, rank: int | None = 2) -> bool:
    """Whether a value meets a tensor of the model that is a matrix (of any rank if None), and a bias of it or none."""
    plain = isinstance(h, Ref) and isinstance(weight, Slot) and isinstance(bias, (Slot, type(None)))
    return plain and rank in (None, weight.value.ndim) and (bias is None or bias.value.ndim == 1)


_WEIGHTED = ("linear", "matmul", "mm", "addmm", "conv1d", "conv2d", "conv3d")
_POSITIONAL = ("addmm", "mean", "avg_pool2d")
"""Operations whose keywords mean something else than the next arguments."""
TABLE: dict[str, Callable[..., LayerOp | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "layer_norm": _layer_norm,
    "mean": _mean,
    "reshape": _reshape,
    "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_average_pool,
}
"""By the name of the operation; activations and max pooling have tables of their own."""
