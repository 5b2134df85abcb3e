"""What a compiled step costs on a GPU and on TPUs, without either.

XLA's compilers for both work on any machine. In an environment that holds normax and
JAX of version V, they come with

    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V
    pip install "jax[tpu]==V"

The project does not depend on them. Nothing runs. Of a step that memory limits, the
time follows from the bytes that its kernels read and write. The estimates are those of
an H200, whose bandwidth was measured; for updates, measured times were up to 17% off.
The time of a conditional, for which the host reads the predicate, is assumed. On a
GPU XLA tries several kernels for a product of matrices, and may take others than here.
"""

import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# For deviceless compilation, and before JAX is imported.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BANDWIDTH = 4.1e12  # bytes a second, of reads and writes together
LAUNCH = 1.5e-6  # seconds a kernel
CONDITIONAL = 10e-6  # seconds a conditional

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_SIZES |= {"f64": 8, "s64": 8, "u64": 8}  # All others have four bytes.
# What an instruction calls is named as in `calls=%a` or `branch_computations={%a, %b}`.
_CALLED = re.compile(
    r"(?:body|calls|to_apply|\w+_computations?)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)


class Cost(NamedTuple):
    """What a program costs.

    Attributes:
      bytes: What kernels read and write; of a TPU's program, what its compiler counts,
        with both branches of a conditional.
      kernels: Number of kernels.
      conditionals: Number of conditionals. Of each, the cheaper branch counts, which
        is that of the usual step.
      collectives: Number of operations in which several devices take part.
      temporary: Bytes of temporary memory.
      text: The program.
    """

    bytes: float
    kernels: int
    conditionals: int
    collectives: int
    temporary: int
    text: str

    @property
    def microseconds(self) -> float:
        """Estimated time on an H200."""
        return 1e6 * (
            self.bytes / BANDWIDTH
            + self.kernels * LAUNCH
            + self.conditionals * CONDITIONAL
        )


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    called: list[str]
    times: int


def _closing(text: str) -> int:
    """Return where the first parenthesis of a text closes."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and not depth:
            return place
    raise ValueError(f"a parenthesis of {text!r} stays open")


def _instructions(text: str) -> dict[str, list[_Instruction]]:
    """Return the instructions of each computation of a program; "ENTRY" is its main."""
    found: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            instructions = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif start := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            rest = line[start.end() :]
            end = _closing(rest) + 1 if rest[0] == "(" else rest.index(" ")
            shape, (opcode, rest) = rest[:end], rest[end:].strip().split("(", 1)
            end = _closing("(" + rest)
            called = _CALLED.findall(rest[end:])
            trips = re.search(r'known_trip_count":\{"n":"(\d+)', rest)
            instructions.append(
                _Instruction(
                    start[1],
                    shape,
                    opcode,
                    re.findall(r"%([\w.\-]+)", rest[:end]),
                    re.findall(r"%([\w.\-]+)", " ".join(called)),
                    int(trips[1]) if trips else 1,
                )
            )
    return found


def _bytes(shape: str) -> int:
    arrays = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape)
    return sum(
        _SIZES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in arrays
    )


def _counts(programs: dict[str, list[_Instruction]], name: str) -> np.ndarray:
    """Return bytes, kernels, conditionals and collectives of a computation."""
    shapes, total = {}, np.zeros(4)
    for step in programs[name]:
        shapes[step.name] = step.shape
        of_others = (_counts(programs, called) for called in step.called)
        if step.opcode == "conditional":
            total += np.add(min(of_others, key=lambda counts: counts[0]), [0, 0, 1, 0])
        elif step.opcode in ("while", "call", "async-start"):
            total += step.times * sum(of_others, np.zeros(4))
        elif step.opcode not in _FREE and not step.opcode.endswith("-done"):
            read = sum(_bytes(shapes.get(name, "")) for name in set(step.operands))
            collective = re.match("all-|reduce-scatter|collective-", step.opcode)
            total += [_bytes(step.shape) + read, 1, 0, bool(collective)]
    return total


def _compile(
    step: Callable[..., Any], arguments: Any, mesh: Mesh, spec: PartitionSpec
) -> Any:
    """Compile a step that is given its first two arguments for good.

    Matrices are sharded as `spec` says, and the rest is on every device.
    """

    def place(x):
        sharding = NamedSharding(mesh, spec if np.ndim(x) == 2 else PartitionSpec())
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    shapes = jax.tree.map(place, jax.eval_shape(lambda *x: x, *arguments))
    results = jax.tree.map(lambda x: place(x).sharding, jax.eval_shape(step, *shapes))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
    return jitted.lower(*shapes).compile()


def _cost(compiled: Any) -> Cost:
    text = compiled.as_text()
    moved, *counts = _counts(_instructions(text), "ENTRY")
    kernels, conditionals, collectives = map(int, counts)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Cost(moved, kernels, conditionals, collectives, temporary, text)


def gpu_cost(step: Callable[..., Any], arguments: Any) -> Cost:
    """Return the cost of `step(*arguments)` on an H200."""
    config = pathlib.Path(__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=config
    )
    mesh = Mesh(np.array(topology.devices), ("x",))
    return _cost(_compile(step, arguments, mesh, PartitionSpec()))


def tpu_cost(
    step: Callable[..., Any], arguments: Any, spec: PartitionSpec | None = None
) -> Cost:
    """Return the cost of `step(*arguments)` on one chip of a TPU v5e.

    Args:
      step: The step.
      arguments: Its arguments, or their shapes.
      spec: If given, four chips share the matrices, with the axis "x" of the mesh.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices[: 4 if spec else 1]), ("x",))
    compiled = _compile(step, arguments, mesh, spec or PartitionSpec())
    moved = compiled.cost_analysis()["bytes accessed"]
    return _cost(compiled)._replace(bytes=moved)


def missing() -> Iterator[tuple[str, str]]:
    """Return which devices' compilers are not installed, and what to do."""
    for device, package in {"GPU": "jax_cuda13_plugin", "TPU": "libtpu"}.items():
        if not importlib.util.find_spec(package):
            yield device, f"{package} is missing; see tests/benchmarks/accelerators.py"
