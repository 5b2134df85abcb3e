"""Sweeps that were interrupted, against sweeps that were not."""

import gc
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import normax
from normax.sweeps import finished_runs
from normax.sweeps.finished_runs import FinishedRuns

pytestmark = pytest.mark.few_rows(2)

GRID = {"rate": np.geomspace(0.01, 1, 3), "decay": np.array([0.0, 0.1])}


def make_train(target=(1.0, 2.0, 3.0), rounds=0):
    """Return gradient descent on a quadratic, some seconds long for many rounds."""
    target = jnp.array(target)

    @jax.jit
    def difference(w):
        return w - target

    def train(rate, decay):
        def step(w, _):
            gradient = difference(w) + decay * w
            return w - rate * gradient, jnp.sum(gradient**2)

        idle = jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), jnp.eye(200))
        start = jnp.zeros(3) + 0 * idle[0, 1]
        w, losses = jax.lax.scan(step, start, None, length=5)
        other = jnp.zeros((0, 2)), w.astype(jnp.bfloat16), jnp.int32(5)
        return {"w": w, "losses": losses, "other": other}

    return train


@pytest.fixture
def done(monkeypatch):
    """List the runs that are done, and not found on disk."""
    save, found = FinishedRuns.save, []

    def save_and_note(self, index, result):
        found.append(index)
        save(self, index, result)

    monkeypatch.setattr(FinishedRuns, "save", save_and_note)
    return found


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_killed_sweep_continues_and_gives_the_same(tmp_path, done):
    program = f"""
import sys
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import normax, test_finished_runs
train = test_finished_runs.make_train(rounds=1000)
normax.sweeps.grid_sweep(
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
    train = make_train(rounds=1000)
    results = normax.sweeps.grid_sweep(train, GRID, checkpoint_dir=tmp_path)
    assert len(done) == 6 - before
    assert_same(results, normax.sweeps.grid_sweep(make_train(), GRID))
    # What the killed process had begun to write is gone.
    assert sorted(tmp_path.iterdir()) == sorted(finished())


@pytest.mark.slow
def test_a_finer_grid_takes_over_the_runs_of_a_coarser_one(tmp_path, done):
    train = make_train()
    normax.sweeps.grid_sweep(train, GRID, batch_size=1, checkpoint_dir=tmp_path)
    done.clear()
    finer = GRID | {"decay": np.array([0.0, 0.05, 0.1])}
    results = normax.sweeps.grid_sweep(train, finer, checkpoint_dir=tmp_path)
    assert sorted(done) == [1, 4, 7]
    assert_same(results, normax.sweeps.grid_sweep(train, finer))
    done.clear()
    points = {"rate": [0.01, 0.5], "decay": [0.1, 0.0]}
    normax.sweeps.sweep(train, points, checkpoint_dir=tmp_path)
    assert done == [1]


@pytest.mark.slow
def test_what_has_changed_runs_anew(tmp_path, done):
    first = normax.sweeps.grid_sweep(make_train(), GRID, checkpoint_dir=tmp_path)
    done.clear()
    train = make_train(target=(1.0, 2.0, 4.0))
    results = normax.sweeps.grid_sweep(train, GRID, checkpoint_dir=tmp_path)
    assert len(done) == 6
    assert not np.array_equal(results["w"], first["w"])
    longer = GRID | {"decay": np.array([0.0, 0.1], np.float16)}
    normax.sweeps.grid_sweep(train, longer, checkpoint_dir=tmp_path)
    assert len(done) == 12


def test_what_is_stored_is_what_ran(tmp_path):
    # As with `jax.jit`, what is closed over is read once.
    factor = 1.0

    def scale(x):
        return factor * x

    points = {"x": [1.0, 2.0]}
    normax.sweeps.sweep(scale, points)
    factor = 10.0
    assert normax.sweeps.sweep(scale, points, checkpoint_dir=tmp_path).tolist() == [
        1,
        2,
    ]
    anew = normax.sweeps.sweep(lambda x: factor * x, points, checkpoint_dir=tmp_path)
    assert anew.tolist() == [10, 20]


@pytest.mark.parametrize("stored_first", [True, False])
@pytest.mark.parametrize("inside", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_arrays_that_change_in_place(inside, stored_first, tmp_path):
    data, points = np.ones(3, np.float32), {"x": [1.0, 2.0]}
    run = lambda x: x * inside(lambda: jnp.sum(data))()  # noqa: E731
    first = normax.sweeps.sweep(
        run, points, checkpoint_dir=tmp_path if stored_first else None
    )
    assert first.tolist() == [3, 6]
    data += 1
    for again in (run, lambda x: run(x)):
        found = normax.sweeps.sweep(again, points, checkpoint_dir=tmp_path)
        assert found.tolist() == [6, 12]


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
    assert normax.sweeps.sweep(lambda x: {}, points, checkpoint_dir=tmp_path) == {}


def test_an_error_while_storing_ends_the_sweep(tmp_path, monkeypatch):
    begun = []

    def note(x):
        time.sleep(0.1)
        begun.append(float(x))
        return x

    def refuse(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(FinishedRuns, "save", refuse)
    # A callback counts the runs that begin, which has no digest.
    monkeypatch.setattr(finished_runs, "fingerprint", lambda _: hashlib.sha256())
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    points = {"x": jnp.arange(20.0)}
    with pytest.raises(OSError, match="the disk is full"):
        normax.sweeps.sweep(
            lambda x: jax.pure_callback(note, shape, x),
            points,
            batch_size=1,
            checkpoint_dir=tmp_path,
        )
    assert 1 <= len(begun) < 10


def damage(run, how):
    files = [path for path in run.rglob("*") if path.is_file()]
    if how == "emptied":
        shutil.rmtree(run)
        run.mkdir()
    elif how == "cut":
        for path in files:
            path.write_bytes(path.read_bytes()[:-20])
    elif how == "overwritten":
        for path in files:
            path.write_text("[]")
    elif how == "without its data":
        shutil.rmtree(run / "d")
        shutil.rmtree(run / "ocdbt.process_0")
    else:
        shutil.rmtree(run)
        found = {how: np.ones(3 if how == "0" else 1)}
        ocp.PyTreeCheckpointer().save(run, found | {"finished": np.ones(1)})


# Orbax leaves an event loop open where a file is damaged, which the collector finds.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# Leaf "0" of another shape, and no leaf "0" at all.
@pytest.mark.parametrize(
    "how", ["emptied", "cut", "overwritten", "without its data", "0", "other"]
)
def test_a_damaged_run_is_named(how, tmp_path):
    run = lambda x: x + 1  # noqa: E731
    normax.sweeps.sweep(run, {"x": [1.0]}, checkpoint_dir=tmp_path)
    (stored,) = tmp_path.iterdir()
    damage(stored, how)
    message = rf"stored in {re.escape(str(stored))}, but it cannot be read .*; delete"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        normax.sweeps.sweep(run, {"x": [1.0]}, checkpoint_dir=tmp_path)
    gc.collect()
    shutil.rmtree(stored)
    assert normax.sweeps.sweep(run, {"x": [1.0]}, checkpoint_dir=tmp_path) == 2


def test_only_what_dead_processes_left_is_deleted(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, day = finished_runs._HOST, 24 * 60 * 60
    run, now = "0123456789abcdef" * 2, time.time()
    names = {
        f"{run}.{dead.pid}.{host}.a": (now, False),
        f"{run}.{dead.pid}.{host}.a.orbax-checkpoint-tmp-0": (now, False),
        f"{run}.{os.getpid()}.{host}.a": (now, True),
        f"{run}.1.{host}.a": (now, True),
        f"{run}.{dead.pid}.of-another-machine.a": (now, True),
        f"{run}.{dead.pid}.long-ago.a": (now - 1.1 * day, False),
        f"{run}": (now - 9 * day, True),
        "notes.of.mine": (now - 9 * day, True),
    }
    for name, (written, _) in names.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (written, written))
    normax.sweeps.sweep(lambda x: {}, {"x": [1.0]}, checkpoint_dir=tmp_path)
    for name, (_, kept) in names.items():
        assert (tmp_path / name).exists() == kept, name


def test_keys_are_hyperparameters_too(tmp_path):
    def draw(key):
        return jax.random.normal(key, (2,))

    one, other = (jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))
    first = normax.sweeps.sweep(draw, {"key": one}, checkpoint_dir=tmp_path)
    assert_same(first, normax.sweeps.sweep(draw, {"key": one}, checkpoint_dir=tmp_path))
    second = normax.sweeps.sweep(draw, {"key": other}, checkpoint_dir=tmp_path)
    np.testing.assert_allclose(second, jax.vmap(draw)(other), rtol=1e-6)


def test_keys_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match=r"returns random keys.*key_data"):
        normax.sweeps.sweep(jax.random.key, {"seed": [1, 2]}, checkpoint_dir=tmp_path)
