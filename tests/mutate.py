"""Does the suite notice when the core is wrong? Changes one expression at a time, and lists the changes no test minds.

    python tests/mutate.py --sample 40 --seed 1
    python tests/mutate.py --only energy.py solvers/sweep.py
    python tests/mutate.py --list

1. Every test is run once under coverage.py: which lines of the package it runs, and how long it takes. This takes as
   long as the suite on one core, and is kept in a file for the next time; what has changed since is measured again.
2. The package is copied to a temporary folder and changed there. Against each change run the tests that run its lines,
   quickest first, until one fails. What runs at import is run by every test of anything in that file.

A survivor is either a missing test or a change without effect (an equivalent mutant): look at each. Not part of `make
test`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import hypothesis  # noqa: F401  (what all tests need is imported here once, and not by each process below)
import pytest
import torch  # noqa: F401
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).parents[1]
CORE = (
    "energy.py", "settle.py", "cost.py", "layout.py", "guards.py",
    "graph/", "capture/", "solvers/", "estimators/", "updates/",
)  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
AT_IMPORT = ""  # instead of the name of a test


@dataclass(frozen=True)
class Mutant:
    """One changed expression of one file, and the lines of the whole expression that it is part of."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str
    lines: range

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
    symmetric = isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
    for i in range(0 if symmetric else len(node.args) - 1):
        args = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
        yield ast.Call(node.func, args, node.keywords)
    if isinstance(node.func, ast.Attribute) and node.func.attr.rstrip("_") in {"mul", "div", "add", "sub", "clamp"}:
        yield node.func.value


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(n, (ast.JoinedStr, ast.List, ast.Tuple)) or _is_string(n) for n in (node.left, node.right))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def expressions(tree: ast.Module) -> Iterator[tuple[ast.expr, range]]:
    """The expressions that compute: no annotations, messages of errors, assertions, or text.

    Each with the lines of the largest expression around it that runs at the same time.
    """
    stack: list[tuple[ast.AST, range | None]] = [(tree, None)]
    while stack:
        node, lines = stack.pop()
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, (ast.stmt, ast.Lambda)):
            lines = None
        elif isinstance(node, ast.expr):
            lines = lines or range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield node, lines
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "bases"):
                children = value if isinstance(value, list) else [value]
                stack.extend((child, lines) for child in children if isinstance(child, ast.AST))


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file of src/mep."""
    text = (ROOT / "src/mep" / file).read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, lines in expressions(ast.parse(text)):
        if node.end_lineno is None or node.end_col_offset is None:
            continue
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        before = text[start:end].decode()
        for changed in changes(node):
            after = f"({ast.unparse(ast.fix_missing_locations(changed))})"
            yield Mutant(file, node.lineno, start, end, before, after, lines)


class Alone:
    """A plugin of pytest: runs given tests in the given order, each as if it were the only one.

    Fixtures and caches are made anew for each. A test that takes far longer than it should fails.
    """

    def __init__(self, expected: dict[str, float] | None = None) -> None:
        self.expected = expected
        self.failed: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.expected is not None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.expected if name in found]

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        for module in list(sys.modules.values()):
            for value in list(vars(module).values()) if _is_ours(module) else ():
                if isinstance(value, type(functools.cache(int))):
                    value.cache_clear()
        self.run(item)
        return True

    def run(self, item: pytest.Item) -> None:
        limit = 60 + 10 * self.expected[item.nodeid] if self.expected else 0
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, limit, limit)
        reports = runtestprotocol(item, nextitem=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if any(report.failed for report in reports):
            self.failed.append(item.nodeid)


def _is_ours(module: object) -> bool:
    return str(getattr(module, "__file__", None)).startswith(os.getcwd())


def _too_long(*_: object) -> None:
    raise TimeoutError("the test takes far longer than without the change")


class Measured(Alone):
    """A plugin of pytest: which lines each test runs, and how long it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(data_file=None, config_file=False, source=["src/mep"])

    def run(self, item: pytest.Item) -> None:
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        super().run(item)
        self.seconds[item.nodeid] = time.perf_counter() - start
        self.coverage.switch_context(AT_IMPORT)

    def lines(self) -> dict[str, dict[str, int]]:
        """Of each test, by file, the lines that it runs, as the bits of a number."""
        lines: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        data = self.coverage.get_data()
        for path in data.measured_files():
            file = str(Path(path).relative_to(Path("src/mep").resolve()))
            for line, tests in data.contexts_by_lineno(path).items():
                for test in tests:
                    lines[test][file] |= 1 << line
        return {test: dict(own) for test, own in lines.items()}


def measure(part: str) -> dict[str, Any]:
    """What `Measured` finds of one file of tests, or of the examples in docstrings; and the tests that fail."""
    plugin = Measured()
    plugin.coverage.start()
    for path in Path("src/mep").rglob("*.py"):  # lest one be imported in the middle of a test
        if path.stem not in ("__init__", "__main__"):
            importlib.import_module(".".join(path.relative_to("src").with_suffix("").parts))
    pytest.main(["-q", "-p", "no:cacheprovider", part], plugins=[plugin])
    plugin.coverage.stop()
    return {"seconds": plugin.seconds, "lines": plugin.lines(), "failed": plugin.failed}


def first_failure(tests: dict[str, float]) -> str | None:
    """The test that fails first, or that none can be run; None if all pass."""
    plugin = Alone(tests)
    parts = sorted({part_of(test) for test in tests})
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *parts], plugins=[plugin])
    return next(iter(plugin.failed), f"pytest, which ends with {code!s}" if code else None)


def in_process(function: Callable[..., Any], *args: object, seconds: float | None = None) -> Any:
    """The value of the function in a process of its own, which prints nothing; what went wrong, where it has none."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def target() -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        sender.send(function(*args))

    process = fork.Process(target=target)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else "the time limit"
    except EOFError:
        return "the process, which has ended"
    finally:
        process.kill()
        process.join()


def part_of(test: str) -> str:
    """The file of a test; one name for all examples in docstrings."""
    return "src" if test.startswith("src") else test.split("::")[0]


class Suite:
    """The tests, the lines that each runs, and how long it takes, kept in a file."""

    def __init__(self, kept: Path, only: list[str]) -> None:
        self.kept, self.only = kept, only
        self.parts: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}

    def measure(self) -> None:
        """Measures what has changed since it was measured."""
        own = {Path("tests/mutate.py"), *Path("tests").glob("test_*.py")}
        common = _digest(*Path("src").rglob("*.py"), *(set(Path("tests").glob("*.py")) - own))
        for part in self.only or ["src", *sorted(map(str, Path("tests").glob("test_*.py")))]:
            digest = common if part == "src" else _digest(Path(part)) + common
            if self.parts.get(part, {}).get("digest") != digest:
                start = time.perf_counter()
                found = in_process(measure, part)
                self.parts[part] = found | {"digest": digest}
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                self.kept.write_text(json.dumps(self.parts))
                took = time.perf_counter() - start
                print(f"measured {part}: {len(found['seconds'])} tests, {took:.0f} s", flush=True)
                for test in found["failed"]:
                    print(f"{test} fails without any change, and is left out", flush=True)

    def running(self, mutant: Mutant) -> dict[str, float]:
        """The tests that run a mutant, quickest first, and the seconds that each takes."""
        wanted = sum(1 << line for line in mutant.lines)
        found, of_file, at_import = {}, {}, False
        for name, part in self.parts.items():
            for test, lines in part["lines"].items() if not self.only or name in self.only else ():
                own = lines.get(mutant.file, 0)
                if test == AT_IMPORT:
                    at_import |= bool(own & wanted)
                elif own and test not in part["failed"]:
                    of_file[test] = part["seconds"][test]
                    if own & wanted:
                        found[test] = part["seconds"][test]
        if at_import and not found:
            found = of_file
        return dict(sorted(found.items(), key=lambda test: test[1]))


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def outcome(mutant: Mutant, suite: Suite, seconds: float) -> str:
    """What notices a mutant, or that nothing does; the copy of the package is whole again afterwards."""
    tests = suite.running(mutant)
    if not tests:
        return "SURVIVED (not run by any test)"
    path = Path("src/mep") / mutant.file
    text, count = path.read_bytes(), 0
    path.write_bytes(text[: mutant.start] + mutant.after.encode() + text[mutant.end :])
    try:
        for some in rounds(tests, seconds):
            count += len(some)
            if found := in_process(first_failure, some, seconds=300 + 10 * sum(some.values())):
                return f"caught by {found}"
    finally:
        path.write_bytes(text)
    return f"SURVIVED ({count} tests of {len(tests)})"


def rounds(tests: dict[str, float], seconds: float) -> Iterator[dict[str, float]]:
    """At most so many seconds of tests: first of the files with most of them, as importing takes time, then of all."""
    parts = Counter(map(part_of, tests))
    likely = {part for part, _ in parts.most_common(5)}
    first = within({test: tests[test] for test in tests if part_of(test) in likely}, seconds / 5)
    yield first
    if rest := within({test: tests[test] for test in tests if test not in first}, seconds):
        yield rest


def within(tests: dict[str, float], seconds: float) -> dict[str, float]:
    """The first of the tests, which together take no longer, and one at least."""
    ends = itertools.accumulate(tests.values())
    return {
        test: own
        for i, ((test, own), end) in enumerate(zip(tests.items(), ends, strict=True))
        if end <= seconds or not i
    }


def files(only: list[str]) -> list[str]:
    """The files of the core, or those of them that are asked for."""
    all_files = sorted(str(p.relative_to(ROOT / "src/mep")) for p in (ROOT / "src/mep").rglob("*.py"))
    core = [f for f in all_files if any(f == part or (part[-1] == "/" and f.startswith(part)) for part in CORE)]
    return [f for f in core if not only or f in only]


def copy_project(to: Path) -> None:
    """What the tests need. Compiled files come along, since none are written there."""
    for part in ("src", "tests", "docs", "examples"):
        shutil.copytree(ROOT / part, to / part)
    for part in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy2(ROOT / part, to)


def main() -> int:
    """0 if every mutant was caught, 1 if some survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by chance; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of them: go on where a run has ended")
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="files of src/mep")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="files of tests; all by default")
    parser.add_argument("--seconds", type=float, default=150, help="that the tests against one mutant may take")
    parser.add_argument("--coverage", type=Path, default=ROOT / "runs/coverage.json", help="where the lines are kept")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    given = parser.parse_args()
    chosen = [m for file in files(given.only) for m in mutants(file)]
    if given.sample and given.sample < len(chosen):
        chosen = random.Random(given.seed).sample(chosen, given.sample)
    chosen = chosen[given.skip :]
    if given.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0
    suite = Suite(given.coverage.resolve(), given.tests)
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        os.chdir(folder)
        sys.path[0] = f"{folder}/src"
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": f"{folder}/src", "PYTHONDONTWRITEBYTECODE": "1"}
        suite.measure()
        survivors = []
        for number, mutant in enumerate(chosen, given.skip + 1):
            start = time.perf_counter()
            said = outcome(mutant, suite, given.seconds)
            print(f"{number} {mutant}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
            if said.startswith("SURVIVED"):
                survivors.append(mutant)
        os.chdir(ROOT)
    print(f"{len(survivors)} of {len(chosen)} survived", *survivors, sep="\n")
    return min(len(survivors), 1)


if __name__ == "__main__":
    sys.exit(main())
