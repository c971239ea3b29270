"""What `verify` found: numbers, and what they amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

NONE = "—"


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
        """Verdict, failures, notes and a table of the parameters."""
        found = self.as_dict()
        titles, rows = parameter_table(found)
        return "\n".join([*sentences(found), "", _columns([titles, *rows])])


Table = tuple[list[str], list[list[str]]]
"""Titles and rows."""


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The verdict, and what there is to say beside."""
    estimations = report["estimations"]
    residual, sweeps = (max(e[key] for e in estimations) for key in ("recomputed", "sweeps"))
    tried = "" if report["beyond"] is None else f", {report['beyond']:.3g} does not"
    reach = "no beta tried settles" if report["reach"] is None else f"beta {report['reach']:.3g} settles{tried}"
    settled = f"residual {residual:.0e} at most, {sweeps} sweeps at most; by default {reach}."
    found, count = report["failures"], len(report["parameters"])
    verdict = (
        f"OK: equilibrium propagation gives backprop's gradient for {count} of {count} parameters; {settled}"
        if report["ok"]
        else f"NOT OK, {len(found)} failure{'s' if len(found) > 1 else ''}; {settled}"
    )
    return [verdict, *(f"Failure: {text}" for text in found), *(f"Note: {text}" for text in report["notes"])]


def parameter_table(report: Mapping[str, Any]) -> Table:
    """A row a parameter: cosine and norm ratio at the smallest beta, fitted order, finite differences."""
    titles = ["Parameter", "|gradient|"]
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
    titles = ["Contrast", "beta", "error", "sweeps", "unsettled", "residual", "recomputed", "off branch"]
    rows = [
        [
            e["phases"],
            f"{e['beta']:.3g}",
            f"{e['error']:.1e}",
            str(e["sweeps"]),
            str(e["unsettled"]),
            f"{e['residual']:.0e}",
            f"{e['recomputed']:.0e}",
            f"{e['left_branch']:.1%}",
        ]
        for e in report["estimations"]
    ]
    return titles, rows


def _cell(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
