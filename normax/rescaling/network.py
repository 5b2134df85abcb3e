"""The units of a plain stack of layers, and the weights that enter and leave them.

Both are read off the parameters. Their order is that of their names, or that in which
the network uses them if it is given. A hidden unit of a convolution is a channel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree
from normax._core.modules import refuse_modules
from normax._core.norms import at_least_float32
from normax._core.powers_of_two import halves
from normax.paths.feed_forward import Layer, feed_forward_layers
from normax.paths.one_example import Forward
from normax.rescaling.order import order_of_use

MAKE_A_STACK = (
    "rescaling is defined for plain stacks of dense layers and convolutions, named in "
    "their order if `forward` is not given: fold batch norms into the layers before "
    "them first, and leave everything else out of the parameters"
)


class UnitFactors(NamedTuple):
    r"""Factors $c = m \cdot 2^e$ of the units of a layer: floats m and int32 e."""

    mantissa: jax.Array
    exponent: jax.Array


def parameter_layers(
    params: PyTree, order: Mapping[int, int] | None = None
) -> tuple[Layer, ...]:
    """Find the layers of a network; their shapes need not chain."""
    refuse_modules(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating):
            raise ValueError(
                "the weights of a network are real floating-point arrays, but params"
                f"{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}; "
                "leave it out of the parameters."
            )
    arrays = jax.tree.map(jnp.asarray, params)
    layers = feed_forward_layers(arrays, MAKE_A_STACK, order)
    if not layers:
        raise ValueError(
            "a network has at least one layer, but the parameters hold no kernel; pass "
            "the parameters of the whole network."
        )
    return tuple(layers)


def chained_layers(
    params: PyTree, forward: Forward | None, inputs: PyTree
) -> tuple[Layer, ...]:
    """Find the layers of a stack, from its inputs to its outputs."""
    if (forward is None) != (inputs is None):
        raise ValueError(
            "`forward` and `inputs` describe the network together, but only "
            f"`{'inputs' if forward is None else 'forward'}` is given; pass both, or "
            "neither for a plain stack of layers with ReLUs between them."
        )
    refuse_modules(params)
    order, by = None, "in natural order of their names"
    if forward is not None:
        order, by = order_of_use(forward, params, inputs), "as `forward` uses them"
    layers, leaves = parameter_layers(params, order), jax.tree.leaves(params)
    for before, after in itertools.pairwise(layers):
        shapes = leaves[before.kernel].shape, leaves[after.kernel].shape
        if source_units(*shapes) is None:
            raise ValueError(
                f"the kernels of a plain stack, {by}, chain: dense kernels (inputs, "
                "outputs) and, before them, convolutions (..., inputs, outputs); but "
                f"{before.name} has shape {shapes[0]} and "
                f"{after.name}, which follows it, {shapes[1]}; {MAKE_A_STACK}."
            )
    return layers


def source_units(before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray | None:
    """Find the unit of the layer before from which every entry of a kernel leads.

    Its shape is (inputs, outputs) or (inputs, 1); None if the kernels do not chain.
    """
    units, (n_in, n_out) = before[-1], after[-2:]
    if min(units, n_in) == 0:
        return None
    if len(after) > 2:  # The kernel is a convolution of `groups` groups of channels.
        groups, rest = divmod(units, n_in)
        if len(before) == 2 or rest or groups == 0 or n_out % groups:
            return None
        index = np.arange(units).reshape(groups, n_in).T
        return np.repeat(index, n_out // groups, axis=1) if groups > 1 else index
    # Behind a flatten, each unit has an entry for every position of the image.
    positions, rest = divmod(n_in, units)
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
    """Rescale the hidden units of a stack, given all arrays of its parameters."""
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
            # Each factor is applied in parts. So no product leaves the range of floats
            # unless the rescaled weight does, which is then infinite or 0.
            first, second = halves(exponent, leaf.dtype)
            scaled = leaf * first * mantissa.astype(leaf.dtype) * second
            results[index] = scaled.astype(leaves[index].dtype)
    return results
