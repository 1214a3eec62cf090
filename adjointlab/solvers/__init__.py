"""Differentiable Krylov solvers for ``Ax = b`` and ``min ‖Ax − y‖² + damp² ‖x‖²``, on any device."""

from adjointlab.solvers.bidiagonalization import lsmr
from adjointlab.solvers.conjugate_gradients import cg, cgls
from adjointlab.solvers.solution import Solution

__all__ = ["Solution", "cg", "cgls", "lsmr"]
