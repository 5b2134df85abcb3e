"""The gradient norms of a run, in blocks of steps, for the prediction of another."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from normax._core.axes import Axes, PyTree, map_vectors, match_gradients
from normax._core.checks import check_count
from normax._core.norms import finish_polar_parts, vector_norm
from normax._core.scheduling import unless, wait


class GradientProfile(NamedTuple):
    """The part of `MonitorWeightDynamicsState` that concerns gradients.

    Attributes:
      measurements: Number of gradients that were measured, int32 of shape ().
      length: Number of them that share a block: a power of two, int32.
      joint_norm: Roots of the sums of squares over each block, whose rounding has no
        drift as that of means has, of shape (blocks, vectors...).
    """

    measurements: jax.Array
    length: jax.Array
    joint_norm: PyTree


def check_blocks(blocks: Any) -> int | None:
    """Return the number of blocks, or raise unless it is even and positive, or None."""
    if blocks is None:
        return None
    try:
        number = operator.index(blocks)
    except (TypeError, jax.errors.JAXTypeError):
        number = 0
    if number < 2 or number % 2 or isinstance(blocks, bool | jax.Array):
        raise ValueError(
            "gradient_blocks must be None or an even integer from 2 on, got "
            f"{blocks!r}; pass 100, and name it in the static_args of "
            "optax.inject_hyperparams."
        )
    return number


def begin_profile(norms: PyTree, blocks: int) -> GradientProfile:
    """Return the profile of no gradients, for vectors that have these norms."""

    def zeros(norm):
        return jnp.zeros_like(jnp.broadcast_to(norm, (blocks, *norm.shape)))

    count, length = jnp.zeros([], jnp.int32), jnp.ones([], jnp.int32)
    return GradientProfile(count, length, jax.tree.map(zeros, norms))


def _finish(vector_axes, parts, care, w, g):
    w_norm, _, _, tangential = parts
    return (jnp.squeeze(w_norm * tangential, vector_axes),)


def _gradient_norms(axes: Axes, params: PyTree, grads: PyTree) -> PyTree:
    """Return the product of norm and tangential gradient of every vector."""

    def measure(rows):
        return [norms for (norms,) in finish_polar_parts(_finish, rows)[0]]

    return map_vectors(measure, axes, params, grads, together=True)


def _joint(*norms: jax.Array) -> jax.Array:
    """Return the roots of sums of squares, in the range of the values themselves."""
    return vector_norm(jnp.stack(norms), (0,))[0]


def _join_neighbours(blocks: jax.Array) -> jax.Array:
    joined = _joint(blocks[::2], blocks[1::2])
    return jnp.concatenate([joined, jnp.zeros_like(joined)])


def advance_profile(
    profile: GradientProfile,
    now: jax.Array | None,
    blocks: int,
    axes: Axes,
    params: PyTree,
    updates: PyTree,
    grad: PyTree,
) -> tuple[GradientProfile, PyTree]:
    """Return the profile with one more step, where `now` holds or is None.

    The updates are to be used in place of those given. They wait for the norms, since
    parameters that change before would need a copy.
    """
    if grad is None:
        raise ValueError(
            "normax.monitor_weight_dynamics keeps gradient norms where gradient_blocks "
            "is set, but `grad` is missing; call update(grads, state, params, "
            "grad=grads)."
        )
    grads = match_gradients(grad, params)

    def measured(profile, params, grads):
        count, length, old = profile
        full = count // length >= blocks
        old = unless(full, old, functools.partial(jax.tree.map, _join_neighbours), old)
        length = jnp.where(full, 2 * length, length)
        norms = _gradient_norms(axes, params, grads)

        def add(rows, new):
            if new is None:
                return rows
            row = lax.dynamic_index_in_dim(rows, count // length, keepdims=False)
            row = _joint(row, new.astype(row.dtype))
            return lax.dynamic_update_index_in_dim(rows, row, count // length, 0)

        new = jax.tree.map(add, old, norms)
        return GradientProfile(optax.safe_increment(count), length, new)

    if now is None:
        new = measured(profile, params, grads)
    else:
        new = unless(now, profile, measured, profile, params, grads)

    def after(vector_axes, w, u, rows):
        return wait(u, jnp.expand_dims(rows[-1], vector_axes), everywhere=True)

    keep = lambda w, u, rows: u  # noqa: E731
    return new, map_vectors(
        after, axes, params, updates, new.joint_norm, otherwise=keep
    )


def gradient_norm_profile(opt_state: PyTree, steps: int) -> PyTree:
    r"""Return the gradient norms of a run, for the prediction of a run of any length.

    $$G_b = \Big(\frac{1}{n_b} \sum_{t \in b} \|\nabla_\perp L(w_t)\|^2\,\|w_t\|^2
    \Big)^{1/2}$$

    is what `monitor_weight_dynamics` has kept of block $b$, which holds $n_b$ steps.
    $\nabla_\perp L$ is the part that is orthogonal to $w$: all of it, where the loss
    does not depend on $\|w\|$. Each step takes the value of the block at the same
    fraction of the run. It works under `jax.jit` too.

    Args:
      opt_state: State of an optimizer, which holds that of one
        `monitor_weight_dynamics` with `gradient_blocks`.
      steps: Number of steps of the run to be predicted.

    Returns:
      Pytree like `normax.weight_norm`, with arrays of shape (steps, vectors...): each
      is a `gradient_norm` of `UpdateRule.predict`. 0 where no gradient came.

    Raises:
      ValueError: `opt_state` holds no profile, several, those of several runs, or one
        without gradients; or `steps` is no positive integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> w, grads = jnp.array([[3.0], [4.0]]), jnp.array([[0.4], [-0.3]])
      >>> tx = normax.monitor_weight_dynamics(gradient_blocks=2)
      >>> _, state = tx.update(grads, tx.init(w), w, grad=grads)
      >>> _, state = tx.update(grads, state, w, grad=2 * grads)
      >>> normax.spheres.gradient_norm_profile(state, steps=4).round(3)
      Array([[2.5],
             [2.5],
             [5. ],
             [5. ]], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    def is_profile(node):
        return isinstance(node, GradientProfile)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_profile)
    found = [node for node in nodes if is_profile(node)]
    if len(found) != 1:
        raise ValueError(
            "opt_state must hold one profile of gradient norms, but holds "
            f"{len(found)}; pass the state of one monitor_weight_dynamics that has "
            "gradient_blocks."
        )
    fix = "pass the number of steps of the run to be predicted"
    steps = check_count("steps", steps, fix)
    count, length, joint_norm = found[0]
    if count.ndim:
        raise ValueError(
            "opt_state must be that of one run, but its counts of gradients have shape "
            f"{count.shape}; map over the runs: jax.vmap(lambda state: "
            "gradient_norm_profile(state, steps))(opt_state)."
        )
    if not isinstance(count, jax.core.Tracer) and count == 0:
        raise ValueError(
            "opt_state must hold measured gradients, but its monitor has seen no step; "
            "pass the state at the end of a run."
        )
    middle = jnp.arange(steps) + 0.5
    step = jnp.clip((middle * (count / steps)).astype(jnp.int32), 0, count - 1)
    block = step // length
    measured = jnp.minimum(count - block * length, length)

    def read(rows):
        shape = steps, *[1] * (rows.ndim - 1)
        return rows[block] / jnp.sqrt(measured.reshape(shape).astype(rows.dtype))

    return jax.tree.map(read, joint_norm)
