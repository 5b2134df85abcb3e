"""Finished training runs on disk, found again by what they compute.

A run is stored under a digest of its program and of its hyperparameters. So a run whose
code, data or settings have changed is not mistaken for the old one.
"""

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import stages

from normax._core.axes import PyTree
from normax._core.programs import is_key
from normax.sweeps.fingerprint import array_bytes, fingerprint

_HOST = re.sub(r"\W", "-", platform.node())
_A_DAY = 24 * 60 * 60  # seconds


def _is_left_over(path: Path) -> bool:
    """Return whether a killed process was writing this folder."""
    run, *rest = path.name.split(".")
    if not rest or not re.fullmatch("[0-9a-f]{32}", run):
        return False
    process, host = [*rest, "", ""][:2]
    # No signal reaches another machine, but no run is written for as long as a day.
    if host != _HOST:
        return time.time() - path.stat().st_mtime > _A_DAY
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process lives, and belongs to someone else
        return False
    return False


class FinishedRuns:
    """The runs of a jitted function `run(point)` in a folder."""

    def __init__(
        self,
        folder: Path,
        run: stages.Wrapped,
        points: Mapping[str, jax.Array],
        count: int,
    ) -> None:
        # Orbax takes absolute paths only.
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if _is_left_over(path):
                shutil.rmtree(path, ignore_errors=True)
        self._checkpointer = ocp.PyTreeCheckpointer()
        traced = run.trace({name: values[0] for name, values in points.items()})
        self._structure = jax.tree.structure(traced.out_info)
        self._leaves = jax.tree.leaves(traced.out_info)
        if keys := [leaf.dtype for leaf in self._leaves if is_key(leaf)]:
            raise ValueError(
                "runs are stored as numbers, but `train_fn` returns random keys "
                f"({keys}); leave them out, or return jax.random.key_data of them."
            )
        digest = fingerprint(traced)
        self.program = digest.digest()  # the digest of the function alone
        self._names = []
        for index in range(count):
            one = digest.copy()
            for name, values in sorted(points.items()):
                one.update(name.encode() + array_bytes(values[index]))
            self._names.append(one.hexdigest()[:32])

    def load(self, index: int) -> PyTree | None:
        """Return the result of a run, or None if it is not finished."""
        path = self._folder / self._names[index]
        # A run that is being written has another name until it is complete.
        if not path.exists():
            return None
        try:
            found = self._checkpointer.restore(path)
            leaves = [
                self._leaf(leaf, found[str(i)])
                if leaf.size
                else np.zeros(leaf.shape, leaf.dtype)
                for i, leaf in enumerate(self._leaves)
            ]
        except Exception as error:  # Orbax raises many kinds where files are damaged
            raise ValueError(
                f"a finished run is stored in {path}, but it cannot be read "
                f"({type(error).__name__}: {error}); delete this folder, and the run "
                "is done again."
            ) from error
        return jax.tree.unflatten(self._structure, leaves)

    def _leaf(self, expected: jax.ShapeDtypeStruct, found: Any) -> np.ndarray:
        array = np.asarray(found)
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"it holds {array.dtype}{list(array.shape)} where the run returns "
                f"{expected.dtype}{list(expected.shape)}"
            )
        return array

    def save(self, index: int, result: PyTree) -> None:
        """Store the result of a run."""
        # Orbax stores neither arrays without entries nor trees without arrays.
        leaves = enumerate(map(np.asarray, jax.tree.leaves(result)))
        found = {str(i): leaf for i, leaf in leaves if leaf.size}
        found |= {"finished": np.ones(1)}
        path = self._folder / self._names[index]
        writer = f"{os.getpid()}.{_HOST}.{uuid.uuid4().hex}"
        own = path.with_name(f"{path.name}.{writer}")
        try:
            self._checkpointer.save(own, found)
            own.rename(path)
        except OSError:
            shutil.rmtree(own, ignore_errors=True)
            if not path.exists():  # else another process has finished the same run
                raise
