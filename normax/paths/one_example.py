"""Networks traced for one example: whether the first axis is that of a batch.

A path norm is that of one example, but users pass the batch they train with. An axis of
examples is one over which nothing is summed; `(rows, features)` of a single example
looks alike until the network mixes the rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from normax._core.axes import PyTree
from normax._core.programs import (
    called_programs,
    one_explicit_device,
    reduced_lengths,
    shape_of,
)
from normax.paths.primitive_spec import SPECS

Forward = Callable[..., PyTree]  # of params, inputs, and what `forward_args` holds


_SHARDINGS = (
    "normax can trace a network that names shardings if it names them by a "
    "PartitionSpec, not a NamedSharding, and closes over no array on the mesh; let "
    "such an array be a parameter, or hand it to Path-SGD as one of forward_args."
)


def _mixes(jaxpr: Jaxpr) -> list[tuple[str, tuple[int, ...]]]:
    """Return the primitives of a program that mix entries, and along what lengths."""
    mixes = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        # Primitives without paths may mix examples too, such as a maximum of integers.
        mixes_of = SPECS[name].mixes if name in SPECS else reduced_lengths
        if mixes_of and (lengths := mixes_of(eqn)):
            mixes.append((name, lengths))
        for inner in called_programs(eqn):
            mixes += _mixes(inner)
    return mixes


def trace_network(
    forward: Forward, params: PyTree, inputs: PyTree, args: Sequence[PyTree] = ()
) -> tuple[ClosedJaxpr, PyTree]:
    """Trace a network, also one that says how its arrays lie on an explicit mesh."""
    # JAX remembers what a function closed over when it was traced. So it gets a new
    # one.
    trace = jax.make_jaxpr(functools.partial(forward), return_shape=True)
    try:
        return trace(params, inputs, *args)
    except Exception as reason:  # such as `out_sharding`, which has no error of its own
        if jax.sharding.get_abstract_mesh().empty:
            raise
        with one_explicit_device():
            shapes = jax.tree.map(shape_of, (params, inputs, *args))
            try:
                return trace(*shapes)
            except Exception as other:
                if str(other) != str(reason):  # or else the network fails on any mesh
                    reason.add_note(_SHARDINGS)
                raise reason from None


def _traced(trace: Callable[..., Any], params: PyTree, inputs: PyTree) -> Any:
    """Trace a network; if it takes its arguments in the other order only, say so."""
    swapped = False
    try:
        return trace(params, inputs)
    except Exception as error:
        with contextlib.suppress(Exception):
            trace(inputs, params)
            swapped = True
        if not swapped:
            raise
        raise ValueError(
            "forward takes the parameters first, but it fails on (params, inputs) with "
            f"{type(error).__name__}, and accepts (inputs, params); swap the two."
        ) from error


def trace_one_example(
    forward: Forward, params: PyTree, inputs: PyTree, args: Sequence[PyTree] = ()
) -> tuple[PyTree, ClosedJaxpr]:
    """Trace a network for a batch of one, if the first axis is that of a batch.

    It is one if all outputs but scalars have it, and if the network sums over as many
    entries when there is a single one of it.

    Returns:
      The inputs, of one example if they are a batch, and the program for them.
    """

    def trace(params, inputs):
        return trace_network(forward, params, inputs, args)

    program, whole = _traced(trace, params, inputs)
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(inputs) if np.ndim(x)}
    if len(sizes) != 1 or sizes == {1}:
        return inputs, program
    (size,) = sizes

    def batch_of(count):
        def take(x):
            if isinstance(x, jax.ShapeDtypeStruct) and x.shape:
                return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
            return x[np.arange(count) % size] if np.ndim(x) else x

        return jax.tree.map(take, inputs)

    def have_axis(outputs, count):
        def has_axis(a, b):
            shapes = (size, *b.shape[1:]), (count, *a.shape[1:])
            return a.shape == () or (a.shape, b.shape) == shapes

        return all(jax.tree.leaves(jax.tree.map(has_axis, whole, outputs)))

    one = batch_of(1)
    try:
        program_of_one, part = trace(params, one)
        is_batch = have_axis(part, 1)
        if not is_batch:  # outputs may have dropped an axis of length one
            is_batch = have_axis(trace(params, batch_of(2 * size))[1], 2 * size)
    except Exception:  # whatever the network raises: the first axis is one of features
        return inputs, program
    if is_batch and _mixes(program.jaxpr) == _mixes(program_of_one.jaxpr):
        return one, program_of_one
    return inputs, program
