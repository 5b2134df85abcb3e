"""Which arrays of a checkpoint are weights, and which entries form one vector."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from normax._core.axes import VectorAxes, check_axes, resolve_axes

GIVEN = "given"
_TORCH = "weight: all axes but the first, as in PyTorch"

_OPTIMIZER = frozenset(
    "exp_avg exp_avg_sq hyperparams inner_state momentum mu nu opt opt_state optim "
    "optimizer optimizer_state trace velocity".split()
)
_STATISTICS = frozenset("batch_stats cache rng rngs".split())
_AVERAGES = frozenset("mean var running_mean running_var".split())


def _parts(name: str) -> list[str]:
    return re.split(r"[/.]", name)


def role(name: str) -> str:
    """Return what an array is by its path: a weight, or what stands beside weights.

    The first part that tells decides. What stands below `params` is a weight, whatever
    it is called.
    """
    parts = _parts(name)
    for part in parts:
        if part == "params":
            return "weight"
        if part in _OPTIMIZER:
            return "optimizer state"
        if part in _STATISTICS:
            return "statistics"
    return "statistics" if parts[-1] in _AVERAGES else "weight"


def has_outputs_first(name: str) -> bool:
    """Return whether the rows of a matrix are its outputs, as in PyTorch."""
    return guess_axes(name, 2)[1] == _TORCH


def guess_axes(name: str, rank: int) -> tuple[VectorAxes, str]:
    """Return the axes of one weight vector by name and rank, and why.

    Flax sums over all axes of a kernel but the last, PyTorch over all axes of a weight
    but the first. Kernels of attention have two axes of outputs or of inputs. No name
    tells a stack of kernels from a convolution over one axis, unless it says so.
    """
    parts = _parts(name.lower())
    leaf, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
    if rank < 2 or leaf in ("bias", "scale", "gain", "beta", "gamma"):
        return None, "bias or gain, measured whole"
    if "embed" in leaf or (
        leaf == "weight" and ("embed" in owner or owner in ("wte", "wpe"))
    ):
        return (rank - 1,), "rows of an embedding"
    if leaf == "weight":
        return tuple(range(1, rank)), _TORCH
    if owner in ("query", "key", "value", "qkv") and rank >= 3:
        return (rank - 3,), "kernel into heads"
    if owner == "out" and rank >= 3:
        return (rank - 3, rank - 2), "kernel out of heads"
    if rank == 3 and not any("conv" in part for part in parts):
        return (1,), "a stack of kernels"
    return tuple(range(rank - 1)), "kernel: all axes but the last"


def _flat(axes: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(axes, Mapping):
        return {"/".join(path): tuple(axes) if isinstance(axes, list) else axes}
    flat: dict[str, Any] = {}
    for key, value in axes.items():
        flat |= _flat(value, (*path, *str(key).split("/")))
    return flat


class AxesByPath:
    """The axes of each array: those given for the nearest path above it, or a guess."""

    def __init__(self, axes: Any, names: list[str]) -> None:
        """Raise unless every entry of `axes` stands for one of the names at least."""
        self._given = {} if axes is None else _flat(axes)
        check_axes(self._given)
        keys = {self._key(name) for name in names}
        if unused := [key for key in self._given if key not in keys]:
            raise ValueError(
                f"axes must name arrays of the checkpoint, but it has no weights at "
                f"{', '.join(map(repr, unused))}; its first is {names[0]!r}."
            )

    def is_weight(self, name: str) -> bool:
        """Return whether an array is a weight by its path, or by axes given for it.

        Axes of a path that is no weight's by itself mean all that stands below it.
        """
        key = self._key(name) or ""
        named = key != "" and (key == name or role(key) != "weight")
        return named or role(name) == "weight"

    def _key(self, name: str) -> str | None:
        parts = name.split("/")
        paths = ("/".join(parts[:n]) for n in range(len(parts), -1, -1))
        return next((path for path in paths if path in self._given), None)

    def __call__(self, name: str, array: np.ndarray) -> tuple[VectorAxes, str]:
        """Return the axes of an array, and where they are from."""
        key = self._key(name)
        if key is None:
            return guess_axes(name, array.ndim)
        value = self._given[key]
        struct = jax.ShapeDtypeStruct(array.shape, array.dtype)
        # A word for one array means that array, whatever its rank.
        tree = {name: value} if key == name else value
        return resolve_axes(tree, {name: struct})[0], GIVEN
