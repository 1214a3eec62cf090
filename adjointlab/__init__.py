"""The adjoint of any linear PyTorch module, exactly, without writing it: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where each name is defined. They are imported when they are first used, so that what needs no torch loads none: pytest
# imports the plugin in every project that has adjointlab installed.
_HOME = {
    "AdjointMismatchError": "adjointlab.errors",
    "AdjointReport": "adjointlab.verify",
    "AffineOperator": "adjointlab.affine",
    "LeastSquares": "adjointlab.least_squares",
    "LinearOperator": "adjointlab.linear_operator",
    "LinearityReport": "adjointlab.linearity",
    "NotDifferentiableError": "adjointlab.errors",
    "NotLinearError": "adjointlab.errors",
    "Space": "adjointlab.space",
    "SpaceMismatchError": "adjointlab.errors",
    "TensorSpec": "adjointlab.space",
    "affine_operator": "adjointlab.affine",
    "assert_adjoint": "adjointlab.verify",
    "block_diag": "adjointlab.linear_operator",
    "check_adjoint": "adjointlab.verify",
    "check_linearity": "adjointlab.linearity",
    "diagonal": "adjointlab.linear_operator",
    "hstack": "adjointlab.linear_operator",
    "identity": "adjointlab.linear_operator",
    "least_squares_gradient": "adjointlab.least_squares",
    "linear_adjoint": "adjointlab.linear_operator",
    "linear_operator": "adjointlab.linear_operator",
    "operator_norm": "adjointlab.spectral",
    "to_dense": "adjointlab.spectral",
    "vstack": "adjointlab.linear_operator",
}
_SUBMODULES = ("solvers",)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"adjointlab.{name}")
    else:
        raise AttributeError(f"module 'adjointlab' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The package, whose ``linear_operator`` stays the function when the submodule of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
