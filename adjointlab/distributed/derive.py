"""Operators between sharded spaces, with derived adjoints: ``Σᵣ ⟨(Ax)ᵣ, yᵣ⟩ = Σᵣ ⟨xᵣ, (Aᴴy)ᵣ⟩``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack, overload

import torch
from torch.distributed.tensor import DTensor

from adjointlab import compat
from adjointlab.derive import from_source, options_of, require_linear
from adjointlab.distributed.failure import raise_on_all_ranks
from adjointlab.distributed.sharding import Sharding
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.transpose import Eager, Options, Transposition
from adjointlab.typed import X, Y
from adjointlab.weighted import in_spaces


class _Options(TypedDict, total=False):
    kwargs: dict[str, Any] | None
    engine: str
    check: bool
    lowering: bool
    autotune: bool


@overload
def linear_operator(
    f: Callable[..., Any], domain: Space[X], codomain: Space[Y], **options: Unpack[_Options]
) -> LinearOperator[X, Y]: ...


@overload
def linear_operator(
    f: Callable[..., Any], domain: Any, codomain: Any, **options: Unpack[_Options]
) -> LinearOperator[Any, Any]: ...


def linear_operator(
    f: Callable[..., Any],
    domain: Any,
    codomain: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    engine: str = "auto",
    check: bool = True,
    lowering: bool = True,
    autotune: bool = False,
) -> LinearOperator[Any, Any]:
    r"""Return a communicating forward as an operator with a derived adjoint: ``Σᵣ ⟨(Ax)ᵣ, yᵣ⟩ = Σᵣ ⟨xᵣ, (Aᴴy)ᵣ⟩``.

    The forward may call :func:`replicate`, :func:`all_reduce` and :func:`halo_exchange`, in the same order on all
    processes; the derived adjoint contains their adjoints. The checks see missing communication.

    Parameters
    ----------
    f : nn.Module or callable
        Maps this process's part of x to its part of ``Ax``; called as by :func:`adjointlab.linear_operator`.
    domain, codomain : Space, TensorSpec or pytree of these
        Sharded spaces on one mesh: :func:`space`, :func:`replicated` or :func:`direct_sum`.
    kwargs, engine, check, lowering, autotune
        As for :func:`adjointlab.linear_operator`.

    Returns
    -------
    LinearOperator
        The operator; every process calls it with its own part.

    Raises
    ------
    SpaceMismatchError
        If the spaces are not sharded over one mesh, or the result of the forward is not in the codomain.
    NotLinearError
        If the map is not linear.
    NotDifferentiableError
        If autograd's derivative is not the map's own, as where a communication has no adjoint.
    RuntimeError
        If building the operator failed on other processes only.

    Examples
    --------
    >>> import tempfile, torch.distributed as dist
    >>> from adjointlab import distributed
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1,))
    >>> X, Y = distributed.replicated((3,), mesh), distributed.direct_sum((2,), mesh)
    >>> A = linear_operator(lambda x: distributed.replicate(x, mesh)[1:], X, Y)
    >>> A.H(torch.ones(2))
    tensor([0., 1., 1.])
    >>> dist.destroy_process_group()
    """
    where, target = Space.of(domain), Space.of(codomain)
    sharding = where.specs[0].sharding
    aim = target.specs[0].sharding
    if not isinstance(sharding, Sharding) or aim is None or aim.mesh != sharding.mesh:
        raise SpaceMismatchError(
            f"expected a domain and a codomain that are sharded over one mesh, got {where} and {target}: make them "
            "with adjointlab.distributed.space, replicated or direct_sum"
        )
    with raise_on_all_ranks(sharding.mesh):
        if check:
            with torch.no_grad(), _NoDTensors():  # type: ignore[no-untyped-call]
                Eager(f, dict(kwargs or {}), where.plain).flat(where.leaves(where.zeros()))
        options = Options(engine, False, lowering, autotune, check=check)
        source = Transposition(f, where.plain, kwargs, options, codomain=target.plain, judge=require_linear)
    A = from_source(source, lambda: (_rebuild, (f, source.domain, source.codomain, options_of(source))))
    return in_spaces(A, where, target)


def _rebuild(f: Callable[..., Any], domain: Space, codomain: Space, options: dict[str, Any]) -> LinearOperator:
    kept = {name: options[name] for name in ("kwargs", "engine", "lowering", "autotune")}
    return linear_operator(f, domain, codomain, check=False, **kept)


class _NoDTensors(compat.TorchDispatchMode):
    """Refuses DTensors in a forward: torch's convolution of a sharded DTensor is wrong, and no test can detect it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(isinstance(leaf, DTensor) for leaf in compat.pytree.tree_leaves((args, kwargs))):
            raise SpaceMismatchError(
                f"expected a forward of plain tensors, but it calls {func} on a DTensor, whose convolutions are "
                "silently wrong along sharded dimensions, and whose to_local() has no adjoint without grad_placements: "
                "use replicate, all_reduce and halo_exchange of adjointlab.distributed"
            )
        return func(*args, **(kwargs or {}))
