r"""Scans in the path transform: layers stacked by `lax.scan`, and recurrence.

The body of the scan is interpreted once, inside a scan over path values. The
backward pass is a scan in the other direction, which interprets the body again at
the saved carries, as `jax.checkpoint` would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax._path_arithmetic import PathArithmetic
from normax._path_lifting import (
    Activation,
    NotHomogeneous,
    Origin,
    Path,
    PathTransform,
    Unsupported,
    Value,
    Weight,
    rule,
)


class _Kind(NamedTuple):
    """What a value is while the scan holds it as arrays.

    Attributes:
      active: Whether it is an activation; otherwise it is a weight.
      constant: Whether the activation has a constant.
      names: The parameters that the weight or the constant depends on.
    """

    active: bool = False
    constant: bool = False
    names: frozenset[str] = frozenset()

    def __or__(self, other: _Kind) -> _Kind:
        active = self.active or other.active
        # A weight that meets an activation becomes a constant.
        constant = active and any(
            kind.constant or not kind.active for kind in (self, other)
        )
        return _Kind(active, constant, self.names | other.names)


def _kind(value: Any) -> _Kind:
    if not isinstance(value, (Activation, Weight)):
        raise NotHomogeneous("the body of a scan returns the sign of an activation")
    weight = value.constant if isinstance(value, Activation) else value
    origins = weight.params if weight is not None else ()
    names = frozenset[str]().union(*(origin.names for origin in origins))
    if isinstance(value, Weight):
        return _Kind(names=names)
    return _Kind(True, weight is not None, names)


def _pack(arithmetic: PathArithmetic, value: Any, kind: _Kind, dtype) -> Any:
    """Return a value as arrays."""
    if not kind.active:
        return jnp.asarray(value.value)
    if isinstance(value, Weight):
        value = Activation(Path(arithmetic.zeros(value.shape, dtype)), value)
    if not kind.constant:
        return value.path.value, None
    constant = value.constant or Weight(jnp.zeros(value.path.shape, dtype))
    return value.path.value, jnp.asarray(constant.value)


def _unpack(arrays: Any, kind: _Kind) -> Activation | Weight:
    params = frozenset([Origin(kind.names)] if kind.names else [])
    if not kind.active:
        return Weight(arrays, params)
    value, constant = arrays
    return Activation(Path(value), Weight(constant, params) if kind.constant else None)


def _nodes(value: Any, kind: _Kind) -> list[Any]:
    """Return the nodes whose cotangents matter, None for a constant that is absent."""
    if not kind.active:
        return [value] if kind.names else []
    path = value.path if isinstance(value, Activation) else None
    if not kind.names:
        return [path]
    return [path, value.constant if isinstance(value, Activation) else value]


@rule("scan")
def _scan(transform: PathTransform, eqn, inputs: Sequence[Any]) -> Sequence[Value]:
    params, arithmetic = eqn.params, transform.arithmetic
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    body, length = params["jaxpr"], params["length"]
    dtype = next(
        x.path.value.mantissa.dtype for x in inputs if isinstance(x, Activation)
    )
    kinds = [_kind(x) for x in inputs]

    def interpret(inner: PathTransform, arrays: Sequence[Any]):
        values = [_unpack(*pair) for pair in zip(arrays, kinds, strict=True)]
        return values, inner.interpret(body.jaxpr, body.consts, values)

    packed = [
        _pack(arithmetic, x, k, dtype) for x, k in zip(inputs, kinds, strict=True)
    ]
    consts, xs = packed[:first], packed[last:]

    # What the carries are: they may become activations on the way.
    while True:
        carry = [
            _pack(arithmetic, x, kind, dtype)
            for x, kind in zip(inputs[first:last], kinds[first:last], strict=True)
        ]
        found: list[Any] = []

        def probe(carry, slices):
            found[:] = interpret(PathTransform(arithmetic), [*consts, *carry, *slices])[
                1
            ]

        jax.eval_shape(probe, carry, jax.tree.map(lambda x: x[0], xs))
        unsupported = next((x for x in found if isinstance(x, Unsupported)), None)
        if unsupported is not None:
            return [unsupported] * len(eqn.outvars)
        results = [_kind(value) for value in found]
        count = last - first
        joined = [
            a | b for a, b in zip(kinds[first:last], results[:count], strict=True)
        ]
        if joined == kinds[first:last]:
            break
        kinds[first:last] = joined
    out_kinds = [*joined, *results[count:]]

    def step(carry, slices):
        _, values = interpret(PathTransform(arithmetic), [*consts, *carry, *slices])
        packed = [
            _pack(arithmetic, value, kind, dtype)
            for value, kind in zip(values, out_kinds, strict=True)
        ]
        return packed[:count], (carry, packed[count:])

    final, (saved, stacked) = lax.scan(
        step, carry, xs, length=length, reverse=params["reverse"]
    )
    outputs = [
        _unpack(*pair) for pair in zip([*final, *stacked], out_kinds, strict=True)
    ]
    nodes = [
        _nodes(value, kind) for value, kind in zip(outputs, out_kinds, strict=True)
    ]

    def dense(node, cotangent):
        if cotangent is None:
            return arithmetic.zeros(node.shape, dtype)
        return arithmetic.broadcast(cotangent, node.shape)

    def back(state, slices):
        carried, total = state
        carry, xs, cotangents = slices
        inner = PathTransform(arithmetic)
        values, results = interpret(inner, [*consts, *carry, *xs])
        seeds = [*carried, *cotangents]
        for value, kind, seed in zip(results, out_kinds, seeds, strict=True):
            for node, cotangent in zip(_nodes(value, kind), seed, strict=True):
                if node is not None:
                    inner.accumulate(node, (cotangent,))
        inner.run_backward()
        given = [
            [dense(node, node.cotangent) for node in _nodes(value, kind)]
            for value, kind in zip(values, kinds, strict=True)
        ]
        total = [
            [arithmetic.add(a, b) for a, b in zip(*pair, strict=True)]
            for pair in zip(total, given[:first], strict=True)
        ]
        return (given[first:last], total), given[last:]

    def pull(*cotangents):
        flat = iter(
            dense(node, cotangent)
            for node, cotangent in zip(sum(nodes, []), cotangents, strict=True)
        )
        seeds = [[next(flat) for _ in group] for group in nodes]
        total = [
            [dense(node, None) for node in _nodes(_unpack(array, kind), kind)]
            for array, kind in zip(consts, kinds[:first], strict=True)
        ]
        (carried, total), per_step = lax.scan(
            back,
            (seeds[:count], total),
            (saved, xs, seeds[count:]),
            length=length,
            reverse=not params["reverse"],
        )
        given = [*total, *carried, *per_step]
        for value, kind, group in zip(inputs, kinds, given, strict=True):
            for node, cotangent in zip(_nodes(value, kind), group, strict=True):
                if node is not None:
                    transform.accumulate(node, (cotangent,))

    transform.record(sum(nodes, []), pull)
    return outputs
