"""Differentiable solvers for ``Ax = b``, ``min ‖Ax − y‖² + damp² ‖x‖²`` and ``min ‖f(x) − y‖²``, on any device."""

from adjointlab.solvers.bidiagonalization import lsmr
from adjointlab.solvers.conjugate_gradients import cg, cgls
from adjointlab.solvers.nonlinear import gauss_newton, levenberg_marquardt
from adjointlab.solvers.solution import Info, Solution
from adjointlab.solvers.subsets import saga, sgd, svrg

__all__ = ["Info", "Solution", "cg", "cgls", "gauss_newton", "levenberg_marquardt", "lsmr", "saga", "sgd", "svrg"]
