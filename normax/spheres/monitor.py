"""The measures of weight vectors, kept in the state of an optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from normax._core.axes import Axes, PyTree, check_axes, map_vectors
from normax._core.checks import check_range, require_params
from normax._core.norms import at_least_float32, finish_polar_parts
from normax._core.scheduling import wait
from normax.spheres.measures import angle_of_update, relative_length, weight_norm
from normax.spheres.profile import (
    GradientProfile,
    advance_profile,
    begin_profile,
    check_blocks,
)


class MonitorWeightDynamicsState(NamedTuple):
    r"""State of `monitor_weight_dynamics`.

    Attributes:
      steps: Number of updates so far, int32 of shape ().
      measured: Number of updates before the last one that was measured.
      total_weight: Sum of the weights $\beta^{t-s}$ of the averages.
      weight_norm: Averages of `normax.weight_norm`, before the updates.
      relative_update: Averages of `normax.relative_update`.
      angular_update: Averages of `normax.angular_update`, in radians.
      rounded_away: Averages of the share of each array's entries that an update was to
        change and rounding left as they were; None for float32 and wider.
      axes: The axes that one weight vector of each array spans, int32.
      profile: What `normax.spheres.gradient_norm_profile` reads; None without
        `gradient_blocks`.
    """

    steps: jax.Array
    measured: jax.Array
    total_weight: jax.Array
    weight_norm: PyTree
    relative_update: PyTree
    angular_update: PyTree
    rounded_away: PyTree
    axes: PyTree
    profile: GradientProfile | None


AVERAGED = "weight_norm", "relative_update", "angular_update", "rounded_away"


class _Measured(NamedTuple):
    update: Any
    weight_norm: jax.Array | None
    relative_update: jax.Array | None
    angular_update: jax.Array | None
    rounded_away: jax.Array | None


def _is_rounded(w: jax.Array) -> bool:
    return jnp.finfo(w.dtype).bits < 32


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Round as a narrower dtype does; XLA leaves out a conversion there and back."""
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if float(info.tiny) == float(jnp.finfo(x.dtype).tiny):
        return rounded
    # The narrower dtype has subnormal numbers here, which `reduce_precision` has not.
    step = float(info.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x / step) * step, rounded)


def _applied(w: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights, and what `optax.apply_updates` adds to them."""
    x, step = at_least_float32(w, u)
    return x, _rounded(x + step, w.dtype) - x if _is_rounded(w) else step


def _lost(w: jax.Array, u: jax.Array) -> jax.Array:
    """Return which share of the entries an update was to change and did not."""
    wanted = u != 0
    lost = jnp.sum(wanted & (_applied(w, u)[1] == 0), dtype=jnp.float32)
    return lost / jnp.maximum(jnp.sum(wanted, dtype=jnp.float32), 1)


def _measures(vector_axes, parts, care, w, u, *others):
    w_norm, u_norm, radial, tangential = parts
    angle = angle_of_update(w_norm, radial, tangential)
    values = w_norm, relative_length(w_norm, u_norm), angle
    measures = (jnp.squeeze(value, vector_axes) for value in values)
    return *measures, _lost(w, u) if _is_rounded(w) else None


def check_every(every: jax.typing.ArrayLike, low: int) -> None:
    """Raise unless a number of steps is whole, and at least `low`."""
    check_range("every", every, low=low)
    if not isinstance(every, jax.core.Tracer) and np.any(np.asarray(every) % 1):
        raise ValueError(
            f"every must be a whole number of steps, got {every}; round it."
        )


def monitor_weight_dynamics(
    axes: Axes = "unit",
    decay: jax.typing.ArrayLike = 0.0,
    every: jax.typing.ArrayLike = 1,
    gradient_blocks: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measure norms, relative updates and angular updates; change nothing.

    $$\bar x_t = \sum_{s \le t} \beta^{t-s} x_s \Big/ \sum_{s \le t} \beta^{t-s}$$

    is the average of a measure $x$ over the steps that are measured. Place it last in a
    chain, and inside of `optax.MultiSteps`. Where parameters are in half precision, it
    measures the update that is left after `optax.apply_updates` has rounded the sum.
    Arrays left alone have None for measures, and an array whose update is None keeps
    its last measures. Averages over a NaN stay NaN.

    Args:
      axes: Which entries form one weight vector, as in `weight_norm`.
      decay: Decay $\beta$, at least 0 and below 1; 0 keeps the latest value.
      every: Number of steps from one measurement to the next, for those who log
        rarely. The first step is measured.
      gradient_blocks: Even number of blocks in which gradient norms are averaged over
        the run, as `normax.spheres.gradient_norm_profile` says; None keeps none. Then
        `update` needs the gradients themselves, as `grad=grads`. When all blocks are
        full, neighbours are joined, so that half of them at least are in use after
        as many steps. Under `optax.inject_hyperparams` it belongs in `static_args`.

    Returns:
      A gradient transformation that needs `params`. `dynamics_table` and
      `dynamics_scalars` read its state, and so does `optax.tree.get`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` or `grad`
        is missing.

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
    check_every(every, 1)
    blocks = check_blocks(gradient_blocks)
    latest, always = (
        not isinstance(number, jax.core.Tracer)
        and bool(np.all(np.asarray(number) == n))
        for number, n in ((decay, 0), (every, 1))
    )

    def init_fn(params):
        norms = weight_norm(params, axes)

        def lost(vector_axes, w):
            return jnp.zeros([], jnp.float32) if _is_rounded(w) else None

        # The trees of zeros differ, because a buffer cannot be donated twice.
        return MonitorWeightDynamicsState(
            steps=jnp.zeros([], jnp.int32),
            measured=jnp.zeros([], jnp.int32),
            total_weight=jnp.zeros([], jnp.float32),
            weight_norm=norms,
            relative_update=jax.tree.map(jnp.zeros_like, norms),
            angular_update=jax.tree.map(jnp.zeros_like, norms),
            rounded_away=map_vectors(lost, axes, params),
            axes=map_vectors(lambda found, w: jnp.array(found, "int32"), axes, params),
            profile=None if blocks is None else begin_profile(norms, blocks),
        )

    def update_fn(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        params = require_params("monitor_weight_dynamics", params)
        now = None if always else state.steps % every == 0
        total_weight = (1 + decay * state.total_weight).astype(jnp.float32)

        gradients = state.profile
        if blocks is not None:
            given = state.profile, now, blocks, axes, params, updates, grad
            gradients, updates = advance_profile(*given)

        def if_now(new, old):
            return new if now is None else jnp.where(now, new, old)

        def average(old, new):
            if old is None:
                return None
            new = new.astype(old.dtype)
            if latest:
                return new
            rate = (1 / total_weight).astype(old.dtype)
            # At rate 1, 0 times an old NaN would be NaN again: select the new value.
            mean = jnp.where(rate < 1, (1 - rate) * old + rate * new, new)
            return if_now(mean, old)

        def measure(rows):
            found, updates = finish_polar_parts(_measures, rows, _applied, now)
            measured = []
            for row, u, new in zip(rows, updates, found, strict=True):
                vector_axes, _, _, *old = row
                averages = [*map(average, old, new)]
                # The update waits for the measures. Otherwise the parameters could
                # change first, and measuring them would need a copy.
                u = wait(u, jnp.expand_dims(averages[0], vector_axes), everywhere=True)
                measured.append(_Measured(u, *averages))
            return measured

        old = {name: getattr(state, name) for name in AVERAGED}
        found = map_vectors(
            measure,
            axes,
            params,
            updates,
            *old.values(),
            otherwise=lambda w, u, *old: _Measured(u, *old),
            together=True,
        )

        def field(name, old):
            return jax.tree.map(
                lambda measured, old: getattr(measured, name, old),
                found,
                old,
                is_leaf=lambda node: node is None or isinstance(node, _Measured),
            )

        state = MonitorWeightDynamicsState(
            steps=optax.safe_increment(state.steps),
            measured=if_now(state.steps, state.measured),
            total_weight=if_now(total_weight, state.total_weight),
            axes=state.axes,
            profile=gradients,
            **{name: field(name, tree) for name, tree in old.items()},
        )
        return field("update", updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
