"""What the user says of weight vectors, compared with what was found."""

from typing import Any

import jax
import numpy as np

from normax._core.axes import (
    Axes,
    PyTree,
    VectorAxes,
    resolve_axes,
    resolve_mask,
)


def said(compare: Axes, params: PyTree) -> list[VectorAxes | bool]:
    """Return what the user says of every array: axes, or bools of a mask."""
    leaves = jax.tree.leaves(compare)
    if leaves and all(isinstance(leaf, bool | np.bool_) for leaf in leaves):
        return [*resolve_mask(compare, params)]
    return [*resolve_axes(compare, params)]


def difference(
    yours: VectorAxes | bool, found: VectorAxes, shape: tuple[int, ...]
) -> str:
    """Say how they differ; empty if they do not."""
    if yours is None or yours is False:
        return "yours leaves it alone, but it is scale-invariant" if found else ""
    if found is None:
        return "yours takes it, but it is not scale-invariant"
    if yours is True:
        return ""
    # A vector is the same with and without axes of length one.
    long = {axis for axis in yours if shape[axis] > 1}
    smaller = {axis for axis in found if shape[axis] > 1}
    if long == smaller:
        return ""
    if smaller < long:
        return f"yours takes axes {yours}, but smaller vectors are scale-invariant"
    return f"yours takes axes {yours}, but those are not scale-invariant"


def differences(compare: Any, params: PyTree, found: PyTree) -> list[str]:
    """Say for every array how the user's axes or mask differ from those found."""
    rows = zip(
        said(compare, params),
        resolve_axes(found, params),
        map(np.shape, jax.tree.leaves(params)),
        strict=True,
    )
    return [difference(*row) for row in rows]
