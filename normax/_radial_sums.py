r"""Sums of $w \odot \nabla L$, which show the scale-invariant vectors of an array.

The products of a vector that is not scale-invariant have random signs, and their sum
has the size $\|w \odot \nabla L\|$. In this unit sums are measured: the ratio is below
$t$ by accident with probability $\sqrt{2/\pi}\,t$, however long the vector.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._norms import at_least_float32

# Vectors with products this much smaller than their neighbours' may be rounding.
_NOISE = 1e-3


class RadialSums(NamedTuple):
    axes: tuple[int, ...]
    radial: float
    size: float
    vectors: int


def radial_sums(products: np.ndarray, axes: tuple[int, ...]) -> RadialSums:
    """Compare the sums of the products over `axes` with their sizes."""
    sizes = np.sqrt(np.sum(products**2, axis=axes))
    floor = _NOISE * np.max(sizes, initial=0.0)
    if floor == 0:
        return RadialSums(axes, math.nan, 0.0, 0)
    sums = np.abs(np.sum(products, axis=axes))
    radial = np.max(sums / np.maximum(sizes, floor))
    return RadialSums(
        axes, float(radial), float(np.sum(sizes)), int(np.sum(sizes > floor))
    )


def sets_of_axes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    # Small sets first, `"unit"` before its equals. Axes of length 1 count nothing, and
    # a vector of a single number has no direction: its scale cannot be told apart.
    long = [axis for axis, length in enumerate(shape) if length > 1]
    unit = tuple(axis for axis in long if axis < len(shape) - 1)
    sets = (
        axes
        for length in range(1, len(long) + 1)
        for axes in itertools.combinations(long, length)
    )
    return sorted(sets, key=lambda axes: (len(axes), axes != unit))


def word(axes: tuple[int, ...], shape: tuple[int, ...]) -> str | tuple[int, ...]:
    long = tuple(axis for axis, length in enumerate(shape) if length > 1)
    if axes == tuple(axis for axis in long if axis < len(shape) - 1):
        return "unit"
    return "layer" if axes == long else axes


def perturb(floats: list[jax.Array], scales: jax.Array, key: jax.Array) -> list:
    """Multiply by random positive numbers; draw anew what is 0."""
    noise = jax.random.normal(key, (sum(w.size for w in floats),))
    pieces = jnp.split(noise, np.cumsum([w.size for w in floats], dtype=int)[:-1])
    perturbed = []
    for w, z, scale in zip(floats, pieces, scales, strict=True):
        (x,) = at_least_float32(w)
        z = z.reshape(x.shape).astype(x.dtype)
        size = jnp.sqrt(jnp.mean(x**2))
        fan_in = math.prod(x.shape[:-1]) or 1
        size = jnp.where(size == 0, 0.5 / math.sqrt(fan_in), size)
        x = jnp.where(x == 0, size * z, x * jnp.exp(0.5 * z))
        perturbed.append((scale.astype(x.dtype) * x).astype(w.dtype))
    return perturbed
