"""A scan has the path norm and the path scales of the loop written out, exactly."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax._core.programs import called_programs

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

relu = jax.nn.relu


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def unrolled(body, carry, xs, length=None, reverse=False):
    steps = range(length if xs is None else len(jax.tree.leaves(xs)[0]))
    ys = {}
    for step in reversed(steps) if reverse else steps:
        # What is sliced with a known number is known to be another part of the array.
        part = lambda x: jax.lax.index_in_dim(x, step, keepdims=False)  # noqa: B023, E731
        slices = jax.tree.map(part, xs)
        carry, ys[step] = body(carry, slices)
    rows = [ys[step] for step in steps]
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *rows) if rows else None


def values(forward, params, inputs, p=2.0):
    """Return the norm and the scales; only the norm if a parameter is no edge."""

    def both(params):
        norm = normax.path_norm(forward, params, inputs, p)
        try:
            return norm, normax.path_scales(forward, params, inputs, p)
        except ValueError as error:
            assert "edge weights" in str(error)
            return norm, None

    return jax.jit(both)(params)


def assert_is_the_loop(network, params, inputs, p=2.0):
    """Compare `network(params, inputs, loop)` for both loops; return the scales."""
    scan, loop = (
        values(functools.partial(network, loop=loop), params, inputs, p)
        for loop in (jax.lax.scan, unrolled)
    )
    chex.assert_trees_all_close(scan, loop, rtol=1e-12)
    return scan[1]


X = jax.ShapeDtypeStruct((1, 2), np.float64)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape))


# A carry without a constant, to which steps add one, written out path by path.


def residual(params, x, loop, **kwargs):
    def body(h, layer):
        w, b, d = layer
        return (h + (h @ w + b)) + d, h

    return loop(body, x, params, **kwargs)[0]


def residual_by_paths(w, b, d, p):
    """Return F for one unit and two steps.

    The first step adds one constant, of which the second makes an edge. There two
    constants meet, which are an edge each, and another is added.
    """
    starts = [("x", 1.0), ("constant", abs(b[0] + d[0]))]
    total = abs(b[1]) ** p + abs(d[1]) ** p
    for (start, size), second in itertools.product(starts, (1.0, w[1])):
        # What starts at the constant of the first step does not pass the first layer.
        for first in (1.0, w[0]) if start == "x" else (1.0,):
            total += abs(size * first * second) ** p
    return total


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_a_constant_that_the_first_step_adds(p):
    w, b, d = (np.array(a) for a in ([0.5, -3.0], [2.0, 0.25], [-1.5, 0.75]))
    params = [jnp.asarray(a).reshape(2, 1, 1) for a in (w, b, d)]
    forward = functools.partial(residual, loop=jax.lax.scan)
    norm, scales = values(forward, params, jnp.ones((1, 1)), p)
    expected = residual_by_paths(w, b, d, p)
    np.testing.assert_allclose(norm, expected ** (1 / p), rtol=1e-13)
    # Of the derivatives of F by |w|^p, with |b + d|^p as one edge.
    live = 1 + abs(w[0]) ** p + abs(b[0] + d[0]) ** p
    last = 1 + abs(w[1]) ** p
    for scale, derivatives in zip(
        scales, ([last, live], [last, 1.0], [last, 1.0]), strict=True
    ):
        expected_scales = np.array(derivatives) ** (2 / p)
        np.testing.assert_allclose(scale.ravel(), expected_scales, rtol=1e-13)


@pytest.mark.parametrize(
    ("start", "length", "reverse"),
    [
        ("none", 1, False),
        ("none", 2, True),
        ("none", 5, False),
        ("constant", 4, True),
        ("constant", 5, False),
    ],
)
def test_constants_that_come_and_go(start, length, reverse):
    def network(params, x, loop):
        if start == "constant":
            x = x + params["c"]
        return residual(params["layers"], x, loop, reverse=reverse)

    layers = [draw(length, 2, 2), draw(length, 1, 2), draw(length, 1, 2, seed=1)]
    assert_is_the_loop(network, {"layers": layers, "c": draw(1, 2)}, X)


@pytest.mark.slow
def test_kinds_that_take_several_steps_to_settle():
    def network(params, x, loop):
        def body(carry, layer):
            a, b, c = carry
            w, bias, d, e = layer
            side = (c + (relu(a) @ w + bias)) + d
            return (b, c + e, relu(side)), (a + (b @ w + e)) + d

        carry, side = loop(body, (x, x @ params["w"], x), params["layers"])
        return carry, side

    length = 5
    layers = [draw(length, 2, 2), draw(length, 1, 2), draw(length, 1, 2, seed=1)]
    layers.append(draw(length, 1, 2, seed=2))
    assert assert_is_the_loop(network, {"layers": layers, "w": draw(2, 2)}, X)


@pytest.mark.slow
def test_one_array_in_all_steps():
    def network(params, x, loop):
        def body(h, _):
            return h + (relu(h @ params["w"]) @ params["v"] + params["b"]), None

        return loop(body, x, None, length=5)[0]

    params = {"w": draw(2, 3), "v": draw(3, 2), "b": draw(1, 2)}
    assert_is_the_loop(network, params, X)


@pytest.mark.slow
def test_carries_that_change_places():
    # Of two carries, one has a constant at even steps, the other one at odd ones.
    def network(params, x, loop):
        def body(carry, layer):
            (a, b), (w, bias, d) = carry, layer
            return (b, a), ((a @ w + bias) + b) + d

        carry = x @ params["w"] + params["c"], x
        return loop(body, carry, params["layers"])[1]

    params = {"w": draw(2, 2), "c": draw(1, 2)}
    length = 5
    layers = [draw(length, 2, 2), draw(length, 1, 2), draw(length, 1, 2, seed=1)]
    assert assert_is_the_loop(network, params | {"layers": layers}, X, 1.5)


@pytest.mark.slow
def test_maxima_that_start_at_minus_infinity():
    def network(params, x, loop):
        def body(most, layer):
            w, bias, d = layer
            return jnp.maximum(most, x @ w + bias) + d, None

        return loop(body, jnp.full((1, 2), -jnp.inf), params)[0]

    for length in (1, 4):
        params = [draw(length, 2, 2), draw(length, 1, 2), draw(length, 1, 2, seed=1)]
        assert assert_is_the_loop(network, params, X)


@pytest.mark.slow
def test_sums_that_start_at_zero():
    def network(params, x, loop):
        def body(total, layer):
            w, bias, d = layer
            return (total + (x @ w + bias)) + d, None

        return loop(body, jnp.zeros((1, 2)), params)[0]

    for length in (1, 4):
        params = [draw(length, 2, 2), draw(length, 1, 2), draw(length, 1, 2, seed=1)]
        assert assert_is_the_loop(network, params, X)


@pytest.mark.slow
def test_weights_that_are_carried():
    # The sum of the biases so far; nothing at first.
    def network(params, x, loop):
        def body(carry, layer):
            (h, total), (w, bias) = carry, layer
            h = (((h @ w) + total) + (x @ w + bias)) + bias[:, ::-1]
            return (relu(h), total + 0.5 * bias), None

        return loop(body, (x, jnp.zeros((1, 2))), params)[0][0]

    for length in (1, 4):
        norms = [
            normax.path_norm(
                functools.partial(network, loop=loop),
                [draw(length, 2, 2), draw(length, 1, 2)],
                X,
            )
            for loop in (jax.lax.scan, unrolled)
        ]
        np.testing.assert_allclose(*norms, rtol=1e-12)


@pytest.mark.slow
def test_a_weight_that_becomes_an_activation_is_one_from_the_start():
    def network(params, x, loop, start):
        def body(h, layer):
            w, bias, d = layer
            return ((relu(h) @ w + bias) + x) + d, None

        return loop(body, start(params, x), params["layers"])[0]

    layers = [draw(3, 2, 2), draw(3, 1, 2), draw(3, 1, 2, seed=1)]
    params = {"layers": layers, "start": draw(1, 2)}
    scan = functools.partial(
        network, loop=jax.lax.scan, start=lambda params, x: params["start"]
    )
    # The same number, said to be an activation.
    loop = functools.partial(
        network, loop=unrolled, start=lambda params, x: 0.0 * x + params["start"]
    )
    chex.assert_trees_all_close(
        values(scan, params, X), values(loop, params, X), rtol=1e-12
    )


def test_scans_of_no_step_leave_weights_weights():
    def network(params, x, loop):
        body = lambda h, w: (relu(h @ w), jnp.exp(h))  # noqa: E731
        w = params["none"]
        start, ys = loop(body, jnp.ones((1, 2)), w) if len(w) else (jnp.ones((1, 2)), w)
        return x @ params["w"] * jnp.exp(start) + jnp.sum(ys)

    params = {"none": jnp.zeros((0, 2, 2)), "w": draw(2, 2)}
    norm = normax.path_norm(functools.partial(network, loop=jax.lax.scan), params, X)
    np.testing.assert_allclose(norm, np.e * np.linalg.norm(params["w"]), rtol=1e-12)


# Random bodies.


def random_network(seed):
    """Return a network with a loop, drawn at random, and how many layers it has."""
    rng = np.random.default_rng(seed)
    width = 3
    kinds = ["dot", "bias", "bias", "add", "add", "sub", "relu", "scale", "neg", "flip"]
    program = [
        (str(rng.choice(kinds)), *rng.integers(0, width + i, 2)) for i in range(8)
    ]
    outs = rng.integers(0, width + len(program), width + 1)
    # Whatever else is carried, the last value is, so that steps do something.
    outs[0] = width + len(program) - 1
    starts = rng.choice(["plain", "constant", "layer", "zero"], width)

    def step(carry, layer):
        found = list(carry)
        for position, (kind, i, j) in enumerate(program):
            a, b = found[i], found[j]
            part = lambda x: jax.lax.index_in_dim(x, position, keepdims=False)  # noqa: B023, E731
            kernel, bias = part(layer["w"]), part(layer["b"])
            results = {
                "dot": lambda: a @ kernel,  # noqa: B023
                "bias": lambda: a + bias,  # noqa: B023
                "add": lambda: a + b,  # noqa: B023
                "sub": lambda: a - b,  # noqa: B023
                "relu": lambda: relu(a),  # noqa: B023
                "scale": lambda: 0.5 * a,  # noqa: B023
                "neg": lambda: -a,  # noqa: B023
                "flip": lambda: a[:, ::-1],  # noqa: B023
            }
            found.append(results[kind]())
        carried = [found[i] for i in outs]
        return tuple(carried[:width]), carried[width]

    def network(params, x, loop, reverse):
        start = {
            "plain": lambda i: x,
            "constant": lambda i: x + params["c"][i],
            "layer": lambda i: x @ params["v"][i],
            "zero": lambda i: 0.0 * x,
        }
        carry = tuple(start[kind](i) for i, kind in enumerate(starts))
        carry, side = loop(step, carry, params["layers"], reverse=reverse)
        return carry, jnp.sum(side, 0) + x

    def params(length):
        layers = {"w": draw(length, 8, 2, 2), "b": draw(length, 8, 1, 2)}
        return {"layers": layers, "c": draw(width, 1, 2), "v": draw(width, 2, 2)}

    return network, params


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_scans(seed):
    network, params = random_network(seed)
    length, reverse = (2, 3, 5)[seed % 3], seed % 4 == 0
    assert_is_the_loop(
        functools.partial(network, reverse=reverse),
        params(length),
        X,
        (1.0, 2.0)[seed % 2],
    )


# The program does not grow with the number of steps.


def cosines(program):
    inner = (sum(map(cosines, called_programs(eqn))) for eqn in program.eqns)
    return sum(inner) + sum(eqn.primitive.name == "cos" for eqn in program.eqns)


def plain(h, w, b):
    return relu(h @ w)


def biased(h, w, b):
    return relu(h @ w) + b


def summed(h, w, b):
    return h + (h @ w + b)


@pytest.mark.parametrize("length", [10, 100])
@pytest.mark.parametrize(
    ("step", "start", "copies"),
    [
        (plain, 0.0, 1),
        (biased, 1.0, 1),  # there is a constant before and after every step
        (biased, 0.0, 2),  # the first step adds one
        (summed, 0.0, 2),  # every other step adds one
    ],
)
def test_bodies_are_copied_where_steps_differ(step, start, copies, length):
    def forward(params, x):
        body = lambda h, layer: (step(h, jnp.cos(layer[0]), layer[1]), None)  # noqa: E731
        return jax.lax.scan(body, x + start, params)[0]

    params = draw(length, 2, 2), draw(length, 1, 2)
    norm = lambda params: normax.path_norm(forward, params, X)  # noqa: E731
    assert cosines(jax.make_jaxpr(norm)(params).jaxpr) == copies
