"""What the experiments share: options, data, and CSV files."""

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import PercentFormatter

ERROR_TICKS: dict[str, Any] = {
    "ticks": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1],
    "format": PercentFormatter(1, 0),
    "extend": "max",
}


def make_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that every experiment has, `--out`."""
    parser = argparse.ArgumentParser(description=(docstring or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of the results"
    )
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Let the user choose what to train on."""
    add = parser.add_argument
    add("--dataset", default="digits", choices=datasets.NAMES)
    add("--data", type=Path, help="folder of the data sets' files, <name>.npz")
    add("--images", type=int, help="number of training images; default: all")


def make_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Make the folder of the results."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))


def load_data(
    parser: argparse.ArgumentParser, options: argparse.Namespace, batch_size: int
) -> datasets.Dataset:
    """Load the chosen data, and require at least one batch to train on."""
    try:
        data = datasets.load(options.dataset, options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    available = len(data.x_train)
    images = available if options.images is None else options.images
    if not 1 <= images <= available:
        parser.error(
            f"--images must be from 1 to {available}, the number of training images of "
            f"{options.dataset}, got {images}."
        )
    data = data._replace(x_train=data.x_train[:images], y_train=data.y_train[:images])
    if len(data.x_train) < batch_size:
        parser.error(
            f"a batch is {batch_size} images, but {options.dataset} has only "
            f"{len(data.x_train)} to train on."
        )
    return data


def file_name(stem: str, options: argparse.Namespace) -> str:
    """Return the name of the results' files, with the data set if it is not digits."""
    return stem if options.dataset == "digits" else f"{stem}_{options.dataset}"


def error_colours(errors: np.ndarray) -> LogNorm:
    """Return colours for errors from the smallest to 50%, or to twice the smallest."""
    low = np.nanmin(errors[errors > 0], initial=0.5)
    return LogNorm(low, max(0.5, 2 * low))


def write_csv(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Write one row for each entry of the columns."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
