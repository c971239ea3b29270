"""What is asserted, and what to say and do where it does not hold.

| asserted | bound | why |
|---|---|---|
| cosine with backprop | > 0.99 | below it some part of the signal is missing, or the wrong way round |
| norm ratio | within 0.1 of 1 | a lost factor leaves the direction as it is |
| order in beta | > theory - 0.2 | the theorem; an error that does not vanish with beta is none of beta's |
| backprop against differences | < 1e-3 | backprop is the yardstick only if it is right itself |
| EP against differences | < 0.2 | what the cosine leaves (0.14), and the differences' own error |
| residual | <= tol | the states are an equilibrium, whatever the solver reported |

The first three hold at the smallest beta, or the error is at rounding; there every example has settled, too. At a
larger beta it need not: a nudge away from the target may have no equilibrium. Of `branches="exact"` the order is only
asserted to be 1: near a kink the equilibrium is no smooth function of beta.
"""

from __future__ import annotations

from collections.abc import Sequence

from mep.settle import Result
from mep.verification.differences import CLOSE
from mep.verification.gradients import ORDERS
from mep.verification.report import Estimation, Parameter

COSINE = 0.99
RATIO = 0.1
SLACK = 0.2
EP_CLOSE = 0.2
_WHOLE = "keep the module around it whole with leaves=(ThatModule,), and please report the model"


def failure_reason(parameter: Parameter, phases: str, branches: str) -> str | None:
    """What is wrong with one parameter's gradient of one contrast; None if nothing is."""
    last = parameter.matches[phases][-1]
    if last.error <= parameter.rounding:
        return None
    if last.cosine is not None and not last.cosine > COSINE:
        return f"the cosine of the EP gradient with backprop's is {last.cosine:.3f} at beta {last.beta:.2g}"
    if last.ratio is not None and not abs(last.ratio - 1) < RATIO:
        return f"the EP gradient has {last.ratio:.3g} times the size of backprop's at beta {last.beta:.2g}"
    order, expected = parameter.order[phases], 1 if branches == "exact" else ORDERS[phases]
    if order is None or not order > expected - SLACK:
        slope = "cannot be fitted" if order is None else f"is {order:.2f}"
        size = f"at beta {last.beta:.2g} it is {last.error:.1e}"
        return f"the order in beta of its error {slope}, it should be {expected}; {size}"
    return None


def failures(
    parameters: Sequence[Parameter], estimations: Sequence[Estimation], tol: float, branches: str
) -> tuple[str, ...]:
    """One sentence a contrast, a kind of check and an equilibrium that fails."""
    smallest = {e.phases: e for e in sorted(estimations, key=lambda e: -e.beta)}
    found = [_gradients(parameters, phases, branches) for phases in dict.fromkeys(e.phases for e in estimations)]
    found.append(_backprop(parameters))
    if not any(found):
        found.append(_ep(parameters))
    found += [_unsettled(e, tol) for e in estimations if e is smallest[e.phases]]
    found += [_false(e, tol) for e in estimations]
    return tuple(text for text in found if text)


def _gradients(parameters: Sequence[Parameter], phases: str, branches: str) -> str | None:
    """Signals come from the output, so the wrong parameter nearest to it tells most."""
    wrong = [(p.name, text) for p in parameters if (text := failure_reason(p, phases, branches))]
    if not wrong:
        return None
    name, text = wrong[-1]
    before = f" {len(wrong) - 1} before it: wrong too." if len(wrong) > 1 else ""
    return f"`{name}` ({phases}): {text}.{before} Way out: {_WHOLE}."


def _has_settled(e: Estimation) -> bool:
    """Whether all examples have, as the solver reported."""
    return e.result == str(Result.CONVERGED)


def _unsettled(e: Estimation, tol: float) -> str | None:
    if _has_settled(e):
        return None
    return (
        f"Node `{e.worst}`: not settled at beta {e.beta:.2g} ({e.phases}), residual {e.residual:.1e} after {e.sweeps} "
        f"sweeps, tol {tol:.1e}: {e.result}. Way out: smaller betas, branches='held', smooth activations, or "
        "normalisation."
    )


def _false(e: Estimation, tol: float) -> str | None:
    """A certificate that does not hold."""
    if not _has_settled(e) or e.recomputed <= tol + e.rounding:
        return None
    return (
        f"Node `{e.worst}`: the residual of its state at beta {e.beta:.2g} ({e.phases}) is {e.recomputed:.1e}, and the "
        f"solver reported {e.residual:.1e}. Way out: {_WHOLE}."
    )


def _backprop(parameters: Sequence[Parameter]) -> str | None:
    wrong = [p for p in parameters if p.backprop_difference is not None and not p.backprop_difference < CLOSE]
    if not wrong:
        return None
    return (
        f"`{wrong[-1].name}`: backprop is {wrong[-1].backprop_difference:.1e} from finite differences of the cost. The "
        "model has a backward of its own that is no derivative (a straight-through estimator?), a jump, or noise from "
        "outside torch. Way out: mend it, or if it is meant so, samples=0."
    )


def _ep(parameters: Sequence[Parameter]) -> str | None:
    wrong = [p for p in parameters if p.ep_difference is not None and not p.ep_difference < EP_CLOSE]
    if not wrong:
        return None
    return (
        f"`{wrong[-1].name}`: the EP gradient is {wrong[-1].ep_difference:.1e} from finite differences of the cost. "
        f"Way out: {_WHOLE}."
    )
