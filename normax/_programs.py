"""Programs as JAX traces them, and what they take and return."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def called_programs(equation: JaxprEqn) -> Iterator[ClosedJaxpr]:
    """Return the programs that an equation calls, such as the body of a loop."""
    for part in jax.tree.leaves(list(equation.params.values())):
        if isinstance(part, Jaxpr):
            part = ClosedJaxpr(part, ())
        if isinstance(part, ClosedJaxpr):
            yield part


def is_key(array: Any) -> bool:
    """Return whether an array holds random keys, which are no numbers."""
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled anew, unless the user has compiled it."""
    # Of the same function `jax.jit` would keep what it closed over at its first call.
    if isinstance(fn, jax.stages.Wrapped):
        return fn
    return jax.jit(functools.partial(fn))


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """Return how many constants and how many carries a scan has."""
    body = eqn.params["jaxpr"].jaxpr
    # By rank, since the names of the parameters are those of one version of JAX:
    # what is sliced has one axis more than in the body, and so has what is stacked.
    sliced, stacked = (
        sum(
            len(outside.aval.shape) > len(inside.aval.shape)
            for outside, inside in zip(*pair, strict=True)
        )
        for pair in ((eqn.invars, body.invars), (eqn.outvars, body.outvars))
    )
    carries = len(eqn.outvars) - stacked
    return len(eqn.invars) - sliced - carries, carries
