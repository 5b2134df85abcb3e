r"""Updates that turn every weight vector by a given angle and keep its norm.

With weight decay, norms settle where growth and decay balance, and from then on a
step turns the weight vectors by an angle that the hyperparameters alone determine.
The rotational optimizers, in `_rotational_rules.py`, take that angle from the first
step on.
"""

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
    nonzero,
    polar_decomposition,
)
from normax.spheres.measures import weight_norm
from normax.spheres.projection import project_unit_norm


class RotateByAngleState(NamedTuple):
    """State of `rotate_by_angle`.

    Attributes:
      steps: Number of steps, int32 of shape ().
      update_norm: Root of the averages of the squared norms of the tangential
        updates, not yet corrected for their start; shaped like the norms of
        `weight_norm`.
    """

    steps: jax.Array
    update_norm: PyTree


class _Turn(NamedTuple):
    update: jax.Array | None
    update_norm: jax.Array | None


def rotate_by_angle(
    angle: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""Change the updates so that weight vectors turn by `angle` and keep their norm.

    $$w \leftarrow \Pi\Big(w + \theta\,\|w\|\,\frac{u_\perp}{\bar n}\Big), \qquad
    u_\perp = u - \langle u, \hat w\rangle\,\hat w, \qquad
    \bar n_t^2 = \frac{1 - \beta}{1 - \beta^t}\sum_{s \le t} \beta^{t-s}
    \|u_{\perp,s}\|^2$$

    where $\Pi$ returns to the norm that the vector has at `init`. The step turns the
    vector by $\arctan(\theta\,\|u_\perp\|/\bar n)$: with $\beta = 0$ by
    $\arctan\theta$ at every step, otherwise by more where the update is longer than
    it used to be. The new weights are rounded, which in float32 turns them by up to
    $10^{-7}$ radians besides. The size of the updates does not matter, their sign does:
    they point downhill. Place it last in a chain. Arrays that `axes` leaves alone keep
    their updates. Zero vectors stay zero, and a vector whose update has no tangential
    part stays where it is.

    Args:
      angle: Angle $\theta$ in radians, a number or a schedule.
      decay: Decay $\beta$ of the averages, at least 0 and below 1.
      axes: Which entries form one weight vector, as in `projection_unit_norm`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` is malformed or does not fit the parameters, `angle` or
        `decay` is out of range, or `update` is called without `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> import optax
      >>> params = jnp.array([[3.0], [4.0]])
      >>> tx = optax.chain(optax.scale(-1.0), normax.rotate_by_angle(0.01))
      >>> grads = jnp.array([[50.0], [70.0]])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.0100

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium: How Weight Decay Balances
      Learning Across Neural Networks, 2024.
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

        def turn(vector_axes, w, u, old):
            x, y = at_least_float32(w, u)
            w_norm, _, radial, new = polar_decomposition(x, y, vector_axes)
            new = jnp.squeeze(new, vector_axes).astype(old.dtype)
            kept, added = jnp.sqrt(jnp.asarray([decay, 1 - decay], old.dtype))
            # Selected: without averaging, a NaN does not outlive its step.
            mean = jnp.where(decay == 0, new, jnp.hypot(kept * old, added * new))
            started = 1 - jnp.asarray(decay, x.dtype) ** steps.astype(x.dtype)
            norm = jnp.expand_dims(mean, vector_axes) / jnp.sqrt(started)
            tangential = y - radial * (x / nonzero(w_norm))
            length = jnp.asarray(theta, x.dtype) * w_norm
            step = length * (tangential / nonzero(norm))
            return _Turn(step.astype(common_dtype(w, u)), mean)

        turned = map_vectors(
            turn,
            axes,
            params,
            updates,
            state.update_norm,
            otherwise=lambda w, u, old: _Turn(u, None),
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
