r"""Sums over paths in carried-scale arithmetic: nothing overflows or underflows.

Path values are sums of $p$-th powers of products of many weights. In float32 they
leave the range of numbers at a depth of some tens of layers, or when the units of
a network differ in scale by $10^{20}$ (as in the unbalanced networks of the
Path-SGD paper). So a value is held by a root of it, and an array of values has an
exponent besides,

$$x = (q \cdot 2^e)^{2p}, \qquad q \ge 0.$$

The exponent, one for a whole layer, carries what depth multiplies; the root tells
apart units whose scales, in units of weights, are a factor of $2^{252}$ apart. Sums
are taken of quotients close to one: only these are raised to the power. What numbers
are scaled by has the derivative 0, so that the derivatives are those of the values.
Exponents cost no digit, and a root has the rounding of plain float32, of which its
power has $2p$ times as much.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.norms import at_least_float32, nonzero
from normax._core.powers_of_two import exp2, exponent_of, halves
from normax._core.scheduling import in_one_pass

DEAD = -(2**20)  # the exponent of zeros: never the largest of any sum
_LARGE = 2**18  # weights for which a second pass takes longer than its compilation


class Scaled(NamedTuple):
    """Non-negative numbers.

    Attributes:
      root: Float array, the roots $q$.
      exponent: Int32 array of the same rank that broadcasts against `root`, mostly
        with one entry.
    """

    root: jax.Array
    exponent: jax.Array


def _range(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest of non-negative numbers."""
    # Together, since XLA:CPU compiles each reduction of one array as three.
    x = lax.stop_gradient(x)
    bounds = jnp.asarray(jnp.inf, x.dtype), jnp.zeros((), x.dtype)
    both = lambda a, b: (lax.min(a[0], b[0]), lax.max(a[1], b[1]))  # noqa: E731
    return lax.reduce((x, x), bounds, both, axes)


def where_live(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return `fn(x)`, and 0 with derivative 0 where x is 0."""
    live = x != 0
    return jnp.where(live, fn(jnp.where(live, x, 1)), 0)


def of_rank(exponent: jax.Array, rank: int) -> jax.Array:
    """Return a single exponent for an array of another rank."""
    return jnp.reshape(exponent, (1,) * rank)


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
        return where_live(
            lambda x: jnp.power(x, jnp.asarray(self.p, x.dtype)), jnp.abs(x)
        )

    def value(self, q: jax.Array) -> jax.Array:
        """Return $q^{2p}$."""
        plain = isinstance(self.p, int) and self.p == 1
        return q * q if plain else self.power(q * q)

    def root(self, x: jax.Array) -> jax.Array:
        """Return $q$ with $q^{2p} = x > 0$."""
        if isinstance(self.p, int) and self.p in (1, 2):
            return functools.reduce(lambda x, _: jnp.sqrt(x), range(self.p), x)
        return jnp.power(x, jnp.asarray(0.5 / self.p, x.dtype))

    def of_weight(self, weight: jax.Array) -> Scaled:
        r"""Return $|w|^p$."""
        (weight,) = at_least_float32(weight)
        root = where_live(lambda w: jnp.sqrt(jnp.abs(w)), weight)
        return Scaled(root, jnp.zeros((1,) * root.ndim, jnp.int32))

    def cast(self, weight: jax.typing.ArrayLike, x: Scaled) -> jax.Array:
        """Return weights in the dtype of path values."""
        return at_least_float32(weight)[0].astype(x.root.dtype)

    def ones(self, shape: tuple[int, ...], dtype) -> Scaled:
        """Return ones."""
        return Scaled(jnp.ones(shape, dtype), jnp.zeros((1,) * len(shape), jnp.int32))

    def zeros(self, shape: tuple[int, ...], dtype) -> Scaled:
        """Return zeros."""
        exponent = jnp.full((1,) * len(shape), DEAD, jnp.int32)
        return Scaled(jnp.zeros(shape, dtype), exponent)

    def normalize(self, x: Scaled) -> Scaled:
        """Bring the largest root of each exponent into $[1, 2)$."""
        axes = tuple(i for i, n in enumerate(x.exponent.shape) if n == 1)
        low, high = (
            jnp.reshape(bound, x.exponent.shape) for bound in _range(x.root, axes)
        )
        # No quotient: XLA would turn several factors, or quotients of quotients, into
        # one that is infinite.
        shift = jnp.where(high == 0, 0, exponent_of(high))
        # The last term is 0, or NaN where roots are not finite.
        root = x.root * (exp2(-shift, high.dtype) + 0 * (high - low))
        return Scaled(root, jnp.where(high == 0, DEAD, x.exponent + shift))

    def align(self, x: Scaled, exponent: jax.Array) -> jax.Array:
        """Return the roots of `x` at a given exponent, not below its own."""
        shift, dtype = x.exponent - exponent, x.root.dtype
        # What is below the range of floats, and not its smallest number, which would
        # be large beside zeros.
        below = shift < jnp.finfo(dtype).minexp
        return x.root * jnp.where(below, 0, exp2(shift, dtype))

    def common(self, x: Scaled, axes: tuple[int, ...] | None = None) -> Scaled:
        """Give entries along some axes, or all, one exponent."""
        axes = tuple(range(x.root.ndim)) if axes is None else axes
        if all(x.exponent.shape[axis] == 1 for axis in axes):
            return x
        top = jnp.max(x.exponent, axis=axes, keepdims=True)
        return Scaled(self.align(x, top), top)

    def together(self, values: Sequence[Scaled]) -> tuple[list[jax.Array], jax.Array]:
        """Return the roots of several arrays at one exponent, and that, a scalar."""
        values = [self.common(value) for value in values]
        top = functools.reduce(jnp.maximum, (of_rank(x.exponent, 0) for x in values))
        if len(values) == 1:
            return [values[0].root], top
        return [self.align(x, of_rank(top, x.root.ndim)) for x in values], top

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        """Return $x + y$."""
        top = jnp.maximum(x.exponent, y.exponent)
        return Scaled(self._hypot(self.align(x, top), self.align(y, top)), top)

    def add_weight(self, x: Scaled, weight: jax.typing.ArrayLike) -> Scaled:
        """Return $x + |w|^p$, with all derivatives by w where x is not 0."""
        weight = self.cast(weight, x)
        y = self.normalize(self.of_weight(weight))
        top, dtype = jnp.maximum(x.exponent, y.exponent), x.root.dtype
        root = self.align(x, top)
        scale = self.scale(jnp.maximum(root, self.align(y, top)))
        # The power of w itself: of its root the second derivative at 0 is lost. The
        # bound is reached only there, and finite.
        bound = 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 1)
        unit = jnp.minimum(exp2(-top, dtype) / scale, bound)
        total = self.value(root / scale) + self.power(weight * unit * unit)
        return Scaled(scale * where_live(self.root, total), top)

    def _hypot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        # The smaller over the larger one: neither need be in the range of powers.
        large, small = jnp.maximum(a, b), jnp.minimum(a, b)
        return large * self.root(1 + self.value(small / nonzero(large)))

    def multiply(self, *factors: Scaled) -> Scaled:
        """Return the product of factors that broadcast against each other."""
        product = factors[0]
        for factor in factors[1:]:
            product = self.normalize(
                Scaled(product.root * factor.root, product.exponent + factor.exponent)
            )
        return product

    def broadcast(self, factors: tuple[Scaled, ...], shape: tuple[int, ...]) -> Scaled:
        """Multiply factors out to a shape."""
        root, exponent = self.multiply(*factors)
        rank = len(shape) - exponent.ndim
        exponent = jnp.expand_dims(exponent, tuple(range(rank)))
        return Scaled(jnp.broadcast_to(root, shape), exponent)

    def scale(self, x: jax.Array) -> jax.Array:
        """Return what to divide by, and multiply with again: no derivative passes."""
        return nonzero(lax.stop_gradient(x))

    def linear(
        self,
        fn: Callable[[jax.Array], jax.Array],
        x: Scaled,
        axes: tuple[int, ...],
        keepdims: bool = True,
    ) -> Scaled:
        """Apply a linear map with non-negative coefficients.

        Args:
          fn: The map, of plain numbers.
          x: Its argument.
          axes: The only axes that the map mixes; their entries get a common scale.
          keepdims: Whether the map's result still has these axes.

        Returns:
          `fn(x)`.
        """
        x = self.common(x, axes)
        scale = self.scale(jnp.max(x.root, axis=axes, keepdims=True, initial=0))
        total = fn(self.value(x.root / scale))
        root, exponent = where_live(self.root, total), x.exponent
        if not keepdims:
            scale, exponent = (jnp.squeeze(part, axes) for part in (scale, exponent))
        return Scaled(scale * root, exponent)

    def sum(self, x: Scaled, axes: tuple[int, ...], keepdims: bool = False) -> Scaled:
        """Return the sum over some axes."""
        if all(x.root.shape[axis] == 1 for axis in axes):
            parts = x if keepdims else (jnp.squeeze(part, axes) for part in x)
            return Scaled(*parts)
        return self.linear(
            lambda m: jnp.sum(m, axis=axes, keepdims=keepdims), x, axes, keepdims
        )

    def weigh(
        self,
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
        # Not with `root` again, whose broadcast XLA would write out for both passes;
        # behind a barrier XLA:CPU takes a number that it broadcasts for an array.
        factor = (2 * root) * spread(0.5 / nonzero(scale))
        return weight * factor * factor, scale

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
        weight, x = self.cast(weight, x), self.common(x)
        # A traced power is an operand, since derivatives may be taken by it; a plain
        # number is none, since it would be traced.
        p = (self.p,) if isinstance(self.p, jax.Array) else ()

        def total(arithmetic, scaled):
            return jnp.sum(arithmetic.power(scaled), axis=axes, keepdims=True)

        def carefully(weight, root, *p):
            arithmetic = PathArithmetic(*p) if p else self
            scaled, scale = arithmetic.weigh(
                weight,
                root,
                lambda half: jnp.max(half, axis=axes, initial=0, keepdims=True),
                lambda scale: scale,
            )
            # At least 1, up to rounding, unless the scale is 0.
            return scale * arithmetic.root(jnp.maximum(total(arithmetic, scaled), 0.5))

        def directly(weight, root, *p):
            arithmetic = PathArithmetic(*p) if p else self
            # The smallest squares become NaN, which fails the test of the range below.
            size = root * root
            size = jnp.where((size > 2.0**-80) | (root == 0), size, jnp.nan)
            sums = total(arithmetic, weight * size)
            low, high = _range(sums, tuple(range(sums.ndim)))
            return lambda: arithmetic.root(sums), (low > 2.0**-80) & (high < 2.0**80)

        quickly = jax.custom_jvp(in_one_pass(directly, carefully))

        @quickly.defjvp
        def derivative(primals, tangents):
            # Where one pass does not do, what it overflows to has no derivative.
            return quickly(*primals), jax.jvp(carefully, primals, tangents)[1]

        root = (carefully if weight.size < _LARGE else quickly)(weight, x.root, *p)
        return self.normalize(Scaled(root, of_rank(x.exponent, weight.ndim)))

    def log(self, x: Scaled) -> jax.Array:
        r"""Return $\log x$, $-\infty$ for 0."""
        live = x.root != 0
        exponent = jnp.where(live, x.exponent, 0).astype(x.root.dtype)
        log2 = jnp.log(2.0).astype(x.root.dtype)
        logarithm = 2 * self.p * (jnp.log(nonzero(x.root)) + exponent * log2)
        return jnp.where(live, logarithm, -jnp.inf)

    def pth_root(self, x: Scaled) -> jax.Array:
        r"""Return $x^{1/p}$ as a plain number, $\infty$ where it is too large."""
        first, second = halves(x.exponent, x.root.dtype)
        root = x.root * first * second
        return root * root

    def path_scale(self, x: Scaled) -> jax.Array:
        r"""Return $\gamma = x^{2/p}$ as a plain number."""
        root = self.pth_root(x)
        return root * root

    def inverse_roots(self, factors: tuple[Scaled, ...]) -> tuple[jax.Array, jax.Array]:
        r"""Return $f_1, f_2$ with $\gamma = (\prod_k x_k)^{2/p} = (f_1 f_2)^{-4}$.

        Args:
          factors: One or two $x_k$ that broadcast against each other.

        Returns:
          Two plain arrays of the shapes of the factors, or a factor and a scalar of its
          rank; their product is 0 where $\gamma$ is 0.
        """
        exponent = functools.reduce(jnp.add, (x.exponent for x in factors))
        # Where one factor is zeros, the other has no scale of its own.
        exponent = jnp.where(exponent < DEAD // 2, 0, exponent)
        # Of the sum: each by itself may leave the range of floats.
        scales = halves(-exponent, factors[0].root.dtype)

        def inverse(root, scale):
            # A quotient last, which XLA computes once for each unit, while it would
            # repeat other operations for each weight.
            live = root != 0
            return jnp.where(live, scale, 0) / jnp.where(live, root, 1)

        first = inverse(factors[0].root, scales[0])
        return first, inverse(factors[1].root, scales[1]) if factors[1:] else scales[1]


def divide_by_path_scale(
    update: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
    r"""Return $u / \gamma = u \, (f_1 f_2)^4$ in the dtype of $u$."""
    factor = first * second
    (result,) = at_least_float32(update)
    # In four steps: a power of the factor can leave the range of floats though the
    # result does not.
    for _ in range(4):
        result = result * factor.astype(result.dtype)
    return result.astype(update.dtype)
