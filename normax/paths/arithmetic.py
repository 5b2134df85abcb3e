r"""Arithmetic of path values: sums of $p$-th powers of products of many weights.

Path values are held by their roots and exponents, see `numbers.py`. Sums are taken of
quotients close to one: only these are raised to the power. What numbers are scaled by
has the derivative 0, so that the derivatives are those of the values. Exponents cost no
digit. A root has the rounding of plain float32, and its power $2p$ times as much.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from normax._core.norms import at_least_float32, nonzero
from normax._core.powers_of_two import exp2, exponent_of, halves
from normax.paths import numbers
from normax.paths.numbers import DEAD, Scaled, where_live


@dataclasses.dataclass(frozen=True)
class PathArithmetic:
    """Arithmetic of `Scaled` numbers.

    Attributes:
      p: The power of the weights, a number or a traced scalar.
      direct: Whether layers take one pass over the weights, and give NaN if that did
        not do. Otherwise they take a second one then, or at once.
      contractions: Counts the contractions that took one pass.
    """

    p: jax.typing.ArrayLike
    direct: bool = False
    contractions: Iterator[int] = dataclasses.field(
        default_factory=lambda: itertools.count(1), compare=False
    )

    def __post_init__(self):
        if isinstance(self.p, float) and self.p.is_integer():
            object.__setattr__(self, "p", int(self.p))

    @property
    def plain(self) -> bool:
        """Whether the power is known to be 1."""
        return isinstance(self.p, int) and self.p == 1

    def power(self, x: jax.Array) -> jax.Array:
        """Return $|x|^p$; by products where p is a plain 1 or 2."""
        if isinstance(self.p, int) and self.p in (1, 2):
            # By the sign, so that the derivative at 0 is 0, as for all other p.
            return x * jnp.sign(x) if self.p == 1 else x * x
        return where_live(
            lambda x: jnp.power(x, jnp.asarray(self.p, x.dtype)), jnp.abs(x)
        )

    def value(self, q: jax.Array) -> jax.Array:
        """Return $q^{2p}$."""
        return q * q if self.plain else self.power(q * q)

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

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        """Return $x + y$."""
        x, y = numbers.normalize(x), numbers.normalize(y)
        top = jnp.maximum(x.exponent, y.exponent)
        return Scaled(self._hypot(numbers.align(x, top), numbers.align(y, top)), top)

    def add_weight(self, x: Scaled, weight: jax.typing.ArrayLike) -> Scaled:
        """Return $x + |w|^p$, with all derivatives by w where x is not 0."""
        x, weight = numbers.normalize(x), numbers.cast(weight, x)
        y = numbers.normalize(self.of_weight(weight))
        top, dtype = jnp.maximum(x.exponent, y.exponent), x.root.dtype
        root = numbers.align(x, top)
        scale = numbers.scale(jnp.maximum(root, numbers.align(y, top)))
        # The root of w has no second derivative at 0, so w itself is raised to the
        # power. The bound is reached only there, and keeps the product finite.
        bound = 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 1)
        unit = jnp.minimum(exp2(-top, dtype) / scale, bound)
        total = self.value(root / scale) + self.power(weight * unit * unit)
        return Scaled(scale * where_live(self.root, total), top)

    def _hypot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        # Only the quotient is raised to the power, since the two may be out of range.
        large, small = jnp.maximum(a, b), jnp.minimum(a, b)
        return large * self.root(1 + self.value(small / nonzero(large)))

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
        x = numbers.common(x, axes)
        scale = numbers.scale(jnp.max(x.root, axis=axes, keepdims=True, initial=0))
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

    def log(self, x: Scaled) -> jax.Array:
        r"""Return $\log x$, $-\infty$ for 0."""
        live, root = x.root != 0, nonzero(x.root)
        # A large root and a small exponent would cancel.
        shift = exponent_of(root)
        exponent = jnp.where(live, x.exponent + shift, 0).astype(root.dtype)
        log2 = jnp.log(2.0).astype(root.dtype)
        mantissa = root * exp2(-shift, root.dtype)
        logarithm = 2 * self.p * (jnp.log(mantissa) + exponent * log2)
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
        # If one factor is all zeros, the product is 0 and its exponent says nothing.
        exponent = jnp.where(exponent < DEAD // 2, 0, exponent)
        # The sum of the exponents is split, since each may leave the range of floats.
        scales = halves(-exponent, factors[0].root.dtype)

        def inverse(root, scale):
            # XLA computes a quotient once for each unit, but repeats cheaper operations
            # for each weight. So the quotient comes last.
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
    # A power of the factor can leave the range of floats though the result does not.
    # So the factor is applied four times.
    for _ in range(4):
        result = result * factor.astype(result.dtype)
    return result.astype(update.dtype)
