r"""Numbers that carry exponents, so that nothing overflows or underflows.

Sums over paths leave the range of float32 at a depth of some tens of layers, or where
the units of a network differ in scale by $10^{20}$, as in the unbalanced networks of
the Path-SGD paper. So a number is held by a root of it, and an array has an exponent
besides,

$$x = (q \cdot 2^e)^{2p}, \qquad q \ge 0.$$

The exponent, mostly one for a whole layer, carries what depth multiplies. The root
tells units apart whose scales, in units of weights, differ by a factor of up to
$2^{252}$. Here is what does not depend on $p$: exponents, products and shapes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.norms import at_least_float32, nonzero
from normax._core.powers_of_two import exp2, exponent_of

DEAD = -(2**20)  # the exponent of zeros: never the largest of any sum


class Scaled(NamedTuple):
    """Non-negative numbers.

    Behind a layer roots may have any size, and zeros alone any exponent. So what
    multiplies roots, or compares exponents, calls `normalize` before.

    Attributes:
      root: Float array, the roots $q$.
      exponent: Int32 array of the same rank that broadcasts against `root`, mostly
        with one entry.
    """

    root: jax.Array
    exponent: jax.Array


def where_live(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return `fn(x)`, and 0 with derivative 0 where x is 0."""
    live = x != 0
    return jnp.where(live, fn(jnp.where(live, x, 1)), 0)


def of_rank(exponent: jax.Array, rank: int) -> jax.Array:
    """Return a single exponent for an array of another rank."""
    return jnp.reshape(exponent, (1,) * rank)


# JAX remembers for ever each function that a reduction is given, so there is only one.
def _wider(a, b):
    return lax.min(a[0], b[0]), lax.max(a[1], b[1])


def range_of(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest of non-negative numbers."""
    # XLA:CPU compiles each reduction of one array as three. So both are one reduction.
    x = lax.stop_gradient(x)
    bounds = jnp.asarray(jnp.inf, x.dtype), jnp.zeros((), x.dtype)
    return lax.reduce((x, x), bounds, _wider, axes)


def ones(shape: tuple[int, ...], dtype) -> Scaled:
    """Return ones."""
    return Scaled(jnp.ones(shape, dtype), jnp.zeros((1,) * len(shape), jnp.int32))


def zeros(shape: tuple[int, ...], dtype) -> Scaled:
    """Return zeros."""
    exponent = jnp.full((1,) * len(shape), DEAD, jnp.int32)
    return Scaled(jnp.zeros(shape, dtype), exponent)


def cast(weight: jax.typing.ArrayLike, x: Scaled) -> jax.Array:
    """Return weights in the dtype of path values."""
    return at_least_float32(weight)[0].astype(x.root.dtype)


def scale(x: jax.Array) -> jax.Array:
    """Return what to divide by, and multiply with again: no derivative passes."""
    return nonzero(lax.stop_gradient(x))


def unit_of(x: Scaled) -> tuple[jax.Array, jax.Array]:
    """Return the factor that brings the largest root of each exponent into $[1, 2)$.

    Returns:
      The factor, a power of two, and the exponent that goes with it.
    """
    axes = tuple(i for i, n in enumerate(x.exponent.shape) if n == 1)
    bounds = range_of(x.root, axes)
    low, high = (jnp.reshape(bound, x.exponent.shape) for bound in bounds)
    # XLA would combine several quotients, or factors, into one that is infinite. So
    # the power of two is a single factor, and a normal number.
    top = jnp.finfo(high.dtype).maxexp - 2
    shift = jnp.where(high == 0, 0, jnp.minimum(exponent_of(high), top))
    # The last term is 0, or NaN where roots are not finite. If there are none, low is
    # infinite.
    factor = exp2(-shift, high.dtype) + 0 * (high - jnp.minimum(low, high))
    return factor, jnp.where(high == 0, DEAD, x.exponent + shift)


def normalize(x: Scaled) -> Scaled:
    """Bring the largest root of each exponent into $[1, 2)$."""
    factor, exponent = unit_of(x)
    return Scaled(x.root * factor, exponent)


def align(x: Scaled, exponent: jax.Array) -> jax.Array:
    """Return the roots of `x` at a given exponent, not below its own."""
    shift, dtype = x.exponent - exponent, x.root.dtype
    # Below the range of floats the factor is 0. The smallest float would be large
    # beside zeros.
    below = shift < jnp.finfo(dtype).minexp
    return x.root * jnp.where(below, 0, exp2(shift, dtype))


def common(x: Scaled, axes: tuple[int, ...] | None = None) -> Scaled:
    """Give entries along some axes, or all, one exponent."""
    axes = tuple(range(x.root.ndim)) if axes is None else axes
    if all(x.exponent.shape[axis] == 1 for axis in axes):
        return x
    x = normalize(x)
    top = jnp.max(x.exponent, axis=axes, keepdims=True)
    return Scaled(align(x, top), top)


def where(condition: jax.Array, x: Scaled) -> Scaled:
    """Return numbers, and NaN elsewhere."""
    return Scaled(jnp.where(condition, x.root, jnp.nan), x.exponent)


def together(values: Sequence[Scaled]) -> tuple[list[jax.Array], jax.Array]:
    """Return the roots of several arrays at one exponent, and that, a scalar."""
    values = [common(value) for value in values]
    if len(values) == 1:
        return [values[0].root], of_rank(values[0].exponent, 0)
    values = [normalize(value) for value in values]
    top = functools.reduce(jnp.maximum, (of_rank(x.exponent, 0) for x in values))
    return [align(x, of_rank(top, x.root.ndim)) for x in values], top


def multiply(*factors: Scaled) -> Scaled:
    """Return the product of factors that broadcast against each other."""
    product = factors[0]
    for factor in factors[1:]:
        x, y = normalize(product), normalize(factor)
        product = normalize(Scaled(x.root * y.root, x.exponent + y.exponent))
    return product


def broadcast(factors: tuple[Scaled, ...], shape: tuple[int, ...]) -> Scaled:
    """Multiply factors out to a shape."""
    root, exponent = multiply(*factors)
    rank = len(shape) - exponent.ndim
    exponent = jnp.expand_dims(exponent, tuple(range(rank)))
    return Scaled(jnp.broadcast_to(root, shape), exponent)
