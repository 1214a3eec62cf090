"""The adjoint of any linear PyTorch module, exactly, without writing it: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``."""

from adjointlab.errors import AdjointMismatchError, NotDifferentiableError, NotLinearError, SpaceMismatchError
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
