r"""Natural gradient: steepest descent where length is the change of the model's predictions, as K-FAC estimates it.

    B <- momentum B + g,   D = g + momentum B  if nesterov  else B
    d  = (F + damping)^-1 D                          F ~ A (x) G, a moving average over batches (`curvature.py`)
    nu = min(1, sqrt(kl_clip / (lr^2 <D, d>)))       <D, d> = <d, (F + damping) d>: twice the predicted KL divergence
    W <- (1 - lr weight_decay) W - lr nu d

`<D, d>` is summed over the layers of a parameter group. `orthogonalise=True` bounds the spectral norm of the whitened
update instead: `d = F^-1/2 O` with O the polar factor of `F^-1/2 D`, and `<d, F d> = |O|^2`.

The factors are computed from each layer's inputs and errors, which `observe` receives (`curvature.Layer`). After a step
of equilibrium propagation these are at hand, without a further backward pass. F is then the *empirical* Fisher matrix:
targets are the data's, not samples from the model.

References: Martens and Grosse 2015, https://arxiv.org/abs/1503.05671; `kl_clip`: Ba, Grosse and Martens 2017,
"Distributed second-order optimization using Kronecker-factored approximations", section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mep.errors import A_FLAG, ArgumentError, DivergedError, require, whole_number
from mep.updates.base import Update, scale_
from mep.updates.curvature import (
    DIAGONAL,
    KRONECKER,
    Fisher,
    Layer,
    Powers,
    bordered_rows,
    cast,
    fisher_of,
    working,
)
from mep.updates.muon import vector_step_
from mep.updates.orthogonal import orthogonalise as polar_factor


class NaturalGradient(Update):
    """Momentum preconditioned by Kronecker factors of the Fisher matrix, or by its diagonal.

    A weight and the bias in the same parameter group are one matrix, the bias its last column. A parameter for which
    no layer was ever observed (gains, embeddings, grouped convolutions, ...) takes the SGD step with the same momentum.
    State: `momentum_buffer`, and for a weight `moments` (averaged, with their `mass`), their `powers` with the
    `exponent`, the place of its `bias` in the group, and how often it was `observed`. Every keyword may differ between
    parameter groups; `kl_clip` bounds the step of each group by itself.

    Args:
        params: parameters or parameter groups.
        lr: step in units of the natural gradient.
        momentum: decay of the momentum buffer in [0, 1); 0 keeps no buffer.
        nesterov: look one step ahead along the momentum.
        weight_decay: decoupled: each step first shrinks the parameters by `1 - lr * weight_decay`.
        damping: added to the Fisher matrix, positive.
        kl_clip: the step is shortened until twice its predicted KL divergence is at most this; None for no bound.
        decay: of the moving average of the factors, in [0, 1).
        factors_every: steps from one batch that enters the average to the next.
        inverse_every: steps from one inversion to the next.
        rank: a factor wider than twice this keeps that many eigenvalues apart, and the mean of all others; None keeps
            all.
        use_diagonal_fisher: the diagonal of the Fisher matrix instead of its Kronecker factors; `rank` is then moot.
        orthogonalise: make all singular values of the whitened update one.
        vector_scale: learning rate of parameters without factors in units of `lr`, so that a schedule drives both.

    Raises:
        ArgumentError: a keyword out of its range; in `step`, nothing was observed, or a sparse or complex gradient.
        DivergedError: in `observe`, a factor is not finite; then nothing was changed.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Linear(3, 2)
        >>> update = NaturalGradient(net.parameters(), lr=0.1)
        >>> opt = mep.EPOptimizer(mep.EquilibriumPropagation(net, observe=update.observe), update)
        >>> loss = opt.step(x=torch.eye(3), target=torch.tensor([0, 1, 1]))
        >>> sorted(opt.state[net.weight]["moments"])
        ['errors', 'inputs']
    """

    couples_parameters = True
    """One step is scaled by the sum over all parameters: `EPOptimizer` cannot let them move one by one."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.05,
        momentum: float = 0.8,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 0.03,
        kl_clip: float | None = 0.02,
        decay: float = 0.9,
        factors_every: int = 20,
        inverse_every: int = 20,
        rank: int | None = 32,
        use_diagonal_fisher: bool = False,
        orthogonalise: bool = False,
        vector_scale: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "kl_clip": kl_clip,
            "decay": decay,
            "factors_every": factors_every,
            "inverse_every": inverse_every,
            "rank": rank,
            "use_diagonal_fisher": use_diagonal_fisher,
            "orthogonalise": orthogonalise,
            "vector_scale": vector_scale,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any], call: str) -> None:
        left_out = [name for name in ("kl_clip", "rank") if group[name] is None]
        for name in ("damping", "kl_clip"):
            if name not in left_out:
                require(call, name, group[name], lambda value: 0 < value < math.inf, "above 0 and finite")
        require(call, "decay", group["decay"], lambda decay: 0 <= decay < 1, "at least 0 and below 1")
        for name in ("factors_every", "inverse_every", "rank"):
            if name not in left_out:
                require(call, name, group[name], *whole_number(1))
        for name in ("use_diagonal_fisher", "orthogonalise"):
            require(call, name, group[name], *A_FLAG)

    @torch.no_grad()
    def observe(self, layers: Iterable[Layer]) -> None:
        """Add a batch to the factors, all of it or nothing; call it before every `step`.

        Args:
            layers: the weights of the batch; those that this optimizer does not train are passed over.
        """
        places = {p: (group, at) for group in self.param_groups for at, p in enumerate(group["params"])}
        changes = {}
        for layer in layers:
            if layer.weight in places:
                group, _ = places[layer.weight]
                beside, at = places.get(layer.bias, (None, None))
                changes[layer.weight] = self._observed(layer, group, at if beside is group else None)
        for weight, change in changes.items():
            self.state[weight].update(change)

    def _observed(self, layer: Layer, group: dict[str, Any], bias: int | None) -> dict[str, Any]:
        """The new entries in the state of a weight; `bias` is the place of its bias in the group."""
        fisher = DIAGONAL if group["use_diagonal_fisher"] else KRONECKER
        exponent = -0.5 if group["orthogonalise"] else -1.0
        state = self.state.get(layer.weight, {})
        if state.get("bias") != bias or fisher_of(state.get("moments", {})) is not fisher:
            state = {}  # other keywords than before: start anew
        count = state.get("observed", 0)
        change: dict[str, Any] = {"observed": count + 1, "bias": bias}
        if count % group["factors_every"] == 0:
            change |= _averaged(layer, bias is not None, fisher, state, group["decay"])
        if count % group["inverse_every"] == 0 or state["exponent"] != exponent:
            change |= {"powers": _inverted({**state, **change}, exponent, group), "exponent": exponent}
        return cast(change, layer.weight.dtype)  # where `load_state_dict` would put it

    def _step_group_(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not any("powers" in state for state in self.state.values()):
            raise ArgumentError(
                "NaturalGradient.step: no layer was ever observed, so there is no Fisher matrix. Use mep.natural_ep, "
                "or pass observe=update.observe to mep.EquilibriumPropagation. If no layer of the model is a linear "
                "layer or an ungrouped convolution, use another update."
            )
        directions = dict(zip(params, self._directions(group, params), strict=True))
        natural, squared = self._natural(group, directions)
        others = [p for p in params if p not in natural]
        if others:
            vector_step_(others, [directions[p] for p in others], group)
        lr = size = float(group["lr"])  # size = lr nu
        if group["kl_clip"] is not None and lr**2 * squared > group["kl_clip"]:
            size = math.sqrt(group["kl_clip"] / squared)
        scale_(list(natural), 1 - lr * group["weight_decay"])
        for p, d in natural.items():
            p.add_(d, alpha=-size)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def _natural(self, group: dict[str, Any], directions: dict[Tensor, Tensor]) -> tuple[dict[Tensor, Tensor], float]:
        """The natural direction d of every weight with factors and of its bias, and `<d, F d>` of all together."""
        natural: dict[Tensor, Tensor] = {}
        lengths = []
        for weight, direction in directions.items():
            state = self.state.get(weight, {})
            if "powers" not in state:
                continue
            matrix = working(direction.flatten(1))
            bias = None if state["bias"] is None else group["params"][state["bias"]]
            if bias is not None:
                last = directions[bias] if bias in directions else torch.zeros_like(bias)
                matrix = torch.cat([matrix, last.to(matrix.dtype).unsqueeze(1)], 1)
            d, squared = _natural_direction(matrix, cast(state["powers"], matrix.dtype), state["exponent"])
            lengths.append(squared)
            if bias is not None:
                if bias in directions:
                    natural[bias] = d[:, -1]
                d = d[:, :-1]
            natural[weight] = d.reshape(weight.shape)
        return natural, float(sum(lengths))


def _natural_direction(matrix: Tensor, powers: Powers, exponent: float) -> tuple[Tensor, Tensor]:
    """The direction d and `<d, F d>`; of the orthogonalised update with `exponent` -1/2, roots of the factors."""
    fisher = fisher_of(powers)
    d = fisher.apply(powers, matrix)
    if exponent == -1:
        return d, torch.dot(matrix.flatten(), d.flatten())
    polar = polar_factor(d)
    return fisher.apply(powers, polar), polar.square().sum()


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _averaged(layer: Layer, with_bias: bool, fisher: Fisher, state: dict[str, Any], decay: float) -> dict[str, Any]:
    """The moving average, and its `mass`, the sum of its weights: divided by that, it is not biased toward zero."""
    inputs, errors = bordered_rows(layer, with_bias)
    previous = cast(state.get("moments", {}), inputs.dtype)
    moments = cast(fisher.moments(inputs, errors, layer.examples, previous, decay), layer.weight.dtype)
    if not math.isfinite(sum(float(moment.sum()) for moment in moments.values())):
        raise DivergedError(
            "NaturalGradient.observe: the second moment of a layer is not finite. Nothing was changed. Way out: a "
            "smaller learning rate, inputs of a smaller scale, or weights in float32."
        )
    return {"moments": moments, "mass": decay * state.get("mass", 0.0) + 1 - decay}


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _inverted(state: dict[str, Any], exponent: float, group: dict[str, Any]) -> Powers:
    """The damped powers of the averaged moments."""
    moments = {name: working(moment) / state["mass"] for name, moment in state["moments"].items()}
    previous = state.get("powers", {})
    return fisher_of(moments).powers(moments, group["damping"], exponent, group["rank"], previous)
