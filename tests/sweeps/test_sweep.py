"""Sweeps against loops of single runs."""

import collections
import dataclasses
import functools
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import normax

GRID = {"rate": np.geomspace(0.01, 100, 3), "decay": np.array([0.0, 0.1, 0.2, 0.3])}
TARGET = np.random.default_rng(0).normal(size=7).astype(np.float32)


def train(rate, decay):
    """Gradient descent on a quadratic, which diverges at the largest rate."""

    def step(w, _):
        gradient = (w - TARGET) + decay * w
        return w - rate * gradient, jnp.sum(gradient**2)

    w, losses = jax.lax.scan(step, jnp.zeros(7), None, length=40)
    return {"w": w, "losses": losses, "steps": 40}


def one_by_one(fn=train, grid=GRID):
    single = jax.jit(fn)
    names = list(grid)
    rows = [
        [
            single(**{names[0]: jnp.asarray(a), names[1]: jnp.asarray(b)})
            for b in grid[names[1]]
        ]
        for a in grid[names[0]]
    ]
    return jax.tree.map(
        lambda *leaves: np.reshape(leaves, (3, 4, *np.shape(leaves[0]))),
        *[result for row in rows for result in row],
    )


@pytest.fixture(scope="module")
def expected():
    return one_by_one()


def assert_equal(results, expected):
    for name in expected:
        assert results[name].dtype == expected[name].dtype
        np.testing.assert_allclose(results[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 5, 100])
def test_the_grid_is_in_front(batch_size, expected):
    results = normax.sweeps.grid_sweep(train, GRID, batch_size=batch_size)
    assert results["losses"].shape == (3, 4, 40) and results["steps"].shape == (3, 4)
    assert_equal(results, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((8,), marks=pytest.mark.devices(8)),
        pytest.param((2, 2), marks=pytest.mark.devices(4)),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_meshes(kind, shape, batch_size, expected):
    names = ("a", "b")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    results = normax.sweeps.grid_sweep(train, GRID, mesh=mesh, batch_size=batch_size)
    assert_equal(results, expected)


def test_a_run_that_diverges_does_not_touch_the_others(expected):
    results = normax.sweeps.grid_sweep(train, GRID | {"rate": [0.01, 1.0, np.nan]})
    assert np.all(np.isnan(results["w"][2]))
    np.testing.assert_allclose(results["w"][:2], expected["w"][:2], rtol=1e-5)


def test_it_is_traced_once_and_batched_as_far_as_allowed():
    traces, running, most = [], collections.Counter(), []
    lock = threading.Lock()

    def note(change):
        with lock:
            running["now"] += change
            most.append(running["now"])
        return np.float32(0)

    def run(x):
        traces.append(x)
        start = jax.pure_callback(
            lambda _: note(1), jax.ShapeDtypeStruct((), jnp.float32), x
        )
        end = jax.lax.fori_loop(0, 1000, lambda _, y: jnp.sin(y), x + start)
        return jax.pure_callback(
            lambda _: note(-1), jax.ShapeDtypeStruct((), jnp.float32), end
        )

    normax.sweeps.grid_sweep(run, {"x": jnp.arange(20.0)}, batch_size=2)
    assert len(traces) == 1 and len(most) == 40 and max(most) <= 2


def test_keys_integers_and_no_axis_at_all():
    def draw(key, count):
        return jax.random.normal(key, (2,)) * count, count

    keys = jax.random.split(jax.random.key(0), 3)
    drawn, counts = normax.sweeps.grid_sweep(draw, {"key": keys, "count": [1, 2]})
    expected = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    np.testing.assert_allclose(drawn, expected[:, None] * counts[..., None], rtol=1e-6)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(normax.sweeps.grid_sweep(lambda: TARGET, {}), TARGET)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_keys_are_results_too(batch_size):
    def draw(seed):
        return {"key": jax.random.key(seed), "seed": seed}

    seeds = jnp.arange(3)
    found = normax.sweeps.grid_sweep(draw, {"seed": seeds}, batch_size=batch_size)
    assert jnp.all(found["key"] == jax.vmap(jax.random.key)(seeds))


def test_progress_is_shown(capsys):
    normax.sweeps.grid_sweep(lambda x: x, {"x": [1.0, 2.0, 3.0]}, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_points_need_not_form_a_grid(expected):
    points = {"rate": GRID["rate"][[2, 0, 1]], "decay": GRID["decay"][[3, 0, 2]]}
    results = normax.sweeps.sweep(train, points)
    assert_equal(results, {k: v[[2, 0, 1], [3, 0, 2]] for k, v in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_program_is_kept_as_long_as_the_function(batch_size):
    traces = []

    def run(x):
        traces.append(x)
        return 2 * x

    for count in (3, 1, 4, 3):
        results = normax.sweeps.sweep(
            run, {"x": np.arange(count)}, batch_size=batch_size
        )
        np.testing.assert_array_equal(results, 2 * np.arange(count))
    assert len(traces) == 1
    function = weakref.ref(run)
    del run
    gc.collect()
    assert function() is None


def test_contexts_reach_the_runs():
    seen = []

    def run(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x - 1

    with jax.enable_x64(True), jax.default_matmul_precision("high"):
        results = normax.sweeps.sweep(run, {"x": np.array([1 + 1e-12, 1.0])})
        assert results.dtype == jnp.float64
    np.testing.assert_allclose(results, [1e-12, 0.0], rtol=1e-3)
    assert seen == ["high"]
    assert normax.sweeps.sweep(run, {"x": np.ones(2)}).dtype == jnp.float32


@dataclasses.dataclass
class Unhashable:
    factor: float

    def __call__(self, x):
        return self.factor * x


class Fixed:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    "train_fn",
    [
        Unhashable(2.0),
        Fixed(2.0),
        Unhashable(2.0).__call__,
        functools.partial(lambda factor, x: factor * x, 2.0),
        jax.jit(Unhashable(2.0).__call__),
    ],
    ids=["unhashable", "slots", "method", "partial", "jitted"],
)
def test_every_callable_is_a_run(train_fn):
    for _ in range(2):
        assert normax.sweeps.sweep(train_fn, {"x": [1.0, 2.0]}).tolist() == [2, 4]


def test_points_have_one_length():
    with pytest.raises(ValueError, match=r"one value.*\{'x': 2, 'y': 1\}.*grid_sweep"):
        normax.sweeps.sweep(train, {"x": [1.0, 2.0], "y": [1.0]})
    with pytest.raises(ValueError, match=r"one value of every.*\{\}"):
        normax.sweeps.sweep(train, {})


def test_errors_are_those_of_the_run():
    def bad(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        normax.sweeps.grid_sweep(bad, {"x": [1.0]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        normax.sweeps.grid_sweep(lambda x: x, {"x": [1.0], "y": [1.0]})
    for axis in (1.0, [[1.0]], []):
        with pytest.raises(ValueError, match=r"1-D array.*'x'.*shape"):
            normax.sweeps.grid_sweep(lambda x: x, {"x": axis})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        normax.sweeps.grid_sweep(lambda x: x, {"x": [1.0]}, batch_size=0)
