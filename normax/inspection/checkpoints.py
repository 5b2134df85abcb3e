"""Checkpoints of a run, read one array at a time and without the model's code.

Orbax stores each array as a Zarr array, which TensorStore opens by itself: no device
is asked for, and no template of the tree. Nothing is ever unpickled.
"""

import functools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

# Path of an array in a checkpoint, and what reads the array.
Checkpoint: TypeAlias = dict[str, Callable[[], np.ndarray]]
Run: TypeAlias = list[tuple[int | None, Checkpoint]]  # with their steps

# What reading a damaged file raises: those of the files, and of what they should say.
_DAMAGE = (
    *(OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error),
    *(AttributeError, LookupError, TypeError, RecursionError),
)
_TREE, _STEP = "_METADATA", "_CHECKPOINT_METADATA"  # what Orbax calls its notes
_SUFFIXES = (".safetensors", ".npz")
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


class UnreadableError(ValueError):
    """What was given is no checkpoint, or a damaged one. The message is one line."""


def _unreadable(path: Path, error: Exception) -> UnreadableError:
    words = " ".join(str(error).split())[:200] or type(error).__name__
    return UnreadableError(f"{path} cannot be read: {words}")


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """Return what is read, or raise one error for every kind of damage."""
    try:
        return read()
    except UnreadableError:
        raise
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _orbax_array(folder: Path, name: str, zarr3: bool) -> np.ndarray:
    import tensorstore  # it takes as long to import as all of normax

    inside: dict[str, Any] = {"driver": "file", "path": f"{folder}/{name}/"}
    if (folder / "manifest.ocdbt").exists():
        base = {"driver": "file", "path": f"{folder}/"}
        inside = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": inside,
        # A chunk that is lost is no chunk of zeros.
        "fill_missing_data_reads": False,
    }
    return tensorstore.open(spec, read=True).result().read().result()


def _orbax(folder: Path) -> Checkpoint:
    metadata = _guarded(folder, lambda: json.loads((folder / _TREE).read_text("utf8")))
    found: Checkpoint = {}
    for leaf in _guarded(folder, lambda: [*metadata["tree_metadata"].values()]):
        if leaf["value_metadata"]["value_type"] not in ("jax.Array", "np.ndarray"):
            continue  # numbers, strings, and nodes without leaves
        keys = [str(key["key"]) for key in leaf["key_metadata"]]
        stored = ".".join(keys)
        # An NNX variable is a node whose only child, the array, is called "value".
        keys = keys[:-1] if len(keys) > 1 and keys[-1] == "value" else keys
        zarr3 = bool(metadata.get("use_zarr3"))
        read = functools.partial(_orbax_array, folder, stored, zarr3)
        found["/".join(keys)] = functools.partial(_guarded, folder / stored, read)
    return found


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        start = 8 + length
        if start > file.stat().st_size:
            raise ValueError("it ends before its header does")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError(
            f"its header must be a table of arrays, but is a {type(header).__name__}; "
            "save the file anew"
        )
    header.pop("__metadata__", None)
    end = start + max(
        (entry["data_offsets"][1] for entry in header.values()), default=0
    )
    if end > file.stat().st_size:
        raise ValueError(f"it ends after {file.stat().st_size} bytes of {end}")
    return header, start


def _safetensors_array(file: Path, start: int, entry: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
    low, high = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if high - low != math.prod(shape) * dtype.itemsize or low < 0:
        raise ValueError(f"{high - low} bytes are no {dtype} of shape {shape}")
    count = math.prod(shape)
    return np.fromfile(file, dtype, count, offset=start + low).reshape(shape)


def _safetensors(file: Path) -> Checkpoint:
    header, start = _guarded(file, lambda: _safetensors_header(file))
    return {
        name: functools.partial(
            _guarded, file, functools.partial(_safetensors_array, file, start, entry)
        )
        for name, entry in header.items()
        if entry["dtype"] in _SAFETENSORS  # else they are integers
    }


def _npz_array(file: Path, name: str) -> np.ndarray:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        try:
            array = arrays[name]
        except ValueError as error:
            if "'<f1'" not in str(error):
                raise
            return np.empty(1, "V1")  # a float8 as NumPy stores it, and does not read
    # NumPy does not know bfloat16, and stores its two bytes as such.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _npz(file: Path) -> Checkpoint:
    def names():
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return arrays.files

    return {
        name: functools.partial(
            _guarded, file, functools.partial(_npz_array, file, name)
        )
        for name in _guarded(file, names)
    }


def _number(path: Path) -> int | None:
    """Return the step that a name ends with."""
    if re.search(r"-\d+-of-\d+$", path.stem):  # one of several files of a checkpoint
        return None
    name = path.stem if path.suffix in _SUFFIXES else path.name
    found = re.fullmatch(r"(?:.*[^\d])?(\d+)", name)
    return int(found.group(1)) if found else None


def _children(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith((".", "_"))
        if not hidden and ".orbax-checkpoint-tmp" not in path.name:
            yield path


def _merged(parts: dict[str, Checkpoint]) -> Checkpoint:
    """Return one checkpoint of several parts, told apart by their names if need be."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    # Files called 1-of-2 and 2-of-2 hold one model.
    shards = all("-of-" in part for part in parts)
    return {
        name if shards else f"{part}/{name}": read
        for part, arrays in parts.items()
        for name, read in arrays.items()
    }


def _checkpoint(path: Path) -> Checkpoint | None:
    """Return the arrays of one checkpoint; None where the path is none."""
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    if path.suffix == ".safetensors" and path.is_file():
        return _safetensors(path)
    if not path.is_dir():
        return None
    if (path / _TREE).exists():
        return _orbax(path)
    children = [*_children(path)]
    items = [child for child in children if (child / _TREE).exists()]
    whole = (path / _STEP).exists()
    if items and (whole or all(_number(item) is None for item in items)):
        return _merged({item.name: _orbax(item) for item in items})
    files = [child for child in children if child.suffix in _SUFFIXES]
    alone = len(files) == 1 and not files[0].stem.isdigit()
    if files and (alone or all(_number(file) is None for file in files)):
        return _merged({file.stem: _checkpoint(file) or {} for file in files})
    return None


def _without(step: int, read: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array, or say how to do without a damaged checkpoint."""
    try:
        return read()
    except UnreadableError as error:
        raise UnreadableError(
            f"{error}; to read the others, leave {step} out of the steps (--steps)"
        ) from error


def _children_by_number(folder: Path) -> list[tuple[int, Path]]:
    children = [*_children(folder)] if folder.is_dir() else []
    numbered = [(_number(child), child) for child in children]
    return sorted((number, child) for number, child in numbered if number is not None)


def _open_numbered(numbered: list[tuple[int, Path]]) -> Run:
    """Return the checkpoints among numbered files and folders."""
    run: Run = []
    damage: UnreadableError | None = None
    for number, child in numbered:
        try:
            found = _guarded(child, functools.partial(_checkpoint, child)) or {}
        except UnreadableError as error:
            damage = damage or error
            continue
        guarded: Checkpoint = {
            name: functools.partial(_without, number, read)
            for name, read in found.items()
        }
        run += [(number, guarded)] if guarded else []
    if damage:
        others = ",".join(str(number) for number, _ in run)
        fix = f"the others can: --steps {others}" if run else "nor can any other"
        raise UnreadableError(f"{damage}; {fix}") from damage
    return run


def _check_steps(steps: list[int], known: list[int | None]) -> None:
    if not steps:
        raise UnreadableError("steps must name a step at least; None reads all of them")
    if missing := [step for step in steps if step not in known]:
        numbers = ", ".join(str(step) for step in known if step is not None)
        raise UnreadableError(
            f"steps must be among those of the run, but {missing} are not; it has "
            f"{numbers or 'no numbers: leave steps out'}"
        )


def open_run(path: Path, steps: list[int] | None = None) -> Run:
    """Return the checkpoints of a run, in the order of their steps.

    Args:
      path: A folder of an Orbax `CheckpointManager`, a folder of numbered checkpoints,
        or one checkpoint.
      steps: Which of them; None for all.

    Raises:
      UnreadableError: There is no checkpoint, or it is damaged.
    """
    if not path.exists():
        raise UnreadableError(f"{path} does not exist")
    one = _guarded(path, lambda: _checkpoint(path))
    if one is not None:
        managed = (path / _STEP).exists() and not (path / _TREE).exists()
        named = managed or path.name.isdigit()  # a step of a manager
        run: Run = [(_number(path) if named else None, one)]
        numbered = []
    else:
        numbered = _children_by_number(path)
        chosen = [pair for pair in numbered if steps is None or pair[0] in steps]
        run = _open_numbered(chosen)
    found = {step for step, _ in run}
    if steps is not None and (found or numbered):
        # A folder that was opened and is no checkpoint is none of the run's.
        others = {number for number, _ in numbered if number not in steps}
        _check_steps(steps, sorted({*found, *others}, key=lambda step: step or 0))
    if not run:
        raise UnreadableError(
            f"{path} holds no checkpoint: expected one of Orbax, or files "
            f"{' or '.join(_SUFFIXES)}; pickles are not opened"
        )
    return run
