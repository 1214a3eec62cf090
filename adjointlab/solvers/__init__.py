"""Solvers for ``Ax = b``, ``min ‖Ax − y‖² + damp² ‖x‖²``, ``min ‖f(x) − y‖²`` and ``min F(x) + g(Lx)``."""

from adjointlab.solvers.bidiagonalization import lsmr
from adjointlab.solvers.conjugate_gradients import cg
from adjointlab.solvers.nonlinear import gauss_newton, levenberg_marquardt
from adjointlab.solvers.normal_equations import cgls
from adjointlab.solvers.primal_dual import pdhg
from adjointlab.solvers.projected import projected_gradient
from adjointlab.solvers.proximal import fista
from adjointlab.solvers.solution import Info, Solution
from adjointlab.solvers.subsets import saga, sgd, svrg

__all__ = [
    "Info", "Solution", "cg", "cgls", "fista", "gauss_newton", "levenberg_marquardt", "lsmr", "pdhg",
    "projected_gradient", "saga", "sgd", "svrg",
]  # fmt: skip
