r"""Rescaled networks: the units of a stack of layers, and the function that stays.

Which weights enter and leave a unit is read off the parameters of a plain stack of
layers. A hidden unit of a convolution is a channel. The mantissas and exponents of
factors are applied apart: no product leaves the range of floats unless the rescaled
weight does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree
from normax._core.norms import at_least_float32
from normax._core.powers_of_two import halves
from normax._core.programs import full_precision
from normax.paths import path_norm
from normax.paths.feed_forward import Layer, feed_forward_layers
from normax.paths.one_example import Forward

_FIX = (
    "rescaling is defined for plain stacks of dense layers and convolutions, named in "
    "their order: fold batch norms into the layers before them first, and leave "
    "everything else out of the parameters"
)


class UnitFactors(NamedTuple):
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
                f"{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}; "
                "leave it out of the parameters."
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
    factors: Sequence[UnitFactors],
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
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in flat]
    # NumPy, which compiles nothing anew for every shape.
    before, after = (
        [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]
        for tree in (params, rescaled)
    )
    for name, old in zip(names, before, strict=True):
        if not np.isfinite(old).all():
            raise ValueError(
                f"only finite weights can be rescaled, but {name} holds NaN or "
                "infinity; go back to where the network had not diverged."
            )
    for name, (_, leaf), old, new in zip(names, flat, before, after, strict=True):
        lost = ~np.isfinite(new) | (np.sign(new) != np.sign(old))
        if lost.any():
            first = tuple(int(i) for i in np.argwhere(lost)[0])
            raise ValueError(
                f"rescaled weights must be finite and keep their signs, but {name} at "
                f"{first} goes from {old[first]} to {new[first]} in "
                f"{jnp.result_type(leaf)}; use factors that are closer to 1, or "
                "parameters in a wider dtype."
            )


def rescaled_network(
    params: PyTree,
    layers: tuple[Layer, ...],
    factors: Sequence[UnitFactors],
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
    """Return random inputs, larger ones for later seeds: relu6 is a ReLU below 6."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            x = np.zeros(x.shape, x.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        size = 8.0**seed if jnp.finfo(x.dtype).maxexp > 16 else 1.0
        return jnp.asarray(size * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, inputs)


@full_precision()
def _require_same_function(
    params: PyTree,
    layers: tuple[Layer, ...],
    factors: Sequence[UnitFactors],
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
    ones = [UnitFactors(jnp.ones_like(m), jnp.zeros_like(e)) for m, e in factors]
    trial, diagnosis = (
        [
            one._replace(mantissa=jnp.asarray(values, one.mantissa.dtype))
            for one, values in zip(ones, np.split(drawn, ends), strict=True)
        ]
        for drawn in (other[which], fresh)
    )
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    compiled = jax.jit(functools.partial(forward))  # reads anew what it closes over
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

    def same_with(chosen: dict[int, UnitFactors]) -> bool:
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
        path_norm(forward, params, inputs, log=True)
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
