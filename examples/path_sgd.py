r"""Path-SGD, SGD and AdaGrad from balanced and from unbalanced weights.

Neyshabur, Salakhutdinov and Srebro (2015, section 5, figures 2 and 3) train networks
of two hidden layers of ReLUs from two starts:

- *Balanced*: kernels are Gaussian with standard deviation $1/\sqrt{\text{inputs}}$.
- *Unbalanced*: hidden units of the same network, a quarter of their number, are picked
  with replacement. The incoming weights of each are multiplied by $10^c$ and its
  outgoing ones divided by it, with log-normal $c$.

Both starts compute the same function. The steps of Path-SGD keep the functions equal,

$$w_e \leftarrow w_e - \frac{\eta}{\gamma_p(w, e)} \frac{\partial L}{\partial w_e},$$

and those of SGD and AdaGrad do not. With `--dropout`, half of the hidden units are left
out of the loss, drawn anew for every example. They are not left out of the path scales
$\gamma_p$.

Step sizes are $\eta = 10^{-\alpha}$, $\alpha = 0, \dots, 10$. One is chosen for every
rule and start, but for Path-SGD only once, from the balanced start. It is the step size
that reaches the smallest validation error, and the fastest one if several do. The
network is then trained anew on all training data. Every seed is an experiment of its
own: weights, factors, validation set, batches and step sizes.

The program writes a picture and all numbers as CSV to `--out`. The picture shows
cross-entropy, training error and test error by epoch, as median, minimum and maximum
over seeds. The program prints three results: the final numbers; when a rule first
reaches the cross-entropy with which balanced SGD ends; and how far apart the two starts
of Path-SGD came.

By default the data are 8x8 digits and the layers have 128 units, which takes a minute.
`--dataset cifar10` has the paper's data, widths, batches and epochs. Unlike in the
paper, step sizes are chosen in runs of a quarter of the epochs. The paper leaves three
choices open. Here inputs have mean 0 and variance 1 over all pixels, the log-normal
distribution is the standard one, and dropout spares the inputs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import normax

Results = dict[str, np.ndarray]
Params = list[jax.Array]


class Setting(NamedTuple):
    """Network and training run that suit a data set."""

    width: int
    epochs: int


SETTINGS = dict.fromkeys(datasets.NAMES, Setting(4000, 100))
SETTINGS["digits"] = Setting(128, 100)
BATCH_SIZE = 100
STEP_SIZES = 10.0 ** -np.arange(11)
RULES: dict[str, Callable[[jax.Array], optax.GradientTransformation]] = {
    "Path-SGD": normax.path_sgd,
    "SGD": normax.UPDATE_RULES["sgd"].make,
    "AdaGrad": normax.UPDATE_RULES["adagrad"].make,
}
STARTS = ("balanced", "unbalanced")
PERCENT_TICKS = (0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1)
MEASURES = ("cross_entropy", "training_error", "test_error")


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply in full float32; the default of GPUs and TPUs has fewer digits."""
    return jnp.matmul(x, kernel, precision="highest")


def network(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Return the logits; with a key, hidden units are dropped."""
    for layer, kernel in enumerate(params[:-1]):
        x = jax.nn.relu(matmul(x, kernel))
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, layer), 0.5, x.shape)
            x = jnp.where(kept, 2 * x, 0)
    return matmul(x, params[-1])


def balanced(key: jax.Array, widths: Sequence[int]) -> Params:
    """Draw the balanced start."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        jax.random.normal(key, shape) / np.sqrt(shape[0])
        for key, shape in zip(keys, itertools.pairwise(widths), strict=True)
    ]


class Split(NamedTuple):
    """Indices to train on, and weights of all images for both averages."""

    train: np.ndarray
    shares: tuple[np.ndarray, np.ndarray]


def make_split(count: int, train: np.ndarray, test: np.ndarray) -> Split:
    """Return the split of all images; some may be in neither set."""
    one, other = (np.bincount(x, minlength=count) / len(x) for x in (train, test))
    return Split(train, (one.astype(np.float32), other.astype(np.float32)))


def splits(data: datasets.Dataset, seed: int) -> tuple[Split, Split]:
    """Return training and validation set, and the entire training and test set."""
    n, count = len(data.x_train), len(data.x_train) + len(data.x_test)
    held, kept = np.split(
        np.random.default_rng(seed).permutation(n), [min(10_000, n // 5)]
    )
    entire, test = np.split(np.arange(count), [n])
    return make_split(count, kept, held), make_split(count, entire, test)


def all_examples(data: datasets.Dataset) -> tuple[jax.Array, jax.Array]:
    """Return rows of mean 0 and variance 1 over all training pixels, and classes."""
    images = np.concatenate([data.x_train, data.x_test])
    rows = (images - data.x_train.mean()) / data.x_train.std()
    labels = np.concatenate([data.y_train, data.y_test])
    return jnp.asarray(rows.reshape(len(rows), -1), jnp.float32), jnp.asarray(labels)


def measure(
    examples: tuple[jax.Array, jax.Array],
    shares: tuple[jax.Array, jax.Array],
    params: Params,
) -> dict[str, jax.Array]:
    """Return cross-entropy and both errors, without dropout."""

    def one(example: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = network(params, example[0])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, example[1])
        return loss, logits.argmax() != example[1]

    losses, errors = jax.lax.map(one, examples, batch_size=1000)
    # If the logits are NaN, the class with the largest one means nothing.
    errors = jnp.where(jnp.isfinite(losses), errors, jnp.nan)
    train, test = shares
    pairs = (train, losses), (train, errors), (test, errors)
    means = (jnp.where(share > 0, share * x, 0).sum() for share, x in pairs)
    return dict(zip(MEASURES, means, strict=True))


def make_run(
    data: datasets.Dataset,
    examples: tuple[jax.Array, jax.Array],
    rule: str,
    setting: Setting,
    dropout: bool,
    seeds: int,
    validate: bool,
) -> Callable[..., dict[str, jax.Array]]:
    """Return a training run, with a quarter of the epochs if it is to validate."""
    x, y = examples
    widths = x.shape[1], setting.width, setting.width, int(y.max()) + 1
    chosen = [splits(data, seed)[0 if validate else 1] for seed in range(seeds)]
    shares = tuple(
        map(jnp.stack, zip(*(split.shares for split in chosen), strict=True))
    )
    epochs = max(setting.epochs // 4, 1) if validate else setting.epochs
    # The number of steps per epoch does not depend on the images held out.
    steps = len(data.x_train) // BATCH_SIZE

    def batches(seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        return np.resize(rng.permutation(chosen[seed].train), (steps, BATCH_SIZE))

    orders = jnp.array(
        [[batches(seed, epoch) for epoch in range(epochs)] for seed in range(seeds)]
    )

    def loss_fn(params: Params, indices: jax.Array, key: jax.Array) -> jax.Array:
        logits = network(params, x[indices], key if dropout else None)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[indices])
        return losses.mean()

    def train(
        start: jax.Array, seed: jax.Array, step_size: jax.Array
    ) -> dict[str, jax.Array]:
        optimizer = RULES[rule](step_size)
        own = shares[0][seed], shares[1][seed]

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            grads = jax.grad(loss_fn)(params, *batch)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry: Any, number: jax.Array) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, number), steps)
            carry, _ = jax.lax.scan(step, carry, (orders[seed, number], keys))
            return carry, measure(examples, own, carry[0])

        key = jax.random.key(seed)
        init_key, factor_key = jax.random.split(key)
        one = balanced(init_key, widths)
        other = normax.rescaling.random_rescaling(factor_key, one)
        params = [jnp.where(start == 0, *pair) for pair in zip(one, other, strict=True)]
        before = measure(examples, own, params)
        carry = params, optimizer.init(params)
        _, after = jax.lax.scan(epoch, carry, jnp.arange(epochs))
        return jax.tree.map(jnp.append, before, after)

    return train


def fastest(errors: np.ndarray) -> int:
    """Return the row in which the smallest error of all comes first."""
    errors = np.where(np.isnan(errors), np.inf, errors)
    return int(np.lexsort((errors.argmin(1), errors.min(1)))[0])


def run(
    data: datasets.Dataset,
    setting: Setting,
    dropout: bool,
    seeds: int,
    checkpoint_dir: Path | None = None,
) -> Results:
    """Choose the step sizes and train; return one array entry per run and epoch."""
    # One small run leaves cores of a CPU idle, so several run at once. Any other device
    # is filled by one run.
    sweep_options: dict[str, Any] = {
        "batch_size": None if jax.default_backend() == "cpu" else 1,
        "checkpoint_dir": checkpoint_dir,
        "progress": True,
    }
    examples, rows = all_examples(data), []
    for rule in RULES:
        experiment = data, examples, rule, setting, dropout, seeds
        make = functools.partial(make_run, *experiment)
        # The starts of Path-SGD train alike up to rounding. Yet rounding could decide
        # between two step sizes with nearly the same error. So one start decides.
        deciding = STARTS[:1] if rule == "Path-SGD" else STARTS
        grid: dict[str, np.ndarray] = {"start": np.arange(len(deciding))}
        grid |= {"seed": np.arange(seeds), "step_size": STEP_SIZES}
        errors = normax.sweeps.grid_sweep(make(True), grid, **sweep_options)[
            "test_error"
        ]
        runs = np.concatenate(np.asarray(errors)[..., 1:])
        chosen = [STEP_SIZES[fastest(curves)] for curves in runs]
        starts, numbers = np.divmod(np.arange(len(STARTS) * seeds), seeds)
        points = {"start": starts, "seed": numbers}
        points |= {"step_size": np.resize(chosen, starts.size)}
        curves = normax.sweeps.sweep(make(False), points, **sweep_options)
        points = {"rule": np.full(starts.size, rule), **points}
        points |= {"start": np.take(STARTS, starts)}
        epochs = np.arange(setting.epochs + 1)
        columns = {name: np.repeat(x, epochs.size) for name, x in points.items()}
        columns |= {"epoch": np.tile(epochs, starts.size)}
        rows.append(columns | {name: np.ravel(curves[name]) for name in MEASURES})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def select(results: Results, rule: str, start: str) -> Results:
    """Return the numbers of one rule from one start, as arrays (seed, epoch)."""
    mask = (results["rule"] == rule) & (results["start"] == start)
    seeds = len(np.unique(results["seed"]))
    return {name: x[mask].reshape(seeds, -1) for name, x in results.items()}


def diverged(curves: Results) -> np.ndarray:
    """Return which runs end with a larger cross-entropy than at the start, or NaN."""
    loss = curves["cross_entropy"]
    return ~(loss[:, -1] <= loss[:, 0])


def first_epoch(curves: Results, targets: np.ndarray) -> str:
    """Return the median epoch that reaches the targets, or a dash if there is none."""
    reached = curves["cross_entropy"] <= targets[:, None]
    epoch = np.median(np.where(reached.any(1), reached.argmax(1), np.inf))
    return f"{epoch:.0f}" if np.isfinite(epoch) else "-"


def difference(results: Results) -> dict[str, float]:
    """Return the largest gaps between the starts of Path-SGD, relative for the loss."""
    one, other = (select(results, "Path-SGD", start) for start in STARTS)
    gaps = {name: np.abs(one[name] - other[name]) for name in MEASURES}
    gaps["cross_entropy"] /= one["cross_entropy"]
    return {name: float(gap.max()) for name, gap in gaps.items()}


def table(results: Results) -> str:
    """Return the final numbers, medians over seeds, as text."""
    text = """
                                        cross-   training  test     epochs to loss of
rule      start       step size         entropy  error     error    SGD, balanced
"""
    targets = select(results, "SGD", "balanced")["cross_entropy"][:, -1]
    for rule, start in itertools.product(RULES, STARTS):
        curves = select(results, rule, start)
        powers = np.unique(np.log10(curves["step_size"]).round().astype(int))[::-1]
        sizes = ", ".join(f"1e{power}" for power in powers)
        final = [np.median(curves[name][:, -1]) for name in MEASURES]
        text += f"{rule:10}{start:12}{sizes:18}"
        text += "{:<9.2g}{:<10.2%}{:<9.2%}".format(*final)
        failed = diverged(curves)
        if failed.any():
            text += f"- (diverged: {failed.sum()} of {failed.size})\n"
        else:
            text += f"{first_epoch(curves, targets)}\n"
    text += (
        "Path-SGD from the two starts: cross-entropies differ by at most "
        "{cross_entropy:.1e} of\ntheir value, training errors by {training_error:.2%} "
        "and test errors by {test_error:.2%}.\n"
    )
    return text.format(**difference(results))


def picture(results: Results, dataset: str, dropout: bool) -> Figure:
    """Draw cross-entropy, training error and test error by epoch."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for colour, rule in enumerate(RULES):
        for start in STARTS:
            curves = select(results, rule, start)
            label = f"{rule}, {start}" + " (diverged)" * bool(diverged(curves).any())
            style: dict[str, Any] = {"color": f"C{colour}", "linewidth": 1.5}
            if start == "unbalanced":
                style |= {"linestyle": (0, (4, 3)), "zorder": 3}
            # The lines of the two starts of Path-SGD coincide, so one is drawn wide.
            if rule == "Path-SGD":
                wide = {"linewidth": 5, "alpha": 0.4}
                style |= {"color": "black"} if start == "unbalanced" else wide
            for axes, name in zip(panels, MEASURES, strict=True):
                values = curves[name]
                x = np.arange(values.shape[1])
                axes.plot(x, np.median(values, 0), label=label, **style)
                limits = values.min(0), values.max(0)
                axes.fill_between(x, *limits, color=style["color"], alpha=0.1, lw=0)
    titles = ("cross-entropy, training data", "training error", "test error")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, results["epoch"].max())
    low = {name: 0.7 * np.nanmin(results[name]) for name in MEASURES}
    panels[0].set_yscale("log")
    panels[0].set_ylim(low["cross_entropy"], 5 * results["cross_entropy"][0])
    for axes, name in zip(panels[1:], MEASURES[1:], strict=True):
        ticks = TENTHS if low[name] > 0.1 else PERCENT_TICKS
        # Training errors become 0, so the axis is linear below the first tick.
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_yticks(ticks)
        axes.set_yticklabels([f"{100 * tick:g}%" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low[name] if low[name] > 1e-3 else 0, 1)
    figure.suptitle(f"{dataset}, dropout" if dropout else dataset)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(RULES), frameon=False
    )
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiment; return the numbers, one entry for each run and epoch."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data_options(parser)
    add("--dropout", action="store_true", help="leave out half of the hidden units")
    add("--width", type=int, help="units of a layer; default: what suits the data set")
    add("--epochs", type=int, help="default: what suits the data set")
    add("--seeds", type=int, default=3, help="number of repetitions")
    add("--checkpoints", type=Path, help="folder of finished runs, to continue from")
    options = parser.parse_args(argv)
    setting = SETTINGS[options.dataset]
    given = {"width": options.width, "epochs": options.epochs}
    setting = setting._replace(**{k: v for k, v in given.items() if v is not None})
    if min(*setting, options.seeds) < 1:
        parser.error("--width, --epochs and --seeds must be at least 1.")
    make_folder(parser, options)
    data = load_data(parser, options, BATCH_SIZE)
    arguments = options.dropout, options.seeds, options.checkpoints
    results = run(data, setting, *arguments)
    print(table(results))
    name = file_name("path_sgd", options) + "_dropout" * options.dropout
    write_csv(results, options.out / f"{name}.csv")
    figure = picture(results, options.dataset, options.dropout)
    figure.savefig(options.out / f"{name}.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
