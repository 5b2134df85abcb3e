"""What an update does to weight vectors: norms, relative updates, angles."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import Axes, PyTree, check_axes, map_vectors
from normax._core.checks import check_range, require_params
from normax._core.norms import (
    at_least_float32,
    nonzero,
    polar_decomposition,
    ratio,
    vector_norm,
)
from normax._core.scheduling import in_turn, wait


def weight_norm(params: PyTree, axes: Axes = "unit") -> PyTree:
    r"""Euclidean norm of every weight vector.

    $$\|w\| = \Big(\sum_{i \in \text{axes}} w_i^2\Big)^{1/2}$$

    Args:
      params: Pytree of arrays.
      axes: Which entries form one weight vector: `"unit"` (all axes but the
        last), `"layer"` (the whole array), a tuple of axes, `"none"`, or a
        pytree prefix of `params` with such leaves. A bare word concerns arrays
        of rank two and higher.

    Returns:
      Pytree of the norms, in float32 or better; each has the shape of its array without
      `axes`. None for arrays left alone.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> normax.weight_norm(params)
      {'bias': None, 'kernel': Array([5., 2.], dtype=float32)}

    References:
      van Laarhoven, 2017, arXiv:1706.05350, section 3.1.
    """

    def measure(vector_axes, w):
        (w,) = at_least_float32(w)
        return jnp.squeeze(vector_norm(w, vector_axes), vector_axes)

    return map_vectors(measure, axes, params)


def _relative_update(w_norm: jax.Array, u_norm: jax.Array) -> jax.Array:
    # 0 * u_norm keeps the NaN of an update, which a plain 0 would hide.
    return jnp.where(w_norm == 0, 0 * u_norm, ratio(u_norm, nonzero(w_norm)))


def _angle(w_norm: jax.Array, radial: jax.Array, tangential: jax.Array) -> jax.Array:
    unit = nonzero(w_norm)
    opposite = ratio(tangential, unit)
    adjacent = jnp.where(w_norm == 0, 0, 1 + ratio(radial, unit))
    # The derivative of atan2 is not finite at the origin.
    at_origin = (opposite == 0) & (adjacent == 0)
    return jnp.arctan2(opposite, jnp.where(at_origin, 1, adjacent))


def relative_update(params: PyTree, updates: PyTree, axes: Axes = "unit") -> PyTree:
    r"""Length of every update relative to its weight vector.

    $$\|u\| / \|w\|, \qquad \text{or } 0 \text{ where } w = 0$$

    Args:
      params: Pytree of arrays $w$, before the update.
      updates: Pytree of what will be added to them, $u$.
      axes: Which entries form one weight vector, as in `weight_norm`.

    Returns:
      Pytree of ratios, shaped like the norms of `weight_norm`.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> w, u = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [0.5]])
      >>> normax.relative_update(w, u)
      Array([0.1], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    def measure(vector_axes, w, u):
        w, u = at_least_float32(w, u)
        ratio = _relative_update(
            vector_norm(w, vector_axes), vector_norm(u, vector_axes)
        )
        return jnp.squeeze(ratio, vector_axes)

    return map_vectors(measure, axes, params, updates)


def angular_update(params: PyTree, updates: PyTree, axes: Axes = "unit") -> PyTree:
    r"""Angle by which an update turns every weight vector, in radians.

    $$\operatorname{atan2}\big(\|u_\perp\|,\; \|w\| + \langle u, \hat w\rangle\big)$$

    with $u_\perp$ the part of $u$ orthogonal to $w$. It is precise for small angles too
    (docs/theory/spheres.md), and 0 or $\pi/2$ where $w = 0$.

    Args:
      params: Pytree of arrays $w$, before the update.
      updates: Pytree of what will be added to them, $u$.
      axes: Which entries form one weight vector, as in `weight_norm`.

    Returns:
      Pytree of angles in $[0, \pi]$, shaped like the norms of `weight_norm`.

    Raises:
      ValueError: `axes` does not fit `params`, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> w, u = jnp.array([[3.0], [4.0]]), jnp.array([[-4e-5], [3e-5]])
      >>> normax.angular_update(w, u)
      Array([1.e-05], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    def measure(vector_axes, w, u):
        w, u = at_least_float32(w, u)
        w_norm, _, radial, tangential = polar_decomposition(w, u, vector_axes)
        return jnp.squeeze(_angle(w_norm, radial, tangential), vector_axes)

    return map_vectors(measure, axes, params, updates)


class MonitorWeightDynamicsState(NamedTuple):
    r"""State of `monitor_weight_dynamics`.

    Attributes:
      total_weight: Sum of the weights $\beta^{t-s}$ of the averages.
      weight_norm: Averages of `normax.weight_norm`, before the updates.
      relative_update: Averages of `normax.relative_update`.
      angular_update: Averages of `normax.angular_update`, in radians.
    """

    total_weight: jax.Array
    weight_norm: PyTree
    relative_update: PyTree
    angular_update: PyTree


class _Measurement(NamedTuple):
    weight_norm: jax.Array | None
    relative_update: jax.Array | None
    angular_update: jax.Array | None
    update: Any


def monitor_weight_dynamics(
    axes: Axes = "unit", decay: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Measure norms, relative updates and angular updates; change nothing.

    $$\bar x_t = \sum_{s \le t} \beta^{t-s} x_s \Big/ \sum_{s \le t} \beta^{t-s}$$

    is the average of a measure $x$. Place it last in a chain. Arrays left alone have
    None for measures. An array whose update is None keeps its last measures.

    Args:
      axes: Which entries form one weight vector, as in `weight_norm`.
      decay: Decay $\beta$, at least 0 and below 1; 0 keeps the latest value.

    Returns:
      A gradient transformation that needs `params`; `optax.tree.get` reads its state.

    Raises:
      ValueError: `axes` does not fit, `decay` is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, updates = jnp.array([[3.0], [4.0]]), jnp.array([[0.4], [-0.3]])
      >>> tx = normax.monitor_weight_dynamics()
      >>> updates, state = tx.update(updates, tx.init(params), params)
      >>> state.angular_update.round(4)
      Array([0.0997], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_axes(axes)
    check_range("decay", decay, low=0, below=1)

    def measure(vector_axes, w, u):
        w_norm, u_norm, radial, tangential = polar_decomposition(
            *at_least_float32(w, u), vector_axes
        )
        angle = _angle(w_norm, radial, tangential)
        values = (w_norm, _relative_update(w_norm, u_norm), angle)
        values = (jnp.squeeze(value, vector_axes) for value in values)
        # The update waits for the measures. Otherwise the parameters could change
        # first, and measuring them would need a copy.
        return _Measurement(*values, update=wait(u, angle)), angle

    def init_fn(params):
        norms = weight_norm(params, axes)
        # The trees of zeros differ, because a buffer cannot be donated twice.
        return MonitorWeightDynamicsState(
            total_weight=jnp.zeros([], jnp.float32),
            weight_norm=norms,
            relative_update=jax.tree.map(jnp.zeros_like, norms),
            angular_update=jax.tree.map(jnp.zeros_like, norms),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("monitor_weight_dynamics", params)
        measured = map_vectors(
            in_turn(measure),
            axes,
            params,
            updates,
            otherwise=lambda w, u: _Measurement(None, None, None, update=u),
        )
        total_weight = (1 + decay * state.total_weight).astype(jnp.float32)

        def field(name):
            return jax.tree.map(
                lambda measurement: getattr(measurement, name),
                measured,
                is_leaf=lambda node: isinstance(node, _Measurement),
            )

        def average(old, new):
            if new is None:
                return old
            new = new.astype(old.dtype)
            rate = (1 / total_weight).astype(old.dtype)
            # At rate 1, 0 times an old NaN would be NaN again: select the new value.
            return jnp.where(rate < 1, (1 - rate) * old + rate * new, new)

        averages = (
            jax.tree.map(
                average, getattr(state, name), field(name), is_leaf=lambda x: x is None
            )
            for name in ("weight_norm", "relative_update", "angular_update")
        )
        return field("update"), MonitorWeightDynamicsState(total_weight, *averages)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
