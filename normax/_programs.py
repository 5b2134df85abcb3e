"""Programs as JAX traces them, and what they take and return."""

import contextlib
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


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Have all programs that are traced meanwhile take float32 products in full.

    By default a GPU or TPU rounds the factors of matrix products, to 10 bits or 7. A
    comparison with float32 tolerances takes that for a difference of functions. JAX
    traces again what it had compiled for the default; a precision that a function
    names itself stays.
    """
    with jax.default_matmul_precision("highest"):
        yield
