"""The order of the layers of a network, as its function uses their parameters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.extend.core import Jaxpr, Literal

from normax._core.axes import PyTree
from normax._core.programs import program_in_place
from normax.paths.one_example import Forward, trace_network

Positions = frozenset[int]
_NONE: Positions = frozenset()


def _follow(
    jaxpr: Jaxpr, inputs: Sequence[Positions | None], met: dict[int, int]
) -> list[Positions | None]:
    """Number the parameters as they meet activations.

    Args:
      jaxpr: The program.
      inputs: The parameters that each argument is made of, None for an activation.
      met: The numbers so far, by the positions of parameters.

    Returns:
      What the results are made of.
    """
    made = dict.fromkeys(jaxpr.constvars, _NONE) | dict(
        zip(jaxpr.invars, inputs, strict=True)
    )

    def read(atom):
        return _NONE if isinstance(atom, Literal) else made[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if (called := program_in_place(eqn)) is not None:
            results = _follow(called[0], operands, met)
        else:
            params = _NONE.union(*(x for x in operands if x is not None))
            active = None in operands
            for position in sorted(params) if active else ():
                met.setdefault(position, len(met))
            results = [None if active else params] * len(eqn.outvars)
        made |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def order_of_use(forward: Forward, params: PyTree, inputs: PyTree) -> dict[int, int]:
    """Find the order in which a network brings its parameters to its activations.

    Args:
      forward: The network.
      params: Its parameters.
      inputs: Its inputs, or their shapes.

    Returns:
      A number for the position of each array that it uses; earlier ones are smaller.
    """
    closed, _ = trace_network(forward, params, inputs)
    count, met = len(jax.tree.leaves(params)), dict[int, int]()
    rest = [None] * (len(closed.jaxpr.invars) - count)
    _follow(closed.jaxpr, [*(frozenset([i]) for i in range(count)), *rest], met)
    return met
