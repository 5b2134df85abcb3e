r"""The best learning rate for every weight decay, under batch normalization.

Van Laarhoven (2017, figure 4) asks which learning rate $\eta^*$ is best for a given
weight decay $\lambda$. Once the norm of the weights has settled, decay acts through the
effective learning rate alone. This is a function of $\eta^2 \lambda^p$ for a rule of
power $p$ (see `effective_learning_rate.py`). If one effective rate is the best, then

$$\eta^* \propto \lambda^{-p/2}.$$

In logarithms this is a slope of -1 for SGD and Nesterov momentum, and of -1/2 for
RMSProp and Adam.

Networks are trained over a grid of $\eta$ and $\lambda$ for several seeds. A fifth of
the training images is held out for validation. For each $\lambda$, some $\eta$ of the
grid has the smallest validation error, averaged over seeds. A parabola in $\log \eta$
is fitted to the errors at this $\eta$ and up to two steps to both sides. Its minimum is
$\eta^*$, but at most one step away. The slope is a least-squares fit, with its 95 %
confidence interval. Decays whose smallest error lies at the first or last $\eta$ of the
grid are left out. If training is too short for the norm to settle, the effective rate
depends less on decay, and so does $\eta^*$.

Head, gains and biases have no effective rate. They are trained with $\eta$ itself,
which pulls $\eta^*$ towards what is best for them. With `--fixed-head` they are trained
with the rate in the middle of the grid, so that $\eta$ acts through the effective rate
alone.

The program writes a picture and all numbers as CSV to `--out`, and prints the slopes.
The picture shows maps of the validation error, the best learning rates and the fits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import numpy as np
from convnet import (
    SETTINGS,
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
from scipy import stats

import normax

Results = dict[str, np.ndarray]

# Each rule has the smallest and largest learning rate, then those of weight decay.
GRIDS = {
    "sgd": (3e-3, 3e0, 1e-2, 1e0),
    "nesterov": (3e-4, 3e-1, 1e-2, 1e0),
    "rmsprop": (2e-4, 2e-2, 1e-2, 1e0),
    "adam": (2e-4, 2e-2, 1e-2, 1e0),
}
# A network learns digits before its norms have settled, so these runs are longer.
LONG = SETTINGS | {"digits": SETTINGS["digits"]._replace(epochs=48)}


class Fit(NamedTuple):
    """The best learning rates, and the line through those inside the grid."""

    best: np.ndarray
    inside: np.ndarray
    settled: np.ndarray
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
    fixed_head: bool = False,
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
        other_rate = float(np.sqrt(low * high)) if fixed_head else None
        for seed in range(seeds):
            train = make_train(rule, data, setting, seed=seed, other_rate=other_rate)
            numbers = normax.sweeps.grid_sweep(
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


def fit(points: Results) -> Fit:
    """Find the best learning rate of every weight decay, and fit the slope."""
    errors = mean_errors(points)
    x, lam = np.log(points["eta"][0, 0]), points["lambda"][0, :, 0]
    smallest = errors.argmin(1)
    best, step = np.exp(x[smallest]), x[1] - x[0]
    for row, i in enumerate(smallest):
        window = slice(max(i - 2, 0), i + 3)
        curvature, slope, _ = np.polyfit(x[window] - x[i], errors[row, window], 2)
        if 0 < i < len(x) - 1 and curvature > 0:
            best[row] *= np.exp(np.clip(-slope / (2 * curvature), -step, step))
    inside = (0 < smallest) & (smallest < len(x) - 1)
    memory = points["memory"].mean(0)[np.arange(len(lam)), smallest]
    settled = memory < SETTLED_MEMORY
    if inside.sum() < 3:
        return Fit(best, inside, settled, np.nan, np.nan, np.nan)
    line = stats.linregress(np.log(lam[inside]), np.log(best[inside]))
    halfwidth = stats.t.ppf(0.975, inside.sum() - 2) * line.stderr
    return Fit(best, inside, settled, line.slope, line.intercept, halfwidth)


def table(results: Results, rules: Sequence[str]) -> str:
    """Return the slopes as text."""
    text = """
          decays            slope of log(best rate) in log(decay)
rule      inside  settled   measured, 95 % interval    predicted
"""
    for rule in rules:
        power = normax.UPDATE_RULES[rule].norm_power
        found = fit(select(results, rule))
        text += f"{rule:10}{found.inside.sum():4}{found.settled.sum():9}"
        text += f"{found.slope:12.2f} ± {found.halfwidth:.2f}{-power / 2:20.2f}\n"
    return text


def draw(axes: Axes, results: Results, rule: str, colours: LogNorm) -> Any:
    """Draw the validation errors, the best learning rates and the fit of one rule."""
    power = normax.UPDATE_RULES[rule].norm_power
    points = select(results, rule)
    found = fit(points)
    lam, eta = points["lambda"][0, :, 0], points["eta"][0, 0]
    mesh = axes.pcolormesh(lam, eta, mean_errors(points).T, cmap="OrRd", norm=colours)
    for settled, fill in ((True, "full"), (False, "none")):
        mask = found.inside & (found.settled == settled)
        axes.plot(lam[mask], found.best[mask], "ko", fillstyle=fill)
    axes.plot(lam[~found.inside], found.best[~found.inside], "kx")
    axes.plot(lam, np.exp(found.intercept) * lam**found.slope, "k-", lw=1.5)
    # The dashed line has the predicted slope. It meets the fit in the middle, or the
    # middle of the map if there is no fit.
    middle = np.exp(found.intercept) * np.sqrt(lam[0] * lam[-1]) ** found.slope
    theory = np.nan_to_num(middle, nan=np.sqrt(eta[0] * eta[-1]))
    theory *= (lam / np.sqrt(lam[0] * lam[-1])) ** (-power / 2)
    axes.plot(lam, theory, "k--", lw=1)
    axes.set(xscale="log", yscale="log", ylim=(eta[0], eta[-1]))
    axes.set_xlabel(r"weight decay $\lambda$")
    axes.set_title(
        f"{rule}\nslope {found.slope:.2f} ± {found.halfwidth:.2f}, "
        f"predicted {-power / 2:g}",
        fontsize="medium",
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
        "best learning rate: dots (hollow: before the norm had settled; crosses: at "
        "the edge of the grid), solid: fit, dashed: predicted slope",
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
    held = "keep the learning rate of head, gains and biases in the middle of the grid"
    add("--fixed-head", action="store_true", help=held)
    add("--checkpoints", type=Path, help="folder of finished runs, to continue from")
    options = parser.parse_args(argv)
    setting = make_setting(parser, options, LONG)
    if min(options.rates, options.decays) < 3 or options.seeds < 1:
        parser.error("--rates and --decays must be at least 3, --seeds at least 1.")
    make_folder(parser, options)
    data = load_data(parser, options, setting.batch_size)
    kept = len(data.x_train) - len(data.x_train) // 5
    if kept < setting.batch_size:
        parser.error(
            "a fifth of the training images is held out for validation, but the other "
            f"{kept} are less than a batch, {setting.batch_size}."
        )
    shape = options.decays, options.rates
    arguments = shape, options.seeds, options.fixed_head, options.checkpoints
    results = run(options.rule, data, setting, *arguments)
    print(table(results, options.rule))
    name = file_name("optimal_learning_rate", options)
    name += "_fixed_head" if options.fixed_head else ""
    write_csv(results, options.out / f"{name}.csv")
    figure = picture(results, options.rule)
    figure.savefig(options.out / f"{name}.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
