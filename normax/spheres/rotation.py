"""Updates that turn every weight vector by a given angle and keep its norm."""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import Axes, PyTree, check_axes, map_vectors
from normax._core.checks import check_range, requiring_params
from normax._core.norms import (
    all_parts,
    at_least_float32,
    common_dtype,
    finish_polar_parts,
    nonzero,
)
from normax.spheres.measures import weight_norm
from normax.spheres.projection import project_unit_norm


class RotateByAngleState(NamedTuple):
    """State of `rotate_by_angle`.

    Attributes:
      steps: Number of steps, int32 of shape ().
      update_norm: Roots of the averages, not yet corrected for their start.
    """

    steps: jax.Array
    update_norm: PyTree


class _Turn(NamedTuple):
    update: jax.Array | None
    update_norm: jax.Array | None


def _rounding(*arrays: jax.typing.ArrayLike) -> float:
    """Return the unit in the last place of 1, in the coarsest dtype of some arrays."""
    dtypes = (jnp.result_type(array) for array in arrays)
    floats = (dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    return max(float(jnp.finfo(dtype).eps) for dtype in floats)


def rotate_by_angle(
    angle: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""Change the updates so that weight vectors turn by `angle` and keep their norm.

    $$w \leftarrow \Pi\Big(w + \theta\,\|w\|\,\frac{u_\perp}{\bar n}\Big)$$

    where $\Pi$ returns to the norm at `init`, and $\bar n^2$ is an average of
    $\|u_\perp\|^2$. With $\beta = 0$ the vectors turn by $\arctan\theta$. Place it last
    in a chain. Arrays left alone keep their updates. Rounding makes
    a tangential part too, so one of up to four units in the last place of $\|u\|$, in
    the coarser dtype of $w$ and $u$, counts as 0. More: docs/theory/spheres.md.

    Args:
      angle: Angle $\theta$ in radians, a number or a schedule.
      decay: Decay $\beta$ of the averages, at least 0 and below 1.
      axes: Which entries form one weight vector, as in `weight_norm`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, updates = jnp.array([[3.0], [4.0]]), jnp.array([[-50.0], [-70.0]])
      >>> tx = normax.rotate_by_angle(0.01)
      >>> updates, _ = tx.update(updates, tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.0100

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_axes(axes)
    check_range("decay", decay, low=0, below=1)
    if not callable(angle):
        check_range("angle", angle, low=0)

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, weight_norm(params, axes))
        return RotateByAngleState(jnp.zeros([], jnp.int32), zeros)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        theta = angle(state.steps) if callable(angle) else angle
        steps = optax.safe_increment(state.steps)

        def turn(vector_axes, w, u, old, parts):
            x, y = at_least_float32(w, u)
            w_norm, u_norm, radial, new = parts
            # A comparison with NaN is false, so a NaN stays.
            radial_only = new <= 4 * _rounding(w, u) * u_norm
            new = jnp.where(radial_only, 0, new)
            new = jnp.squeeze(new, vector_axes).astype(old.dtype)
            kept, added = jnp.sqrt(jnp.asarray([decay, 1 - decay], old.dtype))
            # At decay 0, 0 times an old NaN would be NaN again: select the new value.
            mean = jnp.where(decay == 0, new, jnp.hypot(kept * old, added * new))
            started = 1 - jnp.asarray(decay, x.dtype) ** steps.astype(x.dtype)
            norm = jnp.expand_dims(mean, vector_axes) / jnp.sqrt(started)
            tangential = y - radial * (x / nonzero(w_norm))
            tangential = jnp.where(radial_only, 0, tangential)
            length = jnp.asarray(theta, x.dtype) * w_norm
            step = length * (tangential / nonzero(norm))
            return _Turn(step.astype(common_dtype(w, u)), mean)

        def turn_all(rows):
            found, updates = finish_polar_parts(all_parts, [row[:3] for row in rows])
            return [
                turn(vector_axes, w, u, old, parts)
                for (vector_axes, w, _, old), u, parts in zip(
                    rows, updates, found, strict=True
                )
            ]

        turned = map_vectors(
            turn_all,
            axes,
            params,
            updates,
            state.update_norm,
            otherwise=lambda w, u, old: _Turn(u, None),
            together=True,
        )
        updates, means = (
            jax.tree.map(
                operator.itemgetter(field),
                turned,
                is_leaf=lambda node: isinstance(node, _Turn),
            )
            for field in (0, 1)
        )
        update_norm = jax.tree.map(
            lambda old, new: old if new is None else new,
            state.update_norm,
            means,
            is_leaf=lambda node: node is None,
        )
        return updates, RotateByAngleState(steps, update_norm)

    chain = optax.chain(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        project_unit_norm(axes, radius="initial"),
    )
    return requiring_params("rotate_by_angle", chain)
