"""Published rules of training on spheres, as compositions, against their formulas.

Each test has the published formula in some lines of NumPy, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

STEPS = 6


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def norm(x, axes):
    return np.sqrt(np.sum(x**2, axis=axes, keepdims=True))


def adam(rate=1.0, b1=0.9, b2=0.999):
    """Return Adam's step as a function of the gradient."""
    m = r = t = 0

    def step(g):
        nonlocal m, r, t
        m, r, t = b1 * m + (1 - b1) * g, b2 * r + (1 - b2) * g**2, t + 1
        return rate * m / (1 - b1**t) / (np.sqrt(r / (1 - b2**t)) + 1e-8)

    return step


def follow(tx, params, gradient):
    """Yield the parameters after each step."""
    params = jax.tree.map(jnp.float32, params)
    state = tx.init(params)
    for t in range(STEPS):
        updates, state = tx.update(gradient(t, params), state, params)
        params = optax.apply_updates(params, updates)
        yield t, params


def check(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def on_the_ball(w, u, rate):
    """Levanter's rule: the norm is that of the weights before the step."""
    stepped = w - rate * u * norm(w, (0, 1)) / norm(u, (0, 1))
    return stepped / norm(stepped, (0, 1)) * norm(w, (0, 1))


def test_adamh():
    w, direction = draw(0, 12, 8), adam()
    tx = normax.hyperball(optax.scale_by_adam(), 0.02)
    grads = [draw(t + 1, 12, 8) for t in range(STEPS)]
    for t, ours in follow(tx, w, lambda t, _: jnp.float32(grads[t])):
        w = on_the_ball(w, direction(grads[t]), 0.02)
        check(ours, w)


def newton_schulz(g):
    """Muon's five iterations towards the nearest orthogonal matrix."""
    x = g / norm(g, (0, 1))
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 8), (6, 10)])
def test_muonh(shape):
    w, m = draw(0, *shape), 0
    # optax's own Nesterov momentum corrects its start; Muon as published does not.
    numbers = optax.contrib.MuonDimensionNumbers()  # optax 0.2.6 must have them
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=numbers
    )
    inner = optax.chain(optax.trace(0.95, nesterov=True), muon)
    grads = [draw(t + 1, *shape) for t in range(STEPS)]
    tx = normax.hyperball(inner, 0.02)
    for t, ours in follow(tx, w, lambda t, _: jnp.float32(grads[t])):
        m = 0.95 * m + grads[t]
        w = on_the_ball(w, newton_schulz(grads[t] + 0.95 * m), 0.02)
        check(ours, w)


@pytest.mark.slow
def test_edm2():
    """Forced weight norm: length sqrt(n) per unit; the forward pass divides by it."""
    w, x, y, step = draw(0, 9, 5), draw(1, 30, 9), draw(2, 30, 5), adam(0.05)
    n = w.shape[0]
    w = np.sqrt(n) * w / norm(w, 0)

    def loss(w):
        unit = normax.projection_unit_norm(w)  # what the paper's layer does, too
        return ((jnp.float32(x) @ unit - jnp.float32(y)) ** 2).sum() / 2

    project = normax.project_unit_norm("unit", radius=n**0.5)
    tx = optax.chain(optax.adam(0.05), project)
    for _, ours in follow(tx, w, lambda t, w: jax.grad(loss)(w)):
        unit = w / norm(w, 0)
        of_unit = x.T @ (x @ unit - y)
        g = (of_unit - unit * (unit * of_unit).sum(0, keepdims=True)) / norm(w, 0)
        w = w - step(g)
        w = np.sqrt(n) * w / norm(w, 0)
        check(ours, w)
        # The forward pass with weights of length sqrt(n): y = w x / sqrt(n).
        check(jnp.float32(x) @ ours / n**0.5, x @ (w / norm(w, 0)))


# The embedding axis of each array, here of size 6, with heads of size 2.
NGPT = {
    "embed": ((10, 6), (1,)),
    "query": ((6, 3, 2), (0,)),
    "key": ((6, 3, 2), (0,)),
    "value": ((6, 3, 2), (0,)),
    "out": ((3, 2, 6), (2,)),
    "up": ((6, 12), (0,)),
    "gate": ((6, 12), (0,)),
    "down": ((12, 6), (1,)),
    "head": ((6, 10), (0,)),
}


@pytest.mark.slow
def test_ngpt():
    """All weight vectors along the embedding axis have norm 1, and no decay."""
    axes = {name: axis for name, (_, axis) in NGPT.items()} | {"logit_scale": "none"}
    params = {
        name: draw(i, *shape) for i, (name, (shape, _)) in enumerate(NGPT.items())
    }
    params = {name: w / norm(w, axes[name]) for name, w in params.items()}
    params["logit_scale"] = np.ones(10)
    grads = [
        {name: draw(t + 50, *w.shape) for name, w in params.items()}
        for t in range(STEPS)
    ]
    tx = optax.chain(optax.adam(0.05), normax.project_unit_norm(axes))
    steps = {name: adam(0.05) for name in params}
    for t, ours in follow(tx, params, lambda t, _: jax.tree.map(jnp.float32, grads[t])):
        for name, w in params.items():
            w = w - steps[name](grads[t][name])
            params[name] = w if axes[name] == "none" else w / norm(w, axes[name])
            check(ours[name], params[name])


@pytest.mark.slow
def test_simbav2():
    """Unit norm over the inputs of each unit, in a stack of critics too."""
    axes = {"actor": (0,), "critics": (1,)}
    params = {"actor": draw(0, 7, 4), "critics": draw(1, 2, 7, 4)}
    params = {name: w / norm(w, axes[name]) for name, w in params.items()}
    tx = optax.chain(optax.adam(0.05), normax.project_unit_norm(axes))
    steps = {name: adam(0.05) for name in params}
    grads = [
        {name: draw(t + 9, *w.shape) for name, w in params.items()}
        for t in range(STEPS)
    ]
    for t, ours in follow(tx, params, lambda t, _: jax.tree.map(jnp.float32, grads[t])):
        for name, w in params.items():
            w = w - steps[name](grads[t][name])
            params[name] = w / norm(w, axes[name])
            check(ours[name], params[name])


def test_nap():
    """Normalize and project: each layer returns to the norm that it had first."""
    w, step = draw(0, 7, 4), adam(0.05)
    start = norm(w, (0, 1))
    project = normax.project_unit_norm("layer", radius="initial")
    grads = [draw(t + 1, 7, 4) for t in range(STEPS)]
    tx = optax.chain(optax.adam(0.05), project)
    for t, ours in follow(tx, w, lambda t, _: jnp.float32(grads[t])):
        w = w - step(grads[t])
        w = w * start / norm(w, (0, 1))
        check(ours, w)
