r"""Norms and angles of whole runs, measured beside predicted.

Before training, `normax.UPDATE_RULES[rule].predict` knows the schedule, the decay and
the initial norms. What it lacks is the gradient: its size over the run, and how many
entries of a weight vector it ever reaches. So each run is predicted three times:

- *constant*: gradients of constant size, which reach all entries;
- *measured*: the profile of $\|\nabla L\|\,\|w\|$ that `normax.monitor_weight_dynamics`
  has kept of the run itself in 100 blocks, and the entries that it saw move;
- *other run*: profile and entries of a run with linear decay of the rate and a third of
  the weight decay.

The model takes the gradient for noise. So the ratio of measured to predicted angle is a
diagnosis: above 1 steps agree with each other, and below 1 they undo each other.

Grey images are learned by three dense layers, others by the network of `convnet.py`.
Kernels before batch norm have a decay, and are predicted; all else has none. Without
batch norm's epsilon their scale does not change the loss.

The program writes a picture and, as CSV, a row for every layer and entry to `--out`.
Norms and angles are means over the weight vectors of a layer.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from convnet import ConvNet, Setting
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

import normax

Columns = dict[str, np.ndarray]

BLOCKS = 100
ENTRIES = 50  # of a curve in the results, each the mean over as many steps
WARMUP = 0.1
# Learning rate and weight decay. With these, norms move by a factor of two or more.
RATES = {"adamw": (3e-3, 0.5), "momentum": (0.1, 5e-3), "lion": (3e-4, 3.0)}
SCHEDULES = ("linear", "cosine", "wsd")
OTHER = "linear", 1 / 3  # the schedule of the other run, and the factor of its decay
PREDICTIONS = ("constant", "measured", "other run")
CONVNET = {"channels": (8, 16, 16, 16), "strides": (2, 2, 2, 1)}


def make_rates(name: str, rate: float, steps: int) -> jax.Array:
    """Return the rate of each step of a schedule with warm-up that ends at 0."""
    warmup = max(1, int(WARMUP * steps))
    rest = steps - warmup
    decay = {
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "wsd": optax.linear_schedule(rate, 0.0, rest // 5, rest - rest // 5),
    }[name]
    start = optax.linear_schedule(rate / warmup, rate, warmup)
    return optax.join_schedules([start, decay], [warmup])(jnp.arange(steps))


class DenseNet(nnx.Module):
    """Two dense layers with batch norm and relu, and a linear head."""

    def __init__(self, pixels: int, width: int, classes: int, rngs: nnx.Rngs) -> None:
        sizes = itertools.pairwise((pixels, width, width))
        self.dense = nnx.List(
            nnx.Linear(*size, use_bias=False, rngs=rngs) for size in sizes
        )
        self.norms = nnx.List(nnx.BatchNorm(width, rngs=rngs) for _ in self.dense)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of a batch of images in bytes."""
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = nnx.relu(norm(dense(x)))
        return self.head(x)


def make_network(data: datasets.Dataset, width: int, seed: int) -> nnx.Module:
    """Return the network that suits the images, at the start."""
    classes, channels = int(data.y_train.max()) + 1, data.x_train.shape[-1]
    rngs = nnx.Rngs(seed)
    model: Any
    if channels == 1:
        pixels = math.prod(data.x_train.shape[1:])
        model = DenseNet(pixels, width, classes, rngs)
    else:
        setting = Setting(**CONVNET, batch_size=0, epochs=0, augment=False)
        model = ConvNet(setting, channels, classes, rngs)
    for norm in model.norms:
        norm.epsilon = norm.momentum = 0.0
    return model


def kernel_axes(params: Any) -> Any:
    """Mark the kernels before batch norm, whose scale does not change the loss."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "unit" if path[0].key in ("dense", "convs") else "none", params
    )


class Run(NamedTuple):
    """What one run has measured: lists have an entry for each layer."""

    losses: Any  # (steps,)
    norms: Any  # (steps, vectors) each
    angles: Any
    profile: Any
    entries: Any  # (vectors,): how many ever had a gradient
    sizes: Any  # how many there are


def make_train(data: datasets.Dataset, width: int, batch_size: int, seed: int) -> Any:
    """Return a function of rule, rates and decay that trains and measures."""
    model = make_network(data, width, seed)
    graph, *variables = nnx.split(model, nnx.Param, ...)
    start, statistics = variables
    axes = kernel_axes(start)

    def kernels(tree: Any) -> list[jax.Array]:
        words = jax.tree.leaves(axes)
        pairs = zip(jax.tree.leaves(tree), words, strict=True)
        return [array for array, word in pairs if word == "unit"]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, params, statistics, copy=True)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    # Rates are an array, so that all schedules of a rule share one program.
    @functools.partial(jax.jit, static_argnums=0)
    def train(rule: str, rates: jax.Array, decay: jax.Array, data: Any) -> Run:
        make, schedule = normax.UPDATE_RULES[rule].make, lambda count: rates[count]
        rules = {"unit": make(schedule, decay), "none": make(schedule)}
        monitor = normax.monitor_weight_dynamics(axes, gradient_blocks=BLOCKS)
        optimizer = optax.chain(optax.partition(rules, kernel_axes), monitor)

        def step(carry: Any, key: jax.Array) -> Any:
            params, state, moved = carry
            at = jax.random.randint(key, (batch_size,), 0, len(data.x_train))
            batch = data.x_train[at], data.y_train[at]
            loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
            updates, state = optimizer.update(grads, state, params, grad=grads)
            reached = [g != 0 for g in kernels(grads)]
            moved = jax.tree.map(jnp.logical_or, moved, reached)
            measured = state[-1].weight_norm, state[-1].angular_update
            params = optax.apply_updates(params, updates)
            return (params, state, moved), (loss, jax.tree.leaves(measured))

        moved = [jnp.zeros(w.shape, bool) for w in kernels(start)]
        carry = start, optimizer.init(start), moved
        keys = jax.random.split(jax.random.key(seed), len(rates))
        (_, state, moved), (losses, curves) = jax.lax.scan(step, carry, keys)
        norms, angles = curves[: len(moved)], curves[len(moved) :]
        profile = normax.spheres.gradient_norm_profile(state, len(rates))
        entries = [x.sum(range(x.ndim - 1)) for x in moved]
        sizes = [x[..., 0].size for x in moved]
        profile = jax.tree.leaves(profile)
        return Run(losses, norms, angles, profile, entries, sizes)

    data = jax.device_put(data)
    return lambda rule, rates, decay: jax.device_get(train(rule, rates, decay, data))


@functools.partial(jax.jit, static_argnums=0)
def predict(
    rule: str,
    rates: jax.Array,
    decay: jax.Array,
    start: jax.Array,
    profile: jax.Array,
    entries: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return predicted norms and angles (steps, vectors) of a layer."""
    return normax.UPDATE_RULES[rule].predict(
        lambda count: rates[count],
        decay,
        steps=len(rates),
        initial_norm=start,
        # Predictions need gradients, which a unit may lose for good.
        gradient_norm=jnp.maximum(profile, 1e-12),
        dimension=jnp.maximum(entries, 1),
    )[:2]


def compare(
    rule: str, name: str, rates: jax.Array, decay: float, run: Run, other: Run
) -> list[Columns]:
    """Return the columns of each layer: measured, and predicted in three ways."""
    steps = len(rates)
    # The best constant: the root mean square over the run.
    constant = [
        np.broadcast_to(np.sqrt(np.mean(x**2, 0)), x.shape) for x in run.profile
    ]
    full = [np.full_like(x, n) for x, n in zip(run.entries, run.sizes, strict=True)]
    gradients = {
        "constant": (constant, full),
        "measured": (run.profile, run.entries),
        "other run": (other.profile, other.entries),
    }
    curves = {"norm": run.norms, "angle": run.angles}
    starts = [norms[0] for norms in run.norms]
    for key in PREDICTIONS:
        rows = zip(starts, *gradients[key], strict=True)
        found = jax.device_get([predict(rule, rates, decay, *row) for row in rows])
        norms, angles = zip(*found, strict=True)
        curves |= {f"norm, {key}": norms, f"angle, {key}": angles}
    entries = min(ENTRIES, steps)
    ends = np.linspace(0, steps, entries + 1).astype(int)

    def shorten(curve: np.ndarray) -> np.ndarray:
        mean = curve.reshape(steps, -1).mean(1, dtype=np.float64)
        return np.array([mean[a:b].mean() for a, b in itertools.pairwise(ends)])

    columns = []
    for layer in range(len(run.norms)):
        named = {"rule": rule, "schedule": name, "layer": layer + 1}
        column = {k: np.full(entries, value) for k, value in named.items()}
        column |= {"step": (ends[:-1] + ends[1:]) // 2, "loss": shorten(run.losses)}
        column |= {k: shorten(curve[layer]) for k, curve in curves.items()}
        columns.append(column)
    return columns


def run(data: datasets.Dataset, options: Any) -> Columns:
    """Do all runs; return a row for each rule, schedule, layer and entry."""
    train = make_train(data, options.width, options.batch_size, options.seed)
    columns = []
    with tqdm(total=len(RATES) * (1 + len(SCHEDULES)), unit="run") as progress:
        for rule, (rate, decay) in RATES.items():
            rates = {name: make_rates(name, rate, options.steps) for name in SCHEDULES}
            name, factor = OTHER
            other = train(rule, rates[name], factor * decay)
            progress.update()
            for name in SCHEDULES:
                found = train(rule, rates[name], decay)
                columns += compare(rule, name, rates[name], decay, found, other)
                progress.update()
    return {name: np.concatenate([x[name] for x in columns]) for name in columns[0]}


def select(columns: Columns, **values: Any) -> Columns:
    """Return the rows whose columns have these values."""
    mask = np.logical_and.reduce([columns[name] == v for name, v in values.items()])
    return {name: column[mask] for name, column in columns.items()}


def errors(columns: Columns) -> list[tuple[Any, ...]]:
    """Return for each layer of each run the mean errors, and the ratio of angles.

    The first entry is left out, in which averages over past gradients fill.
    """
    rows = []
    named = zip(columns["rule"], columns["schedule"], columns["layer"], strict=True)
    for rule, schedule, layer in dict.fromkeys(named):
        found = select(columns, rule=rule, schedule=schedule, layer=layer)
        found = {name: column[1:] for name, column in found.items()}
        mean_errors = [
            np.mean(np.abs(found[f"{what}, {key}"] / found[what] - 1))
            for what in ("norm", "angle")
            for key in PREDICTIONS
        ]
        ratio = np.exp(np.mean(np.log(found["angle"] / found["angle, measured"])))
        rows.append((rule, schedule, layer, *mean_errors, ratio))
    return rows


def table(columns: Columns) -> str:
    """Return what was found as text."""
    text = """
                            error of the norm       error of the angle     measured /
rule     schedule layer  const. measured other   const. measured other   predicted angle
"""
    for rule, schedule, layer, *numbers in errors(columns):
        text += f"{rule:9}{schedule:8} {layer:4}  "
        cells = "{:8.1%}{:8.1%}{:8.1%}  {:8.1%}{:8.1%}{:8.1%}{:12.2f}"
        text += cells.format(*numbers) + "\n"
    return text


def picture(columns: Columns, layer: int) -> Figure:
    """Draw norms and angles of one layer: a column for each rule."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels: Any = figure.subplots(2, len(RATES), sharex=True)
    styles: dict[str, Any] = {
        "measured": {"lw": 5, "alpha": 0.3},
        "predicted, measured gradient norms": {"lw": 1.5},
        "predicted, gradient norms of another run": {"lw": 1.8, "ls": (0, (1, 1.5))},
        "predicted, constant gradient norm": {"lw": 1, "ls": (0, (6, 3)), "alpha": 0.8},
    }
    keys = "", ", measured", ", other run", ", constant"
    for rule, column in zip(RATES, panels.T, strict=True):
        for index, schedule in enumerate(SCHEDULES):
            found = select(columns, rule=rule, schedule=schedule, layer=layer)
            for what, axes in zip(("norm", "angle"), column, strict=True):
                for key, style in zip(keys, styles.values(), strict=True):
                    curve = found[what + key]
                    axes.plot(found["step"], curve, color=f"C{index}", **style)
        column[0].set_title(rule)
        column[1].set_xlabel("step")
    panels[0, 0].set_ylabel(f"norm of the weight vectors, layer {layer}")
    panels[1, 0].set_ylabel(f"angle per step (radians), layer {layer}")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_yscale("log")
    handles = [Line2D([], [], color="0.2", label=k, **v) for k, v in styles.items()]
    handles += [
        Line2D([], [], color=f"C{index}", lw=3, label=name)
        for index, name in enumerate(SCHEDULES)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> Columns:
    """Train, predict, print the table, draw the picture."""
    parser = make_parser(__doc__)
    add_data_options(parser)
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=128)
    add("--width", type=int, default=128, help="of the dense layers")
    add("--layer", type=int, default=1, help="that the picture shows")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.steps < 20 or min(options.batch_size, options.width) < 1:
        parser.error("--steps must be at least 20, --batch-size and --width 1.")
    make_folder(parser, options)
    data = load_data(parser, options, options.batch_size)
    layers = 2 if data.x_train.shape[-1] == 1 else len(CONVNET["channels"])
    if not 1 <= options.layer <= layers:
        parser.error(f"--layer must be from 1 to {layers}, got {options.layer}.")
    columns = run(data, options)
    print(table(columns))
    name = file_name("whole_run", options)
    rounded = {
        k: np.array([f"{x:.4g}" for x in v]) if v.dtype == float else v
        for k, v in columns.items()
    }
    write_csv(rounded, options.out / f"{name}.csv")
    picture(columns, options.layer).savefig(options.out / f"{name}.png", dpi=110)
    return columns


if __name__ == "__main__":
    main()
