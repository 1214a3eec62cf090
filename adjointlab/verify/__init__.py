"""The dot-product test ``⟨Ax, y⟩ = ⟨x, By⟩`` with a derived tolerance and a diagnosis in words."""

from adjointlab.verify.check import assert_adjoint, check_adjoint
from adjointlab.verify.derivative import assert_derivative, check_derivative
from adjointlab.verify.derivative_report import DerivativeReport
from adjointlab.verify.report import AdjointReport

__all__ = [
    "AdjointReport", "DerivativeReport", "assert_adjoint", "assert_derivative", "check_adjoint", "check_derivative",
]  # fmt: skip
