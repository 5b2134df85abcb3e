"""Optimizers that turn every weight vector by its equilibrium angle from the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._core.axes import Axes, Mask, check_mask, resolve_axes, resolve_mask
from normax._core.checks import check_number, check_range, requiring_params
from normax.spheres.rotation import rotate_by_angle


def sgd_angle(decay: Any, momentum: Any = 0.9) -> jax.Array:
    r"""Return the angle of `rotational_sgd`, where `decay` is $\eta\lambda$."""
    return jnp.sqrt(2 * decay / (1 + momentum))


def adamw_angle(decay: Any, b1: Any = 0.9) -> jax.Array:
    r"""Return the angle of `rotational_adamw`, where `decay` is $\eta\lambda$."""
    return jnp.sqrt(2 * decay * (1 - b1) / (1 + b1))


def lion_angle(decay: Any, b1: Any = 0.9, b2: Any = 0.99) -> jax.Array:
    r"""Return the angle of `rotational_lion`, where `decay` is $\eta\lambda$."""
    length2 = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
    return jnp.sqrt(math.pi * decay * length2)


def _rotational(
    name: str,
    rule: optax.GradientTransformation,
    ordinary: optax.GradientTransformation,
    angle: Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike],
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    decay: jax.typing.ArrayLike,
    axes: Axes,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """Turn the weight vectors along `rule`; give other arrays the `ordinary` rule."""
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0)
    check_number("weight_decay", weight_decay)
    if not callable(mask):
        check_mask(mask)
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
        found = zip(resolve_axes(axes, params), resolve_mask(mask, params), strict=True)
        names = [
            "turned" if chosen and vector_axes is not None else "ordinary"
            for vector_axes, chosen in found
        ]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    both = optax.partition({"turned": turned, "ordinary": ordinary}, labels)
    return requiring_params(name, both)


def rotational_sgd(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike = 0.9,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum SGD that turns weight vectors by its equilibrium angle.

    $$v \leftarrow \rho v + g, \qquad \theta = \sqrt{\frac{2\eta\lambda}{1 + \rho}}$$

    Every weight vector turns along $-v$ by $\theta$ and keeps its norm. Arrays left
    alone take the ordinary step, decay included. More: docs/theory/spheres.md.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      weight_decay: Weight decay $\lambda$, greater than 0.
      momentum: Decay $\rho$ of the velocity, at least 0 and below 1.
      decay: Decay $\beta$ of `rotate_by_angle`; published is 0.9.
      axes: Which entries form one weight vector, as in `weight_norm`.
      mask: Which arrays turn: None for all, or a pytree prefix of bools, or a function
        of the parameters that returns one, as `optax.masked` takes. Where it is False,
        the array trains by the plain rule; so the output layer should.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, grads = jnp.array([[3.0], [4.0]]), jnp.array([[5.0], [7.0]])
      >>> tx = normax.rotational_sgd(0.1, weight_decay=0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.1022

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_range("momentum", momentum, low=0, below=1)
    return _rotational(
        "rotational_sgd",
        optax.trace(momentum),
        optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.sgd(learning_rate, momentum),
        ),
        lambda eta: sgd_angle(eta * weight_decay, momentum),
        learning_rate,
        weight_decay,
        decay,
        axes,
        mask,
    )


def rotational_adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW that turns weight vectors by its equilibrium angle.

    $$p = \frac{\hat m}{\sqrt{\hat r} + \epsilon}, \qquad
    \theta = \sqrt{2\eta\lambda\,\frac{1 - b_1}{1 + b_1}}$$

    Every weight vector turns along $-p$ by $\theta$; otherwise as `rotational_sgd`.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      weight_decay: Weight decay $\lambda$, greater than 0.
      b1: Decay of the average of gradients.
      b2: Decay of the average of squared gradients.
      eps: Added to the root, outside of it.
      decay: Decay $\beta$ of `rotate_by_angle`; published is 0.9.
      axes: Which entries form one weight vector, as in `weight_norm`.
      mask: Which arrays turn, as in `rotational_sgd`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, grads = jnp.array([[3.0], [4.0]]), jnp.array([[5.0], [7.0]])
      >>> tx = normax.rotational_adamw(0.1, weight_decay=0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.0324

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_range("b1", b1, low=0, below=1)
    check_range("b2", b2, low=0, below=1)
    check_range("eps", eps, low=0)
    return _rotational(
        "rotational_adamw",
        optax.scale_by_adam(b1, b2, eps),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
        lambda eta: adamw_angle(eta * weight_decay, b1),
        learning_rate,
        weight_decay,
        decay,
        axes,
        mask,
    )


def rotational_lion(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    decay: jax.typing.ArrayLike = 0.0,
    axes: Axes = "unit",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion that turns weight vectors by its equilibrium angle.

    $$p = \operatorname{sign}(b_1 m + (1 - b_1) g), \qquad
    \theta^2 =
    \pi\eta\lambda\,\Big((1 - b_1)^2 + b_1^2\,\frac{1 - b_2}{1 + b_2}\Big)$$

    Every weight vector turns along $-p$ by $\theta$; otherwise as `rotational_sgd`.
    This is the published angle, for $\eta\lambda \to 0$. In equilibrium Lion turns by
    more: 1.03 times at $\eta\lambda = 10^{-3}$, 1.3 at $10^{-2}$, 2.8 at $10^{-1}$.

    Args:
      learning_rate: Learning rate $\eta$, a number or a schedule.
      weight_decay: Weight decay $\lambda$, greater than 0.
      b1: Weight of the average in the update.
      b2: Decay of the average of gradients.
      decay: Decay $\beta$ of `rotate_by_angle`; published is 0.9.
      axes: Which entries form one weight vector, as in `weight_norm`.
      mask: Which arrays turn, as in `rotational_sgd`.

    Returns:
      A gradient transformation that needs `params`.

    Raises:
      ValueError: `axes` does not fit, a number is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> params, grads = jnp.array([[3.0], [4.0]]), jnp.array([[5.0], [7.0]])
      >>> tx = normax.rotational_lion(0.1, weight_decay=0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{normax.angular_update(params, updates)[0]:.4f}")
      0.0210

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_range("b1", b1, low=0, below=1)
    check_range("b2", b2, low=0, below=1)
    return _rotational(
        "rotational_lion",
        optax.scale_by_lion(b1, b2),
        optax.lion(learning_rate, b1, b2, weight_decay=weight_decay),
        lambda eta: lion_angle(eta * weight_decay, b1, b2),
        learning_rate,
        weight_decay,
        decay,
        axes,
        mask,
    )
