"""Krylov solvers: ``Ax = b`` and ``min ‖Ax − y‖² + damp² ‖x‖²``, on any device, differentiable."""

from adjointlab.solvers.bidiagonalization import lsmr
from adjointlab.solvers.conjugate_gradients import cg, cgls
from adjointlab.solvers.solution import Solution

__all__ = ["Solution", "cg", "cgls", "lsmr"]
