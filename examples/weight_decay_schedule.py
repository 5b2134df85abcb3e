r"""Weight decay without weight decay: a growing rate, or a matched effective rate.

Let the loss not depend on the norms of the weight vectors $w$. Then its gradient is
$g(w) = g(u) / \|w\|$ with $u = w / \|w\|$, and weight decay $\lambda$ acts through the
learning rate alone (van Laarhoven, 2017, section 3.1). Two ways to compute the same
without decay are tried on the kernels of a ConvNet with batch norm.

*Growing rate.* SGD with decay and momentum equals SGD with the same momentum, no decay
and the rate $\eta_t = \eta / (a_t a_{t+1})$. Here $a_t$ is what $t$ steps of decay
alone would leave of the weights (`normax.theory.exponential_equivalent_schedule`).

*Unit norm.* A rule $U$ with decoupled decay, $w_{t+1} = (1 - \eta\lambda)\,w_t -
\eta\,U(g_0, \dots, g_t)$, moves the direction to

$$u_{t+1} = \Pi\Big(u_t - \frac{\eta}{(1 - \eta\lambda)\,\|w_t\|}\,
U\Big(\frac{g(u_0)}{\|w_0\|}, \dots, \frac{g(u_t)}{\|w_t\|}\Big)\Big), \qquad
\Pi(x) = x / \|x\|,$$

because $\Pi$ forgets the factor $(1 - \eta\lambda)\,\|w_t\|$. The projected run needs
only the norms of each vector from the run with decay. For SGD, $U = g_t$, they make one
effective rate $\eta / \big((1 - \eta\lambda)\,\|w_t\|^2\big)$. AdamW's $U$ does not see
a common scale of the gradients, so its rate is
$\eta / \big((1 - \eta\lambda)\,\|w_t\|\big)$. But its averages weigh gradients of
different steps, so an exact run needs their scales $1 / \|w_t\|$ too.

Three inexact runs are compared: AdamW with its rate alone; the geometric mean of the
rates over all vectors, which is an ordinary schedule; and the constant $\eta$.

The equality is exact, but training is chaotic: it amplifies rounding errors until they
are as large as the loss. So everything runs in float32 and in float64. Equal runs part
later in float64, and others part at once. Batch norm's $\epsilon$ is 0, because it
would break the invariance. Running averages would mix the scales of several steps, so
the test uses statistics of training images at the present weights.

`--shrinkage` $s$ sets $\lambda$: decay alone would leave $e^{-s}$ of the kernels. The
growing rate ends near $e^{2s}\eta$, and its weights near $e^s$. Their cube enters the
gradient of batch norm, and float32 can hold it up to $s = 28$, but not at $s = 30$.

The program writes a picture and, as CSV, a row per run and epoch to `--out`. Both
differences are from the run with decay. `difference` is the largest of a step's loss,
divided by the epoch's mean loss. `logits` is the largest of a test logit, divided by
the largest logit. Rates are geometric means.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from convnet import Setting, add_network_options, kernel_axes, make_setting
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from matplotlib.figure import Figure
from recorded_training import Run, Train, make_train, vector_norms
from tqdm import tqdm

import normax

Results = dict[str, np.ndarray]

MOMENTUM = 0.9
RATES = {"momentum": 0.02, "sgd": 0.1, "adamw": 0.002}
PRECISIONS = ("float32", "float64")
DECAY = "weight decay"
COLOURS = {
    DECAY: "0.75",
    "growing rate": "C0",
    "matched": "C0",
    "rate alone": "C2",
    "mean rate": "C1",
    "constant rate": "C3",
}
# From this decay on, decay alone would change the signs of weights, and no growing rate
# can replace it.
LARGEST_DECAY = (1 - MOMENTUM**0.5) / (1 + MOMENTUM**0.5)
LARGEST_SHRINKAGE = 25.0


# Each run has a name, what was recorded, and rates (epoch, step, vector or 1). The run
# with decay comes first.
Runs = Iterator[tuple[str, Run, jax.Array]]


def scale_by_recorded(factors: jax.Array) -> optax.GradientTransformation:
    """Multiply updates of kernels by factors (epoch, step, vector)."""
    factors = factors.reshape(-1, factors.shape[-1])

    def update_fn(updates: Any, count: jax.Array, params: Any = None) -> Any:
        del params
        leaves, structure = jax.tree.flatten(updates)
        ends = np.cumsum([leaf.shape[-1] for leaf in leaves])
        parts = jnp.split(factors[count], ends[:-1])
        scaled = [
            leaf * jnp.expand_dims(part, range(leaf.ndim - 1))
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        return jax.tree.unflatten(structure, scaled), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update_fn)


def momentum_runs(
    rule: str, train: Train, start: Any, shape: tuple[int, int], shrinkage: float
) -> Runs:
    """Train with decay, at the growing rate without it, and without both."""
    rate, steps = RATES[rule], math.prod(shape)
    decay = shrinkage * (1 - MOMENTUM) / (steps * rate)
    make_schedule = normax.theory.exponential_equivalent_schedule

    # If no decay is replaced, the schedule is constant. So all runs share one program.
    @jax.jit
    def run(decay: float, replaced: float) -> Run:
        schedule = make_schedule(rate, replaced, MOMENTUM)
        kernels = optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(schedule, MOMENTUM)
        )
        rules = {"unit": kernels, "none": optax.sgd(rate, MOMENTUM)}
        return train(start, optax.partition(rules, kernel_axes))

    times = jnp.arange(steps).reshape(*shape, 1)
    growing = make_schedule(rate, decay, MOMENTUM)(times)
    constant = jnp.full_like(growing, rate)
    yield DECAY, run(decay, 0.0), constant
    yield "growing rate", run(0.0, decay), growing
    yield "constant rate", run(0.0, 0.0), constant


def unit_norm_runs(
    rule: str, train: Train, start: Any, shape: tuple[int, int], shrinkage: float
) -> Runs:
    """Train with decay, and on the unit sphere at rates matched and not matched."""
    rate, power = RATES[rule], normax.UPDATE_RULES[rule].norm_power
    decay = shrinkage / (math.prod(shape) * rate)
    make = {"sgd": optax.identity, "adamw": optax.scale_by_adam}[rule]

    @jax.jit
    def run(params: Any, decay: float, sphere: bool, scales: Any, rates: Any) -> Run:
        project = normax.project_unit_norm()
        kernels = optax.chain(
            scale_by_recorded(scales),
            make(),
            optax.add_decayed_weights(decay),
            scale_by_recorded(-rates),
            optax.conditionally_transform(project, lambda step: sphere),
        )
        rules = {"unit": kernels, "none": optax.chain(make(), optax.scale(-rate))}
        return train(params, optax.partition(rules, kernel_axes))

    ones = jnp.ones((*shape, len(vector_norms(start))))
    recorded = run(start, decay, False, ones, rate * ones)
    yield DECAY, recorded, rate * ones
    matched = rate / (1 - rate * decay) / recorded.norms**power
    mean = ones * jnp.exp(jnp.log(matched).mean(-1, keepdims=True))
    start = normax.projection_unit_norm(start, kernel_axes(start))
    run_projected = functools.partial(run, start, 0.0, True)
    scales = recorded.norms ** (power - 2)
    yield "matched", run_projected(scales, matched), matched
    if power == 1:
        yield "rate alone", run_projected(ones, matched), matched
    yield "mean rate", run_projected(ones, mean), mean
    yield "constant rate", run_projected(ones, rate * ones), rate * ones


def measure(
    rule: str, found: Run, rates: np.ndarray, reference: Run, labels: np.ndarray
) -> Results:
    """Return the numbers of one run, by epoch."""
    effective = normax.UPDATE_RULES[rule].effective_learning_rate(rates, found.norms)
    difference = np.abs(found.losses - reference.losses).max(1)
    logits = np.abs(found.logits - reference.logits).max((1, 2))
    numbers = {
        "training_loss": found.losses.mean(1),
        "test_error": (found.logits.argmax(-1) != labels).mean(1),
        "rate": np.exp(np.log(rates).mean((1, 2))),
        "effective_rate": np.exp(np.log(effective).mean((1, 2))),
        "difference": difference / reference.losses.mean(1),
        "logits": logits / np.abs(reference.logits).max((1, 2)),
    }
    return {name: column.astype(np.float32) for name, column in numbers.items()}


def run(
    data: datasets.Dataset, setting: Setting, shrinkage: float, seed: int
) -> Results:
    """Do all runs in both precisions; return one entry per run and epoch."""
    start, train = make_train(data, setting, seed)
    shape = setting.epochs, len(data.x_train) // setting.batch_size

    def compare(point: tuple[str, str]) -> list[Results]:
        precision, rule = point
        make_runs = momentum_runs if rule == "momentum" else unit_norm_runs
        columns: list[Results] = []
        reference: Run | None = None
        exact = jax.default_matmul_precision("highest")
        with jax.enable_x64(precision == "float64"), exact:
            params = jax.tree.map(lambda w: w.astype(precision), start)
            for name, *arrays in make_runs(rule, train, params, shape, shrinkage):
                found, rates = jax.device_get(arrays)
                reference = reference or found
                numbers = measure(rule, found, rates, reference, data.y_test)
                named = {"rule": rule, "precision": precision, "run": name}
                column = {k: np.full(shape[0], value) for k, value in named.items()}
                epoch = {"epoch": np.arange(1, shape[0] + 1)}
                columns.append(column | epoch | numbers)
                progress.update()
        return columns

    # One run leaves cores of a CPU idle, so several run at once.
    workers = os.cpu_count() if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool, tqdm(total=24, unit="run") as progress:
        parts = pool.map(compare, itertools.product(PRECISIONS, RATES))
        columns = list(itertools.chain.from_iterable(parts))
    return {name: np.concatenate([x[name] for x in columns]) for name in columns[0]}


def select(results: Results, **values: Any) -> Results:
    """Return the entries whose columns have these values."""
    mask = np.logical_and.reduce([results[name] == v for name, v in values.items()])
    return {name: column[mask] for name, column in results.items()}


def table(results: Results) -> str:
    """Return what was found as text."""
    text = """
                           difference from the run with decay
                            first epoch      epochs within 1%    last epoch, float32
rule      run            float32  float64   float32   float64   error    rate   eta_eff
"""
    for rule, name in dict.fromkeys(zip(results["rule"], results["run"], strict=True)):
        runs = [
            select(results, rule=rule, run=name, precision=precision)
            for precision in PRECISIONS
        ]
        text += f"{rule:9} {name:14}"
        text += "".join(f"{numbers['difference'][0]:9.0e}" for numbers in runs)
        for numbers in runs:
            text += f"{np.cumprod(numbers['difference'] < 0.01).sum():10}"
        last = {key: column[-1] for key, column in runs[0].items()}
        text += "{test_error:8.1%}{rate:8.2g}{effective_rate:10.2g}\n".format(**last)
    return text


def picture(results: Results) -> Figure:
    """Draw loss, difference and rate of all runs by epoch."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels: Any = figure.subplots(3, len(RATES), sharex=True, sharey="row")
    for rule, (top, middle, bottom) in zip(RATES, panels.T, strict=True):
        for name, precision in itertools.product(COLOURS, PRECISIONS):
            found = select(results, rule=rule, run=name, precision=precision)
            epoch, double = found["epoch"], precision == "float64"
            if not epoch.size:
                continue
            style: Any = {"color": COLOURS[name], "lw": 5 if name == DECAY else 1.5}
            if name != DECAY:
                dots = ":" if double else "-"
                middle.plot(epoch, found["difference"], dots, **style)
            if double:
                top.plot(epoch, found["training_loss"], label=name, **style)
                bottom.plot(epoch, found["effective_rate"], **style)
            if double and name == "growing rate":
                bottom.plot(epoch, found["rate"], "--", **style)
        way = "growing rate" if rule == "momentum" else "unit norm"
        top.set_title(f"{rule}: {way}")
        top.legend(frameon=False)
        bottom.set_xlabel("epoch")
    panels[0, 0].set_ylabel("training loss, float64")
    precisions = "solid: float32, dotted: float64"
    panels[1, 0].set_ylabel("relative difference of the loss\n" + precisions)
    panels[2, 0].set_ylabel("effective learning rate\ndashed: learning rate")
    for axes in panels.flat:
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiments; return the numbers, one entry per run and epoch."""
    parser = make_parser(__doc__)
    add_data_options(parser)
    add = parser.add_argument
    add_network_options(parser)
    add("--shrinkage", type=float, default=3.0, help="of log-norms by decay alone")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    setting = make_setting(parser, options)
    make_folder(parser, options)
    data = load_data(parser, options, setting.batch_size)
    steps = setting.epochs * (len(data.x_train) // setting.batch_size)
    limit = min(LARGEST_DECAY * steps, LARGEST_SHRINKAGE)
    if not 0 < options.shrinkage < limit:
        parser.error(
            f"--shrinkage must be positive and below {limit:.3g} in {steps} steps, "
            f"got {options.shrinkage}. More epochs may admit it."
        )
    results = run(data, setting, options.shrinkage, options.seed)
    print(table(results))
    name = file_name("weight_decay_schedule", options)
    write_csv(results, options.out / f"{name}.csv")
    picture(results).savefig(options.out / f"{name}.png", dpi=110)
    return results


if __name__ == "__main__":
    main()
