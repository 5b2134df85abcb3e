"""Finished training runs on disk, found again by what they compute.

A run is stored under a digest of its program (the jaxpr and the arrays that it closes
over) and of its hyperparameters. So a sweep that was killed continues, a finer grid
takes over the runs of a coarser one, any number of sweeps can share a folder, and a run
whose code, data or settings have changed is not mistaken for the old one.
"""

import hashlib
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import stages
from jax.extend.core import ClosedJaxpr

from normax._axes import PyTree
from normax._programs import called_programs, is_key


def _bytes(array: Any) -> bytes:
    if is_key(array):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


def _constants(closed: ClosedJaxpr) -> Iterator[Any]:
    """Return the arrays that a program and the functions in it close over."""
    yield from closed.consts
    for equation in closed.jaxpr.eqns:
        for program in called_programs(equation):
            yield from _constants(program)


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
        self._checkpointer = ocp.PyTreeCheckpointer()
        traced = run.trace({name: values[0] for name, values in points.items()})
        self._structure = jax.tree.structure(traced.out_info)
        self._leaves = jax.tree.leaves(traced.out_info)
        if keys := [leaf.dtype for leaf in self._leaves if is_key(leaf)]:
            raise ValueError(
                "runs are stored as numbers, but `train_fn` returns random keys "
                f"({keys}); leave them out, or return jax.random.key_data of them."
            )
        # Addresses of functions, printed by some versions of JAX, differ by process.
        program = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))
        digest = hashlib.sha256(program.encode())
        for constant in _constants(traced.jaxpr):
            digest.update(_bytes(constant))
        self._names = []
        for index in range(count):
            one = digest.copy()
            for name, values in sorted(points.items()):
                one.update(name.encode() + _bytes(values[index]))
            self._names.append(one.hexdigest()[:32])

    def load(self, index: int) -> PyTree | None:
        """Return the result of a run, or None if it is not finished."""
        path = self._folder / self._names[index]
        # What is being written has another name until it is whole.
        if not path.exists():
            return None
        found = self._checkpointer.restore(path)
        leaves = [
            found[str(i)] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(self._leaves)
        ]
        return jax.tree.unflatten(self._structure, leaves)

    def save(self, index: int, result: PyTree) -> None:
        """Store the result of a run."""
        # Orbax stores neither arrays without entries nor trees without arrays.
        leaves = enumerate(map(np.asarray, jax.tree.leaves(result)))
        found = {str(i): leaf for i, leaf in leaves if leaf.size}
        found |= {"finished": np.ones(1)}
        path = self._folder / self._names[index]
        own = path.with_suffix(f".{uuid.uuid4().hex}")
        self._checkpointer.save(own, found)
        try:
            own.rename(path)
        except OSError:  # Another process has finished the same run.
            shutil.rmtree(own)
