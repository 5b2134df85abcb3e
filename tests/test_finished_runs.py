"""Sweeps that were interrupted, against sweeps that were not."""

import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax._finished_runs import FinishedRuns

GRID = {"rate": np.geomspace(0.01, 1, 3), "decay": np.array([0.0, 0.1])}


def make_train(target=(1.0, 2.0, 3.0), delay=0.0):
    """Return gradient descent on a quadratic, and the list of the runs that it did."""
    done = []
    target = jnp.array(target)

    def note(rate):
        time.sleep(delay)
        done.append(float(rate))
        return np.float32(0)

    @jax.jit
    def difference(w):
        return w - target

    def train(rate, decay):
        def step(w, _):
            gradient = difference(w) + decay * w
            return w - rate * gradient, jnp.sum(gradient**2)

        start = jax.pure_callback(note, jax.ShapeDtypeStruct((), jnp.float32), rate)
        w, losses = jax.lax.scan(step, jnp.zeros(3) + start, None, length=5)
        other = jnp.zeros((0, 2)), w.astype(jnp.bfloat16), jnp.int32(5)
        return {"w": w, "losses": losses, "other": other}

    return train, done


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_killed_sweep_continues_and_gives_the_same(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import normax, test_finished_runs
train, _ = test_finished_runs.make_train(delay=0.3)
normax.grid_sweep(
    train, test_finished_runs.GRID, batch_size=1, checkpoint_dir={str(tmp_path)!r}
)
"""
    process = subprocess.Popen([sys.executable, "-c", program])

    def finished():
        return [path for path in tmp_path.iterdir() if "." not in path.name]

    deadline = time.monotonic() + 120
    while len(finished()) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(finished())
    assert 2 <= before < 6
    train, done = make_train()
    results = normax.grid_sweep(train, GRID, checkpoint_dir=tmp_path)
    assert len(done) == 6 - before
    assert_same(results, normax.grid_sweep(make_train()[0], GRID))


def test_a_finer_grid_takes_over_the_runs_of_a_coarser_one(tmp_path):
    train, done = make_train()
    normax.grid_sweep(train, GRID, batch_size=1, checkpoint_dir=tmp_path)
    done.clear()
    finer = GRID | {"decay": np.array([0.0, 0.05, 0.1])}
    results = normax.grid_sweep(train, finer, checkpoint_dir=tmp_path)
    assert sorted(done) == pytest.approx(GRID["rate"])
    assert_same(results, normax.grid_sweep(train, finer))
    done.clear()
    points = {"rate": [0.01, 0.5], "decay": [0.1, 0.0]}
    normax.sweep(train, points, checkpoint_dir=tmp_path)
    assert done == [0.5]


def test_what_has_changed_runs_anew(tmp_path):
    first = normax.grid_sweep(make_train()[0], GRID, checkpoint_dir=tmp_path)
    train, done = make_train(target=(1.0, 2.0, 4.0))
    results = normax.grid_sweep(train, GRID, checkpoint_dir=tmp_path)
    assert len(done) == 6
    assert not np.array_equal(results["w"], first["w"])
    longer = GRID | {"decay": np.array([0.0, 0.1], np.float16)}
    normax.grid_sweep(train, longer, checkpoint_dir=tmp_path)
    assert len(done) == 12


def test_what_is_stored_is_what_ran(tmp_path):
    # As with `jax.jit`, what is closed over is read once.
    factor = 1.0

    def scale(x):
        return factor * x

    points = {"x": [1.0, 2.0]}
    normax.sweep(scale, points)
    factor = 10.0
    assert normax.sweep(scale, points, checkpoint_dir=tmp_path).tolist() == [1, 2]
    anew = normax.sweep(lambda x: factor * x, points, checkpoint_dir=tmp_path)
    assert anew.tolist() == [10, 20]


def test_two_processes_may_finish_the_same_run(tmp_path):
    points = {"x": jnp.arange(2.0)}
    run = jax.jit(lambda point: (point["x"], jnp.zeros((0, 3))))
    one, other = (FinishedRuns(tmp_path, run, points, 2) for _ in range(2))
    assert one.load(1) is None and other.load(1) is None
    for saving in (one, other):
        saving.save(1, run({"x": points["x"][1]}))
    assert len(list(tmp_path.iterdir())) == 1
    x, empty = one.load(1)
    assert x == 1 and empty.shape == (0, 3) and one.load(0) is None
    assert normax.sweep(lambda x: {}, points, checkpoint_dir=tmp_path) == {}


def test_an_error_while_storing_ends_the_sweep(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(FinishedRuns, "save", refuse)
    train, done = make_train(delay=0.1)
    points = {"rate": np.linspace(0.1, 1, 20), "decay": np.zeros(20)}
    with pytest.raises(OSError, match="the disk is full"):
        normax.sweep(train, points, batch_size=1, checkpoint_dir=tmp_path)
    assert len(done) < 10


def test_keys_are_hyperparameters_too(tmp_path):
    def draw(key):
        return jax.random.normal(key, (2,))

    one, other = (jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))
    first = normax.sweep(draw, {"key": one}, checkpoint_dir=tmp_path)
    assert_same(first, normax.sweep(draw, {"key": one}, checkpoint_dir=tmp_path))
    second = normax.sweep(draw, {"key": other}, checkpoint_dir=tmp_path)
    np.testing.assert_allclose(second, jax.vmap(draw)(other), rtol=1e-6)


def test_keys_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match=r"returns random keys.*key_data"):
        normax.sweep(jax.random.key, {"seed": [1, 2]}, checkpoint_dir=tmp_path)
