r"""Table 1 of van Laarhoven (2017): derived, measured, and as it is printed.

For each update rule, the table says how two quantities settle with the learning rate
$\eta$ and the weight decay $\lambda$: the norm of scale-invariant weights, and their
effective learning rate. Its last column is misprinted:

- $\eta_\mathrm{eff} = \eta / \|w\|^2$ and $\|w\| \sim (\eta/\lambda)^{1/4}$ give
  $\sqrt{\eta\lambda}$, not $\sqrt{\eta/\lambda}$.
- $\eta_\mathrm{eff} = \eta / \|w\|$ and $\|w\| \sim (\eta/\lambda)^{1/3}$ give
  $(\eta^2\lambda)^{1/3}$, not $(\eta^2/\lambda)^{1/3}$.

Here the rules run in the paper's model of converged training (section 4). The gradient
is a random vector orthogonal to $w$, of length $1 / \|w\|$, drawn anew at each step.
All runs of a rule start at the same norm.

*Measured* are the exponents of the settled norm and of the settled angle between $w_t$
and $w_{t+1}$. The angle is proportional to the effective learning rate, but does not
presume its formula. *Derived* are the logarithmic derivatives of `equilibrium_norm` and
of the effective rate at that norm, at small $\eta\lambda$.

The program writes a picture, and the settled norms and angles as CSV, to `--out`.
"""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiments import make_folder, make_parser, write_csv
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

import normax

Results = dict[str, np.ndarray]
Exponents = tuple[float, float]

DIMENSION, CHAINS = 128, 8

# These are the middles of the grids of learning rates and weight decays. Decay takes
# about 1% of the norm per step. AdamW has less decay, because it would deviate the most
# from its leading order.
GRIDS = {
    "sgd": (0.1, 0.1),
    "momentum": (0.03, 0.03),
    "nesterov": (0.03, 0.03),
    "rmsprop": (0.01, 0.1),
    "adam": (0.01, 0.1),
    "adamw": (0.01, 0.2),
    "normalized_sgd": (0.05, 0.1),
}

# The table prints these exponents of (eta, lambda), in the norm and in the rate.
FOURTH_ROOT = ((1 / 4, -1 / 4), (1 / 2, -1 / 2))
CUBE_ROOT = ((1 / 3, -1 / 3), (2 / 3, -1 / 3))
PRINTED: dict[str, tuple[Exponents, Exponents]] = {
    "sgd": FOURTH_ROOT,
    "momentum": FOURTH_ROOT,
    "rmsprop": CUBE_ROOT,
    "adam": CUBE_ROOT,
    "normalized_sgd": ((0.0, 0.0), (1.0, 0.0)),
}


def unit(w: jax.Array) -> jax.Array:
    """Return the direction of every column."""
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 4))
def simulate(
    name: str,
    eta: jax.Array,
    lam: jax.Array,
    start: jax.Array,
    steps: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return norms and angles, root mean squares over chains and the last third."""

    def settle(eta: jax.Array, lam: jax.Array) -> tuple[jax.Array, ...]:
        rule = normax.UPDATE_RULES[name].make(eta, lam)

        def step(carry: Any, key: jax.Array) -> Any:
            w, state = carry
            g = jax.random.normal(key, w.shape)
            g = g - unit(w) * jnp.sum(g * unit(w), 0, keepdims=True)
            g = unit(g) / jnp.linalg.norm(w, axis=0, keepdims=True)
            updates, state = rule.update(g, state, w)
            angle = normax.angular_update(w, updates)
            w = w + updates
            squares = jnp.sum(w**2, 0), angle**2
            return (w, state), tuple(jnp.mean(square) for square in squares)

        w = start * unit(jax.random.normal(key, (DIMENSION, CHAINS)))
        keys = jax.random.split(key, steps)
        _, squares = jax.lax.scan(step, (w, rule.init(w)), keys)
        return tuple(jnp.sqrt(jnp.mean(x[-(steps // 3) :])) for x in squares)

    norm, angle = jax.vmap(settle)(eta, lam)
    return norm, angle


def run(rules: Sequence[str], size: int, steps: int, seed: int) -> Results:
    """Simulate every grid; return one array entry per run."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("rule", "eta", "lambda", "norm", "angle", "predicted")
    }
    for name in tqdm(rules, unit="rule"):
        factors = np.geomspace(0.5, 2, size)
        eta, lam = (
            middle * grid.ravel()
            for middle, grid in zip(
                GRIDS[name], np.meshgrid(factors, factors), strict=True
            )
        )
        rule = normax.UPDATE_RULES[name]
        start = rule.equilibrium_norm(*GRIDS[name], 1.0, DIMENSION)
        key = jax.random.key(seed)
        norm, angle = simulate(name, eta, lam, start, steps, key)
        predicted = rule.equilibrium_norm(eta, lam, 1.0, DIMENSION)
        values = ([name] * eta.size, eta, lam, norm, angle, predicted)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(np.asarray(value))
    return {name: np.concatenate(column) for name, column in columns.items()}


def select(results: Results, rule: str) -> Results:
    """Return the numbers of one rule."""
    mask = results["rule"] == rule
    return {name: column[mask] for name, column in results.items()}


def measured(results: Results, rule: str) -> tuple[Exponents, Exponents]:
    """Return the fitted exponents of norm and angle in (eta, lambda)."""
    points = select(results, rule)
    logs = np.log(np.stack([points["eta"], points["lambda"]], 1))
    design = np.column_stack([logs, np.ones(len(logs))])
    targets = np.log(np.stack([points["norm"], points["angle"]], 1))
    fit = np.linalg.lstsq(design, targets, rcond=None)[0]
    return (fit[0, 0], fit[1, 0]), (fit[0, 1], fit[1, 1])


def derived(name: str) -> tuple[Exponents, Exponents]:
    """Return the derivatives of log norm and log effective rate at small decay."""
    rule = normax.UPDATE_RULES[name]

    def logarithms(logs: jax.Array) -> jax.Array:
        eta, lam = jnp.exp(logs)
        norm = rule.equilibrium_norm(eta, lam, 1.0, DIMENSION)
        return jnp.log(jnp.stack([norm, rule.effective_learning_rate(eta, norm)]))

    norm, rate = jax.jacfwd(logarithms)(jnp.log(jnp.array([1e-4, 1e-4])))
    return (float(norm[0]), float(norm[1])), (float(rate[0]), float(rate[1]))


def power_law(exponents: Exponents) -> str:
    """Return exponents as text, such as eta^1/4 lambda^-1/4."""
    factors = []
    for name, exponent in zip(("η", "λ"), exponents, strict=True):
        fraction = Fraction(exponent).limit_denominator(12)
        if fraction:
            factors.append(name + ("" if fraction == 1 else f"^{fraction}"))
    return " ".join(factors) or "1"


def table(results: Results, rules: Sequence[str]) -> str:
    """Return the table as text."""
    row = "{:16}{:16}{:14}{:16}{:16}{:14}{}"
    columns = ("measured", "derived", "printed") * 2
    heads = ("", "norm", "", "", "effective learning rate", "", "")
    lines = [row.format(*heads), row.format("rule", *columns)]
    for name in rules:
        cells = [name]
        printed = PRINTED.get(name, (None, None))
        laws = measured(results, name), derived(name), printed
        for found, law, claim in zip(*laws, strict=True):
            cells += ["η^{:.2f} λ^{:.2f}".format(*found), power_law(law), "-"]
            if claim is not None:
                wrong = np.max(np.abs(np.subtract(law, claim))) > 0.1
                cells[-1] = power_law(claim) + " !" * bool(wrong)
        lines.append(row.format(*cells))
    lines.append(row.format("newton", "-", "-> 0", "-> 0", "-", "η", "η"))
    lines.append("! misprinted: neither derived nor measured")
    return "\n" + "\n".join(line.rstrip() for line in lines) + "\n"


def middle(values: np.ndarray) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.log(values).mean()))


def picture(results: Results, rules: Sequence[str]) -> Figure:
    """Draw norms over eta / lambda; angles over both forms of the effective rate."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    norms, *angles = figure.subplots(1, 3)
    for index, name in enumerate(rules):
        points, (eta, lam) = select(results, name), GRIDS[name]
        marker: dict[str, Any] = {"color": f"C{index}", "linestyle": "none"}
        marker |= {"marker": "os^v+Dx"[index], "markersize": (9, 6, 4)[index % 3]}
        ratio = points["eta"] / points["lambda"]
        line = np.geomspace(ratio.min(), ratio.max(), 50)
        scale = np.sqrt(line * lam / eta)
        rule = normax.UPDATE_RULES[name]
        curve = rule.equilibrium_norm(eta * scale, lam / scale, 1.0, DIMENSION)
        norms.plot(line, curve, color=f"C{index}", linewidth=1)
        norms.plot(ratio, points["norm"], markerfacecolor="none", label=name, **marker)
        if name not in PRINTED:
            continue
        for axes, law in zip(angles, (PRINTED[name], derived(name)), strict=True):
            rate = points["eta"] ** law[1][0] * points["lambda"] ** law[1][1]
            x, y = rate / middle(rate), points["angle"] / middle(points["angle"])
            axes.plot(x, y, markerfacecolor="none", **marker)
    norms.set_xlabel(r"$\eta / \lambda$")
    norms.set_ylabel(r"norm $\|w\|$")
    norms.set_title("norm of the weights\nlines: predicted")
    titles = (
        "as printed: $\\sqrt{\\eta/\\lambda}$, $\\sqrt[3]{\\eta^2/\\lambda}$",
        "as derived: $\\sqrt{\\eta\\lambda}$, $\\sqrt[3]{\\eta^2\\lambda}$",
    )
    for axes, title in zip(angles, titles, strict=True):
        axes.plot([0.4, 2.5], [0.4, 2.5], color="black", linewidth=0.8, zorder=0)
        axes.set_title("effective learning rate,\n" + title)
        axes.set_xlabel("formula, relative to the middle of the grid")
        axes.set_ylabel("measured angle per step, relative")
    for axes in (norms, *angles):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
    norms.xaxis.set_major_locator(LogLocator())
    figure.legend(loc="outside lower center", ncols=len(rules), frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the simulations; return the numbers, one entry for each run."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rule", nargs="+", default=list(GRIDS), choices=GRIDS)
    add("--grid", type=int, default=4, help="points along each axis")
    add("--steps", type=int, default=6000)
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.grid < 2 or options.steps < 3:
        parser.error("--grid must be at least 2 and --steps at least 3.")
    make_folder(parser, options)
    results = run(options.rule, options.grid, options.steps, options.seed)
    print(table(results, options.rule))
    write_csv(results, options.out / "table_1.csv")
    figure = picture(results, options.rule)
    figure.savefig(options.out / "table_1.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
