"""What laws are, and what they are stated with: dense matrices, norm-scaled errors, a watch on side effects.

Laws stand in `lawbook`, are registered with `@law`, and run on every operator of the zoo in `test_laws.py`.

Matrices are real, in coordinates `(Re, Im)` leaf by leaf, so that the adjoint is the plain transpose for every
operator, complex-linear or only real-linear.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_zoo import LINEAR, ZOO, Entry
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al

ENGINES = ("eager", "traced")
EXACT = (torch.float64, torch.complex128)
EVERY_TENTH = {entry.name for entry in ZOO[::10]}


def cases(entries: list[Entry] = LINEAR) -> list[Any]:
    """Return `(entry, dtype)` for `pytest.mark.parametrize`, as many as there are."""
    return [
        pytest.param(entry, dtype, id=f"{entry.name}-{str(dtype).removeprefix('torch.')}")
        for entry in entries
        for dtype in entry.dtypes
    ]


@functools.cache
def affine(entry: Entry, dtype: torch.dtype, engine: str) -> al.AffineOperator:
    """Return the affine operator of an entry, made once; tests that change it must build their own."""
    function, domain = entry.build(dtype)
    with no_side_effects(function, domain):
        return al.affine_operator(function, domain, engine=engine)


@functools.cache
def operator(entry: Entry, dtype: torch.dtype, engine: str) -> al.LinearOperator:
    """Return the operator of an entry, made once; tests that change it must build their own."""
    if entry.affine:
        return affine(entry, dtype, engine).linear
    function, domain = entry.build(dtype)
    with no_side_effects(function, domain):
        return al.linear_operator(function, domain, engine=engine)


def call(function: Callable[..., Any], x: Any) -> Any:
    """Apply the raw function: a tuple is spread over its arguments."""
    return function(*x) if isinstance(x, tuple) else function(x)


def seeded(seed: int) -> torch.Generator:
    """Return a generator for the device that tensors are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def draw(space: al.Space, seed: int = 0) -> Any:
    return space.randn(torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------- laws


@dataclass(frozen=True)
class Case:
    """What laws are stated of: an entry of the zoo in one dtype, made by one engine."""

    entry: Entry
    dtype: torch.dtype
    engine: str

    @property
    def A(self) -> al.LinearOperator:
        """The operator, or the linear part of an affine one."""
        return operator(self.entry, self.dtype, self.engine)

    @property
    def f(self) -> al.AffineOperator:
        return affine(self.entry, self.dtype, self.engine)

    @property
    def dense(self) -> Tensor:
        """The real matrix, made without adjointlab."""
        return forward_matrix(self.entry, self.dtype)

    def build(self) -> tuple[Callable[..., Any], Any]:
        """Return the raw function and an example of its domain."""
        return self.entry.build(self.dtype)


Statement = Callable[[Case], None]
Condition = Callable[[Case], bool]


@dataclass(frozen=True)
class Law:
    """A statement, which asserts, and all the conditions under which it is to hold."""

    statement: Statement
    conditions: tuple[Condition, ...]

    @property
    def name(self) -> str:
        return self.statement.__name__

    def applies(self, case: Case) -> bool:
        return all(condition(case) for condition in self.conditions)


LAWS: list[Law] = []


def law(*conditions: Condition) -> Callable[[Statement], Statement]:
    """Register a statement as a law of every operator for which the conditions hold."""

    def register(statement: Statement) -> Statement:
        LAWS.append(Law(statement, conditions))
        return statement

    return register


def check(case: Case, laws: Iterable[Law] | None = None) -> None:
    """Try every law that applies, each by itself, and fail with the names of all that do not hold."""
    broken = []
    for each in LAWS if laws is None else laws:
        if not each.applies(case):
            continue
        torch.manual_seed(0)
        try:
            each.statement(case)
        except AssertionError as error:
            place = traceback.extract_tb(error.__traceback__)[1]
            broken.append(f"{each.name} ({Path(place.filename).name}:{place.lineno}): {error}")
        except Exception as error:
            error.add_note(
                "\n".join([f"raised by the law {each.name}", *(f"broken before: {line}" for line in broken)])
            )
            raise
    if broken:
        pytest.fail("\n".join([f"{len(broken)} laws do not hold:", *broken]), pytrace=False)


def exact(case: Case) -> bool:
    return case.dtype in EXACT


def in_widest_dtype(case: Case) -> bool:
    """Choose one dtype for each entry, complex where there is one: the algebra does not depend on the dtype."""
    dtypes = case.entry.dtypes
    return case.dtype == next((dtype for dtype in reversed(EXACT) if dtype in dtypes), dtypes[0])


def once(case: Case) -> bool:
    """Choose one engine: of what does not depend on it, or makes its own operator."""
    return case.engine == "traced"


def is_every_tenth(case: Case) -> bool:
    """Choose some operators: of what derives another one, by the way that all take."""
    return case.entry.name in EVERY_TENTH


def is_linear(case: Case) -> bool:
    return not case.entry.affine


def is_affine(case: Case) -> bool:
    return case.entry.affine


# -------------------------------------------------------------------------------------------------------- coordinates


def leaves(x: Any) -> list[Tensor]:
    return pytree.tree_leaves(x)


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    return pytree.tree_map(function, *trees)


def coordinates(x: Any) -> Tensor:
    """Return the real coordinates of a pytree in double precision, `[re; im]` leaf by leaf."""
    parts = []
    for leaf in leaves(x):
        flat = leaf.detach().reshape(-1)
        parts += [flat.real.double(), flat.imag.double()] if flat.is_complex() else [flat.double()]
    return torch.cat(parts)


def basis(x: Any) -> Iterator[Any]:
    """Yield the pytrees like `x` whose coordinates are the unit vectors."""
    flat, spec = pytree.tree_flatten(x)
    for position, leaf in enumerate(flat):
        for unit in (1, 1j) if leaf.is_complex() else (1,):
            for index in range(leaf.numel()):
                element = [torch.zeros_like(other, memory_format=torch.contiguous_format) for other in flat]
                element[position].view(-1)[index] = unit
                yield pytree.tree_unflatten(element, spec)


def matrix(function: Callable[[Any], Any], example: Any) -> Tensor:
    """Return the real matrix of a linear function, one call for each column."""
    with torch.no_grad():
        return torch.stack([coordinates(function(e)) for e in basis(example)], dim=1)


@functools.cache
def forward_matrix(entry: Entry, dtype: torch.dtype) -> Tensor:
    """Return the real matrix of an entry's raw forward (its linear part), made without adjointlab."""
    function, domain = entry.build(dtype)
    columns = matrix(lambda x: call(function, x), domain)
    if entry.affine:
        columns = columns - coordinates(call(function, domain))[:, None]
    return columns


# -------------------------------------------------------------------------------------------------------------- errors


def eps(*spaces: al.Space) -> float:
    return max(space.eps for space in spaces)


def distance(a: Any, b: Any) -> float:
    """Return the norm of the difference of two pytrees of equal structure, shapes and dtypes."""
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    assert [(u.shape, u.dtype) for u in leaves(a)] == [(v.shape, v.dtype) for v in leaves(b)]
    return float(torch.linalg.vector_norm(coordinates(a) - coordinates(b)))


def norm(a: Any) -> float:
    return float(torch.linalg.vector_norm(coordinates(a)))


def assert_close(a: Any, b: Any, eps: float, scale: float | None = None, factor: float = 16) -> None:
    """Assert `‖a − b‖ ≤ 16 eps · scale`; the scale is `max(‖a‖, ‖b‖)` unless a product of norms is given."""
    scale = max(norm(a), norm(b)) if scale is None else scale
    error = distance(a, b)
    assert error <= factor * eps * scale, f"error {error:.3g} exceeds {factor} · {eps:.3g} · {scale:.3g}"


def inner(a: Any, b: Any) -> complex:
    """Return `⟨a, b⟩ = Σ conj(aᵢ) bᵢ` in double precision, independently of `al.Space`."""
    wide = [
        (u.detach().to(torch.complex128), v.detach().to(torch.complex128))
        for u, v in zip(leaves(a), leaves(b), strict=True)
    ]
    return complex(sum(torch.vdot(u.reshape(-1), v.reshape(-1)) for u, v in wide))


def dot_error(forward: Callable[[Any], Any], adjoint: Callable[[Any], Any], x: Any, y: Any, real: bool) -> float:
    """Return `|⟨Ax, y⟩ − ⟨x, By⟩| / max(‖Ax‖‖y‖, ‖x‖‖By‖)`, of the real parts where only these must agree."""
    image, pulled = forward(x), adjoint(y)
    gap = inner(image, y) - inner(x, pulled)
    scale = max(norm(image) * norm(y), norm(x) * norm(pulled))
    return 0.0 if scale == 0 else abs(gap.real if real else gap) / scale


def frobenius(dense: Tensor) -> float:
    return float(torch.linalg.matrix_norm(dense))


def assert_acts_as(operator: Callable[[Any], Any], dense: Tensor, x: Any, eps: float, scale: float = 0) -> None:
    """Assert that `operator(x)` is `dense @ x` in real coordinates, to `16 eps ‖dense‖ ‖x‖` (or a larger scale)."""
    expected = dense @ coordinates(x)
    error = float(torch.linalg.vector_norm(coordinates(operator(x)) - expected))
    bound = 16 * eps * max(frobenius(dense), scale) * norm(x)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


# -------------------------------------------------------------------------------------------------------- side effects


def _modules(function: Any) -> list[nn.Module]:
    owner = getattr(function, "__self__", function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [thing for thing in (owner, *cells) if isinstance(thing, nn.Module)]


def _state(function: Any, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number, owner in enumerate(_modules(function)):
        for name, part in owner.named_modules():
            state[f"{number}.{name}.training"] = part.training
            state[f"{number}.{name}.attributes"] = sorted(vars(part))
            state[f"{number}.{name}.hooks"] = (len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
            state[f"{number}.{name}"] = tensor
            state[f"{number}.{name}.grad"] = tensor.grad
            state[f"{number}.{name}.requires_grad"] = tensor.requires_grad
            state[f"{number}.{name}.id"] = id(tensor)
    for number, tensor in enumerate(tensors):
        state[f"argument {number}"] = tensor
        state[f"argument {number}.grad"] = tensor.grad
        state[f"argument {number}.requires_grad"] = tensor.requires_grad
    state["random numbers"] = torch.random.get_rng_state()
    if torch.get_default_device().type == "cuda":
        state["random numbers on the device"] = torch.cuda.get_rng_state()
    state["gradients enabled"] = torch.is_grad_enabled()
    state["default dtype"] = torch.get_default_dtype()
    return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.detach().nan_to_num(7), b.detach().nan_to_num(7))
    return bool(type(a) is type(b) and a == b)


@contextmanager
def no_side_effects(function: Any, *arguments: Any, draws: bool = False) -> Iterator[None]:
    """Assert that a block changes neither a function's modules, nor the arguments, nor any global state.

    A function that `draws` random numbers by itself does so whenever it runs.
    """
    tensors = tuple(t for t in leaves(arguments) if isinstance(t, Tensor))
    before = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, _state(function, tensors))
    try:
        yield
    finally:
        after = _state(function, tensors)
        assert before.keys() == after.keys()
        changed = [name for name in before if not _same(before[name], after[name]) and not (draws and "random" in name)]
        assert not changed, f"changed: {changed}"


def with_backward(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a function of one tensor whose gradient is written by hand, and may be any."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, w: Tensor) -> Tensor:
            return forward(w)

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return backward(g)

    return Custom.apply
