"""What measurements of an array mean: findings, worst first."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from normax.inspection.measure import Measured

SEVERITIES = ("error", "warning", "note")

# Norms that change by more than this factor in the second half of a run still drift.
_DRIFT = 4.0
# The same between the only two checkpoints. The first may be the start.
_DRIFT_OF_TWO = 10.0
# Above this share of entries that did not change, rounding undoes the steps.
_LOST = 0.5


class Finding(NamedTuple):
    """One thing that is wrong, or may be meant.

    Attributes:
      severity: `"error"`: training is broken. `"warning"`: a part of the network does
        not train as it should. `"note"`: it may be meant.
      kind: What it is, in one word of fixed meaning.
      array: Path of the array.
      evidence: What was measured.
      meaning: What it means.
      action: What to do.
    """

    severity: str
    kind: str
    array: str
    evidence: str
    meaning: str
    action: str


Found = tuple[str, str, str, str]  # severity, evidence, meaning, action


def _at(step: int | None) -> str:
    return "in the checkpoint" if step is None else f"at step {step}"


def _count(part: int, whole: int) -> str:
    return f"all {whole}" if part == whole else f"{part} of {whole}"


def _at_last(found: Measured) -> str:
    """Name the last step that holds the array."""
    return _at(found.steps[found.present[-1]])


def _at_the_end(found: Measured) -> str:
    """Name the last interval between two steps that hold the array."""
    first, last = found.comparable[-2:]
    if last - first == 1 and last == len(found.steps) - 1:
        return "between the last checkpoints"
    return f"between steps {found.steps[first]} and {found.steps[last]}"


def _is_start(found: Measured) -> bool:
    """Return whether nothing was seen but the step before training."""
    return [found.steps[i] for i in found.present] == [0]


def _shape_changed(found: Measured) -> Found | None:
    if found.changed is None:
        return None
    before, first = (found.steps[i] for i in (found.changed, found.comparable[0]))
    return (
        "note",
        f"its shape was {found.shapes[found.changed]} {_at(before)} and is "
        f"{found.shape} from step {first} on",
        "it is another array from there on: what is said of it concerns the last shape",
        "if the checkpoints are of different models, inspect those of one (--steps)",
    )


def _not_finite(found: Measured) -> Found | None:
    if not found.not_finite.any():
        return None
    first = int(np.flatnonzero(found.not_finite)[0])
    count, size = int(found.not_finite[first]), math.prod(found.shapes[first] or ())
    return (
        "error",
        f"{_count(count, size)} entries are NaN or infinite "
        f"{_at(found.steps[first])}, the first that has them",
        "the outputs are NaN or infinite too, and no later step mends it",
        "go back to the checkpoint before; lower the learning rate there, or clip "
        "gradients",
    )


def _zero_vectors(found: Measured) -> Found | None:
    if not found.zero_vectors or not found.has_vectors or _is_start(found):
        return None
    every = found.zero_vectors == found.vectors
    return (
        "error" if every else "warning",
        f"{_count(found.zero_vectors, found.vectors)} weight vectors are 0 "
        f"{_at_last(found)}",
        "their units give nothing but their bias"
        + (", and the layer passes nothing on" if every else ""),
        "look for a gradient of 0, a mask, or a decay that is too large; rows of "
        "padding may be meant",
    )


def _frozen_gain(found: Measured) -> Found | None:
    if not found.only_ones or found.has_vectors or _is_start(found):
        return None
    if found.has_master or not found.shape:
        return None
    evidence = f"all {found.shape[0]} entries are exactly 1 in {found.dtype}"
    if found.is_half:
        return (
            "warning",
            f"{evidence} {_at_last(found)}; a step below {found.half_unit:.2g} "
            "is rounded away there",
            "the gain has never moved from its initialization",
            "keep the parameters in float32 (param_dtype=jnp.float32) and compute in "
            f"{found.dtype} (dtype)",
        )
    return (
        "note",
        f"{evidence} {_at_last(found)}",
        "the gain has never moved from its initialization",
        "if it is to be trained, see that the optimizer gets it and its gradient is "
        "not 0",
    )


def _of_last_shape(found: Measured, values: np.ndarray) -> np.ndarray:
    """Return the known ones of an array's intervals, since it has its last shape."""
    values = values[found.comparable[0] :]
    return values[np.isfinite(values)]


def _unchanged(found: Measured) -> np.ndarray:
    return _of_last_shape(found, found.unchanged)


def _frozen(found: Measured) -> Found | None:
    known, held = _unchanged(found), found.comparable
    if not known.size or not (known == 1).all() or found.has_master:
        return None
    if found.only_ones and not found.has_vectors:
        return None  # a frozen gain
    between = f"steps {found.steps[held[0]]} to {found.steps[held[-1]]}"
    which = "" if len(held) == len(found.steps) else " that hold it so"
    return (
        "warning",
        f"every entry is the same in all {len(held)} checkpoints{which}, {between}",
        "it is as it was in the first of them: no step and no decay has reached it",
        "see that the optimizer gets this array, and that no mask or stop_gradient "
        "holds it; if it is frozen on purpose, all is well",
    )


def _no_gradient(found: Measured) -> Found | None:
    angles, held = _of_last_shape(found, found.largest_angle), found.comparable
    if not found.has_vectors or not angles.size or (_unchanged(found) == 1).all():
        return None
    first, last = (found.steps[held[i]] for i in (0, -1))
    steps = 1 if first is None or last is None else last - first
    # What rounding at every step adds up to, for independent errors.
    noise = 4 * found.half_unit * max(steps, 1) ** 0.5
    if found.is_half or angles.max() > noise:
        return None
    ratio = found.norm[held[-1]] / found.norm[held[0]]
    return (
        "warning",
        f"no vector turned by more than {angles.max():.1g} rad; norms changed by the "
        f"factor {ratio:.3g}",
        "only decay acts on it: no gradient arrives",
        "see that the loss depends on this array; a dead layer or a stop_gradient "
        "before it are the usual causes",
    )


def _quiet_vectors(found: Measured) -> Found | None:
    quiet = found.quiet_vectors
    if not quiet or not found.has_vectors or _rounded_away(found):
        return None
    return (
        "warning",
        f"{_count(quiet, found.vectors)} weight vectors turned by less than a "
        f"thousandth of the median {_at_the_end(found)}",
        "no gradient reaches them: units that are dead, or rows that no data use",
        "for units, lower the learning rate or use an activation with a slope on "
        "both sides; rows of tokens that never occur can be left out",
    )


def _rounded_away(found: Measured) -> Found | None:
    known = _unchanged(found)
    if not found.is_half or found.has_master or not known.size:
        return None
    share = known[-1]
    if share <= _LOST or (known == 1).all():
        return None
    return (
        "warning",
        f"{share:.0%} of the entries did not change {_at_the_end(found)}; "
        f"half a unit in the last place of {found.dtype} is at least "
        f"{found.half_unit:.2g} of an entry",
        "most steps are rounded away",
        "keep the parameters in float32 and compute in half precision; copies of "
        "float32 parameters are no worse for it",
    )


def _drift(found: Measured) -> Found | None:
    held = found.comparable
    norms = found.norm[held]
    if not found.has_vectors or norms.size < 2 or norms[-1] == 0:
        return None
    middle = (norms.size - 1) // 2
    start = norms[middle]
    limit = _DRIFT if norms.size > 2 else _DRIFT_OF_TWO
    if start == 0 or 1 / limit <= norms[-1] / start <= limit:
        return None
    grows = norms[-1] > start
    first = found.steps[held[middle]] if norms.size > 2 else None
    return (
        "warning",
        f"the norm {'grew' if grows else 'shrank'} from {start:.3g} to "
        f"{norms[-1]:.3g}" + ("" if first is None else f" after step {first}"),
        "behind normalization the effective learning rate "
        + ("falls with it: training slows down" if grows else "rises with it"),
        "decay the weights or project them (normax.project_unit_norm)"
        if grows
        else "lower the weight decay, or see what pulls the weights to 0",
    )


_CHECKS: dict[str, Callable[[Measured], Found | None]] = {
    "not_finite": _not_finite,
    "shape_changed": _shape_changed,
    "zero_vectors": _zero_vectors,
    "frozen_gain": _frozen_gain,
    "frozen": _frozen,
    "no_gradient": _no_gradient,
    "quiet_vectors": _quiet_vectors,
    "rounded_away": _rounded_away,
    "norm_drift": _drift,
}


def findings_of(found: Measured) -> Iterator[Finding]:
    """Yield what is wrong with an array, without knowing how it was trained."""
    for kind, check in _CHECKS.items():
        result = check(found)
        if result is not None:
            severity, *words = result
            yield Finding(severity, kind, found.name, *words)
        if kind == "not_finite" and result is not None:
            return  # nothing else can be said of it


def decay_finding(found: Measured, decay: float) -> Finding | None:
    """Return what rounding does to weight decay, in precision below float32's.

    Args:
      found: What was measured.
      decay: Share of the weights that decay takes per step.
    """
    if found.has_master or not found.has_vectors or not 0 < decay < found.half_unit:
        return None
    return Finding(
        "warning",
        "decay_rounded_away",
        found.name,
        f"decay takes {decay:.2g} of an entry per step; {found.dtype} rounds away "
        f"what is below {found.half_unit:.2g}",
        "weight decay alone changes no entry",
        "keep the parameters in float32, or decay rarely and by more; copies of "
        "float32 parameters are no worse for it",
    )


def step_finding(found: Measured, angle: float) -> Finding | None:
    """Return what rounding does to steps that turn the vectors by an angle."""
    if found.has_master or not found.is_half or not found.has_vectors:
        return None
    if not angle < found.half_unit:
        return None
    return Finding(
        "warning",
        "step_rounded_away",
        found.name,
        f"a step changes an entry by about {angle:.2g} of itself; {found.dtype} rounds "
        f"away what is below {found.half_unit:.2g}",
        "most entries do not change in most steps",
        "keep the parameters in float32, or round stochastically; copies of float32 "
        "parameters are no worse for it",
    )
