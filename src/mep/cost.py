"""What we want small at the output: one number **per example**, its gradient, and what a target must look like.

The loss of a batch is the mean over its examples, so gradients agree with `F.cross_entropy` and `F.mse_loss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.errors import ArgumentError, InputError
from mep.guards import Noise, generators, same, set_generators, without_hooks

PerExample = Callable[[Tensor, Tensor], Tensor]


class BatchCost(ABC):
    """The cost of one batch as a function of the output; the target is inside.

    Args:
        output: that of the batch, for the shape and dtype that the target must fit.
        target: what the cost expects.
    """

    @property
    def narrows(self) -> bool:
        """Whether `of` is there: row i of the target belongs to example i."""
        return type(self).of is not BatchCost.of

    @property
    def smoothness(self) -> float | Tensor | None:
        """No eigenvalue of an example's Hessian is larger, at any output; None if that is not known."""
        return None

    def is_holomorphic(self, output: Tensor) -> bool:
        """Whether value and gradient take complex outputs, and are holomorphic there, for outputs like this one."""
        return False

    @abstractmethod
    def value(self, output: Tensor) -> Tensor:
        """The cost of every example: [batch]."""

    @abstractmethod
    def gradient(self, output: Tensor) -> Tensor:
        """d value.sum() / d output, in the shape of `output`."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that the cost itself reads, and that are trained."""
        return ()

    def parameter_gradient(self, output: Tensor, weight: float) -> dict[nn.Parameter, Tensor]:
        """`weight` times d value.sum() / d theta of those parameters, at an output: by autograd through `value`."""
        trained = self.parameters
        if not trained:
            return {}
        with without_hooks(trained), torch.enable_grad():
            value = self.value(output.detach())
            found = torch.autograd.grad(value, trained, torch.ones_like(value), allow_unused=True)
        return {p: g.to_dense() * weight for p, g in zip(trained, found, strict=True) if g is not None}

    def of(self, rows: Tensor) -> BatchCost:
        """The cost of some of the examples; a cost without it is evaluated for all of them in every sweep."""
        raise NotImplementedError

    def parts(self) -> dict[str, Tensor]:
        """What it holds of the target."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_parts(self, parts: Mapping[str, Tensor]) -> BatchCost:
        """The same cost of another target."""
        return _copy(self, **parts)


class SquaredError(BatchCost):
    """`mean_j (s_j - y_j)^2` over the features j of an example: its mean over the batch is `F.mse_loss`."""

    name = "mse"
    for_labels = "For class labels use cost='one_hot_mse' or cost='cross_entropy'."

    def __init__(self, output: Tensor, target: Tensor):
        if target.shape != output.shape:
            missing = (*target.shape, 1) == tuple(output.shape)
            hint = "target[:, None] has that shape. " if missing and target.ndim == 1 else ""
            raise InputError(
                f"{self.name}: the target has shape {tuple(target.shape)} and the output {tuple(output.shape)}; they "
                f"must be equal. {hint}{self.for_labels}"
            )
        if target.is_complex():
            raise InputError(f"{self.name}: the target must be real, got {target.dtype}.")
        self.target = target.to(output.dtype)
        self.features = output.numel() // len(output)

    @property
    def smoothness(self) -> float:
        return 2 / self.features

    def is_holomorphic(self, output: Tensor) -> bool:
        return True

    def value(self, output: Tensor) -> Tensor:
        return (output - self.target).square().reshape(len(output), -1).mean(1)

    def gradient(self, output: Tensor) -> Tensor:
        """2 (s - y) / features."""
        return (output - self.target).mul_(2 / self.features)

    def of(self, rows: Tensor) -> BatchCost:
        return _copy(self, target=self.target.index_select(0, rows))


class OneHotSquaredError(SquaredError):
    """The squared error, for which class labels (integers, classes along dimension 1) stand for one-hot vectors."""

    name = "one_hot_mse"
    for_labels = "Class labels must be integers (torch.long)."

    def __init__(self, output: Tensor, target: Tensor):
        if not target.is_floating_point() and output.ndim > 1:
            target = torch.zeros_like(output).scatter_(1, _checked_labels(output, target, self.name), 1.0)
        super().__init__(output, target)


class CrossEntropy(BatchCost):
    """`-sum_c q_c log softmax(s)_c`, the mean over the positions of an example; classes along dimension 1.

    The target is class indices `[batch, ...]` or probabilities in the shape of the output. `total` is `sum_c q_c`, None
    where it is 1.
    """

    def __init__(self, output: Tensor, target: Tensor):
        if output.ndim < 2:
            raise InputError(f"cross_entropy: the output must be [batch, classes, ...], got {tuple(output.shape)}.")
        self.positions = output.numel() // (output.shape[0] * output.shape[1])
        self.labels: Tensor | None = None
        self.total: Tensor | None = None
        if target.is_floating_point():
            if target.shape != output.shape:
                raise InputError(
                    f"cross_entropy: probabilities must have the output's shape {tuple(output.shape)}, got "
                    f"{tuple(target.shape)}. For class labels pass integers (torch.long)."
                )
            self.target = target.to(output.dtype)
            self.total = self.target.sum(1, keepdim=True)
        else:
            self.labels = _checked_labels(output, target, "cross_entropy")
            self._shape, self._dtype = output.shape, output.dtype

    @cached_property
    def target(self) -> Tensor:
        """The probabilities q, in the shape of the output."""
        assert self.labels is not None
        zeros = self.labels.new_zeros(self._shape, dtype=self._dtype)
        return zeros.scatter_(1, self.labels, 1.0)

    @property
    def smoothness(self) -> float | Tensor:
        """Half of the largest total: the variance of a distribution's choice along a unit vector is 1/2 at most."""
        total = 1.0 if self.total is None else self.total.abs().max()
        return 0.5 * total / self.positions

    def is_holomorphic(self, output: Tensor) -> bool:
        return True

    def value(self, output: Tensor) -> Tensor:
        if self.labels is not None and not output.is_complex():
            each = F.cross_entropy(output, self.labels.squeeze(1), reduction="none")
        else:
            scale = complex_logsumexp(output, 1) if output.is_complex() else output.logsumexp(1, keepdim=True)
            chosen = (output * self.target).where(self.target != 0, 0).sum(1)
            each = (scale if self.total is None else scale * self.total).squeeze(1) - chosen
        return each if each.ndim == 1 else each.reshape(len(output), -1).mean(1)

    def gradient(self, output: Tensor) -> Tensor:
        """(softmax(s) sum_c q_c - q) / positions."""
        p = _softmax(output)
        p = p.sub_(self.target) if self.total is None else p.mul_(self.total).sub_(self.target)
        return p.div_(self.positions) if self.positions > 1 else p

    def of(self, rows: Tensor) -> BatchCost:
        labels = None if self.labels is None else self.labels.index_select(0, rows)
        total = None if self.total is None else self.total.index_select(0, rows)
        return _copy(self, target=self.target.index_select(0, rows), labels=labels, total=total)


class Custom(BatchCost):
    """Any differentiable function of `(output, target)` that returns one number per example."""

    def __init__(self, function: PerExample, output: Tensor, target: Tensor):
        self.function, self.target = function, target
        self.gradient(output)  # tried once, so that what is wrong with it is told before settling

    def value(self, output: Tensor) -> Tensor:
        value = self.function(output, self.target)
        if not isinstance(value, Tensor) or value.shape != output.shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"cost: the function must return one number per example, shape {tuple(output.shape[:1])}, got {got}. "
                "Use reduction='none' and sum or average over every dimension but the first."
            )
        return value

    def gradient(self, output: Tensor) -> Tensor:
        """By autograd through the function alone."""
        return gradient_of(self.value, output)

    def is_holomorphic(self, output: Tensor) -> bool:
        return is_holomorphic(self.value, output)


def gradient_of(function: Callable[[Tensor], Tensor], output: Tensor, along: complex = 1.0) -> Tensor:
    """`along` times d function(output).sum() / d output; without conjugates if that is complex.

    Autograd finds the conjugate: of a value v with the gradient g, conj(dv/ds) g.
    """
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        value = function(leaf)
        if not value.requires_grad:
            raise InputError("cost: the function must be differentiable in the output; it returned a constant.")
        if not output.is_complex():
            return torch.autograd.grad(value.sum(), leaf)[0]
        if not value.is_complex():
            raise InputError("cost: the function returned real numbers for a complex output.")
        (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, along).conj())
    return torch.conj_physical(gradient)


def is_holomorphic(function: Callable[[Tensor], Tensor], output: Tensor) -> bool:
    """Whether a function takes complex outputs, and its derivative there is linear over the complex numbers.

    Tried at one complex output near this one.

    Example:
        >>> s = torch.ones(2, 3)
        >>> is_holomorphic(lambda s: s.square().sum(1), s), is_holomorphic(lambda s: (s * s.conj()).sum(1), s)
        (True, False)
    """
    size = output.abs().mean() + 1
    phase = torch.arange(output.numel(), device=output.device).view(output.shape).cos().to(output.dtype)
    there = torch.complex(output.detach(), 0.1 * size * phase)
    try:
        one, other = gradient_of(function, there), gradient_of(function, there, 1j)
    except Exception:  # whatever torch or the function raises at complex numbers
        return False
    return bool((other - 1j * one).norm() <= 1e-3 * one.norm())


class WithReadout(nn.Module):
    """A cost behind a readout: `C(readout(s_out), y)`, given wherever a cost is.

    Args:
        readout: any module that turns the output of the model into what the cost takes, example by example.
        cost: what `make_cost` takes.
    """

    def __init__(self, readout: nn.Module, cost: str | PerExample | type[BatchCost]):
        super().__init__()
        self.readout, self.cost = readout, cost
        self.make_cost = make_cost(cost)

    def read(self, output: Tensor) -> Tensor:
        """What the readout makes of an output."""
        name = type(self.readout).__name__
        try:
            read = self.readout(output)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("shape", "size", "dtype", "scalar type")):
                raise
            raise InputError(
                f"readout: {name} cannot be applied to the output of the model, {output.dtype} of shape "
                f"{tuple(output.shape)}: {error}"
            ) from error
        if not isinstance(read, Tensor) or read.shape[:1] != output.shape[:1]:
            got = f"shape {tuple(read.shape)}" if isinstance(read, Tensor) else type(read).__name__
            raise InputError(
                f"readout: {name} must return a tensor with {len(output)} rows, one an example; got {got}."
            )
        return read


class ReadoutCost(BatchCost):
    """The cost of one batch behind a readout, by autograd through the readout alone.

    With z = readout(s) its gradient is `J^T dC/dz`. What the readout draws at random is the same in every evaluation.
    """

    def __init__(self, whole: WithReadout, output: Tensor, target: Tensor):
        self.whole = whole
        self.noise: Noise | None = None
        homes = [m._buffers for m in whole.modules()]
        buffers = [(home, key, b, b.detach().clone()) for home in homes for key, b in home.items() if b is not None]
        before = generators()
        read = self._read(output.detach().requires_grad_())
        written = [kept for kept in buffers if not _is_kept(*kept)]
        if written:
            with torch.no_grad():
                for home, key, b, value in written:
                    home[key] = b.copy_(value)
            raise ArgumentError(
                f"readout: {type(whole.readout).__name__} writes to its buffers when it is run, and a step runs it "
                "many times. Way out: readout.eval(), or let the layer that does so be a part of the model."
            )
        if not read.requires_grad:
            raise InputError("readout: it must be differentiable; it returned a constant.")
        self.noise = before if before.differs(generators()) else None
        self.cost = whole.make_cost(read.detach(), target)

    @cached_property
    def smoothness(self) -> float | Tensor | None:
        """For a linear readout that of the cost times `|W|^2`."""
        own, readout = self.cost.smoothness, self.whole.readout
        if own is None or type(readout) is not nn.Linear:
            return None
        W = readout.weight.detach().float()
        return own * torch.linalg.eigvalsh(W @ W.T if len(W) <= W.shape[1] else W.T @ W)[-1]

    def value(self, output: Tensor) -> Tensor:
        value = self.cost.value(self._read(output))
        return value if torch.is_grad_enabled() else value.detach()

    def gradient(self, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        read = self._read(leaf)
        (gradient,) = torch.autograd.grad(read, leaf, self.cost.gradient(read.detach()), materialize_grads=True)
        return gradient

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.whole.parameters() if p.requires_grad)

    @torch.enable_grad()
    def _read(self, output: Tensor) -> Tensor:
        if self.noise is None:
            return self.whole.read(output)
        after = generators()
        set_generators(self.noise)
        try:
            return self.whole.read(output)
        finally:
            set_generators(after)


def _is_kept(home: Mapping[str, Tensor | None], key: str, buffer: Tensor, value: Tensor) -> bool:
    """Whether a buffer is where it was and has the value that it had; NaN equals NaN."""
    return home.get(key) is buffer and same(buffer, value)


Cost = Callable[[Tensor, Tensor], BatchCost]
"""From the output and the target of a batch to its cost."""

NAMED: dict[str, Cost] = {
    "cross_entropy": CrossEntropy,
    "mse": SquaredError,
    "one_hot_mse": OneHotSquaredError,
}


def make_cost(cost: str | PerExample | type[BatchCost] | WithReadout) -> Cost:
    """A cost from its name, a per-example function, or a class derived from `BatchCost`; also behind a readout.

    Example:
        >>> output, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 3.0]])
        >>> make_cost("mse")(output, target).value(output)
        tensor([0.5000])
    """
    if isinstance(cost, str) and cost in NAMED:
        return NAMED[cost]
    if isinstance(cost, WithReadout):
        return partial(ReadoutCost, cost)
    if not callable(cost):
        raise ArgumentError(f"cost={cost!r}: choose one of {sorted(NAMED)}, or pass a per-example function.")
    given: Any = cost
    name = {torch.nn.functional.cross_entropy: "cross_entropy", torch.nn.functional.mse_loss: "mse"}.get(given)
    for kind, its_name in ((torch.nn.CrossEntropyLoss, "cross_entropy"), (torch.nn.MSELoss, "mse")):
        settings = ("reduction", "weight", "ignore_index", "label_smoothing")
        is_plain = type(given) is kind and all(getattr(given, s, None) == getattr(kind(), s, None) for s in settings)
        if given is kind or is_plain:
            name = its_name
    if name is not None:
        raise ArgumentError(
            f"cost={cost!r} averages over the batch, and a cost has one number per example. Pass cost={name!r}, which "
            "is that, or a function with reduction='none'."
        )
    if not isinstance(given, type):
        return partial(Custom, given)
    if not issubclass(given, BatchCost):
        raise ArgumentError(f"cost={cost!r}: a class of costs must be derived from mep.BatchCost.")
    return given


def recorded_function(cost: object) -> Callable[..., Tensor] | None:
    """The cost as a function that is recorded together with the model; None where it reads output and target alone."""
    is_class = isinstance(cost, type) and issubclass(cost, BatchCost)
    return cost if callable(cost) and not is_class and not isinstance(cost, WithReadout) else None


def mean_cost(cost: str | PerExample | type[BatchCost] | WithReadout, output: Any, target: Any) -> Tensor:
    """The mean cost of a batch, with autograd's graph: of what a model returned, a tensor or what the cost takes."""
    if (function := recorded_function(cost)) is not None:
        value = function(output, target)
        if not isinstance(value, Tensor) or value.ndim > 1:
            shape = tuple(output.shape[:1]) if isinstance(output, Tensor) else "(batch,)"
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"cost: the function must return one number per example, shape {shape}, got {got}.")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise InputError("cost: the function must be differentiable in the output; it returned a constant.")
        return value.mean()
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if not isinstance(output, Tensor):
        raise InputError(
            f"The model returns {type(output).__name__}; cost={cost!r} takes one tensor. Way out: a cost function that "
            "takes what it needs from the result, cost=lambda out, y: ..."
        )
    if isinstance(cost, WithReadout):
        return mean_cost(cost.cost, cost.read(output), target)
    return make_cost(cost)(output.detach(), target).value(output).mean()


def _checked_labels(output: Tensor, labels: Tensor, cost: str) -> Tensor:
    """Class labels for the cost of that name as indices `[batch, 1, ...]`."""
    wanted, classes = (output.shape[0], *output.shape[2:]), output.shape[1]
    column = labels.ndim > 1 and labels.shape == (*wanted, 1)
    if column or (labels.shape == output.shape and classes > 1 and labels.dtype != torch.bool):
        way_out = "labels.squeeze(-1)" if column else "labels.argmax(1), or labels.float() for probabilities"
        raise InputError(
            f"{cost}: class labels must be integers of shape {wanted}, got {tuple(labels.shape)}. Pass {way_out}."
        )
    if labels.shape != wanted or labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise InputError(
            f"{cost}: class labels must be integers of shape {wanted}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Classes are dimension 1 of the output; for [batch, time, classes] transpose the "
            "output, or pass a cost function."
        )
    lowest, highest = labels.aminmax()
    low, high = int(lowest), int(highest)
    if low < 0 or high >= classes:
        ignored = low == -100 and high < classes
        hint = " To ignore -100, pass cost=lambda out, y: F.cross_entropy(out, y, reduction='none')." if ignored else ""
        raise InputError(f"{cost}: labels lie in [{low}, {high}], the output has {classes} classes.{hint}")
    return labels.long().unsqueeze(1)


def complex_softmax(z: Tensor, dim: int) -> Tensor:
    """Softmax of complex numbers, without overflow: shifted by the largest real part."""
    weights = torch.exp(z - z.real.detach().amax(dim, keepdim=True))
    return weights / weights.sum(dim, keepdim=True)


def complex_logsumexp(z: Tensor, dim: Any) -> Tensor:
    """`log sum exp(z)` of complex numbers over dimensions, which stay with length 1."""
    top = z.real.detach().amax(dim, keepdim=True)
    return torch.log(torch.exp(z - top).sum(dim, keepdim=True)) + top


def _softmax(output: Tensor) -> Tensor:
    """Over dimension 1: slow along short rows, and fast along columns, so that classes come first in memory."""
    if output.is_complex():
        return complex_softmax(output, 1)
    return output.t().contiguous().softmax(0).t() if output.ndim == 2 else output.softmax(1)


def _copy(cost: BatchCost, **changed: Tensor | None) -> BatchCost:
    twin = object.__new__(type(cost))
    twin.__dict__ = {**cost.__dict__, **changed}
    return twin
