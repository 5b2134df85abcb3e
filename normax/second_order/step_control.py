"""How far a step goes, and how much the next one is damped."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SMALLEST_PART = 2.0**-20  # of a step
_SLOPE = 1e-2  # A step must bring this part of the decrease that the slope promises.


class _Trial(NamedTuple):
    part: jax.Array  # of the step
    after: jax.Array  # loss after this part
    whole: jax.Array  # loss after the entire step


def backtrack(
    loss: Callable[[jax.Array], jax.Array],
    before: jax.Array,
    slope: jax.Array,
    rounding: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Halve the step until the loss, a function of the part that is taken, decreases.

    Increases up to `rounding` do not count.

    Returns:
      The part of the step to take, which is 0 if no part decreases the loss, and the
      loss after the entire step.
    """
    one = jnp.ones_like(slope)
    # The part counts as a constant. So nothing that the loss depends on, closed over
    # or not, is differentiated through the loop.
    loss, consts = jax.closure_convert(loss, one)
    before, slope, rounding, *consts = jax.lax.stop_gradient(
        [before, slope, rounding, *consts]
    )

    def fails(part: jax.Array, after: jax.Array) -> jax.Array:
        return ~(after <= before + _SLOPE * part * slope + rounding)

    def halve(now: _Trial) -> _Trial:
        part = now.part / 2
        after = loss(part, *consts)
        return _Trial(part, after, jnp.where(part == 1, after, now.whole))

    unknown = jnp.full_like(before, jnp.nan)
    last = jax.lax.while_loop(
        lambda now: fails(now.part, now.after) & (now.part > _SMALLEST_PART),
        halve,
        _Trial(2 * one, unknown, unknown),
    )
    # If the loss was NaN before the step, `0 * before` is NaN too, and shows it.
    part = jnp.where(fails(last.part, last.after), 0 * before, last.part)
    return part, last.whole


def adapt_damping(
    damping: jax.Array, change: jax.Array, predicted: jax.Array, rounding: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Change the damping by how well the model predicts the change of the loss.

    Damping stays as it is where the rounding of the loss hides the prediction.

    Returns:
      Damping of the next step, and the ratio $\rho$ of the two changes.
    """
    seen = ~(jnp.abs(predicted) <= rounding)
    ratio = jnp.where(seen, change / jnp.where(seen, predicted, 1), 1)
    trusted = (ratio >= 0.25) & (predicted < 0)
    factor = jnp.where(trusted, jnp.where(ratio > 0.75, 2 / 3, 1), 1.5)
    dtype = damping.dtype
    next_damping = damping * jnp.where(seen, factor, 1).astype(dtype)
    return next_damping, jax.lax.stop_gradient(ratio.astype(dtype))
