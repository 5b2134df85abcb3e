"""The costs of compiled steps, and the table of the benchmarks."""

import pathlib
import subprocess
import sys

import accelerators
import pytest

PROGRAM = """\
HloModule jit_run, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%body (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], /*index=1*/f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%p.1), index=1
  %y.1 = f32[8,4]{1,0:T(8,128)S(1)} fusion(%x.1, %x.1), kind=kLoop, calls=%fused
  ROOT %t.1 = (s32[], f32[8,4]{1,0}) tuple(%i.1, %y.1)
}

%hand_on (p.2: f32[8,4]) -> f32[8,4] {
  ROOT %p.2 = f32[8,4]{1,0} parameter(0)
}

%careful (p.3: f32[8,4]) -> f32[8,4] {
  %p.3 = f32[8,4]{1,0} parameter(0)
  ROOT %all-reduce.2 = f32[8,4]{1,0} all-reduce(%p.3), to_apply=%add
}

ENTRY %main (x: f32[8,4], ok: pred[]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0), sharding={devices=[4,1]<=[4]}
  %ok = pred[] parameter(1)
  %half.1 = bf16[8,4]{1,0} convert(%x), metadata={op_name="jit(run)/(x)"}
  %all-reduce.1 = (bf16[8,4]{1,0}, bf16[8,4]{1,0}) all-reduce(%half.1, %half.1)
  %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
  %w = (s32[], f32[8,4]{1,0}) while(%t), condition=%stop, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %z = f32[8,4]{1,0} get-tuple-element(%w), index=1
  ROOT %c = f32[8,4]{1,0} conditional(%ok, %z, %z), \
true_computation=%careful, false_computation=%hand_on
}

%stop (p.4: (s32[], f32[8,4])) -> pred[] {
  %p.4 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}
"""


def test_what_a_program_moves_is_counted():
    # A conversion reads 128 bytes and writes 64, the sum of all devices moves 3 * 64,
    # and each of five rounds reads and writes 128. The conditional hands on an operand.
    counts = accelerators._counts(accelerators._instructions(PROGRAM), "ENTRY")
    assert counts.tolist() == [192 + 192 + 5 * 256, 1 + 1 + 5, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(
    bool(dict(accelerators.missing())), reason=f"{dict(accelerators.missing())}"
)
def test_the_table_knows_the_least_that_adam_moves():
    folder = pathlib.Path(__file__).parent
    command = [sys.executable, str(folder), "--rounds", "0", "--only", "^adam$"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, microseconds, ratio, *_ = next(
        [cell.strip() for cell in line.split("|")[1:]]
        for line in lines.splitlines()
        if line.startswith("| adam |")
    )
    # Adam reads four arrays and writes three.
    least = 1e6 * 7 * 4 * 8 * 1024 * 4096 / accelerators.BANDWIDTH
    assert name == "adam" and float(ratio) == 1
    assert least < float(microseconds) < 1.2 * least
