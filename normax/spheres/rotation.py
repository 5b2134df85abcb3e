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
    at_least_float32,
    common_dtype,
    finish_polar_parts,
    nonzero,
    on_sphere,
    vector_norm,
)
from normax.spheres.measures import weight_norm


class RotateByAngleState(NamedTuple):
    """State of `rotate_by_angle`.

    Attributes:
      steps: Number of steps, int32 of shape ().
      update_norm: Roots of the averages, not yet corrected for their start.
      radius: Norms of the weights at `init`, which they keep.
    """

    steps: jax.Array
    update_norm: PyTree
    radius: PyTree


class _Turned(NamedTuple):
    update: jax.Array | None
    update_norm: jax.Array | None


def _rounding(*arrays: jax.typing.ArrayLike) -> float:
    """Return the unit in the last place of 1, in the coarsest dtype of some arrays."""
    dtypes = (jnp.result_type(array) for array in arrays)
    floats = (dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    return max(float(jnp.finfo(dtype).eps) for dtype in floats)


def _stepped(w, u, w_norm, radial, radial_only, length, norm):
    x, y = at_least_float32(w, u)
    # The choice lies between product and difference: fused, they would be rounded in
    # another way where the norm is measured than where the step is made.
    removed = jnp.where(radial_only, y, radial * (x / nonzero(w_norm)))
    return x + length * ((y - removed) / nonzero(norm))


def _turn(vector_axes, parts, care, w, u, old, theta, decay, steps):
    """Return the arguments of `_stepped`, the norm after it, and the average."""
    w_norm, u_norm, radial, new = parts
    # A comparison with NaN is false, so a NaN stays.
    radial_only = new <= 4 * _rounding(w, u) * u_norm
    new = jnp.where(radial_only, 0, new)
    added = jnp.squeeze(new, vector_axes).astype(old.dtype)
    weights = jnp.sqrt(jnp.asarray([decay, 1 - decay], old.dtype))
    # At decay 0, 0 times an old NaN would be NaN again: select the new value.
    mean = jnp.where(decay == 0, added, jnp.hypot(weights[0] * old, weights[1] * added))
    started = 1 - jnp.asarray(decay, new.dtype) ** steps.astype(new.dtype)
    norm = jnp.expand_dims(mean, vector_axes) / jnp.sqrt(started)
    theta = jnp.asarray(theta, new.dtype)
    how = w_norm, radial, radial_only, theta * w_norm, norm
    if care:
        # Of a small tangential part rounding leaves a step that is not orthogonal.
        after = vector_norm(_stepped(w, u, *how), vector_axes)
    else:
        after = w_norm * jnp.hypot(jnp.ones_like(new), theta * (new / nonzero(norm)))
    return *how, after, mean


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
        radius = weight_norm(params, axes)
        zeros = jax.tree.map(jnp.zeros_like, radius)
        return RotateByAngleState(jnp.zeros([], jnp.int32), zeros, radius)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        theta = angle(state.steps) if callable(angle) else angle
        steps = optax.safe_increment(state.steps)

        def turn(rows):
            found, updates = finish_polar_parts(
                _turn, [(*row[:-1], theta, decay, steps) for row in rows]
            )
            turned = []
            for row, u, (*how, after, mean) in zip(rows, updates, found, strict=True):
                vector_axes, w, _, _, radius = row
                radius = jnp.expand_dims(radius, vector_axes).astype(after.dtype)
                x, _ = on_sphere(_stepped(w, u, *how), after, radius)
                change = (x - w.astype(x.dtype)).astype(common_dtype(w, u))
                turned.append(_Turned(change, mean))
            return turned

        turned = map_vectors(
            turn,
            axes,
            params,
            updates,
            state.update_norm,
            state.radius,
            otherwise=lambda w, u, *state: _Turned(u, None),
            together=True,
        )
        updates, means = (
            jax.tree.map(
                operator.itemgetter(field),
                turned,
                is_leaf=lambda node: isinstance(node, _Turned),
            )
            for field in (0, 1)
        )
        update_norm = jax.tree.map(
            lambda old, new: old if new is None else new,
            state.update_norm,
            means,
            is_leaf=lambda node: node is None,
        )
        return updates, RotateByAngleState(steps, update_norm, state.radius)

    rotation = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return requiring_params("rotate_by_angle", rotation)
