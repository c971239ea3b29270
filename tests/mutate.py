"""Does the suite notice when the core is wrong? Changes one expression at a time, and lists the changes no test minds.

    python tests/mutate.py --sample 40 --seed 1
    python tests/mutate.py --only energy.py solvers/sweep.py
    python tests/mutate.py --list

The package is copied to a temporary folder and changed there; tests of `SUITES` run against the copy. A survivor is
either a missing test or a change without effect (an equivalent mutant): look at each. Not part of `make test`.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = "properties settling branches hopfield"
# File or folder of src/mep: the tests to run, likeliest first; `-x` stops at the first that notices.
SUITES = {
    "energy.py": f"groups open_engine {CORE}",
    "settle.py": "settling traps descent",
    "cost.py": "beta properties traps settling bad_input readout",
    "layout.py": f"chain layout {CORE}",
    "guards.py": "interrupts faults",
    "graph/closed_forms/potentials.py": "potentials",
    "graph/closed_forms/complex.py": "holomorphic",
    "graph/closed_forms/": f"chain kinks {CORE}",
    "graph/holomorphic.py": "holomorphic",
    "graph/untied.py": "untied",
    "graph/node.py": f"chain {CORE} traps",
    "graph/ops.py": f"chain capture {CORE}",
    "graph/inputs.py": "bad_input",
    "graph/": f"chain capture {CORE}",
    "capture/cache.py": "proof sound_training",
    "capture/kinks.py": "kinks",
    "capture/": "capture proof traps kinks zoo sound_reading sound_training",
    "solvers/descent.py": "descent stiffness settling hopfield",
    "solvers/local.py": "local",
    "solvers/relaxation.py": "relaxation compile",
    "solvers/networks/checkpointed.py": "memory",
    "solvers/networks/nonsmooth.py": "kinks branches",
    "solvers/networks/__init__.py": "coupling settling sweep",
    "solvers/": f"{CORE} sweep local",
    "estimators/clamping.py": "clamping",
    "estimators/contrast.py": f"beta gradient_order random_sign holomorphic {CORE}",
    "estimators/compiled_step.py": "compile",
    "estimators/view.py": "open_engine",
    "estimators/warm_start.py": "warm_start",
    "estimators/": f"{CORE} bad_input optimizer natural faults",
    "updates/constraints.py": "constraints",
    "updates/muon.py": "muon updates",
    "updates/dion.py": "dion updates",
    "updates/orthogonal.py": "orthogonal muon",
    "updates/": "natural updates",
}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
CAUGHT, SURVIVED, SLOW = "caught", "SURVIVED", "slow"


@dataclass(frozen=True)
class Mutant:
    """One changed expression of one file."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def __str__(self) -> str:
        short = " ".join(self.before.split()), " ".join(self.after.split())
        return f"src/mep/{self.file}:{self.line}: {short[0]} -> {short[1]}"


def changes(node: ast.expr) -> Iterator[ast.expr]:
    """Every wrong version of one expression."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node):
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        yield ast.UnaryOp(ast.USub(), node)
        yield node.left
        yield node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
        yield from node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(node.value * 2)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)


def _calls(node: ast.Call) -> Iterator[ast.expr]:
    """Neighbouring arguments exchanged, and a method of a tensor in place or elementwise left out."""
    for i in range(len(node.args) - 1):
        args = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
        yield ast.Call(node.func, args, node.keywords)
    if isinstance(node.func, ast.Attribute) and node.func.attr.rstrip("_") in {"mul", "div", "add", "sub", "clamp"}:
        yield node.func.value


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(n, (ast.JoinedStr, ast.List, ast.Tuple)) or _is_string(n) for n in (node.left, node.right))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """The expressions that compute: no annotations, messages of errors, assertions, or text."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.expr):
            yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "bases"):
                children = value if isinstance(value, list) else [value]
                stack.extend(child for child in children if isinstance(child, ast.AST))


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file of src/mep."""
    text = (ROOT / "src/mep" / file).read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in expressions(ast.parse(text)):
        if node.end_lineno is None or node.end_col_offset is None:
            continue
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        before = text[start:end].decode()
        for changed in changes(node):
            yield Mutant(file, node.lineno, start, end, before, f"({ast.unparse(ast.fix_missing_locations(changed))})")


def tests_of(file: str) -> list[str]:
    """The tests for a file, likeliest first."""
    own = next(names for part, names in SUITES.items() if file == part or (part[-1] == "/" and file.startswith(part)))
    return [f"tests/test_{name}.py" for name in own.split()]


def outcome(mutant: Mutant, copy: Path, seconds: float) -> str:
    """What the tests say of the copy with this mutant; the copy is whole again afterwards."""
    path = copy / "src/mep" / mutant.file
    text = path.read_bytes()
    path.write_bytes(text[: mutant.start] + mutant.after.encode() + text[mutant.end :])
    try:
        return run(tests_of(mutant.file), copy, seconds)
    finally:
        path.write_bytes(text)


def run(tests: list[str], copy: Path, seconds: float) -> str:
    """`CAUGHT`, `SURVIVED`, or `SLOW`: it may never end, and may also be alive on a busy machine."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return SLOW
    return CAUGHT if done.returncode else SURVIVED


def copy_project(to: Path) -> None:
    """Source and tests, and the settings of pytest."""
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)


def files(only: list[str]) -> list[str]:
    """The files of the core, or those of them that are asked for."""
    all_files = sorted(str(p.relative_to(ROOT / "src/mep")) for p in (ROOT / "src/mep").rglob("*.py"))
    core = [f for f in all_files if any(f == part or (part[-1] == "/" and f.startswith(part)) for part in SUITES)]
    return [f for f in core if not only or f in only]


def main() -> int:
    """0 if every mutant was caught, 1 if some survived, 2 if the tests fail by themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by chance; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="files of src/mep")
    parser.add_argument("--seconds", type=float, default=300, help="that the tests of one file may take")
    parser.add_argument("--trust", action="store_true", help="do not first run the tests on the unchanged copy")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    given = parser.parse_args()
    chosen = [m for file in files(given.only) for m in mutants(file)]
    if given.sample and given.sample < len(chosen):
        chosen = random.Random(given.seed).sample(chosen, given.sample)
    if given.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        unchanged = set() if given.trust else {test for m in chosen for test in tests_of(m.file)}
        for test in sorted(unchanged):
            if run([test], Path(folder), given.seconds) != SURVIVED:
                print(f"{test} fails, or takes more than {given.seconds:g} s, without any change.")
                return 2
        found = [judged(m, Path(folder), given.seconds) for m in chosen]
    left = [m for m, said in zip(chosen, found, strict=True) if said == SURVIVED]
    print(f"{len(left)} of {len(chosen)} survived, {found.count(SLOW)} ran out of time", *left, sep="\n")
    return min(len(left), 1)


def judged(mutant: Mutant, copy: Path, seconds: float) -> str:
    """The outcome, told at once."""
    said = outcome(mutant, copy, seconds)
    print(f"{said} {mutant}", flush=True)
    return said


if __name__ == "__main__":
    sys.exit(main())
