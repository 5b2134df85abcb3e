"""Masks for optax, made of what is scale-invariant."""

from typing import Any

import jax
from flax import nnx

from normax._core.axes import Axes, PyTree, map_vectors


def weight_decay_mask(axes: Axes, params: PyTree) -> PyTree:
    r"""Mask of the arrays whose decay sets the effective learning rate.

    $$L(w) + \tfrac{\lambda}{2} \|w\|^2 \text{ has the functions of } L(w)
    \text{ if } L \text{ is scale-invariant}$$

    On the other arrays, biases and gains included, weight decay is a penalty. The mask
    is True for the first and False for these, so each can have its own strength:
    `optax.adamw(rate, weight_decay=decay, mask=mask)` decays where that changes no
    function. `optax.add_decayed_weights` is the penalty, with the mask's opposite,
    `jax.tree.map(operator.not_, mask)`. Derivation: docs/theory/invariance.md.

    Args:
      axes: Which entries form one weight vector, as `scale_invariant_axes` finds them.
      params: Pytree of arrays. `functools.partial(weight_decay_mask, axes)` is the mask
        as a function of the parameters, which optax takes too.

    Returns:
      Pytree with the structure of `params` and a bool for every array: whether it holds
      weight vectors. In an `nnx.State` a bool stands for the whole variable, so that
      the mask fits both states that `nnx.Optimizer` makes: at first of variables, and
      then of their arrays.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}
      >>> normax.weight_decay_mask({"bias": "none", "kernel": "unit"}, params)
      {'bias': False, 'kernel': True}

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §2.
    """
    mask = map_vectors(
        lambda vector_axes, w: True, axes, params, otherwise=lambda w: False
    )
    return jax.tree.map(_without_variable, mask, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _without_variable(node: Any) -> Any:
    """Return what a variable holds, its only child."""
    if not _is_variable(node):
        return node
    (value,) = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return value
