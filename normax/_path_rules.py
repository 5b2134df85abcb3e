r"""The rules of the path transform, one for each primitive.

=============================== ===============================================
primitive                       path values
=============================== ===============================================
dot, convolution with a weight  the same with $|w|^p$
sum of activations              sum; two constants become an edge each
sum with a weight               unchanged; the weight is added to the constant
product with a weight           product with $|w|^p$
ReLU, leaky ReLU, abs           unchanged
max-pooling, maxout             sum over the window
sum-pooling, reductions         sum (a mean is a sum and a product with $1/n$)
reshape, slice, pad, ...        the same
=============================== ===============================================

Each rule also tells how cotangents go back: all maps are linear and
non-negative, so by the transposed map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normax._norms import at_least_float32
from normax._path_arithmetic import Scaled
from normax._path_lifting import NotHomogeneous, PathTransform, rule, weight_pull
from normax._path_structure import bind, evaluate_constants, structural
from normax._path_values import (
    Activation,
    Factors,
    Path,
    Sign,
    Value,
    Weight,
    without_infinities,
)

# Affine operations. The constant goes through the same equation as the activation.


@rule("add", "add_any", "sub")
def _add(transform, eqn, inputs):
    shape = eqn.outvars[0].aval.shape
    if all(isinstance(x, Activation) and x.constant for x in inputs):
        # Two layers meet, each with a bias: two edges, as in the graph.
        paths = [transform.flush(x) for x in inputs]
        return [Activation(_sum_of(transform, paths, shape))]
    # A number that is known to be 0 is no constant.
    if any(
        getattr(x, "constant", None) or getattr(x, "uniform", 0) != 0 for x in inputs
    ):
        (constant,) = evaluate_constants(transform, eqn, inputs)
    else:
        constant = None
    paths = [x.path for x in inputs if isinstance(x, Activation)]
    if len(paths) == 1 and paths[0].shape == shape:
        return [Activation(paths[0], constant)]
    return [Activation(_sum_of(transform, paths, shape), constant)]


def _sum_of(transform: PathTransform, paths: Sequence[Path], shape) -> Path:
    arithmetic = transform.arithmetic
    values = [transform.arithmetic.broadcast((path.value,), shape) for path in paths]

    def pull(factors):
        for path in paths:
            _accumulate_unbroadcast(transform, path, factors, shape)

    return transform.new(functools.reduce(arithmetic.add, values), pull)


def _accumulate_unbroadcast(transform, node, factors: Factors, shape) -> None:
    # Jaxprs broadcast scalars, and axes of length one, without saying so.
    if node.shape != shape:
        stretched = tuple(
            axis
            for axis in range(len(shape))
            if node.shape == () or node.shape[axis] != shape[axis]
        )
        whole = transform.arithmetic.broadcast(factors, shape)
        factors = (
            transform.arithmetic.sum(whole, stretched, keepdims=node.shape != ()),
        )
    transform.accumulate(node, factors)


def _multiply(
    transform: PathTransform, x: Activation, w: Weight, constant: Any, shape
) -> Activation:
    arithmetic, path = transform.arithmetic, x.path
    size = transform.size(w)

    def pull(factors):
        _accumulate_unbroadcast(transform, path, (*factors, size), shape)
        _accumulate_unbroadcast(transform, w, (*factors, path.value), shape)

    if w.uniform is not None and abs(w.uniform) == 1 and path.shape == shape:
        new = path
    else:
        product = arithmetic.multiply(*_same_rank(path.value, size))
        new = transform.new(product, pull)
    if w.uniform is None:
        return Activation(new, constant)
    return Activation(new, constant, x.source, x.multiple * w.uniform)


def _same_rank(*values: Scaled) -> list[Scaled]:
    rank = max(value.root.ndim for value in values)
    return [
        Scaled(*(jnp.reshape(a, (1,) * (rank - a.ndim) + a.shape) for a in value))
        for value in values
    ]


@rule("mul")
def _mul(transform, eqn, inputs):
    x, w = sorted(inputs, key=lambda value: not isinstance(value, Activation))
    if isinstance(w, Sign) and isinstance(x, Activation) and w.source is x.source:
        return [Activation(transform.flush(x))]
    if not (isinstance(x, Activation) and isinstance(w, Weight)):
        raise NotHomogeneous("both factors depend on the inputs")
    constant = x.constant and evaluate_constants(transform, eqn, inputs)[0]
    return [_multiply(transform, x, w, constant, eqn.outvars[0].aval.shape)]


@rule("div")
def _div(transform, eqn, inputs):
    x, w = inputs
    if not (isinstance(x, Activation) and isinstance(w, Weight)):
        raise NotHomogeneous("the divisor depends on the inputs")
    inverse = _reciprocal(transform, w)
    constant = x.constant and evaluate_constants(transform, eqn, inputs)[0]
    return [_multiply(transform, x, inverse, constant, eqn.outvars[0].aval.shape)]


def _reciprocal(transform: PathTransform, w: Weight) -> Weight:
    uniform = 1 / w.uniform if w.uniform else None
    inverse = Weight(1 / at_least_float32(w.value)[0], w.params, uniform)
    if w.params:  # a divisor is no edge weight
        transform.refuse([inverse], "div")
    return inverse


@rule("neg")
def _neg(transform, eqn, inputs):
    (x,) = inputs
    constant = x.constant and evaluate_constants(transform, eqn, inputs)[0]
    return [Activation(x.path, constant, x.source, -x.multiple)]


@weight_pull("add", "add_any", "sub", "neg")
def _pull_sum(transform, eqn, inputs, cotangents):
    for x in inputs:
        _accumulate_unbroadcast(transform, x, cotangents[0], eqn.outvars[0].aval.shape)


@weight_pull("mul")
def _pull_product(transform, eqn, inputs, cotangents):
    for x, other in (inputs, inputs[::-1]):
        if x.params:
            factors = (*cotangents[0], transform.size(other))
            _accumulate_unbroadcast(transform, x, factors, eqn.outvars[0].aval.shape)


@weight_pull("div")
def _pull_quotient(transform, eqn, inputs, cotangents):
    numerator, divisor = inputs
    inverse = _reciprocal(transform, divisor)
    _pull_product(transform, eqn, (numerator, inverse), cotangents)


# Nonlinearities.


@rule("gt", "ge", "lt", "le")
def _compare(transform, eqn, inputs):
    del transform, eqn
    x, zero = sorted(inputs, key=lambda value: not isinstance(value, Activation))
    if not (isinstance(zero, Weight) and zero.uniform == 0):
        raise NotHomogeneous("an activation is compared with something else than 0")
    return [Sign(x.source)]


@rule("abs")
def _abs(transform, eqn, inputs):
    del eqn
    return [Activation(transform.flush(inputs[0]))]


def _steepest(
    transform: PathTransform, cases: Sequence[Any], source: object
) -> list[Value]:
    """Return the largest multiple of one activation: slopes of a leaky ReLU."""
    if any(isinstance(x, Weight) and x.uniform != 0 for x in cases):
        raise NotHomogeneous("it joins an activation to a constant other than 0")
    slopes = [x for x in cases if isinstance(x, Activation)]
    if not slopes:
        return [cases[0]]
    if not all(x.source is source for x in slopes):
        raise NotHomogeneous("the sign of one activation switches another")
    return [Activation(transform.flush(max(slopes, key=lambda x: abs(x.multiple))))]


@rule("max", "min")
def _max(transform, eqn, inputs):
    x, other = sorted(inputs, key=lambda value: not isinstance(value, Activation))
    shape = eqn.outvars[0].aval.shape
    if isinstance(other, Weight):
        neutral = -math.inf if eqn.primitive.name == "max" else math.inf
        if other.uniform == neutral and x.path.shape == shape:
            return [x]
        other = without_infinities(other) if other.uniform == neutral else other
    if isinstance(other, Weight) or x.source is other.source:
        (result,) = _steepest(transform, [x, other], x.source)
        paths = [result.path]
        if result.path.shape == shape:
            return [result]
    else:
        paths = [transform.flush(case) for case in inputs]
    return [Activation(_sum_of(transform, paths, shape))]


@rule("clamp")
def _clamp(transform, eqn, inputs):
    low, x, high = inputs
    bounds = [getattr(bound, "uniform", None) for bound in (low, high)]
    if bounds not in ([0, math.inf], [-math.inf, 0]):
        raise NotHomogeneous("only the bounds 0 and infinity are")
    return _abs(transform, eqn, [x])


@rule("select_n")
def _select_n(transform, eqn, inputs):
    which, *cases = inputs
    if isinstance(which, Sign):
        return _steepest(transform, cases, which.source)
    if not isinstance(which, Weight):
        raise NotHomogeneous("the activations choose among other values")
    cases = [without_infinities(x) if isinstance(x, Weight) else x for x in cases]
    return structural(transform, eqn, [which, *cases])


# Pooling and reductions.


def _linear_layer(
    transform: PathTransform,
    x: Activation,
    fn: Callable[[jax.Array], jax.Array],
    axes: tuple[int, ...],
    out_axes: tuple[int, ...],
) -> list[Value]:
    arithmetic, path = transform.arithmetic, transform.flush(x)
    value = arithmetic.linear(fn, path.value, axes)

    def pull(factors):
        cotangent = transform.arithmetic.broadcast(factors, value.root.shape)
        back = _transpose(fn, path.value.root)
        transform.accumulate(path, (arithmetic.linear(back, cotangent, out_axes),))

    return [Activation(transform.new(value, pull))]


def _transpose(fn: Callable[..., Any], *operands: jax.Array) -> Callable[..., Any]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    transposed = jax.linear_transpose(fn, *shapes)
    if len(operands) > 1:
        return transposed
    return lambda cotangent: transposed(cotangent)[0]


@rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(transform, eqn, inputs):
    arithmetic, axes = transform.arithmetic, tuple(eqn.params["axes"])
    path = transform.flush(inputs[0])

    def pull(factors):
        total = transform.arithmetic.broadcast(factors, eqn.outvars[0].aval.shape)
        spread = (jnp.expand_dims(array, axes) for array in total)
        transform.accumulate(path, (Scaled(*spread),))

    return [Activation(transform.new(arithmetic.sum(path.value, axes), pull))]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(transform, eqn, inputs):
    windows = eqn.params["window_dimensions"]
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
        window_dimensions=windows,
        window_strides=eqn.params["window_strides"],
        padding=eqn.params["padding"],
        base_dilation=eqn.params["base_dilation"],
        window_dilation=eqn.params["window_dilation"],
    )
    return _linear_layer(transform, inputs[0], pool, axes, axes)


@rule("cumsum")
def _cumsum(transform, eqn, inputs):
    axes = (eqn.params["axis"],)
    return _linear_layer(transform, inputs[0], lambda x: bind(eqn, x), axes, axes)
