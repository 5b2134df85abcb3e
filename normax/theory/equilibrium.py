r"""Where norm and rotation of scale-invariant weights settle under weight decay.

The model is van Laarhoven's (2017, section 4): the gradient is noise, orthogonal to $w$
and of length $G / \|w\|$. Its steps lengthen $w$, and decay shortens it. Derivations,
accuracy and limits: docs/theory/theory.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from normax._core.checks import check_range
from normax.theory.moments import noise_of_root, settled_steps
from normax.theory.orthogonalization import DEGREE, orthogonalized


class Equilibrium(NamedTuple):
    """What has settled."""

    norm: jax.Array
    # The angle between w before and after a step, in radians.
    rotation: jax.Array
    # The share of the norm that weight decay takes per step, kappa.
    decay_rate: jax.Array


class NoEquilibriumError(ValueError):
    """The norm settles nowhere."""


class Theory(NamedTuple):
    """Equilibrium of an update rule."""

    # It takes learning_rate, weight_decay, gradient_norm, dimension and the
    # hyperparameters that the rule marks as in_theory, all by name.
    settle: Callable[..., Equilibrium]
    # It is the antiderivative of the time, in units of 1 / decay_rate, as a function of
    # the norm over the norm in equilibrium.
    relaxation: Callable[[jax.Array], jax.Array]
    # They say which of gradient_norm and dimension the results depend on.
    norm_needs: tuple[str, ...]
    rotation_needs: tuple[str, ...]


def _angle(versine: jax.Array) -> jax.Array:
    """Return the angle whose cosine is `1 - versine`."""
    return 2 * jnp.arcsin(jnp.sqrt(versine / 2))


def _sgd(
    learning_rate, weight_decay, gradient_norm, dimension, momentum, nesterov
) -> Equilibrium:
    """SGD, momentum and Nesterov momentum, exact."""
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
    # G multiplies at the end, because G^2 could leave the range of float32.
    norm = jnp.sqrt(gradient_norm) * jnp.sqrt(square)
    return Equilibrium(norm, _angle(versine), decay / (1 - rho))


def _adaptive(learning_rate, weight_decay, gradient_norm, dimension, b1, noise):
    r"""Coupled decay under a root mean square, to leading order in $\kappa$."""
    diffusion, square, response = noise
    # Roots are taken before products, which could leave the range of float32.
    rate, pull = jnp.cbrt(learning_rate), jnp.cbrt(weight_decay)
    push = jnp.cbrt(jnp.sqrt(dimension) * gradient_norm / 2 * diffusion / response)
    share = jnp.cbrt(dimension * response) / jnp.cbrt(gradient_norm)
    decay = (rate**2 * pull * share) ** 2 * jnp.cbrt(diffusion / 2)
    rotation = jnp.sqrt(2 * decay * (1 - b1) / (1 + b1) * square / diffusion)
    return Equilibrium(rate * push / pull, rotation, decay)


def _adam(
    learning_rate, weight_decay, gradient_norm, dimension, b1, b2, eps
) -> Equilibrium:
    r"""Adam with coupled decay, to leading order in $\kappa$ and first in $1 - b_2$."""
    del eps
    model = learning_rate, weight_decay, gradient_norm, dimension
    return _adaptive(*model, b1, noise_of_root(b1, b2))


def _rmsprop(
    learning_rate, weight_decay, gradient_norm, dimension, decay, eps
) -> Equilibrium:
    """RMSProp: Adam without momentum."""
    model = learning_rate, weight_decay, gradient_norm, dimension
    return _adam(*model, b1=0.0, b2=decay, eps=eps)


def _adadelta(
    learning_rate, weight_decay, gradient_norm, dimension, rho, eps
) -> Equilibrium:
    r"""AdaDelta, to leading order in $\kappa$."""
    # Epsilon makes the accumulators settle, and so sets the length of a step.
    length = learning_rate * jnp.sqrt(eps * settled_steps(rho))
    model = length, weight_decay, gradient_norm, dimension
    return _adaptive(*model, 0.0, (1.0, 1.0, 1.0))


def _adamw(
    learning_rate, weight_decay, gradient_norm, dimension, b1, b2, eps
) -> Equilibrium:
    r"""AdamW, exact in $\kappa = \eta\lambda$ and to first order in $1 - b_2$."""
    del gradient_norm, eps
    decay = learning_rate * weight_decay
    check_range("learning_rate * weight_decay", decay, low=0, below=2)
    diffusion, square, _ = noise_of_root(b1, b2)
    beta = (1 - decay) * b1
    memory = (1 - b1) * (1 + beta) / ((1 + b1) * (1 - beta))
    norm = learning_rate * dimension / (weight_decay * (2 - decay)) * memory * diffusion
    versine = decay * (1 - b1) / (1 + beta) * square / diffusion
    return Equilibrium(jnp.sqrt(norm), _angle(versine), decay)


def _of_steps(square: jax.Array, decay: jax.Array, overlap: jax.Array) -> Equilibrium:
    r"""Return where steps of constant length settle whose decay is decoupled.

    `square` is $\|\Delta w\|^2/\kappa$, and `overlap` is
    $\sum_{j \ge 1} (1-\kappa)^{j-1} c_j$ with the correlations $c_j$ of steps.
    """
    spread = 1 + 2 * (1 - decay) * overlap
    versine = decay - (2 - decay) * decay * overlap / spread
    return Equilibrium(jnp.sqrt(square / (2 - decay) * spread), _angle(versine), decay)


def _lion(learning_rate, weight_decay, gradient_norm, dimension, b1, b2) -> Equilibrium:
    r"""Lion, exact in $\kappa = \eta\lambda$, with signs by linear response.

    A sign is $\sqrt{2/\pi}\,c / \sigma_c$ and a rest, where $c$ is Lion's average of
    gradients. The averages overlap, so that steps of different times do too.
    """
    del gradient_norm
    decay = learning_rate * weight_decay
    check_range("learning_rate * weight_decay", decay, low=0, below=2)
    kept, linear = 1 - decay, 2 / jnp.pi
    memory = (1 - b2) / (1 + b2)
    length = b1**2 * memory + (1 - b1) ** 2
    overlap = b1 * (b1 * b2 * memory + (1 - b1) * (1 - b2))
    overlap = linear * overlap / (length * (1 - kept * b2))
    return _of_steps(learning_rate / weight_decay * dimension, decay, overlap)


def _muon(
    learning_rate,
    weight_decay,
    gradient_norm,
    dimension,
    ns_coeffs,
    ns_steps,
    beta,
    eps,
    nesterov,
    consistent_rms=None,
) -> Equilibrium:
    r"""Muon, exact in $\kappa = \eta\lambda$ but for how steps overlap.

    Orthogonalized momenta of correlation $c$ overlap as $c$ in their linear part, and
    as $c^n$ in the rest.
    """
    del gradient_norm, eps
    decay = learning_rate * weight_decay
    check_range("learning_rate * weight_decay", decay, low=0, below=2)
    linear2, rest2 = orthogonalized(dimension, ns_coeffs, ns_steps, consistent_rms)
    length2 = linear2 + rest2
    memory = (1 - beta) / (1 + beta)
    old, new = beta, 1 - beta
    if nesterov:
        old, new = beta**2, 1 - beta**2
    # The correlation of c with that of the step before; then it falls as beta^j.
    near = old * (beta * old * memory + new * (1 - beta))
    near = near / (old**2 * memory + new**2)
    kept = 1 - decay
    overlap = linear2 / length2 * near / (1 - kept * beta)
    overlap += rest2 / length2 * near**DEGREE / (1 - kept * beta**DEGREE)
    return _of_steps(learning_rate / weight_decay * length2, decay, overlap)


def _adafactor(
    learning_rate,
    weight_decay,
    gradient_norm,
    dimension,
    min_dim_size_to_factor,
    decay_rate,
    multiply_by_parameter_scale,
    clipping_threshold,
    momentum,
    eps,
    factored,
) -> Equilibrium:
    r"""Adafactor with absolute steps, exact in $\kappa = \lambda$ after a long time."""
    del gradient_norm, min_dim_size_to_factor, decay_rate, eps, factored
    if multiply_by_parameter_scale:
        raise NoEquilibriumError(
            "UPDATE_RULES['adafactor'] has an equilibrium only with "
            "multiply_by_parameter_scale=False, but it is "
            f"{multiply_by_parameter_scale}: steps are in proportion to the norm, "
            "which grows or falls for ever; pass False, or predict the run."
        )
    check_range("weight_decay", weight_decay, low=0, below=2)
    threshold = 1.0 if clipping_threshold is None else clipping_threshold
    length = learning_rate * jnp.minimum(1.0, threshold)
    overlap = momentum / (1 - (1 - weight_decay) * momentum)
    memory = (1 - momentum) / (1 + momentum)
    # Decay is no part of the learning rate, as in optax.
    square = length**2 / weight_decay * dimension * memory
    return _of_steps(square, weight_decay, overlap)


def _normalized_sgd(
    learning_rate, weight_decay, gradient_norm, dimension, axes
) -> Equilibrium:
    """SGD on the unit sphere without momentum, exact. The norm is 1 at once."""
    del dimension, axes
    rotation = jnp.arctan2(
        learning_rate * gradient_norm, 1 - learning_rate * weight_decay
    )
    ones = jnp.ones_like(rotation)
    return Equilibrium(ones, rotation, jnp.inf * ones)


def _newton(learning_rate, weight_decay, gradient_norm, dimension) -> Equilibrium:
    """Newton's method. Its steps are proportional to the norm, and so is its decay."""
    del dimension
    norm = jnp.where(weight_decay > 0, 0.0, jnp.inf)
    return Equilibrium(
        norm, jnp.arctan(learning_rate * gradient_norm), jnp.zeros_like(norm)
    )


def _inside(x: jax.Array) -> jax.Array:
    r"""Return $\min(x, 1/x)$, whose powers do not overflow."""
    return jnp.minimum(x, 1 / jnp.maximum(x, 1))


def _relaxation_of_power(power: int) -> Callable[[jax.Array], jax.Array]:
    r"""Return $\int dx / (x^{1-n} - x)$, for $\|w\|^n$ that relaxes exponentially."""
    return lambda x: (
        -jnp.log1p(-(_inside(x) ** power)) / power - jnp.log(jnp.maximum(x, 1))
    )


def _adaptive_relaxation(x: jax.Array) -> jax.Array:
    r"""Return $\int dx / (x^{-1} - x^2)$, for coupled rules of power one."""
    # The logarithms are the same at x and 1/x.
    root, y = jnp.sqrt(3.0), _inside(x)
    return (
        jnp.log1p(y + y**2) / 6
        - jnp.log1p(-y) / 3
        - jnp.arctan((2 * x + 1) / root) / root
    )


def steps_to_equilibrium(
    theory: Theory, ratio: jax.Array, decay_rate: jax.Array
) -> jax.Array:
    r"""Return the steps in which the norm comes from `ratio` to within 10% of 1."""
    target = jnp.where(ratio < 1, 0.9, 1.1)
    start = jnp.where(jnp.abs(ratio - 1) < 0.1, target, ratio)
    return (theory.relaxation(target) - theory.relaxation(start)) / decay_rate


_BOTH = ("gradient_norm", "dimension")

SGD = Theory(_sgd, _relaxation_of_power(4), ("gradient_norm",), ())
RMSPROP = Theory(_rmsprop, _adaptive_relaxation, _BOTH, _BOTH)
ADADELTA = Theory(_adadelta, _adaptive_relaxation, _BOTH, _BOTH)
ADAM = Theory(_adam, _adaptive_relaxation, _BOTH, _BOTH)
ADAMW = Theory(_adamw, _relaxation_of_power(2), ("dimension",), ())
LION = Theory(_lion, _relaxation_of_power(2), ("dimension",), ())
MUON = Theory(_muon, _relaxation_of_power(2), ("dimension",), ("dimension",))
ADAFACTOR = Theory(_adafactor, _relaxation_of_power(2), ("dimension",), ())
NORMALIZED_SGD = Theory(
    _normalized_sgd, _relaxation_of_power(2), (), ("gradient_norm",)
)
NEWTON = Theory(_newton, _relaxation_of_power(2), (), ("gradient_norm",))
