"""Linear layers in the path transform: dot products and convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend.core import JaxprEqn

from normax._core.programs import (
    contracted_lengths,
    contraction,
    convolution,
    convolved_lengths,
)
from normax.paths import numbers
from normax.paths.contraction import contract
from normax.paths.layers import Application, Layer, Units, lay
from normax.paths.lifting import PathTransform
from normax.paths.primitive_spec import Entries, NotHomogeneous, primitive
from normax.paths.values import Activation, Path, Weight


def _matmul(transform: PathTransform, application: Application) -> Path:
    """Apply a dense layer to one position: vectors times weights, no products."""
    path, weights = transform.flush(application.x), transform.edges(application.w)

    def multiply(value, axes):
        return [contract(transform.arithmetic, weights, value, axes)]

    def pull(factors):
        cotangent = numbers.broadcast(factors, application.shape)
        back = application.multiply(multiply, cotangent, back=True)
        transform.accumulate(path, tuple(back))
        inputs, outputs = application.layer.inputs, application.layer.outputs
        outer = (lay(path.value, inputs), lay(cotangent, outputs))
        transform.accumulate(application.w, outer)

    (value,) = application.multiply(multiply, path.value)
    return transform.new(value, pull)


def _positions(transform: PathTransform, application: Application) -> Path:
    """Apply a layer to many positions."""
    arithmetic, layer = transform.arithmetic, application.layer
    path, w, shape = transform.flush(application.x), application.w, application.shape
    kernel = numbers.cast(transform.edges(w), path.value)

    def pull(factors):
        cotangent = numbers.broadcast(factors, shape)
        back = layer.propagate(arithmetic, cotangent, kernel, True, path.shape)
        transform.accumulate(path, (back,))
        if w.params:
            outer = layer.correlate(arithmetic, path.value, cotangent, kernel.shape)
            transform.accumulate(w, (outer,))

    value = layer.propagate(arithmetic, path.value, kernel, False, shape)
    return transform.new(value, pull)


def _shape(eqn: JaxprEqn) -> tuple[int, ...]:
    aval: Any = eqn.outvars[0].aval
    return aval.shape


def _dense(eqn: JaxprEqn, inputs: Sequence[Any]) -> Application:
    """Lay out a dot product of an activation and a weight as a layer."""
    if all(isinstance(x, Activation) for x in inputs):
        raise NotHomogeneous("both factors depend on the inputs")
    dimension_numbers = contraction(eqn)
    contracting, batch = dimension_numbers
    first = isinstance(inputs[0], Activation)
    x, w = inputs if first else inputs[::-1]
    of_x, of_w = (0, 1) if first else (1, 0)
    ndim, kernel, shape = len(x.path.shape), w.shape, _shape(eqn)
    shared = dict(zip(batch[of_x], batch[of_w], strict=True))
    summed = dict(zip(contracting[of_x], contracting[of_w], strict=True))
    free = [i for i in range(len(kernel)) if i not in (*batch[of_w], *summed.values())]
    count = len(shared)
    start = len(shape) - len(free) if first else count
    out = dict(enumerate(batch[of_w])) | dict(enumerate(free, start))

    def apply(x, w):
        operands = (x, w) if first else (w, x)
        return lax.dot_general(
            *operands, dimension_numbers, precision=lax.Precision.HIGHEST
        )

    layer = Layer(
        apply,
        Units(shared | summed, ndim, kernel),
        Units(out, len(shape), kernel),
    )
    positions = (n for i, n in enumerate(x.path.shape) if i not in shared | summed)
    return Application(layer, x, w, shape, math.prod(positions) == 1)


def _convolution(eqn: JaxprEqn, inputs: Sequence[Any]) -> Application:
    """Lay out a convolution as a layer; a unit is a channel."""
    x, w = inputs
    if not (isinstance(x, Activation) and isinstance(w, Weight)):
        raise NotHomogeneous("the kernel depends on the inputs")
    options = convolution(eqn)
    if options["batch_group_count"] != 1:
        raise NotHomogeneous("it groups the batch")
    spec, shape = options["dimension_numbers"], _shape(eqn)
    apply = functools.partial(
        lax.conv_general_dilated, **options, precision=lax.Precision.HIGHEST
    )
    out, into = spec.rhs_spec[:2]
    groups = options["feature_group_count"], out
    inside = Units({spec.lhs_spec[1]: into}, len(shape), w.shape, groups)
    outside = Units({spec.out_spec[1]: out}, len(shape), w.shape)
    return Application(Layer(apply, inside, outside), x, w, shape, False)


LAYERS = {"dot_general": _dense, "conv_general_dilated": _convolution}


def _apply(transform, eqn, inputs):
    """Apply a layer to one position or several."""
    application = LAYERS[eqn.primitive.name](eqn, inputs)
    apply = _matmul if application.at_one_position else _positions
    return [Activation(apply(transform, application))]


_LAYER: dict[str, Any] = {"pull": None, "entries": Entries.COMPUTED, "uniform": None}
primitive("dot_general", mixes=contracted_lengths, zero=True, **_LAYER)(_apply)
primitive("conv_general_dilated", mixes=convolved_lengths, **_LAYER)(_apply)
