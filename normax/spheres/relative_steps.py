"""Hyperball: steps of a given relative length between weights of a given norm."""

from __future__ import annotations

from typing import Any

import optax

from normax._core.axes import Axes, check_axes, map_vectors
from normax._core.checks import check_learning_rate, requiring_params
from normax._core.norms import at_least_float32, unit_vector
from normax.spheres.projection import project_steps


def _unit_directions(axes: Axes) -> optax.GradientTransformation:
    """Divide the update of every weight vector by its norm, in float32 or better."""

    def direction(vector_axes, w, u):
        return unit_vector(*at_least_float32(u), vector_axes)[0]

    def update_fn(updates, state, params=None):
        directions = map_vectors(
            direction, axes, params, updates, otherwise=lambda w, u: u
        )
        return directions, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def hyperball(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    axes: Axes = "layer",
    radius: Any = "initial",
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the norms of weight vectors, and make the learning rate an angle.

    $$w \leftarrow R\, N(w - \eta R\, N(u)), \qquad N(x) = x / \|x\|$$

    for the direction $u$ of `inner`. Neither the size of $u$ nor that of $w$ matters:
    the vector turns by about $\eta$, as `theory.hyperball_angle` says. $N$ leaves 0 as
    it is. Arrays left alone take the plain step $-\eta u$; `optax.partition` gives them
    another. More: docs/training_on_spheres.md.

    Args:
      inner: What makes directions, without a learning rate: `optax.scale_by_adam()` for
        AdamH, `optax.contrib.scale_by_muon()` for MuonH.
      learning_rate: Learning rate $\eta$, a number or a schedule.
      axes: Which entries form one weight vector, as in `weight_norm`. A pytree of axes
        must have an entry for each array.
      radius: Norm $R$, as in `project_unit_norm`; `"initial"` keeps the norm at `init`.

    Returns:
      A gradient transformation that needs `params`. Updates of weight vectors have the
      dtype of the weights.

    Raises:
      TypeError: `inner` is no gradient transformation.
      ValueError: `axes` or `radius` does not fit, the learning rate is no number, or
        `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax, optax
      >>> params, grads = jnp.array([[3.0], [4.0]]), jnp.array([[4.0], [-3.0]])
      >>> tx = normax.hyperball(optax.identity(), learning_rate=0.75)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (params + updates).ravel()
      Array([0., 5.], dtype=float32)

    References:
      Wen et al., From Weight Decay to Hyperball Optimization, 2025, part 1.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be a gradient transformation of optax, but hyperball got "
            f"{inner!r}; pass for example optax.scale_by_adam()."
        )
    check_learning_rate(learning_rate)
    check_axes(axes)
    chain = optax.chain(
        inner,
        _unit_directions(axes),
        optax.scale_by_learning_rate(learning_rate),
        project_steps("hyperball", axes, radius, relative=True),
    )
    return requiring_params("hyperball", chain)
