"""The steps of the benchmarks, beside what they are compared with.

An update step has 33.6 million float32 parameters, in eight kernels of 1024 x 4096, and
is compared with Adam's. A training step is that of the Path-SGD paper's network,
784-4000-4000-10, and is compared with SGD's. Path metrics and saliencies are compared
with path norms. A floor is what a program written by hand does in plain float32,
without any care for its range.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from bench_path_metric import NETWORKS, draw_networks, measures

import normax

KERNELS, SHAPE = 8, (1024, 4096)
WIDTHS = (784, 4000, 4000, 10)


class Step(NamedTuple):
    """A step, `run(params, state, ...) -> (params, state)`.

    Attributes:
      run: The function to compile; parameters and state are donated.
      draw: Draws its arguments.
    """

    run: Callable[..., Any]
    draw: Callable[[], tuple[Any, ...]]


def update_step(tx: optax.GradientTransformation) -> Step:
    """Return the step of an optimizer, whose gradients are arguments."""

    def draw():
        keys = jax.random.split(jax.random.key(0), KERNELS)
        params = [jax.random.normal(key, SHAPE) for key in keys]
        grads = [0.01 * kernel + 0.001 for kernel in params]
        return params, tx.init(params), grads

    # JAX pairs donated arrays with results of their shape in order. So parameters and
    # state come out in the order in which they go in.
    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Step(run, draw)


def perceptron(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """Apply a stack of dense layers and ReLUs, without biases."""
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]


def training_step(tx: optax.GradientTransformation, batch: int) -> Step:
    """Return the training step of the Path-SGD paper's network."""

    def draw():
        *keys, key = jax.random.split(jax.random.key(0), len(WIDTHS))
        pairs = zip(keys, itertools.pairwise(WIDTHS), strict=True)
        params = [jax.random.normal(key, s) * (2 / s[0]) ** 0.5 for key, s in pairs]
        x = jax.random.normal(key, (batch, WIDTHS[0]))
        return params, tx.init(params), x, jnp.arange(batch) % WIDTHS[-1]

    def run(params, state, x, labels):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(
                perceptron(params, x), labels
            ).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return Step(run, draw)


def _plain(fn: Callable[..., Any]) -> optax.GradientTransformation:
    """Make a transformation of a function of one update and its weights."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params: (jax.tree.map(fn, updates, params), state),
    )


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, 0, keepdims=True)


def _project(u, w):
    moved = w + u
    return moved * jax.lax.rsqrt(_sum(moved * moved)) - w


def _remove_radial(u, w):
    return u - w * (_sum(w * u) / _sum(w * w))


def _measures(u, w):
    ww, uu, wu = _sum(w * w), _sum(u * u), _sum(w * u)
    norm = jnp.sqrt(ww)
    tangential = jnp.sqrt(jnp.maximum(uu - wu * wu / ww, 0))
    return norm, jnp.sqrt(uu) / norm, jnp.arctan2(tangential, norm + wu / norm)


def _monitor() -> optax.GradientTransformation:
    def measure(updates, params):
        return [_measures(u, w) for u, w in zip(updates, params, strict=True)]

    return optax.GradientTransformation(
        lambda params: measure(params, params),
        lambda updates, state, params: (updates, measure(updates, params)),
    )


def _rotate() -> optax.GradientTransformation:
    """Turn by an angle relative to an average of the tangential norm."""
    angle, decay = 1e-2, 0.99

    def update(updates, state, params):
        def turn(u, w, mean):
            ww, uu, wu = _sum(w * w), _sum(u * u), _sum(w * u)
            square = uu - wu * wu / ww
            mean = decay * mean + (1 - decay) * square
            factor = angle * jnp.sqrt(ww / mean)
            stay = jax.lax.rsqrt(1 + factor * factor * square / ww)
            return (w + factor * (u - w * (wu / ww))) * stay - w, mean

        pairs = [turn(*x) for x in zip(updates, params, state, strict=True)]
        return [u for u, _ in pairs], [mean for _, mean in pairs]

    return optax.GradientTransformation(
        lambda params: [_sum(w * w) for w in params], update
    )


def _hyperball(u, w):
    """Turn a matrix of norm 1 by a step of relative length, u with its sign."""
    stepped = w + u * (1e-3 * jax.lax.rsqrt(jnp.sum(u * u)))
    return stepped * jax.lax.rsqrt(jnp.sum(stepped * stepped)) - w


def _path_sums(params: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Return for each kernel 1 over the sums over paths up to it, and behind it."""
    multiply = functools.partial(jnp.einsum, precision="highest")
    into = [jnp.ones(params[0].shape[0])]
    for w in params[:-1]:
        into.append(multiply("i,ij->j", into[-1], w * w))
    out = [jnp.ones(params[-1].shape[1])]
    for w in params[:0:-1]:
        out.append(multiply("ij,j->i", w * w, out[-1]))
    return [(1 / a, 1 / b) for a, b in zip(into, out[::-1], strict=True)]


def _path_sgd(kept: bool) -> optax.GradientTransformation:
    """Divide by the path scales, either those of now or those that are kept."""

    def update(updates, state, params):
        sums = state if kept else _path_sums(params)
        pairs = zip(updates, sums, strict=True)
        # One after the other, XLA for GPUs takes those that are kept into the product
        # of matrices that gives the gradient.
        updates = [u * a[:, None] * b[None, :] for u, (a, b) in pairs]
        return updates, state

    def init(params):
        return _path_sums(params) if kept else optax.EmptyState()

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(1e-4)
    )


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      name: What it is.
      step: The step.
      base: What its cost is divided by.
      floor: The step as one would write it by hand, if it was.
      gpu: The largest ratio that is good enough on a GPU.
      all_reduces: The number of all-reduces that are needed on four devices.
      cpu: The largest ratio that is good enough on a CPU.
    """

    name: str
    step: Step
    base: Step
    floor: Step | None = None
    gpu: float | None = None
    all_reduces: int | None = None
    cpu: float | None = None


def _updates() -> list[Row]:
    adam = optax.adam(1e-3)
    base = update_step(adam)

    def row(name, tx, floor, *aims):
        plain = floor and update_step(optax.chain(adam, floor))
        return Row(name, update_step(tx), base, plain, *aims)

    def after(name, tx, floor, *aims):
        return row(f"adam + {name}", optax.chain(adam, tx), floor, *aims)

    monitor, identity = normax.monitor_weight_dynamics, optax.identity()
    rarely = normax.spheres.monitor_optimizer(adam, every=10)
    project, remove = normax.project_unit_norm(), normax.remove_radial_component()
    rotational = normax.rotational_adamw(1e-3, weight_decay=0.1)
    hyperball = normax.hyperball(optax.scale_by_adam(), 1e-3)
    return [
        Row("adam", base, base, all_reduces=0),
        after("project_unit_norm", project, _plain(_project), 1.70, 1, 1.6),
        after("monitor_weight_dynamics", monitor(), _monitor(), 1.75, 1, 1.9),
        after("monitor, every=10", monitor(every=10), identity, 1.10, 1),
        row("monitor_optimizer(adam, every=10)", rarely, identity, 1.10, 1),
        after("remove_radial_component", remove, _plain(_remove_radial), 1.75, 1),
        row("adamp(axes='unit')", normax.adamp(1e-3, axes="unit"), None, None, 1),
        row("rotational_adamw", rotational, _rotate(), 2.2, 2),
        row("hyperball", hyperball, _plain(_hyperball), 2.2, 2),
    ]


def _trainings(batch: int, gpu: float, gpu_every: float) -> list[Row]:
    base = training_step(optax.sgd(1e-4), batch)

    def row(name, tx, kept, gpu):
        floor = training_step(_path_sgd(kept), batch)
        step = training_step(tx, batch)
        return Row(f"path_sgd{name}, B = {batch}", step, base, floor, gpu, None, 1.05)

    shape = jax.ShapeDtypeStruct((1, WIDTHS[0]), jnp.float32)
    return [
        Row(f"sgd, B = {batch}", base, base),
        row("", normax.path_sgd(1e-4), False, gpu),
        row("(forward)", normax.path_sgd(1e-4, perceptron, shape), False, gpu),
        row(
            "(update_every=10)", normax.path_sgd(1e-4, update_every=10), True, gpu_every
        ),
    ]


def _measure(kind: str, measure: Callable[..., Any]) -> Step:
    """Return a step that measures two networks and leaves them as they are."""

    def draw():
        params, other = draw_networks(kind)
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
        return params, (
            other,
            jax.tree.map(zeros, jax.eval_shape(measure, params, other)),
        )

    def run(params, state):
        return params, (state[0], measure(params, state[0]))

    return Step(run, draw)


def _paths(kind: str) -> list[Row]:
    steps = {name: _measure(kind, fn) for name, fn in measures(kind).items()}
    forward, both = steps["forward"], steps["both"]
    return [
        Row(f"path_norm, {kind}", forward, forward),
        Row(f"path_metric, {kind}", steps["metric"], forward, cpu=2.5),
        Row(f"value and gradient of path_norm, {kind}", both, both),
        Row(f"path_saliency, {kind}", steps["saliency"], both, cpu=1.0),
    ]


def rows() -> list[Row]:
    """Return the table's lines."""
    trainings = _trainings(100, 1.65, 1.20), _trainings(1000, 1.45, 1.15)
    return [*_updates(), *itertools.chain(*trainings, *map(_paths, NETWORKS))]
