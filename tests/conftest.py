import collections
import os

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
"""Of a test with more cases than this every third is run, unless MEP_TEST_ALL is set."""
_WHOLE = ("test_public_models.py", "test_sound_reading.py", "test_sound_training.py", "test_zoo.py")
"""Files whose tables list inputs that were once got wrong: they are run whole."""


def pytest_collection_modifyitems(config, items):
    if os.environ.get("MEP_TEST_ALL") or any("::" in str(arg) for arg in config.args) or config.option.keyword:
        return
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.path.name not in _WHOLE:
            cases[item.path, item.originalname].append(item)
    left_out = {item for of_one in cases.values() if len(of_one) > _MOST for i, item in enumerate(of_one) if i % 3}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
