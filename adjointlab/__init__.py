"""The adjoint of any linear PyTorch module, exactly, without writing it: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``."""

from adjointlab import solvers
from adjointlab.affine import AffineOperator, affine_operator
from adjointlab.errors import AdjointMismatchError, NotDifferentiableError, NotLinearError, SpaceMismatchError
from adjointlab.least_squares import LeastSquares, least_squares_gradient
from adjointlab.linear_operator import (
    LinearOperator,
    block_diag,
    diagonal,
    hstack,
    identity,
    linear_adjoint,
    linear_operator,
    vstack,
)
from adjointlab.linearity import LinearityReport, check_linearity
from adjointlab.space import Space, TensorSpec
from adjointlab.spectral import operator_norm, to_dense
from adjointlab.verify import AdjointReport, assert_adjoint, check_adjoint

__all__ = [
    "AdjointMismatchError",
    "AdjointReport",
    "AffineOperator",
    "LeastSquares",
    "LinearOperator",
    "LinearityReport",
    "NotDifferentiableError",
    "NotLinearError",
    "Space",
    "SpaceMismatchError",
    "TensorSpec",
    "affine_operator",
    "assert_adjoint",
    "block_diag",
    "check_adjoint",
    "check_linearity",
    "diagonal",
    "hstack",
    "identity",
    "least_squares_gradient",
    "linear_adjoint",
    "linear_operator",
    "operator_norm",
    "solvers",
    "to_dense",
    "vstack",
]
