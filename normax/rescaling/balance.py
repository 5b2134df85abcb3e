"""Group norms of a network, and the rescaling that makes the max-norm smallest.

Group norms measure the weights that enter each unit, so rescalings change them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normax._core.axes import PyTree
from normax._core.checks import check_range
from normax._core.norms import at_least_float32, nonzero, vector_norm
from normax._core.powers_of_two import exp2, exponent_of
from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.contraction import contract
from normax.paths.feed_forward import Layer
from normax.paths.norm import with_automatic_sharding
from normax.paths.numbers import Scaled, of_rank
from normax.paths.one_example import Forward
from normax.rescaling.check import rescaled_network
from normax.rescaling.network import (
    UnitFactors,
    all_source_units,
    chained_layers,
    expand_to,
    parameter_layers,
)


def _check_power(name: str, value: jax.typing.ArrayLike) -> None:
    infinite = not isinstance(value, jax.core.Tracer) and np.isposinf(np.asarray(value))
    if not infinite:
        check_range(name, value, 1)


def _p_norm(x: jax.Array, p: jax.typing.ArrayLike, axes: tuple[int, ...]) -> jax.Array:
    r"""Return $(\sum_i |x_i|^p)^{1/p}$; p may be infinite or traced."""
    if not isinstance(p, jax.core.Tracer):
        if np.isposinf(np.asarray(p)):
            return jnp.max(jnp.abs(x), axis=axes, initial=0.0)
        if p == 2:
            return jnp.squeeze(vector_norm(x, axes), axes)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    # XLA replaces the division by `size` with a product with 1 / size, which must not
    # be so small that it is flushed to 0.
    size = lax.stop_gradient(jnp.minimum(nonzero(largest), jnp.finfo(x.dtype).max / 16))
    power = jnp.where(jnp.isinf(p), 1, p).astype(x.dtype)
    total = jnp.sum((jnp.abs(x) / size) ** power, axis=axes)
    root = jnp.where(total == 0, 1, total) ** (1 / power)
    norm = jnp.where(total == 0, 0, root * jnp.squeeze(size, axes))
    return jnp.where(jnp.isinf(p), jnp.squeeze(largest, axes), norm)


def _group_norm(leaves, layers, p, q) -> jax.Array:
    norms = []
    for layer in layers:
        (kernel,) = at_least_float32(leaves[layer.kernel])
        entering = _p_norm(kernel, p, tuple(range(kernel.ndim - 1)))
        if layer.bias is not None:
            pair = at_least_float32(entering, leaves[layer.bias])
            entering = _p_norm(jnp.stack(pair), p, (0,))
        norms.append(_p_norm(entering, q, (0,)))
    return _p_norm(jnp.stack(at_least_float32(*norms)), q, (0,))


_compiled_group_norm = jax.jit(_group_norm, static_argnums=(1, 2, 3))


def group_norm(
    params: PyTree, p: jax.typing.ArrayLike, q: jax.typing.ArrayLike
) -> jax.Array:
    r"""Group norm of a network: the $q$-norm over units of their incoming $p$-norms.

    $$\mu_{p,q}(w) = \Big(\sum_{v} \Big(\sum_{u \to v} |w_{u \to v}|^p\Big)^{q/p}
      \Big)^{1/q}$$

    The outer sum is over hidden and output units. A bias counts as a weight into its
    unit. A channel of a convolution is one unit, and each weight of its kernel counts
    once. For $p = q = 2$ the square of the norm is the penalty of weight decay.

    Args:
      params: Pytree of kernels, of rank two or more with the outputs last, and their
        biases, in any order.
      p: The power of weights, from 1 to infinity.
      q: The power of units, from 1 to infinity.

    Returns:
      A scalar, in float32 or wider.

    Raises:
      ValueError: `p` or `q` is below 1, or a parameter is neither a kernel nor a bias.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [{"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0, 7.0])}]
      >>> float(normax.rescaling.group_norm(params, p=2, q=1))  # 5 + 7
      12.0

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, equation (3).
    """
    _check_power("p", p)
    _check_power("q", q)
    layers, leaves = parameter_layers(params), jax.tree.leaves(params)
    if any(isinstance(power, jax.core.Tracer) for power in (p, q)):
        return _group_norm(leaves, layers, p, q)
    powers = (np.asarray(power).item() for power in (p, q))
    return _compiled_group_norm(leaves, layers, *powers)


def max_norm(params: PyTree, p: jax.typing.ArrayLike = 2.0) -> jax.Array:
    r"""Largest norm of the weights that enter one unit.

    $$\mu_{p,\infty}(w) = \max_v \Big(\sum_{u \to v} |w_{u \to v}|^p\Big)^{1/p}$$

    Args:
      params: Pytree of kernels and biases, as in `group_norm`.
      p: The power of weights, from 1 to infinity.

    Returns:
      A scalar, in float32 or wider.

    Raises:
      ValueError: As in `group_norm`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [{"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0, 7.0])}]
      >>> float(normax.rescaling.max_norm(params))
      7.0

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, equation (4).
    """
    return group_norm(params, p, jnp.inf)


def _least_scales(
    arrays: Sequence[jax.Array],
    layers: tuple[Layer, ...],
    sources: Sequence[np.ndarray],
    p: float,
) -> tuple[jax.Array, list[Scaled]]:
    """Return the least max-norm m, and the path norms of all units for weights / m.

    Newton's method finds the m for which the largest path norm of an output is 1.
    Derivation: docs/theory/rescaling.md.
    """
    arithmetic = PathArithmetic(p)
    dtype = arrays[0].dtype

    def spread(x: Scaled, position: int) -> Scaled:
        rank = arrays[layers[position].kernel].ndim
        root = expand_to(x.root[sources[position - 1]], rank)
        return Scaled(root, of_rank(x.exponent, rank))

    def path_values(m: jax.Array) -> list[Scaled]:
        values: list[Scaled] = []
        share = arithmetic.of_weight(jnp.expand_dims(1 / m, 0))
        for position, layer in enumerate(layers):
            kernel = arrays[layer.kernel]
            if position == 0:
                entering = numbers.ones((1,) * kernel.ndim, dtype)
            else:
                entering = spread(values[-1], position)
            axes = tuple(range(kernel.ndim - 1))
            value = contract(arithmetic, kernel, entering, axes)
            value = Scaled(jnp.squeeze(value.root, axes), of_rank(value.exponent, 1))
            if layer.bias is not None:
                value = arithmetic.add_weight(value, arrays[layer.bias])
            values.append(numbers.multiply(value, share))
        return values

    def excess(m: jax.Array) -> tuple[jax.Array, list[Scaled]]:
        values = path_values(m)
        return jnp.max(arithmetic.log(values[-1])) / p, values

    def newton(state):
        m, step, count, _ = state
        m = m * jnp.exp(step)
        value, slope, values = jax.jvp(excess, (m,), (m,), has_aux=True)
        # Without a path of nonzero weights, the value is -inf and any m will do.
        step = jnp.where(value == -jnp.inf, 0, -value / slope)
        return m, step, count + 1, values

    def unfinished(state):
        _, step, count, _ = state
        return (count == 0) | (
            (jnp.abs(step) > 16 * jnp.finfo(dtype).eps) & (count < 60)
        )

    widths = [arrays[layer.kernel].shape[-1] for layer in layers]
    nothing = [numbers.zeros((width,), dtype) for width in widths]
    start = jnp.ones((), dtype), jnp.zeros((), dtype), 0, nothing
    m, _, _, values = lax.while_loop(unfinished, newton, start)
    return m, values


@functools.partial(jax.jit, static_argnames=("layers", "p"))
def _balancing_factors(
    leaves: Sequence[jax.Array], *, layers: tuple[Layer, ...], p: float
) -> list[UnitFactors]:
    """Return the factors of hidden units: the inverses of their least scales."""
    arrays = at_least_float32(*leaves)
    dtype = arrays[0].dtype
    sources = all_source_units(leaves, layers)
    m, values = _least_scales(arrays, layers, sources, p)
    log_m, log_eps = jnp.log2(m), jnp.log2(jnp.finfo(dtype).eps)
    later = jnp.zeros_like(values[-1].root)
    factors: list[UnitFactors] = []
    for position in range(len(layers) - 2, -1, -1):
        root, shared = values[position]
        exponent = exponent_of(nonzero(root))
        mantissa = jnp.square(root * exp2(-exponent, dtype))
        exponent = 2 * (exponent + shared)
        # A unit whose incoming weights are all 0 has the least scale 0, which has no
        # inverse. So it gets a small scale instead. At the scale `room` (logarithms
        # here) one outgoing weight would fill the norm m of the next unit. At `eps`
        # times this scale, it adds no more to that norm than rounding does.
        kernel = arrays[layers[position + 1].kernel]
        room = expand_to(log_m + later, kernel.ndim) - jnp.log2(jnp.abs(kernel))
        room = jnp.min(room, axis=tuple(range(kernel.ndim - 2)))
        source = sources[position]
        room = jnp.min(room, axis=1, keepdims=True) if source.shape[1] == 1 else room
        least = jnp.full_like(root, jnp.inf).at[source].min(room)
        least = jnp.where(least == jnp.inf, 0, jnp.floor(least + log_eps))
        exponent = jnp.where(root == 0, least.astype(jnp.int32), exponent)
        mantissa = jnp.where(root == 0, 1, mantissa)
        later = jnp.log2(mantissa) + exponent.astype(dtype)
        factors.insert(0, UnitFactors(1 / mantissa, -exponent))
    return factors


def balance(
    params: PyTree,
    p: float = 2.0,
    *,
    forward: Forward | None = None,
    inputs: PyTree = None,
) -> PyTree:
    r"""Rescale a ReLU network to the least max-norm, with its function kept.

    $$\min_{\tilde w \sim w} \mu_{p,\infty}(\tilde w) =
      \min \{m : \phi_p^{(k)}(w / m) \le 1 \text{ for every output } k\}$$

    Here $\phi_p^{(k)}$ is the path norm of output $k$. Every hidden unit gets the
    incoming norm $m$, and every output at most $m$. For one output and no biases,
    $m^d$ is the path norm of a network of depth $d$. With biases it is not, because
    their paths are shorter. Derivation: docs/theory/rescaling.md. It is a canonical
    form, to compare networks and to repair weights of very unequal scale. It need not
    train better: on two moons, SGD gained by `p=1` and lost by `p=2`.

    Args:
      params: Pytree of kernels and biases of a plain stack, see `rescale_units`.
      p: The power of the max-norm, at least 1 and below 32, a number.
      forward: The network, which gives the order of the layers, and is checked as in
        `rescale_units`.
      inputs: Inputs of the network.

    Returns:
      Pytree like `params`, in the same dtypes.

    Raises:
      ValueError: As in `rescale_units`; or `p` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> balanced = normax.rescaling.balance(params)
      >>> round(float(normax.rescaling.max_norm(balanced) ** 2), 5)  # the path norm
      5.0

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, Lemma 3.1.
    """
    check_range("p", p, 1, 32)
    layers = chained_layers(params, forward, inputs)
    leaves = jax.tree.leaves(params)
    find = functools.partial(_balancing_factors, layers=layers, p=float(p))
    factors = with_automatic_sharding(find)(leaves)
    return rescaled_network(params, layers, factors, forward, inputs)
