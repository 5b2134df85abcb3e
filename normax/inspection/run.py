"""Inspect a run: read its checkpoints, measure, and say what is wrong."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console

from normax._core.axes import Axes
from normax.inspection.checkpoints import Run, UnreadableError, open_run
from normax.inspection.findings import (
    SEVERITIES,
    decay_finding,
    findings_of,
    step_finding,
)
from normax.inspection.measure import Measured, measure_array
from normax.inspection.per_step import angle_per_step
from normax.inspection.report import ArrayReport, EquilibriumReport, RunReport
from normax.inspection.vectors import AxesByPath, has_outputs_first, role
from normax.theory.rotation_theory import RotationTheory, rule_of, theory_of_adam
from normax.theory.update_rule import UpdateRule


def _names(run: Run) -> list[str]:
    """Return the paths of all arrays, with layer 2 before layer 10."""
    names = {name for _, checkpoint in run for name in checkpoint}

    def natural(name):
        parts = re.split(r"(\d+)", name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(names, key=natural)


def _shown(names: list[str], progress: bool) -> Iterable[str]:
    if not progress:
        return names
    from rich.progress import track  # nothing else needs it

    console = rich.console.Console(stderr=True)
    return track(names, "Reading", console=console, transient=True)


def _angles_per_step(found: Measured, correlation: float) -> tuple[float, ...]:
    pairs = zip(found.steps, found.steps[1:], strict=False)
    return tuple(
        np.nan
        if first is None or last is None
        else angle_per_step(versine, last - first, correlation)
        for (first, last), versine in zip(pairs, found.versine, strict=True)
    )


def _theory_of(found: Measured, theory: RotationTheory) -> RotationTheory:
    """Return the theory of one array.

    That of Muon depends on the shape. All that is no matrix gets its Adam.
    """
    rule = theory.rule
    if rule is None or not rule.of_matrices or theory.reason:
        return theory
    given = theory.hyperparameters
    if len(found.shape) == 2:
        inputs, outputs = found.shape[:: -1 if has_outputs_first(found.name) else 1]
        dimension = float(inputs), float(outputs)
        return RotationTheory(rule, theory.rates, given, 0, dimension)
    if given.get("muon_weight_dimension_numbers") is not None:
        return theory.unknown("no matrix without muon_weight_dimension_numbers")
    return theory_of_adam(rule, theory.rates, given)


def _distance(found: Measured, angle: float, theory: RotationTheory) -> float:
    """Return the norm over the norm in equilibrium.

    The norm itself tells it where the rule's equilibrium does not depend on gradients;
    elsewhere the angle per step does, as in `normax.dynamics_table`.
    """
    rule = theory.rule
    if "gradient_norm" in rule.theory.norm_needs:
        return (angle / theory.rotation) ** (-1 / theory.power)
    norm = float(found.norm[-1])
    given = {"dimension": found.dimension, **theory.hyperparameters}
    if rule.of_matrices:
        # The norm of the whole matrix, from the root mean square over its vectors.
        norm *= math.sqrt(found.vectors)
        given["dimension"] = theory.others[1]
    return norm / float(rule.equilibrium_norm(*theory.rates, **given))


def _verdict(distance: float, steps_left: float) -> str:
    if np.isnan(distance):
        return "not known: no angle per step"
    if steps_left == 0:
        return "in equilibrium"
    if distance > 1:
        return f"norm {distance:.2g} times too large: should shrink"
    return f"norm {1 / distance:.2g} times too small: should grow"


def _beside_theory(
    found: Measured, angle: float, theory: RotationTheory
) -> EquilibriumReport | None:
    if theory.rule is None:
        return None
    unknown = EquilibriumReport(theory.rotation, np.nan, False, np.nan, theory.reason)
    if not found.has_vectors:
        return EquilibriumReport(np.nan, np.nan, False, np.nan, "no weight vectors")
    if theory.reason:
        return unknown
    if not found.norm[-1] > 0:
        state = "all weights are 0" if found.norm[-1] == 0 else "not finite"
        there = found.present[-1] == len(found.steps) - 1
        return unknown._replace(verdict=state if there else "not at the last step")
    distance = _distance(found, angle, theory)
    left = theory.steps_left(distance**-theory.power)
    verdict = _verdict(distance, left)
    return EquilibriumReport(theory.rotation, distance, left == 0, left, verdict)


def _report(found: Measured, theory: RotationTheory) -> ArrayReport:
    theory = _theory_of(found, theory)
    per_step = _angles_per_step(found, theory.correlation)
    last = per_step[-1] if per_step else np.nan
    findings = [*findings_of(found)]
    if theory.rule is not None and not found.not_finite.any():
        more = decay_finding(found, theory.decay), step_finding(found, last)
        findings += [finding for finding in more if finding]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return ArrayReport(
        name=found.name,
        shape=found.shape,
        dtype=str(found.dtype),
        axes=found.axes,
        guess=found.guess,
        norm=tuple(found.norm.tolist()),
        spread=tuple(zip(found.least.tolist(), found.most.tolist(), strict=True)),
        angle=tuple(found.angle.tolist()),
        angle_per_step=per_step,
        equilibrium=_beside_theory(found, last, theory),
        findings=tuple(findings),
    )


def inspect_run(
    path: str | os.PathLike[str],
    axes: Axes = None,
    steps: Sequence[int] | None = None,
    rule: str | UpdateRule | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    *,
    progress: bool = False,
    **hyperparameters: Any,
) -> RunReport:
    r"""Measure the weights in the checkpoints of a run, and say what is wrong.

    $$\|w_t\|, \qquad \varphi = \angle(w_s, w_t), \qquad
    \cos\varphi \approx (\cos\theta)^{t - s}$$

    for every weight vector, where $\theta$ is the angle per step of a random walk;
    docs/inspect.md says what follows from it, and what does not. No code of the model
    is needed, and no device. One array is read at a time, and nothing is unpickled.

    Args:
      path: A folder of Orbax's `CheckpointManager`, a folder of numbered checkpoints,
        or one checkpoint: of Orbax, of files `.safetensors`, or an `.npz`.
      axes: Which entries form one weight vector: a word or a tuple for all arrays, or
        a dict by path. Arrays without an entry have the axes that name and shape say.
      steps: Which checkpoints; None for all.
      rule: The update rule of the run, of `UPDATE_RULES`, or its name; None to predict
        nothing.
      learning_rate: Its learning rate at the end of the run.
      weight_decay: Its weight decay.
      progress: Whether a bar on the standard error shows the progress.
      **hyperparameters: Those of the rule, with its defaults.

    Returns:
      The report; `findings` holds what is wrong, worst first, and `str` of it prints.

    Raises:
      UnreadableError: There is no checkpoint, or it is damaged.
      ValueError: `axes` names no array; or rule, rates and hyperparameters do not fit.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import normax
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for step, rows in {0: [[1.0, 1.0]], 100: [[1.0, 0.0]]}.items():
      ...     np.savez(folder / f"{step}.npz", kernel=np.array(rows + [[0.0, 0.0]]))
      >>> report = normax.inspection.inspect_run(folder)
      >>> report.findings[0].kind, report.findings[0].evidence
      ('zero_vectors', '1 of 2 weight vectors are 0 at step 100')

    References:
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """
    known = rule_of(rule, (learning_rate, weight_decay), hyperparameters)
    theory = RotationTheory(known, (learning_rate, weight_decay), hyperparameters, 0)
    run = open_run(Path(path), None if steps is None else list(steps))
    names = _names(run)
    axes_of = AxesByPath(axes, names)
    weights = [name for name in names if axes_of.is_weight(name)]
    left_out = Counter(role(name) for name in names if not axes_of.is_weight(name))
    arrays = []
    for name in _shown(weights, progress):
        found = measure_array(name, run, axes_of)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            arrays.append(_report(found, theory))
    if not arrays:
        left = ", ".join(f"{count} of {what}" for what, count in left_out.items())
        raise UnreadableError(
            f"{path} holds no arrays of weights, but {left or 'nothing'}; "
            "axes given for a path (--axes) make weights of what stands there"
        )
    called = None if known is None else known.name
    return RunReport(
        str(path), tuple(s for s, _ in run), tuple(arrays), dict(left_out), called
    )
