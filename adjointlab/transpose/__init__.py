"""The engine: a linear function in, its adjoint function out. The only place that names vjp, make_fx or compile."""

from adjointlab.transpose.dispatch import Transposition
from adjointlab.transpose.explanation import Explanation
from adjointlab.transpose.frontend.selected import Selected
from adjointlab.transpose.frontend.values import ReadsInputError, UntraceableError
from adjointlab.transpose.frontend.vjp import PullBack
from adjointlab.transpose.linearization import Linearization
from adjointlab.transpose.options import Options
from adjointlab.transpose.runtime.derivation import Derivation
from adjointlab.transpose.runtime.eager import Eager

__all__ = [
    "Derivation", "Eager", "Explanation", "Linearization", "Options", "PullBack", "ReadsInputError", "Selected",
    "Transposition", "UntraceableError",
]  # fmt: skip
