"""Arrows only go down: who may import whom (design, section 4)."""

import ast
import sys
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

import mep

SOURCE = Path(mep.__file__).parent

# A unit is a file or a folder of src/mep. It may import the units named beside it, all of which stand above it.
ARROWS = {
    "errors": "",
    "layout": "",
    "guards": "",
    "cost": "errors guards",
    "updates": "errors",
    "graph": "cost errors guards layout",
    "energy": "cost errors graph guards layout",
    "capture": "cost energy errors graph guards",
    "settle": "cost energy errors graph",
    "solvers": "cost energy errors graph layout settle",
    "estimators": "capture cost energy errors graph guards layout settle solvers",
    "verification": "capture cost energy errors estimators graph guards settle solvers",
    "optimizer": "capture errors estimators guards",
    "presets": "capture cost energy errors estimators graph optimizer settle solvers updates",
    "optimizers": "presets",
    "__init__": "capture cost energy errors estimators optimizer presets settle solvers updates verification",
    "runs": "__init__ errors presets",
    "lab": "__init__ energy errors estimators guards runs settle verification",
    "cli": "__init__ errors lab runs",
    "__main__": "cli",
}
# Packages that only these units may import. Everyone may import the standard library and torch, and nothing else.
RESERVED = {
    "lazy_loader": ("__init__",),
    "typing_extensions": ("presets",),
    "torch.fx": ("capture", "estimators"),
    "torch.export": ("capture",),
    "torch.distributed": (),
    "numpy": ("lab",),
    "sklearn": ("runs",),
    "mlxtend": ("runs",),
    "typer": ("lab", "cli"),
    "rich": ("runs", "lab", "cli"),
    "matplotlib": ("runs", "lab", "estimators"),
    "shared": (),
}
EVERYWHERE = {"torch", *sys.stdlib_module_names}


def unit(file):
    return file.relative_to(SOURCE).parts[0].partition(".")[0]


FILES = [*sorted(SOURCE.rglob("*.py")), SOURCE / "__init__.pyi"]  # the names of the top stand in its stub
UNITS = {unit(file) for file in FILES}


def modules(file):
    """Every dotted name that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = f"mep.{node.module}" if node.level else node.module
            assert node.level == 0 or file.suffix == ".pyi", f"{file}: write the whole name of {home}"
            yield from (f"{home}.{alias.name}" for alias in node.names)


def imported_units(file):
    """The units of ours that a file imports; `import mep` and `from mep import trace` import the top."""
    for name in modules(file):
        package, _, rest = name.partition(".")
        if package == "mep":
            first = rest.partition(".")[0]
            yield first if first in UNITS else "__init__"


def test_table_names_every_unit_once():
    assert set(ARROWS) == UNITS


def test_arrows_only_go_down():
    above = set()
    for name, allowed in ARROWS.items():
        assert set(allowed.split()) <= above, name
        above.add(name)


@pytest.mark.parametrize("name", ARROWS)
def test_unit_imports_only_what_stands_beside_it(name):
    found = set(chain(*(imported_units(file) for file in FILES if unit(file) == name))) - {name}
    assert found <= set(ARROWS[name].split())


@pytest.mark.parametrize("name", ARROWS)
def test_unit_imports_no_package_that_is_not_its_own(name):
    for dotted in chain(*(modules(file) for file in FILES if unit(file) == name)):
        reserved = [package for package in RESERVED if f"{dotted}.".startswith(f"{package}.")]
        assert all(name in RESERVED[package] for package in reserved), dotted
        assert reserved or dotted.partition(".")[0] in EVERYWHERE | {"mep"}, dotted


def module_name(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(["mep", *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_name(file): file for file in FILES if file.suffix == ".py"}


def imported_modules(file):
    """The modules of ours that a file imports, in functions, too."""
    for name in modules(file):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and MODULES[name] != file:
            yield name


@pytest.mark.parametrize("name", ["runs", "lab", "cli", "updates"])
def test_no_file_of_a_unit_imports_more_than_eight(name):
    imports = {m: set(imported_modules(file)) for m, file in MODULES.items() if unit(file) == name}
    assert all(len(found) <= 8 for found in imports.values())


def test_no_imports_go_in_a_circle():
    """The top, which loads its names when they are used, is imported by commands and tests alone."""
    imports = {m: set(imported_modules(file)) - {"mep"} for m, file in MODULES.items() if m != "mep"}
    assert len(list(TopologicalSorter(imports).static_order())) == len(imports)  # a CycleError names the circle


def test_a_default_step_is_a_short_walk():
    """Calls of our functions, the files that it enters, and the depth of the stack."""
    layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    model = nn.Sequential(*layers)
    opt = mep.eqprop(model.parameters(), model=model)
    x, y = torch.rand(16, 784), torch.randint(10, (16,))
    for _ in range(5):
        opt.step(x=x, target=y)
    calls, files, depth, deepest = 0, set(), 0, 0

    def watch(frame, event, _):
        nonlocal calls, depth, deepest
        if frame.f_code.co_filename.startswith(str(SOURCE)):
            depth += (event == "call") - (event == "return")
            calls, deepest = calls + (event == "call"), max(depth, deepest)
            files.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        opt.step(x=x, target=y)
    finally:
        sys.setprofile(None)
    assert calls <= 140 and len(files) <= 16 and deepest <= 11


def test_no_file_depends_on_the_workshop():
    """What a user runs must not read the folder that this project was built in."""
    for file in FILES:
        assert "shared/" not in file.read_text(encoding="utf-8"), file
