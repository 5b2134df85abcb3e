"""Hessian-free optimization beside Adam on a deep autoencoder.

    python tests/benchmarks/bench_autoencoder.py

The kind of network that Martens (2010) trained: sigmoid units, a linear code of 25, as
loss the cross-entropy of pixels (summed over them, mean over images), and 15 nonzero
weights for every unit at the start, from a normal distribution. Losses are above the
entropy of the pixels, which no network can go below. All methods see the whole batch
at every step and start from the same weights. Printed: the losses along the way, and
when each of the two methods reaches what the other does in all.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import normax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import datasets

HIDDEN = (400, 100, 25, 100, 400)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def draw(pixels, seed=0):
    """Draw Martens' sparse start."""
    rng = np.random.default_rng(seed)
    params = []
    for fan_in, fan_out in itertools.pairwise((pixels, *HIDDEN, pixels)):
        kernel = np.zeros((fan_in, fan_out), np.float32)
        for unit in range(fan_out):
            chosen = rng.choice(fan_in, min(15, fan_in), replace=False)
            kernel[chosen, unit] = rng.normal(size=len(chosen))
        params.append((jnp.asarray(kernel), jnp.zeros(fan_out)))
    return params


def reconstruct(params, x):
    """Return the logits of the pixels."""
    for layer, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias[None]
        if layer not in (HIDDEN.index(25), len(params) - 1):
            x = jax.nn.sigmoid(x)
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50, help="Hessian-free steps")
    parser.add_argument("--adam-steps", type=int, default=5000)
    parser.add_argument("--damping", type=float, default=1.0)
    parser.add_argument("--cg-iterations", type=int, default=250)
    parser.add_argument("--precondition", action="store_true")
    options = parser.parse_args()
    images = datasets.load(options.dataset).x_train[: options.images] / np.float32(255)
    x = jnp.asarray(images.reshape(len(images), -1), jnp.float32)
    entropy = -jax.scipy.special.xlogy(x, x) - jax.scipy.special.xlogy(1 - x, 1 - x)
    start = draw(x.shape[1])

    def outputs_fn(params):
        return reconstruct(params, x)

    def loss_of_outputs(logits):
        return (optax.sigmoid_binary_cross_entropy(logits, x) - entropy).sum(1).mean()

    def loss(params):
        return loss_of_outputs(outputs_fn(params))

    tx = normax.second_order.hessian_free(
        damping=options.damping,
        outputs_fn=outputs_fn,
        loss_of_outputs=loss_of_outputs,
        cg_iterations=options.cg_iterations,
    )

    def squared_gradients(params):
        """Return the mean over images of the squares of their gradients."""

        def loss_of_image(params, image):
            logits = reconstruct(params, image[None])
            return optax.sigmoid_binary_cross_entropy(logits, image[None]).sum()

        def squares(image):
            return jax.tree.map(jnp.square, jax.grad(loss_of_image)(params, image))

        return jax.tree.map(
            lambda squares: squares.mean(0), jax.lax.map(squares, x, batch_size=50)
        )

    @jax.jit
    def step(params, state):
        diagonal = squared_gradients(params) if options.precondition else None
        updates, state = tx.update(
            jax.grad(loss)(params),
            state,
            params,
            value_fn=loss,
            curvature_diagonal=diagonal,
        )
        params = optax.apply_updates(params, updates)
        return params, state, loss(params)

    params, state = start, tx.init(start)
    step = step.lower(params, state).compile()
    losses, products, begin = [float(loss(start))], 0, time.perf_counter()
    for count in range(options.steps):
        params, state, value = step(params, state)
        losses.append(float(value))
        products += int(state.iterations)
        if count % 5 == 4 or count == 0:
            print(
                f"Hessian-free step {count + 1}: loss {value:.3f}, damping "
                f"{state.damping:.2g}, {state.iterations} iterations, "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    error = jnp.sum((jax.nn.sigmoid(outputs_fn(params)) - x) ** 2, 1).mean()
    print(f"squared error {error:.3f}; {products} products in all")

    best = None
    for rate in RATES:
        adam = optax.adam(rate)

        @jax.jit
        def train(params, adam=adam):
            def step(carry, _):
                params, state = carry
                value, grads = jax.value_and_grad(loss)(params)
                updates, state = adam.update(grads, state)
                return (optax.apply_updates(params, updates), state), value

            carry = params, adam.init(params)
            return jax.lax.scan(step, carry, None, options.adam_steps)

        begin = time.perf_counter()
        (after, _), values = train(start)
        values = np.append(values, loss(after))
        reached = np.flatnonzero(values <= losses[-1])
        when = f"at step {reached[0]}" if len(reached) else "never"
        print(
            f"Adam {rate:g}: loss {values[-1]:.3f} (smallest {np.nanmin(values):.3f}), "
            f"as low as Hessian-free's {when}, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        best = np.nanmin([best or np.inf, np.nanmin(values)])
    ahead = np.flatnonzero(np.array(losses) <= best)
    when = f"at step {ahead[0]}" if len(ahead) else "never"
    print(f"Hessian-free has the smallest loss of Adam, {best:.3f}, {when}")


if __name__ == "__main__":
    main()
