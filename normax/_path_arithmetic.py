r"""Sums over paths in carried-scale arithmetic: nothing overflows or underflows.

Path values are sums of $p$-th powers of products of many weights. In float32 they
leave the range of numbers at a depth of some tens of layers, or when the units of
a network differ in scale by $10^{20}$ (as in the unbalanced networks of the
Path-SGD paper). So every value carries a scale of its own,

$$x = m \cdot (4^e)^p, \qquad m \in \{0\} \cup [1, 4^p),$$

with a floating-point mantissa $m$ and an integer exponent $e$. The scale $4^e$ has the
units of a weight: weights are multiplied by scales, and only their quotients, which
are close to one, are raised to the power $p$. Powers of two round nothing, so
that the results are as accurate as plain float32, and the derivatives are those
of the values.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._norms import at_least_float32

DEAD = -(2**20)  # the exponent of 0: never the largest of any sum
_LARGE = 2**18  # weights for which a second pass takes longer than its compilation


class Scaled(NamedTuple):
    """Non-negative numbers with a scale each.

    Attributes:
      mantissa: Float array.
      exponent: Int32 array of the same shape.
    """

    mantissa: jax.Array
    exponent: jax.Array


def _layout(dtype) -> tuple[type, int, int]:
    info = jnp.finfo(dtype)
    return (jnp.int32 if info.bits == 32 else jnp.int64), info.nmant, info.maxexp - 1


def _log2_floor(x: jax.Array) -> jax.Array:
    # The exponent field of a non-negative float. Not `jnp.frexp`, whose many
    # operations cost compile time.
    integer, mantissa_bits, bias = _layout(x.dtype)
    field = lax.shift_right_logical(
        lax.bitcast_convert_type(x, integer), jnp.asarray(mantissa_bits, integer)
    )
    return field.astype(jnp.int32) - bias


def _exp2(n: jax.Array, dtype) -> jax.Array:
    # Exact, unlike `jnp.exp2`; the nearest normal power outside the range.
    integer, mantissa_bits, bias = _layout(dtype)
    field = (jnp.clip(n, 1 - bias, bias) + bias).astype(integer)
    return lax.bitcast_convert_type(
        lax.shift_left(field, jnp.asarray(mantissa_bits, integer)), dtype
    )


def _select(live: jax.Array, x: jax.Array) -> jax.Array:
    # A harmless 1 where x is 0, for roots whose derivative there is infinite.
    return jnp.where(live, x, 1)


@dataclasses.dataclass(frozen=True)
class PathArithmetic:
    """Arithmetic of `Scaled` numbers.

    Attributes:
      p: The power of the weights, a number or a traced scalar.
    """

    p: jax.typing.ArrayLike

    def __post_init__(self):
        if isinstance(self.p, float) and self.p.is_integer():
            object.__setattr__(self, "p", int(self.p))

    def power(self, x: jax.Array) -> jax.Array:
        """Return $|x|^p$; by products where p is a plain 1 or 2."""
        if isinstance(self.p, int) and self.p in (1, 2):
            # The sign has the derivative 0 at 0 that the other powers have.
            return x * jnp.sign(x) if self.p == 1 else x * x
        return jnp.power(jnp.abs(x), jnp.asarray(self.p, x.dtype))

    def root(self, x: jax.Array) -> jax.Array:
        """Return $x^{1/p}$ for $x >= 0$, with derivative 0 at 0."""
        live = x != 0
        if isinstance(self.p, int) and self.p in (1, 2):
            root = x if self.p == 1 else jnp.sqrt(_select(live, x))
        else:
            root = jnp.power(_select(live, x), jnp.asarray(1 / self.p, x.dtype))
        return jnp.where(live, root, 0)

    def normalize(self, mantissa: jax.Array, exponent: jax.Array) -> Scaled:
        """Bring any non-negative mantissas into $[1, 4^p)$."""
        bits = _log2_floor(mantissa)
        # Not further than the largest power of 4, also for 0.
        limit = jnp.finfo(mantissa.dtype).maxexp - 1
        if isinstance(self.p, int):
            shift = jnp.maximum(bits // (2 * self.p), -(limit // (2 * self.p)))
        else:
            lowest = -jnp.floor(jnp.asarray(limit / (2 * self.p), mantissa.dtype))
            floor = jnp.floor(bits.astype(mantissa.dtype) / (2 * self.p))
            shift = jnp.maximum(floor, lowest).astype(jnp.int32)
        mantissa = mantissa * self.power(_exp2(-2 * shift, mantissa.dtype))
        exponent = jnp.where(mantissa == 0, DEAD, exponent + shift)
        return Scaled(mantissa, exponent)

    def of_weight(self, weight: jax.Array) -> Scaled:
        r"""Return $|w|^p$."""
        (weight,) = at_least_float32(weight)
        size = jnp.abs(weight)
        exponent = jnp.where(size == 0, 0, _log2_floor(size) // 2)
        mantissa = self.power(size * _exp2(-2 * exponent, size.dtype))
        return Scaled(mantissa, jnp.where(mantissa == 0, DEAD, exponent))

    def cast(self, weight: jax.typing.ArrayLike, x: Scaled) -> jax.Array:
        """Return weights in the dtype of path values."""
        return at_least_float32(weight)[0].astype(x.mantissa.dtype)

    def ones(self, shape: tuple[int, ...], dtype) -> Scaled:
        """Return ones."""
        return Scaled(jnp.ones(shape, dtype), jnp.zeros(shape, jnp.int32))

    def zeros(self, shape: tuple[int, ...], dtype) -> Scaled:
        """Return zeros."""
        return Scaled(jnp.zeros(shape, dtype), jnp.full(shape, DEAD, jnp.int32))

    def align(self, x: Scaled, exponent: jax.Array) -> jax.Array:
        """Return the mantissas of `x` at a given exponent, not below its own."""
        shift = 2 * (x.exponent - exponent)
        return x.mantissa * self.power(_exp2(shift, x.mantissa.dtype))

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        """Return $x + y$."""
        exponent = jnp.maximum(x.exponent, y.exponent)
        total = self.align(x, exponent) + self.align(y, exponent)
        return self.normalize(total, exponent)

    def multiply(self, *factors: Scaled) -> Scaled:
        """Return the product of factors that broadcast against each other."""
        mantissa, exponent = factors[0]
        for factor in factors[1:]:
            mantissa = mantissa * factor.mantissa
            exponent = exponent + factor.exponent
            mantissa, exponent = self.normalize(mantissa, exponent)
        return Scaled(mantissa, exponent)

    def broadcast(self, factors: tuple[Scaled, ...], shape: tuple[int, ...]) -> Scaled:
        """Multiply factors out to a shape."""
        product = self.multiply(*factors)
        return Scaled(*(jnp.broadcast_to(array, shape) for array in product))

    def linear(
        self,
        fn: Callable[[jax.Array], jax.Array],
        x: Scaled,
        axes: tuple[int, ...],
        keepdims: bool = True,
    ) -> Scaled:
        """Apply a linear map with non-negative coefficients.

        Args:
          fn: The map, of mantissas.
          x: Its argument.
          axes: The only axes that the map mixes; their entries get a common scale.
          keepdims: Whether the map's result still has these axes.

        Returns:
          `fn(x)`.
        """
        top = jnp.max(x.exponent, axis=axes, keepdims=True)
        mantissa = fn(self.align(x, top))
        if not keepdims:
            top = jnp.squeeze(top, axes)
        return self.normalize(mantissa, jnp.broadcast_to(top, mantissa.shape))

    def sum(self, x: Scaled, axes: tuple[int, ...], keepdims: bool = False) -> Scaled:
        """Return the sum over some axes."""
        return self.linear(
            lambda m: jnp.sum(m, axis=axes, keepdims=keepdims), x, axes, keepdims
        )

    def weigh(
        self,
        weight: jax.Array,
        exponent: jax.Array,
        reduce: Callable[[jax.Array], jax.Array],
        spread: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        r"""Scale a weight array so that its powers sum in the range of floats.

        $$w_{ij}\,4^{e_i} = a_{ij}\,4^{d_j}, \qquad \max_i |a_{ij}| \in [1/4, 1)$$

        Square roots of weights and scales are multiplied, so that scales up to
        $4^{\pm 126}$ apart are told from each other.

        Args:
          weight: The $w_{ij}$.
          exponent: The $e_i$, broadcastable against the weights.
          reduce: Takes an array like `weight` to its maxima over $i$.
          spread: Takes these to an array that broadcasts against the weights.

        Returns:
          The $a_{ij}$, signed as the weights, and the $d_j$ as `reduce` shapes them.
        """
        top = jnp.max(exponent)
        scale = _exp2(exponent - top, weight.dtype)
        half = jnp.sqrt(jnp.abs(lax.stop_gradient(weight))) * scale
        result = _log2_floor(reduce(half)) + top + 1
        quotient = scale * _exp2(top - spread(result), weight.dtype)
        return weight * quotient * quotient, result

    def contract(self, weight: jax.Array, x: Scaled, axes: tuple[int, ...]) -> Scaled:
        r"""Return the path values behind a dense layer, $\sum_i |w_{ij}|^p x_i$.

        Where all is of moderate size, one pass over the weights does; the
        weights themselves need not be balanced, only their products with $x$.

        Args:
          weight: Array of weights.
          x: The $x_i$, of the shape of `weight` with length one on the other axes.
          axes: The axes of $i$.

        Returns:
          The sums, with length one on `axes`.
        """
        weight, root = self.cast(weight, x), self.root(x.mantissa)
        top = jnp.max(x.exponent)

        def total(scaled):
            # Not |w|^p x: XLA:CPU sums a product of three arrays 300 times slower.
            return jnp.sum(self.power(weight * scaled), axis=axes, keepdims=True)

        def carefully():
            a, exponent = self.weigh(
                weight,
                x.exponent,
                lambda half: jnp.max(half, axis=axes, keepdims=True),
                lambda exponent: exponent,
            )
            sums = jnp.sum(self.power(a * root), axis=axes, keepdims=True)
            return self.normalize(sums, exponent)

        if weight.size < _LARGE:
            return carefully()
        direct = total(root * _exp2(2 * (x.exponent - top), root.dtype))
        moderate = (x.mantissa == 0) | (x.exponent > top - 20)
        safe = jnp.all(moderate) & jnp.all((direct > 2.0**-80) & (direct < 2.0**100))
        return lax.cond(
            safe,
            lambda: self.normalize(direct, jnp.broadcast_to(top, direct.shape)),
            carefully,
        )

    def log(self, x: Scaled) -> jax.Array:
        r"""Return $\log x$, $-\infty$ for 0."""
        live = x.mantissa != 0
        exponent = jnp.where(live, x.exponent, 0).astype(x.mantissa.dtype)
        scale = self.p * jnp.log(4.0).astype(x.mantissa.dtype)
        logarithm = jnp.log(_select(live, x.mantissa)) + exponent * scale
        return jnp.where(live, logarithm, -jnp.inf)

    def pth_root(self, x: Scaled) -> jax.Array:
        r"""Return $x^{1/p}$ as a plain number, $\infty$ where it is too large."""
        scale = _exp2(x.exponent, x.mantissa.dtype)
        return self.root(x.mantissa) * scale * scale

    def path_scale(self, x: Scaled) -> jax.Array:
        r"""Return $\gamma = x^{2/p}$ as a plain number."""
        root = self.root(x.mantissa)
        scale = _exp2(x.exponent, root.dtype)
        return root * root * scale * scale * scale * scale

    def divide_by_path_scale(
        self, update: jax.Array, factors: tuple[Scaled, ...]
    ) -> jax.Array:
        r"""Return $u / \gamma$ with $\gamma = (\prod_k x_k)^{2/p}$; 0 where it is 0.

        Args:
          update: The $u$.
          factors: The $x_k$; they broadcast against each other to the shape of
            `update`.

        Returns:
          Array in the dtype of `update`.
        """
        scales, shrunk = [], []
        net = jnp.zeros((), jnp.int32)
        for x in factors:
            live = x.mantissa != 0
            # Only the sum of the exponents matters: the largest of all but the last
            # factor are left to the last, so that no factor's power leaves the range.
            last = x is factors[-1]
            top = -net if last else jnp.max(x.exponent, initial=DEAD)
            net = net + top
            exponent = jnp.where(live, x.exponent - top, 0)
            # A quotient, which XLA computes once for each unit, while it would
            # repeat the integer operations of `_exp2` for each weight.
            scale = 1 / _exp2(exponent, x.mantissa.dtype)
            root = self.root(x.mantissa)
            inverse = jnp.where(live, 1 / _select(live, root * root), 0)
            scales.append(scale)
            shrunk.append(scale * inverse)
        (result,) = at_least_float32(update)
        # In four steps: the fourth power of the scale can leave the range of floats
        # though the result does not.
        for parts in (shrunk, scales, scales, scales):
            factor = math.prod(parts[1:], start=parts[0])
            result = result * factor.astype(result.dtype)
        return result.astype(update.dtype)
