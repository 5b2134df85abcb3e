"""The weights of one edge in two networks: which is the smaller, and by how much."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.norms import nonzero
from normax.paths import numbers

Upper = Callable[[jax.Array, jax.Array], jax.Array]


def meet(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return the smaller weights where signs agree, else 0."""
    # What is no number is so in the gap.
    return jnp.where((w > 0) == (other > 0), jnp.minimum(jnp.abs(w), jnp.abs(other)), 0)


def join(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return the larger of both sizes."""
    return jnp.maximum(jnp.abs(w), jnp.abs(other))


def first(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return the size of the first network's weights."""
    del other
    return jnp.abs(w)


def gap(u: jax.Array, m: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    r"""Return $g$ with $g^p = u^p - m^p$, of numbers $u \ge m \ge 0$."""
    if isinstance(p, int) and p == 1:
        return u - m
    # log1p and expm1 lose no digits where the two are close.
    # The logarithm of 0 has no derivative, so that is left out.
    logarithm = jnp.log1p(jnp.where(m == 0, 0, -(u - m) / nonzero(u)))
    part = numbers.where_live(
        lambda x: jnp.power(x, jnp.asarray(1 / p, u.dtype)), -jnp.expm1(p * logarithm)
    )
    return u * jnp.where(m == 0, 1, part)


class Comparison(NamedTuple):
    """How the weights of two networks differ, of an array or of several.

    Attributes:
      kinds: Bits. Some weight of the other network is larger (1), is smaller (2), has
        the opposite sign (4), or differs where neither is 0 (8); or a condition or an
        index that is computed from weights is another one (16).
      extremes: By how much the other's are larger and smaller, the largest weight
        with an opposite one, and the largest difference where neither is 0.
    """

    kinds: jax.Array
    extremes: jax.Array


OTHER_CHOICE = 16


def _tests(w: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
    same = meet(w, other) > 0
    larger, smaller = jnp.abs(other) > jnp.abs(w), jnp.abs(other) < jnp.abs(w)
    opposite = ((w > 0) & (other < 0)) | ((w < 0) & (other > 0))
    return larger, smaller, opposite, same & (larger | smaller)


def kinds_of(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return the bits of `Comparison.kinds` for each pair of weights."""
    return pack(*_tests(w, other))


def pack(*tests: jax.Array, start: int = 0) -> jax.Array:
    """Return integers whose bits, counted from `start`, are these tests."""
    bits = [jnp.where(t, jnp.int32(1 << i), 0) for i, t in enumerate(tests, start)]
    return functools.reduce(lax.bitwise_or, bits)


def any_of(kinds: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Return which bits are set in some entry, over all axes, or over some and kept."""
    if axes is None:
        return lax.reduce(kinds, jnp.int32(0), lax.bitwise_or, range(kinds.ndim))
    found = lax.reduce(kinds, jnp.int32(0), lax.bitwise_or, axes)
    return jnp.expand_dims(found, axes)


def extremes_of(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return `Comparison.extremes`."""
    growth = jnp.abs(other) - jnp.abs(w)
    sizes = growth, -growth, join(w, other), jnp.abs(growth)
    pairs = zip(_tests(w, other), sizes, strict=True)
    return jnp.stack([jnp.max(jnp.where(t, size, 0), initial=0) for t, size in pairs])
