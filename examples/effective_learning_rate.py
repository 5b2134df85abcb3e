r"""Weight decay under batch normalization: a learning rate in disguise.

Van Laarhoven (2017, section 6, figures 1 to 3) trains a network over a grid of learning
rates $\eta$ and weight decays $\lambda$. Batch norm follows all of its convolutions.
The loss then does not depend on the norm of the kernels $w$, so decay cannot regularize
them. Instead, decay sets the norm, and the norm sets the rate. A rule of power $p$ (2
for SGD and its kin, 1 for Adam and RMSProp) trains with the effective learning rate
$\eta_\mathrm{eff} = \eta / \|w\|^p$. Its steps are orthogonal to $w$ and of relative
length $\propto \eta_\mathrm{eff}$, so they lengthen $w$. Decay shortens it:

$$\frac{d \log \|w\|}{dt} = a\,\eta_\mathrm{eff}^2 - \kappa, \qquad
\kappa \propto \eta\lambda\,\|w\|^{2-p}.$$

The two balance at

$$\|w\| \propto (\eta/\lambda)^{1/(p+2)}, \qquad
\eta_\mathrm{eff} \propto (\eta^2\lambda^p)^{1/(p+2)}.$$

Near this point the norm relaxes as $e^{-(p+2)\kappa t}$. The weights $w_t$ are
$e^{-\kappa t} w_0$ plus steps orthogonal to it. So $\kappa t$ can be measured, and

$$m = \bigg(\frac{\langle w_0, w_t\rangle}
{\|w_0\| \min(\|w_0\|, \|w_t\|)}\bigg)^{p+2}$$

is what is left of the initial norm. A grid point is *settled* if $m < 0.1$ at the end
of the phase of constant rate. With the unit-norm projection $\eta_\mathrm{eff} = \eta$.
Then $\lambda$ does not matter, unless $\lambda w$ is a large part of the step.

The program writes a picture and all numbers as CSV to `--out`. The picture shows the
norm of the first kernel, averaged over the last epoch of the constant rate; the final
test error; the same error with the projection; and the lines along which theory says
that they do not change. The program prints the exponent of the norm and the spread of
the test error. The gradient depends on the effective rate, so the fit of the exponent
has an intercept for each line of constant effective rate.

Three things differ from the paper. By default the data are 8x8 digits and the network
is narrow, so that a run takes a minute and not days. Only the kernels are decayed, not
the linear head. The steps of the grid follow the lines of constant effective rate.
`--dataset cifar10` has the paper's data, augmentation, batch size, epochs and schedule.
The paper does not give widths and strides, so these are ours.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
from convnet import (
    SETTLED_MEMORY,
    Setting,
    add_network_options,
    make_setting,
    make_train,
)
from experiments import (
    ERROR_TICKS,
    add_data_options,
    error_colours,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

import normax

Results = dict[str, np.ndarray]


# Each rule has the smallest and largest learning rate, and the largest weight decay.
# The smallest decay follows from the condition that the diagonals of the grid are the
# lines of constant effective rate.
GRIDS = {
    "sgd": (2e-3, 1e0, 1e0),
    "momentum": (5e-4, 2.5e-1, 1e0),
    "nesterov": (5e-4, 2.5e-1, 1e0),
    "rmsprop": (3e-4, 5e-2, 1e0),
    "adam": (3e-3, 3e-1, 1e-1),
}


def grid(rule: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the learning rates and the weight decays of a rule's grid."""
    low, high, decay = GRIDS[rule]
    ratio = (high / low) ** (2 / normax.UPDATE_RULES[rule].norm_power)
    return np.geomspace(low, high, size), np.geomspace(decay / ratio, decay, size)


def run(
    rules: Sequence[str],
    data: datasets.Dataset,
    setting: Setting,
    size: int,
    seed: int,
    checkpoint_dir: Path | None = None,
) -> Results:
    """Train at every grid point; return one array entry per run."""
    columns: list[Results] = []
    for rule, projected in itertools.product(rules, (False, True)):
        train = make_train(rule, data, setting, projected=projected, seed=seed)
        eta, lam = grid(rule, size)
        axes = {"lam": lam, "eta": eta}
        numbers = normax.sweeps.grid_sweep(
            train, axes, progress=True, checkpoint_dir=checkpoint_dir
        )
        lam, eta = np.meshgrid(lam, eta, indexing="ij")
        named = {"rule": rule, "projected": projected, "eta": eta, "lambda": lam}
        named |= jax.device_get(numbers)
        columns.append({k: np.broadcast_to(x, eta.shape) for k, x in named.items()})
    return {
        name: np.concatenate([column[name].ravel() for column in columns])
        for name in columns[0]
    }


def select(results: Results, rule: str, projected: bool) -> Results:
    """Return the numbers of one grid, as arrays (lambda, eta)."""
    mask = (results["rule"] == rule) & (results["projected"] == projected)
    size = math.isqrt(mask.sum())
    return {name: column[mask].reshape(size, size) for name, column in results.items()}


def along_lines(points: Results, power: int, values: np.ndarray) -> np.ndarray:
    """Subtract from values their mean over each line of constant effective rate."""
    level = np.log(points["eta"] ** 2 * points["lambda"] ** power)
    _, line = np.unique(level.round(3), return_inverse=True)
    return values - (np.bincount(line, values) / np.bincount(line))[line]


def summarize(results: Results, rule: str) -> dict[str, float]:
    """Return the measured and the predicted columns of the table."""
    power = normax.UPDATE_RULES[rule].norm_power
    free, projected = (select(results, rule, flag) for flag in (False, True))
    settled = (free["memory"] < SETTLED_MEMORY) & ~free["diverged"]
    points = {name: column[settled] for name, column in free.items()}
    x = along_lines(points, power, np.log(points["eta"] / points["lambda"]))
    y = along_lines(points, power, np.log(points["norm"]))
    along = along_lines(points, power, points["test_error"])
    fitted = dict.fromkeys(("exponent", "deviation", "along", "across"), np.nan)
    if np.count_nonzero(x) > 1:
        exponent = (x @ y) / (x @ x)
        variance = ((y - exponent * x) ** 2).sum() / (x @ x) / (len(x) - 1)
        across = points["test_error"] - along
        spreads = np.sqrt(variance), along.std(), across.std()
        fitted = dict(zip(fitted, (exponent, *spreads), strict=True))
    for name, grid_points in (("free", free), ("projected", projected)):
        errors = np.where(grid_points["diverged"], np.nan, grid_points["test_error"])
        quartiles = np.nanpercentile(errors[:, ~np.isnan(errors).all(0)], (25, 75), 0)
        fitted[name] = np.diff(quartiles, axis=0).mean() if quartiles.size else np.nan
    return fitted | {"settled": settled.sum(), "predicted": 1 / (power + 2)}


def table(results: Results, rules: Sequence[str]) -> str:
    """Return the summaries as text."""
    text = """
         exponent of ||w|| in eta/lambda      spread of the test error
         settled                          on lines of eta_eff   over lambda
rule      points   measured    predicted    along     across   free   projected
"""
    row = (
        "{:9}{settled:6}{exponent:9.3f} ± {deviation:.3f}{predicted:8.3f}"
        "{along:12.2%}{across:9.2%}{free:9.2%}{projected:9.2%}\n"
    )
    text += "".join(row.format(rule, **summarize(results, rule)) for rule in rules)
    diverged = results["diverged"]
    if diverged.any():
        text += (
            f"{diverged.sum()} of {diverged.size} runs diverged: their loss became "
            "NaN or infinite. The picture marks them with a cross.\n"
        )
    return text


def draw_map(
    axes: Axes, points: Results, name: str, powers: tuple[int, int], **colours: Any
) -> Any:
    """Draw a heat map, and the lines on which a product of powers is constant."""
    x, y, diverged = (
        np.log10(points["eta"]),
        np.log10(points["lambda"]),
        points["diverged"],
    )
    mesh = axes.pcolormesh(x, y, np.ma.masked_where(diverged, points[name]), **colours)
    axes.plot(x[diverged], y[diverged], "kx")
    product = powers[0] * x + powers[1] * y
    levels = np.arange(-20, 20, max(powers))
    style: dict[str, Any] = {"colors": "black", "linestyles": "dashed"}
    lines = axes.contour(x, y, product, levels=levels, linewidths=0.8, **style)
    axes.clabel(lines, fmt=lambda level: f"$10^{{{level:.0f}}}$", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(1))
        axis.set_major_formatter("$10^{{{x:.0f}}}$")
    axes.set_xlabel(r"learning rate $\eta$")
    return mesh


def draw_row(row: Sequence[Axes], results: Results, rule: str) -> None:
    """Draw norm, test error and test error with projection of one rule."""
    power = normax.UPDATE_RULES[rule].norm_power
    free, projected = (select(results, rule, flag) for flag in (False, True))
    colours = {"cmap": "OrRd", "norm": error_colours(results["test_error"])}
    finite = free["norm"][~free["diverged"]]
    limits = (finite.min(), finite.max()) if finite.size else (0.1, 10)
    norms = draw_map(row[0], free, "norm", (1, -1), cmap="GnBu", norm=LogNorm(*limits))
    draw_map(row[1], free, "test_error", (2 // power, 1), **colours)
    errors = draw_map(row[2], projected, "test_error", (1, 0), **colours)
    x, y = np.log10(free["eta"]), np.log10(free["lambda"])
    row[0].contour(x, y, free["memory"], levels=[SETTLED_MEMORY], colors="black")
    colorbar = row[0].figure.colorbar
    ticks = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    bars = (
        colorbar(norms, ax=row[0], ticks=np.append(10 * ticks, 10), format="%g"),
        colorbar(errors, ax=row[2], **ERROR_TICKS),
    )
    for bar in bars:
        bar.minorticks_off()
    product = r"$\eta\lambda$" if power == 2 else r"$\eta^2\lambda$"
    row[0].set_title("norm of the first kernel\ndashed: constant $\\eta/\\lambda$")
    row[1].set_title(f"test error\ndashed: constant {product}")
    row[2].set_title("test error, unit-norm projection\ndashed: constant $\\eta$")
    row[0].set_ylabel(f"{rule}\n" r"weight decay $\lambda$")


def picture(results: Results, rules: Sequence[str]) -> Figure:
    """Draw one row of maps for each rule."""
    figure = Figure(figsize=(11, 3.9 * len(rules)), layout="constrained")
    rows = figure.subplots(len(rules), 3, squeeze=False)
    for row, rule in zip(rows, rules, strict=True):
        draw_row(row, results, rule)
    figure.supxlabel(
        "solid line: above it, weight decay had time to settle the norm",
        fontsize="medium",
    )
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiment; return the numbers, one entry for each run."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rule", nargs="+", default=["nesterov", "adam"], choices=GRIDS)
    add_data_options(parser)
    add("--grid", type=int, default=7, help="points along each axis")
    add_network_options(parser)
    add("--seed", type=int, default=0)
    add("--checkpoints", type=Path, help="folder of finished runs, to continue from")
    options = parser.parse_args(argv)
    setting = make_setting(parser, options)
    if options.grid < 2:
        parser.error("--grid must be at least 2.")
    make_folder(parser, options)
    data = load_data(parser, options, setting.batch_size)
    arguments = options.grid, options.seed, options.checkpoints
    results = run(options.rule, data, setting, *arguments)
    print(table(results, options.rule))
    name = file_name("effective_learning_rate", options)
    write_csv(results, options.out / f"{name}.csv")
    figure = picture(results, options.rule)
    figure.savefig(options.out / f"{name}.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
