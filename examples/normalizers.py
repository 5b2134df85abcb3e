r"""The same small network with each normalizer: curves, norms and angles.

The network learns the 8x8 digits by SGD with momentum. It has two 3x3 convolutions of 8
and 16 channels, the second with stride 2, and a linear head. A normalizer and a ReLU
follow each convolution. The network is trained four times with every normalizer:
plainly; with weight decay of the kernels; with the norms of the kernels held at the
initial ones (`normax.project_unit_norm`); and with both. A normalizer is invariant to
the scale of the weights into a unit, or of the whole layer. These are the weight
vectors here, as listed in `normax.invariance.INVARIANCES`.

Behind a normalizer, the norm of a kernel only divides the learning rate. Without decay
the norm grows, and the angle by which a step turns the weights falls. With decay the
norm shrinks, and the angle settles. On the sphere the angle follows the gradient alone,
and decay does not matter.

The second experiment compares batch normalization with batch renormalization. Both are
trained with batches of 2 to 128 images, for the same number of epochs. The limits of
batch renormalization open up after a tenth of the run. The network has two fully
connected hidden layers of 64 units. A convolution would suffer less from small batches,
because it takes statistics over pixels too. Learning rates are proportional to the
batch size. Running statistics average over the same number of images at every batch
size.

The program writes a picture of means over seeds and all numbers as CSV to `--out`. It
prints test errors, norms and angles at the end, and test errors by batch size.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from convnet import conv_as_matmul
from experiments import make_folder, make_parser, write_csv
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

import normax

Results = dict[str, np.ndarray]

BATCH_SIZE = 64
BATCH_SIZES = (2, 4, 8, 32, 128)
LEARNING_RATE, MOMENTUM = 0.1, 0.9
WEIGHT_DECAY = 0.01
NORMALIZERS = (
    "none",
    "BatchNorm",
    "BatchRenorm",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm",
    "WeightNorm",
)
# Each condition has a weight decay, and says whether the norms are kept.
CONDITIONS = {
    "plain": (0.0, False),
    "decay": (WEIGHT_DECAY, False),
    "projection": (0.0, True),
    "both": (WEIGHT_DECAY, True),
}
MEASURES = ("training_loss", "test_error", "norm", "angle")


class Experiment(NamedTuple):
    """The numbers: `curves` by run and epoch, and `batch_sizes` by run."""

    curves: Results
    batch_sizes: Results


class Training(NamedTuple):
    """The settings that all runs of one compiled program share."""

    normalizer: str
    batch_size: int
    epochs: int
    steps: int
    dense: bool = False


def normalized(training: Training, layer: nnx.Conv | nnx.Linear, rngs: nnx.Rngs) -> Any:
    """Return the layer with its normalizer."""
    name, width = training.normalizer, layer.out_features
    if name == "none":
        return layer
    if name == "WeightNorm":
        return normax.nn.WeightNorm(layer)
    options: dict[str, Any] = {}
    if name == "GroupNorm":
        options["num_groups"] = 4
    if name.startswith("Batch"):
        options["momentum"] = 0.9 ** (training.batch_size / 32)
    if name == "BatchRenorm":
        tenth = training.epochs * training.steps // 10
        options["r_max"] = optax.linear_schedule(1.0, 3.0, tenth, tenth)
        options["d_max"] = optax.linear_schedule(0.0, 5.0, tenth, tenth)
    return nnx.Sequential(layer, getattr(normax.nn, name)(width, rngs=rngs, **options))


class Network(nnx.Module):
    """Two hidden layers, convolutions or fully connected, and a linear head."""

    def __init__(self, training: Training, rngs: nnx.Rngs) -> None:
        self.dense = training.dense
        hidden: list[Any]
        if self.dense:
            hidden = [nnx.Linear(64, 64, rngs=rngs) for _ in range(2)]
        else:
            conv = functools.partial(
                nnx.Conv,
                kernel_size=(3, 3),
                padding=1,
                conv_general_dilated=conv_as_matmul,
                rngs=rngs,
            )
            hidden = [conv(1, 8), conv(8, 16, strides=(2, 2))]
        self.layers = nnx.List(normalized(training, layer, rngs) for layer in hidden)
        # Instance normalization fixes the means over the image, so the head gets all
        # pixels and not the means.
        self.head = nnx.Linear(64 if self.dense else 4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits."""
        if self.dense:
            x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x.reshape(len(x), -1))


def make_optimizer(
    params: Any, normalizer: str, rate: float, decay: jax.Array, projected: jax.Array
) -> optax.GradientTransformation:
    """Return SGD with momentum; decay and projection concern the kernels."""
    row = normax.invariance.INVARIANCES.get(normalizer)
    word = row.orthogonal_gradient if row else "unit"
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and "layers" in jax.tree_util.keystr(path), params
    )
    axes = jax.tree.map(lambda kernel: word if kernel else "none", kernels)
    return optax.chain(
        optax.add_decayed_weights(decay, mask=kernels),
        optax.sgd(rate, MOMENTUM),
        optax.conditionally_transform(
            normax.project_unit_norm(axes, radius="initial"), lambda step: projected
        ),
        normax.monitor_weight_dynamics(axes),
    )


def mean_of(tree: Any) -> jax.Array:
    """Return the mean over all weight vectors."""
    return jnp.mean(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]))


def make_run(training: Training, rate: float) -> Callable[..., dict[str, jax.Array]]:
    """Return a function that trains one network and measures it after every epoch."""
    graphdef = nnx.graphdef(Network(training, nnx.Rngs(0)))

    def run(
        images: tuple[jax.Array, jax.Array],
        labels: tuple[jax.Array, jax.Array],
        start: tuple[Any, Any],
        key: jax.Array,
        decay: jax.Array,
        projected: jax.Array,
    ) -> dict[str, jax.Array]:
        params, rest = start
        optimizer = make_optimizer(params, training.normalizer, rate, decay, projected)

        def loss_fn(model: Network, rows: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(
                model(images[0][rows]), labels[0][rows]
            ).mean()

        def step(carry: Any, rows: jax.Array) -> Any:
            params, rest, state = carry
            model = nnx.merge(graphdef, params, rest)
            loss, grads = nnx.value_and_grad(loss_fn)(model, rows)
            updates, state = optimizer.update(grads, state, params)
            angle = mean_of(optax.tree.get(state, "angular_update"))
            rest = nnx.state(model, nnx.Not(nnx.Param))
            return (optax.apply_updates(params, updates), rest, state), (loss, angle)

        def epoch(carry: Any, key: jax.Array) -> Any:
            order = jax.random.permutation(key, len(images[0]))
            rows = order[: training.steps * training.batch_size]
            rows = rows.reshape(training.steps, training.batch_size)
            carry, (losses, angles) = jax.lax.scan(step, carry, rows)
            params, rest, state = carry
            model = nnx.merge(graphdef, params, rest)
            model.eval()
            error = jnp.mean(model(images[1]).argmax(-1) != labels[1])
            norm = mean_of(optax.tree.get(state, "weight_norm")) / initial_norm
            values = jnp.mean(losses), error, norm, jnp.mean(angles)
            return carry, dict(zip(MEASURES, values, strict=True))

        carry = params, rest, optimizer.init(params)
        initial_norm = mean_of(optax.tree.get(carry[2], "weight_norm"))
        keys = jax.random.split(key, training.epochs)
        return jax.lax.scan(epoch, carry, keys)[1]

    return run


def standardized(data: datasets.Dataset) -> tuple[jax.Array, jax.Array]:
    """Return training and test images of mean 0 and variance 1."""
    mean, deviation = data.x_train.mean(), data.x_train.std()
    parts = (data.x_train, data.x_test)
    return tuple(jnp.asarray((x - mean) / deviation, jnp.float32) for x in parts)  # type: ignore[return-value]


def train_all(
    training: Training, rate: float, conditions: Sequence[str], seeds: int
) -> Results:
    """Train under all conditions at once; return arrays (condition, seed, epoch)."""
    data = datasets.load("digits")
    run = make_run(training, rate)
    across_seeds = jax.vmap(run, (None, None, 0, 0, None, None))
    runs = jax.jit(jax.vmap(across_seeds, (None, None, None, None, 0, 0)))
    decays, projected = zip(*(CONDITIONS[name] for name in conditions), strict=True)
    # XLA takes long to compile random numbers into a larger program. So the networks
    # are drawn one by one.
    networks = [Network(training, nnx.Rngs(seed)) for seed in range(seeds)]
    starts = [nnx.split(network, nnx.Param, ...)[1:] for network in networks]
    found = runs(
        standardized(data),
        (jnp.asarray(data.y_train), jnp.asarray(data.y_test)),
        jax.tree.map(lambda *x: jnp.stack(x), *starts),
        jax.random.split(jax.random.key(0), seeds),
        jnp.array(decays),
        jnp.array(projected),
    )
    return {name: np.asarray(values) for name, values in found.items()}


def columns(training: Training, conditions: Sequence[str], found: Results) -> Results:
    """Return one entry per run and epoch."""
    shape = found[MEASURES[0]].shape
    seed, epoch = np.indices(shape)[1:]
    names: dict[str, Any] = {
        "normalizer": np.full(shape, training.normalizer),
        "condition": np.broadcast_to(np.array(conditions)[:, None, None], shape),
        "batch_size": np.full(shape, training.batch_size),
        "seed": seed,
        "epoch": epoch + 1,
    }
    return {name: np.ravel(values) for name, values in (names | found).items()}


def run(epochs: int, seeds: int, batch_sizes: Sequence[int]) -> Experiment:
    """Run both experiments."""
    images = len(datasets.load("digits").x_train)

    def curves(normalizer: str) -> Results:
        training = Training(normalizer, BATCH_SIZE, epochs, images // BATCH_SIZE)
        found = train_all(training, LEARNING_RATE, list(CONDITIONS), seeds)
        progress.update()
        return columns(training, list(CONDITIONS), found)

    def batches(point: tuple[str, int]) -> Results:
        normalizer, batch_size = point
        short = max(epochs // 4, 1)
        training = Training(normalizer, batch_size, short, images // batch_size, True)
        rate = LEARNING_RATE * batch_size / BATCH_SIZE
        found = columns(
            training, ["plain"], train_all(training, rate, ["plain"], seeds)
        )
        progress.update()
        last = found["epoch"] == short
        return {name: values[last] for name, values in found.items()}

    points = list(itertools.product(("BatchNorm", "BatchRenorm"), batch_sizes))
    # One small run leaves cores of a CPU idle, so several run at once. Any other device
    # is filled by one run.
    workers = os.cpu_count() if jax.default_backend() == "cpu" else 1
    total = len(NORMALIZERS) + len(points)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, unit="run") as progress:
        longest_first = sorted(points, key=lambda point: point[1])
        parts = [
            list(pool.map(batches, longest_first)),
            list(pool.map(curves, NORMALIZERS)),
        ]
    joined = [
        {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        for found in parts
    ]
    return Experiment(curves=joined[1], batch_sizes=joined[0])


def select(results: Results, **values: Any) -> Results:
    """Return the entries whose columns have these values."""
    mask = np.logical_and.reduce([results[name] == v for name, v in values.items()])
    return {name: column[mask] for name, column in results.items()}


def by_epoch(results: Results, name: str) -> np.ndarray:
    """Return means over seeds, by epoch."""
    epochs = np.unique(results["epoch"])
    return np.array([results[name][results["epoch"] == e].mean() for e in epochs])


def table(experiment: Experiment) -> str:
    """Return the final numbers as text, means over seeds."""
    row = "{:14}" + "{:>22}" * len(CONDITIONS)
    lines = ["test error / norm of the kernels' vectors / angle per step in degrees"]
    lines.append(row.format("", *CONDITIONS))
    for normalizer in NORMALIZERS:
        cells = []
        for condition in CONDITIONS:
            runs = select(experiment.curves, normalizer=normalizer, condition=condition)
            _, error, norm, angle = (by_epoch(runs, name)[-1] for name in MEASURES)
            cells.append(f"{error:.1%} / {norm:.2f} / {np.degrees(angle):.2f}")
        lines.append(row.format(normalizer, *cells))
    sizes = np.unique(experiment.batch_sizes["batch_size"])
    row = "{:14}" + "{:>12}" * len(sizes)
    lines += ["", "test error by batch size, mean +- standard deviation over seeds"]
    lines.append(row.format("", *map(str, sizes)))
    for normalizer in ("BatchNorm", "BatchRenorm"):
        cells = []
        for size in sizes:
            runs = select(
                experiment.batch_sizes, normalizer=normalizer, batch_size=size
            )
            errors = 100 * runs["test_error"]
            cells.append(f"{errors.mean():.1f}+-{errors.std():.1f}%")
        lines.append(row.format(normalizer, *cells))
    return "\n" + "\n".join(line.rstrip() for line in lines) + "\n"


def picture(experiment: Experiment) -> Figure:
    """Draw loss, norm and angle by epoch; and test errors, also by batch size."""
    figure = Figure(figsize=(13, 12), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 1.3))
    top, bottom = parts
    panels = top.subplots(3, 4, sharex=True, sharey="row")
    rows = {
        "training_loss": ("training loss", 1.0),
        "norm": ("norm, relative to the start", 1.0),
        "angle": ("angle per step, degrees", 180 / np.pi),
    }
    for (row, (name, (label, unit))), (column, condition) in itertools.product(
        enumerate(rows.items()), enumerate(CONDITIONS)
    ):
        axes = panels[row, column]
        for index, normalizer in enumerate(NORMALIZERS):
            runs = select(experiment.curves, normalizer=normalizer, condition=condition)
            values = unit * by_epoch(runs, name)
            style = {"color": f"C{index}", "label": normalizer}
            axes.plot(np.arange(1, len(values) + 1), values, **style)
        axes.set_yscale("linear" if name == "norm" else "log")
        axes.grid(alpha=0.3)
        if row == 0:
            axes.set_title(condition)
        if row == 2:
            axes.set_xlabel("epoch")
        if column == 0:
            axes.set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    left, right = bottom.subplots(1, 2)
    for index, condition in enumerate(CONDITIONS):
        places = np.arange(len(NORMALIZERS)) + 0.12 * (index - 1.5)
        last = []
        for name in NORMALIZERS:
            runs = select(experiment.curves, normalizer=name, condition=condition)
            last.append(100 * by_epoch(runs, "test_error")[-1])
        left.plot(places, last, "osv^"[index], label=condition)
    left.set_xticks(range(len(NORMALIZERS)), NORMALIZERS, rotation=20)
    left.set_ylabel("test error, %")
    left.set_title("after the last epoch")
    sizes = np.unique(experiment.batch_sizes["batch_size"])
    for normalizer in ("BatchNorm", "BatchRenorm"):
        runs = select(experiment.batch_sizes, normalizer=normalizer)
        errors = 100 * np.array(
            [runs["test_error"][runs["batch_size"] == size] for size in sizes]
        )
        colour = f"C{NORMALIZERS.index(normalizer)}"
        right.plot(sizes, errors.mean(1), "o-", color=colour, label=normalizer)
        limits = errors.min(1), errors.max(1)
        right.fill_between(sizes, *limits, color=colour, alpha=0.15, lw=0)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    ticks = (1, 2, 5, 10, 20, 50, 100)
    right.set_yticks(ticks, ticks)
    right.yaxis.set_minor_locator(NullLocator())
    right.set_xticks(sizes, sizes)
    right.set_xlabel("batch size")
    right.set_ylabel("test error, %")
    right.set_title("batch sizes, mean and range over seeds")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> Experiment:
    """Run both experiments; return their numbers."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="a quarter for the batch sizes")
    add("--seeds", type=int, default=3, help="number of repetitions")
    add("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    options = parser.parse_args(argv)
    if min(options.epochs, options.seeds) < 1 or min(options.batch_sizes) < 2:
        parser.error(
            "--epochs and --seeds must be at least 1, --batch-sizes at least 2."
        )
    make_folder(parser, options)
    experiment = run(options.epochs, options.seeds, options.batch_sizes)
    print(table(experiment))
    write_csv(experiment.curves, options.out / "normalizers.csv")
    write_csv(experiment.batch_sizes, options.out / "normalizers_batch_sizes.csv")
    picture(experiment).savefig(options.out / "normalizers.png", dpi=110)
    return experiment


if __name__ == "__main__":
    main()
