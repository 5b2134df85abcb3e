"""Path saliency: the share of each weight in the sum over all paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.axes import PyTree
from normax._core.modules import refuse_modules
from normax._core.norms import at_least_float32, nonzero
from normax._core.powers_of_two import exp2, exponent_of, halves
from normax._core.programs import is_float, with_closure
from normax._core.scheduling import on_cuda, unless_safe
from normax.paths.arithmetic import PathArithmetic
from normax.paths.network import check_order
from normax.paths.norm import scale_factors, with_automatic_sharding
from normax.paths.numbers import DEAD, Scaled, where_live
from normax.paths.one_example import Forward
from normax.paths.values import Factors


class Saliency(NamedTuple):
    r"""Saliencies $s\,(r \cdot 2^e)^k$ of one array.

    Attributes:
      size: The numbers $s$, the sizes of weights, or 1.
      root: The numbers $r$.
      exponent: Int32 array $e$ that broadcasts against them, mostly with one entry.
      power: The power $k$, 1, 2 or 4.
    """

    size: jax.Array
    root: jax.Array
    exponent: jax.Array
    power: int

    def _roots(self) -> Scaled:
        root = self.size
        for _ in range(self.power // 2):
            root = where_live(jnp.sqrt, root)
        return Scaled(root * self.root, self.exponent)

    def log(self) -> jax.Array:
        r"""Return their logarithms, $-\infty$ for 0."""
        return PathArithmetic(self.power / 2).log(self._roots())

    def value(self) -> jax.Array:
        """Return them as plain numbers."""
        first, second = halves(self.exponent, self.root.dtype)
        # Products between the size and the saliency are in the range if both are.
        root = self.root * first * second
        # It may be infinite, but a weight of 0 has no share; a NaN stays.
        root = jnp.where(self.size == 0, 0 * self.root, root)
        return functools.reduce(jnp.multiply, [root] * self.power, self.size)

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """Return what they are ordered by: an exponent and a number in [1, 2)."""
        root, exponent = self._roots()
        live, shift = root != 0, exponent_of(nonzero(root))
        exponent = self.power * (shift + exponent)
        number = root * exp2(-shift, root.dtype)
        for _ in range(self.power // 2):
            number = number * number
        carry = exponent_of(nonzero(number))
        number = number * exp2(-carry, number.dtype)
        return jnp.where(live, exponent + carry, DEAD), number


Finish = Callable[[Saliency], Any]


def _directly(leaf: jax.Array, factors: Factors) -> tuple[Saliency, Any]:
    """Return the saliency of an array, and where no product has left the range."""
    (size,) = at_least_float32(jnp.abs(leaf))
    exponent = functools.reduce(jnp.add, (x.exponent for x in factors))
    if len(factors) == 1:
        return Saliency(size, factors[0].root, exponent, 2), []
    values = [size, *(x.root * x.root for x in factors)]
    product = functools.reduce(jnp.multiply, values)
    zeros = [size == 0, *(x.root == 0 for x in factors)]
    in_range = (product > 2.0**-100) & (product < 2.0**100)
    safe = functools.reduce(jnp.logical_or, zeros, in_range)
    return Saliency(jnp.ones((), product.dtype), product, 2 * exponent, 1), safe


def _carefully(leaf: jax.Array, factors: Factors) -> Saliency:
    """Return the saliency of an array by fourth roots, whose product has no range."""
    (size,) = at_least_float32(jnp.abs(leaf))
    parts = (where_live(jnp.sqrt, x.root) for x in factors)
    root = functools.reduce(jnp.multiply, parts)
    exponent = functools.reduce(jnp.add, (x.exponent for x in factors))
    odd = jnp.where(exponent & 1 == 1, 2.0**0.5, 1).astype(root.dtype)
    exponent = lax.shift_right_arithmetic(exponent, jnp.int32(1))
    return Saliency(size, root * odd, exponent, 4)


def saliencies(
    forward: Forward, params: PyTree, inputs: PyTree, finish: Finish
) -> list[Any]:
    """Return `finish` of the saliency of each array, None for arrays of integers."""

    def each(fn, params, direct):
        factors = scale_factors(forward, params, inputs, 1, direct=direct)
        structure: Any = jax.tree.structure(params)
        pairs = zip(
            jax.tree.leaves(params), structure.flatten_up_to(factors), strict=True
        )
        return [product and fn(jnp.asarray(leaf), product) for leaf, product in pairs]

    def carefully(params):
        found = each(_carefully, params, direct=False)
        return [x and finish(x) for x in found]

    def directly(params):
        found = each(_directly, params, direct=True)
        results = [x and finish(x[0]) for x in found]
        sums = [jnp.sum(x) for x in jax.tree.leaves(results) if is_float(x)]
        return results, ([x[1] for x in found if x], [~jnp.isnan(x) for x in sums])

    direct, of_direct = with_closure(directly, params)
    careful, of_careful = with_closure(carefully, params)

    @jax.custom_jvp
    def once(of_direct, of_careful, params):
        results, safe = direct(of_direct, params)
        return unless_safe(safe, results, careful, of_careful, params)

    # What is NaN has no derivative.
    once.defjvp(lambda primals, tangents: jax.jvp(careful, primals[1:], tangents[1:]))
    # A GPU waits for a conditional, and it has the roots while it waits for memory.
    always = lambda of_direct, *operands: careful(*operands)  # noqa: E731
    return on_cuda(always, once)(of_direct, of_careful, params)


def path_saliency(
    forward: Forward, params: PyTree, inputs: PyTree, log: bool = False
) -> PyTree:
    r"""Share of each weight in the sum over all paths of a ReLU network.

    $$\Big|\theta\, \frac{\partial \|\Phi(\theta)\|_1}{\partial \theta}\Big| =
      \sum_{e:\, w_e = \theta}\; \sum_{\text{paths through } e}\;
      \prod_{e' \in \text{path}} |w_{e'}|$$

    It is by how much the 1-path norm falls if the weight is set to 0, where it is the
    weight of one edge. An entry that many edges share, as in a convolution's kernel,
    counts every edge. No rescaling of hidden units changes it. It costs a forward and a
    backward pass over the paths, and no data.

    Args:
      forward: The network, as in `path_norm`.
      params: Its parameters, a pytree, which are edge weights, as in `path_scales`.
      inputs: An example or a batch of its inputs; only shapes matter.
      log: Whether to return the logarithm, which is finite at any depth and scale.

    Returns:
      Pytree like `params` of arrays in float32 or wider, with None for arrays of
      integers. The saliency is 0, and its logarithm $-\infty$, of weights that are 0 or
      on no path.

    Raises:
      ValueError: As `path_scales`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from normax import paths
      >>> def forward(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["output"]
      >>> hidden, output = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-2.0]])
      >>> params = {"hidden": hidden, "output": output}
      >>> paths.path_saliency(forward, params, jnp.ones((1, 1)))["hidden"].round(4)
      Array([[3., 4.]], dtype=float32)

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, A rescaling-invariant Lipschitz bound
      based on path-metrics, 2025; the score of Tanaka, Kunin, Yamins, Ganguli, Pruning
      neural networks without any data by iteratively conserving synaptic flow, 2020.
    """
    check_order("path_saliency", forward)
    refuse_modules(params)

    def evaluate(params):
        finish = Saliency.log if log else Saliency.value
        found = saliencies(forward, params, inputs, finish)
        return jax.tree.unflatten(jax.tree.structure(params), found)

    return jax.jit(with_automatic_sharding(evaluate))(params)
