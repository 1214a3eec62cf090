r"""Communication as linear maps, each with its adjoint as its derivative: usable inside any forward.

Every map is an op of its own (``adjointlab::all_reduce``, …) on top of PyTorch's functional collectives. The ops come
in pairs that are each other's derivative, so that ``torch.func``, ``torch.autograd`` and the tracer see a linear op
with a linear derivative, to any order, and a traced adjoint has the collective in it as one op. PyTorch's own
collectives do not serve here: ``torch.func`` refuses them, and the derivative of its ``all_reduce`` counts a replicated
result once for every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.distributed.device_mesh import DeviceMesh

from adjointlab.distributed.failure import waiting
from adjointlab.distributed.windows import plan_of
from adjointlab.transpose.compat import differentiated, plain

_LIBRARY = torch.library.Library("adjointlab", "FRAGMENT")
_c10d = torch.ops._c10d_functional


def _op(name: str) -> Any:
    return getattr(torch.ops.adjointlab, name).default


def _define(name: str, rest: str, run: Callable[..., Tensor], shape: Callable[..., Tensor]) -> None:
    _LIBRARY.define(f"{name}(Tensor x, {rest}) -> Tensor")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adjointlab::{name}", shape, lib=_LIBRARY)


def _link(name: str, adjoint: str) -> None:
    """Make the derivative of one op the other."""
    op, back = _op(name), _op(adjoint)

    # An op's derivative belongs to one level of functorch's transforms, as that of any op of PyTorch does: this is the
    # kind of Function for it.
    class Linked(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keys: Any, recorded: bool, x: Tensor, *rest: Any) -> Tensor:
            ctx.rest = rest
            # A Function's forward does not record: of the levels below one of torch.func, too, where parameters are.
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(recorded):
                return op.redispatch(keys & torch._C._after_autograd_keyset, x, *rest)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Any:
            return None, None, back(v, *ctx.rest), *[None for _ in ctx.rest]

    apply: Any = Linked.apply  # type: ignore[attr-defined]

    def kernel(keys: Any, x: Tensor, *rest: Any) -> Any:
        with enable_single_level_autograd_function():
            return apply(keys, torch.is_grad_enabled(), x, *rest)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


# -- sums over processes -----------------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, group: str) -> Tensor:
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    with waiting():
        total = _c10d.wait_tensor(_c10d.all_reduce(real.contiguous(), "sum", group))
    return torch.view_as_complex(total) if x.is_complex() else total


def _like(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_define("replicate", "str group", lambda x, group: x.clone(), _like)
_define("all_reduce", "str group", _all_reduce, _like)
_link("replicate", "all_reduce")
_link("all_reduce", "replicate")


def _group(mesh: DeviceMesh) -> str:
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of one dimension, got {mesh}: choose one of them, mesh['name']")
    return str(mesh.get_group().group_name)


def replicate(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x, which is the same on all processes; the adjoint sums over them, ``v ↦ Σᵣ vᵣ``.

    To be put where a replicated tensor enters what each process computes by itself: each then holds the part ``Aᵣᴴvᵣ``
    of the cotangent, and one all-reduce adds them up.

    Parameters
    ----------
    x : Tensor
        The same on all processes of the mesh.
    mesh : DeviceMesh
        Of one dimension.

    Returns
    -------
    Tensor
        Its values.

    Raises
    ------
    ValueError
        If the mesh has several dimensions.
    """
    group = _group(mesh)
    return x if plain() and not differentiated((x,)) else torch.ops.adjointlab.replicate(x, group)


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return ``Σᵣ xᵣ`` over all processes, on each of them; the adjoint is the identity, ``v ↦ (v, …, v)``.

    The result is one replicated tensor. (That of ``torch.distributed.nn.functional.all_reduce`` is one tensor for each
    process, with a loss for each, whence its derivative is another sum.)

    Parameters
    ----------
    x : Tensor
        What this process contributes.
    mesh : DeviceMesh
        Of one dimension.

    Returns
    -------
    Tensor
        The sum.

    Raises
    ------
    ValueError
        If the mesh has several dimensions.
    """
    return torch.ops.adjointlab.all_reduce(x, _group(mesh))  # type: ignore[no-any-return]


# -- one number from all leaves and processes --------------------------------------------------------------------------


def _total(terms: Tensor, shares: list[float], groups: list[str]) -> Tensor:
    if len(shares) == 1:
        total = terms[0] * shares[0] if shares[0] != 1.0 else terms[0].clone()
    else:
        weights = torch.tensor(shares, dtype=terms.dtype, device=terms.device)
        total = (terms * weights.reshape(-1, *[1] * (terms.ndim - 1))).sum(0)
    for group in groups:
        total = _all_reduce(total, group)
    return total


def _spread(value: Tensor, shares: list[float], groups: list[str]) -> Tensor:
    return value.expand(len(shares), *value.shape).clone()


_define("total", "float[] shares, str[] groups", _total, lambda x, *rest: _like(x[0]))
_define(
    "spread", "float[] shares, str[] groups", _spread, lambda x, shares, groups: x.new_empty((len(shares), *x.shape))
)
# A replicated term is one term, however many processes hold it: its cotangent is the whole, not a share of it.
_link("total", "spread")
_link("spread", "total")


def total(terms: Tensor, shares: tuple[float, ...], groups: tuple[str, ...]) -> Tensor:
    """Return ``Σᵢ shareᵢ termsᵢ`` summed over all processes: bit by bit the same number on each."""
    return torch.ops.adjointlab.total(terms, shares, groups)  # type: ignore[no-any-return]


# -- windows: what a process needs of its neighbours -------------------------------------------------------------------


def _message(parts: list[Tensor], like: Tensor) -> Tensor:
    flat = torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)
    return torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat


def _transfer(parts: list[list[Tensor]], sizes: list[int], like: Tensor, group: str) -> list[Tensor]:
    """Send ``parts[r]`` to process r and return what comes from each, ``sizes[r]`` entries, as flat tensors."""
    scalars = 2 if like.is_complex() else 1
    message = _message([part for to in parts for part in to], like)
    given = [scalars * sum(part.numel() for part in to) for to in parts]
    taken = [scalars * size for size in sizes]
    with waiting():
        received = _c10d.wait_tensor(_c10d.all_to_all_single(message, taken, given, group))
    flats: list[Tensor] = list(received.split(taken))
    return [torch.view_as_complex(flat.reshape(-1, 2)) for flat in flats] if like.is_complex() else flats


def _exchange(x: Tensor, dim: int, *rest: Any) -> Tensor:
    owned, windows, rank, group = rest
    plan = plan_of(tuple(owned), tuple(windows), rank)
    row = x.numel() // x.shape[dim]
    parts: list[Tensor | None] = [
        x.narrow(dim, piece.source, piece.length) if piece.peer == rank else None for piece in plan.needs
    ]
    if not plan.silent:
        gives = [[x.narrow(dim, p.source, p.length) for p in plan.gives_to(q)] for q in range(plan.ranks)]
        sizes = [row * sum(p.length for p in plan.takes_from(q)) for q in range(plan.ranks)]
        for q, flat in enumerate(_transfer(gives, sizes, x, group)):
            taken = iter(_pieces(flat, [p.length for p in plan.takes_from(q)], x, dim))
            for index, piece in enumerate(plan.needs):
                if piece.peer == q != rank:
                    parts[index] = next(taken)
    return torch.cat([part for part in parts if part is not None], dim)


def _pieces(flat: Tensor, lengths: list[int], like: Tensor, dim: int) -> list[Tensor]:
    """Return a message as blocks of so many rows each."""
    row = like.numel() // like.shape[dim]
    shapes = [(*like.shape[:dim], length, *like.shape[dim + 1 :]) for length in lengths]
    found = flat.split([row * length for length in lengths])
    return [part.reshape(shape) for part, shape in zip(found, shapes, strict=True)]


def _exchange_adjoint(v: Tensor, dim: int, *rest: Any) -> Tensor:
    owned, windows, rank, group = rest
    plan = plan_of(tuple(owned), tuple(windows), rank)
    row = v.numel() // v.shape[dim]
    shape = (*v.shape[:dim], owned[rank + 1] - owned[rank], *v.shape[dim + 1 :])
    out = v.new_zeros(shape)
    for piece in plan.needs:
        if piece.peer == rank:
            out.narrow(dim, piece.source, piece.length).add_(v.narrow(dim, piece.target, piece.length))
    if not plan.silent:
        backs = [[v.narrow(dim, p.target, p.length) for p in plan.takes_from(q)] for q in range(plan.ranks)]
        sizes = [row * sum(p.length for p in plan.gives_to(q)) for q in range(plan.ranks)]
        for q, flat in enumerate(_transfer(backs, sizes, v, group)):
            given = plan.gives_to(q)
            for piece, part in zip(given, _pieces(flat, [p.length for p in given], v, dim), strict=True):
                out.narrow(dim, piece.source, piece.length).add_(part)
    return out


def _window_like(x: Tensor, dim: int, *rest: Any) -> Tensor:
    _, windows, rank, _ = rest
    return x.new_empty((*x.shape[:dim], windows[2 * rank + 1] - windows[2 * rank], *x.shape[dim + 1 :]))


def _owned_like(v: Tensor, dim: int, *rest: Any) -> Tensor:
    owned, _, rank, _ = rest
    return v.new_empty((*v.shape[:dim], owned[rank + 1] - owned[rank], *v.shape[dim + 1 :]))


_REST = "int dim, int[] owned, int[] windows, int rank, str group"
_define("exchange", _REST, _exchange, _window_like)
_define("exchange_adjoint", _REST, _exchange_adjoint, _owned_like)
_link("exchange", "exchange_adjoint")
_link("exchange_adjoint", "exchange")


def exchange(x: Tensor, dim: int, owned: tuple[int, ...], windows: tuple[int, ...], mesh: DeviceMesh) -> Tensor:
    """Return the rows of a sharded array that this process asks for, along ``dim``; the adjoint adds them back.

    Only rows that change hands are sent.

    Parameters
    ----------
    x : Tensor
        What this process holds.
    dim : int
        Along which the array is split.
    owned : tuple of int
        Process r holds the rows ``owned[r]`` to ``owned[r + 1]``.
    windows : tuple of int
        It gets those from ``windows[2r]`` to ``windows[2r + 1]``; rows before the first and after the last are those of
        a periodic array.
    mesh : DeviceMesh
        The processes, along one dimension.

    Returns
    -------
    Tensor
        The window.
    """
    return torch.ops.adjointlab.exchange(x, dim, owned, windows, mesh.get_local_rank(), _group(mesh))  # type: ignore[no-any-return]


__all__ = ["all_reduce", "exchange", "replicate", "total"]
