r"""Learning rates in closed form: schedules, and the optimum on quadratics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._core.checks import check_positive, check_range
from normax._core.norms import at_least_float32, nonzero


def exponential_equivalent_schedule(
    learning_rate: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike = 0.0,
) -> optax.Schedule:
    r"""Growing learning rate that does without weight decay what decay does.

    $$\eta_t = \frac{\eta}{a_t\, a_{t+1}}, \qquad a_0 = 1, \quad a_1 = 1 - \eta\lambda,
    \quad a_{t+1} = (1 + \rho - \eta\lambda)\,a_t - \rho\,a_{t-1}$$

    On a scale-invariant loss, the run without decay visits the same functions at every
    step. For $\rho = 0$, $\eta_t = \eta\,(1-\eta\lambda)^{-(2t+1)}$. In float32 it is
    infinite beyond $e^{88}\eta$. Derivation and rounding: docs/theory/theory.md.

    Args:
      learning_rate: Constant learning rate $\eta$ of the run with decay, positive.
      weight_decay: Its weight decay $\lambda$, coupled.
      momentum: Its momentum $\rho$, as in `optax.sgd`; it may not be Nesterov's.

    Returns:
      A schedule: step count to learning rate, in float32 or better.

    Raises:
      ValueError: An argument is out of range, or $\eta\lambda \ge (1-\sqrt\rho)^2$.

    Examples:
      >>> import normax
      >>> schedule = normax.theory.exponential_equivalent_schedule(0.5, 0.2)
      >>> [round(float(schedule(t)), 4) for t in range(3)]
      [0.5556, 0.6859, 0.8468]

    References:
      van Laarhoven, 2017, arXiv:1706.05350, section 3.1, for the scaling law.
    """
    check_positive("learning_rate", learning_rate)
    check_range("weight_decay", weight_decay, low=0)
    check_range("momentum", momentum, low=0, below=1)
    given = learning_rate, weight_decay, momentum
    dtype = at_least_float32(*given)[0].dtype
    known = not any(isinstance(value, jax.core.Tracer) for value in given)
    # Near the limit of the decay, rounding to float32 would leave nothing of the
    # difference of the roots. Known numbers are therefore computed in float64.
    xp: Any = np if known else jnp
    eta, lam, rho = xp.broadcast_arrays(
        *(xp.asarray(value, np.float64 if known else dtype) for value in given)
    )
    decay = eta * lam
    check_range(
        "learning_rate * weight_decay / (1 - sqrt(momentum))**2",
        decay * ((1 + rho**0.5) / (1 - rho)) ** 2,
        low=0,
        below=1,
    )
    # This is (r_+ - r_-)^2. The root of rho would have no derivative at 0.
    discriminant = (1 - rho - decay) ** 2 - 4 * rho * decay
    if known:
        # Below the limit only rounding makes it negative.
        discriminant = np.maximum(discriminant, 0)
    width = xp.sqrt(discriminant)
    root = (1 - decay + rho + width) / 2
    slow = 2 * decay / (1 - rho + decay + width)
    small = xp.minimum(slow, 0.5)
    log_root = xp.where(slow < 0.5, xp.log1p(-small), xp.log(root))
    ratio = rho / root**2
    # This is 1 - ratio. It stays below 1, so that the power 0 of the ratio 0 is 1.
    gap = xp.minimum(width / root, 1 - jnp.finfo(dtype).eps)
    eta, log_root, share, gap, log_ratio = (
        jnp.asarray(constant, dtype)
        for constant in (eta, log_root, slow * ratio, gap, xp.log1p(-gap))
    )

    def schedule(count):
        t = jnp.asarray(count, dtype)

        def transient(t):
            # This is a_t / r_+^t = 1 + (1 - r_+) (ratio + ... + ratio^t).
            terms = -jnp.expm1(t * log_ratio) / nonzero(gap)
            return 1 + share * jnp.where(gap == 0, t, terms)

        growth = jnp.exp(-(2 * t + 1) * log_root)
        return eta * growth / (transient(t) * transient(t + 1))

    return schedule


def harmonic_schedule(
    init_value: jax.typing.ArrayLike,
    transition_steps: jax.typing.ArrayLike,
    offset: jax.typing.ArrayLike,
) -> optax.Schedule:
    r"""Learning rate that falls like the inverse of time.

    $$\eta_t = \frac{\eta}{t / N + c}$$

    Args:
      init_value: Numerator $\eta$, positive: the rate where $t / N + c = 1$.
      transition_steps: Steps $N$ in which the denominator grows by one, positive.
      offset: Denominator $c$ at the start, positive. The rate halves in $cN$ steps.

    Returns:
      A schedule: step count to learning rate, in float32 or better.

    Raises:
      ValueError: An argument is not positive.

    Examples:
      >>> import normax
      >>> schedule = normax.theory.harmonic_schedule(1.0, 100, offset=10)
      >>> [round(float(schedule(t)), 4) for t in (0, 100, 1000)]
      [0.1, 0.0909, 0.05]

    References:
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture).
    """
    check_positive("init_value", init_value)
    check_positive("transition_steps", transition_steps)
    check_positive("offset", offset)

    def schedule(count):
        numbers = at_least_float32(init_value, count, transition_steps, offset)
        value, t, steps, start = jnp.broadcast_arrays(*numbers)
        return value / (t / steps + start)

    return schedule


def optimal_momentum(
    smallest_curvature: jax.typing.ArrayLike, largest_curvature: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    r"""Learning rate and momentum with which heavy ball solves quadratics fastest.

    $$\eta = \Big(\frac{2}{\sqrt\mu + \sqrt L}\Big)^2, \qquad
    \rho = \Big(\frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu}\Big)^2$$

    for a Hessian with eigenvalues in $[\mu, L]$. After many steps, each step of
    `optax.sgd(η, momentum=ρ)` shrinks the error by $\sqrt\rho$.

    Args:
      smallest_curvature: Smallest eigenvalue $\mu$ of the Hessian, positive.
      largest_curvature: Largest eigenvalue $L$, at least $\mu$.

    Returns:
      Learning rate and momentum, in the arguments' common shape, float32 or better.

    Raises:
      ValueError: The curvatures are not positive, or in the wrong order.

    Examples:
      >>> import normax
      >>> learning_rate, momentum = normax.theory.optimal_momentum(1.0, 9.0)
      >>> float(learning_rate), float(momentum)
      (0.25, 0.25)

    References:
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture).
    """
    check_positive("smallest_curvature", smallest_curvature)
    check_positive("largest_curvature", largest_curvature)
    check_range(
        "largest_curvature / smallest_curvature",
        largest_curvature / smallest_curvature,
        low=1,
    )
    low, high = jnp.broadcast_arrays(
        *at_least_float32(smallest_curvature, largest_curvature)
    )
    low, high = jnp.sqrt(low), jnp.sqrt(high)
    return (2 / (low + high)) ** 2, ((high - low) / (high + low)) ** 2
