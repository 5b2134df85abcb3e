r"""Rates of one training run from those of another, by the angles of its weights.

At the fraction $x$ of the run let $\theta(x)$ be the angle per step, and $\kappa$ the
share that weights forget at it. The run has $T$ steps with batches of $B$. The target
has

$$\theta'(x) = \theta(x), \qquad \kappa'(x) = \frac{B'}{B}\,\kappa(x), \qquad
\kappa'(x) = \frac{T}{T'}\,\kappa(x)$$

where the angle is kept, the number of examples in which weights are forgotten, or the
fraction of the run. The learning rates follow by the inverse of the whole run. Weight
decay only moves the norm. So it is chosen such that the norm takes the source's course.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
import optax

from normax._core.checks import nearest
from normax.theory.rules import UPDATE_RULES
from normax.theory.settings import ROTATIONAL, Setting, sample

Keep = Literal["run", "examples", "angle"]


class Transfer(NamedTuple):
    r"""Result of `transfer`.

    Attributes:
      learning_rate: Schedule of the target.
      weight_decay: Its weight decay, a number or a schedule; None for hyperball.
      angles: Angles of its steps in radians, of shape (steps,).
      timescale: Steps $1/\kappa$ in which weights forget their
        direction, of shape (steps,); infinite where the angle is 0.
      statements: What is kept, and what cannot be.
    """

    learning_rate: optax.Schedule
    weight_decay: optax.ScalarOrSchedule | None
    angles: np.ndarray
    timescale: np.ndarray
    statements: tuple[str, ...]


def transfer(source: Setting, target: Setting, keep: Keep = "run") -> Transfer:
    r"""Rates of the target whose weights turn and forget as those of the source.

    $$\kappa'(x)\,T' = \kappa(x)\,T, \qquad \theta^2 = c^2\kappa$$

    at the fraction $x$ of the run, with the share $\kappa = 1/\tau$ of their direction
    that weights forget per step. Two rules keep it and the angle $\theta$ together only
    where their $c$ agree. Numbers may not be traced. Derivation and measured accuracy:
    docs/which_rate.md.

    Args:
      source: Setting whose rates are known.
      target: Setting without a learning rate. Weight decay may be given; it changes
        the norms alone.
      keep: `"run"`: the fraction of the run in which weights are forgotten, so that
        the batch rule is that of the square root. `"examples"`: the number of examples
        in which they are. `"angle"`: the angle per step.

    Returns:
      A `Transfer`.

    Raises:
      ValueError: The source has no rates or the target has one, a rule forgets nothing
        or at no known pace, or no rate of the target turns weights so far.

    Examples:
      >>> import normax
      >>> Setting, sizes = normax.theory.Setting, dict(initial_norm=1.0, dimension=64)
      >>> source = Setting(
      ...     rule="adamw", steps=4000, learning_rate=0.01, weight_decay=0.1, **sizes
      ... )
      >>> target = Setting(rule="adamw", steps=1000, batch_size=4, **sizes)
      >>> found = normax.theory.transfer(source, target)
      >>> [f"{found.learning_rate(500):.4f}", f"{found.weight_decay:.4f}"]
      ['0.0201', '0.2000']
      >>> print(found.statements[0])
      kept: the fraction of the run in which weights forget

    References:
      Wang, Aitchison, How to set AdamW's weight decay as you scale model and dataset
      size, 2024, arXiv:2405.13698.
    """
    if keep not in get_args(Keep):
        names = ", ".join(map(repr, get_args(Keep)))
        raise ValueError(
            f"keep must be one of {names}, got {keep!r}; "
            f"{nearest(keep, get_args(Keep), 'choose one of these.')}"
        )
    if target.learning_rate is not None:
        raise ValueError(
            "the learning rate of the target is what transfer finds, but it is "
            f"{target.learning_rate!r}; leave it out, or exchange the two settings."
        )
    noise = np.sqrt(source.batch_size / target.batch_size)
    if target.gradient_norm is None:
        profile = 1.0 if source.gradient_norm is None else source.gradient_norm
        if np.ndim(profile):
            profile = _stretched(profile, target.steps)
        target = dataclasses.replace(target, gradient_norm=noise * profile)
    turned = source.angles()
    if not (np.isfinite(turned).all() and turned.any()):
        raise ValueError(
            "the source must turn weights by finite angles, but its largest one is "
            f"{np.max(turned):.3g}, at learning_rate={source.learning_rate!r}; pass a "
            "positive rate, or a schedule of finite rates."
        )
    peak = float(np.max(turned))
    if keep == "angle":
        angles = _stretched(turned, target.steps)
        peaks = Peaks(
            peak, float(source.shares(peak)), peak, float(target.shares(peak))
        )
    else:
        faster = source.steps / target.steps
        if keep == "examples":
            faster = target.batch_size / source.batch_size
        shares = faster * source.shares(turned)
        angles = target.turns(_stretched(shares, target.steps))
        most = float(np.max(shares))
        peaks = Peaks(peak, most / faster, float(target.turns(most)), most)
    if target.rule != "hyperball" and target.weight_decay is None:
        target = dataclasses.replace(
            target, weight_decay=_weight_decay(source, target, peaks)
        )
    rates = target.rates(angles)
    with np.errstate(divide="ignore"):
        timescale = 1 / target.shares(angles)
    return Transfer(
        _schedule(rates),
        target.weight_decay,
        angles,
        timescale,
        _statements(source, target, keep, peaks),
    )


class Peaks(NamedTuple):
    """The largest angle of the source, what is forgotten at it, and the target's."""

    angle: float
    share: float
    target_angle: float
    target_share: float


def _schedule(values: np.ndarray) -> optax.Schedule:
    """Return the values as a schedule that keeps the last."""
    table = jnp.asarray(values)
    return lambda count: table[jnp.clip(count, 0, len(table) - 1)]


def _stretched(values: Any, steps: int) -> np.ndarray:
    """Return the values at the same fractions of a run of other length."""
    values = np.asarray(values)
    new, old = ((np.arange(n) + 0.5) / n for n in (steps, len(values)))
    return np.interp(new, old, values).astype(values.dtype)


def _weight_decay(
    source: Setting, target: Setting, peaks: Peaks
) -> optax.ScalarOrSchedule:
    r"""Return the decay under which the norm takes the course of the source's.

    Norm over initial norm in equilibrium is that of the source, and $\kappa$ changes
    as at the largest angles. A source on a sphere settles where it starts.
    """
    norm, share, decays = source.initial_norm, peaks.share, np.zeros(0)
    if source.rule != "hyperball":
        decays = sample(source.decay(), source.steps)
    if target.rule in ROTATIONAL:
        if not decays.any():
            raise ValueError(
                f"{target.rule} turns by its weight_decay, and the source has none to "
                "take over; pass weight_decay in the target."
            )
        return float(np.max(decays))
    if source.rule in UPDATE_RULES:
        if not decays.any():
            return 0.0
        rates = sample(source.rate(), source.steps)
        norm, share = source.powers().settled(np.max(rates), np.max(decays))
    norm = norm / source.initial_norm * target.initial_norm
    share = share * peaks.target_share / peaks.share
    found = float(target.powers().rates(norm, share)[1])
    if not callable(source.weight_decay) or source.rule in ROTATIONAL:
        return found
    curve = _stretched(decays, target.steps) * (found / np.max(decays))
    return _schedule(curve)


def _statements(
    source: Setting, target: Setting, keep: str, peaks: Peaks
) -> tuple[str, ...]:
    """Return what is kept and what is not."""
    steps = peaks.share / peaks.target_share
    amounts = {
        "angle": ("angle per step", peaks.target_angle / peaks.angle),
        "run": (
            "fraction of the run in which weights forget",
            steps * source.steps / target.steps,
        ),
        "examples": (
            "number of examples in which weights forget",
            steps * target.batch_size / source.batch_size,
        ),
    }
    lines = [f"kept: the {amounts.pop(keep)[0]}"]
    for name, amount in amounts.values():
        if abs(amount - 1) < 5e-3:
            lines.append(f"kept: the {name}")
        else:
            lines.append(f"not kept: the {name} is {amount:.2f} times the source's")
    same = float(target.turns(peaks.share))
    if abs(same / peaks.angle - 1) > 5e-3:
        lines.append(
            f"to forget as fast as {source.rule} at {peaks.angle:.3g} radians per "
            f"step, {target.rule} turns by {same:.3g}: only one of both can be kept"
        )
    if target.rule in UPDATE_RULES and UPDATE_RULES[target.rule].norm_power == 2:
        lines.append(
            f"the rates of {target.rule} are for a gradient norm of "
            f"{target.norm():.3g}: arrays with another one turn by other angles"
        )
    return tuple(lines)
