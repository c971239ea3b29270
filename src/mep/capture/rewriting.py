"""Bringing a recorded graph to few forms, so that closed forms and held branches are found by the operation alone.

    view, flatten...      reshape, with -1 for the examples                 clone, alias, assertions: nothing
    h @ W.t(), addmm      linear                                            mean(dims >= 0): counted from the last
    dropout(x)            x * dropout(ones), so that the noise is a value of its own, drawn once a step
    maximum(a, b)         reduced(largest(pair(a, b)))                      minimum, amin: the negatives of negatives
    amax(x, dims)         reduced(largest(gathered(x, dims)))               max(x, dim), if only its values are read
    prelu(x)              leaking(x, relu(x), slope)                        sign(x) * relu(|x|)  signed(x)

For exact branches max pooling also becomes `largest` of its windows, and the kinks' inputs get states of their own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mep.graph.closed_forms import maxima
from mep.graph.closed_forms.activations import leaking, own_state, signed
from mep.graph.closed_forms.maxima import MaxPool, Windows

aten = torch.ops.aten
_CASTS = ("to", "type_as", "_to_copy")
_SAME = ("clone", "alias", "lift_fresh_copy", "lift", "lift_fresh", "contiguous")


def label(n: fx.Node) -> str:
    """The name of the operation that a node calls, without its overload."""
    if n.op != "call_function":
        return ""
    packet = getattr(n.target, "_overloadpacket", n.target)
    return str(getattr(packet, "__name__", type(packet).__name__))


def value(n: Any) -> Any:
    """What a node stood for when it was recorded: a fake tensor, a tuple of them, or a number."""
    return n.meta.get("val") if isinstance(n, fx.Node) else n


def in_few_forms(graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
    """Rewrite every operation that has another spelling. Sizes are read from the inputs wherever these have them."""
    graph.eliminate_dead_code(_is_impure)  # assertions have no readers
    first: dict[Any, fx.Node] = {}
    for n in graph.find_nodes(op="call_function", target=operator.getitem):
        if (known := first.setdefault(n.args, n)) is not n:  # unpacked twice
            _replace([n], known)
    homes = {str(size): (n, d) for n in reversed(inputs) for d, size in enumerate(value(n).shape)}
    for n in list(graph.nodes):
        name = label(n)
        if name == "sym_size" and str(value(n)) in homes:
            n.args = homes[str(value(n))]
        if name in _SAME:
            _replace([n], n.args[0])
        elif name in ("dropout", "native_dropout"):
            _noise_apart(n, homes)
        elif name == "scaled_dot_product_attention":
            _attention_noise_apart(n, homes)
        elif name in _REWRITES:
            _REWRITES[name](n)
    graph.eliminate_dead_code(_is_impure)


def _is_impure(n: fx.Node) -> bool:
    return n.op in ("placeholder", "output")


def _as_reshape(n: fx.Node) -> None:
    """A change of shape with -1 for the number of rows; other views may copy, if they must."""
    after = list(t.shape) if isinstance(t := value(n), Tensor) else []
    if after and all(isinstance(size, int) for size in after[1:]) and 0 not in after[1:]:
        n.target, n.args, n.kwargs = aten.reshape.default, (n.args[0], [-1, *after[1:]]), {}
    elif label(n) in ("view", "_unsafe_view") and isinstance(n.args[1], (list, tuple)):
        n.target = aten.reshape.default


def _as_linear(n: fx.Node) -> None:
    """A product with the transpose of a matrix."""
    given: list[Any] = list(n.args)
    h, weight, before = given[-2], given[-1], given[:-2]
    inner = weight.args[0] if label(weight) in ("t", "transpose", "permute", "numpy_T") else None
    is_matrix = inner is not None and isinstance(value(inner), Tensor) and value(inner).ndim == 2
    if is_matrix and value(h).ndim >= 2 and not n.kwargs and all(value(b).ndim == 1 for b in before):
        n.target = aten.linear.default
        n.args = (h, inner, before[0]) if before else (h, inner)


def _from_the_last(n: fx.Node) -> None:
    dims: Any = n.args[1] if len(n.args) > 1 else None
    rank = value(n.args[0]).ndim
    if isinstance(dims, (list, tuple)) and dims and all(d % rank for d in dims):
        n.update_arg(1, [d % rank - rank for d in dims])


def _with_numbers(n: fx.Node) -> None:
    """`padding="same"` of a convolution as numbers, where both sides are alike."""
    padding = n.args[4] if len(n.args) > 4 else None
    if not isinstance(padding, str):
        return
    weight = value(n.args[1])
    dilation: Any = n.args[5] if len(n.args) > 5 else [1]
    dilations = list(dilation) * (weight.ndim - 2) if len(dilation) == 1 else dilation
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    if not any(t % 2 for t in total):
        target: Any = n.target
        n.target = target._overloadpacket.default
        n.update_arg(4, [t // 2 for t in total])


def _copied(old: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
    """What `old.copy_(new)` leaves: torch has no derivative of the pure form."""
    return new.to(old.dtype).expand_as(old)


def _fill(n: fx.Node) -> None:
    """Noise that is written over a value depends on its shape alone."""
    x: Any = n.args[0]
    n.args = (_put(n, aten.empty_like.default, x), *n.args[1:])


class _Written:
    """A tensor after a part of it was written, where torch's derivative of the pure form is missing or wrong (2.13)."""

    def __init__(self, part: Callable[..., Tensor]):
        self.part, self.__name__ = part, f"{part.__name__}_scatter"

    def __call__(self, x: Tensor, new: Tensor, *where: Any, **more: Any) -> Tensor:
        written = x.clone()
        self.part(written, *where, **more).copy_(new)
        return written


def _write_of_a_part(n: fx.Node) -> None:
    if label(n) == "as_strided_scatter" or (isinstance(value(n), Tensor) and value(n).is_complex()):
        n.target = _Written(getattr(aten, label(n).removesuffix("_scatter")))
    elif label(n) == "slice_scatter":
        _without_whole_slices(n)


def group_norm(x: Tensor, *options: Any) -> Tensor:
    """torch 2.13 crashes in its derivative by parameters alone unless x lies row after row; sizes of 1 have strides."""
    found: Tensor = aten.group_norm.default(x.reshape(len(x), -1).view(x.shape), *options)
    return found


def _without_broadcast(n: fx.Node) -> None:
    """Tensors of one shape are themselves, and others are expanded."""
    for picked in list(n.users):
        given: Any = n.args[0]
        x = given[picked.args[1]]
        if list(value(x).shape) == list(value(picked).shape):
            _replace([picked], x)
        else:
            picked.target, picked.args = _as_one_of, (given, picked.args[1])
    if not n.users:
        n.graph.erase_node(n)


def _as_one_of(tensors: Sequence[Tensor], i: int) -> Tensor:
    return torch.broadcast_tensors(*tensors)[i]


def without_cast(n: fx.Node) -> None:
    """A cast to the dtype and device that a tensor has is the tensor; other nodes are left."""
    x = value(n.args[0]) if label(n) in _CASTS else None
    if isinstance(x, Tensor) and isinstance(t := value(n), Tensor) and (x.dtype, x.device) == (t.dtype, t.device):
        _replace([n], n.args[0])


def _without_whole_slices(n: fx.Node) -> None:
    """A slice from the first to the last row is the tensor, and one that is written so is what is written."""
    given: list[Any] = list(n.args)
    x, rest = given[0], given[1:]
    window = rest[1:] if label(n) == "slice_scatter" else rest
    defaults: list[Any] = [0, None, 2**63 - 1]
    _, start, end, *step = window + defaults[len(window) :]
    if not start and isinstance(end, int) and end >= 2**62 and step in ([], [1]) and not n.kwargs:
        _replace([n], rest[0] if label(n) == "slice_scatter" else x)


def _noise_apart(n: fx.Node, homes: dict[str, tuple[fx.Node, int]]) -> None:
    """Dropout as a product with the dropout of ones, which depends on the shape alone; `homes` has the free sizes."""
    x: Any
    target: Any = n.target
    x, *options = n.args
    is_native = label(n) == "native_dropout"  # that returns its mask as well
    ends = list(n.users) if is_native else [n]
    if is_native and [user.args[1] for user in ends] != [0]:
        return
    put = partial(_put, n)
    if options[0] == 0 or not options[1]:
        result = x
    else:
        ones = _ones(put, value(x), value(x).shape, homes)
        ones = ones or put(aten.ones_like.default, x, memory_format=torch.contiguous_format)
        ones = _laid_out_as(put, ones, value(x))
        ones.meta["val"] = value(x)
        noise = put(target, ones, *options, val=(value(x), value(x)) if is_native else value(x))
        if is_native:
            noise = put(operator.getitem, noise, 0, val=value(x))
        result = put(aten.mul.Tensor, x, noise)
    _replace(ends, result)
    if is_native:
        n.graph.erase_node(n)


def _ones(
    put: Callable[..., fx.Node], like: Tensor, shape: Sequence[Any], homes: dict[str, tuple[fx.Node, int]]
) -> fx.Node | None:
    """Ones of a shape whose sizes are numbers or those of the inputs, else None."""
    if not all(isinstance(size, int) or str(size) in homes for size in shape):
        return None
    sizes = [s if isinstance(s, int) else put(aten.sym_size.int, *homes[str(s)], val=s) for s in shape]
    return put(aten.ones.default, sizes, dtype=like.dtype, device=like.device)


def _laid_out_as(put: Callable[..., fx.Node], ones: fx.Node, like: Tensor) -> fx.Node:
    """Noise is drawn in the order of memory: the ones must lie there as the values of the model do."""
    strides = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in like.stride()]
    order = sorted(range(like.ndim), key=lambda d: -strides[d])
    if order == list(range(like.ndim)) or 0 in strides or ones.target is not aten.ones.default:
        return ones
    sizes: Any = ones.args[0]
    ones.args = ([sizes[d] for d in order],)
    return put(aten.permute.default, ones, [order.index(d) for d in range(like.ndim)])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, noise: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """Attention as torch computes it where it drops out, with the noise given."""
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = (q * root) @ (k * root).transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    return (scores.softmax(-1) * noise) @ v


def _attention_noise_apart(n: fx.Node, homes: dict[str, tuple[fx.Node, int]]) -> None:
    """Attention with dropout, with its noise as a value of its own."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, n.args, strict=False)) | dict(n.kwargs)
    p, q, k = given.get("dropout_p", 0.0), given["query"], given["key"]
    if not p or given.get("enable_gqa"):
        return
    put = partial(_put, n)
    ones = _ones(put, value(q), [*value(q).shape[:-1], value(k).shape[-2]], homes)
    if ones is None:
        return
    ones.meta["val"] = value(q)
    noise = put(aten.dropout.default, ones, p, True)
    options = given.get("attn_mask"), noise, given.get("is_causal", False), given.get("scale")
    _replace([n], put(_attention, q, k, given["value"], *options, val=value(n)))


def _as_pool(n: fx.Node) -> None:
    """The values of a pooling that also finds its winners, where nothing reads these."""
    if label(n).startswith("adaptive") or label(n).endswith("_with_indices"):
        users = list(n.users)
        if not all(u.target is operator.getitem and u.args[1] == 0 for u in users):
            return
        name = label(n).removesuffix("_with_indices")
        _replace(users, _put(n, _POOLS[name], *n.args, **n.kwargs, val=value(n)[0]))
        n.graph.erase_node(n)


def _pooling(name: str) -> Callable[..., Tensor]:
    function = getattr(aten, name)

    def pool(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = function(x, *args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

    pool.__name__ = name
    return pool


_POOLS = {name: _pooling(name) for n in (1, 2, 3) for name in (f"adaptive_max_pool{n}d", f"max_pool{n}d")}


def unroll_pool(n: fx.Node, pool: MaxPool) -> None:
    """Max pooling as the largest of its windows."""
    put = partial(_put, n)
    _replace([n], put(torch.squeeze, put(maxima.largest, put(Windows(pool), n.args[0])), -1))


def insert_state(at: fx.Node, readers: Iterable[fx.Node]) -> fx.Node:
    """A state of its own on a value; it is what these readers read from now on."""
    with at.graph.inserting_after(at):
        state = at.graph.create_node("call_function", own_state, (at,), name=f"{at.name}_state")
    state.meta = dict(at.meta)
    for reader in readers:
        reader.replace_input_with(at, state)
    return state


def transposed(at: fx.Node, dim: int) -> fx.Node:
    """A value with dimensions 0 and `dim` exchanged, directly behind it."""
    with at.graph.inserting_after(at):
        made = at.graph.create_node("call_function", aten.transpose.int, (at, 0, dim))
    made.meta = {**at.meta, "val": value(at).transpose(0, dim)}
    return made


def insert_state_on_rows(at: fx.Node, dim: int) -> None:
    """A state of its own on a value with the examples in dimension `dim`: on its transpose, where they are rows."""
    readers = list(at.users)
    state = insert_state(transposed(at, dim) if dim else at, [])
    back = transposed(state, dim) if dim else state
    for reader in readers:
        reader.replace_input_with(at, back)


def act_on_rows(n: fx.Node, dim: int) -> None:
    """A pointwise `f(x)` becomes the transpose of `f(transpose of x)`, so that its input has the examples as rows."""
    before, readers = n.all_input_nodes[0], list(n.users)
    source: Any = before.args[0]
    is_back = label(before) == "transpose" and source.target is own_state  # see `insert_state_on_rows`
    n.replace_input_with(before, source if is_back else transposed(before, dim))
    n.meta = {**n.meta, "val": value(n).transpose(0, dim)}
    back = transposed(n, dim)
    for reader in readers:
        reader.replace_input_with(n, back)


def _put(n: fx.Node, function: Callable[..., Any], *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
    """A call before a node, in its place; by default its value is like its first argument's."""
    with n.graph.inserting_before(n):
        name = getattr(function, "__name__", type(function).__name__.lower()).partition(".")[0]
        made = n.graph.create_node("call_function", function, args, kwargs, name=name)
    first = next((value(a) for a in args if isinstance(a, fx.Node)), None)
    made.meta = {**n.meta, "val": first if val is None and isinstance(first, Tensor) else val}
    return made


def _extreme(n: fx.Node) -> None:
    """A maximum or minimum of two tensors, or over dimensions."""
    given: dict[str, Any] = dict(zip(("self", "other", "keepdim"), n.args, strict=False)) | dict(n.kwargs)
    x, other, keepdim = given.get("self"), given.get("other", given.get("dim")), bool(given.get("keepdim", False))
    name = label(n)
    dims = (other,) if isinstance(other, int) else tuple(other) if isinstance(other, (tuple, list)) else ()
    ends, result = [n], value(n)
    if dims and name in ("max", "min"):
        ends, result = list(n.users), result[0] if isinstance(result, tuple) else None
        if not all(user.target is operator.getitem and user.args[1] == 0 for user in ends):
            return
    is_real = isinstance(value(x), Tensor) and value(x).is_floating_point()
    if not is_real or not (dims or isinstance(other, fx.Node)) or (name in ("maximum", "minimum") and dims):
        return
    put = partial(_put, n)
    together = put(maxima.gathered, x, dims) if dims else put(maxima.pair, x, other)
    is_minimum = "min" in name
    found = put(maxima.largest, put(torch.neg, together) if is_minimum else together)
    found = put(torch.neg, found) if is_minimum else found
    last = (maxima.reduced, found, dims, keepdim) if dims else (torch.squeeze, found, -1)
    _replace(ends, put(*last, val=result))
    if ends != [n]:
        n.graph.erase_node(n)


def _signed(n: fx.Node) -> None:
    """`sign(x) relu(|x|)`, in pooling by p-norms: x, and no gradient where it is 0. These are no kinks."""
    factors: list[Any] = list(n.args)
    chain = [("mul", n), ("sign", factors[0]), ("relu", factors[-1])]
    if all(isinstance(m, fx.Node) and label(m) == name for name, m in chain):
        size = factors[1].args[0]
        if label(size) == "abs" and size.args[0] is factors[0].args[0]:
            _replace([n], _put(n, signed, factors[0].args[0]))


def _prelu(n: fx.Node) -> None:
    x, slope = n.args
    _replace([n], _put(n, leaking, x, _put(n, aten.relu.default, x), slope))


def _replace(old: Iterable[fx.Node], new: Any) -> None:
    for n in old:
        n.replace_all_uses_with(new)
        n.graph.erase_node(n)


_REWRITES: dict[str, Callable[[fx.Node], None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _as_reshape),
    "matmul": _as_linear,
    "mm": _as_linear,
    "addmm": _as_linear,
    "mean": _from_the_last,
    "conv1d": _with_numbers,
    "conv2d": _with_numbers,
    "conv3d": _with_numbers,
    "copy": lambda n: setattr(n, "target", _copied),
    **dict.fromkeys(("normal_functional", "uniform", "exponential", "cauchy", "geometric", "log_normal"), _fill),
    "broadcast_tensors": _without_broadcast,
    **dict.fromkeys(_CASTS, without_cast),
    "slice": _without_whole_slices,
    **dict.fromkeys(("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"), _write_of_a_part),
    **{f"adaptive_max_pool{n}d": _as_pool for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _as_pool for n in (1, 2, 3)},
    **dict.fromkeys(("maximum", "minimum", "amax", "amin", "max", "min"), _extreme),
    "prelu": _prelu,
    "mul": _signed,
    "group_norm": lambda n: setattr(n, "target", group_norm),
}
