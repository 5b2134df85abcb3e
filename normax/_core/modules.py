"""Flax modules, which are no pytrees of parameters."""

from typing import Any

import flax.linen
import jax
from flax import nnx


def _is_module(node: Any) -> bool:
    return isinstance(node, nnx.Module | flax.linen.Module)


def refuse_modules(params: Any) -> None:
    """Raise if a Flax module stands in the place of its parameters."""
    for node in jax.tree.leaves(params, is_leaf=_is_module):
        if _is_module(node):
            raise ValueError(
                "parameters are a pytree of arrays, without statistics and random "
                f"keys, but {type(node).__name__} is a Flax module; pass "
                "nnx.state(model, nnx.Param), or of a Linen module "
                'model.init(...)["params"].'
            )
