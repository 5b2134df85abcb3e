"""Primitives of the path transform, a file for each kind.

Importing this enters all of them into `primitive_spec.SPECS`.
"""

from normax.paths.primitives import elementwise, linear, reductions, scan, structural

__all__ = ["elementwise", "linear", "reductions", "scan", "structural"]
