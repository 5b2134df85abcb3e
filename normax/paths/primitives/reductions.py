"""Reductions and pooling in the path transform: sums over axes or windows.

The largest of several activations is one of them, so that paths lead through each: a
maximum has the paths of the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.programs import (
    bind,
    reduced_axes,
    reduced_lengths,
    window,
    window_lengths,
)
from normax.paths import numbers
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled
from normax.paths.primitive_spec import Entries, primitive
from normax.paths.values import Activation, Value

_REDUCTION: dict[str, Any] = {
    "pull": None,
    "entries": Entries.COMPUTED,
    "uniform": None,
}


def _linear_layer(
    transform: PathTransform,
    x: Activation,
    fn: Callable[[jax.Array], jax.Array],
    axes: tuple[int, ...],
    out_axes: tuple[int, ...],
) -> list[Value]:
    """Apply a linear map that mixes entries along some axes; record its transpose."""
    arithmetic, path = transform.arithmetic, transform.flush(x)
    value = arithmetic.linear(fn, path.value, axes)

    def pull(factors):
        cotangent = numbers.broadcast(factors, value.root.shape)
        back = _transpose(fn, path.value.root)
        transform.accumulate(path, (arithmetic.linear(back, cotangent, out_axes),))

    return [Activation(transform.new(value, pull))]


def _transpose(fn: Callable[..., Any], *operands: jax.Array) -> Callable[..., Any]:
    """Return the transposed map, from the shapes of its operands."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    transposed = jax.linear_transpose(fn, *shapes)
    if len(operands) > 1:
        return transposed
    return lambda cotangent: transposed(cotangent)[0]


@primitive(
    "reduce_sum", "reduce_max", "reduce_min", mixes=reduced_lengths, **_REDUCTION
)
def _reduce(transform, eqn, inputs):
    """Sum path values over axes."""
    arithmetic, axes = transform.arithmetic, reduced_axes(eqn)
    path = transform.flush(inputs[0])

    def pull(factors):
        total = numbers.broadcast(factors, eqn.outvars[0].aval.shape)
        spread = (jnp.expand_dims(array, axes) for array in total)
        transform.accumulate(path, (Scaled(*spread),))

    return [Activation(transform.new(arithmetic.sum(path.value, axes), pull))]


@primitive(
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    mixes=window_lengths,
    **_REDUCTION,
)
def _reduce_window(transform, eqn, inputs):
    """Sum path values over windows. Only axes that windows extend along are mixed."""
    options = window(eqn)
    windows = options["window_dimensions"]
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes = tuple(
        axis
        for axis, size in enumerate(windows)
        if size > 1 or before[axis] != after[axis]
    )
    pool = functools.partial(
        lax.reduce_window,
        init_value=0.0,
        computation=lax.add,
        **options,
    )
    return _linear_layer(transform, inputs[0], pool, axes, axes)


@primitive("cumsum", mixes=reduced_lengths, **_REDUCTION)
def _cumsum(transform, eqn, inputs):
    """Sum path values cumulatively."""
    axes = reduced_axes(eqn)
    return _linear_layer(transform, inputs[0], lambda x: bind(eqn, x), axes, axes)
