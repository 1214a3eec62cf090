r"""Communication between processes as linear maps whose derivatives are their adjoints.

Every map is an op (``adjointlab::all_reduce``, …) on top of PyTorch's functional collectives. The ops come in pairs,
and each op is the derivative of the other. So ``torch.func``, ``torch.autograd`` and the tracer see a linear op with a
linear derivative of any order, and a traced adjoint contains the collective as one op. PyTorch's own collectives do not
suffice: ``torch.func`` refuses them, and the derivative of its ``all_reduce`` counts a replicated result once for
every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from adjointlab import compat
from adjointlab.compat import SingleLevelFunction, differentiated, plain
from adjointlab.distributed.failure import explain_failure
from adjointlab.distributed.windows import Rows, exchange_plan

_LIBRARY = torch.library.Library("adjointlab", "FRAGMENT")
_c10d = torch.ops._c10d_functional


def _op(name: str) -> Any:
    return getattr(torch.ops.adjointlab, name).default


def _define(name: str, rest: str, run: Callable[..., Tensor], shape: Callable[..., Tensor]) -> None:
    _LIBRARY.define(f"{name}(Tensor x, {rest}) -> Tensor")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adjointlab::{name}", shape, lib=_LIBRARY)


def _link(name: str, adjoint: str) -> None:
    """Make op ``adjoint`` the derivative of op ``name``."""
    op, back = _op(name), _op(adjoint)

    # The derivative of an op belongs to one level of functorch's transforms, which SingleLevelFunction provides.
    class Linked(SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keys: Any, recorded: bool, x: Tensor, *rest: Any) -> Tensor:
            ctx.rest = rest
            # The forward of a Function does not record. But lower levels of torch.func must, if parameters live there.
            with torch.set_grad_enabled(recorded):
                return compat.below_autograd(op, keys, x, *rest)

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Any:
            return None, None, back(v, *ctx.rest), *[None for _ in ctx.rest]

    apply: Any = Linked.apply  # type: ignore[attr-defined]

    def kernel(keys: Any, x: Tensor, *rest: Any) -> Any:
        with compat.single_level_functions():
            return apply(keys, torch.is_grad_enabled(), x, *rest)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


# -- sums over processes -----------------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, group: str) -> Tensor:
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    with explain_failure():
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
    """Return x unchanged, ``x ↦ (x, …, x)``; the adjoint sums over all processes, ``(v₀, …, vₙ) ↦ Σᵣ vᵣ``.

    Apply it to a replicated tensor before each process computes with it separately. In the adjoint, process r then
    holds the part ``Aᵣᴴvᵣ`` of the cotangent of x, and one all-reduce adds the parts.

    Parameters
    ----------
    x : Tensor
        A tensor with the same values on all processes of the mesh.
    mesh : DeviceMesh
        A mesh of one dimension.

    Returns
    -------
    Tensor
        A tensor with the values of x.

    Raises
    ------
    ValueError
        If the mesh has several dimensions.
    """
    group = _group(mesh)
    return x if plain() and not differentiated((x,)) else torch.ops.adjointlab.replicate(x, group)


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return ``Σᵣ xᵣ`` on every process; the adjoint is the identity on a replicated cotangent, ``v ↦ (v, …, v)``.

    The result is one replicated tensor with one cotangent. ``torch.distributed.nn.functional.all_reduce`` instead
    returns one tensor per process, each with its own loss, so its derivative sums the cotangents.

    Parameters
    ----------
    x : Tensor
        The summand of this process.
    mesh : DeviceMesh
        A mesh of one dimension.

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
# A replicated term is one term, even if many processes hold it. So each process gets the full cotangent, not a share.
_link("total", "spread")
_link("spread", "total")


def total(terms: Tensor, shares: tuple[float, ...], groups: tuple[str, ...]) -> Tensor:
    """Return ``Σᵢ shareᵢ termsᵢ`` summed over all processes, bitwise equal on all of them."""
    return torch.ops.adjointlab.total(terms, shares, groups)  # type: ignore[no-any-return]


# -- windows: rows that a process fetches from others ------------------------------------------------------------------


def _transfer(
    x: Tensor, dim: int, gives: tuple[tuple[Rows, ...], ...], takes: tuple[tuple[Rows, ...], ...], group: str
) -> Iterator[tuple[Rows, Tensor]]:
    """Send rows of x to each process; yield the rows that each one gives, with what it sent."""
    row = x.numel() // x.shape[dim] * (2 if x.is_complex() else 1)
    given, taken = ([row * sum(length for _, length in rows) for rows in side] for side in (gives, takes))
    parts = [x.narrow(dim, *rows).reshape(-1) for to in gives for rows in to]
    message = torch.cat(parts) if parts else x.new_empty(0)
    if x.is_complex():
        message = torch.view_as_real(message.resolve_conj()).reshape(-1)
    with explain_failure():
        received = _c10d.wait_tensor(_c10d.all_to_all_single(message, taken, given, group))
    wanted = [rows for of in takes for rows in of]
    for rows, part in zip(wanted, received.split([row * length for _, length in wanted]), strict=True):
        shape = (*x.shape[:dim], rows[1], *x.shape[dim + 1 :])
        yield rows, torch.view_as_complex(part.reshape(*shape, 2)) if x.is_complex() else part.reshape(shape)


def _exchange(x: Tensor, dim: int, *rest: Any) -> Tensor:
    owned, windows, rank, group = rest
    plan, window = exchange_plan(tuple(owned), tuple(windows), rank), _window_like(x, dim, *rest)
    for _, source, target, length in plan.kept:
        window.narrow(dim, target, length).copy_(x.narrow(dim, source, length))
    if not plan.local:
        for rows, part in _transfer(x, dim, plan.gives, plan.takes, group):
            window.narrow(dim, *rows).copy_(part)
    return window


def _exchange_adjoint(v: Tensor, dim: int, *rest: Any) -> Tensor:
    owned, windows, rank, group = rest
    plan, shard = exchange_plan(tuple(owned), tuple(windows), rank), _owned_like(v, dim, *rest).zero_()
    for _, source, target, length in plan.kept:
        shard.narrow(dim, source, length).add_(v.narrow(dim, target, length))
    if not plan.local:
        for rows, part in _transfer(v, dim, plan.takes, plan.gives, group):
            shard.narrow(dim, *rows).add_(part)
    return shard


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
    """Return the window of a sharded array that this process needs; the adjoint adds the rows back at their origin.

    Process r holds the rows ``owned[r]`` to ``owned[r + 1]`` along ``dim`` and receives the rows ``windows[2r]`` to
    ``windows[2r + 1]``, modulo the size of the array. Only rows that another process holds are sent.
    """
    return torch.ops.adjointlab.exchange(x, dim, owned, windows, mesh.get_local_rank(), _group(mesh))  # type: ignore[no-any-return]
