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


KINDS = LARGER, SMALLER, OPPOSITE, PARTLY, OTHER_CHOICE = 1, 2, 4, 8, 16
MET = 32  # whether neither is 0 and signs agree, which is no difference
JOIN = Upper(
    lambda w, other: jnp.maximum(jnp.abs(w), jnp.abs(other)),
    LARGER | SMALLER | OPPOSITE,
)
FIRST = Upper(lambda w, other: jnp.abs(w), SMALLER | OPPOSITE)


def gap(
    u: jax.Array, w: jax.Array, other: jax.Array, p: jax.typing.ArrayLike
) -> jax.Array:
    r"""Return $g$ with $g^p = u^p - m^p$, of upper weights $u$ and meets $m$."""
    if isinstance(p, int) and p == 1:
        # As u - m it would be one pass more on a CPU, which would write the meets
        # before and read them here.
        larger = jnp.maximum(u - jnp.abs(w), u - jnp.abs(other))
        return jnp.where((w > 0) == (other > 0), larger, u)
    m = meet(w, other)
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


Tests = dict[int, jax.Array]  # of each bit, whether it is set


def tests_of(
    w: jax.Array, other: jax.Array, p: jax.typing.ArrayLike | None = None
) -> Tests:
    """Compare each pair of weights: the bits of `Comparison.kinds`, and `MET`.

    If p is 1, the one that says nothing then is left out.
    """
    sizes = jnp.abs(w), jnp.abs(other)
    larger, smaller = sizes[1] > sizes[0], sizes[1] < sizes[0]
    neither_0, same = jnp.minimum(*sizes) > 0, (w > 0) == (other > 0)
    met = neither_0 & same
    tests = {LARGER: larger, SMALLER: smaller, OPPOSITE: neither_0 & ~same, MET: met}
    if not (isinstance(p, int) and p == 1):
        tests[PARTLY] = met & (larger | smaller)
    return tests


# JAX remembers for ever each function that a reduction is given, so there is only one.
def _largest(a, b):
    return tuple(map(lax.max, a, b))


def any_of(tests: Tests, axes: tuple[int, ...] | None = None) -> Tests:
    """Return which tests hold somewhere, over all axes, or over some that are kept."""
    # One reduction of all is one pass over memory. Devices can exchange a maximum, but
    # not bits.
    ones = tuple(test.astype(jnp.int32) for test in tests.values())
    over = tuple(range(ones[0].ndim)) if axes is None else axes
    found = lax.reduce(ones, (jnp.int32(0),) * len(ones), _largest, over)
    if axes is not None:
        found = tuple(jnp.expand_dims(x, axes) for x in found)
    return {bit: x > 0 for bit, x in zip(tests, found, strict=True)}


def pack(tests: Tests) -> jax.Array:
    """Return integers with the bits whose tests hold."""
    bits = (jnp.where(test, jnp.int32(bit), 0) for bit, test in tests.items())
    return functools.reduce(lax.bitwise_or, bits)


def kinds_of(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return `Comparison.kinds` of two arrays."""
    return pack(any_of(tests_of(w, other)))


def extremes_of(w: jax.Array, other: jax.Array) -> jax.Array:
    """Return `Comparison.extremes`."""
    growth = jnp.abs(other) - jnp.abs(w)
    sizes = {LARGER: growth, SMALLER: -growth, OPPOSITE: JOIN.of(w, other)}
    sizes[PARTLY] = jnp.abs(growth)
    tests = tests_of(w, other)
    return jnp.stack(
        [jnp.max(jnp.where(tests[k], x, 0), initial=0) for k, x in sizes.items()]
    )
