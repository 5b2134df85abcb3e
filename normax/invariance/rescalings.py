"""Rescalings of weight vectors, which change nothing of a scale-invariant loss."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import Axes, PyTree, resolve_axes

# The factors are 1/2, 2, 4 and 8, since products with powers of two are not rounded.
_EXPONENTS = np.array([-1, 1, 2, 3])


class Rescaling(NamedTuple):
    where: str
    position: int
    factors: jax.Array
    params: PyTree


def _exponents(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Draw exponents, none of them 0; no two vectors have the same in all draws."""
    base, count = len(_EXPONENTS), math.prod(shape)
    # The exponents are the digits of the vectors' numbers. The numbers are in random
    # order, since a function may treat neighbours or groups of vectors alike.
    numbers = np.random.default_rng(0).permutation(count).reshape(shape)
    draw = 0
    while draw < 2 or base**draw < count:
        yield np.roll(_EXPONENTS, -draw)[numbers // base**draw % base]
        draw += 1


def rescalings(params: PyTree, axes: Axes) -> Iterator[Rescaling]:
    """Rescale the weight vectors of one array after another, each in several ways."""
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    for position, vector_axes in enumerate(resolve_axes(axes, params)):
        if vector_axes is None:
            continue
        path, w = (
            jax.tree_util.keystr(paths[position][0]),
            jnp.asarray(leaves[position]),
        )
        shape = tuple(1 if i in vector_axes else n for i, n in enumerate(w.shape))
        for draw, exponents in enumerate(_exponents(shape)):
            where = (
                f"params{path}, vectors over axes {vector_axes} times 1/2, 2, 4 or 8 "
                f"(draw {draw})"
            )
            factors = jnp.asarray(2.0**exponents, w.dtype)
            rescaled = treedef.unflatten(
                w * factors if i == position else leaf for i, leaf in enumerate(leaves)
            )
            yield Rescaling(where, position, factors, rescaled)
