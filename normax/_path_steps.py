r"""Which steps of a scan are one loop in the path transform, and how others run.

A loop is for steps that all mean the same. What a step means turns on the kinds of the
carries: two constants that meet are two edges, while one that meets none goes on. So a
first step after which the kinds differ is written out, and where they keep alternating,
as many steps as that takes are one step of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from normax._path_carries import Body
from normax._path_lifting import PathTransform
from normax._path_values import Activation, Unsupported
from normax._programs import scan_counts


class Settled(NamedTuple):
    """How a scan can be one loop.

    Attributes:
      values: Its arguments, with carries as what they are at every step.
      always: What the carries are at every step, see `settle`.
      first: How many steps are to be written out before.
      group: How many steps are to be one step of the loop.
      results: The kinds of its results, if it is one loop as it stands.
    """

    values: list[Any]
    always: list[Any]
    first: int = 0
    group: int = 1
    results: list[Any] | None = None


def _join(first: Any, second: Any) -> Any:
    """Return the kind of what may depend on more after a step than before it."""
    if isinstance(first, Unsupported):
        return first
    uniform = first.uniform if first == second else None
    names, repeats = first.names | second.names, first.repeats or second.repeats
    return first._replace(names=names, uniform=uniform, repeats=repeats)


def _meaning(kind: Any, dtype: Any) -> Any:
    """Return what of a kind the rules of the body turn on."""
    if isinstance(kind, Unsupported):
        return None
    special = kind.uniform in (0, math.inf, -math.inf)
    known = kind.uniform if special and jnp.issubdtype(dtype, jnp.inexact) else None
    return kind.active, kind.constant, known


def _stronger(always: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    """Return what carries are at every step if they are of these kinds at one."""

    def of(known, kind):
        if isinstance(known, Unsupported) or isinstance(kind, Unsupported):
            return known if isinstance(known, Unsupported) else kind
        return known or kind.active

    return [of(*pair) for pair in zip(always, kinds, strict=True)]


def _follow(
    body: Body, kinds: Sequence[Any], arrays: Sequence[Any], always: Sequence[Any]
) -> tuple[list[Any], Any, list[Any], list[Any]]:
    """Follow the kinds of carries until they repeat, or there are no more steps.

    Returns:
      What the steps mean, and what the next one would; the kinds of the results of the
      last one; and what the carries are at every step, as far as is known now.
    """

    def meaning(kinds):
        pairs = zip(kinds, body.variables, strict=True)
        return [_meaning(kind, variable.aval.dtype) for kind, variable in pairs]

    first, last = body.carries.start, body.carries.stop
    carry, seen = arrays[body.carries], [meaning(kinds)]
    while True:
        operands = [*arrays[:first], *carry, *arrays[last:]]
        results, carry = body.probe(kinds, operands, always)
        kinds = results[: len(kinds)]
        stronger, after = _stronger(always, kinds), meaning(kinds)
        if stronger != always or after in seen or len(seen) == body.length:
            return seen, after, results, stronger
        seen.append(after)


def settle(body: Body, transform: PathTransform, inputs: Sequence[Any]) -> Settled:
    """Find out how a scan of one step and more can be one loop.

    Whether carries are activations at every step is told by a list of booleans, or of
    what stands for carries that no rule covers at some step.
    """
    always: list[Any] = [isinstance(x, Activation) for x in inputs[body.carries]]
    while True:
        values = list(inputs)
        values[body.carries] = body.hold(inputs[body.carries], always)
        kinds = [body.kind(transform, x) for x in values[body.carries]]
        if (stronger := _stronger(always, kinds)) == always:
            arrays = [
                body.pack(x, i >= body.carries.stop) for i, x in enumerate(values)
            ]
            settled, stronger = _settle(body, kinds, arrays, always)
            if stronger == always:
                return settled._replace(values=values)
        always = stronger


def _settle(
    body: Body, kinds: list[Any], arrays: Sequence[Any], always: list[Any]
) -> tuple[Settled, list[Any]]:
    """Find out the same for carries that are this at every step, if they are."""
    while True:
        seen, after, results, stronger = _follow(body, kinds, arrays, always)
        if stronger != always or body.length == 1 or after != seen[0]:
            return Settled([], always, first=1), stronger
        if len(seen) > 1:
            return Settled([], always, group=len(seen)), stronger
        # Of one meaning, but they may depend on more parameters.
        now = results[: len(kinds)]
        joined = [_join(*pair) for pair in zip(kinds, now, strict=True)]
        if joined == kinds:
            body.kinds[body.carries] = kinds
            return Settled([], always, results=[*kinds, *results[len(now) :]]), stronger
        kinds = joined


def in_groups(eqn: JaxprEqn, first: int, group: int) -> ClosedJaxpr:
    """Return the program of a scan that takes several steps at once.

    Args:
      eqn: The scan.
      first: How many steps are written out, before a scan of the others.
      group: How many steps are one step of that scan. What does not fill a group is
        left to another scan of single steps.

    Returns:
      A program of the same arguments and results.
    """
    consts, carries = scan_counts(eqn)
    body, reverse = jaxpr_as_fun(eqn.params["jaxpr"]), eqn.params["reverse"]
    length = eqn.params["length"]
    grouped = (length - first) // group * group

    def program(*operands):
        fixed, xs = operands[:consts], operands[consts + carries :]

        def step(carry, slices):
            results = body(*fixed, *carry, *slices)
            return tuple(results[:carries]), tuple(results[carries:])

        def steps(carry, xs, count):
            """Write steps out."""
            ys: list[Any] = [None] * count
            for i in range(count)[:: -1 if reverse else 1]:
                slices = [lax.index_in_dim(x, i, keepdims=False) for x in xs]
                carry, ys[i] = step(carry, slices)
            rows = zip(*ys, strict=True)
            return carry, tuple(lax.concatenate([y[None] for y in r], 0) for r in rows)

        def scan(carry, xs, count):
            return lax.scan(step, carry, xs, length=count, reverse=reverse)

        def scan_groups(carry, xs, count):
            split = [x.reshape(count // group, group, *x.shape[1:]) for x in xs]
            carry, ys = lax.scan(
                lambda carry, xs: steps(carry, xs, group),
                carry,
                split,
                length=count // group,
                reverse=reverse,
            )
            return carry, tuple(y.reshape(count, *y.shape[2:]) for y in ys)

        carry, parts, start = operands[consts : consts + carries], [], 0
        for run, count in (
            (steps, first),
            (scan if group == 1 else scan_groups, grouped),
            (scan, length - first - grouped),
        ):
            if count:
                end = start + count
                low, high = (length - end, length - start) if reverse else (start, end)
                part = [lax.slice_in_dim(x, low, high) for x in xs]
                carry, ys = run(tuple(carry), part, count)
                parts.append(ys)
                start = end
        return *carry, *map(_joined, zip(*parts[:: -1 if reverse else 1], strict=True))

    avals: list[Any] = [variable.aval for variable in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.make_jaxpr(program)(*shapes)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return lax.concatenate(parts, 0) if len(parts) > 1 else parts[0]
