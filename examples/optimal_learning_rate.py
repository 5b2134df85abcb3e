r"""The best learning rate for every weight decay, under batch normalization.

Van Laarhoven (2017, figure 4) asks which learning rate $\eta^*$ is best for a given
weight decay $\lambda$. Once the norm of the weights has settled, decay acts through the
effective learning rate alone, a function of $\eta^2 \lambda^p$ for a rule of power $p$
(see `effective_learning_rate.py`). Where one effective rate is the best, then,

$$\eta^* \propto \lambda^{-p/2},$$

a slope of -1 in logarithms for SGD and Nesterov momentum, and of -1/2 for RMSProp and
Adam.

Networks are trained over a grid of $\eta$ and $\lambda$ for several seeds; a fifth of
the training images is held out. For each $\lambda$ the validation error, averaged over
seeds, is smallest at some $\eta$ of the grid; $\eta^*$ is the minimum of the parabola
in $\log \eta$ through the errors there and up to two steps to both sides. A decay
counts if that $\eta$ is not the first or last of the grid, and if the norm had settled
there. The slope is a least-squares fit to those, with its 95 % confidence interval.

Written to `--out`: a picture (maps of the validation error, the best learning rates and
the fits) and all numbers as CSV. Printed: the slopes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import numpy as np
from convnet import SETTINGS, Setting, add_network_options, make_setting, make_train
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
from scipy import stats

import normax

Results = dict[str, np.ndarray]

# Smallest and largest learning rate, smallest and largest weight decay.
GRIDS = {
    "sgd": (3e-3, 3e0, 3e-2, 3e0),
    "nesterov": (3e-4, 3e-1, 3e-2, 3e0),
    "rmsprop": (3e-4, 3e-1, 1e-1, 1e1),
    "adam": (3e-4, 3e-1, 1e-3, 1e0),
}
# Norms settle later than networks of digits learn.
LONG = SETTINGS | {"digits": SETTINGS["digits"]._replace(epochs=48)}
SETTLED_MEMORY = 0.1


class Fit(NamedTuple):
    """The best learning rates, whether they count, and the line through those."""

    best: np.ndarray
    counts: np.ndarray
    slope: float
    intercept: float
    halfwidth: float


def hold_out(data: datasets.Dataset) -> datasets.Dataset:
    """Return four fifths of the training images, and the others to validate on."""
    order = np.random.default_rng(0).permutation(len(data.x_train))
    held, kept = np.split(order, [len(order) // 5])
    parts = ((data.x_train[i], data.y_train[i]) for i in (kept, held))
    return datasets.Dataset(*(array for part in parts for array in part))


def run(
    rules: Sequence[str],
    data: datasets.Dataset,
    setting: Setting,
    shape: tuple[int, int],
    seeds: int,
    checkpoint_dir: Path | None = None,
) -> Results:
    """Train at every grid point; return one array entry per run."""
    data = hold_out(data)
    columns: list[Results] = []
    for rule in rules:
        low, high, least, most = GRIDS[rule]
        axes = {"lam": np.geomspace(least, most, shape[0])}
        axes["eta"] = np.geomspace(low, high, shape[1])
        lam, eta = np.meshgrid(*axes.values(), indexing="ij")
        for seed in range(seeds):
            train = make_train(rule, data, setting, seed=seed)
            numbers = normax.grid_sweep(
                train, axes, progress=True, checkpoint_dir=checkpoint_dir
            )
            named: dict[str, Any] = {"rule": rule, "seed": seed}
            named |= {"lambda": lam, "eta": eta} | jax.device_get(numbers)
            columns.append({k: np.broadcast_to(x, eta.shape) for k, x in named.items()})
    return {
        name: np.stack([column[name] for column in columns]).ravel()
        for name in columns[0]
    }


def select(results: Results, rule: str) -> Results:
    """Return the numbers of one rule, as arrays (seed, lambda, eta)."""
    mask = results["rule"] == rule
    columns = {name: column[mask] for name, column in results.items()}
    names = ("seed", "lambda", "eta")
    shape = tuple(len(np.unique(columns[name])) for name in names)
    return {name: column.reshape(shape) for name, column in columns.items()}


def mean_errors(points: Results) -> np.ndarray:
    """Return the validation errors (lambda, eta), 1 where a run diverged."""
    return np.where(points["diverged"], 1.0, points["test_error"]).mean(0)


def fit(points: Results, power: int) -> Fit:
    """Find the best learning rate of every weight decay, and fit the slope."""
    errors = mean_errors(points)
    x, lam = np.log(points["eta"][0, 0]), points["lambda"][0, :, 0]
    best, counts = np.exp(x[errors.argmin(1)]), np.zeros(len(lam), bool)
    for row, i in enumerate(errors.argmin(1)):
        window = slice(max(i - 2, 0), i + 3)
        curvature, slope, _ = np.polyfit(x[window] - x[i], errors[row, window], 2)
        inside = 0 < i < len(x) - 1
        if inside and curvature > 0:
            step = x[1] - x[0]
            best[row] *= np.exp(np.clip(-slope / (2 * curvature), -step, step))
        counts[row] = inside and points["memory"][:, row, i].mean() < SETTLED_MEMORY
    if counts.sum() < 3:
        return Fit(best, counts, np.nan, np.nan, np.nan)
    line = stats.linregress(np.log(lam[counts]), np.log(best[counts]))
    halfwidth = stats.t.ppf(0.975, counts.sum() - 2) * line.stderr
    return Fit(best, counts, line.slope, line.intercept, halfwidth)


def table(results: Results, rules: Sequence[str]) -> str:
    """Return the slopes as text."""
    text = "\n          decays   slope of log(best learning rate) in log(decay)\n"
    text += "rule      settled  measured, 95 % interval    predicted\n"
    for rule in rules:
        power = normax.UPDATE_RULES[rule].norm_power
        found = fit(select(results, rule), power)
        text += f"{rule:10}{found.counts.sum():4}{found.slope:13.2f} ± "
        text += f"{found.halfwidth:.2f}{-power / 2:20.2f}\n"
    return text


def draw(axes: Axes, results: Results, rule: str, colours: LogNorm) -> Any:
    """Draw the validation errors, the best learning rates and the fit of one rule."""
    power = normax.UPDATE_RULES[rule].norm_power
    points = select(results, rule)
    found = fit(points, power)
    lam, eta = points["lambda"][0, :, 0], points["eta"][0, 0]
    mesh = axes.pcolormesh(lam, eta, mean_errors(points).T, cmap="OrRd", norm=colours)
    styles = ((found.counts, "ko"), (~found.counts, "kx"))
    for mask, marker in styles:
        axes.plot(lam[mask], found.best[mask], marker)
    axes.plot(lam, np.exp(found.intercept) * lam**found.slope, "k-", lw=1.5)
    middle = np.log(found.best[found.counts]).mean() if found.counts.any() else np.nan
    center = np.log(lam[found.counts]).mean() if found.counts.any() else np.nan
    theory = np.exp(middle - power / 2 * (np.log(lam) - center))
    axes.plot(lam, theory, "k--", lw=1)
    axes.set(xscale="log", yscale="log", ylim=(eta[0], eta[-1]))
    axes.set_xlabel(r"weight decay $\lambda$")
    axes.set_title(
        f"{rule}\nslope {found.slope:.2f} ± {found.halfwidth:.2f} ({-power / 2:g})"
    )
    return mesh


def picture(results: Results, rules: Sequence[str]) -> Figure:
    """Draw one map for each rule."""
    figure = Figure(figsize=(2.9 * len(rules) + 0.8, 3.6), layout="constrained")
    row = figure.subplots(1, len(rules), squeeze=False)[0]
    colours = error_colours(results["test_error"])
    for axes, rule in zip(row, rules, strict=True):
        mesh = draw(axes, results, rule, colours)
    bar = figure.colorbar(mesh, ax=row, **ERROR_TICKS)
    bar.minorticks_off()
    bar.set_label("validation error")
    row[0].set_ylabel(r"learning rate $\eta$")
    figure.supxlabel(
        "dots: best learning rate (crosses: norm not settled, or at the edge); "
        "solid: fit; dashed: predicted slope",
        fontsize="medium",
    )
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiment; return the numbers, one entry for each run."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rule", nargs="+", default=list(GRIDS), choices=GRIDS)
    add_data_options(parser)
    add("--decays", type=int, default=5, help="weight decays of the grid")
    add("--rates", type=int, default=7, help="learning rates of the grid")
    add_network_options(parser)
    add("--seeds", type=int, default=1, help="number of repetitions")
    add("--checkpoints", type=Path, help="folder of finished runs, to continue from")
    options = parser.parse_args(argv)
    setting = make_setting(parser, options, LONG)
    if min(options.rates, options.decays) < 3 or options.seeds < 1:
        parser.error("--rates and --decays must be at least 3, --seeds at least 1.")
    make_folder(parser, options)
    data = load_data(parser, options, setting.batch_size * 5 // 4 + 1)
    shape = options.decays, options.rates
    arguments = shape, options.seeds, options.checkpoints
    results = run(options.rule, data, setting, *arguments)
    print(table(results, options.rule))
    name = file_name("optimal_learning_rate", options)
    write_csv(results, options.out / f"{name}.csv")
    figure = picture(results, options.rule)
    figure.savefig(options.out / f"{name}.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
