"""deepinv: an operator as a ``LinearPhysics`` with a derived adjoint, and a linear physics as an operator."""

from __future__ import annotations

from typing import Any

import torch
from deepinv.physics import LinearPhysics
from deepinv.utils import TensorList
from torch import Tensor

from adjointlab.derive import linear_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.tree import tree_flatten
from adjointlab.weighted import without_weights


class _Physics(LinearPhysics):  # type: ignore[misc]
    """A linear physics whose ``A_adjoint`` is ``A.H``."""

    def __init__(self, A: LinearOperator, **options: Any) -> None:
        spec = A.domain.specs[0]
        size = tuple(spec.shape[1:])
        super().__init__(
            img_size=(2, *size) if _in_pairs(A) and spec.is_complex else size, device=spec.device, **options
        )
        self.operator = without_weights(A)
        self._with_parameters: list[tuple[int, dict[str, Any], LinearOperator]] = []

    def A(self, x: Any, **parameters: Any) -> Any:
        A = self._operator(x, parameters)
        return _apply(A, x)

    def A_adjoint(self, y: Any, **parameters: Any) -> Any:
        A = self._operator(y, parameters)
        return _apply(A.H, y)

    def A_vjp(self, x: Any, v: Any) -> Any:
        return self.A_adjoint(v)

    def _operator(self, x: Any, parameters: dict[str, Any]) -> LinearOperator:
        """Return the operator for keyword parameters of the forward; operators for recent parameters are kept."""
        if not parameters:
            return self.operator
        samples = tree_flatten(x)[0][0].shape[0]  # a parameter may have one entry per sample
        for number, known, operator in self._with_parameters:
            same = known.keys() == parameters.keys() and all(known[name] is parameters[name] for name in known)
            if number == samples and same:
                return operator
        source = self.operator.source
        if source is None or self.operator._side:
            raise SpaceMismatchError(
                f"expected an operator made by al.linear_operator for the parameters {sorted(parameters)}, got one "
                "that is built from others: their forwards take no parameters"
            )
        domain = source.domain
        if domain.batch_dims == 1:
            domain = domain.with_batch((samples,)).with_batch_dims(0)
        kwargs = {**source.kwargs, **parameters}
        operator = linear_operator(
            source.callable, domain, batch_dims=domain.batch_dims, kwargs=kwargs, engine=source.options.requested
        )
        self._with_parameters = [*self._with_parameters[-7:], (samples, parameters, operator)]
        return operator


def _in_pairs(A: LinearOperator) -> bool:
    """Return whether complex tensors are pairs of real ones: if the other side is real, ``⟨·, ·⟩`` is no use there."""
    return len({spec.is_complex for spec in (*A.domain.specs, *A.codomain.specs)}) == 2


def _apply(A: LinearOperator, x: Any) -> Any:
    """Apply an operator to a tensor or TensorList from deepinv, for any number of samples."""
    source, target, in_pairs = A.domain, A.codomain, _in_pairs(A)

    def images(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        if in_pairs:
            pairs = zip(leaves, source.specs, strict=True)
            leaves = [torch.complex(*t.unbind(1)) if s.is_complex and not t.is_complex() else t for t, s in pairs]
        found = target.leaves(A(source.unflatten(leaves)))
        return tuple(torch.stack([t.real, t.imag], 1) if in_pairs and t.is_complex() else t for t in found)

    leaves = tree_flatten(x)[0]
    samples, own = leaves[0].shape[0], source.specs[0].shape[0]
    if source.batch_dims or samples == own:
        return _to_deepinv_data(images(leaves))
    if own != 1:
        raise SpaceMismatchError(
            f"expected {own} samples, got {samples}: build the operator with batch_dims=1, which leaves the number free"
        )
    each = [images([leaf[i : i + 1] for leaf in leaves]) for i in range(samples)]
    return _to_deepinv_data(tuple(torch.cat(parts) for parts in zip(*each, strict=True)))


def _to_deepinv_data(leaves: tuple[Tensor, ...]) -> Any:
    return leaves[0] if len(leaves) == 1 else TensorList(list(leaves))


def to_deepinv(A: LinearOperator, **options: Any) -> Any:
    """Return A as a deepinv ``LinearPhysics`` whose ``A_adjoint`` is the derived ``Aᴴ``.

    Parameters
    ----------
    A : LinearOperator
        An operator on batches of images ``(B, C, …)``; one that was built for one sample is applied to one at a time.
    **options
        Options of ``LinearPhysics``: ``noise_model``, ``max_iter``, ``tol``, ``solver`` …

    Returns
    -------
    deepinv.physics.LinearPhysics
        The physics. Several outputs become a ``TensorList``; keyword parameters, as in ``physics.A(x, mask=…)``, are
        those of the forward from which A was built.

    Notes
    -----
    deepinv tests adjoints and solves by the complex inner product. For a map between real images and complex data it
    would be wrong, since its adjoint is that for ``Re⟨·, ·⟩``. There, what is complex is given and taken as pairs of
    real numbers in dimension 1, ``(B, 2, C, …)``, as in deepinv's own magnetic resonance imaging.

    Raises
    ------
    SpaceMismatchError
        At a call, if the number of samples does not match the operator.

    Examples
    --------
    >>> A = linear_operator(torch.nn.AvgPool2d(2), (1, 1, 8, 8), batch_dims=1)
    >>> physics = to_deepinv(A)
    >>> physics.A_adjoint(physics.A(torch.ones(3, 1, 8, 8))).shape
    torch.Size([3, 1, 8, 8])
    """
    return _Physics(A, **options)


def from_deepinv(physics: Any, domain: Any, *, batch_dims: int = 1, **parameters: Any) -> LinearOperator:
    """Return the operator of a deepinv linear physics, ``x ↦ physics.A(x)``, with a derived adjoint.

    Parameters
    ----------
    physics : deepinv.physics.LinearPhysics
        The physics. Its noise and sensor models are ignored.
    domain : Tensor, tuple of int, TensorSpec, Space or pytree of these
        The space of images, with the batch dimension first: ``(1, C, …)``.
    batch_dims : int
        1 if the number of samples is free; 0 if it is fixed to the number in ``domain``.
    **parameters
        Keyword parameters of ``physics.A``.

    Returns
    -------
    LinearOperator
        The operator. Its adjoint is derived without ``physics.A_adjoint``, so the two can be compared.

    Raises
    ------
    NotLinearError, NotDifferentiableError, SpaceMismatchError
        As :func:`adjointlab.linear_operator` does.

    Examples
    --------
    >>> import deepinv
    >>> A = from_deepinv(deepinv.physics.Decolorize(), (1, 3, 4, 4))
    >>> A.H(torch.ones(2, 1, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """
    return linear_operator(physics.A, domain, batch_dims=batch_dims, kwargs=parameters or None)


__all__ = ["from_deepinv", "to_deepinv"]
