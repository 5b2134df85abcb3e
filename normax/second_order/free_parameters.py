"""The arrays that a second-order step moves; all others are constants."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._core.axes import PyTree
from normax._core.programs import is_float


class FreeParameters(NamedTuple):
    """Places of the free arrays among the leaves of the parameters."""

    treedef: Any
    positions: list[int]

    def pick(self, tree: PyTree) -> list[Any]:
        """Return the free arrays of a tree like the parameters."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaves[position] for position in self.positions]

    def place(self, arrays: Sequence[Any], tree: PyTree) -> PyTree:
        """Return the tree with other arrays in the place of its free ones."""
        leaves = self.treedef.flatten_up_to(tree)
        for position, array in zip(self.positions, arrays, strict=True):
            leaves[position] = array
        return self.treedef.unflatten(leaves)

    def place_like(self, arrays: Sequence[jax.Array], tree: PyTree) -> PyTree:
        """Do the same, in the dtypes of the arrays that are replaced."""
        pairs = zip(arrays, self.pick(tree), strict=True)
        return self.place([x.astype(jnp.result_type(y)) for x, y in pairs], tree)


def free_parameters(params: PyTree, updates: PyTree) -> FreeParameters | None:
    """Choose the arrays of floats that have a gradient.

    Returns:
      Their places, or None if they hold no number at all.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, treedef.flatten_up_to(updates), strict=True)
    positions = [
        position
        for position, (w, gradient) in enumerate(pairs)
        if gradient is not None and is_float(w)
    ]
    if not sum(jnp.size(leaves[position]) for position in positions):
        return None
    return FreeParameters(treedef, positions)


def require_value_fn(
    name: str, value_fn: Callable[[PyTree], jax.Array] | None
) -> Callable[[PyTree], jax.Array]:
    """Return the loss, or raise a ValueError that names the transformation."""
    if value_fn is None:
        raise ValueError(
            f"normax.second_order.{name} takes the curvature from the loss, but "
            "`value_fn` is None; call update(grads, state, params, "
            "value_fn=loss_of_params)."
        )
    return value_fn
