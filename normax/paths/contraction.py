"""Contractions: sums of powers of weights times path values, whatever their range."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.norms import nonzero
from normax._core.scheduling import in_one_pass, on_cuda
from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.numbers import Scaled

LARGE = 2**18  # weights for which a second pass takes longer than its compilation


def weigh(
    weight: jax.Array,
    root: jax.Array,
    reduce: Callable[[jax.Array], jax.Array],
    spread: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    r"""Scale a weight array so that its powers sum in the range of floats.

    $$w_{ij}\,q_i^2 = a_{ij}\,s_j^2, \qquad \max_i |a_{ij}| = 1$$

    Square roots of weights are multiplied, which leaves no range.

    Args:
      weight: The $w_{ij}$.
      root: The $q_i$, broadcastable against the weights.
      reduce: Takes an array like `weight` to its maxima over $i$.
      spread: Takes these to an array that broadcasts against the weights.

    Returns:
      The $a_{ij}$, signed as the weights, and the $s_j$ as `reduce` shapes them.
    """
    half = jnp.sqrt(jnp.abs(lax.stop_gradient(weight))) * lax.stop_gradient(root)
    scale = reduce(half)
    # XLA would write out the root, broadcast, if both passes read the same one. So the
    # second pass takes twice the root.
    factor = (2 * root) * spread(0.5 / nonzero(scale))
    return weight * factor * factor, scale


def _sums(
    arithmetic: PathArithmetic, scaled: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    return jnp.sum(arithmetic.power(scaled), axis=axes, keepdims=True)


def in_two_passes(
    arithmetic: PathArithmetic,
    axes: tuple[int, ...],
    weight: jax.Array,
    root: jax.Array,
) -> jax.Array:
    """Return roots of the sums; the first pass finds what to divide by."""
    scaled, scale = weigh(
        weight,
        root,
        lambda half: jnp.max(half, axis=axes, initial=0, keepdims=True),
        lambda scale: scale,
    )
    # The sum is at least 1, up to rounding, unless the scale is 0.
    return scale * arithmetic.root(jnp.maximum(_sums(arithmetic, scaled, axes), 0.5))


def arithmetic_of(plain: Any, traced: tuple[jax.Array, ...]) -> PathArithmetic:
    (p,) = traced or (plain,)
    return PathArithmetic(p)


def power_of(arithmetic: PathArithmetic) -> tuple[Any, tuple[jax.Array, ...]]:
    """Return what `arithmetic_of` takes; derivatives are taken by a traced operand."""
    p = arithmetic.p
    return (None, (p,)) if isinstance(p, jax.Array) else (p, ())


def moderate(root: jax.Array) -> jax.Array:
    """Return squares; the smallest are NaN, which fails the test of the sums' range."""
    size = root * root
    return jnp.where((size > 2.0**-80) | (root == 0), size, jnp.nan)


def sums_in_range(sums: jax.Array) -> jax.Array:
    """Return whether sums are far from the ends of the range of floats."""
    return (sums > 2.0**-80) & (sums < 2.0**80)


def _directly(
    arithmetic: PathArithmetic,
    axes: tuple[int, ...],
    weight: jax.Array,
    root: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the sums in one pass, and where nothing has left the range of floats."""
    sums = _sums(arithmetic, weight * moderate(root), axes)
    return sums, sums_in_range(sums)


def fits_float64(arithmetic: PathArithmetic, dtype: Any) -> bool:
    """Return whether float64 holds all powers of products of weights and values."""
    return dtype == jnp.float32 and isinstance(arithmetic.p, int) and arithmetic.p < 3


def _in_float64(
    arithmetic: PathArithmetic,
    axes: tuple[int, ...],
    weight: jax.Array,
    root: jax.Array,
    unit: jax.Array,
) -> jax.Array:
    with jax.enable_x64(True):
        wide, root, unit = (x.astype(jnp.float64) for x in (weight, root, unit))
        size = jnp.abs(wide) * (root * root)
        powers = size if arithmetic.plain else size * size
        sums = jnp.sum(powers, axis=axes, keepdims=True)
        return (arithmetic.root(sums) * unit).astype(weight.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _roots(
    p: Any,
    axes: tuple[int, ...],
    once: bool,
    weight: jax.Array,
    root: jax.Array,
    unit: jax.Array,
    *traced_p: jax.Array,
) -> jax.Array:
    """Return roots of the sums, of which `once` takes a second pass only if it must."""
    arithmetic = arithmetic_of(p, traced_p)

    def directly(weight, root):
        sums, safe = _directly(arithmetic, axes, weight, root)
        return lambda: arithmetic.root(sums), safe

    carefully = functools.partial(in_two_passes, arithmetic, axes)
    take = in_one_pass(directly, carefully) if once else carefully
    elsewhere = lambda weight, root, unit: take(weight, root * unit)  # noqa: E731
    if fits_float64(arithmetic, weight.dtype):
        in_float64 = functools.partial(_in_float64, arithmetic, axes)
        return on_cuda(in_float64, elsewhere)(weight, root, unit)
    return elsewhere(weight, root, unit)


@_roots.defjvp
def _derivative(p, axes, once, primals, tangents):
    # One pass may overflow, and has no derivative then. So two passes give it.
    def carefully(weight, root, unit, *traced_p):
        return in_two_passes(arithmetic_of(p, traced_p), axes, weight, root * unit)

    tangent = jax.jvp(carefully, primals, tangents)[1]
    return _roots(p, axes, once, *primals), tangent


def roots_of_sums(
    arithmetic: PathArithmetic,
    axes: tuple[int, ...],
    weight: jax.Array,
    root: jax.Array,
    unit: jax.typing.ArrayLike = 1.0,
    once: bool = False,
) -> jax.Array:
    r"""Return the roots of $\sum_i |w_{ij}|^p x_i$, times a power of two.

    An NVIDIA GPU sums in float64, if that holds all terms. So it needs neither a second
    pass nor a conditional, for which its host would wait.

    Args:
      arithmetic: Arithmetic of path values.
      axes: The axes of $i$.
      weight: Array of weights.
      root: The roots of the $x_i$, broadcastable against the weights.
      unit: The power of two.
      once: Whether other devices take one pass, and a second one only if one does not
        do. Otherwise the first finds what to divide by.

    Returns:
      The roots, with length one on `axes`.
    """
    p, traced_p = power_of(arithmetic)
    unit = jnp.asarray(unit, root.dtype)
    return _roots(p, axes, once, weight, root, unit, *traced_p)


def contract(
    arithmetic: PathArithmetic, weight: jax.Array, x: Scaled, axes: tuple[int, ...]
) -> Scaled:
    r"""Return the path values behind a dense layer, $\sum_i |w_{ij}|^p x_i$.

    One pass over the weights does where all is of moderate size. Only the products of
    the weights with $x$ need to be balanced, not the weights themselves.

    Args:
      arithmetic: Arithmetic of path values.
      weight: Array of weights.
      x: The $x_i$, of the shape of `weight` with length one on the other axes.
      axes: The axes of $i$.

    Returns:
      The sums, with length one on `axes`.
    """
    weight, x = numbers.cast(weight, x), numbers.common(x)
    if arithmetic.direct:
        sums, safe = _directly(arithmetic, axes, weight, x.root)
        root = arithmetic.root(jnp.where(safe, sums, jnp.nan))
        # A GPU takes longer for the exponent than for the roots. So some layers share
        # it, whose sums of any usual size stay in the range.
        if next(arithmetic.contractions) % 8:
            return Scaled(root, x.exponent)
        return numbers.normalize(Scaled(root, x.exponent))
    unit, exponent = numbers.unit_of(x)
    once = weight.size >= LARGE
    root = roots_of_sums(arithmetic, axes, weight, x.root, unit, once)
    # What is infinite has no quotient, so it is NaN.
    return Scaled(root + 0 * lax.stop_gradient(root), exponent)
