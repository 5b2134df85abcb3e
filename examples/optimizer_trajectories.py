r"""Optimizers in a ravine, at a saddle, on logistic regression; phases of momentum.

*Ravine*: a quadratic with curvatures 1 and 50, whose axes are not those of the
coordinates. *Saddle*: $(x^2 - y^2) / 2 + y^4 / 4$. The start is nearly on the ridge, so
gradient descent first goes to the saddle. *Logistic regression*: all 569 tumors of
scikit-learn's breast cancer data, standardized, with an $\ell_2$ penalty of 0.001.

Every rule runs with each learning rate of a grid. The rate that counts is the one that
brings the loss fastest to within 0.1% of the way to its minimum. Two rules need no
grid. L-BFGS chooses its rates by a line search. Hessian-free optimization has rate 1
and adapts its damping; on logistic regression it uses the Gauss-Newton matrix.

*Momentum* on a quadratic with curvatures $\mu$ and $L$: the program measures the factor
by which the error shrinks in a step, for every learning rate and momentum. This is the
growth of weights and velocity, which are rescaled after every step. In closed form it
is the largest absolute root, over both curvatures $c$, of

$$z^2 - (1 + \rho - \eta c)\,z + \rho = 0.$$

It is smallest at the point that `normax.theory.optimal_momentum` gives.

The program writes a picture, and all losses and measured factors as CSV, to `--out`.
"""

import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiments import make_folder, make_parser
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from tqdm import tqdm

import normax

Results = dict[str, Any]

RATES = 10.0 ** np.arange(-3, 2.1, 0.25)
RULES: dict[str, tuple[Callable[..., optax.GradientTransformation], np.ndarray]] = {
    "gradient descent": (normax.UPDATE_RULES["sgd"].make, RATES),
    "momentum": (normax.UPDATE_RULES["momentum"].make, RATES),
    "Nesterov": (normax.UPDATE_RULES["nesterov"].make, RATES),
    "AdaGrad": (normax.UPDATE_RULES["adagrad"].make, RATES),
    "RMSProp": (normax.UPDATE_RULES["rmsprop"].make, RATES),
    "AdaDelta": (normax.UPDATE_RULES["adadelta"].make, RATES),
    "Adam": (normax.UPDATE_RULES["adam"].make, RATES),
    "Newton": (normax.second_order.newton, RATES),
    "L-BFGS": (lambda rate: optax.lbfgs(), np.ones(1)),
    "Hessian-free": (normax.second_order.hessian_free, np.ones(1)),
}
TOLERANCE = 1e-3
CURVATURES = (1.0, 25.0)


class Problem(NamedTuple):
    """A loss, its start and minimum, and the functions that compose it, if any."""

    loss: Callable[[jax.Array], jax.Array]
    start: np.ndarray
    minimum: float
    functions: dict[str, Callable[[jax.Array], jax.Array]]


def ravine(w: jax.Array) -> jax.Array:
    """Return the quadratic."""
    along, across = w[0] + 0.5 * w[1], w[1] - 0.5 * w[0]
    return (along**2 + 50 * across**2) / (2 * 1.25)


def saddle(w: jax.Array) -> jax.Array:
    """Return the loss whose minima lie at (0, 1) and (0, -1)."""
    return (w[0] ** 2 - w[1] ** 2) / 2 + w[1] ** 4 / 4


def logistic_regression() -> Problem:
    """Return the problem; its minimum is found by Newton's method."""
    data = load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    inputs = jnp.asarray(np.column_stack([x, np.ones(len(x))]), jnp.float32)
    signs = jnp.asarray(2 * data.target - 1, jnp.float32)

    # The weights are outputs too, so that the curvature includes the penalty.
    def outputs_fn(w: jax.Array) -> jax.Array:
        return jnp.concatenate([inputs @ w, w])

    def loss_of_outputs(y: jax.Array) -> jax.Array:
        margins, w = y[: len(signs)], y[len(signs) :]
        return jnp.mean(jax.nn.softplus(-signs * margins)) + 5e-4 * jnp.vdot(w, w)

    def loss(w: jax.Array) -> jax.Array:
        return loss_of_outputs(outputs_fn(w))

    start = np.zeros(inputs.shape[1], np.float32)
    _, losses = descend(
        normax.second_order.newton(damping=1e-4), Problem(loss, start, 0, {}), 20
    )
    functions = dict(outputs_fn=outputs_fn, loss_of_outputs=loss_of_outputs)
    return Problem(loss, start, float(jnp.min(losses)), functions)


def descend(
    tx: optax.GradientTransformation, problem: Problem, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Return the weights and the losses at the start and after every step."""
    tx = optax.with_extra_args_support(tx)
    loss = problem.loss

    def step(carry: Any, _: None) -> Any:
        w, state = carry
        value, grad = jax.value_and_grad(loss)(w)
        extra = dict(value=value, grad=grad, value_fn=loss)
        updates, state = tx.update(grad, state, w, **extra)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, loss(w))

    start = jnp.asarray(problem.start, jnp.float32)
    path, losses = jax.lax.scan(step, (start, tx.init(start)), None, steps)[1]
    first = start[None], loss(start)[None]
    return jnp.concatenate([first[0], path]), jnp.concatenate([first[1], losses])


def steps_needed(losses: np.ndarray, minimum: float) -> np.ndarray:
    """Count the steps until the loss stays within the tolerance; if never, all + 1."""
    gaps = losses - minimum
    inside = gaps <= TOLERANCE * gaps[..., :1]
    stays = np.flip(np.logical_and.accumulate(np.flip(inside, -1), -1), -1)
    return np.where(stays[..., -1], np.argmax(stays, -1), losses.shape[-1])


def run(problem: Problem, rule: str, steps: int) -> Results:
    """Return the path and the losses of the best learning rate."""
    make, rates = RULES[rule]
    functions = problem.functions if rule == "Hessian-free" else {}

    @jax.jit
    @jax.vmap
    def sweep(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        return descend(make(rate, **functions), problem, steps)

    paths, losses = map(np.asarray, sweep(jnp.asarray(rates, jnp.float32)))
    needed = steps_needed(losses, problem.minimum)
    last = np.where(np.isfinite(losses[:, -1]), losses[:, -1], np.inf)
    best = np.lexsort((last, needed))[0]
    return {
        "rate": float(rates[best]),
        "steps": int(needed[best]),
        "path": paths[best],
        "gap": np.maximum(losses[best] - problem.minimum, 0),
    }


def closed_form(eta: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Return the factor by which momentum shrinks errors in a step."""
    roots = []
    for curvature in CURVATURES:
        half = (1 + rho - eta * curvature) / 2
        distance = np.sqrt((half**2 - rho).astype(complex))
        roots += [np.abs(half + distance), np.abs(half - distance)]
    return np.max(roots, 0)


@functools.partial(jax.jit, static_argnums=2)
def measured_factor(eta: jax.Array, rho: jax.Array, steps: int) -> jax.Array:
    """Measure the factor for arrays of learning rates and momenta."""

    def factor(eta: jax.Array, rho: jax.Array) -> jax.Array:
        tx = normax.UPDATE_RULES["momentum"].make(eta, momentum=rho)

        def step(carry: Any, _: None) -> Any:
            w, state = carry
            updates, state = tx.update(jnp.array(CURVATURES) * w, state, w)
            carry = optax.apply_updates(w, updates), state
            size = optax.tree.norm(carry)
            return jax.tree.map(lambda x: x / size, carry), jnp.log(size)

        w = jnp.ones(2)
        _, growth = jax.lax.scan(step, (w, tx.init(w)), None, steps)
        return jnp.exp(jnp.mean(growth[steps // 2 :]))

    return jax.vmap(jax.vmap(factor))(eta, rho)


def phase_diagram(size: int, steps: int) -> Results:
    """Return measured and exact factors on a grid, and the best point."""
    eta, rho = np.meshgrid(
        np.linspace(0, 4 / CURVATURES[1], size + 1)[1:], np.linspace(0, 1, size)
    )
    best = [float(x) for x in normax.theory.optimal_momentum(*CURVATURES)]
    return {
        "eta": eta,
        "rho": rho,
        "measured": np.asarray(measured_factor(eta, rho, steps)),
        "exact": closed_form(eta, rho),
        "best": best,
        "best_exact": float(closed_form(*map(np.array, best))),
    }


def table(results: Results) -> str:
    """Return the numbers as text."""
    problems = list(results["runs"])
    row = "{:18}" + "{:>8}{:>8}{:>10}  " * len(problems)
    heads = [x for name in problems for x in ("", "", name)]
    lines = [row.format("", *heads)]
    lines.append(row.format("", *("rate", "steps", "last gap") * len(problems)))
    for rule in RULES:
        cells = []
        for name in problems:
            found = results["runs"][name][rule]
            steps = found["steps"]
            cells += [
                f"{found['rate']:.2g}" if len(RULES[rule][1]) > 1 else "-",
                str(steps) if steps < len(found["gap"]) else "-",
                f"{found['gap'][-1]:.0e}",
            ]
        lines.append(row.format(rule, *cells))
    phases = results["phases"]
    error = np.max(np.abs(phases["measured"] - phases["exact"]))
    lines.append(
        "steps: until 99.9% of the way to the minimum is done for good; gap: loss - "
        "minimum"
    )
    lines.append(
        "momentum on curvatures {:g} and {:g}: best at learning rate {:.3f}, momentum "
        "{:.3f}, factor {:.3f} a step;".format(
            *CURVATURES, *phases["best"], phases["best_exact"]
        )
    )
    lines.append(
        f"smallest measured {phases['measured'].min():.3f}; largest difference of "
        f"measured and exact factors {error:.3f}"
    )
    return "\n" + "\n".join(line.rstrip() for line in lines) + "\n"


def style(index: int) -> dict[str, Any]:
    """Return how the lines of a rule are drawn."""
    return {
        "color": f"C{index}",
        "linestyle": ("-", "--", "-.")[index % 3],
        "linewidth": 2.2 if index >= 7 else 1.4,
    }


def draw_paths(axes: Axes, problem: Problem, runs: Results, window: Any) -> None:
    """Draw the paths over the level lines of the loss."""
    x, y = np.meshgrid(*(np.linspace(low, high, 200) for low, high in window))
    loss = np.asarray(problem.loss(jnp.stack([x, y]))) - problem.minimum
    levels = loss.max() * np.geomspace(1e-4, 1, 14)
    axes.contour(x, y, loss, levels, colors="0.8", linewidths=0.8)
    for index, rule in enumerate(RULES):
        path = runs[rule]["path"]
        axes.plot(*path.T, marker=".", markersize=4, label=rule, **style(index))
    axes.plot(*problem.start, marker="o", color="black", markersize=7)
    axes.set(xlim=window[0], ylim=window[1], xlabel="first weight")
    axes.set_ylabel("second weight")


def picture(results: Results, problems: dict[str, Problem]) -> Figure:
    """Draw paths in the plane, losses by step, and the phases of momentum."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    (left, right), (losses, phases) = figure.subplots(2, 2)
    runs = results["runs"]
    window = ((-3.2, 1.2), (-1.9, 1.3))
    draw_paths(left, problems["ravine"], runs["ravine"], window)
    left.plot(0, 0, marker="*", color="black", markersize=12)
    left.set_title("a ravine, curvatures 1 and 50; ★ minimum")
    window = ((-1.2, 1.2), (-0.3, 1.5))
    draw_paths(right, problems["saddle"], runs["saddle"], window)
    right.plot(0, 1, marker="*", color="black", markersize=12)
    right.plot(0, 0, marker="x", color="black", markersize=9, markeredgewidth=2)
    right.set_title("leaving a saddle; × saddle, ★ minimum")

    for index, rule in enumerate(RULES):
        gap = runs["logistic"][rule]["gap"]
        losses.plot(np.maximum(gap, 1e-8), **style(index))
    losses.set_yscale("log")
    losses.set_ylim(1e-7, 1)
    losses.set_xlabel("step")
    losses.set_ylabel("loss − smallest loss (nats)")
    losses.set_title("logistic regression, breast cancer data")

    found = results["phases"]
    grid = found["eta"], found["rho"]
    colors = phases.pcolormesh(
        *grid, found["measured"], cmap="viridis", vmin=0.65, vmax=1.05, rasterized=True
    )
    lines = phases.contour(
        *grid, found["exact"], [0.7, 0.8, 0.9, 0.95, 1], colors="white", linewidths=1
    )
    phases.clabel(lines, fontsize=9)
    phases.plot(*found["best"], marker="*", color="red", markersize=15)
    phases.set_title(
        "momentum: factor of the error per step\n"
        "color: measured; lines: exact; ★ optimal_momentum"
    )
    phases.set_xlabel(r"learning rate $\eta$")
    phases.set_ylabel(r"momentum $\rho$")
    figure.colorbar(colors, ax=phases, extend="both")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def write_csv(results: Results, folder: Path) -> None:
    """Write one row for each rule and step, and one for each point of the diagram."""
    with (folder / "optimizer_trajectories.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "rule", "learning_rate", "step", "gap"])
        for problem, runs in results["runs"].items():
            for rule, found in runs.items():
                for step, gap in enumerate(found["gap"]):
                    writer.writerow([problem, rule, found["rate"], step, gap])
    phases = results["phases"]
    names = ("eta", "rho", "measured", "exact")
    with (folder / "momentum_phases.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*(phases[name].ravel() for name in names), strict=True))


def main(argv: Sequence[str] | None = None) -> Results:
    """Run everything; return the numbers."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="steps of every rule")
    add("--grid", type=int, default=120, help="points along the diagram's axes")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.grid < 2:
        parser.error("--steps must be at least 1 and --grid at least 2.")
    make_folder(parser, options)
    problems = {
        "ravine": Problem(ravine, np.array([-3.0, -0.7]), 0.0, {}),
        "saddle": Problem(saddle, np.array([-1.0, 1e-3]), -0.25, {}),
        "logistic": logistic_regression(),
    }
    results: Results = {
        "runs": {
            name: {
                rule: run(problem, rule, options.steps)
                for rule in tqdm(RULES, desc=name, unit="rule")
            }
            for name, problem in problems.items()
        },
        "phases": phase_diagram(options.grid, 1000),
    }
    print(table(results))
    write_csv(results, options.out)
    figure = picture(results, problems)
    figure.savefig(options.out / "optimizer_trajectories.png", dpi=120)
    return results


if __name__ == "__main__":
    main()
