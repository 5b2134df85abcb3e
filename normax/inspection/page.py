"""The report of a run as one HTML page: no scripts, and nothing from elsewhere."""

import html
import math
from collections.abc import Sequence

from normax.inspection.report import ArrayReport, RunReport, grouped, number

_WIDTH, _HEIGHT, _LEFT, _BELOW = 560, 300, 56, 40

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; --error: #c0262d;
  --warning: #b26a00; --note: #0072a3; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.dim { color: var(--dim); } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }  .number { text-align: right; white-space: nowrap; }
.error { color: var(--error); } .warning { color: var(--warning); }
.note { color: var(--note); } .finding { border-left: 4px solid; padding: .1rem 1rem;
  margin: 1rem 0; } .finding > * { color: CanvasText; } .wide { overflow-x: auto; }
.finding b:first-child { color: inherit; } td code {
  overflow-wrap: normal; } svg text { fill: currentColor;
  font-size: 11px; } svg .grid { stroke: var(--line); } polyline { fill: none;
  stroke-width: 1.6; } code { font-size: .92em; overflow-wrap: anywhere; }
"""


def _color(share: float) -> str:
    """Return a color between that of the first layer and that of the last."""
    return f"hsl({260 - 230 * share:.0f} 65% {42 + 14 * share:.0f}%)"


def _even_ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    step = max(10.0 ** math.floor(math.log10(high - low)), least)
    step *= next(lead for lead in (0.2, 0.5, 1, 2) if (high - low) / step / lead <= 6)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leads = (1,) if len(powers) > 4 else (1, 2, 5)
    ticks = [lead * 10.0**power for power in powers for lead in leads]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 2 else _even_ticks(low, high)


def _chart(
    title: str,
    xs: Sequence[float],
    series: Sequence[tuple[str, str, Sequence[float]]],
) -> str:
    """Return a plot of positive numbers, on a logarithmic axis, as SVG.

    Args:
      title: What the numbers are.
      xs: Steps.
      series: Names, colors and numbers of the lines.
    """
    values = [y for _, _, ys in series for y in ys if math.isfinite(y) and y > 0]
    if not values:
        return ""
    low, high = min(values) / 1.15, max(values) * 1.15
    first, last = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    right, bottom = _WIDTH - 20, _HEIGHT - _BELOW

    def x_of(x):
        return _LEFT + (right - _LEFT) * (x - first) / (last - first)

    def y_of(y):
        share = (math.log(y) - math.log(low)) / (math.log(high) - math.log(low))
        return bottom - (bottom - 24) * share

    parts = [f'<text x="{_LEFT}" y="14" font-weight="bold">{html.escape(title)}</text>']
    for tick in _log_ticks(low, high):
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    for tick in _even_ticks(first, last, least=5.0):
        parts.append(
            f'<text x="{x_of(tick):.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    parts.append(f'<text x="{right}" y="{bottom + 34}" text-anchor="end">step</text>')
    for name, color, ys in series:
        points = [
            (x_of(x), y_of(y))
            for x, y in zip(xs, ys, strict=True)
            if math.isfinite(y) and y > 0
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>'
            for x, y in points
        )
        parts.append(
            f"<g><title>{html.escape(name)}</title>"
            f'<polyline points="{path}" stroke="{color}"/>{dots}</g>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">'
        f"{''.join(parts)}</svg>"
    )


def _plots(report: RunReport) -> str:
    known = [step for step in report.steps if step is not None]
    xs = known if len(known) == len(report.steps) else [*range(len(report.steps))]
    arrays = [array for array in report.arrays if array.axes]
    colors = [_color(i / max(len(arrays) - 1, 1)) for i in range(len(arrays))]
    named = [*zip(arrays, colors, strict=True)]
    norms = [(array.name, color, array.norm) for array, color in named]
    angles = [(array.name, color, array.angle) for array, color in named]
    charts = _chart("norm of the weight vectors", xs, norms)
    if len(xs) > 1:
        charts += _chart("angle since the checkpoint before, radians", xs[1:], angles)
    keys = "".join(
        f'<li><span style="color:{color}">●</span> <code>{html.escape(array.name)}'
        "</code></li>"
        for array, color in named
    )
    opened = " open" if len(named) <= 12 else ""
    return (
        f'<div class="plots">{charts}</div><p class="dim">A line is a matrix, in root '
        "mean square over its vectors; what is 0 is not drawn. Point at a line to see "
        "its name.</p>"
        f"<details{opened}><summary>Colors, in the order of the checkpoint</summary>"
        f"<ul>{keys}</ul></details>"
    )


def _findings(report: RunReport) -> str:
    parts = []
    for group in grouped(report.findings):
        first = group[0]
        rows = "".join(
            f"<li><code>{html.escape(one.array)}</code>: {html.escape(one.evidence)}"
            for one in group
        )
        parts.append(
            f'<div class="finding {first.severity}"><b>{first.severity}: '
            f"{html.escape(first.kind.replace('_', ' '))}</b><p>It means: "
            f"{html.escape(first.meaning)}.<br>To do: {html.escape(first.action)}."
            f"</p><ul>{rows}</ul></div>"
        )
    return "".join(parts) or "<p>Nothing found.</p>"


def _row(array: ArrayReport) -> list[str]:
    low, high = array.spread[-1]
    cells = [
        number(array.norm[0]),
        number(array.norm[-1]),
        f"{number(low, 2)} to {number(high, 2)}" if low == low else "",
        number(array.angle[-1]) if array.angle else "",
        number(array.angle_per_step[-1]) if array.angle_per_step else "",
    ]
    if array.equilibrium:
        left = array.equilibrium.steps_left
        cells += [
            number(array.equilibrium.angle_per_step),
            "" if math.isnan(left) else f"{left:.0f}",
            html.escape(array.equilibrium.verdict),
        ]
    return cells


def _table(report: RunReport) -> str:
    heads = ["first norm", "last norm", "spread", "last angle", "per step"]
    heads += ["predicted", "steps left", "verdict"] if report.rule else []
    rows = []
    for array in report.worst_first:
        severity = array.findings[0].severity if array.findings else ""
        axes = ", ".join(map(str, array.axes))
        rows.append(
            f'<tr><td class="{severity}"><code>{html.escape(array.name)}</code></td>'
            f"<td>{html.escape(str(array.shape))}</td><td>{array.dtype}</td>"
            f"<td>{axes} <span class=dim>{html.escape(array.guess)}</span></td>"
            + "".join(f'<td class="number">{cell}</td>' for cell in _row(array))
        )
    titles = "".join(f"<th>{head}</th>" for head in ["array", "shape", "dtype", "axes"])
    titles += "".join(f'<th class="number">{head}</th>' for head in heads)
    return (
        f'<div class="wide"><table><tr>{titles}</tr>{"</tr>".join(rows)}</table></div>'
    )


def page(report: RunReport) -> str:
    """Return the report as HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(report.source)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>What the checkpoints say</h1><p>{html.escape(report.summary)}.</p>"
        f"<h2>Findings</h2>{_findings(report)}<h2>Norms and angles</h2>"
        f'{_plots(report)}<h2>Arrays</h2>{_table(report)}<p class="dim">'
        f"{html.escape(report.explanation)}</p></body></html>\n"
    )
