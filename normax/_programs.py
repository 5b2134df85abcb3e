"""Programs inside of programs, as JAX traces them."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def called_programs(equation: JaxprEqn) -> Iterator[ClosedJaxpr]:
    """Return the programs that an equation calls, such as the body of a loop."""
    for part in jax.tree.leaves(list(equation.params.values())):
        if isinstance(part, Jaxpr):
            part = ClosedJaxpr(part, ())
        if isinstance(part, ClosedJaxpr):
            yield part
