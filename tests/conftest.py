import pytest
import torch
from cases import without_compiler
from hypothesis import settings
from not_yet import NOT_YET

# One thread for each pytest worker: together they fill the machine, and sums do not depend on its size.
torch.set_num_threads(1)

# A busy machine must not fail a test, and a failing test must fail again.
settings.register_profile("mep", deadline=None, derandomize=True)
settings.load_profile("mep")


@pytest.fixture
def uncompiled(monkeypatch):
    """What is to be compiled runs as it was traced."""
    without_compiler(monkeypatch)


def pytest_collection_modifyitems(items):
    """Tests of what reading by torch.export does not do yet are run, and may fail."""
    for item in items:
        if any(f"{item.path.name}::{item.name}".startswith(name) for name in NOT_YET):
            item.add_marker(pytest.mark.xfail(reason="not yet on the new foundation", strict=False))
