"""A function of tensors, compiled as a whole: traced once into a flat list of operations, which inductor fuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Tensors = list[Tensor]


def compiled(function: Callable[..., Tensors], examples: Sequence[Tensor]) -> Callable[..., Tensors]:
    """The same function for tensors of the shapes, dtypes and devices of `examples`.

    Parameters and buffers that it reads besides are read anew in every call; whatever else it depends on is fixed as it
    is now. It is called once, on the examples themselves.

    Raises:
        RuntimeError and others: the function looks at numbers, or there is no compiler.

    Example:
        >>> twice = compiled(lambda x: [x + x], [torch.ones(2)])
        >>> twice(torch.tensor([1.0, 2.0]))
        [tensor([2., 4.])]
    """
    module = make_fx(function)(*examples)
    return torch.compile(module, fullgraph=True, dynamic=False, options=_options())


def _options() -> dict[str, Any]:
    """The caller asks for a function only where it applies, so that nothing is left to guard against.

    What is made of more than three numbers is kept rather than made again by each reader: the winners of 2 x 2 pooling.
    What calls the loops is compiled apart from them, quickly: with all in one, deep models take minutes.
    """
    from torch._inductor import config  # it takes a second to import

    options: dict[str, Any] = {"cpp_wrapper": True, "realize_reads_threshold": 3}
    if hasattr(config, "cpp_wrapper_build_separate"):
        options["cpp_wrapper_build_separate"] = True
    if skip := getattr(torch.compiler, "skip_all_guards_unsafe", None):
        options["guard_filter_fn"] = skip
    return options
