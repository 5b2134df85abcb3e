r"""Pruning before and after rescaling, and certificates beside measured changes.

A multilayer perceptron and a convolutional network are trained on images, with several
seeds. Then their kernels are pruned: entries of least size in the whole network
(magnitude), of least path saliency in the whole network or in each layer, or at random.
The same is done to the same function after `normax.rescaling.random_rescaling`. The
test error is measured, and measured again after fine-tuning with the mask held. Masks
of a rescaled network are fine-tuned in the original scale, so that only the choice of
weights differs.

Networks are also rounded to bfloat16 and to 8 bits, nearest or towards zero. The
certificate `normax.paths.output_change_bound` stands beside the largest change of the
logits, summed over classes, at any test image.

The program writes a picture and, as CSV, a row for each network to `--out`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convnet import conv_as_matmul
from experiments import (
    add_data_options,
    file_name,
    load_data,
    make_folder,
    make_parser,
    write_csv,
)
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import normax
from normax import paths

Params = dict[str, dict[str, jax.Array]]
Results = dict[str, np.ndarray]
METHODS = {
    "magnitude": "tab:orange",
    "path": "tab:blue",
    "path, per layer": "tab:cyan",
    "random": "tab:grey",
}
ROUNDINGS = ("bfloat16", "bfloat16 to zero", "int8", "int8 to zero")
SCALES = ("trained", "rescaled", "balanced", "tightest")
BATCH = 100


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Apply dense layers with ReLUs."""
    x = x.reshape(len(x), -1)
    for name, layer in params.items():
        x = x @ layer["kernel"] + layer["bias"][None]
        x = x if name == "output" else jax.nn.relu(x)
    return x


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Return a 3x3 convolution with padding 1."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convnet(params: Params, x: jax.Array, convolve: Any = convolve) -> jax.Array:
    """Apply convolutions with ReLUs, of stride 2, a mean and a dense layer."""
    for name, layer in params.items():
        if name == "output":
            return x.mean((1, 2)) @ layer["kernel"] + layer["bias"][None]
        x = convolve(x, layer["kernel"], (2, 2)) + layer["bias"][None, None, None]
        x = jax.nn.relu(x)
    return x


class Network(NamedTuple):
    """A function of parameters and images, and the shapes of its kernels.

    Attributes:
      forward: The function.
      fast: The same in operations that a CPU trains faster, if there are such.
      kernels: The shapes, the last layer's last.
    """

    forward: Callable[[Params, jax.Array], jax.Array]
    fast: Callable[[Params, jax.Array], jax.Array]
    kernels: list[tuple[int, ...]]

    def start(self, key: jax.Array) -> Params:
        """Draw parameters as He et al. do."""
        names = [f"hidden_{i}" for i in range(len(self.kernels) - 1)] + ["output"]
        keys = jax.random.split(key, len(names))
        initializer = jax.nn.initializers.he_normal()
        return {
            name: {"kernel": initializer(k, shape), "bias": jnp.zeros(shape[-1])}
            for name, k, shape in zip(names, keys, self.kernels, strict=True)
        }


def make_networks(shape: tuple[int, ...], width: int) -> dict[str, Network]:
    """Return the networks for images of a shape and ten classes."""
    inputs, n = int(np.prod(shape)), width
    channels = [shape[-1], n // 4, n // 2, n // 2]
    convolutions = [(3, 3, a, b) for a, b in itertools.pairwise(channels)]
    fast = functools.partial(convnet, convolve=conv_as_matmul)
    return {
        "mlp": Network(mlp, mlp, [(inputs, 2 * n), (2 * n, n), (n, 10)]),
        "convnet": Network(convnet, fast, [*convolutions, (n // 2, 10)]),
    }


def make_train(network: Network, x: jax.Array, y: jax.Array) -> Callable[..., Params]:
    """Return training for some epochs by Adam, with a mask held."""
    steps = len(x) // BATCH

    @functools.partial(jax.jit, static_argnames="epochs")
    def train(params: Params, mask: Any, key: jax.Array, epochs: int) -> Params:
        hold = optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, mask))
        rate = optax.cosine_decay_schedule(2e-3, epochs * steps)
        optimizer = optax.chain(optax.adam(rate), hold)

        def loss_of(params: Params, batch: jax.Array) -> jax.Array:
            logits = network.fast(params, x[batch])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, y[batch]
            ).mean()

        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(
                jax.grad(loss_of)(params, batch), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, epochs)
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(x)))(keys)
        batches = orders[:, : steps * BATCH].reshape(-1, BATCH)
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    return train


def magnitude_mask(params: Params, fraction: float) -> Any:
    """Return which kernels' entries to keep: the largest of the whole network."""
    kernels = [layer["kernel"] for layer in params.values()]
    sizes = jnp.sort(jnp.concatenate([jnp.abs(k).ravel() for k in kernels]))
    least = sizes[round(fraction * sizes.size)]
    return keep_biases(params, lambda kernel: jnp.abs(kernel) >= least)


def random_mask(params: Params, fraction: float, key: jax.Array) -> Any:
    """Return which kernels' entries to keep: any, by chance."""
    keys = iter(jax.random.split(key, len(params)))
    return keep_biases(
        params, lambda k: jax.random.uniform(next(keys), k.shape) >= fraction
    )


def keep_biases(params: Params, of_kernel: Callable[[jax.Array], jax.Array]) -> Any:
    """Return a mask of kernels that keeps all biases."""
    return {
        name: {
            "kernel": of_kernel(layer["kernel"]),
            "bias": layer["bias"] == layer["bias"],
        }
        for name, layer in params.items()
    }


def all_masks(
    network: Network, params: Params, x: jax.Array, fractions: Sequence[float], key: Any
) -> dict[str, list[Any]]:
    """Return the masks of all methods and fractions."""
    mask = functools.partial(paths.path_mask, network.forward, params, x[:1])
    return {
        "magnitude": [magnitude_mask(params, f) for f in fractions],
        "path": [mask(f) for f in fractions],
        "path, per layer": [mask(f, per="layer") for f in fractions],
        "random": [random_mask(params, f, key) for f in fractions],
    }


def rounded(w: jax.Array, kind: str) -> jax.Array:
    """Round an array, to the nearest number of fewer bits or towards zero."""
    if kind.startswith("int8"):
        step = jnp.max(jnp.abs(w)) / 127
        down = jnp.trunc if kind.endswith("zero") else jnp.round
        return step * down(w / step)
    if kind.endswith("zero"):  # the upper half of a float32 is a bfloat16
        bits = jax.lax.bitcast_convert_type(w, jnp.uint32) & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return w.astype(jnp.bfloat16).astype(jnp.float32)


def tightest(network: Network, x: jax.Array, params: Params) -> Params:
    r"""Rescale hidden units so that rounding to int8 changes paths least.

    Rounding moves each weight by a share of the largest of its array. So the paths of
    all weights change, to first order, in proportion to

    $$\sum_{\text{arrays}} \max |w| \sum |\partial \|\Phi\|_1 / \partial w| ,$$

    which is convex in the logarithms of the factors. Adam finds its minimum.
    """
    slopes = jax.grad(lambda w: normax.path_norm(network.forward, w, x, 1.0))(params)
    ones = jax.tree.map(jnp.ones_like, params)

    def rescaled(ones: Params, logs: list[jax.Array]) -> Params:
        return normax.rescaling.rescale_units(
            ones, list(map(jnp.exp, logs)), forward=network.forward, inputs=x
        )

    def change(logs: list[jax.Array]) -> jax.Array:
        factors = rescaled(ones, logs)
        parts = jax.tree.map(
            lambda w, g, f: jnp.max(jnp.abs(w * f)) * jnp.sum(jnp.abs(g / f)),
            *(params, slopes, factors),
        )
        return jnp.log(sum(jax.tree.leaves(parts)))

    steps = 1000
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def step(carry: Any, _: Any) -> Any:
        logs, state = carry
        updates, state = optimizer.update(jax.grad(change)(logs), state)
        return (optax.apply_updates(logs, updates), state), None

    logs = [jnp.zeros(shape[-1]) for shape in network.kernels[:-1]]
    (logs, _), _ = jax.lax.scan(step, (logs, optimizer.init(logs)), length=steps)
    return rescaled(params, logs)


class Programs(NamedTuple):
    """What is done to one network, compiled once for all seeds."""

    train: Callable[..., Params]
    masks: Callable[..., dict[str, list[Any]]]
    tightest: Callable[[Params], Params]
    certificate: Callable[[Params, Params], jax.Array]
    measure: Callable[[Params, Params], tuple[jax.Array, jax.Array]]


def make_programs(network: Network, data: Any, fractions: Sequence[float]) -> Programs:
    """Return the programs of a network."""
    x, y, x_test, y_test = data

    bound = jax.jit(functools.partial(paths.output_change_bound, network.forward))

    def measure(params: Params, other: Params) -> tuple[jax.Array, jax.Array]:
        """Return the largest change of logits, and the other's test error."""
        logits = [network.fast(p, x_test) for p in (params, other)]
        change = jnp.max(jnp.sum(jnp.abs(logits[0] - logits[1]), axis=1))
        return change, jnp.mean(logits[1].argmax(1) != y_test)

    return Programs(
        make_train(network, x, y),
        jax.jit(lambda params, key: all_masks(network, params, x, fractions, key)),
        jax.jit(functools.partial(tightest, network, x[:1])),
        # An argument, since XLA takes a minute to find the largest entry of a constant.
        lambda params, other: bound(params, other, x_test),
        jax.jit(measure),
    )


def run(
    networks: dict[str, Network],
    data: Any,
    fractions: Sequence[float],
    seeds: int,
    epochs: tuple[int, int],
) -> Results:
    """Train, prune and round all networks; return one entry for each."""
    rows: list[dict[str, Any]] = []
    pruned = 2 * len(METHODS) * len(fractions)
    total = len(networks) * seeds * (pruned + len(ROUNDINGS) * len(SCALES))
    with tqdm(total=total, unit="network") as progress:
        for name, network in networks.items():
            programs = make_programs(network, data, fractions)
            for seed in range(seeds):
                row = {"network": name, "seed": seed}
                for found in run_seed(network, programs, data, fractions, seed, epochs):
                    rows.append(row | found)
                    progress.update()
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def run_seed(
    network: Network,
    programs: Programs,
    data: Any,
    fractions: Sequence[float],
    seed: int,
    epochs: tuple[int, int],
) -> Any:
    """Train a network; yield a row for each way to prune or round it."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), seed), 5)
    params = network.start(keys[0])
    everything = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    params = programs.train(params, everything, keys[1], epochs=epochs[0])
    options = {"forward": network.forward, "inputs": data[0][:2]}
    scaled = {
        "trained": params,
        "rescaled": normax.rescaling.random_rescaling(keys[2], params, **options),
        "balanced": normax.rescaling.balance(params, 1.0, **options),
        "tightest": programs.tightest(params),
    }

    def row(kind: str, scale: str, fraction: float, other: Params, tuned: Any) -> Any:
        change, error = programs.measure(scaled[scale], other)
        found = {"change": change, "error": error, "fine_tuned_error": tuned}
        found |= {"certificate": programs.certificate(scaled[scale], other)}
        labels = {"change_of": kind, "scale": scale, "sparsity": fraction}
        return labels | {key: float(value) for key, value in found.items()}

    for scale in SCALES[:2]:
        masks = programs.masks(scaled[scale], keys[3])
        for method, chosen in masks.items():
            for fraction, mask in zip(fractions, chosen, strict=True):
                start = jax.tree.map(jnp.multiply, params, mask)
                tuned = programs.train(start, mask, keys[4], epochs=epochs[1])
                _, error = programs.measure(params, tuned)
                other = jax.tree.map(jnp.multiply, scaled[scale], mask)
                yield row(method, scale, fraction, other, error)
    for scale in SCALES:
        for kind in ROUNDINGS:
            other = jax.tree.map(lambda w, kind=kind: rounded(w, kind), scaled[scale])
            yield row(kind, scale, 0.0, other, np.nan)


def mean_of(results: Results, column: str, **labels: Any) -> float:
    """Return the mean over seeds, geometric where numbers differ by orders."""
    mine = np.all([results[key] == value for key, value in labels.items()], axis=0)
    values = results[column][mine]
    if column in ("change", "certificate"):
        return float(np.exp(np.mean(np.log(np.maximum(values, 1e-30)))))
    return float(np.mean(values))


def table(results: Results) -> str:
    """Return errors, changes and certificates, means over seeds, as text."""
    fractions = sorted(set(results["sparsity"]) - {0.0})
    kinds = [(m, s, f) for f in fractions for s in SCALES[:2] for m in METHODS]
    kinds += [(kind, scale, 0.0) for kind in ROUNDINGS for scale in SCALES]
    text = ""
    for network in dict.fromkeys(results["network"]):
        text += f"\n{network:18}scale     sparsity   error  fine-tuned"
        text += "  change of logits  certificate\n"
        for kind, scale, fraction in kinds:
            labels: dict[str, Any] = {"network": network, "change_of": kind}
            labels |= {"scale": scale, "sparsity": fraction}

            def mean(column: str, labels: Any = labels) -> float:
                return mean_of(results, column, **labels)

            tuned = mean("fine_tuned_error") if fraction else np.nan
            text += f"{kind:18}{scale:10}{fraction:8.0%}{mean('error'):8.1%}"
            text += f"{tuned:12.1%}" if fraction else f"{'':12}"
            text += f"{mean('change'):18.2g}{mean('certificate'):13.2g}\n"
    return text


def picture(results: Results) -> Figure:
    """Draw errors, changes and certificates over the sparsity."""
    networks = list(dict.fromkeys(results["network"]))
    figure = Figure(figsize=(13, 3.8 * len(networks)), layout="constrained")
    panels: Any = figure.subplots(len(networks), 3, squeeze=False)
    fractions = sorted(set(results["sparsity"]) - {0.0})
    positions = range(len(fractions))
    titles = ("as pruned", "after fine-tuning", "certificate and measured change")

    def curve(network: str, method: str, scale: str, column: str) -> list[float]:
        labels = {"network": network, "change_of": method, "scale": scale}
        return [mean_of(results, column, sparsity=f, **labels) for f in fractions]

    for network, row in zip(networks, panels, strict=True):
        for axes, title in zip(row, titles, strict=True):
            axes.set(title=f"{network}: {title}", xlabel="share of weights pruned")
            axes.set_xticks(positions, [f"{f:.0%}" for f in fractions])
            axes.grid(alpha=0.3)
        for method, colour in METHODS.items():
            for scale, style in (("trained", "o-"), ("rescaled", "x--")):
                get = functools.partial(curve, network, method, scale)
                line = {"color": colour, "ms": 5, "label": f"{method}, {scale}"}
                for axes, column in zip(
                    row, ("error", "fine_tuned_error"), strict=False
                ):
                    axes.plot(positions, get(column), style, **line)
            get = functools.partial(curve, network, method, "trained")
            label = f"{method}: certificate"
            row[2].plot(positions, get("certificate"), "^-", color=colour, label=label)
            row[2].plot(positions, get("change"), "o:", color=colour, ms=4)
        for axes in row[:2]:
            axes.set_ylabel("test error")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        row[2].set(yscale="log", ylabel="change of logits, summed over classes")
        row[2].plot([], [], "o:", color="black", ms=4, label="measured, largest")
        row[2].legend(frameon=False, fontsize=7)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Train, prune, print the table, draw the picture."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data_options(parser)
    add("--fractions", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98])
    add("--seeds", type=int, default=3)
    add("--width", type=int, default=64, help="of the networks")
    add("--epochs", type=int, default=10)
    add("--fine-tune", type=int, default=2, help="epochs of fine-tuning")
    options = parser.parse_args(argv)
    if min(options.seeds, options.epochs, options.fine_tune) < 1:
        parser.error("--seeds, --epochs and --fine-tune must be at least 1.")
    if not all(0 < fraction < 1 for fraction in options.fractions):
        parser.error(f"--fractions must lie in (0, 1), got {options.fractions}.")
    if options.width % 4 or options.width < 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}.")
    make_folder(parser, options)
    data = load_data(parser, options, BATCH)
    mean, std = data.x_train.mean(), data.x_train.std()

    def images(x: np.ndarray) -> jax.Array:
        return jnp.asarray((x - mean) / std, jnp.float32)

    arrays = (
        images(data.x_train),
        jnp.asarray(data.y_train, jnp.int32),
        images(data.x_test[:2000]),
        jnp.asarray(data.y_test[:2000], jnp.int32),
    )
    networks = make_networks(data.x_train.shape[1:], options.width)
    epochs = options.epochs, options.fine_tune
    results = run(networks, arrays, options.fractions, options.seeds, epochs)
    print(table(results))
    name = file_name("path_pruning", options)
    write_csv(results, options.out / f"{name}.csv")
    picture(results).savefig(options.out / f"{name}.png", dpi=110)
    return results


if __name__ == "__main__":
    main()
