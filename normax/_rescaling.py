r"""Rescalings of hidden units, which do not change the function of a ReLU network.

ReLU is positively homogeneous, $\sigma(c z) = c\,\sigma(z)$ for $c > 0$. So what
enters a hidden unit, its weights and its bias, may be multiplied by $c$ if what
leaves it is divided by $c$.

Which weights enter and leave a unit is read off the parameters of a plain stack of
layers. A hidden unit of a convolution is a channel. The mantissas and exponents of
factors are applied apart: no product leaves the range of floats unless the rescaled
weight does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._axes import PyTree
from normax._checks import check_positive, check_range
from normax._feed_forward import Layer, feed_forward_layers
from normax._norms import at_least_float32
from normax._path_arithmetic import exponent_of, halves
from normax._path_sgd import log_path_norm

Forward = Callable[[PyTree, PyTree], PyTree]

_FIX = (
    "rescaling is defined for plain stacks of dense layers and convolutions, named in "
    "their order: fold batch norms into the layers before them first, and leave "
    "everything else out of the parameters"
)


class Factors(NamedTuple):
    r"""Factors of the units of a layer, $c = m \cdot 2^e$.

    Attributes:
      mantissa: Float array.
      exponent: Int32 array of the same shape.
    """

    mantissa: jax.Array
    exponent: jax.Array


def parameter_layers(params: PyTree) -> tuple[Layer, ...]:
    """Find the layers of a stack, which need not chain.

    Args:
      params: Pytree of kernels and biases, see `feed_forward_layers`.

    Returns:
      The layers in natural order of their names.

    Raises:
      ValueError: There are none, or parameters that are not those of such a layer.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating):
            raise ValueError(
                "the weights of a network are real floating-point arrays, but params"
                f"{jax.tree_util.keystr(path)} has dtype {leaf.dtype}; leave it out of "
                "the parameters."
            )
    layers = feed_forward_layers(jax.tree.map(jnp.asarray, params), _FIX)
    if not layers:
        raise ValueError(
            "a network has at least one layer, but the parameters hold no kernel; pass "
            "the parameters of the whole network."
        )
    return tuple(layers)


def chained_layers(params: PyTree) -> tuple[Layer, ...]:
    """Find the layers of a stack, the inputs of each the outputs of the one before.

    Args:
      params: Pytree of kernels and biases.

    Returns:
      The layers, from the inputs to the outputs.

    Raises:
      ValueError: The parameters are no such stack.
    """
    layers, leaves = parameter_layers(params), jax.tree.leaves(params)
    for before, after in itertools.pairwise(layers):
        shapes = leaves[before.kernel].shape, leaves[after.kernel].shape
        if source_units(*shapes) is None:
            raise ValueError(
                "the kernels of a plain stack, in natural order of their names, chain: "
                "dense kernels (inputs, outputs) and, before them, convolutions (..., "
                f"inputs, outputs); but {before.name} has shape {shapes[0]} and "
                f"{after.name}, which follows it, {shapes[1]}; {_FIX}."
            )
    return layers


def source_units(before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray | None:
    """Find the unit that every entry of a kernel comes from.

    Args:
      before: Shape of the kernel before.
      after: Shape of the kernel.

    Returns:
      Indices of units of the layer before, of shape (inputs, outputs) or
      (inputs, 1); None if the kernels do not chain.
    """
    units, (n_in, n_out) = before[-1], after[-2:]
    if min(units, n_in) == 0:
        return None
    if len(after) > 2:  # a convolution, of `groups` groups of channels
        groups, rest = divmod(units, n_in)
        if len(before) == 2 or rest or groups == 0 or n_out % groups:
            return None
        index = np.arange(units).reshape(groups, n_in).T
        return np.repeat(index, n_out // groups, axis=1) if groups > 1 else index
    positions, rest = divmod(n_in, units)  # more than one behind a flatten
    if rest or positions == 0 or (positions > 1 and len(before) == 2):
        return None
    return np.tile(np.arange(units), positions)[:, None]


def all_source_units(
    leaves: Sequence[Any], layers: Sequence[Layer]
) -> list[np.ndarray]:
    """Return `source_units` of every layer but the first."""
    shapes = [leaves[layer.kernel].shape for layer in layers]
    sources = map(source_units, shapes, shapes[1:])
    return [source for source in sources if source is not None]


def expand_to(x: jax.Array, rank: int) -> jax.Array:
    """Prepend axes of length one."""
    return jnp.expand_dims(x, tuple(range(rank - x.ndim)))


@functools.partial(jax.jit, static_argnames="layers")
def scale_layers(
    leaves: Sequence[jax.Array],
    factors: Sequence[Factors],
    *,
    layers: tuple[Layer, ...],
) -> list[jax.Array]:
    """Rescale the hidden units of a stack.

    Args:
      leaves: All arrays of the parameters.
      factors: Factors of the hidden layers.
      layers: The layers.

    Returns:
      The rescaled arrays, infinite or 0 where their dtype cannot hold them.
    """
    sources = all_source_units(leaves, layers)
    results = list(leaves)
    for position, layer in enumerate(layers):
        for index in (layer.kernel, layer.bias):
            if index is None:
                continue
            (leaf,) = at_least_float32(leaves[index])
            mantissa, exponent = jnp.ones_like(leaf), jnp.zeros((), jnp.int32)
            if position < len(factors):
                m, e = (expand_to(part, leaf.ndim) for part in factors[position])
                mantissa, exponent = mantissa * m, exponent + e
            if position > 0 and index == layer.kernel:
                source = sources[position - 1]
                m, e = (
                    expand_to(part[source], leaf.ndim) for part in factors[position - 1]
                )
                mantissa, exponent = mantissa / m, exponent - e
            first, second = halves(exponent, leaf.dtype)
            scaled = leaf * first * mantissa.astype(leaf.dtype) * second
            results[index] = scaled.astype(leaves[index].dtype)
    return results


def _require_in_range(params: PyTree, rescaled: PyTree) -> None:
    flat = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), result in zip(flat, jax.tree.leaves(rescaled), strict=True):
        # NumPy, which compiles nothing anew for every shape.
        before, after = (np.asarray(x).astype(np.float64) for x in (leaf, result))
        lost = ~np.isfinite(after) | (np.sign(after) != np.sign(before))
        if lost.any():
            first = tuple(int(i) for i in np.argwhere(lost)[0])
            raise ValueError(
                f"rescaled weights must be finite and keep their signs, but "
                f"params{jax.tree_util.keystr(path)} at {first} goes from "
                f"{before[first]} to {after[first]} in {result.dtype}; use factors "
                "that are closer to 1, or parameters in a wider dtype."
            )


def rescaled_network(
    params: PyTree,
    layers: tuple[Layer, ...],
    factors: Sequence[Factors],
    forward: Forward | None,
    inputs: PyTree,
) -> PyTree:
    """Rescale the hidden units, and check what can be checked.

    Args:
      params: Pytree of kernels and biases.
      layers: Its layers.
      factors: Factors of the hidden layers.
      forward: The network, or None.
      inputs: Inputs of the network, if it is given.

    Returns:
      The rescaled parameters.

    Raises:
      ValueError: A weight leaves the range of its dtype, or the function changes.
    """
    if (forward is None) != (inputs is None):
        raise ValueError(
            "`forward` and `inputs` describe the network together, but only "
            f"`{'inputs' if forward is None else 'forward'}` is given; pass both, or "
            "neither for a plain stack of layers with ReLUs between them."
        )
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    result = jax.tree.unflatten(treedef, scale_layers(leaves, factors, layers=layers))
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((result, leaves))):
        return result
    _require_in_range(params, result)
    if forward is not None and factors:
        _require_same_function(params, layers, factors, result, forward, inputs)
    return result


def _like(inputs: PyTree, seed: int) -> PyTree:
    rng = np.random.default_rng(seed)

    def draw(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            x = np.zeros(x.shape, x.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, inputs)


def _require_same_function(
    params: PyTree,
    layers: tuple[Layer, ...],
    factors: Sequence[Factors],
    rescaled: PyTree,
    forward: Forward,
    inputs: PyTree,
) -> None:
    # Differences drown in rounding if the factors are near 1, and so do broken rules.
    # So the network is tried with other factors, equal where the given ones are.
    logs = [np.log2(np.asarray(m, float)) + np.asarray(e) for m, e in factors]
    distinct, which = np.unique(np.concatenate(logs), return_inverse=True)
    rng, ends = np.random.default_rng(0), np.cumsum([log.size for log in logs])[:-1]
    other = np.where(distinct == 0, 1.0, 2.0 ** rng.uniform(-2, 2, distinct.shape))
    fresh = 2.0 ** rng.uniform(-2, 2, which.shape)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    ones = [Factors(jnp.ones_like(m), jnp.zeros_like(e)) for m, e in factors]
    trial, diagnosis = (
        [
            one._replace(mantissa=jnp.asarray(values, one.mantissa.dtype))
            for one, values in zip(ones, np.split(drawn, ends), strict=True)
        ]
        for drawn in (other[which], fresh)
    )
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    compiled = jax.jit(forward)
    examples = [_like(inputs, seed) for seed in range(3)]
    outputs = [jax.tree.leaves(compiled(params, x)) for x in examples]

    def same(other: PyTree) -> bool:
        for x, expected in zip(examples, outputs, strict=True):
            for y, z in zip(expected, jax.tree.leaves(compiled(other, x)), strict=True):
                y, z = np.asarray(y, float), np.asarray(z, float)
                size = np.max(np.abs(y), initial=0.0)
                if not np.all(np.abs(z - y) <= max(1e-3, 8 * eps) * size):
                    return False
        return True

    def same_with(chosen: dict[int, Factors]) -> bool:
        factors = [chosen.get(layer, one) for layer, one in enumerate(ones)]
        return same(treedef.unflatten(scale_layers(leaves, factors, layers=layers)))

    if not same_with(dict(enumerate(trial))):
        raise ValueError(
            _broken_rule(params, layers, diagnosis, same_with, forward, inputs)
        )
    if not same(rescaled):
        raise ValueError(
            "a rescaled network computes the same function, and rescalings keep this "
            "network's, but these factors carry its activations out of the range of "
            "its dtype; use factors that are closer to 1, or a wider dtype."
        )


def _broken_rule(params, layers, trial, same_with, forward, inputs) -> str:
    """Find what a network has that no plain stack of ReLU layers has."""
    breaking = [i for i, factors in enumerate(trial) if not same_with({i: factors})]
    names = ", ".join(layers[i].name for i in breaking)
    claim = (
        "a rescaled network computes the same function, but rescaling the units of "
        f"{names} changes what `forward` computes"
    )
    try:
        log_path_norm(forward, params, inputs)
    except ValueError as reason:
        return f"{claim}: {reason}"
    tied = {i: trial[breaking[0]] for i in breaking}
    if len({trial[i].mantissa.shape for i in breaking}) == 1 and same_with(tied):
        return (
            f"{claim}: residual connections add their units; give these layers the "
            "same factors in `rescale_units`, and no others."
        )
    return (
        f"{claim}: what leaves these units is not what the next kernel, "
        f"in natural order of the names, takes in; {_FIX}, or give these layers "
        "factors 1."
    )


def _factor_array(units: int, value: Any, dtype: Any, name: str) -> Any:
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
def _split(factors: Sequence[jax.Array]) -> list[Factors]:
    def split(c):
        exponent = exponent_of(c)
        first, second = halves(-exponent, c.dtype)
        return Factors(c * first * second, exponent)

    return [split(c) for c in factors]


def _dtype(leaves: Sequence[Any], layers: tuple[Layer, ...]) -> Any:
    return jnp.result_type(
        jnp.float32, *(leaves[layer.kernel].dtype for layer in layers)
    )


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

    with $c = 1$ for inputs and outputs. The network is a plain stack of layers read
    off the parameters, in natural order of their names (Dense_2 before Dense_10):
    convolutions (..., inputs, outputs), grouped and depthwise ones included, then
    dense kernels (inputs, outputs), each with a bias or without. Between them are
    ReLUs or leaky ReLUs, pooling, or, before the first dense layer, a flatten in Flax's
    order, positions first and channels last. Shapes tell no residual connection and
    no other activation: pass `forward` to have the function checked.

    Args:
      params: Pytree of kernels and biases.
      factors: Positive factors $c$, for every hidden layer a number or an array that
        broadcasts to its units (to its channels, for convolutions).
      forward: The network, `forward(params, inputs) -> outputs`, to be checked at
        random inputs; no check is made under `jax.jit`. With it, layers whose units
        a residual connection adds may be rescaled by the same factors.
      inputs: Inputs of the network or `jax.ShapeDtypeStruct`s of them; only shapes,
        and the values of integers, matter.

    Returns:
      Pytree like `params`, in the same dtypes. Factors as large as the dtype holds do
      no harm where the rescaled weights are in its range.

    Raises:
      ValueError: The parameters are not those of a plain stack (they hold batch norms,
        or shapes do not chain), the factors do not fit or are not positive, `forward`
        computes another function afterwards; or, outside of `jax.jit`, a weight
        leaves the range of its dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [2.0]])]
      >>> normax.rescale_units(params, [jnp.array([10.0, 0.5])])
      [Array([[10.,  1.]], dtype=float32), Array([[0.3],
             [4. ]], dtype=float32)]

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, equation (1).
    """
    layers, leaves = chained_layers(params), jax.tree.leaves(params)
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
        _factor_array(leaves[layer.kernel].shape[-1], value, dtype, layer.name)
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

    again and again, with replacement: a unit picked twice is rescaled twice. With the
    defaults this is the unbalanced start of the Path-SGD paper, 2,000 picks out of
    8,000 hidden units. One pick in some thousands draws a factor that float32 cannot
    hold; so the product of a unit's factors is cut off at $\text{tiny}^{-3/4}$ of the
    coarsest dtype, 3e28 in float32 and bfloat16, which leaves room for weights and
    activations.

    Args:
      key: A `jax.random` key.
      params: Pytree of kernels and biases of a plain stack, see `rescale_units`.
      fraction: Number of picks over the number of hidden units.
      log_mean: Mean $\mu$ of $\log c$.
      log_std: Standard deviation $\sigma$ of $\log c$.
      forward: The network, to be checked, see `rescale_units`.
      inputs: Inputs of the network.

    Returns:
      Pytree like `params`, in the same dtypes.

    Raises:
      ValueError: As `rescale_units`; or `fraction` or `log_std` is negative.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = [jnp.ones((1, 8)), jnp.ones((8, 1))]
      >>> rescaled = normax.random_rescaling(jax.random.key(0), params)
      >>> int(jnp.sum(rescaled[0] > 1))  # picks
      2
      >>> float(rescaled[0][0] @ rescaled[1][:, 0])
      8.0

    References:
      Neyshabur, Salakhutdinov, Srebro, Path-SGD: Path-Normalized Optimization in Deep
      Neural Networks, 2015, section 5.
    """
    check_range("fraction", fraction, 0)
    check_range("log_std", log_std, 0)
    layers, leaves = chained_layers(params), jax.tree.leaves(params)
    widths = [leaves[layer.kernel].shape[-1] for layer in layers[:-1]]
    dtype = np.dtype(_dtype(leaves, layers))
    tiny = max(float(jnp.finfo(leaf.dtype).tiny) for leaf in leaves)
    factors = _random_factors(
        key, fraction, log_mean, log_std, tuple(widths), dtype, -0.75 * np.log10(tiny)
    )
    return rescaled_network(params, layers, factors, forward, inputs)
