r"""What a scan carries from step to step, in the path transform.

Inside of a loop values are arrays, and what else is known of them must hold at all
steps. A carry that is an activation at some step is one from the start: a weight that
the scan starts at is its constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._path_arithmetic import Scaled
from normax._path_lifting import PathTransform
from normax._path_values import (
    Activation,
    Origin,
    Path,
    Sign,
    Unsupported,
    Value,
    Weight,
)
from normax._programs import scan_counts


class Kind(NamedTuple):
    """What a value is while the scan holds it as arrays.

    Attributes:
      active: Whether it is an activation; otherwise it is a weight.
      constant: Whether the activation has a constant.
      names: The parameters that the weight or the constant depends on.
      uniform: The number that every entry of the weight is known to be, if so.
      repeats: Whether the weight or the constant may hold an entry of a parameter
        more than once.
    """

    active: bool = False
    constant: bool = False
    names: frozenset[str] = frozenset()
    uniform: float | None = None
    repeats: bool = False


def weight_of(value: Any) -> Weight:
    """Return the weight, or the constant of an activation, in a value."""
    weight = value.constant if isinstance(value, Activation) else value
    return weight if isinstance(weight, Weight) else Weight(None)


def _is_infinite(w: Weight) -> bool:
    return w.uniform in (math.inf, -math.inf)


def _union(params: Iterable[frozenset[Origin]]) -> frozenset[Origin]:
    return frozenset[Origin]().union(*params)


def _names(params: Iterable[frozenset[Origin]]) -> frozenset[str]:
    """Return the names of parameters."""
    return frozenset[str]().union(*(origin.names for origin in _union(params)))


class Body:
    """The body of a scan: its values as arrays, and arrays as its values.

    Attributes:
      arithmetic: Arithmetic of path values.
      closed: The jaxpr.
      dtype: Dtype of path values.
      carries: Which arguments are carries.
      variables: Their variables.
      length: How many steps there are.
      reverse: Whether the last one comes first.
      kinds: The kinds of its arguments; an `Unsupported` stands for itself.
      params: The parameters that they depend on; of carries, only names are kept.
      stacked: Names of parameters that are sliced, so that no two steps share any,
        and that no carry holds the same entries of from the start.
      origins: The parameters, or parts of them, that its results may depend on.
    """

    def __init__(self, transform: PathTransform, eqn, inputs: Sequence[Any]):
        self.arithmetic, self.closed = transform.arithmetic, eqn.params["jaxpr"]
        self.dtype = next(
            x.path.value.root.dtype for x in inputs if isinstance(x, Activation)
        )
        self.kinds = [self.kind(transform, x) for x in inputs]
        first, count = scan_counts(eqn)
        self.carries = slice(first, first + count)
        self.length, self.reverse = eqn.params["length"], eqn.params["reverse"]
        self.variables = eqn.invars[self.carries]
        params = [weight_of(x).params for x in inputs]
        self.origins = _union(params)
        consts, xs = params[:first], params[first + count :]
        self.params = [*consts, *[None] * count, *xs]
        pairs = itertools.product(_union(params[self.carries]), _union(xs))
        shared = (a.names & b.names for a, b in pairs if a.overlaps(b))
        self.stacked = _names(xs) - _names(consts) - frozenset[str]().union(*shared)

    def kind(self, transform: PathTransform, value: Any) -> Any:
        """Return the kind of a value."""
        if isinstance(value, Sign):
            reason = "the sign of an activation enters or leaves it"
            return transform.unsupported("scan", reason)
        if isinstance(value, Unsupported):
            return value
        weight = weight_of(value)
        names = _names([weight.params])
        if isinstance(value, Weight):
            return Kind(False, False, names, value.uniform, value.repeats)
        return Kind(True, value.constant is not None, names, None, weight.repeats)

    def activation(self, w: Weight) -> Activation:
        """Return a weight as the constant of an activation without paths."""
        path = Path(self.arithmetic.zeros(w.shape, self.dtype))
        return Activation(path, None if w.uniform == 0 else w)

    def pack(self, value: Any, stacked: bool = False) -> Any:
        """Return the arrays of a value, which the scan slices if it is stacked."""
        if isinstance(value, Unsupported):
            return None
        if isinstance(value, Weight):
            return jnp.asarray(value.value)
        constant = value.constant and jnp.asarray(value.constant.value)
        return self.fix(value.path.value, stacked), constant

    def fix(self, x: Scaled, stacked: bool = False) -> Scaled:
        """Return path values in the one dtype and form that they have here."""
        x, axes = Scaled(x.root.astype(self.dtype), x.exponent), range(x.root.ndim)
        if not stacked:
            return self.arithmetic.normalize(self.arithmetic.common(x))
        root, exponent = self.arithmetic.common(x, tuple(axes)[1:])
        shape = (len(root), *exponent.shape[1:])
        return Scaled(root, jnp.broadcast_to(exponent, shape))

    def unpack(self, arrays: Any, kind: Any, params: frozenset[Origin]) -> Value:
        """Return the value that has these arrays."""
        if isinstance(kind, Unsupported):
            return kind
        if not kind.active:
            return Weight(arrays, params, kind.uniform, kind.repeats)
        value, constant = arrays
        whole = Weight(constant, params, repeats=kind.repeats)
        return Activation(Path(value), whole if kind.constant else None)

    def unpack_results(
        self, arrays: Sequence[Any], kinds: Sequence[Any]
    ) -> list[Value]:
        """Return the values of the results of all steps."""

        def of(kind):
            names = getattr(kind, "names", frozenset())
            return frozenset(origin for origin in self.origins if origin.names & names)

        pairs = zip(arrays, kinds, strict=True)
        return [self.unpack(array, kind, of(kind)) for array, kind in pairs]

    def interpret(
        self, arrays: Sequence[Any]
    ) -> tuple[PathTransform, list[Value], list[Value]]:
        """Return the interpreter of one step, its arguments and its results."""
        inner, jaxpr = PathTransform(self.arithmetic), self.closed.jaxpr
        origins: dict[str, Origin] = {}

        def named(name):
            # Carries hold what earlier steps have been given.
            part = (Weight(None), None) if name in self.stacked else None
            return origins.setdefault(name, Origin(frozenset([name]), part))

        values = []
        for array, kind, known in zip(arrays, self.kinds, self.params, strict=True):
            if known is None:
                known = frozenset(map(named, getattr(kind, "names", ())))
            values.append(self.unpack(array, kind, known))
        return inner, values, inner.interpret(jaxpr, self.closed.consts, values)

    def probe(
        self, kinds: Sequence[Any], arrays: Sequence[Any], always: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Return the kinds of the results of one step, and the shapes of its carries.

        Args:
          kinds: The kinds of the carries.
          arrays: The arguments of the scan; of its carries, shapes are enough.
          always: What carries are at every step, see `settle`.
        """
        self.kinds[self.carries] = kinds
        found: list[Any] = []
        start, stop = self.carries.start, self.carries.stop

        def step(carry, slices):
            inner, _, results = self.interpret([*arrays[:start], *carry, *slices])
            results[: len(kinds)] = self.hold(results[: len(kinds)], always)
            found.extend(self.kind(inner, value) for value in results)
            return [self.pack(value) for value in results[: len(kinds)]]

        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
        slices = jax.tree.map(one, list(arrays[stop:]))
        carry = jax.eval_shape(step, list(arrays[self.carries]), slices)
        return found, carry

    def hold(self, values: Sequence[Any], always: Sequence[Any]) -> list[Any]:
        """Return carries as what they are at every step, see `settle`."""
        held = []
        for value, kind in zip(values, always, strict=True):
            if isinstance(kind, Unsupported):
                value = kind
            # The start of a running maximum is no edge: its first step tells it.
            elif kind and isinstance(value, Weight) and not _is_infinite(value):
                value = self.activation(value)
            held.append(value)
        return held

    def dense(self, node: Any, cotangent: Any, stacked: bool = False) -> Any:
        """Return a cotangent as one array, which is 0 if there is none."""
        if cotangent is None:
            whole = self.arithmetic.zeros(node.shape, self.dtype)
        else:
            whole = self.arithmetic.broadcast(cotangent, node.shape)
        return self.fix(whole, stacked)

    def cotangents(self, nodes: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the cotangents of nodes as arrays."""
        return [[self.dense(node, node.cotangent) for node in group] for group in nodes]
