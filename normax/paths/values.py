r"""The kinds of values in a network that the path transform tells apart.

============ ==================================================================
`Weight`     does not depend on the inputs: parameters, constants, and what is
             computed from them; an ordinary array
`Activation` depends on the inputs: a path value, and the signed constant that
             elementwise affine operations have added to it, which becomes an edge
             from a constant input, $|c|^p$, at the next nonlinearity or linear
             layer (so that a batch norm and the convolution it is folded into have
             the same paths)
`Sign`       whether an activation is positive, for nonlinearities written with
             `where`
============ ==================================================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.norms import at_least_float32
from normax.paths.numbers import Scaled

_SMALL = 2**14  # entries of a constant that may be looked at

Ranges = Sequence[tuple[int, int]]
Factors = tuple[Scaled, ...]  # a product, whose factors broadcast to one shape


@dataclasses.dataclass(eq=False)
class Origin:
    """A parameter, or a part of an array that depends on some.

    Attributes:
      names: The parameters.
      part: The array that this is a part of, and its range along every axis, None
        where that is unknown or says nothing, since the array repeats entries.
    """

    names: frozenset[str]
    part: tuple[Weight, Ranges | None] | None = None

    def overlaps(self, other: Origin) -> bool:
        """Return whether both may hold the same entries."""
        if self is other or not self.names & other.names:
            return self is other
        if self.part is None:
            return other.part is None or other.overlaps(self)
        array, ranges = self.part
        if other.part and other.part[0] is array and ranges and other.part[1]:
            pairs = zip(ranges, other.part[1], strict=True)
            return all(max(a, c) < min(b, d) for (a, b), (c, d) in pairs)
        return any(whole.overlaps(other) for whole in array.params)


@dataclasses.dataclass(eq=False)
class Weight:
    """A value that does not depend on the inputs.

    Attributes:
      value: The array.
      params: The parameters that it depends on.
      uniform: The number that every entry is known to be, if so.
      repeats: Whether an entry of a parameter may be in several entries.
      cotangent: Derivative of $F$ with respect to $|w|^p$.
    """

    value: Any
    params: frozenset[Origin] = frozenset()
    uniform: float | None = None
    repeats: bool = False
    cotangent: Factors | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return np.shape(self.value)

    def inverse(self) -> Weight:
        """Return one over the weight."""
        uniform = 1 / self.uniform if self.uniform else None
        return Weight(1 / at_least_float32(self.value)[0], self.params, uniform)

    def overlaps(self, other: Weight) -> bool:
        """Return whether both may hold the same entries of parameters."""
        return any(a.overlaps(b) for a in self.params for b in other.params)


@dataclasses.dataclass(eq=False)
class Path:
    """Path values of an activation, without its constant.

    Attributes:
      value: The sums over the paths that end here.
      cotangent: Derivative of $F$ with respect to them.
    """

    value: Scaled
    cotangent: Factors | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation."""
        return self.value.root.shape


@dataclasses.dataclass(eq=False)
class Activation:
    """A value that depends on the inputs.

    Attributes:
      path: Its path values.
      constant: What affine operations have added since the last linear layer.
      source: Identity of the activation that this one is a multiple of.
      multiple: That multiple, a known number.
    """

    path: Path
    constant: Weight | None = None
    source: object = dataclasses.field(default_factory=object)
    multiple: float = 1.0


@dataclasses.dataclass(eq=False)
class Sign:
    """Whether the activations of one source are positive."""

    source: object


@dataclasses.dataclass(eq=False)
class Unsupported:
    """A value that no rule covers; an error only if an output needs it."""

    message: str


Value = Weight | Activation | Sign | Unsupported


def zeros(variable: Any) -> jax.Array:
    """Return zeros like a variable of a jaxpr."""
    return jnp.zeros(variable.aval.shape, variable.aval.dtype)


def without_infinities(w: Weight) -> Weight:
    """Return a constant, or 0 for an infinite one: a maximum that ignores it."""
    infinite = w.uniform in (math.inf, -math.inf)
    return Weight(jnp.zeros_like(w.value), uniform=0.0) if infinite else w


def weight(value: Any) -> Weight:
    """Return a constant as a weight."""
    dtype = jnp.result_type(value)
    real = jnp.issubdtype(dtype, jnp.number) and not jnp.iscomplexobj(value)
    here = not isinstance(value, jax.core.Tracer) and (
        not isinstance(value, jax.Array) or value.is_fully_addressable
    )
    if not (real and here and 0 < np.size(value) <= _SMALL):
        return Weight(value)
    entries = np.ravel(value)
    same = np.all(entries == entries[0])
    return Weight(value, uniform=float(entries[0]) if same else None)
