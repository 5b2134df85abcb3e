r"""One step of each update rule on the second moments of weights and memory.

A rule keeps a memory $m$ of past gradients, and the gradient $g$ is noise that is
orthogonal to $w$ and independent of all before. Then a step is linear,

$$w' = w - \eta\,(u_w w + u_m m + u_g g + e), \qquad m' = f_w w + f_m m + f_g g,$$

with coefficients that are known numbers: what a rule divides by is an average over many
entries. $e$ is what is independent of all three. Roots of second moments are kept,
since squares of small or large gradients leave float32. Derivation:
docs/theory/theory.md.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._core.norms import hypotenuse, nonzero, square_root
from normax.theory.orthogonalization import DEGREE, orthogonalized

Coefficients = tuple[Any, Any, Any]  # of w, of m, of g


class Now(NamedTuple):
    """What a rule knows at a step; lengths are roots of second moments."""

    time: jax.Array  # 1 at the first step
    weight_decay: jax.Array
    norm: jax.Array  # of w
    along: jax.Array  # p, where m = p w + t with t orthogonal to w
    tangent: jax.Array  # the length of t
    gradient: jax.Array  # the length of g: G / |w|
    dimension: Any  # a number; for rules on matrices the pair of rows and columns
    past_rate: jax.Array  # the learning rate of the step before

    @property
    def memory(self) -> jax.Array:
        """Return the length of m."""
        return hypotenuse(self.along * self.norm, self.tangent)


class Step(NamedTuple):
    """The coefficients of a step."""

    direction: Coefficients
    memory: Coefficients = (0.0, 0.0, 0.0)
    rest: Any = 0.0  # the length of e
    # The share of w that the step takes whatever the learning rate is.
    decay: Any = 0.0


# Adafactor's steps have at least the length of those from weights of this size.
SMALLEST_SCALE = 1e-3

# What a rule remembers besides m: roots of averages of squares, in an order of its own.
Averages = Any


class Moments(NamedTuple):
    """An update rule on second moments.

    Both functions take the hyperparameters that count, by name.
    """

    begin: Callable[..., Averages]
    step: Callable[..., tuple[Averages, Step]]
    # Whether w' is put back on the unit sphere.
    projects: bool = False
    # Whether m holds steps, past rates included: w' = w + u_m m - eta (u_w w + u_g g)
    # and m' = f_m m - eta (f_w w + f_g g).
    holds_rates: bool = False
    needs_dimension: bool = True
    # Whether the rule divides the decay too, entry by entry. Without a gradient such
    # decay is no multiple of w, which turns.
    divides_decay: bool = False
    # Whether decay is no part of the learning rate.
    decays_apart: bool = False

    @property
    def hyperparameters(self) -> frozenset[str]:
        """Names of the hyperparameters that count."""
        parameters = inspect.signature(self.step).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def noise_of_root(b1: Any, b2: Any) -> tuple[Any, Any, Any]:
    r"""Return the factors D, U, R by which noise of $r_t$ changes moments.

    They are of first order in $1 - b_2$. For $u_t = m_t / \sqrt{r_t}$, D is that of
    $\sum_s \mathbb E\,u_t u_s$ and U that of $\mathbb E\,u_t^2$. R is that of the
    response to a constant added to all gradients.
    """
    a = 1 - b2
    variance = 2 * a / (1 + b2)
    kept = a * (1 - b1) / (1 - b1 * b2)
    overlap = (1 - b1) * (1 + b1 * b2) / ((1 + b1) * (1 - b1 * b2))
    diffusion = 1 - 2 * kept + variance * (3 + overlap) / 4
    square = 1 - 2 * a * (1 - b1**2) / (1 - b1**2 * b2) + variance
    return diffusion, square, 1 - kept + 3 * variance / 8


def _average(share: Any, old: Any, new: Any) -> jax.Array:
    """Return the root of the average of squares, with a share of the old one."""
    return hypotenuse(jnp.sqrt(share) * old, jnp.sqrt(1 - share) * new)


def _entry(now: Now, coupled: bool) -> jax.Array:
    """Return the root mean square of an entry of the gradient that the rule sees."""
    decay = now.weight_decay * now.norm if coupled else 0.0
    return hypotenuse(now.gradient, decay) / jnp.sqrt(now.dimension)


def _nothing(**hyperparameters: Any) -> Averages:
    del hyperparameters
    return ()


def _sgd(averages: Averages, now: Now, *, momentum: Any, nesterov: Any):
    """Momentum as optax has it: the rate multiplies the whole velocity."""
    decay, rho = now.weight_decay, momentum
    if nesterov:
        direction = (decay * (1 + rho), rho**2, 1 + rho)
    else:
        direction = (decay, rho, 1.0)
    return averages, Step(direction, (decay, rho, 1.0))


def _adagrad_begin(*, initial_accumulator_value: Any, eps: Any) -> Averages:
    del eps
    return jnp.sqrt(jnp.asarray(initial_accumulator_value, float))


def _adagrad(averages: Averages, now: Now, *, initial_accumulator_value: Any, eps: Any):
    del initial_accumulator_value
    total = hypotenuse(averages, _entry(now, coupled=True))
    scale = 1 / nonzero(hypotenuse(total, jnp.sqrt(eps)))
    return total, Step((scale * now.weight_decay, 0.0, scale))


def _rmsprop_begin(*, initial_scale: Any, **hyperparameters: Any) -> Averages:
    del hyperparameters
    return jnp.sqrt(jnp.asarray(initial_scale, float)), jnp.zeros(())


def _rmsprop(
    averages: Averages,
    now: Now,
    *,
    decay: Any,
    eps: Any,
    initial_scale: Any,
    eps_in_sqrt: Any,
    centered: Any,
    momentum: Any,
    nesterov: Any,
    bias_correction: Any,
):
    """RMSProp; its velocity, unlike that of SGD, holds past rates."""
    del initial_scale
    if centered and not (isinstance(momentum, float) and momentum == 0):
        raise ValueError(
            "the prediction of UPDATE_RULES['rmsprop'] is not known for centered=True "
            f"with momentum={momentum}; leave one of them at its default."
        )
    square, mean = averages
    # Without the mean, neither decay nor a constant change what the rule divides by.
    square = _average(decay, square, _entry(now, coupled=not centered))
    mean = hypotenuse(decay * mean, (1 - decay) * _entry(now, coupled=False))
    kept = 1 - decay**now.time if bias_correction else 1.0
    spread = square / jnp.sqrt(kept)
    if centered:
        removed = mean / kept
        spread = square_root(spread - removed) * jnp.sqrt(spread + removed)
    root = hypotenuse(spread, jnp.sqrt(eps)) if eps_in_sqrt else spread + eps
    root = nonzero(root)
    diffusion, _, response = noise_of_root(0.0, decay)
    if centered:
        # Steps follow the mean, since its removal makes their common scale larger.
        alike = jnp.sqrt(diffusion + 2 * (1 - decay)) - jnp.sqrt(diffusion)
        pull = (response + 1 - decay) * now.weight_decay / root
        push = (jnp.sqrt(diffusion) + alike * (1 - decay)) / root
        memory = (0.0, decay, (1 - decay) / root)
        return (square, mean), Step((pull, alike * decay, push), memory)
    pull, push = response * now.weight_decay / root, jnp.sqrt(diffusion) / root
    rho, ahead = momentum, 1 + momentum if nesterov else 1.0
    direction = (ahead * pull, rho**2 if nesterov else rho, ahead * push)
    return (square, mean), Step(direction, (pull, rho, push))


def settled_steps(rho: Any) -> Any:
    r"""Return AdaDelta's settled $\mathbb E\,u^2 / \epsilon$, where $g^2 \gg \epsilon$.

    It is $1 / 2a$ to leading order in $a = 1 - \rho$. The other terms are fitted to a
    simulation of one entry, within 0.5% for $0.01 \le a \le 0.2$.
    """
    a = 1 - rho
    return 1 / (2 * a) + 2.5 - 9 * a / (1 + 7.7 * a)


def _adadelta_begin(**hyperparameters: Any) -> Averages:
    del hyperparameters
    return jnp.zeros(()), jnp.zeros(())


def _adadelta(averages: Averages, now: Now, *, rho: Any, eps: Any):
    r"""AdaDelta, whose steps settle where $\epsilon$ balances noise of their size."""
    square, length = averages
    entry = _entry(now, coupled=True)
    square = _average(rho, square, entry)
    settled, root = settled_steps(rho), jnp.sqrt(eps)
    scale = hypotenuse(length, root) / nonzero(hypotenuse(square, root))
    scale = jnp.sqrt(settled / (1 + settled)) * scale
    length = _average(rho, length, scale * entry)
    return (square, length), Step((scale * now.weight_decay, 0.0, scale))


def _adam_begin(**hyperparameters: Any) -> Averages:
    del hyperparameters
    return jnp.zeros(())


def _adam_with(coupled: bool) -> Callable[..., tuple[Averages, Step]]:
    def step(
        averages: Averages,
        now: Now,
        *,
        b1: Any,
        b2: Any,
        eps: Any,
        eps_root: Any,
        nesterov: Any,
    ):
        square = _average(b2, averages, _entry(now, coupled))
        root = square / jnp.sqrt(1 - b2**now.time)
        root = nonzero(hypotenuse(root, jnp.sqrt(eps_root)) + eps)
        diffusion, _, response = noise_of_root(b1, b2)
        push = jnp.sqrt(diffusion)
        pull = response * now.weight_decay if coupled else 0.0
        memory = ((1 - b1) * pull, b1, (1 - b1) * push)
        if nesterov:
            old = b1 / (1 - b1 ** (now.time + 1))
            new = (1 - b1) / (1 - b1**now.time)
        else:
            old, new = 1 / (1 - b1**now.time), 0.0
        u_w = (old * memory[0] + new * pull) / root
        u_m = old * memory[1] / root
        u_g = (old * memory[2] + new * push) / root
        if not coupled:
            u_w = now.weight_decay
        return square, Step((u_w, u_m, u_g), memory)

    return step


def _lion(averages: Averages, now: Now, *, b1: Any, b2: Any):
    r"""Lion, where a sign is $\sqrt{2/\pi}\,c / \sigma_c$ and a rest."""
    length = hypotenuse(b1 * now.memory, (1 - b1) * now.gradient)
    linear2 = 2 / jnp.pi
    slope = jnp.sqrt(linear2 * now.dimension) / nonzero(length)
    direction = (now.weight_decay, slope * b1, slope * (1 - b1))
    rest = jnp.sqrt(now.dimension * (1 - linear2)) * (length > 0)
    return averages, Step(direction, (0.0, b2, 1 - b2), rest=rest)


def _adafactor(
    averages: Averages,
    now: Now,
    *,
    min_dim_size_to_factor: Any,
    decay_rate: Any,
    multiply_by_parameter_scale: Any,
    clipping_threshold: Any,
    momentum: Any,
    eps: Any,
    factored: Any,
):
    r"""Adafactor; its velocity holds past rates, and its decay is apart from them."""
    square, noise = averages
    entry = now.gradient / jnp.sqrt(now.dimension)
    newest = hypotenuse(entry, jnp.sqrt(eps))
    new = now.time ** -jnp.asarray(decay_rate, entry.dtype)
    past = jnp.sqrt(1 - new) * square
    square = hypotenuse(past, jnp.sqrt(new) * newest)
    divisor = nonzero(square)
    own = new * (newest / divisor) ** 2
    noise = (past / divisor) ** 4 * noise + own**2
    # E g^2 / r for normal entries, to first order, and exact where g^2 is all of r.
    shrinkage = 1 / (1 + 2 * own - 2 * noise)
    if factored:
        # Smaller arrays cannot be factored. Rows and columns average the noise away.
        whole = now.dimension < min_dim_size_to_factor**2
        shrinkage = jnp.where(whole, shrinkage, 1.0)
    push = jnp.sqrt(shrinkage) / divisor
    if clipping_threshold is not None:
        length = push * entry
        push = push / jnp.maximum(1.0, length / clipping_threshold)
    if multiply_by_parameter_scale:
        scale = now.norm / jnp.sqrt(now.dimension)
        push = push * jnp.maximum(scale, SMALLEST_SCALE)
    step = (0.0, momentum, (1 - momentum) * push)
    return (square, noise), Step(step, step, decay=now.weight_decay)


def _muon_begin(**hyperparameters: Any) -> Averages:
    del hyperparameters
    return jnp.zeros(()), jnp.zeros(()), jnp.zeros(())


def _muon(
    averages: Averages,
    now: Now,
    *,
    ns_coeffs: Any,
    ns_steps: Any,
    beta: Any,
    eps: Any,
    nesterov: Any,
    consistent_rms: Any = None,
):
    r"""Muon, where an orthogonalized matrix is linear in c and a rest of degree n.

    The rests of two steps are alike by the n-th power of the correlation of their c. So
    w keeps $\mathbb E\,\langle w, N\rangle$ with the unit rest N of m, one more number.
    """
    kept, pushed, decay = averages
    alike = (1 - now.past_rate * decay) * kept - now.past_rate * pushed
    old, new = beta, (1 - beta) / (1 - beta**now.time)
    if nesterov:
        after = beta / (1 - beta ** (now.time + 1))
        old, new = beta * after, new + (1 - beta) * after
    remembered, fresh = old * now.memory, new * now.gradient
    length = nonzero(hypotenuse(remembered, fresh))
    share = length / (length + eps)
    linear2, rest2 = orthogonalized(
        now.dimension, ns_coeffs, ns_steps, consistent_rms, share
    )
    moves = (remembered > 0) | (fresh > 0)
    memory, gradient = beta * now.memory, (1 - beta) * now.gradient
    per_length, per_after = 1 / length, 1 / nonzero(hypotenuse(memory, gradient))
    slope, rest = jnp.sqrt(linear2) * per_length, square_root(rest2) * moves
    both = memory * per_after * (remembered * per_length)
    both += gradient * per_after * (fresh * per_length)
    pull = rest * alike * (remembered * per_length) ** DEGREE
    # The rest is orthogonal to m, but not to w: its parts along w and along t.
    # Compilers make one division of two, by a square that may leave float32.
    per_norm, per_tangent = 1 / nonzero(now.norm), 1 / nonzero(now.tangent)
    radial, across = pull * per_norm, -pull * (now.along * per_tangent)
    rest_across = square_root(rest**2 - radial**2 - across**2)
    averages = (
        (memory * per_after) ** DEGREE * alike,
        rest * both**DEGREE,
        now.weight_decay,
    )
    direction = (
        now.weight_decay + radial * per_norm - across * (now.along * per_tangent),
        slope * old + across * per_tangent,
        slope * new,
    )
    return averages, Step(direction, (0.0, beta, 1 - beta), rest=rest_across)


def _newton(averages: Averages, now: Now):
    """Newton's step is proportional to the norm, and so is its noise."""
    return averages, Step((now.weight_decay, 0.0, now.norm**2))


SGD = Moments(_nothing, _sgd, needs_dimension=False)
NORMALIZED_SGD = SGD._replace(projects=True)
ADAGRAD = Moments(_adagrad_begin, _adagrad, divides_decay=True)
RMSPROP = Moments(_rmsprop_begin, _rmsprop, holds_rates=True, divides_decay=True)
ADADELTA = Moments(_adadelta_begin, _adadelta, divides_decay=True)
ADAM = Moments(_adam_begin, _adam_with(coupled=True), divides_decay=True)
ADAMW = Moments(_adam_begin, _adam_with(coupled=False))
LION = Moments(_nothing, _lion)
MUON = Moments(_muon_begin, _muon)
ADAFACTOR = Moments(_adadelta_begin, _adafactor, holds_rates=True, decays_apart=True)
NEWTON = Moments(_nothing, _newton, needs_dimension=False)
