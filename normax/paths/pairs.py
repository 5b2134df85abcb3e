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


def meet(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return the smaller weights where signs agree, else 0."""
    # What is no number is so in the gap.
    return jnp.where((w > 0) == (other > 0), jnp.minimum(jnp.abs(w), jnp.abs(other)), 0)


class Upper(NamedTuple):
    """What the upper weights are.

    Attributes:
      of: Takes weights of both networks to $u$.
      gaps: The bits of `Comparison.kinds` that say that $u$ is larger than the meet.
    """

    of: Callable[[jax.Array, jax.Array], jax.Array]
    gaps: int


LARGER, SMALLER, OPPOSITE, PARTLY, OTHER_CHOICE = (1 << i for i in range(5))
MET = 1 << 5  # whether neither is 0 and signs agree, which is no difference
JOIN = Upper(
    lambda w, other: jnp.maximum(jnp.abs(w), jnp.abs(other)),
    LARGER | SMALLER | OPPOSITE,
)
FIRST = Upper(lambda w, other: jnp.abs(w), SMALLER | OPPOSITE)


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
      kinds: Bits. Some weight of the other network is `LARGER`, is `SMALLER`, has the
        `OPPOSITE` sign, or differs where neither is 0, `PARTLY`; or a condition or an
        index that is computed from weights is another one, `OTHER_CHOICE`.
      extremes: By how much the other's are larger and smaller, the largest weight
        with an opposite one, and the largest difference where neither is 0.
    """

    kinds: jax.Array
    extremes: jax.Array


def _tests(w: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
    sizes = jnp.abs(w), jnp.abs(other)
    larger, smaller = sizes[1] > sizes[0], sizes[1] < sizes[0]
    neither_0, same = jnp.minimum(*sizes) > 0, (w > 0) == (other > 0)
    met = neither_0 & same
    return larger, smaller, neither_0 & ~same, met & (larger | smaller), met


def kinds_of(
    w: jax.Array, other: jax.Array, p: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Return the bits of `Comparison.kinds` for each pair of weights, and `MET`.

    If p is 1, the one that says nothing then is left out.
    """
    larger, smaller, opposite, partly, met = _tests(w, other)
    tests = {LARGER: larger, SMALLER: smaller, OPPOSITE: opposite, MET: met}
    if not (isinstance(p, int) and p == 1):
        tests[PARTLY] = partly
    return pack(tests)


def pack(tests: dict[int, jax.Array]) -> jax.Array:
    """Return integers with the bits whose tests hold."""
    bits = (jnp.where(test, jnp.int32(bit), 0) for bit, test in tests.items())
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
    sizes = growth, -growth, JOIN.of(w, other), jnp.abs(growth)
    pairs = zip(_tests(w, other), sizes, strict=False)
    return jnp.stack([jnp.max(jnp.where(t, size, 0), initial=0) for t, size in pairs])
