r"""What the learning rate of hyperball means: an angle per step.

In units of $R$ a step goes from the unit vector $\hat w$ to $\hat w - \eta\hat u$ and
back to the sphere. With $c = \langle\hat u, \hat w\rangle$ the new vector has the
component $\eta\sqrt{1 - c^2}$ across $\hat w$, and $1 - \eta c$ along it.

Momentum makes $c$ negative: $\hat u$ holds earlier steps, and $\hat w$ holds them with
the other sign. Let gradients be noise that is orthogonal to $\hat w$, in a high
dimension. Then $\langle\hat u_t, \hat w_t\rangle = \beta\langle\hat u_{t-1},
\hat w_t\rangle$ for an average of gradients that decays by $\beta$. In the plane of
$\hat w_t$ and $\hat w_{t+1}$ this is $\cos\phi = \beta\cos(\phi + \theta)$, with
$\cos\phi = c$ and the angle $\theta$ of the step, which gives all formulas here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from normax._core.checks import check_range
from normax._core.norms import at_least_float32, nonzero

# Newton's steps double the digits, and the first has a few.
_STEPS = 8


def hyperball_angle(
    learning_rate: jax.typing.ArrayLike, correlation: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    r"""Angle by which `hyperball` turns a weight vector in one step.

    $$\tan\theta = \frac{\eta\sqrt{1 - c^2}}{1 - \eta c}, \qquad
    c = \langle N(u), N(w)\rangle$$

    This is exact. For small $\eta$ it is $\eta$, unless the direction is nearly radial.

    Args:
      learning_rate: Learning rate $\eta$, at least 0.
      correlation: Cosine $c$ of the angle between the direction and the weights; the
        one that momentum makes is `hyperball_correlation`.

    Returns:
      Angles in radians, in the common shape of the arguments, in float32 or better.

    Raises:
      ValueError: An argument is out of range.

    Examples:
      >>> import normax
      >>> print(f"{normax.theory.hyperball_angle(0.5):.4f}")
      0.4636

    References:
      Wen et al., From Weight Decay to Hyperball Optimization, 2025, part 1.
    """
    check_range("learning_rate", learning_rate, low=0)
    check_range("correlation", correlation, low=-1, below=1 + 1e-6)
    eta, c = jnp.broadcast_arrays(*at_least_float32(learning_rate, correlation))
    return jnp.arctan2(eta * jnp.sqrt(jnp.maximum((1 - c) * (1 + c), 0)), 1 - eta * c)


def hyperball_correlation(
    learning_rate: jax.typing.ArrayLike, momentum: jax.typing.ArrayLike
) -> jax.Array:
    r"""Correlation of directions and weights that momentum makes under `hyperball`.

    $$c\,\sqrt{1 - 2\eta c + \eta^2} = \beta\,(c - \eta), \qquad
    c \approx -\frac{\beta\eta}{1 - \beta}$$

    once the average of gradients, which are noise, is full: after some
    $1 / (1 - \beta)$ steps. The angle per step is `hyperball_angle(learning_rate, c)`.

    Args:
      learning_rate: Learning rate $\eta$, at least 0.
      momentum: Decay $\beta$ of the average of gradients, Adam's `b1` for instance, in
        $[0, 1)$; it may not be Nesterov's.

    Returns:
      Correlations in $[-1, 0]$, in the common shape of the arguments, in float32 or
      better.

    Raises:
      ValueError: An argument is out of range.

    Examples:
      >>> import normax
      >>> print(f"{normax.theory.hyperball_correlation(0.01, momentum=0.9):.4f}")
      -0.0892

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_range("learning_rate", learning_rate, low=0)
    check_range("momentum", momentum, low=0, below=1)
    eta, beta = jnp.broadcast_arrays(*at_least_float32(learning_rate, momentum))
    # The function is concave and rises, and here it is not positive: Newton's method
    # comes nearer from this side, and never passes.
    c = jnp.maximum(-1, -beta * eta / (1 - beta))
    for _ in range(_STEPS):
        length = jnp.hypot(eta - c, jnp.sqrt((1 - c) * (1 + c)))
        slope = length - eta * c / length - beta
        c = jnp.maximum(-1, c - (c * (length - beta) + beta * eta) / nonzero(slope))
    return c


def hyperball_learning_rate(
    angle: jax.typing.ArrayLike, momentum: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    r"""Learning rate with which `hyperball` turns weight vectors by a wanted angle.

    $$\eta = \frac{\sin\theta\,\sqrt{1 - 2\beta\cos\theta + \beta^2}}
    {\cos\theta - \beta}$$

    For the angle of a rule with decay, `UpdateRule.equilibrium_rotation`, it is the
    rate that takes that rule's place: to leading order
    $\eta_\text{hyperball} = \theta = \sqrt{2\eta\lambda(1-\beta)/(1+\beta)}$ for AdamW.

    Args:
      angle: Angle $\theta$ in radians per step, at least 0. Momentum cannot turn
        weights by $\arccos\beta$ or more, at any rate.
      momentum: Decay $\beta$ of the average of gradients, as in
        `hyperball_correlation`.

    Returns:
      Learning rates, in the common shape of the arguments, in float32 or better.

    Raises:
      ValueError: An argument is out of range.

    Examples:
      >>> import normax
      >>> angle = normax.UPDATE_RULES["adamw"].equilibrium_rotation(1e-3, 0.1)
      >>> print(f"{normax.theory.hyperball_learning_rate(angle, momentum=0.9):.6f}")
      0.003246

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    check_range("angle", angle, low=0)
    check_range("momentum", momentum, low=0, below=1)
    theta, beta = jnp.broadcast_arrays(*at_least_float32(angle, momentum))
    share = theta / jnp.arccos(beta)
    check_range("angle / arccos(momentum)", share, low=0, below=1)
    versine = 2 * jnp.sin(theta / 2) ** 2
    length = jnp.sqrt((1 - beta) ** 2 + 2 * beta * versine)
    return jnp.sin(theta) * length / (1 - beta - versine)
