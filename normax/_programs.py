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
