r"""Updates that turn every weight vector by a given angle and keep its norm.

With weight decay, norms settle where growth and decay balance, and from then on a
step turns the weight vectors by an angle that the hyperparameters alone determine.
The rotational optimizers take that angle from the first step on.
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._axes import Axes, PyTree, check_axes, map_vectors
from normax._checks import check_range, requiring_params
from normax._measures import weight_norm
from normax._norms import at_least_float32, nonzero, polar_decomposition
from normax._unit_norm import project_unit_norm


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
            with jax.numpy_dtype_promotion("standard"):
                return _Turn(step.astype(jnp.result_type(w, u)), mean)

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


def _rotational(
    name: str,
    rule: optax.GradientTransformation,
    ordinary: optax.GradientTransformation,
    angle: Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike],
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    decay: jax.typing.ArrayLike,
    axes: Axes,
) -> optax.GradientTransformationExtraArgs:
    """Turn the weight vectors along `rule`; give other arrays the `ordinary` rule."""
    if not isinstance(weight_decay, jax.core.Tracer) and not np.all(
        np.asarray(weight_decay) > 0
    ):
        raise ValueError(
            f"normax.{name} turns weights by an angle in proportion to the root of "
            f"weight_decay, which must be greater than 0, got {weight_decay}; choose "
            "the decay of the rule that it stands in for."
        )

    def angle_at(count):
        return angle(learning_rate(count))

    turned = optax.chain(
        rule,
        optax.scale(-1.0),
        rotate_by_angle(
            angle_at if callable(learning_rate) else angle(learning_rate), decay, axes
        ),
    )

    def labels(params):
        return map_vectors(
            lambda vector_axes, w: "turned",
            axes,
            params,
            otherwise=lambda w: "ordinary",
        )

    both = optax.partition({"turned": turned, "ordinary": ordinary}, labels)
    return requiring_params(name, both)


def rotational_sgd(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike = 0.9,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum SGD that turns weight vectors by its equilibrium angle.

    $$v \leftarrow \rho v + g, \qquad \theta = \sqrt{\frac{2\eta\lambda}{1 + \rho}}$$

    Every weight vector turns along $-v$ by $\theta$ and keeps its norm; see
    `rotate_by_angle`. It is the angle by which `optax.sgd` with coupled weight decay
    turns a scale-invariant vector once its norm has settled. Weight decay sets the
    angle and does nothing else to weight vectors. Arrays that `axes` leaves alone
    take the ordinary step, weight decay included.

    With the published `decay` of 0.9 the first steps turn by up to a fifth more than
    $\theta$, while the velocity grows to its full length.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      weight_decay: Weight decay $\lambda$, greater than 0.
      momentum: Decay $\rho$ of the velocity.
      decay: Decay $\beta$ of the averages of update norms, as in `rotate_by_angle`;
        published is 0.9.
      axes: Which entries form one weight vector, as in `projection_unit_norm`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` is malformed or does not fit the parameters, a number is out
        of range, or `update` is called without `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = jnp.array([[3.0], [4.0]])
      >>> tx = normax.rotational_sgd(0.1, weight_decay=0.1, momentum=0.9)
      >>> updates, _ = tx.update(jnp.array([[5.0], [7.0]]), tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.1022

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium: How Weight Decay Balances
      Learning Across Neural Networks, 2024.
    """
    return _rotational(
        "rotational_sgd",
        optax.trace(momentum),
        optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.sgd(learning_rate, momentum),
        ),
        lambda eta: jnp.sqrt(2 * eta * weight_decay / (1 + momentum)),
        learning_rate,
        weight_decay,
        decay,
        axes,
    )


def rotational_adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW that turns weight vectors by its equilibrium angle.

    $$p = \frac{\hat m}{\sqrt{\hat r} + \epsilon}, \qquad
    \theta = \sqrt{2\eta\lambda\,\frac{1 - b_1}{1 + b_1}}$$

    Every weight vector turns along $-p$ by $\theta$ and keeps its norm; see
    `rotate_by_angle`. It is the angle by which `optax.adamw` turns a scale-invariant
    vector once its norm has settled. Weight decay sets the angle and does nothing
    else to weight vectors. Arrays that `axes` leaves alone take AdamW's ordinary
    step, weight decay included.

    With the published `decay` of 0.9 the first steps turn by up to a third less than
    $\theta$, while $\hat m$ shrinks from the length of one gradient to that of an
    average.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      weight_decay: Weight decay $\lambda$, greater than 0.
      b1: Decay of the average of gradients.
      b2: Decay of the average of squared gradients.
      eps: Added to the root, outside of it.
      decay: Decay $\beta$ of the averages of update norms, as in `rotate_by_angle`;
        published is 0.9.
      axes: Which entries form one weight vector, as in `projection_unit_norm`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` is malformed or does not fit the parameters, a number is out
        of range, or `update` is called without `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = jnp.array([[3.0], [4.0]])
      >>> tx = normax.rotational_adamw(0.1, weight_decay=0.1)
      >>> updates, _ = tx.update(jnp.array([[5.0], [7.0]]), tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.0324

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium: How Weight Decay Balances
      Learning Across Neural Networks, 2024.
    """
    return _rotational(
        "rotational_adamw",
        optax.scale_by_adam(b1, b2, eps),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
        lambda eta: jnp.sqrt(2 * eta * weight_decay * (1 - b1) / (1 + b1)),
        learning_rate,
        weight_decay,
        decay,
        axes,
    )


def rotational_lion(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""Lion that turns weight vectors by its equilibrium angle.

    $$p = \operatorname{sign}(b_1 m + (1 - b_1) g), \qquad
    m \leftarrow b_2 m + (1 - b_2) g, \qquad
    \theta = \sqrt{\pi\eta\lambda}\,
    \Big((1 - b_1)^2 + b_1^2\,\frac{1 - b_2}{1 + b_2}\Big)^{1/2}$$

    Every weight vector turns along $-p$ by $\theta$ and keeps its norm; see
    `rotate_by_angle`. It is close to the angle by which `optax.lion` turns a
    scale-invariant vector once its norm has settled. Weight decay sets the angle and
    does nothing else to weight vectors. Arrays that `axes` leaves alone take Lion's
    ordinary step, weight decay included.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      weight_decay: Weight decay $\lambda$, greater than 0.
      b1: Weight of the average in the update.
      b2: Decay of the average of gradients.
      decay: Decay $\beta$ of the averages of update norms, as in `rotate_by_angle`;
        published is 0.9.
      axes: Which entries form one weight vector, as in `projection_unit_norm`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` is malformed or does not fit the parameters, a number is out
        of range, or `update` is called without `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params = jnp.array([[3.0], [4.0]])
      >>> tx = normax.rotational_lion(0.1, weight_decay=0.1)
      >>> updates, _ = tx.update(jnp.array([[5.0], [7.0]]), tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.0210

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium: How Weight Decay Balances
      Learning Across Neural Networks, 2024.
    """

    def angle(eta):
        variance = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
        return jnp.sqrt(math.pi / 2 * 2 * eta * weight_decay * variance)

    return _rotational(
        "rotational_lion",
        optax.scale_by_lion(b1, b2),
        optax.lion(learning_rate, b1, b2, weight_decay=weight_decay),
        angle,
        learning_rate,
        weight_decay,
        decay,
        axes,
    )
