r"""Scans in the path transform: layers stacked by `lax.scan`, and recurrence.

The body of the scan is interpreted once, inside a scan over path values. The
backward pass is a scan in the other direction, which interprets the body again at
the saved carries, as `jax.checkpoint` would.

A carry is of one kind at all steps: if steps turn a weight into an activation, or add
a constant to it, it is an activation from the start, with the constant that it starts
with or 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._core.programs import scanned_length
from normax.paths import numbers
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled
from normax.paths.primitive_spec import Entries, primitive
from normax.paths.values import (
    Activation,
    Origin,
    Path,
    Sign,
    Unsupported,
    Value,
    Weight,
    without_infinities,
    zeros,
)


class _Kind(NamedTuple):
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


def _join(first: Any, second: Any) -> Any:
    """Return the kind of what is of one kind before a step, of another after it."""
    unsupported = (x for x in (first, second) if isinstance(x, Unsupported))
    if (found := next(unsupported, None)) is not None:
        return found
    active = first.active or second.active
    # A weight that meets an activation becomes a constant.
    constant = active and any(
        kind.constant or not kind.active for kind in (first, second)
    )
    uniform = first.uniform if first == second else None
    names, repeats = first.names | second.names, first.repeats or second.repeats
    return _Kind(active, constant, names, uniform, repeats)


def _weight(value: Any) -> Weight:
    """Return the weight, or the constant of an activation, in a value."""
    weight = value.constant if isinstance(value, Activation) else value
    return weight if isinstance(weight, Weight) else Weight(None)


def _names(*params: frozenset[Origin]) -> frozenset[str]:
    """Return the names of parameters."""
    every = itertools.chain.from_iterable(params)
    return frozenset[str]().union(*(origin.names for origin in every))


class _Body:
    """The body of a scan: its values as arrays, and arrays as its values.

    Attributes:
      arithmetic: Arithmetic of path values.
      closed: The jaxpr.
      dtype: Dtype of path values.
      kinds: The kinds of its arguments; an `Unsupported` stands for itself.
      params: The parameters that they depend on; of carries, only names are kept.
      stacked: Names of parameters that are sliced, so that no two steps share any.
    """

    def __init__(self, transform: PathTransform, eqn, inputs: Sequence[Any]):
        self.arithmetic, self.closed = transform.arithmetic, eqn.params["jaxpr"]
        self.dtype = next(
            x.path.value.root.dtype for x in inputs if isinstance(x, Activation)
        )
        self.kinds = [self.kind(transform, x) for x in inputs]
        first, count = eqn.params["num_consts"], eqn.params["num_carry"]
        params = [_weight(x).params for x in inputs]
        consts, xs = params[:first], params[first + count :]
        self.params = [*consts, *[None] * count, *xs]
        self.stacked = _names(*xs) - _names(*consts)

    def kind(self, transform: PathTransform, value: Any) -> Any:
        """Return the kind of a value."""
        if isinstance(value, Sign):
            return transform.unsupported("scan", "it returns the sign of an activation")
        if isinstance(value, Unsupported):
            return value
        weight = _weight(value)
        names = _names(weight.params)
        if isinstance(value, Weight):
            return _Kind(False, False, names, value.uniform, value.repeats)
        return _Kind(True, value.constant is not None, names, None, weight.repeats)

    def fit(self, value: Any, kind: Any, variable: Any) -> Any:
        """Return a value as one of that kind, for a variable of the jaxpr."""
        if isinstance(kind, Unsupported):
            return kind
        if isinstance(value, Weight) and kind.active:
            path = Path(numbers.zeros(value.shape, self.dtype))
            return Activation(path, without_infinities(value))
        if kind.constant and value.constant is None:
            return Activation(value.path, Weight(zeros(variable)))
        return value

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
            return numbers.normalize(numbers.common(x))
        root, exponent = numbers.common(x, tuple(axes)[1:])
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

    def unpack_all(
        self,
        arrays: Sequence[Any],
        kinds: Sequence[Any],
        params: Sequence[Any],
        others: frozenset[str] = frozenset(),
    ) -> list[Value]:
        """Return the values that have these arrays.

        Args:
          arrays: What `pack` has returned.
          kinds: Their kinds.
          params: The parameters that they depend on, None where only names are known.
          others: Names under which they hold other entries than all else.
        """
        origins: dict[str, Origin] = {}

        def named(name):
            part = (Weight(None), None) if name in others else None
            return origins.setdefault(name, Origin(frozenset([name]), part))

        values = []
        for array, kind, known in zip(arrays, kinds, params, strict=True):
            if known is None:
                known = frozenset(map(named, getattr(kind, "names", ())))
            values.append(self.unpack(array, kind, known))
        return values

    def interpret(
        self, arrays: Sequence[Any]
    ) -> tuple[PathTransform, list[Value], list[Value]]:
        """Return the interpreter of one step, its arguments and its results."""
        inner, jaxpr = PathTransform(self.arithmetic), self.closed.jaxpr
        # Carries hold what earlier steps have been given.
        values = self.unpack_all(arrays, self.kinds, self.params, self.stacked)
        return inner, values, inner.interpret(jaxpr, self.closed.consts, values)

    def probe(self, consts: Any, carry: Any, xs: Any) -> list[Any]:
        """Return the kinds of the results of one step."""
        found: list[Any] = []

        def step(carry, slices):
            inner, _, results = self.interpret([*consts, *carry, *slices])
            found.extend(self.kind(inner, value) for value in results)

        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
        jax.eval_shape(step, carry, jax.tree.map(one, xs))
        return found

    def dense(self, node: Any, cotangent: Any, stacked: bool = False) -> Any:
        """Return a cotangent as one array, which is 0 if there is none."""
        if cotangent is None:
            whole = numbers.zeros(node.shape, self.dtype)
        else:
            whole = numbers.broadcast(cotangent, node.shape)
        return self.fix(whole, stacked)

    def cotangents(self, nodes: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the cotangents of nodes as arrays."""
        return [[self.dense(node, node.cotangent) for node in group] for group in nodes]


def _nodes(values: Sequence[Any], kinds: Sequence[Any]) -> list[list[Any]]:
    """Return, for each value, the nodes whose cotangents matter."""

    def of(value, kind):
        if isinstance(kind, Unsupported):
            return []
        if not kind.active:
            return [value] if kind.names else []
        return [value.path, value.constant] if kind.names else [value.path]

    return [of(*pair) for pair in zip(values, kinds, strict=True)]


def _accumulate(transform: PathTransform, nodes: Any, cotangents: Any) -> None:
    """Add cotangents, as `_Body.cotangents` returns them, to those of nodes."""
    for group, given in zip(nodes, cotangents, strict=True):
        for node, cotangent in zip(group, given, strict=True):
            if cotangent is not None:
                transform.accumulate(node, (cotangent,))


@primitive(
    "scan", pull=None, entries=Entries.COMPUTED, uniform=None, mixes=scanned_length
)
def _scan(transform: PathTransform, eqn, inputs: Sequence[Any]) -> Sequence[Value]:
    params, body = eqn.params, _Body(transform, eqn, inputs)
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    count, arithmetic = params["num_carry"], body.arithmetic
    loop = functools.partial(lax.scan, length=params["length"])

    def fit(values, kinds, variables):
        return [
            body.fit(*three) for three in zip(values, kinds, variables, strict=True)
        ]

    # What the carries are: they may become activations on the way.
    while True:
        values = fit(inputs, body.kinds, eqn.invars)
        arrays = [body.pack(x, i >= last) for i, x in enumerate(values)]
        consts, carry, xs = arrays[:first], arrays[first:last], arrays[last:]
        out_kinds = body.probe(consts, carry, xs)
        before = body.kinds[first:last]
        after = [_join(*pair) for pair in zip(before, out_kinds[:count], strict=True)]
        out_kinds[:count] = body.kinds[first:last] = after
        if after == before:
            break

    def step(carry, slices):
        _, _, results = body.interpret([*consts, *carry, *slices])
        fitted = fit(results, out_kinds, body.closed.jaxpr.outvars)
        packed = [body.pack(value) for value in fitted]
        return packed[:count], (carry, packed[count:])

    final, (saved, stacked) = loop(step, carry, xs, reverse=params["reverse"])
    outputs = body.unpack_all([*final, *stacked], out_kinds, [None] * len(out_kinds))
    nodes, out_nodes = _nodes(values, body.kinds), _nodes(outputs, out_kinds)

    def back(state, slices):
        carried, total = state
        carry, xs, cotangents = slices
        inner, values, results = body.interpret([*consts, *carry, *xs])
        fitted = fit(results, out_kinds, body.closed.jaxpr.outvars)
        _accumulate(inner, _nodes(fitted, out_kinds), [*carried, *cotangents])
        inner.run_backward()
        given = body.cotangents(_nodes(values, body.kinds))
        is_scaled = lambda x: isinstance(x, Scaled)  # noqa: E731
        total = jax.tree.map(arithmetic.add, total, given[:first], is_leaf=is_scaled)
        return (given[first:last], total), given[last:]

    def pull(*cotangents):
        flat = iter(cotangents)

        def seed(node, stacked):
            cotangent = next(flat)
            # What is stacked may be anything where nothing uses it.
            if cotangent is None and stacked:
                return None
            return body.dense(node, cotangent, stacked)

        seeds = [
            [seed(node, i >= count) for node in group]
            for i, group in enumerate(out_nodes)
        ]
        none = [[body.dense(node, None) for node in group] for group in nodes[:first]]
        (carried, total), per_step = loop(
            back,
            (seeds[:count], none),
            (saved, xs, seeds[count:]),
            reverse=not params["reverse"],
        )
        _accumulate(transform, nodes, [*total, *carried, *per_step])

    transform.record(list(itertools.chain.from_iterable(out_nodes)), pull)
    return outputs
