r"""Elementwise primitives of the path transform.

The table holds for all primitives, also those of the other files here.

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

A rule also tells how cotangents go back. All maps are linear and non-negative, so that
is by the transposed map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from normax.paths import numbers
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled
from normax.paths.primitive_spec import Entries, NotHomogeneous, primitive
from normax.paths.primitives.structural import (
    evaluate_constants,
    pull_moved,
    structural,
)
from normax.paths.values import (
    Activation,
    Factors,
    Path,
    Sign,
    Value,
    Weight,
    without_infinities,
)
from normax.paths.weights import refuse

_COMPUTED: dict[str, Any] = {"entries": Entries.COMPUTED, "mixes": None}
_NONLINEAR: dict[str, Any] = _COMPUTED | {"pull": None, "uniform": None}

# How cotangents go back through what is computed of weights.


def _pull_sum(transform, eqn, inputs, cotangents):
    """Send the cotangent of a sum to each term."""
    for x in inputs:
        _accumulate_unbroadcast(transform, x, cotangents[0], eqn.outvars[0].aval.shape)


def _pull_product(transform, eqn, inputs, cotangents):
    """Send the cotangent of a product to each factor, times the other's size."""
    for x, other in (inputs, inputs[::-1]):
        if x.params:
            factors = (*cotangents[0], transform.size(other))
            _accumulate_unbroadcast(transform, x, factors, eqn.outvars[0].aval.shape)


def _pull_quotient(transform, eqn, inputs, cotangents):
    """Send the cotangent of a quotient on, as that of a product with 1 / divisor."""
    numerator, divisor = inputs
    inverse = _reciprocal(transform, divisor)
    _pull_product(transform, eqn, (numerator, inverse), cotangents)


# Affine operations. The constant goes through the same equation as the activation.


@primitive("add", "add_any", "sub", pull=_pull_sum, uniform=None, **_COMPUTED)
def _add(transform, eqn, inputs):
    """Add path values. Two constants that meet become an edge each, one goes on."""
    shape = eqn.outvars[0].aval.shape
    if all(isinstance(x, Activation) and x.constant for x in inputs):
        # Two layers meet, each with a bias, so the graph has two edges.
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
    """Return the sum of path values that broadcast to a shape."""
    arithmetic = transform.arithmetic
    values = [numbers.broadcast((path.value,), shape) for path in paths]

    def pull(factors):
        for path in paths:
            _accumulate_unbroadcast(transform, path, factors, shape)

    return transform.new(functools.reduce(arithmetic.add, values), pull)


def _accumulate_unbroadcast(transform, node, factors: Factors, shape) -> None:
    """Add to a cotangent, summed over the axes that the equation has stretched."""
    # Jaxprs broadcast scalars, and axes of length one, without saying so.
    if node.shape != shape:
        stretched = tuple(
            axis
            for axis in range(len(shape))
            if node.shape == () or node.shape[axis] != shape[axis]
        )
        whole = numbers.broadcast(factors, shape)
        factors = (
            transform.arithmetic.sum(whole, stretched, keepdims=node.shape != ()),
        )
    transform.accumulate(node, factors)


def _multiply(
    transform: PathTransform, x: Activation, w: Weight, constant: Any, shape
) -> Activation:
    """Multiply path values by $|w|^p$; a known factor keeps the activation's source."""
    path, size = x.path, transform.size(w)

    def pull(factors):
        _accumulate_unbroadcast(transform, path, (*factors, size), shape)
        _accumulate_unbroadcast(transform, w, (*factors, path.value), shape)

    if w.uniform is not None and abs(w.uniform) == 1 and path.shape == shape:
        new = path
    else:
        product = numbers.multiply(*_same_rank(path.value, size))
        new = transform.new(product, pull)
    if w.uniform is None:
        return Activation(new, constant)
    return Activation(new, constant, x.source, x.multiple * w.uniform)


def _same_rank(*values: Scaled) -> list[Scaled]:
    """Prepend axes of length one, so that all have the same rank."""
    rank = max(value.root.ndim for value in values)
    return [
        Scaled(*(jnp.reshape(a, (1,) * (rank - a.ndim) + a.shape) for a in value))
        for value in values
    ]


@primitive(
    "mul",
    pull=_pull_product,
    uniform=None,
    zero=True,
    takes_signs=True,
    **_COMPUTED,
)
def _mul(transform, eqn, inputs):
    """Multiply an activation by a weight, or by its own sign: then it is a ReLU."""
    x, w = sorted(inputs, key=lambda value: not isinstance(value, Activation))
    if isinstance(w, Sign) and isinstance(x, Activation) and w.source is x.source:
        return [Activation(transform.flush(x))]
    if not (isinstance(x, Activation) and isinstance(w, Weight)):
        raise NotHomogeneous("both factors depend on the inputs")
    constant = x.constant and evaluate_constants(transform, eqn, inputs)[0]
    return [_multiply(transform, x, w, constant, eqn.outvars[0].aval.shape)]


@primitive(
    "div",
    pull=_pull_quotient,
    uniform=None,
    refuses=lambda eqn, inputs: bool(inputs[1].params),  # a divisor is no edge weight
    **_COMPUTED,
)
def _div(transform, eqn, inputs):
    """Divide an activation by a weight."""
    x, w = inputs
    if not (isinstance(x, Activation) and isinstance(w, Weight)):
        raise NotHomogeneous("the divisor depends on the inputs")
    inverse = _reciprocal(transform, w)
    constant = x.constant and evaluate_constants(transform, eqn, inputs)[0]
    return [_multiply(transform, x, inverse, constant, eqn.outvars[0].aval.shape)]


def _reciprocal(transform: PathTransform, w: Weight) -> Weight:
    """Return one over a weight. `path_scales` refuses parameters that divide."""
    inverse = w.inverse()
    if w.params:  # a divisor is no edge weight
        refuse(transform, [inverse], "div")
    return inverse


@primitive("neg", pull=_pull_sum, uniform=-1, **_COMPUTED)
def _neg(transform, eqn, inputs):
    """Change the sign, which path values do not see."""
    (x,) = inputs
    constant = x.constant and evaluate_constants(transform, eqn, inputs)[0]
    return [Activation(x.path, constant, x.source, -x.multiple)]


# Nonlinearities.


@primitive("gt", "ge", "lt", "le", **_NONLINEAR)
def _compare(transform, eqn, inputs):
    """Compare an activation with 0: the result is its sign."""
    del transform, eqn
    x, zero = sorted(inputs, key=lambda value: not isinstance(value, Activation))
    if not (isinstance(zero, Weight) and zero.uniform == 0):
        raise NotHomogeneous("an activation is compared with something else than 0")
    return [Sign(x.source)]


@primitive("abs", **_NONLINEAR)
def _abs(transform, eqn, inputs):
    """Keep the path values: the absolute value is linear on each side of 0."""
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


@primitive("max", "min", **_NONLINEAR)
def _max(transform, eqn, inputs):
    """Return a ReLU, a leaky ReLU, or the sum of the paths of two activations."""
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


@primitive("clamp", **_NONLINEAR)
def _clamp(transform, eqn, inputs):
    """Return a ReLU that is written with `clip`."""
    low, x, high = inputs
    bounds = [getattr(bound, "uniform", None) for bound in (low, high)]
    if bounds not in ([0, math.inf], [-math.inf, 0]):
        raise NotHomogeneous("only the bounds 0 and infinity are")
    return _abs(transform, eqn, [x])


@primitive("select_n", pull=pull_moved, uniform=None, takes_signs=True, **_COMPUTED)
def _select_n(transform, eqn, inputs):
    """Choose by the sign of an activation, or by a known mask."""
    which, *cases = inputs
    if isinstance(which, Sign):
        return _steepest(transform, cases, which.source)
    if not isinstance(which, Weight):
        raise NotHomogeneous("the activations choose among other values")
    cases = [without_infinities(x) if isinstance(x, Weight) else x for x in cases]
    return structural(transform, eqn, [which, *cases])
