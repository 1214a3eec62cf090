"""The engine: a linear function in, its adjoint function out. The only place that names vjp, make_fx or compile."""

from adjointlab.transpose.account import Account
from adjointlab.transpose.capture import capture
from adjointlab.transpose.engine import Transposition
from adjointlab.transpose.sample import Sample, room
from adjointlab.transpose.trace import ReadsInputError, UntraceableError

__all__ = ["Account", "ReadsInputError", "Sample", "Transposition", "UntraceableError", "capture", "room"]
