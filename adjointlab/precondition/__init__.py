r"""Preconditioners: operators about ``(AᴴWA + damp²)⁻¹`` that are cheap to apply, self-adjoint and positive."""

from adjointlab.precondition.diagonals import diagonal
from adjointlab.precondition.low_rank import nystrom
from adjointlab.precondition.spectra import auto, circulant

__all__ = ["auto", "circulant", "diagonal", "nystrom"]
