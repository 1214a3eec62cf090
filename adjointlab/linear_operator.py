"""Linear operators and their algebra: ``(AB)ᴴ = BᴴAᴴ``, ``(A + B)ᴴ = Aᴴ + Bᴴ``, ``(cA)ᴴ = c̄Aᴴ``."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adjointlab.errors import NotDifferentiableError, NotLinearError, SpaceMismatchError
from adjointlab.linearity import LinearityReport, assess, like_parameters
from adjointlab.space import Space, TensorSpec, tree_flatten
from adjointlab.transpose import Transposition

Map = Callable[[Any], Any]
Recipe = tuple[Callable[..., Any], tuple[Any, ...]]  # what makes the operator again, for copies and pickles


@dataclass
class _Body:
    """What A and Aᴴ share: two functions, two spaces, where they come from, and the operators made of them."""

    functions: tuple[Map, Map]
    spaces: tuple[Space, Space]
    source: Transposition | None = None
    views: list[LinearOperator | None] = field(default_factory=lambda: [None, None])
    transposes: list[LinearOperator | None] = field(default_factory=lambda: [None, None])


class LinearOperator(nn.Module):
    r"""A linear map A between two spaces together with its adjoint: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``.

    Made by :func:`linear_operator` from a module or function, by the algebra of operators, or from a pair of functions
    that are known to be adjoint to each other, which nothing here checks (:func:`adjointlab.check_adjoint` does).

    Parameters
    ----------
    function, adjoint_function : callable
        ``x ↦ Ax`` and ``y ↦ Aᴴy`` on elements of the spaces.
    domain, codomain : Space
        Where x and y live.

    Examples
    --------
    >>> import torch
    >>> A = linear_operator(torch.nn.Conv1d(1, 1, 3, bias=False), (1, 1, 8))
    >>> x, y = A.domain.randn(), A.codomain.randn()
    >>> bool(abs(A.codomain.inner(A(x), y) - A.domain.inner(x, A.H(y))) < 1e-5)
    True
    """

    _body: _Body
    _side: int
    _recipe: Recipe

    def __init__(self, function: Map, adjoint_function: Map, domain: Space, codomain: Space) -> None:
        super().__init__()
        recipe = (LinearOperator, (function, adjoint_function, domain, codomain))
        self._set(_Body((function, adjoint_function), (domain, codomain)), 0, recipe, {})

    def _set(self, body: _Body, side: int, recipe: Recipe, parts: dict[str, nn.Module]) -> None:
        # The body is no submodule: A and Aᴴ know each other through it, and a module tree has no cycles.
        self._body = body
        self._side = side
        self._recipe = recipe
        body.views[side] = self
        for name, part in parts.items():
            self.add_module(name, part)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def domain(self) -> Space:
        """The space of x in ``Ax``."""
        return self._body.spaces[self._side]

    @property
    def codomain(self) -> Space:
        """The space of ``Ax``."""
        return self._body.spaces[1 - self._side]

    def forward(self, x: Any) -> Any:
        """Return ``Ax``.

        Returns
        -------
        pytree of tensors
            An element of the codomain.

        Raises
        ------
        SpaceMismatchError
            If x is not an element of the domain; nothing is cast or broadcast.
        """
        if self._body.source is None:
            self.domain.check(x)
        return self._body.functions[self._side](x)

    @property
    def H(self) -> LinearOperator:
        """The adjoint ``Aᴴ``: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩`` (for the real part, where A is only real-linear)."""
        twin = self._body.views[1 - self._side]
        if twin is None:
            twin = LinearOperator.__new__(LinearOperator)
            nn.Module.__init__(twin)
            twin._set(self._body, 1 - self._side, (_adjoint_of, (self,)), dict(self.named_children()))
        return twin

    @property
    def T(self) -> LinearOperator:
        """The transpose ``conj ∘ Aᴴ ∘ conj``: ``Σ (Ax)ᵢ yᵢ = Σ xᵢ (Aᵀy)ᵢ``."""
        twin = self._body.transposes[self._side]
        if twin is None:
            twin = self._body.transposes[self._side] = _transpose(self)
            twin._body.transposes[0] = self
        return twin

    @property
    def gram(self) -> LinearOperator:
        """The self-adjoint, positive semi-definite ``AᴴA``."""
        return _compose(self.H, self)

    @property
    def is_complex_linear(self) -> bool:
        """Whether ``A(ix) = iA(x)``; trivially so between real spaces, never between a real and a complex one."""
        specs = (*self.domain.specs, *self.codomain.specs)
        if not any(spec.is_complex for spec in specs):
            return True
        if not all(spec.is_complex for spec in specs):
            return False
        with torch.no_grad():
            x = self.domain.randn(torch.Generator().manual_seed(0))
            left, right = self(_scaled(1j, x)), _scaled(1j, self(x))
            gap = self.codomain.norm(_added(left, _scaled(-1, right)))
            return bool(gap <= 1e-2 * self.codomain.norm(left))  # a map that is only real-linear differs by order one

    @property
    def engine(self) -> str:
        """Which engine is in force: ``"eager"``, ``"traced"`` or ``"compiled"``; for a sum or product, its slowest."""
        if self._body.source is not None:
            return self._body.source.account.engine
        engines = {part.engine for part in self.children() if isinstance(part, LinearOperator)}
        return next((name for name in ("eager", "traced", "compiled") if name in engines), "eager")

    def compile(self, *, autotune: bool = False, **options: Any) -> LinearOperator:  # type: ignore[override]
        """Switch A and ``A.H`` to the compiled engine in place, and return A.

        Parameters
        ----------
        autotune : bool
            Whether to choose convolution kernels by a thorough measurement.
        **options
            For ``torch.compile``.

        Returns
        -------
        LinearOperator
            A itself; where compilation is not possible, ``A.explain()`` says why, and the engine stays as it was.
        """
        if self._body.source is not None:
            self._body.source.switch("compiled", autotune=autotune, options=options)
        for part in self.children():
            if isinstance(part, LinearOperator):
                part.compile(autotune=autotune, **options)
        return self

    def explain(self) -> str:
        """Return a readable account: the derived adjoint as a program, what was removed, kernels, evidence, reasons."""
        head = f"LinearOperator: {self.domain} → {self.codomain}"
        if self._body.source is not None:
            return f"{head}\n{self._body.source.account}"
        parts = [part for part in self.children() if isinstance(part, LinearOperator)]
        if not parts:
            return f"{head}\ngiven as a pair of functions"
        inner = "\n".join(f"[{index}] {part.explain()}" for index, part in enumerate(parts))
        return f"{head}\nbuilt from {len(parts)} operators:\n{inner}"

    def extra_repr(self) -> str:
        """Return what ``print(A)`` says besides the submodules."""
        return f"{self.domain} → {self.codomain}"

    # -- algebra -----------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        return _compose(self, other) if isinstance(other, LinearOperator) else self(other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return _add(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return _add(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return _scale_output(-1, self)

    def __rmul__(self, scalar: Any) -> LinearOperator:
        return _scale_output(scalar, self) if _is_scalar(scalar) else NotImplemented

    def __mul__(self, scalar: Any) -> LinearOperator:
        return _scale_input(self, scalar) if _is_scalar(scalar) else NotImplemented

    def __truediv__(self, scalar: Any) -> LinearOperator:
        return _scale_output(1 / scalar, self) if _is_scalar(scalar) else NotImplemented

    # -- being a module ----------------------------------------------------------------------------------------------

    def residual_and_gradient(self, x: Any, y: Any, weight: Any) -> tuple[Any, Any] | None:
        """Return ``Ax − y`` and ``Aᴴ w ⊙ (Ax − y)`` from one graph, where A itself is derived; else None."""
        source = self._body.source
        return None if source is None or self._side else source.residual_and_gradient(x, y, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearOperator:
        """Move parameters, buffers and spaces together: what ``.to``, ``.double`` and ``.cuda`` call."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        body = self._body
        if body.source is not None:
            domain = _moved(body.source.domain, fn)
            if domain.specs != body.source.domain.specs:
                body.source.rebase(domain)
            body.spaces = (body.source.domain, body.source.codomain)
        else:
            body.spaces = tuple(_moved(space, fn) for space in body.spaces)  # type: ignore[assignment]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._recipe


def _moved(space: Space, fn: Callable[[Tensor], Tensor]) -> Space:
    def move(spec: TensorSpec) -> TensorSpec:
        probe = fn(torch.empty(0, dtype=spec.dtype, device=spec.device))
        return TensorSpec(spec.shape, probe.dtype, probe.device)

    return Space(tuple(map(move, space.specs)), space.structure, space.batch_dims)


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
) -> LinearOperator:
    r"""Return the linear operator A of a module or function, with its derived adjoint: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``.

    The adjoint is the vector-Jacobian product of the forward, which for a linear map does not depend on where it is
    taken. Where the forward can be traced, it runs without the forward in it.

    Parameters
    ----------
    module_or_function : nn.Module or callable
        A linear map. It takes an element of the domain: a *tuple* is spread over its positional arguments, any other
        pytree is passed as it is. It may return any pytree of tensors.
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
        Whether to check linearity, and the derived adjoint against the eager one, now. Without it the second is done
        at the first call.
    lowering : bool
        Whether convolutions may run on the fastest equal kernel.
    autotune : bool
        Whether to choose that kernel by a thorough measurement.

    Returns
    -------
    LinearOperator
        The operator; ``A.H`` is its adjoint.

    Raises
    ------
    NotLinearError
        If the map is not linear; the message says what was seen and what to do.
    NotDifferentiableError
        If autograd's derivative is not the map's own, as for a detached forward.
    SpaceMismatchError
        If the domain is none, or does not fit the map.

    Examples
    --------
    >>> import torch
    >>> c = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)
    >>> A = linear_operator(c, (1, 1, 8, 8))
    >>> x, y = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    >>> A.H(A(x) - y).shape
    torch.Size([1, 1, 8, 8])
    """
    if not callable(module_or_function):
        raise SpaceMismatchError(
            f"expected an nn.Module or a function, got {type(module_or_function).__name__}: pass the map itself"
        )
    space = like_parameters(module_or_function, domain, batch_dims)
    source = Transposition(module_or_function, space, kwargs, engine, lowering=lowering, autotune=autotune)
    if check:
        require_linear(assess(source), source)
    options = {
        "batch_dims": batch_dims,
        "kwargs": kwargs,
        "engine": engine,
        "lowering": lowering,
        "autotune": autotune,
    }
    recipe = (_rebuild, (module_or_function, source.domain, options))
    return from_source(source, recipe)


def from_source(source: Transposition, recipe: Recipe) -> LinearOperator:
    operator = LinearOperator.__new__(LinearOperator)
    nn.Module.__init__(operator)
    function = source.linear if source.affine else source.function
    body = _Body((function, source.adjoint), (source.domain, source.codomain), source)
    modules = source.captured.modules
    single = len(modules) == 1 and modules[0] is source.callable
    names = ["module"] if single else [f"module_{index}" for index in range(len(modules))]
    operator._set(body, 0, recipe, dict(zip(names, modules, strict=True)))
    return operator


def _rebuild(function: Callable[..., Any], domain: Space, options: dict[str, Any]) -> LinearOperator:
    return linear_operator(function, domain, check=False, **options)


def require_linear(report: LinearityReport, source: Transposition, *, offset_allowed: bool = False) -> None:
    """Raise unless the report is of a linear map that autograd can differentiate, with what to do about it.

    Raises
    ------
    NotLinearError
        If the map is not linear.
    NotDifferentiableError
        If its derivative by autograd is not the map.
    """
    kind = "an affine" if offset_allowed else "a linear"
    name = type(source.callable).__name__ if isinstance(source.callable, nn.Module) else "the function"
    seen = report.counterexample
    if not report.is_affine:
        detail = "; ".join(report.evidence)
        if seen is not None and seen.law.endswith("finite"):
            advice = "it returned NaN or infinity for finite input: check its parameters"
        elif not report.deterministic:
            advice = "its result is random or changes its state: call .eval() on dropout, batch-norm and the like"
        elif report.reads_input:
            advice = f"its derivative depends on the input through {', '.join(report.reads_input)}: take that out"
        else:
            advice = "take out the part that is not linear"
        raise NotLinearError(f"expected {kind} map, but {name} is not: {seen or detail}; {advice} [{detail}]")
    if report.verdict == "refuted" and not offset_allowed:
        raise NotLinearError(
            f"expected a linear map, but {name} has an offset, ‖f(0)‖ = {report.offset:.3g}: set bias=False, or use "
            "al.affine_operator, whose .linear is the linear part"
        )
    if not report.differentiable:
        raise NotDifferentiableError(
            f"expected autograd's derivative of {name} to be the map itself, but the dot test fails: something hides "
            "the input from autograd (.detach(), .data, torch.no_grad(), a custom backward that is wrong); take it out"
        )


# -- the algebra: pairs of closures, late-bound so that a part may move -----------------------------------------------


def _derived(
    function: Map, adjoint_function: Map, domain: Space, codomain: Space, recipe: Any, *parts: nn.Module
) -> LinearOperator:
    operator = LinearOperator.__new__(LinearOperator)
    nn.Module.__init__(operator)
    named = {f"operator_{index}": part for index, part in enumerate(parts)}
    operator._set(_Body((function, adjoint_function), (domain, codomain)), 0, recipe, named)
    return operator


def _adjoint_of(operator: LinearOperator) -> LinearOperator:
    return operator.H


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (isinstance(value, Tensor) and value.ndim == 0)


def _scaled(scalar: Any, x: Any) -> Any:
    return scalar * x if isinstance(x, Tensor) else pytree.tree_map(lambda leaf: scalar * leaf, x)


def _added(x: Any, z: Any) -> Any:
    return x + z if isinstance(x, Tensor) else pytree.tree_map(torch.add, x, z)


def _conjugated(x: Any) -> Any:
    return x.conj().resolve_conj() if isinstance(x, Tensor) else pytree.tree_map(lambda t: t.conj().resolve_conj(), x)


def _common(left: Space, right: Space, what: str, remedy: str) -> Space:
    """Return the space that both are, with the fewer free dimensions."""
    free = min(left.batch_dims, right.batch_dims)
    left, right = left.with_batch_dims(free), right.with_batch_dims(free)
    if left != right:
        raise SpaceMismatchError(f"expected {what}, got {left} and {right}; {remedy}")
    return left


def _compose(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    _common(a.domain, b.codomain, "the domain of A to be the codomain of B in A @ B", "swap them, or reshape between")
    free = min(a.domain.batch_dims, b.domain.batch_dims)
    operator = _derived(
        lambda x: a(b(x)), lambda y: b.H(a.H(y)), b.domain.with_batch_dims(free), a.codomain.with_batch_dims(free),
        (_compose, (a, b)), a, b,
    )  # fmt: skip
    if a._body is b._body and a._side != b._side:  # AAᴴ and AᴴA are their own adjoints
        operator._body.views[1] = operator
    return operator


def _add(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    domain = _common(a.domain, b.domain, "A and B of A + B to have one domain", "bring them to the same space")
    codomain = _common(a.codomain, b.codomain, "A and B of A + B to have one codomain", "bring them to the same space")
    return _derived(
        lambda x: _added(a(x), b(x)), lambda y: _added(a.H(y), b.H(y)), domain, codomain, (_add, (a, b)), a, b
    )


def _require_scalar(scalar: Any, space: Space) -> None:
    is_complex = scalar.is_complex() if isinstance(scalar, Tensor) else isinstance(scalar, complex)
    if is_complex and not all(spec.is_complex for spec in space.specs):
        raise SpaceMismatchError(
            f"expected a real scalar for the real space {space}, got {scalar}: a complex multiple of a real element "
            "is not in it; use a real scalar, or a complex domain"
        )


def _conjugate(scalar: Any) -> Any:
    return scalar.conj() if isinstance(scalar, Tensor) else scalar.conjugate()


def _scale_output(scalar: Any, a: LinearOperator) -> LinearOperator:
    _require_scalar(scalar, a.codomain)
    return _derived(
        lambda x: _scaled(scalar, a(x)), lambda y: a.H(_scaled(_conjugate(scalar), y)), a.domain, a.codomain,
        (_scale_output, (scalar, a)), a,
    )  # fmt: skip


def _scale_input(a: LinearOperator, scalar: Any) -> LinearOperator:
    _require_scalar(scalar, a.domain)
    return _derived(
        lambda x: a(_scaled(scalar, x)), lambda y: _scaled(_conjugate(scalar), a.H(y)), a.domain, a.codomain,
        (_scale_input, (a, scalar)), a,
    )  # fmt: skip


def _transpose(a: LinearOperator) -> LinearOperator:
    return _derived(
        lambda y: _conjugated(a.H(_conjugated(y))), lambda x: _conjugated(a(_conjugated(x))), a.codomain, a.domain,
        (_transpose, (a,)), a,
    )  # fmt: skip


def _product(spaces: Sequence[Space]) -> Space:
    free = {space.batch_dims for space in spaces}
    if len(free) > 1:
        raise SpaceMismatchError(f"expected operators with equal batch_dims, got {sorted(free)}: build them alike")
    return Space.of(tuple(spaces), batch_dims=free.pop())


def _operators(operators: Sequence[LinearOperator], name: str) -> list[LinearOperator]:
    found = list(operators)
    if not found or not all(isinstance(operator, LinearOperator) for operator in found):
        raise SpaceMismatchError(
            f"expected {name} of a non-empty list of linear operators, got {[type(o).__name__ for o in found]}: wrap "
            "each with al.linear_operator"
        )
    return found


def _summed(elements: Sequence[Any]) -> Any:
    total = elements[0]
    for element in elements[1:]:
        total = _added(total, element)
    return total


def vstack(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Return ``x ↦ (A₁x, …, Aₙx)``; its adjoint is ``(y₁, …, yₙ) ↦ Σ Aᵢᴴyᵢ``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        Operators with one domain.

    Returns
    -------
    LinearOperator
        From that domain to the tuples of elements of the codomains.

    Raises
    ------
    SpaceMismatchError
        If the domains differ or the list is empty.

    Examples
    --------
    >>> A = identity((3,))
    >>> len(vstack([A, 2 * A])(A.domain.zeros()))
    2
    """
    parts = _operators(operators, "vstack")
    for part in parts[1:]:
        _common(parts[0].domain, part.domain, "the operators of vstack to have one domain", "use block_diag otherwise")
    return _derived(
        lambda x: tuple(part(x) for part in parts),
        lambda y: _summed([part.H(piece) for part, piece in zip(parts, y, strict=True)]),
        parts[0].domain, _product([part.codomain for part in parts]), (vstack, (parts,)), *parts,
    )  # fmt: skip


def hstack(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Return ``(x₁, …, xₙ) ↦ Σ Aᵢxᵢ``; its adjoint is ``y ↦ (A₁ᴴy, …, Aₙᴴy)``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        Operators with one codomain.

    Returns
    -------
    LinearOperator
        From the tuples of elements of the domains to that codomain.

    Raises
    ------
    SpaceMismatchError
        If the codomains differ or the list is empty.

    Examples
    --------
    >>> A = identity((3,))
    >>> hstack([A, A]).domain.size
    6
    """
    parts = _operators(operators, "hstack")
    for part in parts[1:]:
        _common(parts[0].codomain, part.codomain, "the operators of hstack to have one codomain", "use block_diag")
    return _derived(
        lambda x: _summed([part(piece) for part, piece in zip(parts, x, strict=True)]),
        lambda y: tuple(part.H(y) for part in parts),
        _product([part.domain for part in parts]), parts[0].codomain, (hstack, (parts,)), *parts,
    )  # fmt: skip


def block_diag(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Return ``(x₁, …, xₙ) ↦ (A₁x₁, …, Aₙxₙ)``; its adjoint is ``(y₁, …, yₙ) ↦ (A₁ᴴy₁, …, Aₙᴴyₙ)``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        The blocks.

    Returns
    -------
    LinearOperator
        From tuples to tuples.

    Raises
    ------
    SpaceMismatchError
        If the list is empty.

    Examples
    --------
    >>> A = block_diag([identity((3,)), identity((2, 2))])
    >>> A.domain == A.codomain
    True
    """
    parts = _operators(operators, "block_diag")
    return _derived(
        lambda x: tuple(part(piece) for part, piece in zip(parts, x, strict=True)),
        lambda y: tuple(part.H(piece) for part, piece in zip(parts, y, strict=True)),
        _product([part.domain for part in parts]), _product([part.codomain for part in parts]),
        (block_diag, (parts,)), *parts,
    )  # fmt: skip


def identity(space: Any) -> LinearOperator:
    """Return ``x ↦ x``, its own adjoint.

    Parameters
    ----------
    space : Space or what :meth:`Space.of` takes
        Where x lives.

    Returns
    -------
    LinearOperator
        The identity.

    Raises
    ------
    SpaceMismatchError
        If ``space`` describes no space.

    Examples
    --------
    >>> I = identity((2, 2))
    >>> I.H is I
    True
    """
    where = Space.of(space)
    operator = _derived(_itself, _itself, where, where, (identity, (where,)))
    operator._body.views[1] = operator
    return operator


def _itself(x: Any) -> Any:
    return x


class _Entries(nn.Module):
    """The entries of a diagonal, as parameters where they are and as buffers elsewhere."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = len(leaves)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, nn.Parameter):
                self.register_parameter(f"entries_{index}", leaf)
            else:
                self.register_buffer(f"entries_{index}", leaf)

    def leaves(self) -> list[Tensor]:
        return [getattr(self, f"entries_{index}") for index in range(self.count)]


def diagonal(d: Any) -> LinearOperator:
    """Return ``x ↦ d ⊙ x``; its adjoint is ``y ↦ conj(d) ⊙ y``.

    Parameters
    ----------
    d : Tensor or pytree of tensors
        The diagonal, of the shape and dtype of x; parameters stay parameters.

    Returns
    -------
    LinearOperator
        On the space of ``d``.

    Raises
    ------
    SpaceMismatchError
        If ``d`` holds anything else than floating-point or complex tensors.

    Examples
    --------
    >>> import torch
    >>> diagonal(torch.tensor([1.0, 2.0]))(torch.tensor([3.0, 4.0]))
    tensor([3., 8.])
    """
    space = Space.of(d)
    entries = _Entries(space.leaves(d))

    def times(x: Any) -> Any:
        return space.unflatten([a * b for a, b in zip(entries.leaves(), tree_flatten(x)[0], strict=True)])

    def times_conjugate(y: Any) -> Any:
        return space.unflatten([a.conj() * b for a, b in zip(entries.leaves(), tree_flatten(y)[0], strict=True)])

    return _derived(times, times_conjugate, space, space, (diagonal, (d,)), entries)


def diagonal_entries(operator: LinearOperator) -> Any:
    """Return the diagonal of an operator made by :func:`diagonal`, or None for any other."""
    entries = getattr(operator, "operator_0", None)
    return operator.domain.unflatten(entries.leaves()) if isinstance(entries, _Entries) else None


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


__all__ = [
    "LinearOperator",
    "block_diag",
    "diagonal",
    "hstack",
    "identity",
    "linear_adjoint",
    "linear_operator",
    "vstack",
]
