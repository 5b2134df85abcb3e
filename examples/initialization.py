r"""Activations and gradients by depth, for four ways to draw the first weights.

The network is that of a lecture (Tripp, Optimization, "The importance of scale"). It
has ten layers of 100 units each, 100 inputs of mean 0 and variance 1, and no biases.
Take a layer with $m$ inputs and $n$ outputs whose weights have variance $s^2$. It
multiplies

$$\mathrm{E}[z^2] \text{ by } c\, m s^2 \text{ on the way forward}, \qquad
\mathrm{E}[(\partial L / \partial z)^2] \text{ by } c\, n s^2 \text{ on the way back}.$$

Here $c = 1$ for linear units. For ReLUs $c = 1/2$, because half of their inputs are cut
off. Four choices of the weights are compared:

- Standard normal weights give $10^{20}$ after ten linear layers.
- Weights of variance $10^{-4}$ give $10^{-20}$.
- Glorot's choice keeps both moments for linear units and halves them for ReLUs.
- Kaiming's choice keeps both moments for ReLUs and doubles them for linear units.

The program writes a picture and all numbers as CSV to `--out`. Points are measured over
`--networks` random networks, and lines are the products above. The program prints the
numbers at both ends of the network.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiments import make_folder, make_parser, write_csv
from jax.nn import initializers
from matplotlib.figure import Figure

Results = dict[str, np.ndarray]

DEPTH, WIDTH, INPUTS = 10, 100, 100
# Each scheme has an initializer and the variance of its weights.
SCHEMES: dict[str, tuple[Callable[..., jax.Array], float]] = {
    "standard normal": (initializers.normal(1.0), 1.0),
    "small": (initializers.normal(0.01), 1e-4),
    "Glorot": (initializers.glorot_uniform(), 1 / WIDTH),
    "Kaiming": (initializers.he_normal(), 2 / WIDTH),
}
# Each activation has a function and the part of the second moment that it passes on.
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], float]] = {
    "linear": (lambda z: z, 1.0),
    "ReLU": (jax.nn.relu, 0.5),
}
MEASURES = ("activation", "gradient")


def draw(
    initializer: Callable[..., jax.Array], key: jax.Array, networks: int
) -> jax.Array:
    """Draw the kernels of all networks."""
    # XLA takes long to compile random numbers into a larger program. So the kernels are
    # drawn one by one.
    keys = jax.random.split(key, networks * DEPTH)
    kernels = jnp.stack([initializer(key, (WIDTH, WIDTH)) for key in keys])
    return kernels.reshape(networks, DEPTH, WIDTH, WIDTH)


@functools.partial(jax.jit, static_argnums=0)
def moments(
    activation: Callable[[jax.Array], jax.Array], key: jax.Array, kernels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return mean squares of the weighted sums, and of the gradients at them."""
    # These weights make a loss whose gradient at the last sums has variance 1.
    x, weights = jax.random.normal(key, (2, INPUTS, WIDTH))

    def layer(a: jax.Array, parameters: Any) -> tuple[jax.Array, jax.Array]:
        kernel, offset = parameters
        z = jnp.matmul(a, kernel, precision="highest") + offset
        return activation(z), z

    def network(kernels: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss_fn(offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, sums = jax.lax.scan(layer, x, (kernels, offsets))
            return jnp.sum(weights * sums[-1]), sums

        slopes, sums = jax.grad(loss_fn, has_aux=True)(jnp.zeros((DEPTH, *x.shape)))
        return jnp.mean(sums**2, (1, 2)), jnp.mean(slopes**2, (1, 2))

    sums, slopes = jax.lax.map(network, kernels)
    return sums.mean(0), slopes.mean(0)


def predicted(scheme: str, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected means of both, by layer."""
    factor = WIDTH * SCHEMES[scheme][1]
    part = ACTIVATIONS[activation][1]
    layers = np.arange(DEPTH)
    return factor * (part * factor) ** layers, (part * factor) ** layers[::-1]


def run(networks: int, seed: int) -> Results:
    """Measure all networks; return one array entry per layer."""
    columns: dict[str, list[Any]] = {}
    kernel_key, key = jax.random.split(jax.random.key(seed))
    for scheme, activation in itertools.product(SCHEMES, ACTIVATIONS):
        kernels = draw(SCHEMES[scheme][0], kernel_key, networks)
        means = moments(ACTIVATIONS[activation][0], key, kernels)
        rows: dict[str, list[Any]]
        rows = {"scheme": [scheme] * DEPTH, "activation_function": [activation] * DEPTH}
        rows |= {"layer": list(range(1, DEPTH + 1))}
        lines = predicted(scheme, activation)
        for measure, found, line in zip(MEASURES, means, lines, strict=True):
            rows |= {
                measure: list(np.asarray(found)),
                f"{measure}_predicted": list(line),
            }
        for name, values in rows.items():
            columns.setdefault(name, []).extend(values)
    return {name: np.array(column) for name, column in columns.items()}


def select(results: Results, scheme: str, activation: str) -> Results:
    """Return the numbers of one kind of network, by layer."""
    mask = results["scheme"] == scheme
    mask &= results["activation_function"] == activation
    return {name: column[mask] for name, column in results.items()}


def table(results: Results) -> str:
    """Return the numbers at the ends of the networks as text."""
    row = "{:18}{:8}{:>12}{:>12}{:>16}{:>12}"
    lines = [
        row.format("", "", "sums in the", "last layer", "gradient in", "the first")
    ]
    lines.append(row.format("weights", "units", *("measured", "predicted") * 2))
    for scheme, activation in itertools.product(SCHEMES, ACTIVATIONS):
        layers = select(results, scheme, activation)
        ends = [(name, end) for name, end in zip(MEASURES, (-1, 0), strict=True)]
        cells = [
            f"{layers[name + suffix][end]:.2g}"
            for name, end in ends
            for suffix in ("", "_predicted")
        ]
        lines.append(row.format(scheme, activation, *cells))
    return "\n" + "\n".join(line.rstrip() for line in lines) + "\n"


def picture(results: Results) -> Figure:
    """Draw both means by layer, for linear units and for ReLUs."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    titles = "weighted sums, mean square", "gradient in them, mean square"
    for axes, (activation, measure) in zip(
        panels.T.flat, itertools.product(ACTIVATIONS, MEASURES), strict=True
    ):
        for index, scheme in enumerate(SCHEMES):
            layers = select(results, scheme, activation)
            style: dict[str, Any] = {"color": f"C{index}"}
            axes.plot(layers["layer"], layers[f"{measure}_predicted"], lw=1, **style)
            style |= {"marker": "osv^"[index], "linestyle": "none", "label": scheme}
            axes.plot(layers["layer"], layers[measure], **style)
        axes.set_yscale("log")
        axes.set_title(f"{activation} units: {titles[MEASURES.index(measure)]}")
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
        axes.set_xticks(range(1, DEPTH + 1))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(SCHEMES), frameon=False
    )
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiment; return the numbers, one entry for each layer."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--networks", type=int, default=50, help="random networks to average over")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.networks < 1:
        parser.error("--networks must be at least 1.")
    make_folder(parser, options)
    results = run(options.networks, options.seed)
    print(table(results))
    write_csv(results, options.out / "initialization.csv")
    picture(results).savefig(options.out / "initialization.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
