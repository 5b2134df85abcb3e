r"""Scans in the path transform: layers stacked by `lax.scan`, and recurrence.

The body of the scan is interpreted once, inside a scan over path values. The
backward pass is a scan in the other direction, which interprets the body again at
the saved carries, as `jax.checkpoint` would.

That takes steps that all mean the same. First steps that do not are written out, and
where the meaning keeps alternating, as many steps as it takes are one step of the loop.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from normax._core.programs import scan_of, scanned_length
from normax.paths.lifting import PathTransform
from normax.paths.numbers import Scaled
from normax.paths.primitive_spec import Entries, NotHomogeneous, primitive
from normax.paths.primitives.carries import Body
from normax.paths.primitives.steps import Settled, in_groups, settle
from normax.paths.values import Activation, Unsupported, Value, Weight, zeros


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
    """Add cotangents, as `Body.cotangents` returns them, to those of nodes."""
    for group, given in zip(nodes, cotangents, strict=True):
        for node, cotangent in zip(group, given, strict=True):
            if cotangent is not None:
                transform.accumulate(node, (cotangent,))


@primitive(
    "scan",
    pull=None,
    entries=Entries.COMPUTED,
    uniform=None,
    mixes=scanned_length,
    takes_signs=True,
    takes_unsupported=True,
)
def _scan(transform: PathTransform, eqn, inputs: Sequence[Any]) -> Sequence[Value]:
    return scan_with(_loop, transform, eqn, inputs)


def scan_with(
    loop: Callable[..., Sequence[Value]],
    transform: PathTransform,
    eqn,
    inputs: Sequence[Any],
) -> Sequence[Value]:
    """Interpret a scan by a loop, once all of its steps mean the same.

    Args:
      loop: Interprets `(transform, eqn, body, settled, kinds of the results)`.
      transform: The interpreter.
      eqn: The scan.
      inputs: Its arguments.

    Returns:
      Its results.
    """
    _, consts, carries, length, _ = scan_of(eqn)
    if length == 0:
        stacked = (Weight(zeros(variable)) for variable in eqn.outvars[carries:])
        return [*inputs[consts : consts + carries], *stacked]
    if not any(isinstance(x, Activation) for x in inputs):
        found = (x for x in inputs if isinstance(x, Unsupported))
        if (unsupported := next(found, None)) is not None:
            return [unsupported] * len(eqn.outvars)
        raise NotHomogeneous("it takes the sign of an activation")
    body = Body(transform, eqn, inputs)
    settled = settle(body, transform, inputs)
    if settled.results is not None:
        return loop(transform, eqn, body, settled, settled.results)
    program = in_groups(eqn, settled.first, settled.group)
    return transform.interpret(program.jaxpr, program.consts, settled.values)


def _loop(
    transform: PathTransform,
    eqn,
    body: Body,
    settled: Settled,
    out_kinds: Sequence[Any],
) -> Sequence[Value]:
    """Interpret a scan whose steps all mean the same."""
    first, last = body.carries.start, body.carries.stop
    count, arithmetic, values = last - first, body.arithmetic, settled.values
    loop, reverse = functools.partial(lax.scan, length=body.length), body.reverse
    arrays = [body.pack(x, i >= last) for i, x in enumerate(values)]
    consts, carry, xs = arrays[:first], arrays[first:last], arrays[last:]

    # What no rule covers has no arrays. Signs that a step returns are such values.
    always = [
        *settled.always,
        *(k if isinstance(k, Unsupported) else None for k in out_kinds[count:]),
    ]

    def hold(results):
        return body.hold(results, always)

    def step(carry, slices):
        _, _, results = body.interpret([*consts, *carry, *slices])
        packed = [body.pack(value) for value in hold(results)]
        return packed[:count], (carry, packed[count:])

    final, (saved, stacked) = loop(step, carry, xs, reverse=reverse)
    outputs = body.unpack_results([*final, *stacked], out_kinds)
    nodes, out_nodes = _nodes(values, body.kinds), _nodes(outputs, out_kinds)

    def back(state, slices):
        carried, total = state
        carry, xs, cotangents = slices
        inner, values, results = body.interpret([*consts, *carry, *xs])
        held = _nodes(hold(results), out_kinds)
        _accumulate(inner, held, [*carried, *cotangents])
        inner.run_backward()
        given = body.cotangents(_nodes(values, body.kinds))
        is_scaled = lambda x: isinstance(x, Scaled)  # noqa: E731
        total = jax.tree.map(arithmetic.add, total, given[:first], is_leaf=is_scaled)
        return (given[first:last], total), given[last:]

    def pull(*cotangents):
        flat = iter(cotangents)

        def seed(node, stacked):
            cotangent = next(flat)
            # Nothing uses this stacked result, so it may be anything.
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
            reverse=not reverse,
        )
        _accumulate(transform, nodes, [*total, *carried, *per_step])

    transform.record(list(itertools.chain.from_iterable(out_nodes)), pull)
    return outputs
