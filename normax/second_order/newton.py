"""Newton's method with a dense Hessian, also on spheres.

Derivation: docs/theory/second_order.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from normax._core.axes import Axes, PyTree, check_axes, resolve_axes
from normax._core.checks import check_learning_rate, check_range, requiring_params
from normax._core.norms import at_least_float32, nonzero
from normax._core.programs import full_precision
from normax.second_order.free_parameters import free_parameters, require_value_fn
from normax.second_order.pseudo_inverse import solve
from normax.spheres.projection import remove_radial_component


def _spread(array: jax.Array, like: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Spread an array over an explicit mesh as `like` is, or like one vector."""
    here = jax.typeof(array).sharding
    there = P(*[None] * array.ndim) if like is None else jax.typeof(like).sharding.spec
    return array if here.spec == there else jax.sharding.reshard(array, there)


def _check_size(params: PyTree, max_parameters: Any) -> None:
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    if not isinstance(max_parameters, jax.core.Tracer) and size > max_parameters:
        raise ValueError(
            "normax.second_order.newton holds a dense Hessian, so there must be at "
            f"most max_parameters={max_parameters} parameters, but there are {size}; "
            "raise max_parameters if a matrix of that size fits, or use "
            "normax.second_order.hessian_free, which takes products of curvature and "
            "vectors only."
        )


def newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    saddle_free: bool = False,
    axes: Axes = "none",
    rtol: jax.typing.ArrayLike | None = None,
    max_parameters: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a dense Hessian, for at most a few thousand parameters.

    $$w \leftarrow w - \eta\,(H + \lambda I + \mu I)^{-1} (g + \lambda w), \qquad
    H = \nabla^2 L(w)$$

    The gradient $g$ is the one that `update` is given, the Hessian that of `value_fn`
    at `params`: `update(grads, state, params, value_fn=loss_of_params)`. Directions
    without curvature do not move. The step has the units of the weights. Newton's
    method also goes to saddles; with `saddle_free` it leaves them.

    Name scale-invariant vectors in `axes`. Otherwise the step of a scale-invariant
    loss is $+\eta w$, which changes no function. With `axes` the method is Newton's on
    spheres, and weight decay shrinks norms as $(1 - \eta)^t$. Derivation:
    docs/theory/second_order.md.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      damping: Damping $\mu$, in the units of the Hessian.
      weight_decay: Weight decay $\lambda$ of all parameters, as a part of the loss.
      saddle_free: Whether to take the absolute values of all eigenvalues of
        $H + \lambda I$.
      axes: Which entries form one scale-invariant vector.
      rtol: Curvatures below this part of the largest count as 0; None for the number
        of parameters times the rounding of the dtype.
      max_parameters: Largest number of parameters; memory grows as its square.

    Returns:
      A gradient transformation that needs `params` and `value_fn`. Under
      `optax.masked` or `partition`, `value_fn` is called with what is left of the
      parameters. An array whose gradient is None is a constant.

    Raises:
      ValueError: There are too many parameters, `axes` does not fit them, a number is
        out of range, or `update` is called without `params` or `value_fn`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def loss(w):
      ...     return 50 * (w[0] - 1) ** 2 + (w[0] - w[1]) ** 2
      >>> tx = normax.second_order.newton()
      >>> @jax.jit
      ... def step(w):
      ...     return w + tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)[0]
      >>> step(jnp.zeros(2)).round(4)
      Array([1., 1.], dtype=float32)

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017,
      §5.4 and Table 1.
      Dauphin et al., Identifying and Attacking the Saddle Point Problem, 2014.
    """
    check_axes(axes)
    check_learning_rate(learning_rate)
    check_range("damping", damping, low=0)
    check_range("weight_decay", weight_decay, low=0)
    check_range("rtol", rtol, low=0)

    def init_fn(params):
        resolve_axes(axes, params)
        _check_size(params, max_parameters)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del extra_args
        _check_size(params, max_parameters)
        value_fn = require_value_fn("newton", value_fn)
        free = free_parameters(params, updates)
        if free is None:
            return updates, state

        def flatten(tree):
            pieces = [at_least_float32(array)[0] for array in free.pick(tree)]
            return ravel_pytree([_spread(piece) for piece in pieces])

        def unflatten(flat, tree):
            pairs = zip(unravel(flat), free.pick(tree), strict=True)
            return free.place_like([_spread(x, y) for x, y in pairs], tree)

        def tangential(flat):
            projected, _ = remove_radial_component(axes).update(
                free.place(unravel(flat), updates), optax.EmptyState(), params
            )
            return flatten(projected)[0]

        w, unravel = flatten(params)
        gradient, _ = flatten(updates)
        decay, mu = (jnp.asarray(x, w.dtype) for x in (weight_decay, damping))
        precision = w.size * jnp.finfo(w.dtype).eps if rtol is None else rtol
        identity = jnp.eye(w.size, dtype=w.dtype)
        projection = jax.vmap(tangential)(identity)
        # The rounded products of a GPU would be curvature where there is none.
        with full_precision():
            hessian = jax.hessian(lambda flat: value_fn(unflatten(flat, params)))(w)
            step = projection @ solve(
                projection @ hessian @ projection + decay * identity,
                projection @ (gradient + decay * w),
                mu,
                jnp.asarray(precision, w.dtype),
                saddle_free,
            )
            radial = w - projection @ w
        step += decay / nonzero(decay + mu) * radial
        return unflatten(step, updates), state

    chain = optax.chain(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )
    return requiring_params("second_order.newton", chain)
