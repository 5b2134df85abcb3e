"""Projection of weight vectors onto spheres, and of updates onto their tangents."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import (
    Axes,
    PyTree,
    broadcast_radius,
    check_axes,
    map_vectors,
    resolve_axes,
)
from normax._core.checks import (
    check_learning_rate,
    check_range,
    require_params,
    requiring_params,
)
from normax._core.norms import (
    at_least_float32,
    common_dtype,
    finish_polar_parts,
    nonzero,
    on_sphere,
    unit_vector,
    vector_norm,
)
from normax._core.scheduling import in_turn
from normax.spheres.measures import weight_norm


def _check_radius(radius: Any) -> None:
    if any(isinstance(leaf, str) for leaf in jax.tree.leaves(radius)):
        raise ValueError(
            "radius must be a number, an array, a pytree of them or, in "
            f'transformations, a schedule or "initial", got {radius!r}; the norms of '
            "some parameters are weight_norm(params)."
        )
    check_range("radius", radius, low=0)


def projection_unit_norm(
    params: PyTree, axes: Axes = "unit", radius: Any = 1.0
) -> PyTree:
    r"""Projection onto the weights whose every vector has norm `radius`.

    $$\Pi(w) = \operatorname*{argmin}_{\|v\| = r} \|v - w\| = r\, w / \|w\|$$

    A zero vector has no nearest point and stays zero. The norms are right to the
    rounding of the dtype, at any scale: docs/theory/spheres.md.

    Args:
      params: Pytree of arrays.
      axes: Which entries form one weight vector, as in `weight_norm`.
      radius: Norm $r \ge 0$: a number, an array that broadcasts to the norms, or a
        pytree prefix of `params` with such leaves, as `weight_norm` returns it.

    Returns:
      Pytree with the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: `axes` or `radius` does not fit, or an array is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> normax.projection_unit_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]))
      Array([[0.6, 0. ],
             [0.8, 1. ]], dtype=float32)

    References:
      van Laarhoven, 2017, arXiv:1706.05350, section 5.5.
    """
    _check_radius(radius)

    def project(vector_axes, w, radius):
        (x,) = at_least_float32(w)
        projected = unit_vector(x, vector_axes)[0] * radius.astype(x.dtype)
        return projected.astype(jnp.result_type(w))

    return map_vectors(
        project,
        axes,
        params,
        broadcast_radius(radius, axes, params),
        otherwise=lambda w, radius: w,
        updates=False,
    )


class ProjectUnitNormState(NamedTuple):
    """State of `project_unit_norm(radius="initial")`: the norms at `init`."""

    radius: PyTree


def project_steps(
    name: str, axes: Axes, radius: Any, relative: bool
) -> optax.GradientTransformationExtraArgs:
    """Make `project_unit_norm`, also for steps that are relative to the radius."""
    check_axes(axes)
    initial = isinstance(radius, str) and radius == "initial"
    if not (initial or callable(radius)):
        _check_radius(radius)

    def project(vector_axes, w, u, radius):
        x, step = at_least_float32(w, u)
        radius = radius.astype(x.dtype)
        stepped = x + (radius * step if relative else step)
        norm = vector_norm(stepped, vector_axes)
        projected, inverse = on_sphere(stepped, norm, radius)
        change = projected - x
        # The norm is promised in the weights' dtype, so the update is no coarser.
        # Relative steps come in float32, whatever the gradient's dtype was.
        dtype = jnp.result_type(w) if relative else common_dtype(w, u)
        return change.astype(dtype), inverse

    def radius_at(state):
        if initial:
            return state.radius
        if not callable(radius):
            return radius
        _check_radius(scheduled := radius(state.count))
        return scheduled

    def init_fn(params):
        if initial:
            return ProjectUnitNormState(radius=weight_norm(params, axes))
        state = optax.EmptyState()
        if callable(radius):
            state = optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))
        broadcast_radius(radius_at(state), axes, params)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params(name, params)
        updates = map_vectors(
            in_turn(project),
            axes,
            params,
            updates,
            broadcast_radius(radius_at(state), axes, params),
            otherwise=lambda w, u, radius: u,
        )
        if callable(radius):
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project_unit_norm(
    axes: Axes = "unit", radius: Any = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Change the updates so that every weight vector keeps the norm `radius`.

    $$u \leftarrow \Pi(w + u) - w, \qquad \Pi(x) = r\, x / \|x\|$$

    Place it last in a chain. Weights that are 100 times longer than `radius` lose
    precision in the first step; `projection_unit_norm` shortens them precisely.

    Args:
      axes: Which entries form one weight vector, as in `weight_norm`.
      radius: Norm $r$, as in `projection_unit_norm`; or a schedule, which takes the
        count of steps to it; or `"initial"`, which keeps the norm that each vector has
        at `init`.

    Returns:
      A gradient transformation that needs `params`. The state holds the norms at `init`
      in float32 or better, or a schedule's count, or nothing.

    Raises:
      ValueError: `axes` or `radius` does not fit, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, updates = jnp.array([[0.6], [0.8]]), jnp.array([[-0.2], [0.0]])
      >>> tx = normax.project_unit_norm()
      >>> updates, _ = tx.update(updates, tx.init(params), params)
      >>> normax.weight_norm(params + updates).round(6)
      Array([1.], dtype=float32)

    References:
      van Laarhoven, 2017, arXiv:1706.05350, section 5.5.
    """
    return project_steps("project_unit_norm", axes, radius, relative=False)


def radial_parts(vector_axes, parts, care, w, u):
    w_norm, u_norm, radial, _ = parts
    return nonzero(w_norm), u_norm, radial


def without_radial(w, u, w_norm, radial):
    w, x = at_least_float32(w, u)
    return (x - radial * (w / w_norm)).astype(jnp.result_type(u))


def remove_radial_component(
    axes: Axes = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""Remove from every update the part along its weight vector.

    $$u \leftarrow u - \langle u, \hat w\rangle\,\hat w, \qquad \hat w = w / \|w\|$$

    Momentum, adaptive rates and weight decay put it there. Where $w = 0$ there is none.

    Args:
      axes: Which entries form one weight vector, as in `weight_norm`.

    Returns:
      A stateless gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = jnp.array([[2.0], [0.0]])
      >>> tx = normax.remove_radial_component()
      >>> updates, _ = tx.update(jnp.array([[5.0], [1.0]]), tx.init(params), params)
      >>> updates.ravel()
      Array([0., 1.], dtype=float32)

    References:
      Heo et al., AdamP, 2021, arXiv:2006.08217.
    """
    check_axes(axes)

    def remove(rows):
        found, updates = finish_polar_parts(radial_parts, rows)
        return [
            without_radial(w, u, w_norm, radial)
            for (_, w, _), u, (w_norm, _, radial) in zip(
                rows, updates, found, strict=True
            )
        ]

    def init_fn(params):
        resolve_axes(axes, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("remove_radial_component", params)
        updates = map_vectors(
            remove,
            axes,
            params,
            updates,
            otherwise=lambda w, u: u,
            together=True,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def normalized_sgd(
    learning_rate: optax.ScalarOrSchedule,
    axes: Axes = "unit",
    weight_decay: jax.typing.ArrayLike = 0.0,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent on the unit sphere.

    $$\tilde w_{t+1} = w_t - \eta\,(\nabla L(w_t) + \lambda w_t), \qquad
    w_{t+1} = \tilde w_{t+1} / \|\tilde w_{t+1}\|$$

    Its effective learning rate is $\eta$. Arrays left alone take the plain step.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      axes: Which entries form one weight vector, as in `weight_norm`.
      weight_decay: Weight decay $\lambda$ of all parameters.
      momentum: Decay of the velocity, at least 0 and below 1; None for none.
      nesterov: Whether the momentum is Nesterov's.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, grads = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [-1.0]])
      >>> tx = normax.normalized_sgd(learning_rate=0.75)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> (params + updates).ravel()
      Array([0.8, 0.6], dtype=float32)

    References:
      van Laarhoven, 2017, arXiv:1706.05350, section 5.5 and Table 1.
    """
    check_learning_rate(learning_rate)
    check_range("weight_decay", weight_decay, low=0)
    check_range("momentum", momentum, low=0, below=1)
    chain = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov),
        project_unit_norm(axes),
    )
    return requiring_params("normalized_sgd", chain)
