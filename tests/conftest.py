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
