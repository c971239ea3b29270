"""Operations on complex numbers, in one table keyed by the name of the ATen operation.

Holomorphic equilibrium propagation evaluates a model at complex states: every operation is continued from the real
numbers to complex ones as a holomorphic function, so with `z^2` and never `|z|^2`. torch has this for most operations
(None in the table). The others are written out here: those that are linear with real coefficients are applied to the
real and the imaginary part. What is in neither case has no complex form, such as a comparison.

Piecewise-linear operations stand on the branch of the free equilibrium, where they are linear: `mep.graph.ops.Program`
needs nothing else for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mep.cost import complex_logsumexp, complex_softmax
from mep.graph.closed_forms.activations import Activation
from mep.graph.closed_forms.maxima import MaxPool
from mep.graph.ops import Op, Program, Ref, leaves_of

Target = Callable[..., Any]

FARTHEST = 2.0
"""The largest imaginary part of an argument of `erf`: beyond it the series loses digits, and the result is NaN."""


class _Erf(torch.autograd.Function):
    """The error function of complex numbers, by Taylor's series about the real part.

        erf(x + iy) = erf(x) + 2 / sqrt(pi) e^(-x^2) sum_(n>0) (iy)^n / n! (-1)^(n-1) H_(n-1)(x)

    H are Hermite's polynomials (DLMF 7.10.1, https://dlmf.nist.gov/7.10). The terms, without the powers of i, are
    `t_1 = y`, and `t_(n+1) = -2 x y / (n+1) t_n - 2 (n-1) y^2 / (n (n+1)) t_(n-1)`. Rounding errors are at most
    e^(2 y^2) times those of one operation.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        x, y = z.real, z.imag
        widest = float(y.abs().max()) if y.numel() else 0.0
        before, term, sums = torch.zeros_like(y), y, [torch.zeros_like(y), y]  # of even n, of odd n
        n, bound = 1, widest  # |t_n| e^(-x^2) <= bound, which falls like (sqrt(2) y)^n / sqrt(n!)
        while bound > torch.finfo(y.dtype).eps * widest / 64 and widest <= FARTHEST:
            before, term = term, -2 * x * y / (n + 1) * term - 2 * (n - 1) * y.square() / (n * (n + 1)) * before
            n += 1
            bound *= math.sqrt(2) * widest / math.sqrt(n)
            sums[n % 2] = sums[n % 2] + (-1) ** (n // 2) * term
        even, odd = (2 / math.sqrt(math.pi) * torch.exp(-x.square()) * s for s in sums)
        return torch.complex(torch.erf(x) + even, odd).masked_fill(y.abs() > FARTHEST, math.nan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (2 / math.sqrt(math.pi) * torch.exp(-z.square())).conj()


def erf(z: Tensor) -> Tensor:
    """The error function of complex numbers with an imaginary part of at most 2; NaN beyond.

    Example:
        >>> erf(torch.tensor([0.5 + 0.5j], dtype=torch.complex128))
        tensor([0.6426+0.4579j], dtype=torch.complex128)
    """
    found: Tensor = _Erf.apply(z)
    return found


# Written-out forms take torch's own operation first, and then what it takes.


def _by_parts(target: Target, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An operation that is linear with real coefficients."""
    return torch.complex(target(z.real, *args, **kwargs), target(z.imag, *args, **kwargs))


def _of_shape(target: Target, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What depends on the shape alone."""
    return target(z.real, *args, **kwargs)


def _product(target: Target, a: Tensor, b: Tensor) -> Any:
    """A bilinear operation."""
    if a.is_complex() and b.is_complex():
        return target(a, b)
    if a.is_complex():
        return torch.complex(target(a.real, b), target(a.imag, b))
    return torch.complex(target(a, b.real), target(a, b.imag))


def _added_product(target: Target, b: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * b + alpha * _product(torch.matmul, x, y)


def _einsum(target: Target, equation: str, tensors: Sequence[Tensor], **_: Any) -> Tensor:
    dtype = next(t.dtype for t in tensors if t.is_complex())
    return torch.einsum(equation, *(t.to(dtype) for t in tensors))


def _bilinear(target: Target, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = _einsum(target, "...i,kij,...j->...k", (x, weight, y))
    return z if bias is None else z + bias


def _linear(target: Target, h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _product(torch.matmul, h, weight.mT)
    return y if bias is None else y + bias


def _convolution(target: Target, h: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
    y = _product(lambda a, b: target(a, b, None, *options), h, weight)
    return y if bias is None else y + bias.view(-1, *[1] * (weight.ndim - 2))


def _gelu(target: Target, z: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + erf(z / math.sqrt(2)))


def _sigmoid(target: Target, z: Tensor) -> Tensor:
    """As exp(-|x|) sees it, which never overflows: `1 / (1 + e^-z)`, or `e^z / (1 + e^z)` where x < 0."""
    small = torch.exp(torch.where(z.real > 0, -z, z))
    return torch.where(z.real > 0, 1, small) / (1 + small)


def _softplus(target: Target, z: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """`log(1 + e^(beta z)) / beta`, and z beyond the threshold, as torch has it."""
    scaled = beta * z
    small = torch.log1p(torch.exp(torch.where(z.real > 0, -scaled, scaled)))
    return torch.where(scaled.real > threshold, z, (torch.where(z.real > 0, scaled, 0) + small) / beta)


def _softmax(target: Target, z: Tensor, dim: int, *_: Any) -> Tensor:
    return complex_softmax(z, dim)


def _logsumexp(target: Target, z: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    total = complex_logsumexp(z, dim)
    return total if keepdim else total.squeeze(dim)


def _log_softmax(target: Target, z: Tensor, dim: int, *_: Any) -> Tensor:
    return z - complex_logsumexp(z, dim)


def _attend(
    target: Target,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: Tensor | float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention: torch's, or that whose noise has been drawn before, which stands in the place of `dropout_p`."""
    if isinstance(dropout_p, float) and dropout_p > 0:
        raise ArithmeticError("attention that draws its own noise has no complex form")
    mask = attn_mask
    scores = _product(torch.matmul, q, k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    weights = complex_softmax(scores, -1)
    return _product(torch.matmul, weights * dropout_p if isinstance(dropout_p, Tensor) else weights, v)


def _variance(
    target: Target,
    z: Tensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    """`sum (z - mean)^2 / (n - 1)`, without a modulus, or with another correction of n."""
    dims = list(range(z.ndim)) if dim is None else dim
    less = float(unbiased) if correction is None else correction
    total = (z - z.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim)
    count = z.numel() // max(total.numel(), 1)
    return total / (count - less)


def _normalised(z: Tensor, dims: list[int], eps: float) -> Tensor:
    """By the variance `mean (z - mean)^2`, without a modulus."""
    centered = z - z.mean(dims, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, channels: bool = True) -> Tensor:
    """By channels, which are dimension 1, or by the last dimensions."""
    for_y = [None if t is None else t.view(-1, *[1] * (y.ndim - 2)) if channels else t for t in (weight, bias)]
    y = y if for_y[0] is None else y * for_y[0]
    return y if for_y[1] is None else y + for_y[1]


def _layer_norm(
    target: Target,
    z: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    return _scaled(_normalised(z, list(range(-len(shape), 0)), eps), weight, bias, channels=False)


def _rms_norm(
    target: Target, z: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(shape), 0))
    eps = torch.finfo(z.dtype).eps if eps is None else eps
    return _scaled(z * torch.rsqrt(z.square().mean(dims, keepdim=True) + eps), weight, None, channels=False)


def _group_norm(
    target: Target,
    z: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    return _scaled(_normalised(z.reshape(len(z), groups, -1), [-1], eps).view(z.shape), weight, bias)


def _batch_norm(
    target: Target,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    if training or mean is None or variance is None:
        return _scaled(_normalised(z, [d for d in range(z.ndim) if d != 1], eps), weight, bias)
    return _scaled(_scaled(z, None, -mean), torch.rsqrt(variance + eps) * (1 if weight is None else weight), bias)


def _batch_norm_and_more(target: Target, *args: Any) -> tuple[Tensor | None, ...]:
    """The values alone: statistics are those of the free phase."""
    return _batch_norm(target, *args), None, None, None, None


def _instance_norm(
    target: Target,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    if not use_input:
        return _batch_norm(target, z, weight, bias, mean, variance, False, momentum, eps)
    return _scaled(_normalised(z, list(range(2, z.ndim)), eps), weight, bias)


def _vector_norm(target: Target, z: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False) -> Tensor:
    if order != 2 or dim is None:
        raise ArithmeticError("of vector norms only that of order 2 along a dimension has a complex form")
    return torch.sqrt(z.square().sum(dim, keepdim=keepdim))


_PLAIN = """
    add sub rsub mul div true_divide neg addcmul addcdiv pow square sqrt rsqrt reciprocal exp expm1 log log1p
    sin cos tan sinh cosh tanh asinh atan sinc
    sum mean cumsum prod cumprod
    reshape view view_as _unsafe_view flatten unflatten permute transpose t numpy_T mT movedim squeeze unsqueeze expand
    expand_as cat stack split split_with_sizes chunk unbind select slice narrow index index_select gather flip roll
    repeat repeat_interleave tile unfold diagonal diag_embed tril triu where masked_fill constant_pad_nd pixel_shuffle
    pixel_unshuffle clone contiguous detach getitem
    sym_size sym_stride sym_numel
    gathered pair reduced leaking own_state _as_one_of Join Windows
"""
"""What torch computes of complex numbers as well, and the parts of this package that are made of such operations."""

TABLE: dict[str, Target | None] = {
    **dict.fromkeys(_PLAIN.split()),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    "einsum": _einsum,
    "bilinear": _bilinear,
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d"), _convolution),
    **dict.fromkeys(("conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "im2col", "col2im"), _by_parts),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _by_parts),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d"), _by_parts),
    **dict.fromkeys(("ones_like", "zeros_like", "empty_like", "full_like"), _of_shape),
    "erf": lambda target, z: erf(z),
    "erfc": lambda target, z: 1 - erf(z),
    "gelu": _gelu,
    "sigmoid": _sigmoid,
    "silu": lambda target, z: z * _sigmoid(target, z),
    "softplus": _softplus,
    "log_sigmoid": lambda target, z: -_softplus(target, -z, threshold=math.inf),
    "mish": lambda target, z: z * torch.tanh(_softplus(target, z)),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("log_softmax", "_log_softmax"), _log_softmax),
    "logsumexp": _logsumexp,
    **dict.fromkeys(("scaled_dot_product_attention", "_attention"), _attend),
    "var": _variance,
    "std": lambda *args, **kwargs: torch.sqrt(_variance(*args, **kwargs)),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_functional": _batch_norm_and_more,
    "instance_norm": _instance_norm,
    "linalg_vector_norm": _vector_norm,
}
"""By the name of the operation: None where torch's own takes complex numbers, else the form that is written out."""
_SHAPES = ("sym_size", "sym_stride", "sym_numel", "ones_like", "zeros_like", "empty_like", "full_like")
"""Operations whose results do not depend on the numbers."""


class ComplexOp:
    """An operation that takes complex numbers, too."""

    def __init__(self, target: Target, form: Target | None):
        self.target, self.form = target, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = leaves_of((args, kwargs), Tensor)
        if self.form is None or not any(t.is_complex() for t in tensors):
            return self.target(*args, **kwargs)
        return self.form(self.target, *args, **kwargs)


class HeldOp:
    """A piecewise-linear operation on its branch."""

    def __init__(self, piece: Activation | MaxPool):
        self.piece = piece

    def __call__(self, context: Any, key: tuple[str, str], x: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = context.on_branch(key, self.piece, x)
        return found


def complex_ops(ops: Iterable[Op], moving: Iterable[str]) -> tuple[list[Op], Op | None]:
    """The operations for complex values of these names, and the first one that has no complex form.

    Operations that read none of them, nor what follows from them, stay as they are.
    """
    found, moved, missing = [], set(moving), None
    for op in ops:
        reads = {ref.name for ref in leaves_of((op.args, op.kwargs), Ref)}
        if not reads & moved:
            found.append(op)
            continue
        if op.piece is not None:
            found.append(replace(op, target=HeldOp(op.piece), whole=True, activation=None, pool=None))
        else:
            if op.whole or op.label not in TABLE:
                missing = missing or op
            found.append(replace(op, target=ComplexOp(op.target, TABLE.get(op.label)), activation=None, pool=None))
        if op.label not in _SHAPES:
            moved.add(op.name)
    return found, missing


def complex_program(program: Program, moving: Iterable[str]) -> tuple[Program, Op | None]:
    """The same program for complex values of these inputs, and the first operation that has no complex form.

    There are no branches on which its operations could be held.
    """
    ops, missing = complex_ops(program.ops, moving)
    missing = missing or next((op for op in ops if isinstance(op.target, HeldOp)), None)
    return Program(ops, program.inputs, program.results, program.owner), missing
