"""Norms and angles of checkpoints, against float64 sums and simulated walks."""

import ml_dtypes
import numpy as np
import pytest

from normax.inspection import measure
from normax.inspection.measure import measure_array
from normax.inspection.per_step import angle_per_step
from normax.inspection.vectors import AxesByPath
from normax.theory.rotation_theory import RotationTheory, rule_of

RNG = np.random.default_rng(0)


def run_of(*arrays, steps=None):
    steps = range(len(arrays)) if steps is None else steps
    return [
        (step, {} if array is None else {"w": lambda array=array: array})
        for step, array in zip(steps, arrays, strict=True)
    ]


def measured(*arrays, axes="unit"):
    return measure_array("w", run_of(*arrays), AxesByPath(axes, ["w"]))


def brute_force(array, axes):
    """Return the vectors of an array, a row for each."""
    array = np.asarray(array, np.float64)
    kept = [i for i in range(array.ndim) if i not in axes]
    size = int(np.prod([array.shape[i] for i in axes]))
    return array.transpose(*kept, *axes).reshape(-1, size)


def angles(p, w):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (p, w)]
    away, along = unit[0] - unit[1], unit[0] + unit[1]
    return 2 * np.arctan2(np.linalg.norm(away, axis=1), np.linalg.norm(along, axis=1))


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("block", [1, 10, 2**20])
def test_norms_and_angles_are_those_of_the_vectors(axes, block, monkeypatch):
    monkeypatch.setattr(measure, "_BLOCK", block)
    p = RNG.standard_normal((5, 4, 3)).astype(np.float32)
    w = p + 0.1 * RNG.standard_normal((5, 4, 3)).astype(np.float32)
    found = measured(p, w, axes=axes)
    rows = [brute_force(x, axes) for x in (p, w)]
    norms = np.linalg.norm(rows[1], axis=1)
    turned = angles(*rows)
    assert found.axes == axes and found.vectors == len(norms)
    np.testing.assert_allclose(found.norm[1], np.sqrt(np.mean(norms**2)))
    np.testing.assert_allclose(
        [found.least[1], found.most[1]], [min(norms), max(norms)]
    )
    np.testing.assert_allclose(found.angle, np.sqrt(np.mean(turned**2)))
    np.testing.assert_allclose(found.versine, np.mean(1 - np.cos(turned)))
    np.testing.assert_allclose(found.largest_angle, turned.max())


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_small_angles_keep_their_digits(size, scale):
    p = RNG.standard_normal((50, 1)).astype(np.float32) * np.float32(scale)
    away = RNG.standard_normal((50, 1)) * scale * size
    w = (0.9 * p + away).astype(np.float64)
    found = measured(p.astype(np.float64), w)
    exact = angles(brute_force(p, (0,)), brute_force(w, (0,)))
    np.testing.assert_allclose(found.angle, exact, rtol=1e-4)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-540, 2.0**600, 2.0**1000])
def test_squares_beyond_float64_neither_overflow_nor_vanish(scale, axes):
    p = RNG.standard_normal((5, 4))
    w = p + 0.1 * RNG.standard_normal((5, 4))
    plain = measured(p, w, axes=axes)
    if len(axes) == 1:  # one vector alone is out of range
        place = (slice(None), 1) if axes == (0,) else (1,)
        row = brute_force(w.copy(), axes)
        p[place], w[place] = p[place] * scale, w[place] * scale
        kept = np.arange(len(row)) != 1
        norms = np.linalg.norm(row, axis=1) * np.where(kept, 1, scale)
    else:
        norms = np.linalg.norm(w) * scale * np.ones(1)
        p, w = p * scale, w * scale
    found = measured(p, w, axes=axes)
    np.testing.assert_allclose(found.angle, plain.angle, rtol=1e-14)
    np.testing.assert_allclose(
        [found.least[1], found.most[1]], [norms.min(), norms.max()], rtol=1e-14
    )
    expected = norms.max() * np.sqrt(np.mean((norms / norms.max()) ** 2))
    np.testing.assert_allclose(found.norm[1], expected, rtol=1e-14)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, np.float64]
)
def test_every_precision_is_measured_in_float64(dtype):
    p, w = (RNG.standard_normal((6, 4)).astype(dtype) for _ in range(2))
    found = measured(p, w)
    exact = angles(*(brute_force(x, (0,)) for x in (p, w)))
    np.testing.assert_allclose(found.angle, np.sqrt(np.mean(exact**2)))
    assert found.dtype == dtype


def test_what_is_missing_is_not_measured():
    w = RNG.standard_normal((3, 2))
    found = measured(w, None, w[:2], w[:2])
    assert np.isnan(found.norm[1]) and found.shape == (2, 2)
    assert found.present == [0, 2, 3] and found.comparable == [2, 3]
    assert found.changed == 0 and np.isnan(found.largest_angle[:2]).all()
    assert np.isnan(found.angle[:2]).all() and found.angle[2] < 1e-7
    assert measured(np.arange(3)) == measured(np.zeros((0, 3))) == "other kinds"
    scalar = measured(np.array(2.0), np.array(-2.0))
    assert scalar.shape == () and scalar.axes == () and scalar.norm[1] == 2


def test_a_step_that_lacks_the_array_is_no_interval():
    w = RNG.standard_normal((3, 2))
    found = measured(w, None, -w, -w)
    assert np.isnan(found.angle[:2]).all() and np.isnan(found.versine[:2]).all()
    # But what happened meanwhile is known.
    np.testing.assert_allclose(found.largest_angle[1:], [np.pi, 0], atol=1e-7)
    np.testing.assert_array_equal(found.unchanged, [np.nan, 0, 1])


def test_not_finite_and_zero_vectors_are_counted():
    p, w = RNG.standard_normal((2, 4, 3))
    w[1, 0], w[2, 0], w[:, 2] = np.nan, np.inf, 0
    found = measured(p, w)
    assert found.not_finite.tolist() == [0, 2] and found.zero_vectors == 1
    assert np.isnan(found.norm[1])


def turned(*angles_of_steps):
    """Return eight vectors at all steps, which turn by given angles a step."""
    sums = np.cumsum([np.zeros(8), *angles_of_steps], 0)
    return [np.stack([np.cos(x), np.sin(x), np.zeros(8)]) for x in sums]


@pytest.mark.parametrize(("share", "quiet"), [(0.9e-3, 1), (1.1e-3, 0)])
def test_a_vector_is_quiet_below_a_thousandth_of_the_median(share, quiet):
    angle = np.full(8, 0.1)
    slow = np.array([share, *np.ones(7)]) * angle
    assert measured(*turned(angle, angle, slow)).quiet_vectors == quiet
    assert measured(*turned(slow, slow, angle)).quiet_vectors == 0
    # All of a longer run's second half counts, and a median of 0 has no thousandth.
    assert measured(*turned(*[angle] * 4, slow)).quiet_vectors == 0
    assert measured(*turned(*[angle] * 3, slow, slow)).quiet_vectors == quiet
    assert measured(*turned(angle * 0, angle * 0)).quiet_vectors == 0


@pytest.mark.parametrize(("rho", "every"), [(0.0, 1), (0.0, 50), (0.9, 1), (0.9, 40)])
def test_the_angle_per_step_is_that_of_a_walk_with_momentum(rho, every):
    # Unit vectors of 150 entries, which a moving average of noise pushes.
    rng = np.random.default_rng(0)
    w = rng.standard_normal((150, 150))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    velocity, steps, kept = np.zeros_like(w), [], []
    for count in range(100 + 3 * every):
        velocity = rho * velocity + (1 - rho) * rng.standard_normal(w.shape)
        moved = w + 0.003 * velocity
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        if count >= 100:
            steps.append(angles(w, moved))
            if (count - 100) % every == 0:
                kept.append(w)
        w = moved
    found = measured(*(x.T for x in kept))
    share = (1 - rho) / (1 + rho)
    estimate = [angle_per_step(versine, every, share) for versine in found.versine]
    exact = np.sqrt(np.mean(np.square(steps)))
    np.testing.assert_allclose(np.mean(estimate), exact, rtol=0.03)


def test_a_forgotten_checkpoint_says_nothing_of_steps():
    assert np.isnan(angle_per_step(1.0, 10)) and np.isnan(angle_per_step(np.nan, 10))
    np.testing.assert_allclose(angle_per_step(1 - np.cos(0.1), 1, 0.05), 0.1)


def test_momentum_of_rules():
    for rule, expected in {
        "sgd": 1.0,
        "momentum": 0.1 / 1.9,
        "adamw": 0.1 / 1.9,
        "adam": 0.1 / 1.9,
    }.items():
        rates = 1e-3, 1e-2
        theory = RotationTheory(rule_of(rule, rates, {}), rates, {}, 0)
        np.testing.assert_allclose(theory.correlation, expected, rtol=0.01)
