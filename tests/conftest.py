import collections
import math
import os
import zlib

import pytest
import torch
from cases import without_compiler
from hypothesis import settings

# One thread for each pytest worker: together they fill the machine, and sums do not depend on its size.
torch.set_num_threads(1)

# A busy machine must not fail a test, and a failing test must fail again.
settings.register_profile("mep", deadline=None, derandomize=True)
settings.load_profile("mep")


@pytest.fixture
def uncompiled(monkeypatch):
    """What is to be compiled runs as it was traced."""
    without_compiler(monkeypatch)


_TABLES = ((6, 1), (12, 2), (math.inf, 5))
_OTHERS = {
    "test_layering.py": ((math.inf, 1),),
    "test_public_models.py": ((12, 1), (math.inf, 3)),
    "test_sound_reading.py": ((4, 1), (math.inf, 3)),
    "test_sound_training.py": ((4, 1), (12, 3), (math.inf, 5)),
    "test_zoo.py": ((math.inf, 2),),
}
"""Of a test with at most so many cases every how many-th is run, unless MEP_TEST_ALL is set.

Besides, of a table of several parameters some case is run with each value of each. What holds of all presets is tested
with every other one, and in the next test with the rest. In some files tables are lists of models that were once got
wrong, where each is like its neighbours.
"""


def pytest_collection_modifyitems(config, items):
    if os.environ.get("MEP_TEST_ALL") or any("::" in str(arg) for arg in config.args) or config.option.keyword:
        return
    tables = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            tables[item.path, item.originalname].append(item)
    left_out = set()
    for (path, name), table in tables.items():
        every = next(every for most, every in _OTHERS.get(path.name, _TABLES) if len(table) <= most)
        left_out |= set(table) - _some(table, every, zlib.crc32(name.encode()) % every)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _some(table, every, first):
    """Every so many-th case of a table from the first on, and a case with each value that occurs more than once."""
    values = {item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in table}
    taken = set(table[first::every])
    counts = collections.Counter(value for own in values.values() for value in own)
    missing = {value for value, count in counts.items() if count > 1}
    missing -= {value for item in taken for value in values[item]}
    for item in table:
        if values[item] & missing:
            taken.add(item)
            missing -= values[item]
    return taken
