"""`EPOptimizer`: estimate the gradient, update, constrain. A real `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mep.capture.state import Buffers
from mep.errors import A_FLAG, ArgumentError, ParameterError, require, warn
from mep.estimators.contrast import accumulate
from mep.estimators.estimate import Estimate, Gradients
from mep.guards import uninterrupted

Constraint = Callable[[torch.optim.Optimizer], None]


class Estimator(Protocol):
    """What fills `p.grad`: `EquilibriumPropagation`, `Backprop`, or your own."""

    model: nn.Module

    def gradients(self, x: Any, target: Tensor) -> tuple[Gradients, Estimate]:
        """The gradient of the mean cost, without touching `p.grad`."""

    def predict(self, x: Any) -> Tensor:
        """The output for an input."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from step to step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


class EPOptimizer(torch.optim.Optimizer):
    """An estimator, an update and constraints under one `step`.

    It shares parameter groups and state with the update, so schedulers, hooks, `add_param_group`, `state_dict` and
    `copy.deepcopy` do what they do for any optimizer. A copy is bound to its own copy of the model, `opt.model`.

    Args:
        estimator: where gradients come from.
        update: any `torch.optim.Optimizer` over parameters of the estimator's model.
        constraints: called in turn with this optimizer after every update.
        low_memory: hold one node's gradient at a time. `step` makes them node by node and lets the update move each
            parameter as soon as its gradient is complete; `p.grad` is None afterwards. The result is the same to
            rounding if the update moves every parameter by its own gradient, as SGD, AdamW, Muon and Dion do. Gradients
            are made twice, since all must be finite before the first weight moves. Hooks of the update and constraints
            run once a piece, and see no other parameters than its own; hooks of this optimizer, once a step.

    Attributes:
        last: the `Estimate` of the latest `step(x=..., target=...)`, None before the first.

    Example:
        >>> import mep
        >>> net = nn.Linear(3, 2)
        >>> opt = EPOptimizer(mep.EquilibriumPropagation(net), torch.optim.SGD(net.parameters(), lr=0.1))
        >>> loss = opt.step(x=torch.ones(4, 3), target=torch.zeros(4, dtype=torch.long))
        >>> opt.last.converged
        True
    """

    def __init__(
        self,
        estimator: Estimator,
        update: torch.optim.Optimizer,
        constraints: Sequence[Constraint] = (),
        low_memory: bool = False,
    ):
        require("EPOptimizer", "low_memory", low_memory, *A_FLAG)
        self.low_memory = low_memory
        if low_memory:
            _check_low_memory(estimator, update)
        self.estimator = estimator
        self.update = update
        self.constraints = tuple(constraints)
        self.last: Estimate | None = None
        self._has_said_backprop = False
        self._homes: list[tuple[dict[str, Any], str, Any]] = []
        if isinstance(update, torch.optim.LBFGS):
            raise ArgumentError(
                "EPOptimizer(update=LBFGS): it evaluates the loss several times a step. Way out: torch.optim.LBFGS by "
                "itself, with a closure that calls opt.zero_grad() and returns estimator(x, target).loss."
            )
        super().__init__(update.param_groups, update.defaults)
        self._check_readout()
        self.state = update.state
        self._share()

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.estimator.model

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *positional: Any,
        x: Any = None,
        target: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Any:
        """One update.

        With `x` and `target` the estimator computes the gradients, which replace those in `p.grad`. A `closure` beside
        them, as trainers pass one, is called for its side effects and its value. With a `closure` alone, or with
        `p.grad` already filled, it is an ordinary optimizer step on what `backward()` made; of a closure alone a
        warning says so once. If a batch is refused or settling diverges, parameters, gradients and state stay exactly
        as they were. So they do when the estimate is interrupted; an update is finished before Ctrl-C takes effect.

        Args:
            closure: fills `p.grad` and returns the loss.
            x: the input of a batch, [batch, ...].
            target: what the cost expects.
            indices: the places of the examples in the data set, [batch], for estimators that keep their equilibria.

        Returns:
            What the closure returned, or else the mean cost at the free equilibrium (0-dim tensor), or None.
        """
        loss = None
        if positional or (closure is not None and not callable(closure)):
            raise ArgumentError(f"step({type(closure).__name__}): batches go by name, step(x=inputs, target=labels).")
        if x is not None or target is not None:
            if x is None or target is None:
                raise ArgumentError("step(...): pass x and target together.")
            self._check_owned()
            value = None if closure is None else self._called(closure)
            known = {} if indices is None else {"indices": indices}
            if self.low_memory:
                loss = self._step_in_pieces(x, target, **known)
                return loss if closure is None else value
            gradients, estimate = self.estimator.gradients(x, target, **known)
            moved = {}
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
                    if (gradient := gradients.get(p)) is not None:
                        moved[p] = gradient
            accumulate(moved)
            self.last, loss = estimate, estimate.loss if closure is None else value
        elif self.low_memory:
            raise ArgumentError("step(): low_memory=True makes its own gradients. Call step(x=inputs, target=labels).")
        elif closure is not None:
            self._say_that_this_is_backprop()
            with torch.enable_grad():
                loss = closure()
        elif all(p.grad is None for p in self._parameters()):
            raise ArgumentError(
                "step() has nothing to do: no x and target, no closure, and no parameter has a gradient. "
                "Call step(x=inputs, target=labels)."
            )
        with uninterrupted():
            self._move()
        return loss

    def _called(self, closure: Callable[[], Any]) -> Any:
        """The value of a closure; what its forward pass wrote to buffers is undone, since the step writes them, too."""
        buffers = Buffers(self.model)
        with torch.enable_grad():
            value = closure()
        buffers.undo()
        return value

    def _say_that_this_is_backprop(self) -> None:
        if not self._has_said_backprop and hasattr(self.estimator, "solver"):
            self._has_said_backprop = True
            warn(
                "step(closure): the closure's backward() makes the gradients, so this is backpropagation with the "
                f"update of {type(self.update).__name__}. For equilibrium propagation pass the batch, step(closure, "
                "x=inputs, target=labels), or call the estimator in place of loss.backward(): opt.estimator(x, y).",
                UserWarning,
            )

    def _check_owned(self) -> None:
        """Refuse parameters that the model no longer has. Where each was found last is looked at first."""
        is_found = bool(self._homes)
        for home, key, p in self._homes:
            is_found = is_found and home.get(key) is p
        if is_found:
            return
        found, modules = homes_of(self.estimator)
        own = self._parameters()
        lost = [tuple(p.shape) for p in own if p not in found]
        self._homes = [] if lost else [*((*found[p], p) for p in own), *modules]
        if lost:
            raise ParameterError(
                f"{len(lost)} parameters of the optimizer, of shapes {lost[:3]}, are not in "
                f"{type(self.model).__name__} any more: a layer was replaced, or a state was loaded with assign=True. "
                "Nothing was changed. Way out: build the optimizer anew, from model.parameters()."
            )

    def _check_readout(self) -> None:
        """Refuse a readout, or feedback weights, whose trained parameters would never move."""
        readout, own = getattr(self.estimator, "readout", None), set(self._parameters())
        trained = [] if readout is None else [p for p in readout.parameters() if p.requires_grad]
        missing = [tuple(p.shape) for p in trained if p not in own]
        if missing:
            raise ParameterError(
                f"{len(missing)} parameters of the readout, of shapes {missing[:3]}, are not in the optimizer, so that "
                "they never move. Way out: give it [*model.parameters(), *readout.parameters()]; or freeze them, "
                "readout.requires_grad_(False)."
            )
        fixed = [n for n, b in getattr(self.estimator, "feedback", {}).items() if b.requires_grad and b not in own]
        if fixed:
            raise ParameterError(
                f"The feedback weights for {', '.join(fixed)} are not in the optimizer, so that they never move. Way "
                "out: give it [*model.parameters(), *feedback.values()]; or freeze them, B.requires_grad_(False)."
            )

    def _step_in_pieces(self, x: Any, target: Tensor, **known: Any) -> Tensor:
        """Every parameter moves as soon as its gradient is there, which is then dropped.

        For that time the groups hold no other parameters: a step over all of them for every node would take a time
        that grows with the square of the depth.
        """
        estimator: Any = self.estimator
        pieces, last = estimator.iter_gradients(x, target, **known)
        self.last = last
        every = [group["params"] for group in self.param_groups]
        home = {p: i for i, params in enumerate(every) for p in params}
        self.zero_grad()
        with uninterrupted():
            try:
                for piece in pieces:
                    moving: list[list[nn.Parameter]] = [[] for _ in every]
                    for p in [p for p in piece if p in home]:
                        accumulate({p: piece[p]})
                        moving[home[p]].append(p)
                    piece.clear()  # `p.grad` alone holds them, so that they are gone before the next are made
                    self._set_params(moving)
                    if any(moving):
                        self._move()
                    self.zero_grad()
            finally:
                self._set_params(every)
                self.zero_grad()
        return self.last.loss

    def _set_params(self, params: Sequence[list[nn.Parameter]]) -> None:
        for group, members in zip(self.param_groups, params, strict=True):
            group["params"] = members

    def _move(self) -> None:
        self.update.step()
        for constrain in self.constraints:
            constrain(self)

    def predict(self, x: Any) -> Tensor:
        """The output of the free equilibrium; for the prediction energy and for backprop that is `model(x)`."""
        return self.estimator.predict(x)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with options of their own.

        Raises:
            ParameterError: a parameter is not the model's.
        """
        if self.param_groups is self.update.param_groups:
            self.update.add_param_group(param_group)
        else:  # under construction: the update has checked these groups already
            super().add_param_group(param_group)
        owned = homes_of(self.estimator)[0]
        self._homes = []
        foreign = [tuple(p.shape) for p in self.param_groups[-1]["params"] if p not in owned]
        if foreign:
            del self.param_groups[-1]
            raise ParameterError(
                f"{len(foreign)} parameters, of shapes {foreign[:3]}..., do not belong to {type(self.model).__name__}. "
                "Pass model.parameters() of the same model; after copy.deepcopy(opt) that is opt.model."
            )

    def state_dict(self) -> dict[str, Any]:
        """The update's state and parameter groups, and the estimator's memory under "estimator"."""
        return {**super().state_dict(), "estimator": self.estimator.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit; one of the bare update will do as well."""
        super().load_state_dict(dict(state_dict))
        if "estimator" in state_dict:
            self.estimator.load_state_dict(state_dict["estimator"])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _OWN}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._homes = []
        self._share()

    def _share(self) -> None:
        """Let the update work on the very groups and state that users of this optimizer see."""
        self.update.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]


_OWN = ("estimator", "update", "constraints", "last", "low_memory", "_has_said_backprop")


Home = tuple[dict[str, Any], str]
"""A dictionary of a module's, and a key of it."""


def homes_of(estimator: Estimator) -> tuple[dict[nn.Parameter, Home], list[tuple[dict[str, Any], str, Any]]]:
    """Where the parameters of an estimator's model, cost, readout, groups and feedback stand; and modules."""
    others = [getattr(estimator, "cost", None), getattr(estimator, "readout", None), *getattr(estimator, "groups", ())]
    feedback: dict[str, Any] = getattr(estimator, "feedback", {})
    parameters: dict[nn.Parameter, Home] = {
        b: (feedback, n) for n, b in feedback.items() if isinstance(b, nn.Parameter)
    }
    modules: list[tuple[dict[str, Any], str, Any]] = []
    for root in (estimator.model, *(other for other in others if isinstance(other, nn.Module))):
        for module in root.modules():
            own, inner = dict(module._parameters.items()), dict(module._modules.items())
            home = module._parameters if isinstance(module._parameters, dict) else own
            parameters |= {p: (home, key) for key, p in own.items() if p is not None}
            if isinstance(module._modules, dict):
                modules += [(module._modules, key, child) for key, child in inner.items()]
    return parameters, modules


def _check_low_memory(estimator: Estimator, update: torch.optim.Optimizer) -> None:
    """Refuse at once what needs all gradients together."""
    call, kind = "EPOptimizer(low_memory=True", type(update).__name__
    if not hasattr(estimator, "iter_gradients"):
        made = type(estimator).__name__
        raise ArgumentError(f"{call}, estimator={made}(...)): it makes all gradients at once. Leave low_memory out.")
    if getattr(estimator, "compile", False):
        raise ArgumentError(f"{call}): a compiled step makes all gradients at once. Leave out low_memory or compile.")
    if getattr(update, "couples_parameters", False):
        raise ArgumentError(f"{call}, update={kind}(...)): it looks at all gradients at once. Leave low_memory out.")
