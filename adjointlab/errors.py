"""The errors and warnings of adjointlab. Each message states the expectation, the value received, and the remedy."""

from __future__ import annotations


class SpaceMismatchError(ValueError):
    """A value is not an element of the expected space, or two spaces do not match.

    Operators and spaces raise it for a wrong structure, shape, dtype or device, for integers, ``None`` and empty
    domains. The algebra of operators raises it if domains and codomains do not match.
    """


class NotLinearError(ValueError):
    """A map that should be linear is not: ``f(αx + βz) ≠ α f(x) + β f(z)`` for some x and z.

    The message states the evidence (an offset, randomness, state, ops that read the input) and the remedy.
    """

    def of_change(self) -> NotLinearError:
        """Return the error of a map that was linear when it was checked."""
        return NotLinearError(
            "expected the map that was checked, but it has changed, and is not linear any more; undo the change: "
            f"{self}"
        )


class NotDifferentiableError(RuntimeError):
    """Autograd has no derivative of the map, or a wrong one.

    This happens if the output is detached from the input, wholly or in part, or if a custom backward is wrong.
    """


class NotExportableError(RuntimeError):
    """A map has no program that runs by PyTorch alone, or none for every size asked for; the message says why."""


class AdjointMismatchError(AssertionError):
    """A claimed adjoint B of A fails ``⟨Ax, y⟩ = ⟨x, By⟩`` beyond rounding; the message begins with the diagnosis.

    So does a Jacobian that fails ``f(x₀ + h d) = f(x₀) + h J d + O(h²)``.
    """


class ConvergenceWarning(RuntimeWarning):
    """An iteration has ended before its tolerance; the message says how far it has come, and what to raise."""


# Functions raise these for arguments that do not fit them. Others, a NameError say, are faults of the function itself.
_OF_ARGUMENTS = RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, Warning


def remedy_of(error: Exception, remedy: str) -> str:
    """Return what to do about an error of a user's function: a remedy, if the argument may be to blame."""
    return remedy if isinstance(error, _OF_ARGUMENTS) else "mend the function, whose traceback is above"
