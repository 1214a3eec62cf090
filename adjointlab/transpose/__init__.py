"""The engine: a linear function in, its adjoint function out. The only place that names vjp, make_fx or compile."""

from adjointlab.transpose.dispatch import Transposition
from adjointlab.transpose.explanation import Account
from adjointlab.transpose.frontend.capture import capture
from adjointlab.transpose.frontend.trace import ReadsInputError, UntraceableError
from adjointlab.transpose.sample import Sample, room

__all__ = ["Account", "ReadsInputError", "Sample", "Transposition", "UntraceableError", "capture", "room"]
