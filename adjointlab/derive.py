"""From a module or function to a linear operator with its derived adjoint: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack, overload

from torch import Tensor, nn

from adjointlab.errors import NotDifferentiableError, NotLinearError, SpaceMismatchError
from adjointlab.linearity import assess, like_parameters, require_map
from adjointlab.notation import name_of
from adjointlab.operators import LinearOperator, Map, Recipe
from adjointlab.space import Space
from adjointlab.space.selection import Selection
from adjointlab.space.spec import OfContainer, OfDict, OfPair, OfTensor
from adjointlab.transpose import Derivation, Options, Selected, Transposition
from adjointlab.transpose.selfcheck import Sketch
from adjointlab.typed import E, Y
from adjointlab.weighted import in_spaces

_IN_WORDS = {"_local_scalar_dense": "a number taken out of it (by an if, float() or .item())"}


class BuildOptions(TypedDict, total=False):
    """The options of :func:`linear_operator` and :func:`adjointlab.affine_operator`, for type checkers."""

    batch_dims: int
    kwargs: dict[str, Any] | None
    engine: str
    check: bool
    lowering: bool
    autotune: bool
    derivative: str
    tol: float | None
    budget: float
    progress: bool | None
    codomain: Any


@overload
def linear_operator(
    module_or_function: Callable[[Tensor, Tensor], Y], domain: OfPair, **options: Unpack[BuildOptions]
) -> LinearOperator[tuple[Tensor, Tensor], Y]: ...


@overload
def linear_operator(
    module_or_function: nn.Module, domain: OfTensor, **options: Unpack[BuildOptions]
) -> LinearOperator[Tensor, Tensor]: ...


@overload
def linear_operator(
    module_or_function: Callable[[Tensor], Y], domain: OfTensor, **options: Unpack[BuildOptions]
) -> LinearOperator[Tensor, Y]: ...


@overload
def linear_operator(
    module_or_function: Callable[[dict[str, Tensor]], Y], domain: OfDict, **options: Unpack[BuildOptions]
) -> LinearOperator[dict[str, Tensor], Y]: ...


@overload
def linear_operator(
    module_or_function: Callable[..., Y], domain: Space[E] | E, **options: Unpack[BuildOptions]
) -> LinearOperator[E, Y]: ...


@overload
def linear_operator(
    module_or_function: Callable[..., Y], domain: OfContainer, **options: Unpack[BuildOptions]
) -> LinearOperator[Any, Y]: ...


def linear_operator(
    module_or_function: Callable[..., Any],
    domain: Any,
    *,
    batch_dims: int = 0,
    kwargs: dict[str, Any] | None = None,
    engine: str = "auto",
    check: bool = True,
    lowering: bool = True,
    autotune: bool = False,
    derivative: str = "autograd",
    tol: float | None = None,
    budget: float = 20.0,
    progress: bool | None = None,
    codomain: Any = None,
) -> LinearOperator[Any, Any]:
    r"""Return the linear operator A of a module or function, with its derived adjoint: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``.

    The adjoint is the vector-Jacobian product of the forward; where that can be traced, no forward is in it.

    Parameters
    ----------
    module_or_function : nn.Module or callable
        A linear map from elements of the domain, a *tuple* being spread over its positional arguments, to pytrees.
    domain : Tensor, tuple of int, TensorSpec, Space or pytree of these
        An example (values are ignored), or a shape: dtype and device are then those of the module's parameters, else
        torch's defaults.
    batch_dims : int
        The first ``batch_dims`` dimensions of every leaf may change size from call to call.
    kwargs : dict, optional
        Fixed keyword arguments of the forward.
    engine : {"auto", "eager", "traced", "compiled"}
        ``"eager"`` is the plain VJP at every call, the reference; ``"traced"`` the graph without a forward;
        ``"compiled"`` that graph through ``torch.compile``; ``"auto"`` traces, and falls back to eager with a reason.
    check : bool
        Whether to check that the map is linear, and that the derived functions are the map and its adjoint.
    lowering : bool
        Whether convolutions may run on the fastest equal kernel.
    autotune : bool
        Whether to choose that kernel by a thorough measurement.
    derivative : {"autograd", "forward"}
        ``"autograd"`` takes autograd's derivative; ``"forward"`` takes that of the operations of the forward, through
        custom backwards and ``.detach()`` alike.
    tol : float, optional
        The relative accuracy to judge by, for maps that compute in lower precision inside.
    budget : float
        Seconds that a build by tracing may be expected to take; of a forward with more operations than that (100 of
        them take a second), the adjoint is autograd's, and ``explain()`` says so. It is for ``engine="auto"`` alone.
    progress : bool, optional
        Whether builds show a line on standard error with their progress; by default on a terminal, after two seconds.
    codomain : Space or what describes one, optional
        What the map returns, for the weight of that space (:meth:`Space.of`); found by a call if not given.

    Returns
    -------
    LinearOperator
        The operator; ``A.H`` is its adjoint.

    Raises
    ------
    NotLinearError
        If the map is not linear.
    NotDifferentiableError
        If autograd's derivative is not the map's own, as for a detached forward.
    SpaceMismatchError
        If the domain is none, or does not fit the map, or the codomain is not that of its results.

    Examples
    --------
    >>> import torch
    >>> c = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)
    >>> A = linear_operator(c, (1, 1, 8, 8))
    >>> x, y = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    >>> A.H(A(x) - y).shape
    torch.Size([1, 1, 8, 8])
    """
    options = Options(engine, False, lowering, autotune, derivative, tol, check, budget, progress)
    space = space_for(module_or_function, domain, batch_dims)
    source = Transposition(module_or_function, space.plain, kwargs, options, judge=require_linear)
    A = from_source(source, lambda: (_rebuild, (module_or_function, source.domain, options_of(source))))
    return in_spaces(A, space, weighted_codomain(A, codomain))


def space_for(function: Callable[..., Any], domain: Any, batch_dims: int) -> Space:
    """Return the domain of a map; raise if one of both is none."""
    require_map(function)
    return like_parameters(function, domain, batch_dims)


def weighted_codomain(A: LinearOperator, codomain: Any) -> Space:
    """Return the codomain of an operator with the weight of the one that was given, or raise if that does not fit."""
    found, spec = A.codomain, A.codomain.specs[0]
    if codomain is None:
        return found
    given = Space.of(codomain, dtype=spec.dtype, device=spec.device).with_batch_dims(found.batch_dims)
    if given.plain != found:
        raise SpaceMismatchError(f"expected the codomain {found} of what the map returns, got {given}: leave it out")
    return given


def options_of(source: Transposition) -> dict[str, Any]:
    """Return the options that make the same operator again, as they are now."""
    options = source.options
    return {
        "batch_dims": source.domain.batch_dims, "kwargs": source.kwargs, "engine": options.requested,
        "lowering": options.lowering, "autotune": options.autotune, "derivative": options.derivative,
        "tol": options.tol, "check": options.check, "budget": options.budget, "progress": options.progress,
    }  # fmt: skip


def from_source(source: Transposition, recipe: Recipe) -> LinearOperator:
    """Return the linear operator, or the linear part, of a map that is already derived."""

    def rows(selection: Selection) -> LinearOperator:
        make, (function, *rest) = recipe() if callable(recipe) else recipe
        part: LinearOperator = make(Selected(function, selection), *rest)
        return part

    return LinearOperator.of_source(source, recipe, modules_named(source), rows=rows)


def modules_named(source: Transposition) -> dict[str, nn.Module]:
    """Return the modules of a map by the names under which its operator has them."""
    modules, function = source.modules, source.callable
    while isinstance(function, Selected):
        function = function.__wrapped__
    single = len(modules) == 1 and modules[0] is function
    names = ["module"] if single else [f"module_{index}" for index in range(len(modules))]
    return dict(zip(names, modules, strict=True))


def _rebuild(function: Callable[..., Any], domain: Space, options: dict[str, Any]) -> LinearOperator:
    return linear_operator(function, domain, **options)


def require_linear(source: Transposition, derivation: Derivation, domain: Space, called: Sketch | None) -> None:
    """Raise unless a map is linear and autograd can differentiate it; the message says how to repair it."""
    report, offset_allowed = assess(source, derivation, domain=domain, brief=True, called=called), source.options.affine
    kind = "an affine" if offset_allowed else "a linear"
    is_module = isinstance(source.callable, nn.Module)
    name = type(source.callable).__name__ if is_module else name_of(source.callable)
    seen = report.counterexample
    if not report.is_affine:
        at_a_point = "or use its derivative at a point x0, which is linear: al.jacobian(f, x0)"
        evidence = "; ".join([*([str(seen)] if seen else []), *report.evidence])
        if seen is not None and seen.law.endswith("finite"):
            advice = "it returned NaN or infinity for finite input: look for a division by zero, or at its parameters"
        elif not report.deterministic:
            advice = "its result is random or changes its state: call .eval() on dropout, batch-norm and the like"
        elif report.reads_input:
            reads = ", ".join(_IN_WORDS.get(op, op) for op in report.reads_input)
            advice = f"its derivative depends on the input through {reads}: take that out, {at_a_point}"
        else:
            advice = f"take out the part that is not linear, {at_a_point}"
        raise NotLinearError(f"expected {kind} map, but {name} is not: {advice} [{evidence}]")
    if report.verdict == "refuted" and not offset_allowed:
        raise NotLinearError(
            f"expected a linear map, but {name} has an offset, as a bias is: ‖f(0)‖ = {report.offset:.3g}; use "
            "al.affine_operator, whose .linear is the linear part, or set bias=False"
        )
    if not report.differentiable:
        hidden = (
            " and ".join(derivation.explanation.hidden)
            or "something (.detach(), .data, torch.no_grad(), a custom backward, an assignment to indices that repeat)"
        )
        raise NotDifferentiableError(
            f"expected autograd's derivative of {name} to be the map itself, but the dot test fails: {hidden} hides it "
            'from autograd; take that out, or choose derivative="forward" to have the adjoint of what the forward '
            f"computes [{'; '.join(report.evidence)}]"
        )


@overload
def linear_adjoint(f: Callable[[Tensor], Y], example: OfTensor, /) -> Callable[[Y], Tensor]: ...


@overload
def linear_adjoint(
    f: Callable[[Tensor, Tensor], Y], first: OfTensor, second: OfTensor, /
) -> Callable[[Y], tuple[Tensor, Tensor]]: ...


@overload
def linear_adjoint(f: Callable[..., Y], *example: OfContainer) -> Callable[[Y], Any]: ...


def linear_adjoint(f: Callable[..., Any], *example: Any) -> Map:
    """Return ``v ↦ Aᴴv`` for the linear function f: the Hermitian twin of ``jax.linear_transpose``.

    Parameters
    ----------
    f : callable
        A linear function.
    *example : pytree of tensors, shapes or TensorSpec
        Examples of its arguments; values are ignored.

    Returns
    -------
    callable
        From the space of ``f(*example)`` to that of the argument, or of the tuple of arguments where there are several.

    Raises
    ------
    NotLinearError, NotDifferentiableError, SpaceMismatchError
        As :func:`linear_operator` does.

    Examples
    --------
    >>> import torch
    >>> back = linear_adjoint(lambda x: x[1:] - x[:-1], torch.zeros(4))
    >>> back(torch.tensor([1.0, 0.0, 0.0]))
    tensor([-1.,  1.,  0.,  0.])
    """
    return linear_operator(f, example[0] if len(example) == 1 else example).H
