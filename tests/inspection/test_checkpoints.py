"""Every kind of checkpoint is read as it was written, and nothing else is opened."""

import json
import pickle
import struct
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from normax.inspection import UnreadableError, inspect_run
from normax.inspection.checkpoints import open_run
from normax.inspection.vectors import AxesByPath, guess_axes, role

RNG = np.random.default_rng(0)
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
TREE: dict[str, Any] = {
    "embed": {"embedding": RNG.standard_normal((5, 4)).astype(np.float32)},
    "layers": [RNG.standard_normal((4, 3)).astype(np.float16), RNG.standard_normal(3)],
    "half": RNG.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
    "eight": RNG.standard_normal((2, 3)).astype(ml_dtypes.float8_e5m2),
    "none": None,
    "count": 3,
    "word": "sgd",
    "nothing": {},
    "a.b": RNG.standard_normal(2),
}
FLAT = {
    "embed/embedding": TREE["embed"]["embedding"],
    "layers/0": TREE["layers"][0],
    "layers/1": TREE["layers"][1],
    "half": TREE["half"],
    "eight": TREE["eight"],
    "a.b": TREE["a.b"],
}


def write_safetensors(file, arrays):
    """Write the format from its specification."""
    header, data = {"__metadata__": {"format": "np"}}, b""
    for name, array in arrays.items():
        (kind,) = (k for k, dtype in NAMES.items() if dtype == str(array.dtype))
        start, data = len(data), data + array.tobytes()
        offsets = [start, len(data)]
        header[name] = dict(dtype=kind, shape=array.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_npz(file, arrays):
    np.savez(file, **arrays)


def save_orbax(path, tree, **options):
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), tree)


def assert_read(checkpoint, expected):
    assert checkpoint.keys() == expected.keys()
    for name, array in expected.items():
        found = checkpoint[name]()
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("zarr3", [False, True])
def test_a_checkpoint_of_orbax(ocdbt, zarr3, tmp_path):
    save_orbax(tmp_path / "one", TREE, use_ocdbt=ocdbt, use_zarr3=zarr3)
    ((step, checkpoint),) = open_run(tmp_path / "one")
    assert step is None
    assert_read(checkpoint, FLAT)


@pytest.mark.parametrize("prefix", [None, "step"])
def test_the_steps_of_a_checkpoint_manager(prefix, tmp_path):
    options = ocp.CheckpointManagerOptions(step_prefix=prefix)
    with ocp.CheckpointManager(tmp_path.absolute(), options=options) as manager:
        for step in (0, 5, 100):
            tree = {"w": np.full((2, 2), step, np.float32)}
            manager.save(step, args=ocp.args.StandardSave(tree))
    (tmp_path / "7.orbax-checkpoint-tmp-1").mkdir()
    run = open_run(tmp_path)
    assert [step for step, _ in run] == [0, 5, 100]
    assert [checkpoint["w"]()[0, 0] for _, checkpoint in run] == [0, 5, 100]
    assert [step for step, _ in open_run(tmp_path, [100, 5])] == [5, 100]
    ((step, _),) = open_run(next(tmp_path.glob("*100")))
    assert step == 100
    with pytest.raises(UnreadableError, match=r"\[6\] are not; it has 0, 5, 100"):
        open_run(tmp_path, [5, 6])


def test_a_composite_keeps_the_names_of_its_items(tmp_path):
    with ocp.CheckpointManager(tmp_path.absolute()) as manager:
        model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        save = ocp.args.StandardSave
        items = ocp.args.Composite(
            model=save(nnx.state(model)),
            optimizer=save({"mu": np.ones(3)}),
            data=ocp.args.JsonSave({"epoch": 1}),
        )
        manager.save(1, args=items)
    report = inspect_run(tmp_path)
    assert [array.name for array in report.arrays] == ["model/bias", "model/scale"]
    assert report.left_out == {"statistics": 2, "optimizer state": 1}


def test_a_linen_train_state(tmp_path):
    params = linen.Dense(3).init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    save_orbax(tmp_path / "one", state)
    report = inspect_run(tmp_path / "one")
    assert [array.name for array in report.arrays] == ["params/bias", "params/kernel"]
    assert report.left_out == {"optimizer state": 5}


@pytest.mark.devices(8)
def test_arrays_of_many_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    w = np.arange(48, dtype=np.float32).reshape(16, 3)
    tree = {"w": jax.device_put(w, sharding), "key": jax.random.key(0)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path.absolute() / "one", tree)
    ((_, checkpoint),) = open_run(tmp_path / "one")
    np.testing.assert_array_equal(checkpoint["w"](), w)
    assert [array.name for array in inspect_run(tmp_path / "one").arrays] == ["w"]


FLOATS = {name: array for name, array in FLAT.items() if array.dtype.itemsize > 1}


@pytest.mark.parametrize(
    ("write", "suffix"), [(write_safetensors, ".safetensors"), (write_npz, ".npz")]
)
def test_files(write, suffix, tmp_path):
    write(tmp_path / f"model{suffix}", FLOATS)
    for path in (tmp_path, tmp_path / f"model{suffix}"):
        ((step, checkpoint),) = open_run(path)
        assert step is None
        assert_read(checkpoint, FLOATS)
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (10, 9):
        write(folder / f"step{step}{suffix}", {"w": np.full(2, step, np.float32)})
    assert [step for step, _ in open_run(folder)] == [9, 10]


def test_files_that_hold_one_model_together(tmp_path):
    for step in (50, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        parts = [*FLOATS.items()]
        for i, part in enumerate((parts[:2], parts[2:]), 1):
            name = f"model-0000{i}-of-00002.safetensors"
            write_safetensors(folder / name, dict(part))
    for _, checkpoint in open_run(tmp_path):
        assert_read(checkpoint, FLOATS)
    write_npz(tmp_path / "checkpoint-50" / "other.npz", {"w": np.ones(2)})
    names = [*open_run(tmp_path)[0][1]]
    assert len(names) == len(FLOATS) + 1 and "other/w" in names


def test_float8_of_safetensors(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"eight": FLAT["eight"]})
    ((_, checkpoint),) = open_run(tmp_path)
    assert_read(checkpoint, {"eight": FLAT["eight"]})


class Alarm:
    """An object that says when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "model.npz", w=np.array([Alarm()], object))
    with pytest.raises(UnreadableError, match="allow_pickle"):
        inspect_run(tmp_path)
    (tmp_path / "model.npz").write_bytes(pickle.dumps(Alarm()))
    with pytest.raises(UnreadableError, match="cannot be read"):
        inspect_run(tmp_path)
    (tmp_path / "model.npz").rename(tmp_path / "model.pkl")
    with pytest.raises(UnreadableError, match="holds no checkpoint"):
        inspect_run(tmp_path)


def damage_orbax(path, tree):
    save_orbax(path / "one", tree)
    largest = max(path.rglob("d/*"), key=lambda file: file.stat().st_size)
    for file in path.rglob("d/*"):
        if file.stat().st_size == largest.stat().st_size:
            file.write_bytes(file.read_bytes()[:20])


def lose_a_chunk(path, tree):
    save_orbax(path / "one", tree, use_ocdbt=False)
    (path / "one" / "w" / "0.0").unlink()


def damage_metadata(path, tree):
    save_orbax(path / "one", tree)
    metadata = path / "one" / "_METADATA"
    metadata.write_text(metadata.read_text()[:100])


def truncated(write, suffix, kept):
    def damage(path, tree):
        file = path / f"one{suffix}"
        write(file, tree)
        file.write_bytes(file.read_bytes()[:kept])

    return damage


def one_array(path, tree):
    np.save(path / "one.npy", tree["w"])
    (path / "one.npy").rename(path / "one.npz")


def write_header(header):
    def damage(path, tree):
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + bytes(64)
        (path / "one.safetensors").write_bytes(data)

    return damage


DAMAGES = {
    "truncated orbax": damage_orbax,
    "a chunk that is lost": lose_a_chunk,
    "truncated metadata": damage_metadata,
    "truncated npz": truncated(write_npz, ".npz", 100),
    "truncated header": truncated(write_safetensors, ".safetensors", 20),
    "truncated data": truncated(write_safetensors, ".safetensors", -8),
    "an empty file": truncated(write_safetensors, ".safetensors", 0),
    "an array without a name": one_array,
    "a header that is a list": write_header([1]),
    "a header that is a number": write_header(1),
    "offsets that do not fit": write_header(
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 64]}}
    ),
    "a negative offset": write_header(
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line(name, tmp_path):
    DAMAGES[name](tmp_path, {"w": RNG.standard_normal((64, 8)).astype(np.float32)})
    with pytest.raises(UnreadableError, match="cannot be read") as caught:
        inspect_run(next(tmp_path.iterdir()))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_steps_that_are_asked_for_are_read_beside_damaged_ones(tmp_path):
    w = RNG.standard_normal((4, 3)).astype(np.float32)
    for step in (0, 50, 100):
        write_npz(tmp_path / f"{step}.npz", {"w": w})
    (tmp_path / "50.npz").write_bytes(b"no zip")
    assert [step for step, _ in open_run(tmp_path, [0, 100])] == [0, 100]
    assert inspect_run(tmp_path, steps=[100]).steps == (100,)
    with pytest.raises(
        UnreadableError, match=r"50\.npz .*; the others can: --steps 0,"
    ):
        open_run(tmp_path)
    with pytest.raises(UnreadableError, match=r"\[7\] are not; it has 0, 50, 100"):
        open_run(tmp_path, [0, 7])
    with pytest.raises(UnreadableError, match=r"50\.npz .*; nor can any other"):
        open_run(tmp_path, [50])


def test_an_array_that_is_damaged_says_how_to_do_without_its_step(tmp_path):
    for step in (0, 50):
        save_orbax(tmp_path / str(step), {"w": np.ones((4, 3))}, use_ocdbt=False)
    (tmp_path / "50" / "w" / "0.0").unlink()
    with pytest.raises(UnreadableError, match=r"leave 50 out of the steps \(--steps\)"):
        inspect_run(tmp_path)
    assert inspect_run(tmp_path, steps=[0]).steps == (0,)


def test_float8_of_npz_is_said_to_have_no_type(tmp_path):
    eight = {kind: FLAT["eight"].astype(kind) for kind in NAMES.values() if "8" in kind}
    write_npz(tmp_path / "model.npz", {"w": np.ones((2, 2)), **eight})
    ((left, count),) = inspect_run(tmp_path).left_out.items()
    assert count == len(eight) == 2
    assert left.endswith("as .npz stores float8: save it as .safetensors")


def test_a_header_that_is_no_table_is_said(tmp_path):
    write_header([1])(tmp_path, {})
    with pytest.raises(UnreadableError, match="is a list; save the file anew"):
        inspect_run(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UnreadableError, match="does not exist"):
        inspect_run(tmp_path / "nothing")
    with pytest.raises(UnreadableError, match="holds no checkpoint"):
        inspect_run(tmp_path)
    (tmp_path / "notes.txt").write_text("learning rate 0.1")
    with pytest.raises(UnreadableError, match="pickles are not opened"):
        inspect_run(tmp_path)
    write_npz(tmp_path / "model.npz", {"count": np.arange(3), "mu": np.ones(2)})
    message = (
        "holds no arrays of weights, but 1 of optimizer state, 1 of other kinds; "
        r"axes given for a path \(--axes\) make weights"
    )
    with pytest.raises(UnreadableError, match=message):
        inspect_run(tmp_path)


def test_roles():
    assert role("params/mean/kernel") == "weight"
    for name in "mu nu trace velocity momentum mean var cache".split():
        assert role(f"params/{name}") == role(f"params/{name}/kernel") == "weight"
        assert role(f"model.params.{name}") == "weight"
        assert role(name) != "weight"
    assert role("opt_state/0/mu/params/kernel") == "optimizer state"
    assert role("opt_state/0/mu/Dense_0/kernel") == "optimizer state"
    assert role("batch_stats/BatchNorm_0/mean") == role("bn/var") == "statistics"
    assert role("bn.running_mean") == "statistics"


@pytest.mark.parametrize(
    ("name", "rank", "axes"),
    [
        ("Dense_0/kernel", 2, (0,)),
        ("Conv_0/kernel", 4, (0, 1, 2)),
        ("conv1d/kernel", 3, (0, 1)),
        ("layers/mlp/kernel", 3, (1,)),
        ("attention/query/kernel", 3, (0,)),
        ("layers/attention/query/kernel", 4, (1,)),
        ("attention/out/kernel", 3, (0, 1)),
        ("layers/attention/out/kernel", 4, (1, 2)),
        ("embed/embedding", 2, (1,)),
        ("transformer.wte.weight", 2, (1,)),
        ("layer1.0.conv1.weight", 4, (1, 2, 3)),
        ("fc.weight", 2, (1,)),
        ("norm/scale", 1, None),
        ("attention/key/bias", 2, None),
    ],
)
def test_guesses(name, rank, axes):
    assert guess_axes(name, rank)[0] == axes


def test_axes_of_a_path_make_weights_of_what_is_there(tmp_path):
    names = "trace/kernel", "trace/bias", "bn/kernel", "bn/mean", "mu/w", "nu/w"
    write_npz(tmp_path / "model.npz", {name: np.ones((3, 2)) for name in names})

    def found(axes):
        report = inspect_run(tmp_path, axes)
        return {array.name: array.axes for array in report.arrays}, report.left_out

    assert found(None) == (
        {"bn/kernel": (0,)},
        {"optimizer state": 4, "statistics": 1},
    )
    arrays, left = found({"trace": [1], "bn": [0], "nu/w": "layer"})
    assert arrays == {
        "bn/kernel": (0,),
        "nu/w": (0, 1),
        "trace/bias": (1,),
        "trace/kernel": (1,),
    }
    assert left == {"optimizer state": 1, "statistics": 1}


def test_given_axes_hold_for_the_nearest_path():
    names = ["a/b/kernel", "a/kernel", "c/kernel", "c/bias"]
    matrix, vector = np.ones((3, 2)), np.ones(2)
    axes = AxesByPath({"a": [1], "a/b": "layer", "c": {"bias": "layer"}}, names)
    assert axes("a/b/kernel", matrix) == ((0, 1), "given")
    assert axes("a/kernel", matrix) == ((1,), "given")
    assert axes("c/kernel", matrix)[0] == (0,)  # a guess
    assert axes("c/bias", vector) == ((0,), "given")
    assert AxesByPath("layer", names)("c/bias", vector) == (None, "given")
    assert AxesByPath("none", names)("a/kernel", matrix) == (None, "given")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ("units", "must be one of 'unit', 'layer', 'none'"),
        ({"d": [0]}, "no weights at 'd'; its first is 'a/kernel'"),
        ({"a": [2]}, "axes must lie within the array's rank"),
    ],
)
def test_axes_that_do_not_fit(axes, words, tmp_path):
    write_npz(tmp_path / "model.npz", {"a/kernel": np.ones((3, 2))})
    with pytest.raises(ValueError, match=words):
        inspect_run(tmp_path, axes=axes)
