"""Measures of an optimizer that are taken rarely, and cost little in between."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import Axes, map_vectors
from normax._core.checks import require_params
from normax._core.scheduling import unless, wait
from normax.spheres.monitor import (
    MonitorWeightDynamicsState,
    check_every,
    monitor_weight_dynamics,
)


class MonitorOptimizerState(NamedTuple):
    """State of `monitor_optimizer`.

    Attributes:
      optimizer: The state of the optimizer.
      monitor: The measures.
    """

    optimizer: optax.OptState
    monitor: MonitorWeightDynamicsState


def monitor_optimizer(
    optimizer: optax.GradientTransformation,
    every: jax.typing.ArrayLike,
    axes: Axes = "unit",
    decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Measure a whole optimizer at every n-th step, and leave the others alone.

    $$\bar x_t = \sum_{k \le t / n} \beta^{\lfloor t / n\rfloor - k} x_{k n} \Big/
      \sum_{k \le t / n} \beta^{\lfloor t / n\rfloor - k}$$

    is the average of a measure $x$, as in `monitor_weight_dynamics` with the same
    `every`, behind the optimizer in a chain. Only the cost differs. There each update
    is written to memory, since the monitor may want it. Here a step that is measured
    computes the updates a second time, and the others only ask whether they are due.
    In a `jax.vmap` over states, as in `normax.sweeps.grid_sweep`, each step does both,
    so use the chain there, and for a profile of gradient norms.

    Args:
      optimizer: What is measured, with its learning rate. It must be pure: from the
        same arguments it computes the same updates.
      every: Number $n$ of steps from one measurement to the next, at least 2. The first
        step is measured.
      axes: Which entries form one weight vector, as in `weight_norm`.
      decay: Decay $\beta$ of the averages, at least 0 and below 1.

    Returns:
      The optimizer, with its measures in the state. It needs `params`, and hands
      further arguments of `update` on. `dynamics_table` and `dynamics_scalars` read its
      state.

    Raises:
      ValueError: As `monitor_weight_dynamics`, or `every` is below 2.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> import optax
      >>> params, grads = jnp.array([[3.0], [4.0]]), jnp.array([[-0.4], [0.3]])
      >>> tx = normax.spheres.monitor_optimizer(optax.sgd(1.0), every=10)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> state.monitor.angular_update.round(4)
      Array([0.0997], dtype=float32)

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_every(every, 2)
    inner = optax.with_extra_args_support(optimizer)
    measure = monitor_weight_dynamics(axes, decay)

    def init_fn(params):
        return MonitorOptimizerState(inner.init(params), measure.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        params = require_params("monitor_optimizer", params)
        steps = state.monitor.steps

        def measured(grads, optimizer, params):
            updates, _ = inner.update(grads, optimizer, params, **extra_args)
            return measure.update(updates, state.monitor, params)[1]

        operands = updates, state.optimizer, params
        monitor = unless(steps % every == 0, state.monitor, measured, *operands)
        monitor = monitor._replace(steps=optax.safe_increment(steps))
        # The measures come first. Otherwise the parameters and the optimizer's state
        # could change before, and measuring them would need copies.
        updates = map_vectors(
            lambda found, w, g, norm: wait(g, jnp.expand_dims(norm, found), True),
            axes,
            params,
            updates,
            monitor.weight_norm,
            otherwise=lambda w, g, norm: g,
        )
        updates, optimizer = inner.update(
            updates, state.optimizer, params, **extra_args
        )
        return updates, MonitorOptimizerState(optimizer, monitor)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
