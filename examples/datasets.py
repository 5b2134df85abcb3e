"""Small image classification data sets as arrays of bytes.

`load` returns a data set by its name. The digits of scikit-learn are part of that
package and need no network. MNIST, CIFAR-10, CIFAR-100 and SVHN are read from the file
`<folder>/<name>.npz`. If the file is absent, it is made from the OpenML copy of the
set. A file of your own serves as well. It holds

=================== ======== ==========================================
array               dtype    shape
=================== ======== ==========================================
`x_train`, `x_test` uint8    (images, height, width, channels), or
                             (images, height, width) for grey images
`y_train`, `y_test` integers (images,), the classes 0, 1, ...
=================== ======== ==========================================

The folder is the argument, else the environment variable `NORMAX_DATA`, else
`~/.cache/normax`.
"""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import fetch_openml, load_digits


class Dataset(NamedTuple):
    """Images (count, height, width, channels) in bytes, and their classes."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class _Source(NamedTuple):
    data_id: int
    train_size: int
    shape: tuple[int, int, int]


_OPENML = {
    "mnist": _Source(554, 60_000, (28, 28, 1)),
    "cifar10": _Source(40927, 50_000, (32, 32, 3)),
    "cifar100": _Source(41983, 50_000, (32, 32, 3)),
    "svhn": _Source(41081, 73_257, (32, 32, 3)),
}
NAMES = ("digits", *_OPENML)
_DIGITS_TRAIN_SIZE = 1297


def _digits() -> Dataset:
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    # All seeds share one split, so that their test errors are comparable.
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [_DIGITS_TRAIN_SIZE])
    classes = digits.target.astype(np.int32)
    return Dataset(images[train], classes[train], images[test], classes[test])


def _roughness(images: np.ndarray) -> float:
    sample = images[:1000].astype(np.float32)
    return float(
        np.abs(np.diff(sample, axis=1)).mean() + np.abs(np.diff(sample, axis=2)).mean()
    )


def _images(rows: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    rows = rows.astype(np.uint8)
    planes = rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    # Some uploads store one colour plane after the other, and some store one pixel
    # after the other. In the right layout, neighbouring pixels are alike.
    return min(planes, rows.reshape(-1, *shape), key=_roughness)


def _fetch(name: str) -> Dataset:
    source = _OPENML[name]
    # The other parser is faster, but needs pandas.
    rows, labels = fetch_openml(
        data_id=source.data_id,
        return_X_y=True,
        as_frame=False,
        parser="liac-arff",
        cache=False,
    )
    images = _images(rows, source.shape)
    numbers = labels.astype(np.float64).astype(np.int32)
    classes = np.unique(numbers, return_inverse=True)[1].astype(np.int32)
    n = source.train_size
    return Dataset(images[:n], classes[:n], images[n:], classes[n:])


def _read(path: Path) -> Dataset:
    try:
        archive = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no readable .npz archive ({error}); remove it, and it is "
            "fetched again, or put a whole one there."
        ) from error
    with archive as file:
        missing = [name for name in Dataset._fields if name not in file]
        if missing:
            raise ValueError(
                f"{path} must hold the arrays {', '.join(Dataset._fields)}, but "
                f"{', '.join(missing)} is missing; it holds {', '.join(file)}."
            )
        arrays = {name: file[name] for name in Dataset._fields}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            raise ValueError(
                f"x_{part} in {path} must be uint8 of shape (images, height, width, "
                f"channels), got {x.dtype} of shape {x.shape}."
            )
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(
                f"y_{part} in {path} must be integers of shape {x.shape[:1]}, one "
                f"class for each image, got {y.dtype} of shape {y.shape}."
            )
        arrays[f"x_{part}"] = x if x.ndim == 4 else x[..., None]
        arrays[f"y_{part}"] = y.astype(np.int32)
    return Dataset(**arrays)


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
      name: One of `NAMES`.
      folder: Where `<name>.npz` lies, or is written after it was fetched.

    Returns:
      The training and the test set.

    Raises:
      ValueError: The name is unknown, or the file holds the wrong arrays.
      FileNotFoundError: There is neither a file nor a network.
    """
    if name == "digits":
        return _digits()
    if name not in _OPENML:
        raise ValueError(
            f"the data set must be one of {', '.join(NAMES)}, got {name!r}."
        )
    default = os.environ.get("NORMAX_DATA", "~/.cache/normax")
    path = Path(folder or default).expanduser() / f"{name}.npz"
    if not path.exists():
        try:
            dataset = _fetch(name)
        except OSError as error:
            raise FileNotFoundError(
                f"{path} does not exist, and OpenML cannot be reached to make it "
                f"({error}). Put a file there with the arrays "
                f"{', '.join(Dataset._fields)} (images as uint8, (images, height, "
                "width, channels)), or name its folder with --data or the "
                "environment variable NORMAX_DATA."
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        # An interrupted write must not be read next time. So the file gets its name
        # only once it is whole.
        partial = path.with_name(f"{name}.partial.npz")
        np.savez_compressed(partial, **dataset._asdict())
        partial.replace(path)
    return _read(path)
