r"""Weight decay under batch normalization: a learning rate in disguise.

Van Laarhoven (2017, section 6, figures 1 to 3) trains a network whose convolutions
are all followed by batch norm over a grid of learning rates $\eta$ and weight decays
$\lambda$. The loss does not depend on the norm of the kernels $w$, so decay cannot
regularize them. A rule of power $p$ (2 for SGD and its kin, 1 for Adam and RMSProp)
trains with the effective rate $\eta_\mathrm{eff} = \eta / \|w\|^p$. Its steps are
orthogonal to $w$ and lengthen it, decay shortens it by a part $\kappa$ per step, and

$$\frac{d\|w\|}{dt} = -\kappa \|w\| + \frac{c^2 \eta_\mathrm{eff}^2}{\|w\|^{-1}},
\qquad \kappa \propto \eta\lambda\|w\|^{2-p}$$

comes to rest at

$$\|w\| \propto (\eta/\lambda)^{1/(p+2)}, \qquad
\eta_\mathrm{eff} \propto (\eta^2\lambda^p)^{1/(p+2)}.$$

Deviations from rest decay as $e^{-(p+2)\kappa t}$. Since $w$ now is $e^{-\kappa t}$ times
$w$ then plus steps orthogonal to it, that is $\cos^{p+2}$ of the angle between the
two: the *memory* of the norm. A grid point counts as settled if the second half of
the constant-rate phase left little memory of the first. With the unit-norm
projection $\eta_\mathrm{eff} = \eta$ and $\lambda$ ceases to matter, but for its part
in the direction of the step.

Written to `--out`: a picture (norm of the first kernel at the end of the
constant-rate phase, final test error, and the same with the projection, with the
lines along which the theory above predicts them to be constant) and all numbers as
CSV. Printed: the exponents of the norm and the spread of the test error.

What differs from the paper: by default the data are 8x8 digits, which take a minute
and not a day, and the network is as narrow as they allow; only the kernels are
decayed, not the linear head; the grid steps follow the lines of constant predicted
effective rate. `--dataset cifar10 --epochs 100` is the paper's setting, on the paper's
data with its augmentation, batch size and schedule.
"""

import argparse
import csv
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import normax
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from tqdm import tqdm

Results = dict[str, np.ndarray]


class Setting(NamedTuple):
    """Network and training run that suit a data set."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    batch_size: int
    epochs: int
    augment: bool


COLOUR = Setting((32, 64, 128, 128), (1, 2, 2, 2), 128, 100, True)
SETTINGS = {
    "digits": Setting((8, 16, 16, 16), (2, 1, 2, 1), 32, 16, False),
    "mnist": Setting((16, 32, 32, 32), (2, 1, 2, 1), 128, 10, False),
    "cifar10": COLOUR,
    "cifar100": COLOUR,
    "svhn": COLOUR,
}

# Smallest and largest learning rate, and largest weight decay. The smallest decay
# follows, so that the diagonals of the grid are the lines of constant effective rate.
GRIDS = {
    "sgd": (1e-2, 5e0, 5e-1),
    "momentum": (1e-3, 5e-1, 5e-1),
    "nesterov": (1e-3, 5e-1, 5e-1),
    "rmsprop": (1e-3, 1e-1, 3e-1),
    "adam": (1e-3, 1e-1, 3e-1),
}
SETTLED_MEMORY = 0.1


def conv_as_matmul(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """3x3 convolution by shifts: on a CPU several times faster than XLA's own."""
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        padded[:, i : i + height : strides[0], j : j + width : strides[1]]
        for i, j in itertools.product(range(3), repeat=2)
    ]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class ConvNet(nnx.Module):
    """Four convolutions with batch norm and relu, mean pooling, a linear head."""

    def __init__(
        self, setting: Setting, in_channels: int, classes: int, rngs: nnx.Rngs
    ) -> None:
        widths = itertools.pairwise((in_channels, *setting.channels))
        self.convs = nnx.List(
            nnx.Conv(
                *channels,
                kernel_size=(3, 3),
                strides=stride,
                use_bias=False,
                conv_general_dilated=conv_as_matmul,
                rngs=rngs,
            )
            for channels, stride in zip(widths, setting.strides, strict=True)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in setting.channels
        )
        self.head = nnx.Linear(setting.channels[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of a batch of images in bytes."""
        x = images.astype(jnp.float32) / 255
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def kernel_axes(params: Any) -> Any:
    """Mark the kernels of the convolutions: what the loss is scale-invariant in."""
    return jax.tree.map(lambda w: "unit" if w.ndim == 4 else "none", params)


def first_kernel(params: Any) -> jax.Array:
    """Return the kernel of the first convolution."""
    return params["convs"][0]["kernel"][...]


def make_optimizer(
    rule: str, projected: bool, learning_rate: optax.Schedule, weight_decay: jax.Array
) -> optax.GradientTransformation:
    """Return the rule, with decay and projection of the kernels alone."""
    make = normax.UPDATE_RULES[rule].make
    kernels = make(learning_rate, weight_decay=weight_decay)
    if projected:
        kernels = optax.chain(kernels, normax.project_unit_norm())
    # Decay of head, gains and biases would change the function that is learned; so
    # lambda acts through the effective learning rate alone.
    return optax.partition({"unit": kernels, "none": make(learning_rate)}, kernel_axes)


def shift_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Move every image by up to four pixels and flip half of them."""
    shift_key, flip_key = jax.random.split(key)
    n, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(shift_key, (n, 2), 0, 9)
    flips = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), shape)

    moved = jax.vmap(crop)(padded, corners)
    return jnp.where(flips, moved[:, :, ::-1], moved)


def batches(setting: Setting, size: int, key: jax.Array) -> jax.Array:
    """Return indices (epochs, steps, batch), a new permutation for each epoch."""
    steps = size // setting.batch_size
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(
        jax.random.split(key, setting.epochs)
    )
    return order[:, : steps * setting.batch_size].reshape(
        setting.epochs, steps, setting.batch_size
    )


def make_train(
    rule: str, projected: bool, setting: Setting, graph: nnx.GraphDef[ConvNet]
) -> Callable[..., dict[str, jax.Array]]:
    """Return the training run, a function of data, learning rate and weight decay."""
    drop, second_drop = setting.epochs // 2, setting.epochs * 4 // 5

    def train(
        data: datasets.Dataset,
        variables: Any,
        order: jax.Array,
        keys: jax.Array,
        eta: jax.Array,
        lam: jax.Array,
    ) -> dict[str, jax.Array]:
        params, statistics = variables
        steps = order.shape[1]
        drops = {drop * steps: 0.1, second_drop * steps: 0.1}
        schedule = optax.piecewise_constant_schedule(eta, drops)
        optimizer = make_optimizer(rule, projected, schedule, lam)
        if projected:
            params = normax.projection_unit_norm(params, kernel_axes(params))

        def loss_fn(params: Any, statistics: Any, x: jax.Array, y: jax.Array) -> Any:
            model = nnx.merge(graph, params, statistics, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
            return losses.mean(), nnx.state(model, nnx.BatchStat)

        def step(carry: Any, batch: Any) -> Any:
            params, statistics, state = carry
            indices, key = batch
            x, y = data.x_train[indices], data.y_train[indices]
            if setting.augment:
                x = shift_and_flip(key, x)
            (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, statistics, x, y
            )
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            norm = normax.weight_norm(first_kernel(params), "layer")
            return (params, statistics, state), (loss, norm)

        def epoch(carry: Any, batch: Any) -> Any:
            carry, (losses, norms) = jax.lax.scan(step, carry, batch)
            return carry, (losses.mean(), norms.mean(), first_kernel(carry[0]))

        carry = params, statistics, optimizer.init(params)
        carry, (losses, norms, kernels) = jax.lax.scan(epoch, carry, (order, keys))

        model = nnx.merge(graph, *carry[:2])
        model.eval()
        logits = jax.lax.map(lambda x: model(x[None])[0], data.x_test, batch_size=500)
        start, end = first_kernel(params), kernels[drop - 1]
        left = jnp.maximum((start * end).sum() / (start * start).sum(), 0)
        return {
            "norm": norms[drop - 1],
            "memory": left ** (normax.UPDATE_RULES[rule].norm_power + 2),
            "test_error": (logits.argmax(-1) != data.y_test).mean(),
            "diverged": ~jnp.isfinite(losses).all(),
        }

    return train


def grid(rule: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the learning rates and the weight decays of a rule's grid."""
    low, high, decay = GRIDS[rule]
    ratio = (high / low) ** (2 / normax.UPDATE_RULES[rule].norm_power)
    return np.geomspace(low, high, size), np.geomspace(decay / ratio, decay, size)


def run(rules: Sequence[str], data: datasets.Dataset, setting: Setting, size: int,
        seed: int) -> Results:
    """Train at every grid point; return one array entry per run."""
    init_key, order_key, augment_key = jax.random.split(jax.random.key(seed), 3)
    classes = int(max(data.y_train.max(), data.y_test.max())) + 1
    model = ConvNet(setting, data.x_train.shape[-1], classes, nnx.Rngs(init_key))
    graph, *variables = nnx.split(model, nnx.Param, ...)
    order = batches(setting, len(data.x_train), order_key)
    keys = jax.random.split(augment_key, order.shape[:2])
    arguments = jax.device_put((data, variables, order, keys))

    def compile_run(program: tuple[str, bool]) -> Any:
        train = jax.jit(make_train(*program, setting, graph))
        return train.lower(*arguments, 0.0, 0.0).compile()

    def run_point(point: tuple[str, bool, float, float]) -> dict[str, Any]:
        rule, projected, eta, lam = point
        numbers = compiled[rule, projected](*arguments, eta, lam)
        named = {"rule": rule, "projected": projected, "eta": eta, "lambda": lam}
        return named | jax.device_get(numbers)

    programs = list(itertools.product(rules, (False, True)))
    points = [
        (rule, projected, eta, lam)
        for rule, projected in programs
        for lam, eta in itertools.product(*reversed(grid(rule, size)))
    ]
    # Runs this small do not fill the cores of a CPU; threads do, and cost no more
    # memory on other devices, where one run at a time is right.
    workers = os.cpu_count() if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        compiled = dict(zip(programs, pool.map(compile_run, programs), strict=True))
        rows = list(tqdm(pool.map(run_point, points), total=len(points), unit="run"))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def select(results: Results, rule: str, projected: bool) -> Results:
    """Return the numbers of one grid, as arrays (lambda, eta)."""
    mask = (results["rule"] == rule) & (results["projected"] == projected)
    size = math.isqrt(mask.sum())
    return {name: column[mask].reshape(size, size) for name, column in results.items()}


def within_lines(points: Results, power: int, values: np.ndarray) -> np.ndarray:
    """Subtract from values their mean over the line of constant effective rate."""
    product = np.log(points["eta"] ** 2 * points["lambda"] ** power).round(3)
    _, line = np.unique(product, return_inverse=True)
    line = line.reshape(values.shape)
    return values - (np.bincount(line, values) / np.bincount(line))[line]


def summarize(results: Results, rule: str) -> dict[str, float]:
    """Compare one rule's numbers with what the theory predicts.

    Returns:
      `points`: how many grid points are settled; `exponent`: of the norm there, in
      eta / lambda, and `predicted`; `along` and `across`: standard deviation of the
      test error along and across the lines of constant effective rate; `free` and
      `projected`: median over eta of its standard deviation over lambda.
    """
    power = normax.UPDATE_RULES[rule].norm_power
    free, projected = (select(results, rule, flag) for flag in (False, True))
    settled = ~free["diverged"] & (free["memory"] < SETTLED_MEMORY)
    points = {name: column[settled] for name, column in free.items()}
    ratio = within_lines(points, power, np.log(points["eta"] / points["lambda"]))
    norm = within_lines(points, power, np.log(points["norm"]))
    along = within_lines(points, power, points["test_error"])
    return {
        "points": settled.sum(),
        "plain": np.polyfit(np.log(points["eta"] / points["lambda"]), np.log(points["norm"]), 1)[0],
        "exponent": (ratio @ norm) / (ratio @ ratio),
        "predicted": 1 / (power + 2),
        "along": along.std(),
        "across": (points["test_error"] - along).std(),
        "free": np.median(free["test_error"].std(axis=0)),
        "projected": np.median(projected["test_error"].std(axis=0)),
    }
