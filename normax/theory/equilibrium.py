r"""Where norm and rotation of scale-invariant weights settle under weight decay.

The model is van Laarhoven's (2017, section 4): training has converged, and the
gradient is noise. At $w \in \mathbb R^d$ it is drawn independently at every step,
orthogonal to $w$, in no preferred direction, of length $G / \|w\|$. Its steps
lengthen $w$, decay shortens it, and with $x = \|w\| / \|w\|_\mathrm{eq}$ and the share
$\kappa$ of the norm that decay takes per step in equilibrium,

$$\frac{dx}{dt} = \kappa\,(x^{1-2p} - x^{3-p}) \quad\text{(coupled decay)}, \qquad
\frac{dx}{dt} = \kappa\,(x^{-1} - x) \quad\text{(AdamW)},$$

where $p$ is the power of the rule in $\eta_\mathrm{eff} = \eta/\|w\|^p$.

Where the rule is linear in the gradient, the second moments of weights and velocity
obey a closed linear recursion, whose stationary point is *exact* for every $\eta$ and
$\lambda$, up to fluctuations of $\|w\|$, which vanish as $d$ grows. The adaptive rules
divide by $\sqrt{r_t}$; they are solved to *leading order* in $\kappa$ and to first
order in the noise of $r_t$, with $\epsilon$ neglected. Largest error of norm and
rotation against simulations with $d = 256$:

================== =============================== ==============================
rule               error                           breaks down
================== =============================== ==============================
SGD                exact                           where training diverges
momentum, Nesterov 0.2%                            where training diverges
RMSProp            1% at $\kappa \le 0.1$          8% at $\kappa = 1$, 6% at
                                                   $\rho = 0.5$
Adam               1.5% at $\kappa \le 0.1$        4% at $\kappa = 0.3$, 11% at 1
AdamW              0.5%, once $r_t$ has settled    where training diverges
AdaDelta           5% at $\rho = 0.9$, 4% at 0.95  where $g_i^2$ is near $\epsilon$
normalized SGD     exact
================== =============================== ==============================

AdaGrad has no equilibrium: its accumulator only grows. With weight decay its norm
falls as $t^{-1/6}$ and its rotation as $t^{-1/3}$, for ever.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._core.checks import check_range


class Equilibrium(NamedTuple):
    r"""What has settled.

    Attributes:
      norm: Norm $\|w\|$ of the weight vector.
      rotation: Angle between $w_t$ and $w_{t+1}$, in radians.
      decay_rate: Share $\kappa$ of the norm that weight decay takes per step.
    """

    norm: jax.Array
    rotation: jax.Array
    decay_rate: jax.Array


class Theory(NamedTuple):
    """Equilibrium of an update rule.

    Attributes:
      settle: Called with `learning_rate`, `weight_decay`, `gradient_norm`,
        `dimension` and those hyperparameters of the rule that it names.
      relaxation: Antiderivative of the time, in units of `1 / decay_rate`, as a
        function of the norm over the norm in equilibrium.
      norm_needs: Which of `gradient_norm` and `dimension` the norm depends on.
      rotation_needs: The same for the rotation.
    """

    settle: Callable[..., Equilibrium]
    relaxation: Callable[[jax.Array], jax.Array]
    norm_needs: tuple[str, ...]
    rotation_needs: tuple[str, ...]


def _angle(versine: jax.Array) -> jax.Array:
    """Return the angle whose cosine is `1 - versine`."""
    return 2 * jnp.arcsin(jnp.sqrt(versine / 2))


def _sgd(
    learning_rate, weight_decay, gradient_norm, dimension, momentum, nesterov
) -> Equilibrium:
    r"""SGD, momentum and Nesterov momentum, exact.

    With $\kappa = \eta\lambda$,

    $$\|w\|^4 = \frac{\eta G^2}
    {(1-\rho)\,\big(2\lambda - \eta\lambda^2 / (1+\rho)\big)}, \qquad
    \cos\theta = 1 - \frac{\kappa}{1+\rho}$$

    and for Nesterov momentum, whose weights are an autoregression of order two with
    a moving average of the noise, with $k = 1 - \kappa$ and
    $m = (1+\rho)^2 + \rho^2 (1+\rho k) / (1-\rho k)$,

    $$\|w\|^4 = \frac{\eta G^2\, m}{\lambda\,(1 + k + 2\rho k)}, \qquad
    \cos\theta = 1 - \frac{\kappa}{1+\rho k}
    \Big(1 + \rho(1+\rho)\,\frac{1 + k + 2\rho k}{m}\Big).$$
    """
    del dimension
    rho, decay = momentum, learning_rate * weight_decay
    name = "learning_rate * weight_decay"
    if nesterov:
        check_range(
            f"{name} * (1 + 2 momentum) / (1 + momentum)",
            decay * (1 + 2 * rho) / (1 + rho),
            low=0,
            below=2,
        )
        kept = 1 - decay
        m = (1 + rho) ** 2 + rho**2 * (1 + rho * kept) / (1 - rho * kept)
        pull = 1 + kept + 2 * rho * kept
        square = jnp.sqrt(learning_rate * m / (weight_decay * pull))
        versine = decay * (1 + rho * (1 + rho) * pull / m) / (1 + rho * kept)
    else:
        versine = decay / (1 + rho)
        check_range(f"{name} / (1 + momentum)", versine, low=0, below=2)
        square = jnp.sqrt(learning_rate / (weight_decay * (1 - rho) * (2 - versine)))
    # The square of the norm at G = 1; G^2 could leave the range of float32.
    norm = jnp.sqrt(gradient_norm) * jnp.sqrt(square)
    return Equilibrium(norm, _angle(versine), decay / (1 - rho))


def _noise(b1, b2) -> tuple[Any, Any, Any]:
    r"""Return how noise of $r_t$ changes moments of $u_t = m_t / \sqrt{r_t}$.

    The gradient has independent normal entries of variance 1, so that $r_t$ has mean 1
    and variance $v = 2a / (1 + b_2)$, $a = 1 - b_2$. To first order in $a$,

    $$\mathbb E\,g_j^2\,(r_t r_s)^{-1/2} = 1 - a\,(b_2^{t-j} + b_2^{s-j})
    + \tfrac v4 (3 + b_2^{|t-s|}).$$

    Returns:
      The factors of $\sum_s \mathbb E\,u_t u_s$, of $\mathbb E\,u_t^2$, and of the
      derivative of $\mathbb E\,u_t$ by a constant added to all gradients.
    """
    a = 1 - b2
    variance = 2 * a / (1 + b2)
    kept = a * (1 - b1) / (1 - b1 * b2)
    overlap = (1 - b1) * (1 + b1 * b2) / ((1 + b1) * (1 - b1 * b2))
    diffusion = 1 - 2 * kept + variance * (3 + overlap) / 4
    square = 1 - 2 * a * (1 - b1**2) / (1 - b1**2 * b2) + variance
    return diffusion, square, 1 - kept + 3 * variance / 8


def _adam(learning_rate, weight_decay, gradient_norm, dimension, b1, b2) -> Equilibrium:
    r"""Adam with coupled decay, to leading order in $\kappa$ and first in $1 - b_2$.

    $$\|w\|^3 = \frac{\eta \sqrt d\, G}{2\lambda} \frac{D}{R}, \qquad
    \kappa^3 = \frac{(\eta^2 \lambda d\, R)^2 D}{2 G^2}, \qquad
    \theta^2 = 2\kappa\, \frac{1-b_1}{1+b_1} \frac{U}{D}$$

    with the factors $D$, $U$, $R$ of `_noise`, which are 1 as $b_2 \to 1$.
    """
    diffusion, square, response = _noise(b1, b2)
    # Roots before products, which could leave the range of float32.
    rate, pull = jnp.cbrt(learning_rate), jnp.cbrt(weight_decay)
    push = jnp.cbrt(jnp.sqrt(dimension) * gradient_norm / 2 * diffusion / response)
    share = jnp.cbrt(dimension * response) / jnp.cbrt(gradient_norm)
    decay = (rate**2 * pull * share) ** 2 * jnp.cbrt(diffusion / 2)
    rotation = jnp.sqrt(2 * decay * (1 - b1) / (1 + b1) * square / diffusion)
    return Equilibrium(rate * push / pull, rotation, decay)


def _rmsprop(
    learning_rate, weight_decay, gradient_norm, dimension, decay
) -> Equilibrium:
    """RMSProp: Adam without momentum."""
    return _adam(
        learning_rate, weight_decay, gradient_norm, dimension, b1=0.0, b2=decay
    )


def _adadelta(
    learning_rate, weight_decay, gradient_norm, dimension, rho, eps
) -> Equilibrium:
    r"""AdaDelta, to leading order in $\kappa$ and $1 - \rho$.

    Both accumulators forget at the same rate, so the noise of their ratio is of higher
    order. Without $\epsilon$ the ratio would fall by $2(1-\rho)^2$ per step; with it,
    $\mathbb E\,u^2 + \epsilon$ settles at

    $$\epsilon\,\Big(1 + \frac{1}{2(1-\rho)}\Big),$$

    in about $(1-\rho)^{-2}$ steps, provided that the entries of the gradient are large
    beside $\sqrt\epsilon$. Its root times $\eta$ is the length of a step, as $\eta$ is
    Adam's.
    """
    length = jnp.sqrt(eps * (1 + 0.5 / (1 - rho)))
    return _adam(
        learning_rate * length, weight_decay, gradient_norm, dimension, b1=0.0, b2=1.0
    )


def _adamw(
    learning_rate, weight_decay, gradient_norm, dimension, b1, b2
) -> Equilibrium:
    r"""AdamW, exact in $\kappa = \eta\lambda$ and to first order in $1 - b_2$.

    With $\beta = (1-\kappa)\,b_1$ and the factors of `_noise`,

    $$\|w\|^2 = \frac{\eta d}{\lambda\,(2 - \kappa)}\,
    \frac{(1-b_1)(1+\beta)}{(1+b_1)(1-\beta)}\, D, \qquad
    \cos\theta = 1 - \kappa\,\frac{1-b_1}{1+\beta}\,\frac UD.$$
    """
    del gradient_norm
    decay = learning_rate * weight_decay
    check_range("learning_rate * weight_decay", decay, low=0, below=2)
    diffusion, square, _ = _noise(b1, b2)
    beta = (1 - decay) * b1
    memory = (1 - b1) * (1 + beta) / ((1 + b1) * (1 - beta))
    norm = learning_rate * dimension / (weight_decay * (2 - decay)) * memory * diffusion
    versine = decay * (1 - b1) / (1 + beta) * square / diffusion
    return Equilibrium(jnp.sqrt(norm), _angle(versine), decay)


def _normalized_sgd(
    learning_rate, weight_decay, gradient_norm, dimension
) -> Equilibrium:
    r"""SGD on the unit sphere without momentum, exact.

    $$\|w\| = 1, \qquad \tan\theta = \frac{\eta G}{1 - \eta\lambda}$$

    The norm is 1 at once.
    """
    del dimension
    rotation = jnp.arctan2(
        learning_rate * gradient_norm, 1 - learning_rate * weight_decay
    )
    ones = jnp.ones_like(rotation)
    return Equilibrium(ones, rotation, jnp.inf * ones)


def _newton(learning_rate, weight_decay, gradient_norm, dimension) -> Equilibrium:
    r"""Newton's method, whose steps are proportional to $\|w\|$, like the decay.

    $$\|w\| \to 0, \qquad \tan\theta = \eta G$$

    with $G$ the length of the Newton step $\|H^{-1} \nabla L\|$ at $\|w\| = 1$, taken
    to be orthogonal to $w$. The norm is that of converged training, $G \to 0$: noise
    multiplies it by $((1-\eta\lambda)^2 + \eta^2 G^2)^{1/2}$ per step, which must be
    below 1. It never comes within 10% of 0. Without decay the norm only grows.
    """
    del dimension
    norm = jnp.where(weight_decay > 0, 0.0, jnp.inf)
    return Equilibrium(
        norm, jnp.arctan(learning_rate * gradient_norm), jnp.zeros_like(norm)
    )


def _inside(x: jax.Array) -> jax.Array:
    r"""Return $\min(x, 1/x)$, whose powers do not overflow."""
    return jnp.minimum(x, 1 / jnp.maximum(x, 1))


def _relaxation_of_power(power: int) -> Callable[[jax.Array], jax.Array]:
    r"""Return $\int dx / (x^{1-n} - x)$, for $\|w\|^n$ that relaxes exponentially.

    $$-\tfrac1n \log|1 - x^n| = -\tfrac1n \log(1 - x^{-n}) - \log x \quad (x > 1)$$
    """
    return lambda x: (
        -jnp.log1p(-(_inside(x) ** power)) / power - jnp.log(jnp.maximum(x, 1))
    )


def _adaptive_relaxation(x: jax.Array) -> jax.Array:
    r"""Return $\int dx / (x^{-1} - x^2)$, for coupled rules of power one.

    $$\tfrac16 \log(1 + x + x^2) - \tfrac13 \log|1 - x|
    - \tfrac{1}{\sqrt3} \arctan \tfrac{2x+1}{\sqrt3}$$

    where the logarithms are the same at $x$ and $1/x$.
    """
    root, y = jnp.sqrt(3.0), _inside(x)
    return (
        jnp.log1p(y + y**2) / 6
        - jnp.log1p(-y) / 3
        - jnp.arctan((2 * x + 1) / root) / root
    )


def steps_to_equilibrium(
    theory: Theory, ratio: jax.Array, decay_rate: jax.Array
) -> jax.Array:
    r"""Return the steps in which the norm comes from `ratio` to within 10% of 1.

    $$t = \big(F(x_1) - F(x_0)\big) / \kappa, \qquad x_1 = 0.9 \text{ or } 1.1.$$
    """
    target = jnp.where(ratio < 1, 0.9, 1.1)
    start = jnp.where(jnp.abs(ratio - 1) < 0.1, target, ratio)
    return (theory.relaxation(target) - theory.relaxation(start)) / decay_rate


_BOTH = ("gradient_norm", "dimension")

SGD = Theory(_sgd, _relaxation_of_power(4), ("gradient_norm",), ())
RMSPROP = Theory(_rmsprop, _adaptive_relaxation, _BOTH, _BOTH)
ADADELTA = Theory(_adadelta, _adaptive_relaxation, _BOTH, _BOTH)
ADAM = Theory(_adam, _adaptive_relaxation, _BOTH, _BOTH)
ADAMW = Theory(_adamw, _relaxation_of_power(2), ("dimension",), ())
NORMALIZED_SGD = Theory(
    _normalized_sgd, _relaxation_of_power(2), (), ("gradient_norm",)
)
NEWTON = Theory(_newton, _relaxation_of_power(2), (), ("gradient_norm",))
