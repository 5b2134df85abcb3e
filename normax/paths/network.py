"""A network as its paths: arguments are checked, the network traced and interpreted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normax.paths.primitives  # noqa: F401  # enters their specifications
from normax._core.axes import PyTree, parameter_names
from normax._core.checks import check_range
from normax._core.norms import at_least_float32
from normax._core.programs import full_precision, is_float
from normax.paths.arithmetic import PathArithmetic
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled
from normax.paths.one_example import Forward, trace_one_example
from normax.paths.values import Activation, Path, Unsupported, Weight, weight


def check_order(
    name: str, forward: Any, order: str = "forward, params, inputs"
) -> None:
    """Raise unless the network comes first."""
    if not callable(forward):
        raise ValueError(
            f"forward must be a function, but {name} got a {type(forward).__name__}; "
            f"the order is {name}({order})."
        )


def check_power(p: jax.typing.ArrayLike) -> None:
    """Raise unless the power of a path norm is one number in its range."""
    check_range("p", p, 1, 32)
    if np.ndim(p):
        raise ValueError(
            f"p must be one number, but it has shape {np.shape(p)}; use jax.vmap for "
            "several."
        )


def _check_real(params: PyTree, inputs: PyTree) -> None:
    for name, leaf in zip(
        parameter_names(params), jax.tree.leaves(params), strict=True
    ):
        if jnp.iscomplexobj(leaf):
            raise ValueError(
                f"the weights of a path norm must be real, but {name} is complex; hold "
                "real and imaginary parts as two arrays."
            )
    if any(map(jnp.iscomplexobj, jax.tree.leaves(inputs))):
        raise ValueError(
            "the inputs of a path norm must be real, but `inputs` holds complex "
            "numbers; pass real and imaginary parts as two arrays."
        )


def _shapes_only(inputs: PyTree) -> PyTree:
    """Return the shapes of inputs, but integers and random keys as they are."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) if is_float(x) else x
        ),
        inputs,
    )


def dtype_of_paths(params: PyTree) -> Any:
    """Return the dtype of path values, float32 or wider."""
    floats = [jnp.asarray(w) for w in jax.tree.leaves(params) if is_float(w)]
    return at_least_float32(jnp.float32(0), *floats)[0].dtype


@full_precision()
def lift(
    transform: PathTransform,
    forward: Forward,
    params: PyTree,
    inputs: PyTree,
    args: tuple[PyTree, ...] = (),
) -> tuple[list[Path], list[Weight]]:
    """Interpret a network.

    Args:
      transform: The interpreter.
      forward: The network.
      params: Its parameters.
      inputs: An example or a batch.
      args: What it takes besides, such as statistics.

    Returns:
      The paths to its outputs, and the nodes of the parameters.
    """
    _check_real(params, inputs)
    inputs, closed = trace_one_example(forward, params, _shapes_only(inputs), args)
    leaves = jax.tree.leaves(params)
    weights = [
        transform.parameter(name, leaf)
        for name, leaf in zip(parameter_names(params), leaves, strict=True)
    ]
    dtype = dtype_of_paths(params)
    activations = [
        transform.input(np.shape(leaf), dtype) if is_float(leaf) else Weight(leaf)
        for leaf in jax.tree.leaves(inputs)
    ]
    if any(
        isinstance(getattr(x, "value", 0), jax.ShapeDtypeStruct) for x in activations
    ):
        raise ValueError(
            "integers among the inputs are constants of the network, so their values "
            "matter, but `inputs` holds only the shape of some; pass them as arrays."
        )
    constants = [weight(leaf) for leaf in jax.tree.leaves(args)]
    arguments = [*weights, *activations, *constants]
    outputs = transform.interpret(closed.jaxpr, closed.consts, arguments)
    reached: list[Any] = []
    for output, variable in zip(outputs, closed.jaxpr.outvars, strict=True):
        if isinstance(output, Unsupported):
            raise ValueError(output.message)
        floating = jnp.issubdtype(variable.aval.dtype, jnp.inexact)
        if floating and isinstance(output, Activation | Weight):
            reached.append(output)
    if not any(isinstance(output, Activation) for output in reached):
        raise ValueError(
            "paths lead from the inputs to the outputs, but no output of `forward` "
            "depends on a floating-point input; pass `inputs` as an array of floats."
        )
    return [transform.flush(output) for output in reached], weights


def total(arithmetic: PathArithmetic, outputs: Sequence[Path]) -> Scaled:
    """Return the sum over the paths to all outputs."""
    sums = (
        arithmetic.sum(path.value, tuple(range(len(path.shape)))) for path in outputs
    )
    return functools.reduce(arithmetic.add, sums)
