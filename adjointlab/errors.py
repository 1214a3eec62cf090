"""The errors of adjointlab: each message says what was expected, what came, and the remedy."""


class SpaceMismatchError(ValueError):
    """Something is not an element of the space at hand, or two spaces do not fit.

    Raised for another structure, shape, dtype or device, for integers, ``None`` and empty domains, and by the algebra
    of operators whose domains and codomains do not match.
    """


class NotLinearError(ValueError):
    """A map that should be linear is not: ``f(αx + βz) ≠ α f(x) + β f(z)`` for some x and z.

    The message carries what was seen (an offset, randomness, state, the ops that read the input) and what to do.
    """


class NotDifferentiableError(RuntimeError):
    """Autograd has no derivative of the map, or its derivative is not the map's own.

    Raised where the output is detached from the input, wholly or in part, or a custom backward is wrong.
    """


class AdjointMismatchError(AssertionError):
    """A claimed adjoint B of A fails ``⟨Ax, y⟩ = ⟨x, By⟩`` beyond rounding; the message is the whole report."""
