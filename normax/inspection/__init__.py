"""What the checkpoints of a run say of its weights, without the code of the model.

Weights are read from Orbax, safetensors or NumPy, one array at a time. For each the
norms, the angles between checkpoints and the state of its vectors are measured, and
what is wrong is said: `python -m normax inspect DIR`.
"""

from normax.inspection.checkpoints import UnreadableError
from normax.inspection.findings import Finding
from normax.inspection.report import ArrayReport, EquilibriumReport, RunReport
from normax.inspection.run import inspect_run

__all__ = [
    "ArrayReport",
    "EquilibriumReport",
    "Finding",
    "RunReport",
    "UnreadableError",
    "inspect_run",
]
