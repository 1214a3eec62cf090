"""The adjoint of any linear PyTorch module, exactly, without writing it: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adjointlab import precondition, prox, solvers
    from adjointlab.affine import AffineOperator, affine_operator
    from adjointlab.blocks import block_diag, diagonal, hstack, identity, vstack
    from adjointlab.derive import linear_adjoint, linear_operator
    from adjointlab.differences import finite_differences, laplacian
    from adjointlab.errors import (
        AdjointMismatchError,
        ConvergenceWarning,
        NotDifferentiableError,
        NotExportableError,
        NotLinearError,
        SpaceMismatchError,
    )
    from adjointlab.exporting import export
    from adjointlab.jacobians import Jacobian, jacobian
    from adjointlab.least_squares import LeastSquares, least_squares_gradient
    from adjointlab.lifted import complexify, kron, map
    from adjointlab.linearity import LinearityReport, check_linearity
    from adjointlab.matrices import matrix
    from adjointlab.operators import LinearOperator
    from adjointlab.pair import from_pair
    from adjointlab.recurrences import recurrence
    from adjointlab.space import Space, TensorSpec
    from adjointlab.spectral import operator_norm, to_dense
    from adjointlab.verify import (
        AdjointReport,
        DerivativeReport,
        assert_adjoint,
        assert_derivative,
        check_adjoint,
        check_derivative,
    )  # fmt: skip

    __version__: str

# Where each name is defined. They are imported when they are first used, so that what needs no torch loads none: pytest
# imports the plugin in every project that has adjointlab installed.
_HOME = {
    name: f"adjointlab.{module}"
    for module, names in {
        "affine": ("AffineOperator", "affine_operator"),
        "blocks": ("block_diag", "diagonal", "hstack", "identity", "vstack"),
        "derive": ("linear_adjoint", "linear_operator"),
        "differences": ("finite_differences", "laplacian"),
        "errors": (
            "AdjointMismatchError",
            "ConvergenceWarning",
            "NotDifferentiableError",
            "NotExportableError",
            "NotLinearError",
            "SpaceMismatchError",
        ),
        "exporting": ("export",),
        "jacobians": ("Jacobian", "jacobian"),
        "least_squares": ("LeastSquares", "least_squares_gradient"),
        "lifted": ("complexify", "kron", "map"),
        "matrices": ("matrix",),
        "linearity": ("LinearityReport", "check_linearity"),
        "operators": ("LinearOperator",),
        "pair": ("from_pair",),
        "recurrences": ("recurrence",),
        "space": ("Space", "TensorSpec"),
        "spectral": ("operator_norm", "to_dense"),
        "verify": (
            "AdjointReport",
            "DerivativeReport",
            "assert_adjoint",
            "assert_derivative",
            "check_adjoint",
            "check_derivative",
        ),
    }.items()
    for name in names
}


if not TYPE_CHECKING:  # which is to know the names that there are, and no others

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(_HOME[name]), name)
        elif name in {"precondition", "prox", "solvers"}:
            value = import_module(f"adjointlab.{name}")
        elif name == "__version__":
            value = _version()
        else:
            raise AttributeError(f"module 'adjointlab' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("adjointlab")
    except PackageNotFoundError:
        raise AttributeError("adjointlab has no __version__: it is imported, but not installed") from None


__all__ = [
    "AdjointMismatchError", "AdjointReport", "AffineOperator", "ConvergenceWarning", "DerivativeReport", "Jacobian",
    "LeastSquares", "LinearOperator", "LinearityReport", "NotDifferentiableError", "NotExportableError",
    "NotLinearError", "Space", "SpaceMismatchError", "TensorSpec", "affine_operator", "assert_adjoint",
    "assert_derivative", "block_diag", "check_adjoint", "check_derivative", "check_linearity", "complexify", "diagonal",
    "export", "finite_differences", "from_pair", "hstack", "identity", "jacobian", "kron", "laplacian",
    "least_squares_gradient", "linear_adjoint", "linear_operator", "map", "matrix", "operator_norm", "precondition",
    "prox", "recurrence", "solvers", "to_dense", "vstack",
]  # fmt: skip
