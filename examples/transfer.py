r"""Rates tuned in one setting, used in another: as they are, by rules, by the angle.

A character transformer trains on the source of Python's standard library, and a
convolutional network with batch norm on images, at a grid of learning rates. Then one
thing changes. The batch is four times as large in as many epochs, the run four times as
long, or the transformer wider. Or another optimizer trains the matrices. In each new
setting all rates of the grid are used in three ways:

- as they are,
- by the usual rule: the root of the batch's factor; weight decay over the factor of the
  duration (Wang and Aitchison); the rate over the factor of the width and the decay
  times it (muP with independent decay); for Lion a fifth of the rate and five times
  the decay; for Muon Moonlight's root mean square 0.2; for hyperball the root of rate
  times decay,
- by `normax.theory.transfer`, which keeps the fraction of the run in which weights
  forget.

The base is AdamW with a decay of 1, so that weights forget within the run. The drift is
a factor in octaves: from the rate of the base that is best in the base to the one that
is best in the new setting; 0 is a perfect transfer. The loss is the excess of the
transferred rate over the best of all ways and rates.

Rates and rules are those of the matrices. Embeddings, gains, biases and the head are
trained by Adam: at a fixed rate, times the root of the batch's factor, and the head's
over the factor of the width. All rates rise for a twentieth of the steps and then fall
to 0 as a cosine.

The program writes a picture and, as CSV, a row for each run to `--out`. It adds what is
finished after each change of the setting.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convnet import add_network_options, make_setting
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from hyperball import (
    BATCH,
    REST,
    Results,
    Task,
    curve,
    dimension_numbers,
    image_task,
    text_task,
    train_network,
)
from layer_dynamics import loss_fn
from matplotlib.figure import Figure
from transformer import Setting as Size

import normax
from normax.theory import Setting, transfer

DECAY = 1.0
OTHERS = ("lion", "hyperball", "momentum", "muon")
FACTOR = 4  # of batch and duration
COLOURS = {
    "as it is": "tab:grey",
    "usual rule": "tab:orange",
    "transfer": "tab:blue",
}
GRID = 2.0 ** np.arange(-8, -3)


class Place(NamedTuple):
    """A setting to train in, and the factors of the usual rule."""

    change: str
    task: Task
    setting: Setting  # without rates
    usual: tuple[float, float] | None = None  # of learning rate and weight decay
    rest: float = 1.0  # factor of the rate of what is no matrix
    head: float = 1.0  # and of the head


def make_optimizer(
    place: Place, params: Any, rates: optax.Schedule, decay: Any
) -> optax.GradientTransformation:
    """Return the rule for the matrices, and Adam for the rest."""
    task, setting = place.task, place.setting
    mask = normax.weight_decay_mask(task.axes, params)
    numbers = dimension_numbers(task.axes, mask, params)
    if setting.rule == "hyperball":
        ours: Any = normax.hyperball(optax.scale_by_adam(), rates, task.axes)
    else:
        shapes = {"muon_weight_dimension_numbers": numbers}
        ours = normax.UPDATE_RULES[setting.rule].make(
            rates, decay, **(shapes if setting.rule == "muon" else {})
        )
    labels = {
        name: jax.tree.map(
            lambda m, name=name: (
                "matrices" if m else "head" if name == "head" else "rest"
            ),
            part,
        )
        for name, part in mask.items()
    }
    rest = REST * place.rest
    return optax.partition(
        {
            "matrices": ours,
            "rest": optax.adam(curve(rest, setting.steps)),
            "head": optax.adam(curve(rest * place.head, setting.steps)),
        },
        labels,
    )


def make_train(place: Place, rates: Any, decays: Any) -> Callable[..., Any]:
    """Return a training run, from a row of the tables of rates and a seed."""
    task, steps = place.task, place.setting.steps
    tables = jnp.asarray(rates), jnp.asarray(decays)

    def train(row: jax.Array, seed: jax.Array) -> Any:
        network = task.make(seed)
        table, decay = (values[row] for values in tables)
        optimizer = make_optimizer(
            place, network.params, lambda count: table[count], decay
        )
        last = max(1, steps // 15)
        return train_network(task, network, optimizer, seed, steps, last)

    return train


def gradient_norms(place: Place, rate: float) -> np.ndarray:
    """Return the gradient norm of the matrices' vectors at each step of one run."""
    task, steps = place.task, place.setting.steps
    network = task.make(0)
    params, rest = network.params, network.rest
    optimizer = make_optimizer(place, params, curve(rate, steps), DECAY)
    monitor = normax.monitor_weight_dynamics(task.axes, gradient_blocks=20)

    def step(carry: Any, key: jax.Array) -> Any:
        params, rest, state, seen = carry
        of = functools.partial(loss_fn, network)
        (_, rest), grads = jax.value_and_grad(of, has_aux=True)(
            params, rest, task.draw(key)
        )
        updates, state = optimizer.update(grads, state, params)
        updates, seen = monitor.update(updates, seen, params, grad=grads)
        return (optax.apply_updates(params, updates), rest, state, seen), None

    @jax.jit
    def run(params: Any, rest: Any) -> Any:
        keys = jax.random.split(jax.random.key(1), steps)
        carry = params, rest, optimizer.init(params), monitor.init(params)
        seen = jax.lax.scan(step, carry, keys)[0][3]
        return normax.spheres.gradient_norm_profile(seen, steps)

    vectors = [x.reshape(steps, -1) for x in jax.tree.leaves(run(params, rest))]
    return np.sqrt(np.square(np.concatenate(vectors, 1)).mean(1))


def ways(base: Place, place: Place, rate: float) -> Iterator[tuple[str, Any, float]]:
    """Yield the names, the rates of all steps and the decays of the new setting."""
    steps = place.setting.steps
    counts = jnp.arange(steps)

    def scaled(factors: tuple[float, float]) -> tuple[Any, float]:
        return curve(rate * factors[0], steps)(counts), DECAY * factors[1]

    if place.change != "hyperball":
        yield "as it is", *scaled((1, 1))
    else:
        # The root falls with the rate's curve, as Levanter's schedule does.
        yield "usual rule", curve(math.sqrt(rate * DECAY), steps)(counts), 0.0
    if place.usual is not None:
        yield "usual rule", *scaled(place.usual)
    known = base.setting
    source = dataclasses.replace(
        known, learning_rate=curve(rate, known.steps), weight_decay=DECAY
    )
    try:
        found = transfer(source, place.setting)
    except ValueError as error:
        # Memory of past steps bounds the angle, and so the largest rates.
        print(f"  transfer of {rate:.2g}: {error}")
    else:
        decay: Any = found.weight_decay or 0.0
        yield "transfer", jax.vmap(found.learning_rate)(counts), decay


def train_all(
    name: str, base: Place, place: Place, grid: Sequence[float], seeds: int, folder: Any
) -> Results:
    """Train in one setting at all rates, in all ways."""
    rows = [(rate, *way) for rate in grid for way in ways(base, place, rate)]
    if place is base:
        rows = [row for row in rows if row[1] == "as it is"]
    base_rates, methods, rates, decays = zip(*rows, strict=True)
    found = normax.sweeps.grid_sweep(
        make_train(place, np.array(rates, np.float32), np.array(decays, np.float32)),
        {"row": np.arange(len(rows)), "seed": np.arange(seeds)},
        progress=True,
        batch_size=1,
        checkpoint_dir=folder,
    )
    count = len(rows) * seeds
    results = {
        "task": np.full(count, name),
        "change": np.full(count, place.change),
        "method": np.repeat(methods, seeds),
        "base_rate": np.repeat(base_rates, seeds),
        "seed": np.tile(np.arange(seeds), len(rows)),
    }
    return results | {key: np.ravel(value) for key, value in found.items()}


def text_places(options: Any) -> Iterator[Place]:
    """Yield the base and all other settings of the transformer."""
    width, steps, batch = options.width, options.steps, options.batch_size

    def task(wide: int, batch: int) -> Task:
        heads = wide // width * options.heads
        size = Size(wide, options.depth, heads, options.context)
        return text_task(size, batch, 500)

    base = Setting(rule="adamw", steps=steps, dimension=width, batch_size=batch)
    place = Place("base", task(width, batch), base)
    yield place
    yield large_batch(task(width, FACTOR * batch), base)
    for wide in options.widths:
        k = wide // width
        setting = dataclasses.replace(base, dimension=wide)
        usual = 1 / k, float(k)
        yield Place(f"width {wide}", task(wide, batch), setting, usual, head=1 / k)
    yield from other_rules(place, width)
    yield longer(place)


def image_places(data: Any, setting: Any) -> Iterator[Place]:
    """Yield the base and all other settings of the convolutional network."""
    batch, inputs = setting.batch_size, 9 * setting.channels[-2]
    steps = setting.epochs * (len(data.x_train) // batch)
    base = Setting(rule="adamw", steps=steps, dimension=inputs, batch_size=batch)
    place = Place("base", image_task(data, setting), base)
    yield place
    more = setting._replace(batch_size=FACTOR * batch)
    yield large_batch(image_task(data, more), base)
    yield longer(place)
    yield from other_rules(place, setting.channels[-1])


def large_batch(task: Task, base: Setting) -> Place:
    """Return the setting with a larger batch and as many examples."""
    steps, root = max(1, base.steps // FACTOR), FACTOR**0.5
    setting = dataclasses.replace(
        base, steps=steps, batch_size=FACTOR * base.batch_size
    )
    return Place("batch", task, setting, (root, 1.0), rest=root)


def longer(base: Place) -> Place:
    """Return the setting with more steps."""
    setting = dataclasses.replace(base.setting, steps=FACTOR * base.setting.steps)
    return Place("duration", base.task, setting, (1.0, 1 / FACTOR))


def other_rules(base: Place, outputs: int) -> Iterator[Place]:
    """Yield the settings with other optimizers, for matrices of so many outputs."""
    inputs: Any = base.setting.dimension
    rms = 0.2 * max(inputs, outputs) ** 0.5 / max(1, outputs / inputs) ** 0.5
    usual = {"lion": (1 / 5, 5.0), "muon": (rms, 1 / rms)}
    for rule in OTHERS:
        shape: dict[str, Any] = {"rule": rule}
        if rule == "muon":  # whose vector is the matrix, with units of norm 1
            shape |= {"dimension": (inputs, outputs), "initial_norm": outputs**0.5}
        if rule == "momentum":
            shape |= {"gradient_norm": gradient_norms(base, 2**-6)}
        setting = dataclasses.replace(base.setting, **shape)
        yield Place(rule, base.task, setting, usual.get(rule))


def lowest(octaves: np.ndarray, losses: np.ndarray) -> float:
    """Return where a parabola through the five losses around the lowest is lowest."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    middle = int(losses.argmin())
    near = slice(max(0, middle - 2), middle + 3)
    x, y = octaves[near], np.minimum(losses[near], losses[middle] + 1)
    if len(x) < 3:
        return float(octaves[middle])
    a, b, _ = np.polyfit(x - octaves[middle], y, 2)
    # The best rate is not far from the lowest loss, whatever noise does to a parabola.
    shift = -b / (2 * a) if a > 0 else 0.0
    return float(octaves[middle] + np.clip(shift, -1, 1))


class Curve(NamedTuple):
    """Losses of one way in one setting, over the rates of the base's grid."""

    octaves: np.ndarray
    losses: np.ndarray  # (rates, seeds)

    def resampled(self) -> np.ndarray:
        """Return the best rates of samples of seeds, first of the seeds themselves."""
        seeds = self.losses.shape[1]
        samples = [tuple(range(seeds))]
        samples += itertools.combinations_with_replacement(range(seeds), seeds)
        return np.array(
            [lowest(self.octaves, self.losses[:, list(s)].mean(1)) for s in samples]
        )


def curve_of(results: Results, task: str, change: str, method: str) -> Curve:
    """Return the losses of one way in one setting."""
    mine = (results["task"] == task) & (results["change"] == change)
    mine &= results["method"] == method
    rates, seeds = (len(np.unique(results[k][mine])) for k in ("base_rate", "seed"))
    losses = results["loss"][mine].reshape(rates, seeds)
    return Curve(np.log2(np.unique(results["base_rate"][mine])), losses)


class Finding(NamedTuple):
    """How well one way carries the base's best rate to one setting."""

    drift: float  # octaves from the base's best rate to the one that is best here
    low: float  # of the drift, over samples of the seeds
    high: float
    open: bool  # whether the best rate here is an end of the grid
    excess: float  # of the loss at the base's best rate over the lowest of all ways
    error: float  # standard error of this excess, over seeds


def find(results: Results, task: str, change: str, method: str) -> Finding:
    """Return drift and excess of one way in one setting."""
    base = curve_of(results, task, "base", "as it is")
    here = curve_of(results, task, change, method)
    moves = here.resampled()[None] - base.resampled()[:, None]
    low, high = np.quantile(moves[1:, 1:], [0.05, 0.95])
    chosen = base.octaves[base.losses.mean(1).argmin()]
    mine = (results["task"] == task) & (results["change"] == change)
    curves = [
        curve_of(results, task, change, way)
        for way in dict.fromkeys(results["method"][mine])
    ]
    best = min((c.losses[c.losses.mean(1).argmin()] for c in curves), key=np.mean)
    means = here.losses.mean(1)
    at = int(np.abs(here.octaves - chosen).argmin())
    excess = here.losses[at] - best
    ends = int(means.argmin()) in (0, len(means) - 1)
    spread = excess.std(ddof=min(1, len(excess) - 1)) / len(excess) ** 0.5
    return Finding(moves[0, 0], low, high, ends, excess.mean(), spread)


def table(results: Results) -> str:
    """Return the drifts and the losses of all transfers as text."""
    text = "task    change    way              drift  interval        excess  ± error\n"
    for task, change, method in dict.fromkeys(
        zip(*(results[k] for k in ("task", "change", "method")), strict=True)
    ):
        if change != "base":
            found = find(results, task, change, method)
            mark = "*" if found.open else " "
            text += f"{task:8}{change:10}{method:16}{found.drift:+6.2f}{mark} "
            text += f"{found.low:+5.2f} to {found.high:+5.2f}"
            text += f"{found.excess:9.3f}{found.error:9.3f}\n"
    return text


def picture(results: Results) -> Figure:
    """Draw the losses of all ways over the rate of the base."""
    task = str(results["task"][0])
    changes = [c for c in dict.fromkeys(results["change"]) if c != "base"]
    columns = min(4, 3, key=lambda count: -len(changes) % count)
    rows = -(-len(changes) // columns)
    figure = Figure(figsize=(11, 0.6 + 2.7 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    best = 2 ** curve_of(results, task, "base", "as it is").resampled()[0]
    handles: dict[str, Any] = {}
    for axes in panels.flat[len(changes) :]:
        axes.set_axis_off()
    for change, axes in zip(changes, panels.flat, strict=False):
        lowest = []
        handles["best rate of the base"] = axes.axvline(best, color="black", lw=0.8)
        for method in dict.fromkeys(results["method"][results["change"] == change]):
            found = curve_of(results, task, change, method)
            means, style = found.losses.mean(1), {"ms": 3.0, "lw": 1.2}
            lowest.append(np.nanmin(means))
            (line,) = axes.plot(
                2**found.octaves, means, "o-", color=COLOURS[method], **style
            )
            spread = found.losses.min(1), found.losses.max(1)
            axes.fill_between(
                2**found.octaves, *spread, color=COLOURS[method], alpha=0.15, lw=0
            )
            handles[method] = line
        axes.set_xscale("log", base=2)
        axes.set_ylim(0.985 * min(lowest), 1.1 * min(lowest))
        axes.set(title=change, xlabel="learning rate in the base")
        axes.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("held-out loss (nats)")
    figure.suptitle(f"{task}: the same rates of AdamW, carried over in three ways")
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Train, print the table, draw the picture."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--task", default="text", choices=("text", "images"))
    add_data_options(parser)
    add_network_options(parser)
    add("--seeds", type=int, default=3)
    add("--rates", type=float, nargs="+", default=list(GRID), help="of the base")
    add("--steps", type=int, default=200, help="of the transformer")
    add("--batch-size", type=int, default=16, help="of the transformer")
    for name, default in Size(32, 2, 2, 32)._asdict().items():
        add(f"--{name}", type=int, default=default, help="of the transformer")
    wide = [64, 128, 256]
    add("--widths", type=int, nargs="*", default=wide, help="multiples of --width")
    add("--checkpoints", type=Path, help="folder of finished runs, to continue from")
    options = parser.parse_args(argv)
    rates = sorted(set(options.rates))
    if min(options.seeds, options.steps, options.batch_size) < 1:
        parser.error("--seeds, --steps and --batch-size must be at least 1.")
    if options.width % options.heads or any(w % options.width for w in options.widths):
        parser.error("--heads must divide --width, and --width all --widths.")
    if len(rates) < 2 or rates[0] <= 0:
        parser.error("--rates must be two or more positive numbers.")
    make_folder(parser, options)
    name, places = "transfer", text_places(options)
    if options.task == "images":
        setting = make_setting(parser, options)._replace(batch_size=BATCH)
        data = load_data(parser, options, FACTOR * BATCH)
        data = data._replace(x_test=data.x_test[:2000], y_test=data.y_test[:2000])
        name, places = (
            file_name("transfer_images", options),
            image_places(data, setting),
        )
    base: Any = None
    parts: list[Results] = []
    for place in places:
        base = base or place
        print(f"{options.task}: {place.change}", flush=True)
        seeds, folder = options.seeds, options.checkpoints
        parts.append(train_all(options.task, base, place, rates, seeds, folder))
        results = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        write_csv(results, options.out / f"{name}.csv")
    print(table(results))
    picture(results).savefig(options.out / f"{name}.png", dpi=110)
    return results


if __name__ == "__main__":
    main()
