"""How normax goes with checkpoints, stacked layers, partitions and seeds.

Each function shows one thing on a small network of Flax NNX and returns numbers:

- `checkpoint`: Orbax saves model and optimizer, the monitor's averages included, and
  the restored run continues as if nothing had happened.
- `stacked`: layers that `nnx.vmap` makes and `nnx.scan` applies have one array with an
  axis for the layers. `normax.nn.unit_axes` leaves this axis out of the vectors.
- `partitioned`: `optax.partition` trains the head with plain AdamW and keeps the weight
  vectors of the other layers at norm one.
- `seeded`: `normax.sweeps.grid_sweep` trains with several seeds in one program.
"""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from experiments import make_parser
from flax import nnx

import normax

WIDTH, CLASSES, BATCH = 16, 3, 32
Numbers = dict[str, dict[str, float]]


class Network(nnx.Module):
    """A hidden layer with batch norm, and a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        return self.head(nnx.relu(self.norm(self.body(x))))


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return random inputs and the classes that a fixed rule gives them."""
    x = jax.random.normal(key, (BATCH, WIDTH))
    return x, jnp.abs(x[:, :CLASSES]).argmax(-1)


def loss_fn(model: Any, key: jax.Array) -> jax.Array:
    """Return the cross-entropy on a random batch."""
    x, labels = batch(key)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
    return losses.mean()


@nnx.jit
def step(model: Any, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
    """Make one step and return its loss."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, key)
    optimizer.update(model, grads)
    return loss


def steps(model: Any, optimizer: nnx.Optimizer, start: int, count: int) -> list[float]:
    """Make some steps of a run and return their losses."""
    keys = map(jax.random.key, range(start, start + count))
    return [float(step(model, optimizer, key)) for key in keys]


def make_run(seed: int) -> tuple[Network, nnx.Optimizer]:
    """Return a model and its optimizer, with a monitor."""
    model = Network(nnx.Rngs(seed))
    axes = normax.nn.unit_axes(model)
    mask = functools.partial(normax.weight_decay_mask, axes)
    optimizer = optax.chain(
        optax.adamw(0.01, weight_decay=0.1, mask=mask),
        normax.monitor_weight_dynamics(axes, decay=0.9),
    )
    return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)


def checkpoint(seed: int, folder: Path) -> dict[str, float]:
    """Save after five steps, restore, and continue beside the run that went on."""
    model, optimizer = make_run(seed)
    steps(model, optimizer, 0, 5)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(folder / "run", nnx.state((model, optimizer)))
    checkpointer.wait_until_finished()
    losses = steps(model, optimizer, 5, 5)

    # A program that starts anew makes only the shapes, and reads the numbers.
    run = nnx.eval_shape(lambda: make_run(seed))
    graph, empty = nnx.split(run)
    restored = nnx.merge(graph, checkpointer.restore(folder / "run", empty))
    again = steps(*restored, 5, 5)
    scalars = [normax.dynamics_scalars(o.opt_state) for o in (optimizer, restored[1])]
    difference = max(abs(float(scalars[0][k] - scalars[1][k])) for k in scalars[0])
    return {
        "largest difference of a loss": float(np.abs(np.subtract(losses, again)).max()),
        "largest difference of the monitor": difference,
        "steps of the monitor": normax.dynamics_table(restored[1].opt_state).steps,
    }


class Stack(nnx.Module):
    """Some equal layers as one, with a stack of kernels (layers, in, out)."""

    def __init__(self, layers: int, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the activations after all layers."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer: nnx.Linear, x: jax.Array) -> jax.Array:
            return nnx.tanh(layer(x))

        return forward(self.layers, x)


def stacked(seed: int, layers: int) -> dict[str, float]:
    """Train a stack on the unit sphere; count its vectors and measure their norms."""
    model = Stack(layers, nnx.Rngs(seed))
    axes = normax.nn.unit_axes(model)
    tx = optax.chain(optax.sgd(0.1), normax.project_unit_norm(axes))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    steps(model, optimizer, 0, 3)
    norms = normax.weight_norm(nnx.state(model, nnx.Param), axes)
    (norms,) = jax.tree.leaves(norms)
    return {
        "axis of a vector": axes["layers"]["kernel"][0],
        "layers": norms.shape[0],
        "vectors of a layer": norms.shape[1],
        "largest distance of a norm from 1": float(jnp.abs(norms - 1).max()),
    }


def partitioned(seed: int) -> dict[str, float]:
    """Train the head with AdamW, the body at unit norm, and measure both."""
    model = Network(nnx.Rngs(seed))
    body = optax.chain(
        optax.adam(0.01), normax.remove_radial_component(), normax.project_unit_norm()
    )
    rules = {"head": optax.adamw(0.01, weight_decay=0.1), "body": body}

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "body" if path[0].key == "body" else "head", params
        )

    tx = optax.partition(rules, labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = steps(model, optimizer, 0, 50)
    kernels = model.body.kernel[...], model.head.kernel[...]
    norms = [normax.weight_norm(kernel) for kernel in kernels]
    return {
        "first loss": losses[0],
        "last loss": losses[-1],
        "largest distance of a body's norm from 1": float(jnp.abs(norms[0] - 1).max()),
        "mean norm of the head": float(norms[1].mean()),
    }


def train(seed: jax.Array, learning_rate: jax.Array) -> jax.Array:
    """Return the mean loss of the last steps of a run, as `grid_sweep` calls it.

    The seed is traced, so `nnx.Rngs(seed)` would raise: it takes Python's integers and
    random keys alone. So the seed becomes a key first.
    """
    key = jax.random.key(seed)
    graph, *variables = nnx.split(Network(nnx.Rngs(key)), nnx.Param, ...)
    params, rest = variables
    optimizer = optax.adam(learning_rate)

    def step(carry: Any, key: jax.Array) -> Any:
        params, rest, state = carry

        def loss(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, params, rest, copy=True)
            return loss_fn(model, key), nnx.state(model, nnx.BatchStat)

        grad_fn = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = grad_fn(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), statistics, state), value

    carry = params, rest, optimizer.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, 60))[1][-10:].mean()


def seeded() -> dict[str, float]:
    """Train with three seeds and two rates; return mean and spread over the seeds."""
    grid = {"seed": jnp.arange(3), "learning_rate": jnp.array([1e-3, 1e-2])}
    losses = np.asarray(normax.sweeps.grid_sweep(train, grid))
    found = {}
    for rate, column in zip((1e-3, 1e-2), losses.T, strict=True):
        found[f"mean loss, learning rate {rate:g}"] = float(column.mean())
        found[f"spread over seeds, learning rate {rate:g}"] = float(column.std())
    return found


def main(argv: Sequence[str] | None = None) -> Numbers:
    """Do all four, print what they found, and return it."""
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        numbers: Numbers = {"checkpoint": checkpoint(options.seed, Path(folder))}
    numbers |= {
        "stacked": stacked(options.seed, 4),
        "partitioned": partitioned(options.seed),
        "seeded": seeded(),
    }
    for name, found in numbers.items():
        for what, number in found.items():
            print(f"{name:12} {what:42} {number:.4g}")
    return numbers


if __name__ == "__main__":
    main()
