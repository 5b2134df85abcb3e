"""Each fault that is planted in simulated weights is found, in its array alone."""

import ml_dtypes
import numpy as np
import pytest

from normax.inspection import findings, inspect_run

BF16 = ml_dtypes.bfloat16
STEPS = (0, 100, 200, 300)


def walk(shape, angle=0.3, scale=1.0):
    """Return weights that turn by about an angle between checkpoints."""
    rng = np.random.default_rng(0)
    w, all_of_them = rng.standard_normal(shape) * scale, []
    for _ in STEPS:
        all_of_them.append(w)
        w = (w + angle * scale * rng.standard_normal(shape)) / np.hypot(1, angle)
    return all_of_them


def healthy():
    """Return the arrays of a healthy run, a list over its steps for each."""
    arrays = {
        "layer/kernel": walk((32, 16)),
        "embed/embedding": walk((20, 16), 0.5, 0.02),
        "norm/scale": [1 + x for x in walk(16, scale=0.1)],
        "norm/bias": [x - walk(16)[0] for x in walk(16)],  # it starts at 0
        "head/kernel": walk((16, 8), 0.2),
    }
    return {name: [x.astype(np.float32) for x in xs] for name, xs in arrays.items()}


def write(folder, arrays):
    """Write a file for each step, without the arrays that are None there."""
    for i, step in enumerate(STEPS):
        present = {name: xs[i] for name, xs in arrays.items() if xs[i] is not None}
        np.savez(folder / f"{step}.npz", **present)
    return folder


def kinds(folder, **config):
    found = inspect_run(folder, **config).findings
    assert all(all(words) for words in found)
    return {(one.kind, one.array) for one in found}


def nan(arrays):
    arrays["layer/kernel"][2][0, 0] = np.nan
    return {("not_finite", "layer/kernel")}


def infinite_bias(arrays):
    arrays["norm/bias"][3][0] = np.inf
    return {("not_finite", "norm/bias")}


def zero_vector(arrays):
    arrays["layer/kernel"][3][:, 4] = 0
    return {("zero_vectors", "layer/kernel")}


def zero_row(arrays):
    for x in arrays["embed/embedding"]:
        x[0] = 0
    return {("zero_vectors", "embed/embedding")}


def all_zero(arrays):
    arrays["head/kernel"][3][:] = 0
    return {("zero_vectors", "head/kernel")}


def frozen(arrays):
    arrays["head/kernel"] = arrays["head/kernel"][:1] * 4
    return {("frozen", "head/kernel")}


def frozen_bias(arrays):
    arrays["norm/bias"] = arrays["norm/bias"][:1] * 4
    return {("frozen", "norm/bias")}


def frozen_gain(arrays):
    arrays["norm/scale"] = [np.ones(16, BF16)] * 4
    return {("frozen_gain", "norm/scale")}


def gain_that_comes_back(arrays):
    arrays["norm/scale"] = [np.full(16, x, np.float32) for x in (1, 2, 3, 1)]
    return {("frozen_gain", "norm/scale")}


def only_decay(arrays):
    start = arrays["layer/kernel"][0]
    shrunk = [start * np.float32(0.9**i) for i in range(4)]
    arrays["layer/kernel"] = shrunk
    return {("no_gradient", "layer/kernel")}


def dead_units(arrays):
    for i, x in enumerate(arrays["layer/kernel"][2:]):
        x[:, :3] = arrays["layer/kernel"][1][:, :3] * 0.9**i
    return {("quiet_vectors", "layer/kernel")}


def units_that_died_late(arrays):
    arrays["layer/kernel"][3][:, 7] = arrays["layer/kernel"][2][:, 7]
    return {("quiet_vectors", "layer/kernel")}


def lost_steps(arrays):
    first = arrays["layer/kernel"][0].astype(BF16)
    later = [first.copy() for _ in STEPS]
    for i, x in enumerate(later):
        x[i::8] *= 1.5
    arrays["layer/kernel"] = later
    return {("rounded_away", "layer/kernel")}


def growth(arrays):
    for x, factor in zip(arrays["layer/kernel"], (1, 1, 3, 9), strict=True):
        x *= factor
    return {("norm_drift", "layer/kernel")}


def collapse(arrays):
    for x, factor in zip(arrays["layer/kernel"], (1, 1, 0.3, 0.1), strict=True):
        x *= np.float32(factor)
    return {("norm_drift", "layer/kernel")}


def other_shape(arrays):
    grown = [x[:, :4] * 100 for x in arrays["head/kernel"][:2]]
    arrays["head/kernel"] = grown + arrays["head/kernel"][2:]
    return {("shape_changed", "head/kernel")}


PLANTED = [nan, infinite_bias, zero_vector, zero_row, all_zero, frozen, frozen_bias]
PLANTED += [frozen_gain, gain_that_comes_back, only_decay, dead_units, growth]
PLANTED += [units_that_died_late, lost_steps, collapse, other_shape]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(plant, tmp_path):
    arrays = healthy()
    planted = plant(arrays)
    assert kinds(write(tmp_path, arrays)) == planted


def test_every_check_has_its_fault():
    found = {plant(healthy()).pop()[0] for plant in PLANTED}
    assert found == set(findings._CHECKS)


def evidence(folder, kind):
    """Return what the one finding of a kind says."""
    (one,) = [one for one in inspect_run(folder).findings if one.kind == kind]
    return one.evidence


def test_entries_that_are_not_finite_are_counted_in_their_own_shape(tmp_path):
    arrays = healthy()
    arrays["head/kernel"][1][:] = np.nan
    arrays["head/kernel"][3] = np.ones((2, 2))
    text = evidence(write(tmp_path, arrays), "not_finite")
    assert text.startswith("all 128 entries are NaN or infinite at step 100,")


def test_a_change_of_shape_is_said_and_nothing_is_compared_across_it(tmp_path):
    arrays = healthy()
    other_shape(arrays)
    assert evidence(write(tmp_path, arrays), "shape_changed") == (
        "its shape was (16, 4) at step 100 and is (16, 8) from step 200 on"
    )


@pytest.mark.parametrize("lost", range(4))
def test_findings_name_only_steps_that_hold_the_array(lost, tmp_path):
    held = [step for i, step in enumerate(STEPS) if i != lost]
    last, texts = held[-1], {}
    for plant, name in (
        (zero_vector, "layer/kernel"),
        (frozen_gain, "norm/scale"),
        (frozen, "head/kernel"),
        (dead_units, "layer/kernel"),
        (lost_steps, "layer/kernel"),
        (growth, "layer/kernel"),
    ):
        arrays = healthy()
        plant(arrays)
        if plant is zero_vector:
            arrays[name][2][:, 4] = 0
        if plant is growth:  # 1, 6 and 36, whichever three are left
            for x, factor in zip(arrays[name], (1, 1, 2, 4), strict=True):
                x *= factor
        arrays[name][lost] = None
        folder = tmp_path / plant.__name__
        folder.mkdir()
        ((kind, _),) = kinds(write(folder, arrays))
        texts[kind] = evidence(folder, kind)
    assert texts["zero_vectors"].endswith(f"at step {last}")
    assert f"at step {last};" in texts["frozen_gain"]
    assert texts["frozen"].endswith(
        f"in all 3 checkpoints that hold it so, steps {held[0]} to {last}"
    )
    at_end = f"between steps {held[-2]} and {last}"
    at_end = "between the last checkpoints" if lost < 2 else at_end
    assert texts["quiet_vectors"].endswith(at_end)
    assert at_end in texts["rounded_away"]
    assert texts["norm_drift"].endswith(f"after step {held[1]}")


def grow_from_zero(arrays):
    arrays["head/kernel"][0] *= 0  # its first step is not at 0 any more
    return arrays


def stop_at_the_end(arrays):
    """A learning rate of 0 stops all vectors, and the last step is saved twice."""
    return {name: [*xs[:3], xs[2]] for name, xs in arrays.items()}


def masters(arrays):
    copies = {f"params/{n}": [x.astype(BF16) for x in xs] for n, xs in arrays.items()}
    copies["params/norm/scale"] = [np.ones(16, BF16)] * 4
    arrays["norm/scale"] = [
        np.float32(1 + i * 1e-4 * x) for i, x in enumerate(walk(16))
    ]
    return copies | {f"master/{name}": xs for name, xs in arrays.items()}


@pytest.mark.parametrize("change", [dict, grow_from_zero, stop_at_the_end, masters])
def test_a_healthy_run_gives_no_alarm(change, tmp_path):
    folder = write(tmp_path, change(healthy()))
    assert kinds(folder) == set()
    config = {"rule": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}
    assert kinds(folder, **config) == set()


def test_rates_say_what_bfloat16_rounds_away(tmp_path):
    arrays = healthy()
    arrays["layer/kernel"] = [x.astype(BF16) for x in walk((32, 16), 0.01)]
    arrays["head/kernel"] = [x.astype(BF16) for x in arrays["head/kernel"]]
    folder = write(tmp_path, arrays)
    before = kinds(folder)
    config = {"rule": "momentum", "learning_rate": 0.1, "weight_decay": 1e-4}
    more = kinds(folder, **config) - before
    # Decay takes 1e-4 per step, and a step of the layer 0.01 / 44: below 2^-9 both.
    lost = {("decay_rounded_away", f"{name}/kernel") for name in ("layer", "head")}
    assert more == lost | {("step_rounded_away", "layer/kernel")}
    config["weight_decay"] = 0.01  # times 0.1 / (1 - 0.9): above 2^-9
    assert not kinds(folder, **config) & lost


def test_one_checkpoint_is_judged_by_itself(tmp_path):
    arrays = {"norm/scale": np.ones(4, BF16), "a/kernel": np.zeros((4, 2))}
    np.savez(tmp_path / "model.npz", **arrays)
    expected = {("frozen_gain", "norm/scale"), ("zero_vectors", "a/kernel")}
    assert kinds(tmp_path) == expected
    run = tmp_path / "run"
    run.mkdir()
    np.savez(run / "0.npz", **arrays)
    assert kinds(run) == set()  # before the first step this is as it should be


def test_the_worst_comes_first(tmp_path):
    arrays = healthy()
    for plant in (frozen_gain, dead_units):
        plant(arrays)
    arrays["norm/bias"][3][0] = np.nan
    report = inspect_run(write(tmp_path, arrays))
    order = [findings.SEVERITIES.index(one.severity) for one in report.findings]
    assert order == sorted(order) and order[0] == 0
    assert report.worst_first[0].name == "norm/bias"
    assert [array.name for array in report.arrays] == sorted(arrays)
