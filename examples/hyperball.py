r"""Norms fixed or left to decay: AdamW, rotational AdamW, AdamH and MuonH over rates.

Two small networks train at a grid of learning rates, with several seeds: a character
transformer on the source of Python's standard library, and a convolutional network with
batch norm on images. The rate in question is that of the matrices: kernels of
attention, of dense layers, of convolutions. Embeddings, gains, biases and the head are
trained by Adam at one fixed rate in all runs, because their norms are part of the
function. All rates rise for a twentieth of the steps and then fall to 0 as a cosine.

- AdamW has the decay, of several, whose best rate has the lowest loss.
- Rotational AdamW turns each weight vector by the angle at which AdamW settles. The
  angle depends on the product of rate and decay, so the decay is fixed.
- AdamH and MuonH are `normax.hyperball` around Adam and Muon, per matrix.

The loss is that of held-out text or images after training, a mean over seeds. The width
of a basin is the range of rates, in octaves, in which this mean is within 5 % of the
rule's lowest. It is interpolated between the rates of the grid.

The program writes a picture and, as CSV, a row for each run to `--out`.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convnet import ConvNet, add_network_options, make_setting
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from flax import nnx
from layer_dynamics import Network, evaluate, from_nnx, loss_fn
from matplotlib.figure import Figure
from transformer import HELD_OUT, Setting, Transformer, read_text, windows

import normax

Results = dict[str, np.ndarray]
# The least and the largest rate, and the decays, of each rule.
RULES: dict[str, tuple[float, float, list[float]]] = {
    "adamw": (2**-13, 2**-3, [0.1, 0.5, 2.5]),
    "rotational_adamw": (2**-13, 2**1, [0.5]),
    "adamh": (2**-10, 2**-1, [0.0]),
    "muonh": (2**-10, 2**-1, [0.0]),
}
BATCH = 64  # images
REST = 3e-3  # the rate of what is no matrix
OUTSIDE = ("embed", "position", "head")  # matrices whose norm is part of the function
WITHIN = 1.05
COLOURS = dict(
    zip(RULES, ("tab:grey", "tab:orange", "tab:blue", "tab:green"), strict=True)
)


class Task(NamedTuple):
    """A network at the start, as a function of the seed, and what it learns."""

    make: Callable[[Any], Network]
    draw: Callable[[jax.Array], Any]
    test: Any
    axes: Any


def text_task(setting: Setting, batch_size: int, pieces: int) -> Task:
    """Return the character transformer on Python's standard library."""
    text = read_text()
    known, held_out = np.split(text, [int(len(text) * (1 - HELD_OUT))])

    def make(seed: Any) -> Network:
        rngs = nnx.Rngs(jax.random.key(seed))
        return plain(from_nnx(Transformer(setting, rngs)))

    def draw(key: jax.Array) -> Any:
        starts = jax.random.randint(key, (batch_size,), 0, len(known) - setting.context)
        return windows(known, starts, setting.context)

    starts = jnp.linspace(0, len(held_out) - setting.context - 1, pieces)
    test = windows(held_out, starts.astype(int), setting.context)
    return Task(make, draw, test, matrices(make(0)))


def image_task(data: Any, setting: Any) -> Task:
    """Return the convolutional network on images."""
    x, y, *test = map(jnp.asarray, data)
    classes = int(y.max()) + 1

    def make(seed: Any) -> Network:
        rngs = nnx.Rngs(jax.random.key(seed))
        return plain(from_nnx(ConvNet(setting, x.shape[-1], classes, rngs)))

    def draw(key: jax.Array) -> Any:
        chosen = jax.random.randint(key, (setting.batch_size,), 0, len(x))
        return x[chosen], y[chosen]

    return Task(make, draw, tuple(test), matrices(make(0)))


def matrices(network: Network) -> Any:
    """Return the axes of the matrices; "none" for all else."""
    outside = {k: v for k, v in network.params.items() if k in OUTSIDE}
    return network.axes | jax.tree.map(lambda w: "none", outside)


def plain(network: Network) -> Network:
    """Return the network with its parameters in dicts, as Muon wants them."""
    return network._replace(params=nnx.to_pure_dict(network.params))


def dimension_numbers(axes: Any, mask: Any, params: Any) -> Any:
    """Return which axes of each matrix are inputs and which are outputs, for Muon."""

    def numbers(chosen: bool, w: jax.Array, inputs: Any) -> Any:
        if not chosen:
            return optax.MaskedNode()
        outputs = tuple(i for i in range(w.ndim) if i not in inputs)
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return jax.tree.map(numbers, mask, params, axes)


def curve(peak: Any, steps: int) -> optax.Schedule:
    """Return rates that rise for a twentieth of the steps and fall as a cosine."""

    def at(count: Any) -> jax.Array:
        cosine = (1 + jnp.cos(jnp.pi * count / steps)) / 2
        return peak * jnp.minimum((count + 1) / max(1, steps // 20), cosine)

    return at


def make_optimizer(
    rule: str, task: Task, params: Any, steps: int, rate: Any, decay: Any
) -> optax.GradientTransformation:
    """Return the rule for the matrices, and Adam for the rest."""
    schedule = functools.partial(curve, steps=steps)
    mask = normax.weight_decay_mask(task.axes, params)
    if rule == "adamw":
        ours: Any = optax.adamw(schedule(rate), weight_decay=decay)
    elif rule == "rotational_adamw":
        # The root of its rate is an angle, which is to fall as the other rates do.
        ours = normax.rotational_adamw(
            lambda count: rate * schedule(1.0)(count) ** 2, decay, axes=task.axes
        )
    else:
        numbers = dimension_numbers(task.axes, mask, params)
        inner = {
            "adamh": optax.scale_by_adam(),
            "muonh": optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
        }[rule]
        ours = normax.hyperball(inner, schedule(rate))
    labels = jax.tree.map(lambda m: "matrices" if m else "rest", mask)
    return optax.partition(
        {"matrices": ours, "rest": optax.adam(schedule(REST))}, labels
    )


def train_network(
    task: Task, network: Any, optimizer: Any, seed: jax.Array, steps: int, last: int
) -> dict[str, jax.Array]:
    """Train; return held-out loss and error, and the mean of the last losses."""
    params, rest = network.params, network.rest

    def step(carry: Any, key: jax.Array) -> Any:
        params, rest, state = carry
        of = functools.partial(loss_fn, network)
        (loss, rest), grads = jax.value_and_grad(of, has_aux=True)(
            params, rest, task.draw(key)
        )
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), rest, state), loss

    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), steps)
    carry = params, rest, optimizer.init(params)
    (params, rest, _), losses = jax.lax.scan(step, carry, keys)
    loss, error = evaluate(network.apply, params, rest, task.test)
    return {"loss": loss, "error": error, "training_loss": losses[-last:].mean()}


def make_train(rule: str, task: Task, steps: int) -> Callable[..., Any]:
    """Return a training run, from rate, decay and seed to held-out loss and error."""

    def train(rate: jax.Array, decay: jax.Array, seed: jax.Array) -> Any:
        network = task.make(seed)
        optimizer = make_optimizer(rule, task, network.params, steps, rate, decay)
        return train_network(task, network, optimizer, seed, steps, last=20)

    return train


def run(
    tasks: dict[str, tuple[Task, int]], rates: int, seeds: int, folder: Any
) -> Results:
    """Train everything; return one entry for each run."""
    columns: dict[str, list[np.ndarray]] = {}
    for name, (task, steps) in tasks.items():
        for rule, (low, high, decays) in RULES.items():
            print(f"{name}: {rule}", flush=True)
            grid: dict[str, np.ndarray] = {
                "rate": np.geomspace(low, high, rates, dtype=np.float32),
                "decay": np.array(decays, np.float32),
                "seed": np.arange(seeds),
            }
            found = normax.sweeps.grid_sweep(
                make_train(rule, task, steps),
                grid,
                progress=True,
                checkpoint_dir=folder,
            )
            points = dict(
                zip(grid, np.meshgrid(*grid.values(), indexing="ij"), strict=True)
            )
            row = {"task": np.full(points["rate"].shape, name)}
            row |= {"rule": np.full(points["rate"].shape, rule)} | points | found
            for key, column in row.items():
                columns.setdefault(key, []).append(np.ravel(column))
    return {key: np.concatenate(parts) for key, parts in columns.items()}


class Basin(NamedTuple):
    """Mean losses of a rule over rates, at its best decay."""

    rates: np.ndarray
    losses: np.ndarray  # (rates, seeds)
    errors: np.ndarray
    decay: float
    best: int  # index of the rate with the lowest mean loss
    octaves: float  # of rates whose loss is within 5 % of the lowest
    open: bool  # whether the basin reaches the end of the grid


def find_basin(results: Results, task: str, rule: str) -> Basin:
    """Choose the decay, and measure the range of good rates."""
    mine = (results["task"] == task) & (results["rule"] == rule)
    shape = [len(np.unique(results[k][mine])) for k in ("rate", "decay", "seed")]
    rates, decays, losses, errors = (
        results[k][mine].reshape(shape) for k in ("rate", "decay", "loss", "error")
    )
    means = np.where(np.isfinite(losses), losses, np.inf).mean(-1)
    column = int(means.min(0).argmin())
    mean, x = means[:, column], np.log2(rates[:, 0, 0])
    limit = WITHIN * mean.min()
    fine = np.linspace(x[0], x[-1], 4001)
    best = int(mean.argmin())
    # A run that diverged has the loss of a guess, so that lines can be drawn to it.
    good = np.interp(fine, x, np.minimum(mean, 10 * mean.min())) <= limit
    at = int(np.abs(fine - x[best]).argmin())
    left = at - int(np.argmin(good[at::-1])) if not good[: at + 1].all() else 0
    right = at + int(np.argmin(good[at:])) if not good[at:].all() else len(fine) - 1
    return Basin(
        rates[:, 0, 0],
        losses[:, column],
        errors[:, column],
        float(decays[0, column, 0]),
        best,
        float(fine[right] - fine[left]),
        bool(good[0] or good[-1]),
    )


def table(results: Results) -> str:
    """Return the best rate of each rule and the width of its basin as text."""
    text = """
task    rule              decay  best rate     loss  ± seeds    error  octaves
"""
    for task in dict.fromkeys(results["task"]):
        for rule in RULES:
            found = find_basin(results, task, rule)
            losses = found.losses[found.best]
            text += (
                f"{task:8}{rule:18}{found.decay:5.1f}{found.rates[found.best]:11.2g}"
            )
            text += (
                f"{losses.mean():9.3f}{losses.std(ddof=min(1, len(losses) - 1)):9.3f}"
            )
            text += f"{found.errors[found.best].mean(dtype=float):9.1%}"
            text += f"{'>' if found.open else '':>4}{found.octaves:.1f}\n"
    return text


def picture(results: Results) -> Figure:
    """Draw the held-out loss of each rule over the rate."""
    tasks = dict.fromkeys(results["task"])
    figure = Figure(figsize=(5.5 * len(tasks), 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(tasks), squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        lowest = []
        for rule in RULES:
            colour = COLOURS[rule]
            found = find_basin(results, task, rule)
            mean = found.losses.mean(1)
            lowest.append(np.nanmin(mean))
            label = f"{rule}: {found.octaves:.1f} octaves"
            if rule == "adamw":
                label = f"{rule}, decay {found.decay:g}: {found.octaves:.1f} octaves"
            axes.plot(found.rates, mean, "o-", color=colour, label=label, ms=3)
            spread = found.losses.min(1), found.losses.max(1)
            axes.fill_between(found.rates, *spread, color=colour, alpha=0.15, lw=0)
        axes.set_xscale("log", base=2)
        axes.set(ylim=(0.98 * min(lowest), 1.6 * min(lowest)), title=task)
        axes.set(xlabel="learning rate of the matrices", ylabel="held-out loss (nats)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Train, print the table, draw the picture."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data_options(parser)
    add_network_options(parser)
    add("--rates", type=int, default=9, help="number of learning rates of each rule")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=300, help="of the transformer")
    add("--batch-size", type=int, default=16, help="of the transformer")
    for name, default in Setting(32, 2, 2, 32)._asdict().items():
        add(f"--{name}", type=int, default=default, help="of the transformer")
    add("--checkpoints", type=Path, help="folder of finished runs, to continue from")
    options = parser.parse_args(argv)
    setting = make_setting(parser, options)._replace(batch_size=BATCH)
    least = min(options.seeds, options.steps, options.batch_size)
    if options.rates < 2 or least < 1:
        parser.error("--rates must be at least 2; --seeds, --steps, --batch-size 1.")
    if options.width % options.heads:
        parser.error(
            f"--heads must divide --width, got {options.heads} and {options.width}."
        )
    make_folder(parser, options)
    data = load_data(parser, options, setting.batch_size)
    data = data._replace(x_test=data.x_test[:2000], y_test=data.y_test[:2000])
    network = Setting(*(getattr(options, name) for name in Setting._fields))
    images = setting.epochs * (len(data.x_train) // setting.batch_size)
    tasks = {
        "text": (text_task(network, options.batch_size, 500), options.steps),
        "images": (image_task(data, setting), images),
    }
    results = run(tasks, options.rates, options.seeds, options.checkpoints)
    print(table(results))
    name = file_name("hyperball", options)
    write_csv(results, options.out / f"{name}.csv")
    picture(results).savefig(options.out / f"{name}.png", dpi=110)
    return results


if __name__ == "__main__":
    main()
