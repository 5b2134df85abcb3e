r"""Search of learning rate and weight decay: the coordinates that make it easy.

Consider weights whose scale does not matter. Weight decay $\lambda$ settles their norm,
and then they turn by a constant angle $\theta$ per step. For SGD, momentum and AdamW
the angle depends on $\eta\lambda$ alone; for SGD $\cos\theta = 1 - \eta\lambda$.

Before the norm has settled, the initial effective learning rate $\eta / \|w_0\|^p$
counts. It is $\eta$, because Flax draws kernels with $\mathbb E\,\|w_0\|^2 = 1$ per
unit. So one condition on $\eta$ holds before the norm has settled, and one on $\theta$
afterwards. In the plane of $\log\eta$ and $\log\theta$, what is too much or too little
lies beyond vertical and horizontal lines. In the plane of $\log\eta$ and $\log\lambda$,
too large or small $\theta$ lie beyond diagonals.

Grid search, random search and TPE, by Optuna, minimize the validation error of a
convolutional network with batch norm. Each searches over $(\eta, \lambda)$ and over
$(\eta, \theta)$ with as many log-uniform trials, and
`normax.UPDATE_RULES[rule].equilibrium_rotation` gives $\lambda$ for $\theta$. Both
boxes have the same centre and the same range of $\eta$. The range of $\lambda$ in one
is as large as that of $\eta\lambda$ in the other, so their areas are equal.

Every seed has another network, order of the data, and position of the grid within its
cells. A run that diverges has an error of 100%. Regret is the validation error of the
best trial so far, less that of the best trial of this seed in all six searches.

Half of the training images are held out for validation. The setting that a search has
found is trained anew on all of them, and only then tested.

Batches of trials, of all searches at once, are one call of `normax.sweeps.sweep`. With
`--storage`, any number of processes share the trials, on one machine or several. Start
each with the same database and options. Each process draws on its own, so the numbers
then depend on chance. The process that finishes last writes the results.

The program writes a picture and all trials as CSV to `--out`. The picture shows the
median validation error in both planes, and regret. The CSV file has the test errors of
the chosen trials; it has no rotation where $\eta\lambda \ge 1$.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import jax
import numpy as np
import optuna
from convnet import (
    SETTINGS,
    Setting,
    add_network_options,
    make_setting,
    make_train,
)
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter
from studies import SAMPLERS, Space, ask, completed, open_storage, open_study
from tqdm import tqdm

import normax

Results = dict[str, np.ndarray]
KEY = ("sampler", "coordinates", "seed")
Key = tuple[str, str, int]
Studies = dict[Key, optuna.Study]
# A function of this type trains at the given points and returns the errors.
Errors = Callable[[Results], np.ndarray]

# A search needs about a thousand runs, so these are short and their network is small.
DIGITS = SETTINGS["digits"]._replace(strides=(2, 2, 2, 1), batch_size=16, epochs=10)
# These are the ranges of learning rate and weight decay. The decays are large because
# the runs are short.
BOXES = {
    "sgd": ((1e-3, 1e2), (1e-5, 1e0)),
    "momentum": ((1e-4, 1e1), (1e-4, 1e1)),
    "nesterov": ((1e-4, 1e1), (1e-4, 1e1)),
    "adamw": ((1e-5, 1e0), (1e-3, 1e2)),
}
# The keys name the coordinate that is searched beside the learning rate.
COORDINATES = {"lambda": r"$(\eta, \lambda)$", "rotation": r"$(\eta, \theta)$"}


def equilibrium_rotation(rule: str, product: np.ndarray) -> np.ndarray:
    """Return the angle for products of rate and decay; NaN for products from 1 on."""
    angle = normax.UPDATE_RULES[rule].equilibrium_rotation
    angles = np.asarray(angle(1.0, np.minimum(product, 1)), np.float64)
    return np.where(product < 1, angles, np.nan)


def complete(rule: str, point: Results) -> Results:
    """Return the point with both second coordinates."""
    eta = point["eta"]
    if "lambda" in point:
        return point | {"rotation": equilibrium_rotation(rule, eta * point["lambda"])}
    product = np.geomspace(1e-9, 0.999, 2000)
    angles = np.log(equilibrium_rotation(rule, product))
    logarithm = np.interp(np.log(point["rotation"]), angles, np.log(product))
    return {"eta": eta, "lambda": np.exp(logarithm) / eta, **point}


def make_spaces(rule: str) -> dict[str, Space]:
    """Return the boxes in both coordinates, which have the same centre and area."""
    eta, lam = BOXES[rule]
    centre, spread = math.sqrt(math.prod([*eta, *lam])), math.sqrt(lam[1] / lam[0])
    low, high = equilibrium_rotation(rule, centre * np.array([1 / spread, spread]))
    return {
        "lambda": {"eta": eta, "lambda": lam},
        "rotation": {"eta": eta, "rotation": (float(low), float(high))},
    }


def make_studies(parser: Any, options: Any, spaces: dict[str, Space]) -> Studies:
    """Return a study for each combination of sampler, coordinates and seed."""
    storage = open_storage(parser, options.storage)
    names = ("rule", "dataset", "images", "channels", "strides", "epochs", "grid")
    setting = json.dumps([spaces, *[getattr(options, name) for name in names]])
    studies = {}
    for key in itertools.product(SAMPLERS, COORDINATES, range(options.seeds)):
        sampler, coordinates, seed = key
        sampling = sampler, spaces[coordinates], options.grid, seed
        name = "/".join([options.study, *map(str, key)])
        studies[key] = open_study(parser, storage, name, setting, *sampling)
    return studies


def concatenate(rule: str, asked: Mapping[Key, Sequence[Any]]) -> Results:
    """Return the points of some trials of every study, one entry for each."""
    parts = []
    for key, trials in asked.items():
        point = {k: np.array([t.params[k] for t in trials]) for k in ("eta", key[1])}
        part: dict[str, Any] = dict(zip(KEY, key, strict=True))
        part["trial"] = np.array([t.number for t in trials])
        part |= complete(rule, point)
        parts.append({k: np.broadcast_to(x, len(trials)) for k, x in part.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def train_at(rule: str, data: datasets.Dataset, setting: Setting) -> Errors:
    """Return the errors as a function of the points."""

    # The seed is an argument too, so that all seeds share one compiled program.
    def train(eta: jax.Array, lam: jax.Array, seed: Any) -> dict[str, jax.Array]:
        return make_train(rule, data, setting, seed=seed)(eta, lam)

    def errors(points: Results) -> np.ndarray:
        arguments = {"eta": "eta", "lam": "lambda", "seed": "seed"}
        runs = normax.sweeps.sweep(
            train, {k: points[name] for k, name in arguments.items()}
        )
        return np.where(runs["diverged"], 1.0, runs["test_error"])

    return errors


def run_trials(
    options: Any, errors: Errors, studies: Studies, spaces: dict[str, Space]
) -> Results:
    """Run the remaining trials in batches; return all trials that are complete."""
    budget = options.grid**2
    with tqdm(total=len(studies) * budget, unit="trial") as bar:
        while True:
            asked = {
                key: ask(study, spaces[key[1]], options.batch, budget)
                for key, study in studies.items()
            }
            trials = [(studies[key], trial) for key in asked for trial in asked[key]]
            if not trials:
                break
            values = errors(concatenate(options.rule, asked))
            for (study, trial), value in zip(trials, values, strict=True):
                study.tell(trial, float(value))
            bar.update(len(trials))
    done = {key: completed(study) for key, study in studies.items()}
    values = np.array([trial.value for trials in done.values() for trial in trials])
    return concatenate(options.rule, done) | {"validation_error": values}


def select(results: Results, name: str, sampler: str, coordinates: str) -> np.ndarray:
    """Return a column of one kind of search, (seeds, trials)."""
    kind = (results["sampler"] == sampler) & (results["coordinates"] == coordinates)
    return results[name][kind].reshape(results["seed"].max() + 1, -1)


def regret(results: Results, sampler: str, coordinates: str) -> np.ndarray:
    """Return the regret of one kind of search, (seeds, trials)."""
    errors = select(results, "validation_error", sampler, coordinates)
    smallest = np.full(len(errors), np.inf)
    np.minimum.at(smallest, results["seed"], results["validation_error"])
    return np.minimum.accumulate(errors, axis=1) - smallest[:, None]


def add_test_errors(results: Results, errors: Errors) -> None:
    """Add test errors: those of the best trial of each search, NaN for the others."""
    searches = len(SAMPLERS) * len(COORDINATES) * (results["seed"].max() + 1)
    best = results["validation_error"].reshape(searches, -1).argmin(1)
    best += np.arange(searches) * (len(results["trial"]) // searches)
    results["test_error"] = np.full(len(results["trial"]), np.nan)
    results["test_error"][best] = errors({k: x[best] for k, x in results.items()})


def table(results: Results) -> str:
    """Return means over seeds as text, and their difference with its standard error."""
    text = (
        "mean over seeds of a search over lambda, over rotation, and the difference\n"
    )
    for sampler in SAMPLERS:
        regrets = [regret(results, sampler, name) for name in COORDINATES]
        tests = [select(results, "test_error", sampler, name) for name in COORDINATES]
        for label, (one, other) in {
            "regret, all trials": [x.mean(1) for x in regrets],
            "regret in the end": [x[:, -1] for x in regrets],
            "test error": [np.nanmin(x, axis=1) for x in tests],
        }.items():
            error = (other - one).std() / math.sqrt(max(len(one) - 1, 1))
            text += f"{sampler:8}{label:20}{one.mean():8.2%}{other.mean():8.2%}"
            text += f"{(other - one).mean():+8.2%} ± {error:.2%}\n"
    return text


def draw_landscape(
    axes: Axes, results: Results, name: str, spaces: dict[str, Space], rule: str
) -> Any:
    """Draw the errors in one plane, and the boxes of both searches."""
    known = np.isfinite(results[name])
    x, y, errors = (results[k][known] for k in ("eta", name, "validation_error"))
    colours: dict[str, Any] = {"cmap": "OrRd", "norm": LogNorm(0.03, 0.5), "lw": 0.2}
    colours |= {"C": errors, "reduce_C_function": np.median}
    mesh = axes.hexbin(np.log10(x), np.log10(y), gridsize=(20, 11), **colours)
    t, ones = np.linspace(0, 1, 200), np.ones(200)
    unit = np.array([[t, ones, 1 - t, 0 * t], [0 * t, t, ones, 1 - t]]).reshape(2, -1)
    for label, space in zip(COORDINATES.values(), spaces.values(), strict=True):
        low, high = np.log10([*space.values()])[..., None].swapaxes(0, 1)
        corners = dict(zip(space, 10 ** (low + (high - low) * unit), strict=True))
        outline = complete(rule, corners)
        x, y = np.log10([outline["eta"], outline[name]])
        axes.plot(x, y, label=f"box of {label}", linewidth=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(1))
        axis.set_major_formatter("$10^{{{x:.0f}}}$")
    return mesh


def picture(results: Results, spaces: dict[str, Space], rule: str) -> Figure:
    """Draw the errors in both planes, and the regret of each sampler."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    layout = [np.repeat([*COORDINATES], 3).tolist(), np.repeat(SAMPLERS, 2).tolist()]
    panels = figure.subplot_mosaic(layout, height_ratios=[1.25, 1])
    for name in COORDINATES:
        mesh = draw_landscape(panels[name], results, name, spaces, rule)
    left, right = panels["lambda"], panels["rotation"]
    left.set_title("validation error over learning rate and weight decay")
    right.set_title("the same trials over learning rate and rotation")
    left.set(xlabel=r"learning rate $\eta$", ylabel=r"weight decay $\lambda$")
    right.set_xlabel(r"learning rate $\eta$ = initial effective learning rate")
    right.set_ylabel(r"rotation $\theta$ in equilibrium (rad per step)")
    left.legend(loc="lower left")
    ticks, percent = [0.03, 0.05, 0.1, 0.2, 0.5], PercentFormatter(1, 0)
    style: dict[str, Any] = {"ticks": ticks, "format": percent, "extend": "both"}
    figure.colorbar(mesh, ax=[left, right], **style).minorticks_off()
    for sampler in SAMPLERS:
        axes = panels[sampler]
        for coordinates, label in COORDINATES.items():
            regrets = regret(results, sampler, coordinates)
            low, median, high = np.percentile(regrets, (25, 50, 75), axis=0)
            trials = np.arange(1, len(median) + 1)
            axes.plot(trials, median, label=f"over {label}")
            axes.fill_between(trials, low, high, alpha=0.2, lw=0)
        axes.set(title=sampler.replace("tpe", "TPE"), xlabel="trials", ylim=(0, 0.06))
        axes.yaxis.set_major_formatter(percent)
    panels["grid"].set_ylabel("regret: median and quartiles")
    panels["tpe"].legend()
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiment; return the numbers, one entry for each trial."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rule", default="nesterov", choices=BOXES)
    add_data_options(parser)
    add_network_options(parser)
    add("--grid", type=int, default=5, help="root of the number of trials of a search")
    add("--batch", type=int, default=5, help="trials of each search at once")
    add("--seeds", type=int, default=8, help="searches of each kind")
    add("--storage", help="URL of the database that several processes share")
    add("--study", default="normax", help="name of this experiment in the storage")
    options = parser.parse_args(argv)
    setting = make_setting(parser, options, SETTINGS | {"digits": DIGITS})
    if options.grid < 2 or min(options.batch, options.seeds) < 1:
        parser.error("--grid must be at least 2, --batch and --seeds 1.")
    make_folder(parser, options)
    data = load_data(parser, options, setting.batch_size)
    half = len(data.x_train) // 2
    if half < setting.batch_size:
        parser.error(
            f"half of the training images are held out for validation, but {half} are "
            f"less than a batch, {setting.batch_size}."
        )
    x, y = data.x_train, data.y_train
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = make_spaces(options.rule)
    studies = make_studies(parser, options, spaces)
    halves = datasets.Dataset(x[:half], y[:half], x[half:], y[half:])
    errors = train_at(options.rule, halves, setting)
    results = run_trials(options, errors, studies, spaces)
    if missing := len(studies) * options.grid**2 - len(results["trial"]):
        print(
            f"{missing} trials are run by other processes, and the last one writes "
            "the results. If there is none, choose another --study."
        )
        return results
    add_test_errors(results, train_at(options.rule, data, setting))
    print(table(results))
    short = {
        name: np.char.mod("%.4g", x) if x.dtype.kind == "f" else x
        for name, x in results.items()
    }
    name = file_name("hyperparameter_search", options)
    write_csv(short, options.out / f"{name}.csv")
    figure = picture(results, spaces, options.rule)
    figure.savefig(options.out / f"{name}.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
