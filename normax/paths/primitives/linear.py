r"""Linear layers in the path transform: dot products and convolutions.

A layer takes the activations $x_i$ and the weights $w_{ij}$ to
$y_j = \sum_i |w_{ij}|^p x_i$, and cotangents the same way back. Before the sum, the
weights are multiplied by the scales of the $x_i$ and divided by those of the
$y_j$. A convolution and a dot product with several positions sum over
positions as well, with the same weight; there, all positions of a unit share a scale.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from normax._core.programs import (
    contracted_lengths,
    contraction,
    convolution,
    convolved_lengths,
)
from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.contraction import contract, sums_in_range, weigh
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled, of_rank, where_live
from normax.paths.primitive_spec import Entries, NotHomogeneous, primitive
from normax.paths.values import Activation, Path, Weight

Contract = Callable[..., Sequence[Scaled]]


@dataclasses.dataclass(frozen=True)
class _Units:
    """How the units on one side of a layer lie in the activations and the weights.

    Attributes:
      axes: Axis of the weights for each axis of the activations that counts units;
        the other axes of the activations are positions.
      ndim: Rank of the activations.
      kernel: Shape of the weights.
      groups: Number of groups of a convolution whose inputs these are, and its
        output axis.
    """

    axes: dict[int, int]
    ndim: int
    kernel: tuple[int, ...]
    groups: tuple[int, int] = (1, -1)

    def of_activation(self, x: jax.Array) -> jax.Array:
        """Return the largest entry of each unit, laid out as in the weights."""
        positions = tuple(i for i in range(self.ndim) if i not in self.axes)
        x = jnp.max(x, axis=positions)
        axes = [self.axes[i] for i in sorted(self.axes)]
        x = jnp.transpose(x, tuple(np.argsort(axes)))
        return jnp.expand_dims(
            x, tuple(i for i in range(len(self.kernel)) if i not in axes)
        )

    def to_activation(self, units: jax.Array) -> jax.Array:
        """Lay units out as in the activations."""
        axes = [self.axes[i] for i in sorted(self.axes)]
        units = jnp.squeeze(
            units, tuple(i for i in range(len(self.kernel)) if i not in axes)
        )
        units = jnp.transpose(units, tuple(np.argsort(np.argsort(axes))))
        return jnp.expand_dims(
            units, tuple(i for i in range(self.ndim) if i not in self.axes)
        )

    def to_kernel(self, units: jax.Array) -> jax.Array:
        """Repeat the inputs of a grouped convolution for the outputs of their group."""
        groups, out = self.groups
        if groups == 1:
            return units
        (axis,) = self.axes.values()
        table = jnp.reshape(units, (groups, -1))
        table = jnp.repeat(table, self.kernel[out] // groups, axis=0)
        table = table if out < axis else table.T
        others = tuple(i for i in range(len(self.kernel)) if i not in (axis, out))
        return jnp.expand_dims(table, others)

    def of_kernel(self, x: jax.Array) -> jax.Array:
        """Return the largest weight of each unit."""
        groups, out = self.groups
        if groups == 1:
            kept = self.axes.values()
            others = tuple(i for i in range(x.ndim) if i not in kept)
            return jnp.max(x, axis=others, keepdims=True)
        (axis,) = self.axes.values()
        others = tuple(i for i in range(x.ndim) if i not in (axis, out))
        table = jnp.max(x, axis=others)
        table = table if out < axis else table.T
        table = jnp.max(jnp.reshape(table, (groups, -1, table.shape[1])), axis=1)
        return jnp.expand_dims(
            jnp.reshape(table, -1), tuple(i for i in range(x.ndim) if i != axis)
        )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A bilinear layer `apply(activation, weights)`."""

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    inputs: _Units
    outputs: _Units

    def propagate(
        self, transform: PathTransform, x: Scaled, w: jax.Array, back: bool, shape
    ) -> Scaled:
        """Take path values forward, or cotangents back, to a given shape."""
        arithmetic, x = transform.arithmetic, numbers.common(x)
        if arithmetic.direct:
            powers = arithmetic.power(w)
            result, safe = self.directly(arithmetic, x, powers, back, shape)
            return numbers.normalize(numbers.where(safe, result))
        source, target = self.inputs, self.outputs
        if back:
            source, target = target, source
        units = numbers.scale(source.of_activation(x.root))
        values = arithmetic.value(x.root / source.to_activation(units))
        scaled, scale = weigh(
            w, source.to_kernel(units), target.of_kernel, target.to_kernel
        )
        # `weigh` has brought all products into range, so plain sums will do.
        result = self._apply(values, arithmetic.power(scaled), back, shape)
        root = target.to_activation(scale) * where_live(arithmetic.root, result)
        return numbers.normalize(Scaled(root, of_rank(x.exponent, len(shape))))

    def _apply(self, values: jax.Array, weights: jax.Array, back: bool, shape):
        layer = functools.partial(_flip(self.apply), weights)
        if not back:
            return layer(values)
        zeros = jax.ShapeDtypeStruct(shape, values.dtype)
        return jax.linear_transpose(layer, zeros)(values)[0]

    def directly(
        self,
        arithmetic: PathArithmetic,
        x: Scaled,
        powers: jax.Array,
        back: bool,
        shape,
    ) -> tuple[Scaled, jax.Array]:
        """Do the same without scaling the weights, and tell where that is safe.

        Args:
          arithmetic: Arithmetic of path values.
          x: Path values or cotangents, with one exponent.
          powers: Powers of the weights, none negative.
          back: Whether these are cotangents.
          shape: Shape of the result.

        Returns:
          The result, and where nothing has left the range of floats.
        """
        values = arithmetic.value(x.root)
        sums = self._apply(values, powers, back, shape)
        root = arithmetic.root(sums)
        return Scaled(root, of_rank(x.exponent, len(shape))), _safe(
            sums, values, powers
        )

    def correlate(
        self, transform: PathTransform, x: Scaled, cotangent: Scaled, shape
    ) -> Scaled:
        """Return the cotangent of the weights, a sum over positions."""
        arithmetic = transform.arithmetic
        values, scales, exponent = [], [], jnp.zeros((), jnp.int32)
        for units, of in ((self.inputs, x), (self.outputs, cotangent)):
            of = numbers.common(of)
            scale = numbers.scale(units.of_activation(of.root))
            values.append(arithmetic.value(of.root / units.to_activation(scale)))
            scales.append(units.to_kernel(scale))
            exponent = exponent + of_rank(of.exponent, len(shape))
        zeros = jax.ShapeDtypeStruct(shape, values[0].dtype)
        (result,) = jax.linear_transpose(
            functools.partial(self.apply, values[0]), zeros
        )(values[1])
        root = scales[0] * scales[1] * where_live(arithmetic.root, result)
        return Scaled(root, exponent)


def _safe(sums: jax.Array, *factors: jax.Array) -> jax.Array:
    """Return where sums of products of two factors are in the range of floats."""
    # A sum is safely 0 if no product can be too small.
    smallest = [jnp.min(x, initial=jnp.inf) for x in factors]
    zeros = smallest[0] * smallest[1] > 2.0**-100
    return sums_in_range(sums) | ((sums == 0) & zeros)


def _flip(fn):
    """Return a bilinear map with its operands exchanged."""
    return lambda weights, activation: fn(activation, weights)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dot product of one activation and weights, which sums over some inputs.

    Attributes:
      layer: The layer.
      x: The activation.
      w: The weights.
      shape: Shape of the result.
    """

    layer: _Layer
    x: Activation
    w: Weight
    shape: tuple[int, ...]

    @property
    def at_one_position(self) -> bool:
        """Whether the weights multiply vectors, not several positions."""
        units, shape = self.layer.inputs.axes, self.x.path.shape
        return math.prod(n for i, n in enumerate(shape) if i not in units) == 1

    def multiply(
        self, contract: Contract, *values: Scaled, back: bool = False
    ) -> list[Scaled]:
        """Take path values forward, or cotangents back, at one position.

        Args:
          contract: Takes values, laid out as the weights, and the axes of the sums
            to the sums.
          *values: The path values.
          back: Whether these are cotangents.

        Returns:
          All that `contract` returns, laid out as activations.
        """
        source, target = self.layer.inputs, self.layer.outputs
        shape = self.x.path.shape if back else self.shape
        if back:
            source, target = target, source
        axes = target.axes.values()
        others = tuple(i for i in range(len(target.kernel)) if i not in axes)
        totals = contract(*(lay(value, source) for value in values), axes=others)
        return [
            Scaled(
                jnp.reshape(target.to_activation(total.root), shape),
                of_rank(total.exponent, len(shape)),
            )
            for total in totals
        ]


def lay(value: Scaled, units: _Units) -> Scaled:
    """Lay path values of one position out as the weights."""
    return Scaled(*(units.of_activation(part) for part in value))


def _matmul(transform: PathTransform, dense: Dense) -> Path:
    """Apply a dense layer to one position: vectors times weights, no products."""
    path, weights = transform.flush(dense.x), transform.edges(dense.w)

    def contraction(value, axes):
        return [contract(transform.arithmetic, weights, value, axes)]

    def pull(factors):
        cotangent = numbers.broadcast(factors, dense.shape)
        transform.accumulate(path, dense.multiply(contraction, cotangent, back=True))
        inputs, outputs = dense.layer.inputs, dense.layer.outputs
        outer = (lay(path.value, inputs), lay(cotangent, outputs))
        transform.accumulate(dense.w, outer)

    (value,) = dense.multiply(contraction, path.value)
    return transform.new(value, pull)


def _positions(transform: PathTransform, layer: _Layer, path: Path, w: Weight, shape):
    """Apply a layer to many positions."""
    kernel = numbers.cast(transform.edges(w), path.value)

    def pull(factors):
        cotangent = numbers.broadcast(factors, shape)
        back = layer.propagate(transform, cotangent, kernel, True, path.shape)
        transform.accumulate(path, (back,))
        if w.params:
            outer = layer.correlate(transform, path.value, cotangent, kernel.shape)
            transform.accumulate(w, (outer,))

    value = layer.propagate(transform, path.value, kernel, False, shape)
    return transform.new(value, pull)


def dense_layer(eqn: JaxprEqn, inputs: Sequence[Any]) -> Dense:
    """Lay out a dot product of an activation and a weight as a layer."""
    dimension_numbers = contraction(eqn)
    contracting, batch = dimension_numbers
    first = isinstance(inputs[0], Activation)
    x, w = inputs if first else inputs[::-1]
    of_x, of_w = (0, 1) if first else (1, 0)
    ndim, kernel = len(eqn.invars[of_x].aval.shape), w.shape
    shape = eqn.outvars[0].aval.shape
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

    layer = _Layer(
        apply,
        _Units(shared | summed, ndim, kernel),
        _Units(out, len(shape), kernel),
    )
    return Dense(layer, x, w, shape)


@primitive(
    "dot_general",
    pull=None,
    entries=Entries.COMPUTED,
    uniform=None,
    mixes=contracted_lengths,
    zero=True,
)
def _dot_general(transform, eqn, inputs):
    """Apply a dense layer to one position or several."""
    if all(isinstance(x, Activation) for x in inputs):
        raise NotHomogeneous("both factors depend on the inputs")
    dense = dense_layer(eqn, inputs)
    if dense.at_one_position:
        return [Activation(_matmul(transform, dense))]
    path = transform.flush(dense.x)
    return [Activation(_positions(transform, dense.layer, path, dense.w, dense.shape))]


@primitive(
    "conv_general_dilated",
    pull=None,
    entries=Entries.COMPUTED,
    uniform=None,
    mixes=convolved_lengths,
)
def _conv_general_dilated(transform, eqn, inputs):
    """Lay out a convolution as a layer; a unit is a channel."""
    x, w = inputs
    if not (isinstance(x, Activation) and isinstance(w, Weight)):
        raise NotHomogeneous("the kernel depends on the inputs")
    options = convolution(eqn)
    if options["batch_group_count"] != 1:
        raise NotHomogeneous("it groups the batch")
    spec, shape = options["dimension_numbers"], eqn.outvars[0].aval.shape
    apply = functools.partial(
        lax.conv_general_dilated, **options, precision=lax.Precision.HIGHEST
    )
    out, into = spec.rhs_spec[:2]
    layer = _Layer(
        apply,
        _Units(
            {spec.lhs_spec[1]: into},
            len(shape),
            w.shape,
            (options["feature_group_count"], out),
        ),
        _Units({spec.out_spec[1]: out}, len(shape), w.shape),
    )
    path = transform.flush(x)
    return [Activation(_positions(transform, layer, path, w, shape))]
