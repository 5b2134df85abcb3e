"""Structural primitives in the path transform: they rearrange entries of arrays.

Each entry of a result is an entry of an operand, so path values keep their exponents.
Cotangents go back the other way. They add up where an entry is taken several times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from normax._core.programs import (
    bind,
    broadcast_axes,
    fill_value,
    inverse_permutation,
    may_collide,
)
from normax.paths import numbers
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled, of_rank, where_live
from normax.paths.primitive_spec import SPECS, Entries, NotHomogeneous, primitive
from normax.paths.values import Activation, Path, Sign, Weight, zeros


def evaluate_constants(
    transform: PathTransform, eqn: JaxprEqn, inputs: Sequence[Any]
) -> list[Any]:
    """Evaluate an equation on the constants of its activations.

    Returns:
      The resulting constants, None where they are known to be 0.
    """
    constants = [x.constant if isinstance(x, Activation) else x for x in inputs]
    acted = [c for c, x in zip(constants, inputs, strict=True) if x is not c]
    if all(constant is None for constant in acted) and len(acted) == len(inputs):
        return [None] * len(eqn.outvars)
    filled = [
        Weight(zeros(atom)) if constant is None else constant
        for constant, atom in zip(constants, eqn.invars, strict=True)
    ]
    return transform.evaluate_weights(eqn, filled)


_RENAMING = (
    "name", "stop_gradient", "sharding_constraint", "reshard", "mesh_cast",
    "optimization_barrier",
)  # fmt: skip
_WRITING = {"dynamic_update_slice": [0, 1], "scatter": [0, 2]}


def _data(name: str, count: int) -> list[int]:
    """Return which operands hold data; the others are indices and padding."""
    if name in ("concatenate", "stack"):
        return list(range(count))
    return list(range(1, count)) if name == "select_n" else _WRITING.get(name, [0])


def _move(eqn: JaxprEqn, operands: Sequence[Any], data: list[int], arrays: Any) -> Any:
    """Evaluate the equation with other arrays in place of its data, padded by 0."""
    filled = list(operands)
    for position, array in zip(data, arrays, strict=True):
        filled[position] = array
    if eqn.primitive.name == "pad":
        filled[1] = jnp.zeros((), filled[0].dtype)
    return bind(eqn, *filled)


def pull_moved(transform, eqn, inputs, cotangents):
    """Send cotangents of weights back through a structural primitive."""
    data = _data(eqn.primitive.name, len(inputs))
    operands, nodes = [x.value for x in inputs], [inputs[i] for i in data]
    _pull_moved(transform, eqn, operands, data, nodes, cotangents)
    if eqn.primitive.name == "pad" and inputs[1].params:
        _pull_padding(transform, eqn, inputs, cotangents[0])


def _pull_padding(transform, eqn, inputs, cotangent) -> None:
    """Send the cotangents of all padding to the number that it holds."""
    array, number = inputs
    root, exponent = numbers.broadcast(cotangent, eqn.outvars[0].aval.shape)
    padding = bind(eqn, np.zeros(array.shape, bool), np.ones((), bool))
    copies = Scaled(jnp.where(padding, root, 0), exponent)
    total = transform.arithmetic.sum(copies, tuple(range(root.ndim)))
    transform.accumulate(number, (numbers.normalize(total),))


def _pull_renamed(transform, eqn, inputs, cotangents):
    """Hand cotangents on as they are."""
    del eqn
    for x, cotangent in zip(inputs, cotangents, strict=True):
        if cotangent is not None:
            transform.accumulate(x, cotangent)


_MOVED: dict[str, Any] = {"pull": pull_moved, "mixes": None}


@primitive(
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    entries=Entries.COMPUTED,
    uniform=1,
    **_MOVED,
)
@primitive("transpose", "rev", entries=Entries.COMPUTED, uniform=None, **_MOVED)
@primitive(
    "slice",
    "dynamic_slice",
    "split",
    "unstack",
    entries=Entries.PARTS,
    uniform=None,
    **_MOVED,
)
@primitive("gather", entries=Entries.PARTS | Entries.COPIES, uniform=None, **_MOVED)
@primitive("tile", entries=Entries.COPIES, uniform=None, **_MOVED)
@primitive(
    "concatenate",
    "stack",
    "pad",
    "dynamic_update_slice",
    entries=Entries.JOINED,
    uniform=None,
    **_MOVED,
)
@primitive(
    "scatter",
    entries=Entries.JOINED,
    uniform=None,
    **_MOVED,
    refuses=lambda eqn, inputs: may_collide(eqn),
)
def structural(transform, eqn, inputs):
    """Rearrange path values as the equation rearranges entries."""
    data = _data(eqn.primitive.name, len(inputs))
    others = [x for position, x in enumerate(inputs) if position not in data]
    if not all(isinstance(x, Weight) for x in others):
        raise NotHomogeneous("the activations are indices or padding")
    if eqn.primitive.name == "pad" and inputs[1].uniform != 0:
        raise NotHomogeneous("it pads an activation with something else than 0")
    # The default is NaN. Paths from outside of the array have it then, too.
    fill = fill_value(eqn)
    if fill and not np.isnan(fill):
        raise NotHomogeneous("it fills an activation with something else than 0")
    if any(isinstance(x, Sign) for x in inputs):
        raise NotHomogeneous("signs of activations are rearranged")
    if may_collide(eqn):
        raise NotHomogeneous("without `unique_indices` it may write to an entry twice")
    constants = _structural_constants(transform, eqn, inputs, data)
    dtype = next(x.path.value.root.dtype for x in inputs if isinstance(x, Activation))
    # Weights among the data, such as a column of ones, are constants.
    paths = [
        inputs[i].path
        if isinstance(inputs[i], Activation)
        else Path(numbers.zeros(inputs[i].shape, dtype))
        for i in data
    ]
    operands = [getattr(x, "value", None) for x in inputs]
    roots, exponent = numbers.together([path.value for path in paths])
    moved = _move(eqn, operands, data, roots)
    values = [
        Scaled(root, of_rank(exponent, root.ndim))
        for root in (moved if eqn.primitive.multiple_results else [moved])
    ]
    # The largest entries may have been left out, so exponents are taken anew.
    name = eqn.primitive.name
    if Entries.PARTS in SPECS[name].entries or name in _WRITING:
        values = [numbers.normalize(value) for value in values]
    results = [Path(value) for value in values]
    pull = functools.partial(_pull_moved, transform, eqn, operands, data, paths)
    transform.record(results, lambda *cotangents: pull(cotangents))
    return [
        Activation(path, constant)
        for path, constant in zip(results, constants, strict=True)
    ]


def _structural_constants(transform, eqn, inputs, data):
    """Return the constants of the results, None where no operand has one."""
    if all(isinstance(inputs[i], Activation) for i in data) and not any(
        inputs[i].constant for i in data
    ):
        return [None] * len(eqn.outvars)
    return evaluate_constants(transform, eqn, inputs)


def _pull_moved(transform, eqn, operands, data, nodes, cotangents) -> None:
    """Send cotangents back through a structural primitive."""
    name = eqn.primitive.name
    if name == "transpose" and len(cotangents[0]) > 1:
        inverse = inverse_permutation(eqn)
        factors = tuple(
            Scaled(*(jnp.transpose(array, inverse) for array in factor))
            if factor.root.ndim
            else factor
            for factor in cotangents[0]
        )
        return transform.accumulate(nodes[0], factors)
    shapes = [variable.aval.shape for variable in eqn.outvars]
    dtype = next(c for c in cotangents if c is not None)[0].root.dtype
    values = [
        numbers.zeros(shape, dtype) if c is None else numbers.broadcast(c, shape)
        for c, shape in zip(cotangents, shapes, strict=True)
    ]
    if name == "broadcast_in_dim":
        return transform.accumulate(nodes[0], (_unbroadcast(transform, eqn, values),))
    if name in ("gather", "tile"):
        return transform.accumulate(
            nodes[0], (_scatter(transform, eqn, operands, values),)
        )
    primals = [jnp.zeros(node.shape, dtype) for node in nodes]

    def move(*arrays):
        moved = _move(eqn, operands, data, arrays)
        return moved if eqn.primitive.multiple_results else [moved]

    roots, exponent = numbers.together(values)
    moved = jax.linear_transpose(move, *primals)([x.astype(dtype) for x in roots])
    for node, root in zip(nodes, moved, strict=True):
        value = Scaled(root, of_rank(exponent, root.ndim))
        transform.accumulate(node, (numbers.normalize(value),))


def _scatter(transform, eqn, operands, values):
    """Add up cotangents of entries that were taken, possibly several times."""
    # Copies of one entry may differ in scale, so the largest is found first.
    arithmetic, shape = transform.arithmetic, eqn.invars[0].aval.shape
    (root,), exponent = numbers.together(values)
    entries = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    # What a gather fills in comes from no entry. Its index is behind the last one.
    outside = {"fill_value": entries.size} if operands[1:] else {}
    index = bind(eqn, jnp.asarray(entries), *operands[1:], **outside)
    none = jnp.zeros(entries.size, root.dtype)
    scale = numbers.scale(none.at[index].max(root, mode="drop"))
    copies = arithmetic.value(root / scale.at[index].get(mode="clip"))
    total = where_live(arithmetic.root, none.at[index].add(copies, mode="drop"))
    root = jnp.reshape(scale * total, shape)
    return numbers.normalize(Scaled(root, of_rank(exponent, root.ndim)))


def _unbroadcast(transform, eqn, values):
    """Sum a cotangent over the axes that a broadcast added or stretched."""
    kept = broadcast_axes(eqn)
    shape = eqn.invars[0].aval.shape
    (value,) = values
    new = tuple(axis for axis in range(value.root.ndim) if axis not in kept)
    value = transform.arithmetic.sum(value, new)
    stretched = tuple(
        axis
        for axis, (before, after) in enumerate(
            zip(shape, value.root.shape, strict=True)
        )
        if before != after
    )
    return transform.arithmetic.sum(value, stretched, keepdims=True)


_RENAMED: dict[str, Any] = {
    "pull": _pull_renamed,
    "entries": Entries.COMPUTED,
    "mixes": None,
}


@primitive(
    "convert_element_type", "copy", "copy_p", uniform=1, takes_signs=True, **_RENAMED
)
@primitive(*_RENAMING, uniform=1, **_RENAMED)
@primitive("reduce_precision", uniform=None, **_RENAMED)
def _renamed(transform, eqn, inputs):
    """Hand on activations and signs; only their dtype or layout changes."""
    if all(isinstance(x, Sign) for x in inputs):
        return inputs
    if not all(jnp.issubdtype(out.aval.dtype, jnp.inexact) for out in eqn.outvars):
        raise NotHomogeneous("it rounds an activation")
    constants = _structural_constants(transform, eqn, inputs, list(range(len(inputs))))
    return [
        Activation(x.path, constant, x.source, x.multiple)
        if isinstance(x, Activation)
        else constant
        for x, constant in zip(inputs, constants, strict=True)
    ]
