"""The numbers of an experiment as a CSV file."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_csv(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Write one row for each entry of the columns."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
