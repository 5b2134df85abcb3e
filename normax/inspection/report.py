"""The report of a run: on a terminal, and as JSON."""

import io
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.markup
import rich.table

from normax.inspection.findings import SEVERITIES, Finding
from normax.inspection.vectors import GIVEN

COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}

_BETWEEN = (
    "The angle between two checkpoints is not the angle per step: steps in different "
    "directions cancel. The column per step is what a random walk of {steps} would "
    "need. If the steps agree, each is smaller, down to angle / steps; if they undo "
    "each other, it is larger."
)
_GUESSED = (
    " Axes were guessed by name and shape; --axes sets them. An array without axes is "
    "measured whole."
)
_PREDICTED = (
    " What is predicted holds for arrays that are scale-invariant and decay, at "
    "constant rates."
)


class EquilibriumReport(NamedTuple):
    """How far an array is from the equilibrium of its rule.

    Attributes:
      angle_per_step: Predicted angle per step, in radians; NaN where it is not known.
      distance: Norm over the norm in equilibrium, by the norm itself where the rule
        predicts it (AdamW, Lion), else by the angle per step; NaN where not known.
      in_equilibrium: Whether it is within 10% of 1.
      steps_left: Steps until it is; NaN where that is not known.
      verdict: What this says.
    """

    angle_per_step: float
    distance: float
    in_equilibrium: bool
    steps_left: float
    verdict: str


class ArrayReport(NamedTuple):
    """What the checkpoints say of one array, in root mean square over its vectors.

    Attributes:
      name: Path of the array.
      shape: Its shape.
      dtype: Its dtype.
      axes: The axes that one weight vector spans; none for biases and gains, which are
        measured as one vector.
      guess: How the axes were found.
      norm: Norm of the weight vectors at each step.
      spread: The smallest and the largest norm at each step.
      angle: Angle between the vectors of each two successive steps, in radians.
      angle_per_step: Angle of one of the steps in between, estimated.
      equilibrium: Where a rule would bring it; None without a rule.
      findings: What is wrong with it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...]
    guess: str
    norm: tuple[float, ...]
    spread: tuple[tuple[float, float], ...]
    angle: tuple[float, ...]
    angle_per_step: tuple[float, ...]
    equilibrium: EquilibriumReport | None
    findings: tuple[Finding, ...]


def _plain(value: Any) -> Any:
    """Return what JSON knows: it has neither NaN nor infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def number(value: float, digits: int = 3) -> str:
    """Return a number for people, and nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


class RunReport(NamedTuple):
    """Result of `inspect_run`; prints as a table, in color where `rich` prints.

    Attributes:
      source: What was read.
      steps: The steps of its checkpoints; None where a name has no number.
      arrays: What they say of each array that holds weights.
      left_out: How many arrays were left out, by what they are.
      rule: The update rule that predictions are made for, if any.
    """

    source: str
    steps: tuple[int | None, ...]
    arrays: tuple[ArrayReport, ...]
    left_out: dict[str, int]
    rule: str | None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, worst first."""
        found = [finding for array in self.arrays for finding in array.findings]
        return tuple(sorted(found, key=lambda one: SEVERITIES.index(one.severity)))

    @property
    def worst_first(self) -> tuple[ArrayReport, ...]:
        """The arrays, those with the worst findings first."""

        def place(array):
            worst = array.findings[0].severity if array.findings else None
            return [*SEVERITIES, None].index(worst)

        return tuple(sorted(self.arrays, key=place))

    @property
    def explanation(self) -> str:
        """What the angles are, and what they are not."""
        steps = f"{self.rule}'s steps" if self.rule else "independent steps"
        guessed = any(array.guess != GIVEN for array in self.arrays)
        return (
            _BETWEEN.format(steps=steps)
            + (_GUESSED if guessed else "")
            + (_PREDICTED if self.rule else "")
        )

    @property
    def summary(self) -> str:
        """What was read, in a line."""
        steps = [str(step) for step in self.steps if step is not None]
        at = f" at step{'s' * (len(steps) > 1)} {', '.join(steps)}" if steps else ""
        left = [f"{count} of {what}" for what, count in self.left_out.items()]
        out = f"; left out: {', '.join(left)}" if left else ""
        return f"{self.source}: {len(self.arrays)} arrays{at}{out}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON knows it; docs/inspect.md has the schema."""
        arrays = {}
        for array in self.arrays:
            entry = _plain(array)
            del entry["name"]
            if array.equilibrium is None:
                del entry["equilibrium"]
            arrays[array.name] = entry
        return {
            "steps": list(self.steps),
            "arrays": arrays,
            "findings": [_plain(finding) for finding in self.findings],
        }

    def to_html(self) -> str:
        """Return the report as one page without scripts, with plots."""
        from normax.inspection.page import page

        return page(self)

    def __rich_console__(self, console, options):
        yield rich.markup.escape(self.summary)
        if self.findings:
            yield _findings_table(self.findings)
        yield _arrays_table(self)
        yield rich.markup.escape(self.explanation)
        counts = [
            f"{sum(one.severity == kind for one in self.findings)} {kind}s"
            for kind in SEVERITIES
        ]
        yield f"Findings: {', '.join(counts)}." if self.findings else "Nothing found."

    def __str__(self) -> str:
        longest = max((len(array.name) for array in self.arrays), default=0)
        width = longest + (150 if self.rule else 100)
        console = rich.console.Console(file=io.StringIO(), width=width)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Return findings that mean the same together."""
    groups: dict[Any, list[Finding]] = {}
    for finding in findings:
        key = finding.severity, finding.kind, finding.meaning, finding.action
        groups.setdefault(key, []).append(finding)
    return [*groups.values()]


def _findings_table(findings: tuple[Finding, ...]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("finding", no_wrap=True)
    table.add_column("array", overflow="fold")
    table.add_column("evidence, meaning, what to do")
    for group in grouped(findings):
        first = group[0]
        color = COLORS[first.severity]
        head = f"[{color}]{first.severity}[/] {first.kind}"
        for finding in group:
            name = rich.markup.escape(finding.array)
            table.add_row(head, name, rich.markup.escape(finding.evidence))
            head = ""
        meaning = f"It means: {first.meaning}. To do: {first.action}."
        table.add_row("", "", f"[italic]{rich.markup.escape(meaning)}[/]")
        table.add_section()
    return table


def _arrays_table(report: RunReport) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("array", overflow="fold")
    table.add_column("axes", no_wrap=True)
    for head in ("first norm", "last norm", "spread", "last angle", "per step"):
        table.add_column(head, justify="right")
    if report.rule:
        table.add_column("predicted", justify="right")
        table.add_column("steps left", justify="right")
        table.add_column("verdict")
    for array in report.worst_first:
        low, high = array.spread[-1]
        spread = f"{number(low, 2)}..{number(high, 2)}" if low == low else ""
        color = COLORS[array.findings[0].severity] if array.findings else None
        name = rich.markup.escape(array.name)
        row = [
            f"[{color}]{name}[/]" if color else name,
            ", ".join(map(str, array.axes)),
            number(array.norm[0]),
            number(array.norm[-1]),
            spread,
            number(array.angle[-1]) if array.angle else "",
            number(array.angle_per_step[-1]) if array.angle_per_step else "",
        ]
        if array.equilibrium:
            left = array.equilibrium.steps_left
            row += [
                number(array.equilibrium.angle_per_step),
                "" if math.isnan(left) else f"{left:.0f}",
                array.equilibrium.verdict,
            ]
        table.add_row(*row)
    return table
