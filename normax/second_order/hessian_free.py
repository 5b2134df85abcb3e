"""Hessian-free optimization: Newton's steps by conjugate gradients, without a matrix.

Derivation: docs/theory/second_order.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normax._core.axes import PyTree
from normax._core.checks import check_learning_rate, check_range, requiring_params
from normax._core.modules import refuse_modules
from normax._core.norms import at_least_float32
from normax._core.programs import is_float
from normax.second_order.conjugate_gradients import inner
from normax.second_order.free_parameters import free_parameters, require_value_fn
from normax.second_order.quadratic_model import (
    QuadraticModel,
    curvature,
    minimize,
    preconditioner,
    start_from,
    unit_of,
)
from normax.second_order.step_control import adapt_damping, backtrack


class HessianFreeState(NamedTuple):
    r"""State of `hessian_free`.

    Attributes:
      count: Number of steps, int32.
      damping: Damping $\mu$ of the next step.
      direction: Last solution $p$, where the next search starts; None for integers.
      reduction_ratio: Ratio $\rho$ of the last step; 1 if there is none, or if rounding
        hides the decrease of the loss.
      iterations: Number of conjugate gradient iterations of the last step, int32.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    damping: jax.Array
    direction: PyTree
    reduction_ratio: jax.Array
    iterations: jax.Array


def _dtype(leaves: list[Any]) -> Any:
    """Return the common dtype of all arrays of floats, float32 at least."""
    numbers = [jnp.zeros((), jnp.result_type(x)) for x in leaves if is_float(x)]
    return at_least_float32(jnp.float32(0), *numbers)[0].dtype


def hessian_free(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: jax.typing.ArrayLike = 1.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    outputs_fn: Callable[[PyTree], PyTree] | None = None,
    loss_of_outputs: Callable[[PyTree], jax.Array] | None = None,
    cg_iterations: jax.typing.ArrayLike = 250,
    cg_tolerance: jax.typing.ArrayLike = 5e-4,
    warm_start: jax.typing.ArrayLike = 0.95,
    preconditioner_power: jax.typing.ArrayLike = 0.75,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization: Newton's method by conjugate gradients.

    $$w \leftarrow w + \alpha\,\eta\,p, \qquad
    (B + \lambda I + \mu I)\,p = -(g + \lambda w)$$

    The gradient $g$ is the one that `update` is given, for the loss $L$ that it is
    given: `update(grads, state, params, value_fn=loss_of_params)`. With a network's
    `outputs_fn` and a convex `loss_of_outputs`, $B$ is the Gauss-Newton matrix
    $J^\top H J$, which has no negative curvature. Otherwise it is the Hessian of $L$.
    No matrix is formed: memory is a small multiple of the parameters'.

    The damping $\mu$ falls when the model predicts the loss well, and rises when it
    does not. The part $\alpha \le 1$ is halved until the loss decreases. Without
    damping, the step has the units of the weights. Derivation, stopping rule, rounding
    and derivatives: docs/theory/second_order.md.

    The functions close over the batch, so hand those of its batch to each `update`.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      damping: Damping $\mu$ of the first step, in the units of $B$.
      weight_decay: Weight decay $\lambda$ of all parameters, coupled.
      outputs_fn: Outputs of the network, a pytree of arrays, as a function of the
        parameters, unless `update` is given another.
      loss_of_outputs: A convex function of the outputs, likewise.
      cg_iterations: Largest number of iterations in a step.
      cg_tolerance: Least relative progress of an iteration.
      warm_start: Factor of the last solution; 0 for a start from 0.
      preconditioner_power: Exponent $\xi$ of the preconditioner
        $(c + \lambda + \mu)^\xi$, where `update` is given `curvature_diagonal`, a
        pytree of numbers $c \ge 0$ like the parameters.

    Returns:
      A gradient transformation that needs `params` and `value_fn`, with the state
      `HessianFreeState`. Under `optax.masked` or `partition`, the functions are called
      with what is left of the parameters; under `optax.inject_hyperparams`, they need
      `static_args`. An array whose gradient is None is a constant.

    Raises:
      ValueError: A number is out of range, only one of the two functions is given, or
        `update` is called without `params` or `value_fn`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def outputs_fn(w):
      ...     return jnp.stack([10 * w[0] - 10, w[0] - w[1]])
      >>> def loss(w):
      ...     return jnp.sum(outputs_fn(w) ** 2)
      >>> tx = normax.second_order.hessian_free(damping=0.0)
      >>> @jax.jit
      ... def step(w):
      ...     curvature = dict(outputs_fn=outputs_fn, loss_of_outputs=lambda y: y @ y)
      ...     extra = curvature | {"value_fn": loss}
      ...     return w + tx.update(jax.grad(loss)(w), tx.init(w), w, **extra)[0]
      >>> step(jnp.zeros(2)).round(4)
      Array([1., 1.], dtype=float32)

    References:
      Martens, Deep learning via Hessian-free optimization, 2010. van Laarhoven, L2
      Regularization versus Batch and Weight Normalization, 2017, §5.4.
    """
    numbers = dict(
        damping=damping,
        weight_decay=weight_decay,
        cg_tolerance=cg_tolerance,
        warm_start=warm_start,
        preconditioner_power=preconditioner_power,
    )
    check_learning_rate(learning_rate)
    for name, number in numbers.items():
        check_range(name, number, low=0)
    check_range("cg_iterations", cg_iterations, low=1)

    def init_fn(params):
        refuse_modules(params)
        dtype = _dtype(jax.tree.leaves(params))
        return HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.asarray(damping, dtype),
            direction=jax.tree.map(
                lambda w: jnp.zeros_like(w, dtype) if is_float(w) else None, params
            ),
            reduction_ratio=jnp.ones((), dtype),
            iterations=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        value_fn=None,
        outputs_fn=outputs_fn,
        loss_of_outputs=loss_of_outputs,
        curvature_diagonal=None,
        **extra_args,
    ):
        del extra_args
        value_fn = require_value_fn("hessian_free", value_fn)
        if (outputs_fn is None) != (loss_of_outputs is None):
            raise ValueError(
                "normax.second_order.hessian_free takes the Gauss-Newton matrix from "
                f"`outputs_fn` and `loss_of_outputs` together, but got {outputs_fn} "
                f"and {loss_of_outputs}; give both, or neither for the Hessian."
            )
        free = free_parameters(params, updates)
        if free is None:
            return updates, state
        dtype = state.damping.dtype

        def vector(tree):
            return [jnp.asarray(array, dtype) for array in free.pick(tree)]

        def loss(w):
            return value_fn(free.place_like(w, params))

        def decayed(w):
            return loss(w) + decay / 2 * inner(w, w)

        def outputs(w):
            return outputs_fn(free.place_like(w, params))

        w, decay, mu = vector(params), jnp.asarray(weight_decay, dtype), state.damping
        gradient = optax.tree.add_scale(vector(updates), decay, w)
        product = curvature(loss, outputs_fn and outputs, loss_of_outputs, w)
        damped = QuadraticModel(gradient, product, decay + mu)
        undamped = QuadraticModel(gradient, product, decay)

        unit, metric = unit_of(w), [jnp.ones((), dtype) for _ in w]
        if curvature_diagonal is not None:
            power = jnp.asarray(preconditioner_power, dtype)
            metric = preconditioner(vector(curvature_diagonal), decay + mu, power, unit)
        factor, tolerance = (jnp.asarray(x, dtype) for x in (warm_start, cg_tolerance))
        last = optax.tree.scale(factor, vector(state.direction))
        direction, iterations = minimize(
            damped, start_from(damped, last), metric, unit, tolerance, cg_iterations
        )

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        step = optax.tree.scale(jnp.asarray(rate, dtype), direction)
        predicted, _ = undamped.evaluate(step)
        # The loss may have a coarser dtype than the weight decay, and rounds with it.
        before = loss(w)
        rounding = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before).astype(dtype)
        before = decayed(w)
        part, after = backtrack(
            lambda part: decayed(optax.tree.add_scale(w, part, step)),
            before,
            inner(gradient, step),
            rounding,
        )
        next_damping, ratio = adapt_damping(mu, after - before, predicted, rounding)
        new_state = HessianFreeState(
            count=optax.safe_increment(state.count),
            damping=next_damping,
            direction=free.place(direction, state.direction),
            reduction_ratio=ratio,
            iterations=iterations,
        )
        return free.place_like(optax.tree.scale(part, step), updates), new_state

    return requiring_params(
        "second_order.hessian_free",
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
    )
