r"""The norm and the angle of scale-invariant weights over a whole run, and the inverse.

A linear step (`moments`) closes in three second moments of weights and memory,
$$\mathbb E\,\|w\|^2, \qquad \mathbb E\,\langle w, m\rangle, \qquad
\mathbb E\,\|m\|^2.$$
So a scan over three numbers a vector follows any schedule. They are kept as lengths,
whose squares may leave float32. Derivation and accuracy: docs/theory/theory.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._core.norms import at_least_float32, hypotenuse, nonzero
from normax.theory.moments import Averages, Coefficients, Moments, Now, Step

Schedule = Callable[[jax.Array], Any]


class Prediction(NamedTuple):
    """Result of `UpdateRule.predict`: what each step of a run starts from and does.

    Attributes:
      weight_norm: Norms of the weight vectors before the step, root mean squares, of
        shape (steps, ...).
      angular_update: Angles in radians by which the step turns them.
      effective_learning_rate: Learning rates over the power of the norm that the rule
        has, as of `UpdateRule.effective_learning_rate`.
    """

    weight_norm: jax.Array
    angular_update: jax.Array
    effective_learning_rate: jax.Array


def as_schedule(value: Any) -> Schedule:
    """Return a number as a schedule, and a schedule as it is."""
    return value if callable(value) else lambda count: value


class _State(NamedTuple):
    """The memory is m = along w + t, with t orthogonal to w."""

    norm: jax.Array  # the root of E |w|^2
    along: jax.Array
    tangent: jax.Array  # the root of E |t|^2
    past_rate: jax.Array
    averages: Averages


class _Map(NamedTuple):
    """A step in orthogonal vectors: w' and m' have parts along w, t, g and a rest."""

    weights: Coefficients
    memory: Coefficients
    rest: Any

    def across(self, state: _State, gradient: jax.Array) -> jax.Array:
        """Return the length of the part of w' that is orthogonal to w."""
        _, moved, new = self.weights
        return hypotenuse(moved * state.tangent, new * gradient, self.rest)

    def advance(
        self, state: _State, gradient: jax.Array, eta: Any, averages: Averages
    ) -> _State:
        """Return the second moments of w' and m'."""
        lengths = state.norm, state.tangent, gradient
        (a, b, c), (f, g, h) = self.weights, self.memory
        parts = [x * length for x, length in zip(self.weights, lengths, strict=True)]
        kept = [x * length for x, length in zip(self.memory, lengths, strict=True)]
        norm = hypotenuse(*parts, self.rest)
        # Compilers make one division of two, by a square that may leave float32.
        per_norm = 1 / nonzero(norm)
        # Lagrange's identity: |m'|^2 |w'|^2 - <w', m'>^2 without a difference of both.
        share = state.norm * per_norm
        tangent = hypotenuse(
            (a * g - b * f) * state.tangent * share,
            (a * h - c * f) * gradient * share,
            (b * h - c * g) * gradient * (state.tangent * per_norm),
            hypotenuse(*kept) * (self.rest * per_norm),
        )
        products = zip(parts, kept, strict=True)
        along = sum(x * per_norm * (y * per_norm) for x, y in products)
        return _State(norm, along, tangent, eta, averages)


def _map(moments: Moments, step: Step, state: _State, eta: Any) -> _Map:
    """Return the step at a learning rate, with m replaced by its two parts."""
    u_w, u_m, u_g = step.direction
    f_w, f_m, f_g = step.memory
    if moments.holds_rates:
        moved, f_w, f_g = u_m, -eta * f_w, -eta * f_g
    else:
        moved = -eta * u_m
    return _Map(
        (1 - step.decay - eta * u_w + moved * state.along, moved, -eta * u_g),
        (f_w + f_m * state.along, f_m, f_g),
        eta * step.rest,
    )


def _rate_of_angle(state: _State, step: Step, gradient: Any, angle: Any) -> jax.Array:
    r"""Return the rate at which a step turns w by an angle.

    The step is $\eta T$ across w and $-(\delta + \eta q)\|w\|$ along it, so
    $\tan\theta = \eta T / (\|w\| - \delta\|w\| - \eta q \|w\|)$.
    """
    u_w, u_m, u_g = step.direction
    unit = _Map((u_w, u_m, u_g), step.memory, step.rest)
    tangent = unit.across(state, gradient) / state.norm
    slope = jnp.tan(angle)
    return (1 - step.decay) * slope / (tangent + slope * (u_w + u_m * state.along))


class Run(NamedTuple):
    """What predictions share: the model of the gradient, and the rule."""

    moments: Moments
    hyperparameters: dict[str, Any]
    steps: int
    initial_norm: Any
    gradient_norm: Any
    dimension: Any

    def follow(
        self, weight_decay: Schedule, learning_rate: Schedule | None, angle: Any = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return norms, angles and rates of all steps, by the rate or by the angle."""
        sides, structure = jax.tree.flatten(self.dimension)
        norm, profile, *sides = at_least_float32(
            self.initial_norm, self.gradient_norm, *sides
        )
        shapes = (side.shape for side in sides)
        shape = jnp.broadcast_shapes(norm.shape, profile.shape[1:], *shapes)
        sides = [jnp.broadcast_to(side, shape) for side in sides]
        dimension = jax.tree.unflatten(structure, sides)
        norm = jnp.broadcast_to(norm, shape)
        profile = jnp.broadcast_to(profile, (self.steps, *profile.shape[1:]))

        def step(state, inputs):
            count, gradient_norm = inputs
            size = nonzero(state.norm)  # decay may end at 0
            gradient = gradient_norm / size
            now = Now(
                count + 1,
                jnp.asarray(weight_decay(count), norm.dtype),
                state.norm,
                state.along,
                state.tangent,
                gradient,
                dimension,
                state.past_rate,
            )
            averages, step = self.moments.step(
                state.averages, now, **self.hyperparameters
            )
            if learning_rate is None:
                eta = _rate_of_angle(state, step, gradient, angle(count))
            else:
                eta = jnp.asarray(learning_rate(count), norm.dtype)
            step = _map(self.moments, step, state, eta)
            tangent = step.across(state, gradient) / size
            kept = step.weights[0]
            # What is left of weights that vanish has no angle, and may be -0.
            turned = jnp.arctan2(tangent, jnp.where(kept == 0, 0, kept))
            new = step.advance(state, gradient, eta, averages)
            if self.moments.projects:
                new = new._replace(norm=jnp.ones(shape), along=new.along * new.norm)
            new = jax.tree.map(
                lambda x: jnp.broadcast_to(x, shape).astype(norm.dtype), new
            )
            return new, (state.norm, turned, jnp.broadcast_to(eta, shape))

        begin, zero = self.moments.begin(**self.hyperparameters), jnp.zeros(())
        start = jax.tree.map(
            lambda x: jnp.broadcast_to(x, shape).astype(norm.dtype),
            _State(norm, zero, zero, zero, begin),
        )
        counts = jnp.arange(self.steps, dtype=jnp.int32)  # as the counts of optax
        return jax.lax.scan(step, start, (counts, profile))[1]
