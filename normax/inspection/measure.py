r"""Norms and angles of the weight vectors of one array, at all steps of a run.

Sums are in float64 and in blocks, so that beside two arrays little memory is needed.
No device is: the run whose checkpoints these are may hold it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from normax.inspection.checkpoints import Checkpoint, Run
from normax.inspection.vectors import AxesByPath

_BLOCK = 2**20  # entries
# A vector that turns by less than this share of the median does not turn.
_QUIET = 1e-3
# Vectors whose largest entry is beyond 2^400 or below 2^-400 are rescaled first.
_SAFE = 400


class Measured:
    """What was measured of one array.

    Lists have an entry for each step, or for each interval between two steps; it is NaN
    where there is nothing to measure. What is no list is of the last step that holds
    the array.
    """

    def __init__(self, name: str, steps: list[int | None]) -> None:
        intervals = max(len(steps) - 1, 0)
        self.name = name
        self.steps = steps
        self.shapes: list[tuple[int, ...] | None] = [None] * len(steps)
        self.dtype = np.dtype(np.float32)
        self.axes: tuple[int, ...] = ()  # of biases and gains, which are measured whole
        self.guess = ""
        self.vectors = 0
        self.zero_vectors = 0
        self.quiet_vectors = 0
        self.only_ones = False
        self.has_master = False
        self.norm = np.full(len(steps), np.nan)
        self.least, self.most = self.norm.copy(), self.norm.copy()
        self.not_finite = np.zeros(len(steps), int)
        self.angle = np.full(intervals, np.nan)
        self.versine = self.angle.copy()
        # Since the array was last there, even if some steps lack it: the largest angle,
        # and the share of the entries that did not change.
        self.largest_angle, self.unchanged = self.angle.copy(), self.angle.copy()

    @property
    def present(self) -> list[int]:
        """The indices of the steps that hold the array."""
        return [i for i, shape in enumerate(self.shapes) if shape is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at the last step that holds the array."""
        return self.shapes[self.present[-1]] or () if self.present else ()

    @property
    def changed(self) -> int | None:
        """The index of the last step with another shape than the last; None without."""
        others = [i for i in self.present if self.shapes[i] != self.shape]
        return others[-1] if others else None

    @property
    def comparable(self) -> list[int]:
        """The indices of the steps that hold the array as it is at last."""
        start = -1 if self.changed is None else self.changed
        return [i for i in self.present if i > start]

    @property
    def is_half(self) -> bool:
        """Whether the entries have fewer digits than float32."""
        return self.dtype.itemsize < 4

    @property
    def has_vectors(self) -> bool:
        """Whether the array holds weight vectors, as biases and gains do not."""
        return bool(self.axes)

    @property
    def dimension(self) -> int:
        """The number of entries of a vector."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def half_unit(self) -> float:
        """The largest relative change that rounding undoes, whatever the entry is."""
        return float(ml_dtypes.finfo(self.dtype).eps) / 4


def _blocks(array: np.ndarray) -> Iterator[slice]:
    rows = max(1, _BLOCK * array.shape[0] // array.size)
    return (slice(i, i + rows) for i in range(0, array.shape[0], rows))


@dataclasses.dataclass
class _Sums:
    """Sums over each vector w, and over what was added to the vector p before.

    All are of vectors that are divided by 2^n, where n is 0 unless squares in float64
    leave its range.
    """

    square: np.ndarray  # |w|^2 / 4^n
    before: np.ndarray  # |p|^2
    product: np.ndarray  # <p, w - p>
    update: np.ndarray  # |w - p|^2
    exponent: np.ndarray | int = 0  # n
    not_finite: int = 0
    unchanged: int = 0
    ones: int = 0


def _exponent(arrays: list[np.ndarray], axes: tuple[int, ...]) -> np.ndarray | int:
    """Return for each vector the n of 2^n that is to divide it, with its axes kept."""
    if arrays[0].dtype != np.float64 and arrays[-1].dtype != np.float64:
        return 0  # the squares of all others are in the range of float64
    ends = [
        end(array, axes, keepdims=True).astype(np.float64)
        for array in arrays
        for end in (np.max, np.min)
    ]
    largest = np.max(np.abs(ends), 0)
    exponent = np.frexp(np.where(np.isfinite(largest), largest, 1))[1]
    return exponent * (np.abs(exponent) > _SAFE)


def _sums(w: np.ndarray, previous: np.ndarray | None, axes: tuple[int, ...]) -> _Sums:
    kept = tuple(n for i, n in enumerate(w.shape) if i not in axes)
    sums = _Sums(np.zeros(kept), np.zeros(kept), np.zeros(kept), np.zeros(kept))
    with np.errstate(all="ignore"):  # of arrays that hold infinities
        exponent = _exponent([w] if previous is None else [w, previous], axes)
        if np.any(exponent):
            sums.exponent = np.squeeze(exponent, axes)
        _add_blocks(sums, w, previous, axes, exponent)
    return sums


def _add_blocks(sums, w, previous, axes, exponent):
    scaled = np.any(exponent)
    for block in _blocks(w):
        place = ... if 0 in axes else block
        powers = -exponent[() if 0 in axes else block] if scaled else None
        x = w[block].astype(np.float64)
        sums.not_finite += x.size - np.count_nonzero(np.isfinite(x))
        sums.ones += np.count_nonzero(x == 1)
        if previous is not None:
            p = previous[block].astype(np.float64)
            sums.unchanged += np.count_nonzero(x == p)
            p = np.ldexp(p, powers) if scaled else p
        x = np.ldexp(x, powers) if scaled else x
        sums.square[place] += (x * x).sum(axes)
        if previous is None:
            continue
        x -= p
        sums.before[place] += (p * p).sum(axes)
        sums.product[place] += (p * x).sum(axes)
        sums.update[place] += (x * x).sum(axes)


def _angles(sums: _Sums) -> np.ndarray:
    """Return the angle of every vector; NaN where one of the two has no direction."""
    before = np.sqrt(sums.before)
    with np.errstate(all="ignore"):
        radial = sums.product / before
        tangential = np.sqrt(np.maximum(sums.update - radial**2, 0))
        angles = np.arctan2(tangential, before + radial)
    return np.where((sums.before > 0) & (sums.square > 0), angles, np.nan)


def _root_mean_square(values: np.ndarray) -> float:
    largest = values.max()
    if not 0 < largest < np.inf:
        return float(largest)
    return float(largest * np.sqrt(np.mean((values / largest) ** 2)))


def _record_step(found: Measured, index: int, w: np.ndarray, sums: _Sums) -> None:
    with np.errstate(over="ignore"):
        norms = np.ldexp(np.sqrt(sums.square), sums.exponent)
    found.norm[index] = _root_mean_square(norms)
    found.least[index], found.most[index] = norms.min(), norms.max()
    found.not_finite[index] = sums.not_finite
    found.dtype, found.vectors = w.dtype, norms.size
    found.zero_vectors = int(np.count_nonzero(norms == 0))
    found.only_ones = sums.ones == w.size


def _record_interval(found: Measured, index: int, sums: _Sums, size: int) -> np.ndarray:
    """Record what happened since the array was last there; return which did not turn.

    An angle between successive steps is recorded only where both hold the array.
    """
    angles = _angles(sums)
    turned = angles[np.isfinite(angles)]
    found.unchanged[index] = sums.unchanged / size
    if not turned.size:
        return np.zeros(angles.shape, bool)
    if found.shapes[index] is not None:
        found.angle[index] = _root_mean_square(turned)
        found.versine[index] = np.mean(2 * np.sin(turned / 2) ** 2)
    found.largest_angle[index] = turned.max()
    median = np.median(turned)
    return (angles <= _QUIET * median) & (median > 0)


def is_floating(array: np.ndarray) -> bool:
    """Return whether an array holds floating numbers, of NumPy's or ml_dtypes'."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _kind(array: np.ndarray) -> str:
    if array.dtype.kind == "V":
        return "bytes without a type, as .npz stores float8: save it as .safetensors"
    return "other kinds"


def measure_array(name: str, run: Run, axes_of: AxesByPath) -> Measured | str:
    """Measure one array at all steps; what it holds, where it is no floating number."""
    kind = "other kinds"
    found = Measured(name, [step for step, _ in run])
    previous: np.ndarray | None = None
    quiet: np.ndarray | None = None
    last: Checkpoint = {}
    for index, (_, checkpoint) in enumerate(run):
        array = checkpoint[name]() if name in checkpoint else None
        if array is None or not is_floating(array) or not array.size:
            kind = kind if array is None else _kind(array)
            continue
        given, found.guess = axes_of(name, array)
        w = np.atleast_1d(array)
        axes = tuple(range(w.ndim)) if given is None else given
        if found.present and found.shape != array.shape:
            previous = quiet = None
        sums = _sums(w, previous, axes)
        _record_step(found, index, w, sums)
        found.shapes[index], found.axes = array.shape, given or ()
        if previous is not None:
            still = _record_interval(found, index - 1, sums, w.size)
            # What does not turn in the run's second half is dead at its end.
            if quiet is not None and index - 1 > len(run) // 2:
                still = still & quiet
            quiet = still
        previous, last = w, checkpoint
    if not found.present:
        return kind
    found.quiet_vectors = 0 if quiet is None else int(np.count_nonzero(quiet))
    found.has_master = (
        found.is_half
        and previous is not None
        and any(_is_master(read(), previous) for read in _masters(name, last))
    )
    return found


def _masters(name: str, checkpoint: Checkpoint) -> list[Callable[[], np.ndarray]]:
    """Return what reads arrays of the same name in other trees of a checkpoint."""
    _, _, tail = name.partition("/")
    ends = f"/{tail or name}"
    others = [other for other in checkpoint if f"/{other}".endswith(ends)]
    others = [other for other in others if other != name]
    others.sort(key=lambda other: ("master" not in other, len(other)))
    return [checkpoint[other] for other in others[:8]]  # the others are its layers


def _is_master(array: np.ndarray, copy: np.ndarray) -> bool:
    """Return whether rounding one array gives the other."""
    fits = is_floating(array) and array.dtype.itemsize >= 4
    return (
        fits
        and array.shape == copy.shape
        and np.array_equal(array.astype(copy.dtype), copy)
    )
