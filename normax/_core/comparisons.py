"""Comparisons of arrays with what they should be, and errors that name the place."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax._core.axes import PyTree
from normax._core.norms import at_least_float32


class Comparison(NamedTuple):
    """What was measured, what it should be, and the name for the error message."""

    where: str
    measured: jax.Array
    expected: jax.Array
    tolerance: jax.typing.ArrayLike


def named_leaves(name: str, tree: PyTree) -> list[tuple[str, jax.Array]]:
    return [
        (f"{name}{jax.tree_util.keystr(path)}", at_least_float32(leaf)[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def largest(x: jax.typing.ArrayLike) -> jax.Array:
    return jnp.max(jnp.abs(at_least_float32(x)[0]), initial=0.0)


def maximum(values: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, values, jnp.zeros([]))


def _difference(where, measured, expected, tolerance) -> str:
    """Say where two arrays differ; empty if they are close and finite."""
    far = ~(np.abs(measured - expected) <= tolerance) | ~np.isfinite(measured)
    if not far.any():
        return ""
    first = tuple(int(i) for i in np.argwhere(far)[0])
    allowed = np.broadcast_to(tolerance, far.shape)[first]
    return (
        f"{where}: {far.sum()} of {far.size} values are off, the first, at {first}, is "
        f"{measured[first]} instead of {expected[first]} +- {allowed:.3g}\n"
        f"measured: {measured}\nexpected: {expected}"
    )


def check_all(
    claim: str, comparisons: list[Comparison], custom_message: str | None
) -> None:
    """Raise unless every measured array is finite and close to the expected one.

    Args:
      claim: Name of the assertion, and what it asserts.
      comparisons: The most important one comes first.
      custom_message: The user's addition.

    Raises:
      AssertionError: It shows the values of the first array that differs, and names
        the others.
      RuntimeError: The values are traced, and `chex.chexify` is not used.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(comparisons)):
        import chex

        for where, measured, expected, tolerance in comparisons:
            custom = f"{claim}; {where} {custom_message or ''}"
            chex.assert_tree_all_finite(measured, custom_message=custom)
            chex.assert_trees_all_close(
                measured, expected, rtol=0.0, atol=tolerance, custom_message=custom
            )
        return
    differences = {}
    for comparison in comparisons:
        where, *values = comparison
        difference = _difference(where, *(np.asarray(value) for value in values))
        if difference:
            differences[where] = difference
    if differences:
        first, *others = differences
        more = f"\nand {len(others)} more: {', '.join(others[:8])}" if others else ""
        custom = f" [{custom_message}]" if custom_message else ""
        raise AssertionError(f"[normax] {claim}; {differences[first]}{more}{custom}")
