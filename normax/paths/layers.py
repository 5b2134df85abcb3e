r"""Linear layers, laid out: dot products and convolutions of activations and weights.

A layer takes the activations $x_i$ and the weights $w_{ij}$ to
$y_j = \sum_i |w_{ij}|^p x_i$, and cotangents the same way back. Before the sum, the
weights are multiplied by the scales of the $x_i$ and divided by those of the
$y_j$. A convolution and a dot product with several positions sum over
positions as well, with the same weight; there, all positions of a unit share a scale.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normax._core.norms import nonzero
from normax.paths import numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.contraction import sums_in_range, weigh
from normax.paths.numbers import Scaled, of_rank, where_live
from normax.paths.values import Activation, Weight

Contract = Callable[..., Sequence[Scaled]]

TINY = 2.0**-50  # products of two larger numbers are in the range of floats


@dataclasses.dataclass(frozen=True)
class Units:
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

    def quotients(
        self, arithmetic: PathArithmetic, x: Scaled
    ) -> tuple[jax.Array, Scaled]:
        """Divide path values, with one exponent, by the largest of their unit.

        Returns:
          The quotients as plain numbers, and the largest ones, laid out as in the
          weights.
        """
        largest = lax.stop_gradient(self.of_activation(x.root))
        quotients = arithmetic.value(x.root / self.to_activation(nonzero(largest)))
        exponent = of_rank(x.exponent, largest.ndim)
        return quotients, numbers.normalize(Scaled(largest, exponent))

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
class Layer:
    """A bilinear layer `apply(activation, weights)`."""

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    inputs: Units
    outputs: Units

    def propagate(
        self, arithmetic: PathArithmetic, x: Scaled, w: jax.Array, back: bool, shape
    ) -> Scaled:
        """Take path values forward, or cotangents back, to a given shape."""
        x = numbers.common(x)
        if arithmetic.direct:
            powers = arithmetic.power(w)
            # Zeros count as tiny here: to leave them out takes another pass.
            none_tiny = arithmetic.plain or jnp.min(powers, initial=jnp.inf) > TINY
            result, safe = self.directly(arithmetic, x, powers, none_tiny, shape, back)
            return numbers.where(safe, result)
        source, target = self.inputs, self.outputs
        if back:
            source, target = target, source
        values, largest = source.quotients(arithmetic, x)
        # Units of value 0 count as such, so that no weight behind them is the largest.
        scaled, scale = weigh(
            w, source.to_kernel(largest.root), target.of_kernel, target.to_kernel
        )
        # `weigh` has brought all products into range, so plain sums will do.
        result = self._apply(values, arithmetic.power(scaled), back, shape)
        root = target.to_activation(scale) * where_live(arithmetic.root, result)
        return Scaled(root, of_rank(largest.exponent, len(shape)))

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
        none_tiny: jax.Array | bool,
        shape,
        back: bool = False,
    ) -> tuple[Scaled, jax.Array]:
        """Do the same without scaling the weights, and tell where that is safe.

        Args:
          arithmetic: Arithmetic of path values.
          x: Path values or cotangents, with one exponent.
          powers: Powers of the weights, none negative.
          none_tiny: Whether they are larger than `TINY`, at least those that are not 0.
            That does not matter if p is 1.
          shape: Shape of the result.
          back: Whether these are cotangents.

        Returns:
          The result, and where nothing has left the range of floats.
        """
        top = lax.stop_gradient(jnp.max(x.root, initial=0))
        largest = numbers.normalize(Scaled(of_rank(top, x.root.ndim), x.exponent))
        values = arithmetic.value(x.root / nonzero(top))
        # What is much smaller than the largest may be lost, unless it is 0.
        values = jnp.where((values > 2.0**-40) | (x.root == 0), values, jnp.nan)
        # Powers of p = 1 are the weights. So no product with values from 2^20 to 2^60
        # is too small.
        unit = 60 if arithmetic.plain else 0
        sums = self._apply(values * 2.0**unit, powers, back, shape)
        if arithmetic.plain:
            safe = sums < 2.0**120
        else:  # A sum is safely 0 if no product can be too small.
            safe = sums_in_range(sums) | ((sums == 0) & none_tiny)
        roots = arithmetic.root(sums) * 2.0 ** -(unit // 2)
        root = of_rank(largest.root, len(shape)) * roots
        return Scaled(root, of_rank(largest.exponent, len(shape))), safe

    def correlate(
        self, arithmetic: PathArithmetic, x: Scaled, cotangent: Scaled, shape
    ) -> Scaled:
        """Return the cotangent of the weights, a sum over positions."""
        values, scales, exponent = [], [], jnp.zeros((), jnp.int32)
        for units, of in ((self.inputs, x), (self.outputs, cotangent)):
            quotients, largest = units.quotients(arithmetic, numbers.common(of))
            values.append(quotients)
            scales.append(units.to_kernel(largest.root))
            exponent = exponent + of_rank(largest.exponent, len(shape))
        zeros = jax.ShapeDtypeStruct(shape, values[0].dtype)
        (result,) = jax.linear_transpose(
            functools.partial(self.apply, values[0]), zeros
        )(values[1])
        root = scales[0] * scales[1] * where_live(arithmetic.root, result)
        return Scaled(root, exponent)


def _flip(fn):
    """Return a bilinear map with its operands exchanged."""
    return lambda weights, activation: fn(activation, weights)


@dataclasses.dataclass(frozen=True)
class Application:
    """A layer, and the activation and the weights that it multiplies.

    Attributes:
      layer: The layer.
      x: The activation.
      w: The weights.
      shape: Shape of the result.
      at_one_position: Whether each weight is used once, with a vector.
    """

    layer: Layer
    x: Activation
    w: Weight
    shape: tuple[int, ...]
    at_one_position: bool

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


def lay(value: Scaled, units: Units) -> Scaled:
    """Lay path values of one position out as the weights."""
    return Scaled(*(units.of_activation(part) for part in value))
