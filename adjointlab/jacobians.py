"""Jacobians: ``f(x₀ + d) = f(x₀) + J d + o(‖d‖)``, linear operators of functions that are not linear."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab.compat import is_wrapped
from adjointlab.derive import modules_named
from adjointlab.errors import NotDifferentiableError, SpaceMismatchError
from adjointlab.linearity import assess
from adjointlab.modules import buffers_kept
from adjointlab.notation import Notation, name_of
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.space.codomain import space_of
from adjointlab.transpose import Derivation, Eager, Linearization, Options, PullBack, Transposition
from adjointlab.transpose.selfcheck import Sketch


class Jacobian(LinearOperator):
    """The Jacobian J of a function f at a point x₀, and its adjoint; made by :func:`jacobian`."""

    @property
    def _linearization(self) -> Linearization:
        source = self.source
        assert isinstance(source, Linearization)
        return source

    @property
    def function(self) -> Eager:
        """The function f itself, on leaves."""
        pull_back = self._linearization.callable
        return Eager(pull_back.function, pull_back.kwargs, pull_back.domain)

    @property
    def point(self) -> Any:
        """The point ``x₀``: a copy of what was given."""
        pull_back = self._linearization.callable
        return pull_back.domain.unflatten([leaf.clone() for leaf in pull_back.point])

    @property
    def value(self) -> Any:
        """The value ``f(x₀)``, an element of the codomain."""
        return self._linearization.value()

    def at(self, x1: Any) -> Jacobian:
        """Return the Jacobian at another point, without deriving it again.

        Parameters
        ----------
        x1 : pytree of tensors
            An element of the domain.

        Returns
        -------
        Jacobian
            The Jacobian of the same function at x1.

        Raises
        ------
        SpaceMismatchError
            If x1 is not an element of the domain.

        Examples
        --------
        >>> import torch
        >>> J = jacobian(torch.sin, torch.zeros(2))
        >>> J.at(torch.full((2,), torch.pi))(torch.ones(2))
        tensor([-1., -1.])
        """
        source, leaves = self._linearization, self.domain.leaves(x1, "x1")
        space = self.domain.with_batch(leaves[0].shape[: self.domain.batch_dims])
        if space.batch_shape != self.domain.batch_shape:
            return _derived(source.callable.function, source.callable.kwargs, space, leaves, source.options)
        found = source.at(_copied(leaves))
        return self.of_parts(found, _recipe(found), self._parts, side=1, notation=self._body.notation)


def jacobian(
    f: Callable[..., Any],
    x0: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    batch_dims: int = 0,
    engine: str = "auto",
    check: bool = True,
) -> Jacobian:
    r"""Return the Jacobian J of f at x₀: ``f(x₀ + d) = f(x₀) + J d + o(‖d‖)``, with ``⟨J d, v⟩ = ⟨d, Jᴴ v⟩``.

    What depends on x₀ alone is computed once for a point; where there is a graph, neither J nor ``J.H`` runs f again.
    Where f is not holomorphic, as ``|z|²`` is not, J is real-linear, and its adjoint is that for ``Re⟨·, ·⟩``; then
    ``J.is_complex_linear`` is false. Where x₀ or parameters of f require gradients, results can be differentiated with
    respect to them.

    J is the derivative that autograd has of f. Where f has ``.detach()``, ``.item()`` or a backward of its own, that
    may be another one than the derivative of f: ``explain()`` names what hides it, and ``al.check_derivative`` tells.

    Parameters
    ----------
    f : nn.Module or callable
        A differentiable function from tensors, or pytrees of them, to pytrees of tensors. A *tuple* is spread over its
        positional arguments.
    x0 : pytree of tensors
        The point. If f is a module and x₀ a dictionary with names of its parameters, as
        ``dict(f.named_parameters())`` is, J is the Jacobian in these parameters, for the input in ``kwargs``.
    kwargs : dict, optional
        Fixed keyword arguments of f.
    batch_dims : int
        The first ``batch_dims`` dimensions of every leaf count samples, which f treats one by one: J is
        block-diagonal.
    engine : {"auto", "eager", "traced", "compiled"}
        As in :func:`adjointlab.linear_operator`.
    check : bool
        Whether to check J and its adjoint, against autograd and by the dot test.

    Returns
    -------
    Jacobian
        A :class:`LinearOperator` with ``value``, ``point`` and ``at``.

    Raises
    ------
    NotDifferentiableError
        If autograd has no derivative of f, or none twice, or it is not finite at x₀; or x₀ belongs to a transform of
        ``torch.func``, inside of which ``J.at`` serves.
    SpaceMismatchError
        If x₀ is no pytree of tensors, or f does not take it.

    Examples
    --------
    >>> import torch
    >>> J = jacobian(lambda x: x**2, torch.tensor([1.0, 3.0]))
    >>> J.value, J(torch.ones(2)), J.H(torch.ones(2))
    (tensor([1., 9.]), tensor([2., 6.]), tensor([2., 6.]))
    """
    if not callable(f):
        raise SpaceMismatchError(
            f"expected an nn.Module or a function, got {type(f).__name__}: pass the function itself"
        )
    space = Space.of(x0, batch_dims=batch_dims)
    leaves = space.leaves(x0, "x0")
    if any(map(is_wrapped, leaves)):
        raise NotDifferentiableError(
            "expected x0 outside of transforms of torch.func, got a tensor of one: make J before, take J.at(x0) inside"
        )
    function = functools.partial(_with_parameters, f) if isinstance(f, nn.Module) and _are_parameters(f, x0) else f
    return _derived(function, dict(kwargs or {}), space, leaves, _options(engine, check))


def _options(engine: str, check: bool) -> Options:
    return Options(engine, check=check, choose_map=None)  # a sparse matrix takes longer to make than a point is in use


def _are_parameters(module: nn.Module, x0: Any) -> bool:
    """Return whether a point is some parameters or buffers of a module, by their names."""
    return isinstance(x0, dict) and bool(x0) and x0.keys() <= _held(module).keys()


def _held(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def _with_parameters(module: nn.Module, parameters: dict[str, Any], **kwargs: Any) -> Any:
    held = _held(module)
    are_tied = len({id(held[name]) for name in parameters}) == len(parameters)  # else each name has a tensor of its own
    return torch.func.functional_call(module, parameters, (), kwargs, tie_weights=are_tied)


def _derived(f: Any, kwargs: dict[str, Any], space: Space, leaves: Any, options: Options) -> Jacobian:
    eager = Eager(f, kwargs, space)
    with space.without_autocast(), buffers_kept(eager.modules):
        value = eager.called(tuple(leaf.detach() for leaf in leaves))
    codomain = space_of(value, eager.structure, space, None)
    pull_back = PullBack(f, kwargs, space, _copied(leaves))
    with torch.inference_mode(False):
        return _operator(Linearization(pull_back, codomain, options, _require_derivative))


def _copied(leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the leaves of a point of its own, with the gradients of those given, in their usual form in memory."""
    with torch.inference_mode(False):
        return tuple(
            [leaf.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format) for leaf in leaves]
        )


def _operator(source: Linearization) -> Jacobian:
    notation = Notation(meaning=f"the Jacobian of {name_of(source.callable.function)} at a point", letter="J")
    return Jacobian.of_source(source, _recipe(source), modules_named(source), side=1, notation=notation)


def _recipe(source: Linearization) -> Callable[[], tuple[Callable[..., Jacobian], tuple[Any, ...]]]:
    def recipe() -> tuple[Callable[..., Jacobian], tuple[Any, ...]]:
        pull_back, options = source.callable, source.options
        leaves = tuple([leaf.detach().clone() for leaf in pull_back.point])
        chosen = options.requested, options.check
        return _rebuild, (pull_back.function, pull_back.kwargs, pull_back.domain, leaves, chosen)

    return recipe


def _rebuild(f: Any, kwargs: dict[str, Any], space: Space, leaves: Any, options: tuple[str, bool]) -> Jacobian:
    return _derived(f, kwargs, space, leaves, _options(*options))


def _require_derivative(source: Transposition, derivation: Derivation, domain: Space, called: Sketch | None) -> None:
    """Raise unless the derivative at the point is finite, and its adjoint is its own."""
    report = assess(source, derivation, domain=domain, brief=True, called=called)
    seen = report.counterexample
    if seen is not None and seen.law.endswith("finite"):
        raise NotDifferentiableError(
            "expected f to have a derivative at x0, but it is NaN or infinite there: move x0, or mend f where it is "
            "not differentiable (a root at zero, say)"
        )
    evidence = "; ".join(report.evidence)
    if not report.deterministic:
        raise NotDifferentiableError(
            "expected f to return the same at each call and to change nothing: call .eval() on dropout, batch-norm and "
            f"the like [{evidence}]"
        )
    if not report.is_affine or not report.differentiable or report.verdict == "refuted":
        raise NotDifferentiableError(
            "expected a backward of f that is linear and can itself be differentiated, as J is the adjoint of J.H: "
            f"write it with differentiable operations [{evidence}]"
        )
