"""The dot-product test ``⟨Ax, y⟩ = ⟨x, By⟩`` with a derived tolerance and a diagnosis in words."""

from adjointlab.verify.check import assert_adjoint, check_adjoint
from adjointlab.verify.report import AdjointReport

__all__ = ["AdjointReport", "assert_adjoint", "check_adjoint"]
