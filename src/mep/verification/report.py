"""What `verify` found: the numbers, what is asserted of them, and their tables.

| asserted | bound | why |
|---|---|---|
| cosine with backprop | > 0.99 | below it some part of the signal is missing, or has the wrong sign |
| norm ratio | within 0.1 of 1 | a lost factor leaves the direction as it is |
| order in beta | > theory - 0.2 | the theorem; an error that does not vanish with beta is not caused by beta |
| backprop against finite differences | < 1e-3 | backprop is the yardstick only if it is right itself |
| EP against finite differences | < 0.2 | what the cosine leaves (0.14), and the differences' own error |
| residual | <= tol | the states are an equilibrium, whatever the solver reported |
| `ds`, `dmu` against autograd through `energy` | < 1e-3 | where the energy is one's own |

The first three hold at the smallest beta, or the error is at rounding; there every example has settled, too. At a
larger beta it need not: a nudge away from the target may have no equilibrium. Of `branches="exact"` the order is only
asserted to be 1: near a kink the equilibrium is no smooth function of beta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mep.settle import Result

COSINE, RATIO, SLACK, EP_CLOSE = 0.99, 0.1, 0.2, 0.2
CLOSE = 1e-3
"""Relative distance at which differences and backprop agree: far above what the step h costs on smooth functions."""
ORDERS = {"one-sided": 1, "centered": 2}
"""Contrast -> its order in beta; see `mep.estimators.contrast`."""
NONE = "—"
_WHOLE = "keep the module around it whole with leaves=(ThatModule,), and please report the model"


# The numbers.


@dataclass(frozen=True)
class GradientMatch:
    """The EP gradient g of one parameter beside backprop's gradient b.

    Attributes:
        beta: the nudging strength.
        cosine: `<g, b> / |g| |b|`; None where b vanishes.
        ratio: `|g| / |b|`; None where b vanishes.
        error: `|g - b| / |b|`, or where b vanishes the error in units of its rounding.
    """

    beta: float
    cosine: float | None
    ratio: float | None
    error: float


@dataclass(frozen=True)
class Parameter:
    """One trained parameter.

    Attributes:
        name: as in `named_parameters`.
        shape: its shape.
        norm: of backprop's gradient.
        rounding: the `error` below which g and b cannot be told apart.
        matches: contrast -> one a beta, the largest beta first.
        order: contrast -> slope of log error over log beta, where all examples settled; None where the error is at
            rounding.
        backprop_difference: distance of backprop's gradient from finite differences, relative, over sampled
            coordinates; None if none were taken or if they are too coarse.
        ep_difference: that of the EP gradient at the smallest beta of the contrast of highest order.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    rounding: float
    matches: dict[str, tuple[GradientMatch, ...]]
    order: dict[str, float | None]
    backprop_difference: float | None
    ep_difference: float | None


@dataclass(frozen=True)
class Estimation:
    """One EP estimate.

    Attributes:
        phases: the contrast.
        beta: the nudging strength.
        error: `|g - b| / |b|` over all parameters.
        sweeps: the most of any phase.
        result: how settling ended.
        unsettled: the number of examples that did not settle.
        residual: the largest that the solver reported.
        recomputed: the largest relative residual, recomputed from the states alone.
        rounding: what `recomputed` may exceed the tolerance by.
        worst: the node where it is largest.
        left_branch: fraction of piecewise-linear units beyond their kink.
    """

    phases: str
    beta: float
    error: float
    sweeps: int
    result: str
    unsettled: int
    residual: float
    recomputed: float
    rounding: float
    worst: str
    left_branch: float


@dataclass(frozen=True)
class ResidualTrace:
    """How the residual falls: `residuals[node][i]` is its largest, over the examples, after `sweeps[i]` sweeps."""

    beta: float
    sweeps: tuple[int, ...]
    residuals: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Report:
    """What `mep.verify` found; `print(report)` shows it, `report.as_dict()` is ready for JSON.

    Attributes:
        failures: what is wrong and what to do; empty if all is well.
        notes: what to know beside.
        tol: the residual to which the equilibria were settled.
        estimations: one a contrast and beta, the largest beta first.
        orders: contrast -> slope of log error over log beta, where all examples settled, over all parameters.
        parameters: one each.
        stall: how the residual falls from sweep to sweep.
        reach: the largest beta tried that settles with the default solver, None if none did.
        beyond: the smallest beta tried that does not, None if all did.
    """

    failures: tuple[str, ...]
    notes: tuple[str, ...]
    tol: float
    estimations: tuple[Estimation, ...]
    orders: dict[str, float | None]
    parameters: tuple[Parameter, ...]
    stall: ResidualTrace
    reach: float | None
    beyond: float | None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """All of it, in plain dictionaries and numbers."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        """Verdict, failures, notes and a table of the parameters in aligned columns."""
        found = self.as_dict()
        titles, rows = parameter_table(found)
        rows = [titles, *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join([*sentences(found), "", *lines])


# What is asserted.


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
    """A sentence for each kind of check that fails: of each contrast, or of each node.

    Of several parameters the last is named: signals come from the output, so the error nearest to it causes the others.
    """
    smallest = {e.phases: e for e in estimations}  # the smallest beta comes last
    found = []
    for phases in smallest:
        wrong = [(p.name, text) for p in parameters if (text := failure_reason(p, phases, branches))]
        if wrong:
            before = f" {len(wrong) - 1} before it: wrong too." if len(wrong) > 1 else ""
            found.append(f"`{wrong[-1][0]}` ({phases}): {wrong[-1][1]}.{before} Way out: {_WHOLE}.")
    far = [p for p in parameters if p.backprop_difference is not None and not p.backprop_difference < CLOSE]
    if far:
        found.append(
            f"`{far[-1].name}`: backprop is {far[-1].backprop_difference:.1e} from finite differences of the cost. The "
            "model has a backward of its own that is no derivative (a straight-through estimator?), a jump, or noise "
            "from outside torch. Way out: mend it, or if it is meant so, samples=0."
        )
    far = [p for p in parameters if p.ep_difference is not None and not p.ep_difference < EP_CLOSE]
    if far and not found:
        found.append(
            f"`{far[-1].name}`: the EP gradient is {far[-1].ep_difference:.1e} from finite differences of the cost. "
            f"Way out: {_WHOLE}."
        )
    converged = str(Result.CONVERGED)
    found += [
        f"Node `{e.worst}`: not settled at beta {e.beta:.2g} ({e.phases}), residual {e.residual:.1e} after {e.sweeps} "
        f"sweeps, tol {tol:.1e}: {e.result}. Way out: smaller betas, branches='held', smooth activations, or "
        "normalisation."
        for e in smallest.values()
        if e.result != converged
    ]
    wrong_nodes: dict[str, list[Estimation]] = {}
    for e in estimations:
        if e.result == converged and e.recomputed > tol + e.rounding:
            wrong_nodes.setdefault(e.worst, []).append(e)
    for node, own in wrong_nodes.items():
        e = max(own, key=lambda e: e.recomputed)
        often = f", the largest of {len(own)} in {len(estimations)} equilibria" if len(own) > 1 else ""
        found.append(
            f"Node `{node}`: the residual of its state at beta {e.beta:.2g} ({e.phases}) is {e.recomputed:.1e}{often}, "
            f"and the solver reported {e.residual:.1e}. Way out: {_WHOLE}."
        )
    return tuple(found)


# The tables; they read `Report.as_dict()`, so that a record can be shown again.

Table = tuple[list[str], list[list[str]]]
"""Titles and rows."""


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The verdict, the failures and the notes."""
    estimations = report["estimations"]
    residual, sweeps = (max(e[key] for e in estimations) for key in ("recomputed", "sweeps"))
    tried = "" if report["beyond"] is None else f", {report['beyond']:.3g} does not"
    reach = "no beta tried settles" if report["reach"] is None else f"beta {report['reach']:.3g} settles{tried}"
    settled = f"residual {residual:.0e} at most, {sweeps} sweeps at most; with the default solver {reach}."
    found, count = report["failures"], len(report["parameters"])
    verdict = (
        f"OK: equilibrium propagation gives backprop's gradient for {count} of {count} parameters; {settled}"
        if report["ok"]
        else f"NOT OK, {len(found)} failure{'s' if len(found) > 1 else ''}; {settled}"
    )
    return [verdict, *(f"Failure: {text}" for text in found), *(f"Note: {text}" for text in report["notes"])]


def parameter_table(report: Mapping[str, Any]) -> Table:
    """A row a parameter: cosine and norm ratio at the smallest beta, fitted order, finite differences."""
    titles = ["Parameter", "norm"]
    for phases in report["orders"]:
        titles += [f"{phases}: cosine", "ratio", "order"]
    rows = []
    for p in report["parameters"]:
        row = [p["name"], f"{p['norm']:.1e}"]
        for phases, matches in p["matches"].items():
            last = matches[-1]
            row += [_cell(last["cosine"], ".5f"), _cell(last["ratio"], ".4f"), _cell(p["order"][phases], ".2f")]
        rows.append([*row, _cell(p["backprop_difference"], ".0e"), _cell(p["ep_difference"], ".0e")])
    return [*titles, "FD: backprop", "FD: EP"], rows


def estimation_table(report: Mapping[str, Any]) -> Table:
    """A row a contrast and beta: error, sweeps, residuals, kinks."""
    forms = {
        "phases": "", "beta": ".3g", "error": ".1e", "sweeps": "", "unsettled": "", "residual": ".0e",
        "recomputed": ".0e", "left_branch": ".1%",
    }  # fmt: skip
    titles = ["Contrast", *list(forms)[1:-1], "off branch"]
    return titles, [[format(e[key], form) for key, form in forms.items()] for e in report["estimations"]]


def _cell(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
