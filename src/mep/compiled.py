"""A function of tensors, compiled as a whole: traced once into a flat list of operations, which inductor fuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
Tensors = list[Tensor]


def compiled(function: Callable[..., Tensors], examples: Sequence[Tensor]) -> Callable[..., Tensors]:
    """The same function for tensors of the shapes, dtypes and devices of `examples`.

    Parameters and buffers that it reads besides are read anew in every call; whatever else it depends on is fixed as it
    is now. It is called once, on the examples themselves.

    Raises:
        RuntimeError and others: the function looks at numbers, or there is no compiler.

    Example:
        >>> import torch
        >>> twice = compiled(lambda x: [x + x], [torch.ones(2)])
        >>> twice(torch.tensor([1.0, 2.0]))
        [tensor([2., 4.])]
    """
    from torch import _inductor  # it takes a second to import

    module = make_fx(function)(*examples)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta.clear()  # what stands there of shapes is of one tracing each, and inductor makes its own of all
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # with inductor, numbers may lie in memory otherwise than when traced
    module.recompile()
    return _inductor.compile(module, list(examples), options=_options())


def _options() -> dict[str, Any]:
    """How inductor shall make it.

    - No loop writes over what it reads: allowed to, torch 2.13 finds wrong numbers in steps of convolutional networks.
    - What is made of more than three numbers, as the winners of 2 x 2 pooling, is kept for all its readers.
    - What calls the loops is compiled apart from them, quickly: with all in one, deep models take minutes.
    """
    from torch._inductor import config

    options: dict[str, Any] = {"cpp_wrapper": True, "realize_reads_threshold": 3, "inplace_buffers": False}
    if hasattr(config, "cpp_wrapper_build_separate"):
        options["cpp_wrapper_build_separate"] = True
    return options
