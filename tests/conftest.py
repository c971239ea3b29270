import collections
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


_MOST = 12
"""Of a test with more cases than this some are run, unless MEP_TEST_ALL is set: tests that share a table take others.
"""
_EVERY = 5
"""Every fifth: no table has five of anything in its inner loops, so that of all things some are taken."""
_EVERY_OF_LISTS = {
    "test_public_models.py": 3,
    "test_sound_reading.py": 2,
    "test_sound_training.py": 2,
    "test_zoo.py": 1,
}
"""Of lists in which each case is another model, and its neighbours are the most like it."""


def pytest_collection_modifyitems(config, items):
    if os.environ.get("MEP_TEST_ALL") or any("::" in str(arg) for arg in config.args) or config.option.keyword:
        return
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            cases[item.path, item.originalname].append(item)
    left_out = set()
    for (path, name), of_one in cases.items():
        every = _EVERY_OF_LISTS.get(path.name, _EVERY) if len(of_one) > _MOST else 1
        first = zlib.crc32(name.encode()) % every
        left_out |= {item for i, item in enumerate(of_one) if i % every != first}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
