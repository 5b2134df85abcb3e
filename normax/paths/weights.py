"""Weights in the path transform: equations that no activation enters.

They are evaluated as JAX evaluates them. What is followed besides is where entries of
parameters go: which parts of a parameter a weight holds, and whether more than once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from normax._core.programs import bind, ranges_of_parts
from normax.paths.messages import no_edge_weight
from normax.paths.primitive_spec import SPECS, Entries
from normax.paths.values import Origin, Ranges, Weight

if TYPE_CHECKING:
    from normax.paths.lifting import PathTransform


def _rounded(number: float, dtype: Any) -> float | None:
    """Return a number in another dtype, None in one that is not of floats."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    with np.errstate(over="ignore"):
        return float(np.asarray(number).astype(dtype))


def _repeats(entries: Entries, inputs: Sequence[Weight], size: int) -> bool:
    """Return whether entries of parameters may be in several entries of a result."""
    if any(x.repeats for x in inputs) or Entries.COPIES in entries:
        return True
    if Entries.JOINED in entries:  # what a single number pads, it fills
        return any(x.params and x.shape == () and size > 1 for x in inputs)
    return any(x.params and math.prod(x.shape) < size for x in inputs)


def _name_parts(eqn: JaxprEqn, array: Weight, results: Sequence[Weight]) -> None:
    """Make each part of an array a parameter of its own, as layers of a stack are."""
    names = frozenset[str]().union(*(origin.names for origin in results[0].params))
    parts: Iterable[Ranges | None] = itertools.repeat(None)
    if not array.repeats:
        parts = ranges_of_parts(eqn, array.shape) or parts
    for result, ranges in zip(results, parts, strict=False):
        result.params = frozenset([Origin(names, (array, ranges))])


def evaluate_weights(
    transform: PathTransform, eqn: JaxprEqn, inputs: Sequence[Weight]
) -> list[Weight]:
    """Evaluate an equation that no activation enters, as JAX does.

    Args:
      transform: The interpreter, which records how cotangents go back.
      eqn: The equation.
      inputs: Its operands.

    Returns:
      Its results.
    """
    values = bind(eqn, *(x.value for x in inputs))
    if not eqn.primitive.multiple_results:
        values = [values]
    spec = SPECS.get(eqn.primitive.name)
    entries = spec.entries if spec else Entries.COMPUTED
    params = frozenset[Origin]().union(*(x.params for x in inputs))
    overlap = any(a.overlaps(b) for a, b in itertools.combinations(inputs, 2))
    repeats = overlap or _repeats(entries, inputs, np.size(values[0]))
    results = [Weight(value, params, repeats=repeats) for value in values]
    if spec and spec.zero and any(x.uniform == 0 for x in inputs):
        results[0].uniform, results[0].params = 0.0, frozenset()
        return results
    if spec and spec.uniform and len(inputs) == 1 and inputs[0].uniform is not None:
        number = spec.uniform * inputs[0].uniform
        results[0].uniform = _rounded(number, values[0].dtype)
    if not params:
        return results
    if Entries.PARTS in entries:
        _name_parts(eqn, inputs[0], results)
    meets_itself = len(inputs) == 2 and overlap and Entries.JOINED not in entries
    pull = spec.pull if spec and not spec.refuses(eqn, inputs) else None
    if pull is None or meets_itself:
        refuse(transform, results, eqn.primitive.name)
    else:
        transform.record(
            results, lambda *cotangents: pull(transform, eqn, inputs, cotangents)
        )
    return results


def refuse(transform: PathTransform, results: Sequence[Weight], name: str) -> None:
    """Raise in the backward pass, if a cotangent reaches these results."""
    line = transform.line

    def pull(*cotangents):
        del cotangents
        raise ValueError(no_edge_weight(name, line, results[0].params))

    transform.record(results, pull)
