r"""Norms and angles of every layer over training, beside what theory predicts.

A network of Flax NNX or Linen becomes a `Network`: parameters, other variables, axes,
and one function that applies it. So one training loop serves both.

Under weight decay $\lambda$ at the rate $\eta$, norm and angle per step of a
scale-invariant weight vector settle (Kosson, Messmer and Jaggi, 2024). For AdamW

$$\theta \approx \Big(2\eta\lambda\,\frac{1-b_1}{1+b_1}\Big)^{1/2}, \qquad
\|w\| \approx \Big(\frac{\eta d}{2\lambda}\Big)^{1/2}.$$

Theory promises this for scale-invariant arrays alone. `normax.scale_invariance_report`
finds them, and the picture shows the others beside them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen, nnx
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import trange

import normax

Columns = dict[str, np.ndarray]

# The monitor averages over about ten steps.
MONITOR_DECAY = 0.9


class Network(NamedTuple):
    """A model of either framework, as functions of plain pytrees."""

    params: Any
    # What training changes besides, such as the running averages of batch norm.
    rest: Any
    # The weight vectors, as normax.nn.unit_axes finds them.
    axes: Any
    # `apply(params, rest, inputs, train)` returns outputs and the new `rest`.
    apply: Callable[..., tuple[jax.Array, Any]]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(array.size for array in jax.tree.leaves(self.params))

    @property
    def mask(self) -> Any:
        """True for the arrays that weight decay is meant for."""
        return normax.weight_decay_mask(self.axes, self.params)


def from_nnx(model: nnx.Module) -> Network:
    """Return a model of Flax NNX as a network."""
    graph, *variables = nnx.split(model, nnx.Param, ...)
    params, rest = variables

    def apply(params: Any, rest: Any, inputs: jax.Array, train: bool) -> Any:
        model: Any = nnx.merge(graph, params, rest, copy=True)
        if not train:
            model.eval()
        outputs = model(inputs)
        _, *variables = nnx.split(model, nnx.Param, ...)
        return outputs, variables[1]

    return Network(params, rest, normax.nn.unit_axes(model), apply)


def from_linen(model: linen.Module, inputs: jax.Array, seed: int) -> Network:
    """Return a module of Flax Linen, called as `model(inputs, train)`, as a network."""
    rest = dict(model.init(jax.random.key(seed), inputs, False))
    params = rest.pop("params")

    def apply(params: Any, rest: Any, inputs: jax.Array, train: bool) -> Any:
        mutable = list(rest) if train else []
        return model.apply({"params": params} | rest, inputs, train, mutable=mutable)

    return Network(params, rest, normax.nn.unit_axes(model, inputs, False), apply)


def loss_fn(network: Network, params: Any, rest: Any, batch: Any) -> Any:
    """Return the cross-entropy in training, and the new `rest`."""
    inputs, labels = batch
    logits, rest = network.apply(params, rest, inputs, True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), rest


@functools.partial(jax.jit, static_argnums=0)
def evaluate(
    apply: Callable[..., Any], params: Any, rest: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """Return cross-entropy and error rate of examples that were held out."""

    def one(example: Any) -> tuple[jax.Array, jax.Array]:
        inputs, labels = example
        logits = apply(params, rest, inputs[None], False)[0][0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits.argmax(-1) != labels).mean()

    losses, errors = jax.lax.map(one, batch, batch_size=100)
    return losses.mean(), errors.mean()


def name_of(path: Any) -> str:
    """Return the name that normax gives to the array of a path."""
    # An array of NNX lies in a variable, as its "value".
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def scale_invariant(network: Network, batch: Any, seed: int) -> set[str]:
    """Return the names of the arrays whose scale does not change the loss."""
    report = normax.scale_invariance_report(
        lambda params: loss_fn(network, params, network.rest, batch)[0],
        network.params,
        key=jax.random.key(seed),
    )
    leaves = jax.tree_util.tree_leaves_with_path(network.params)
    rows = zip(leaves, report.arrays, strict=True)
    return {name_of(path) for (path, _), row in rows if row.axes != "none"}


def train(
    network: Network,
    optimizer: optax.GradientTransformation,
    draw: Callable[[Any, jax.Array], Any],
    data: Any,
    steps: int,
    every: int,
    seed: int,
) -> tuple[tuple[Any, Any, Any], Columns]:
    """Train, and keep loss and `normax.dynamics_scalars` every so many steps.

    Args:
      network: The network at the start.
      optimizer: Its state holds that of `normax.monitor_weight_dynamics`.
      draw: A function of data and a random key that returns a batch.
      data: What `draw` draws from.
      steps: Number of steps; those beyond a multiple of `every` are left out.
      every: Number of steps between two entries.
      seed: Seed of the batches.

    Returns:
      Parameters, rest and state of the optimizer at the end; and columns by name.
    """

    @jax.jit
    def some_steps(carry: Any, keys: jax.Array, data: Any) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, rest, state = carry
            grad_fn = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
            (loss, rest), grads = grad_fn(network, params, rest, draw(data, key))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), rest, state), loss

        carry, losses = jax.lax.scan(step, carry, keys)
        return carry, {"loss": losses.mean()} | normax.dynamics_scalars(carry[2], "")

    data = jax.device_put(data)
    carry = network.params, network.rest, optimizer.init(network.params)
    keys = jax.random.split(jax.random.key(seed), (steps // every, every))
    rows = []
    with trange(len(keys), unit="entry") as entries:
        for entry in entries:
            carry, scalars = some_steps(carry, keys[entry], data)
            rows.append(jax.device_get(scalars))
            entries.set_postfix(loss=f"{rows[-1]['loss']:.3f}")
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return carry, {"step": every * np.arange(1, len(rows) + 1)} | columns


def compare(
    network: Network,
    columns: Columns,
    table: normax.theory.DynamicsTable,
    invariant: set[str],
    rule: str,
    learning_rate: optax.Schedule,
    weight_decay: float,
) -> Columns:
    """Return a row for every array and entry: measured, predicted, scale-invariant.

    The predicted norm is NaN where the rule's depends on the size of the gradient.
    """
    leaves = jax.tree_util.tree_leaves_with_path(network.params)
    shapes = {name_of(path): array.shape for path, array in leaves}
    steps = columns["step"]
    rates = learning_rate(steps - 1), weight_decay
    known: Any = normax.UPDATE_RULES[rule]
    parts = []
    for row in table.arrays:
        norm: Any = np.nan
        if rule == "adamw":
            dimension = math.prod(shapes[row.name][axis] for axis in row.axes)
            norm = known.equilibrium_norm(*rates, dimension=dimension)
        part = {
            "array": row.name,
            "scale_invariant": row.name in invariant,
            "step": steps,
            "loss": columns["loss"],
            "norm": columns[f"{row.name}/weight_norm"],
            "predicted_norm": norm,
            "angle": columns[f"{row.name}/angular_update"],
            "predicted_angle": known.equilibrium_rotation(*rates),
        }
        parts.append({k: np.broadcast_to(v, steps.shape) for k, v in part.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def select(columns: Columns, array: str) -> Columns:
    """Return the rows of one array."""
    mask = columns["array"] == array
    return {name: column[mask] for name, column in columns.items()}


def picture(columns: Columns) -> Figure:
    """Draw norms and angles: at the left scale-invariant arrays, at the right others.

    Norms are divided by the predicted one if there is one, or else by the first.
    """
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels: Any = figure.subplots(2, 2, sharex=True, sharey="row")
    known = not np.isnan(columns["predicted_norm"]).any()
    for (top, bottom), invariant in zip(panels.T, (True, False), strict=True):
        mask = columns["scale_invariant"] == invariant
        arrays = list(dict.fromkeys(columns["array"][mask]))
        colours = iter(np.linspace(0.05, 0.95, max(len(arrays), 1)))
        for array in arrays:
            found = select(columns, array)
            style: Any = {"color": colormaps["turbo"](next(colours)), "lw": 1.3}
            scale = found["predicted_norm"] if known else found["norm"][0]
            top.plot(found["step"], found["norm"] / scale, label=array, **style)
            bottom.plot(found["step"], found["angle"], **style)
        first = select(columns, columns["array"][0])
        dashed: Any = {"color": "black", "ls": "--", "lw": 1.5}
        bottom.plot(
            first["step"], first["predicted_angle"], label="predicted", **dashed
        )
        if known:
            top.axhline(1, **dashed)
        top.set_title(f"{'' if invariant else 'not '}scale-invariant")
        top.legend(frameon=False, fontsize=7, ncols=1 + len(arrays) // 8)
        bottom.legend(frameon=False, fontsize=8)
        bottom.set_xlabel("step")
    divisor = "that predicted in equilibrium" if known else "that at the first entry"
    panels[0, 0].set_ylabel(f"norm of the weight vectors / {divisor}")
    panels[1, 0].set_ylabel("angle per step (radians)")
    for axes in panels.flat:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(
            lambda x, _: f"{x:g}" if f"{x:e}"[0] in "23468" else ""
        )
        axes.grid(alpha=0.3)
    return figure
