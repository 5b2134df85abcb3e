"""Rescalings of hidden units by given and by random factors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree
from normax._core.checks import check_number, check_positive, check_range
from normax._core.norms import common_dtype
from normax._core.powers_of_two import exponent_of, halves
from normax.paths.feed_forward import Layer
from normax.paths.one_example import Forward
from normax.rescaling.check import rescaled_network
from normax.rescaling.network import UnitFactors, chained_layers


def _checked_factors(units: int, value: Any, dtype: Any, name: str) -> Any:
    check_positive(f"the factors of the units of {name}", value)
    array: Any
    broadcast: Callable[..., Any]
    if isinstance(value, jax.core.Tracer):
        array, broadcast = value.astype(dtype), jnp.broadcast_to
    else:
        with np.errstate(over="ignore", under="ignore"):
            array, broadcast = np.asarray(value).astype(dtype), np.broadcast_to
        if not np.all((array >= np.finfo(dtype).tiny) & np.isfinite(array)):
            raise ValueError(
                f"factors must be numbers that {np.dtype(dtype)} can hold, but those "
                f"of {name} are {value}; choose them closer to 1, or enable float64."
            )
    try:
        return broadcast(array, (units,))
    except ValueError:
        raise ValueError(
            f"factors must broadcast to one number per unit, but those of {name} have "
            f"shape {np.shape(value)}, and it has {units} units; pass a number, or one "
            "number per unit."
        ) from None


@jax.jit
def _split(factors: Sequence[jax.Array]) -> list[UnitFactors]:
    def split(c):
        exponent = exponent_of(c)
        first, second = halves(-exponent, c.dtype)
        return UnitFactors(c * first * second, exponent)

    return [split(c) for c in factors]


def _dtype(leaves: Sequence[Any], layers: tuple[Layer, ...]) -> Any:
    return common_dtype(jnp.float32, *(leaves[layer.kernel].dtype for layer in layers))


def rescale_units(
    params: PyTree,
    factors: Sequence[jax.typing.ArrayLike] | jax.typing.ArrayLike,
    *,
    forward: Forward | None = None,
    inputs: PyTree = None,
) -> PyTree:
    r"""Rescale the hidden units of a ReLU network, which keeps its function.

    $$\tilde w_{u \to v} = \frac{c_v}{c_u}\, w_{u \to v}, \qquad
      \tilde b_v = c_v\, b_v$$

    Inputs and outputs have $c = 1$. The network is a plain stack with ReLUs, in natural
    order of its parameters' names; docs/theory/rescaling.md says which layers fit.
    Shapes do not show another order, residual connections or other activations. So
    pass `forward`, which gives the order of layers and has the function checked.

    Args:
      params: Pytree of kernels and biases.
      factors: Positive factors $c$: for every hidden layer a number, or an array that
        broadcasts to its units (of a convolution, its channels).
      forward: The network, `forward(params, inputs) -> outputs`. Its layers come in
        the order in which it uses their kernels. It is compared before and after at
        random inputs, except under `jax.jit`.
      inputs: Inputs of the network, or `jax.ShapeDtypeStruct`s of them. Only shapes and
        the values of integers matter.

    Returns:
      Pytree like `params`, in the same dtypes.

    Raises:
      ValueError: The parameters are no plain stack. Or the factors do not fit, or are
        not positive. Or a weight leaves the range of its dtype, or `forward` computes
        another function.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> normax.rescaling.rescale_units(params, [jnp.array([10.0, 0.5])])
      [Array([[10.,  1.]], dtype=float32), Array([[0.3],
             [4. ]], dtype=float32)]

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, equation (1).
    """
    check_number("factors", factors)
    layers = chained_layers(params, forward, inputs)
    leaves = jax.tree.leaves(params)
    hidden = layers[:-1]
    if not isinstance(factors, (list, tuple)):
        factors = list(jnp.atleast_1d(jnp.asarray(factors)))
    if len(factors) != len(hidden):
        names = ", ".join(layer.name for layer in hidden) or "none"
        raise ValueError(
            "factors must hold one number or array for every hidden layer, but there "
            f"are {len(factors)} for the hidden layers {names}; pass {len(hidden)}."
        )
    dtype = _dtype(leaves, layers)
    unit_factors = [
        _checked_factors(leaves[layer.kernel].shape[-1], value, dtype, layer.name)
        for layer, value in zip(hidden, factors, strict=True)
    ]
    return rescaled_network(params, layers, _split(unit_factors), forward, inputs)


@functools.partial(jax.jit, static_argnames=("fraction", "widths", "dtype"))
def _random_factors(key, fraction, log_mean, log_std, widths, dtype, most_decades):
    total = sum(widths)
    key_units, key_factors = jax.random.split(key)
    shape = (round(fraction * total),)
    units = jax.random.randint(key_units, shape, 0, max(total, 1))
    powers = jnp.exp(log_mean + log_std * jax.random.normal(key_factors, shape, dtype))
    decades = jnp.zeros(total, dtype).at[units].add(powers.astype(dtype))
    factors = 10 ** jnp.minimum(decades, most_decades.astype(dtype))
    ends = np.cumsum(widths)
    return _split([factors[end - n : end] for end, n in zip(ends, widths, strict=True)])


def random_rescaling(
    key: jax.Array,
    params: PyTree,
    fraction: float = 0.25,
    log_mean: jax.typing.ArrayLike = 0.0,
    log_std: jax.typing.ArrayLike = 1.0,
    *,
    forward: Forward | None = None,
    inputs: PyTree = None,
) -> PyTree:
    r"""Unbalance a ReLU network: rescale randomly chosen hidden units.

    $$v \sim \mathcal U(\text{hidden units}), \qquad
      \tilde w = \rho_{10^c, v}(w), \qquad \log c \sim \mathcal N(\mu, \sigma^2)$$

    Units are picked with replacement: a unit picked twice is rescaled twice. The
    defaults give the unbalanced start of the Path-SGD paper. A unit's factor is cut
    off at 3e28 in float32 and bfloat16, see docs/theory/rescaling.md.

    Args:
      key: A `jax.random` key.
      params: Pytree of kernels and biases of a plain stack, see `rescale_units`.
      fraction: Number of picks divided by the number of hidden units, at most 1.
      log_mean: Mean $\mu$ of $\log c$.
      log_std: Standard deviation $\sigma$ of $\log c$.
      forward: The network, which gives the order of the layers, and is checked as in
        `rescale_units`.
      inputs: Inputs of the network.

    Returns:
      Pytree like `params`, in the same dtypes.

    Raises:
      ValueError: As in `rescale_units`; or `fraction` or `log_std` is out of range.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [jnp.ones((1, 8)), jnp.ones((8, 1))]
      >>> rescaled = normax.rescaling.random_rescaling(jax.random.key(0), params)
      >>> int(jnp.sum(rescaled[0] > 1))  # picks
      2
      >>> float(rescaled[0][0] @ rescaled[1][:, 0])
      8.0

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD, 2015, section 5.
    """
    check_range("fraction", fraction, 0)
    if fraction > 1:
        raise ValueError(
            f"fraction must be at most 1, one pick per unit, got {fraction}; rescale "
            "twice for more."
        )
    check_number("log_mean", log_mean)
    check_range("log_std", log_std, 0)
    layers = chained_layers(params, forward, inputs)
    params = jax.tree.map(jnp.asarray, params)
    leaves = jax.tree.leaves(params)
    widths = [leaves[layer.kernel].shape[-1] for layer in layers[:-1]]
    dtype = np.dtype(_dtype(leaves, layers))
    tiny = max(float(jnp.finfo(leaf.dtype).tiny) for leaf in leaves)
    factors = _random_factors(
        key,
        float(fraction),
        log_mean,
        log_std,
        tuple(widths),
        dtype,
        -0.75 * np.log10(tiny),
    )
    return rescaled_network(params, layers, factors, forward, inputs)
