"""The examples run, and learn."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_own_module_learns_digits():
    main = runpy.run_path(str(EXAMPLES[0].parent / "own_module.py"))["main"]
    assert main(epochs=4) > 0.8
