"""Refusals of a space, each with a remedy: of what describes no space, and of what is no element of one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adjointlab.compat import pytree
from adjointlab.errors import SpaceMismatchError
from adjointlab.space.spec import TensorSpec, describe, is_array, refuse_dtensor
from adjointlab.tree import has_tensor

Space = Any  # which is made of what is here


def require_sizes(specs: tuple[TensorSpec, ...], batch_dims: int) -> None:
    """Raise unless there are leaves with so many free dimensions in common, and on one mesh if they are sharded."""
    if not specs:
        raise SpaceMismatchError(
            "expected a space of at least one tensor, got an empty one: give an example tensor, a shape such as "
            "(1, 1, 64, 64) or a TensorSpec"
        )
    if not isinstance(batch_dims, int) or isinstance(batch_dims, bool) or batch_dims < 0:
        raise SpaceMismatchError(f"expected batch_dims to be an integer of 0 or more, got {batch_dims!r}")
    if batch_dims:
        batches = {spec.shape[:batch_dims] for spec in specs}
        if len(batches) > 1 or any(len(spec.shape) < batch_dims for spec in specs):
            raise SpaceMismatchError(
                f"expected every leaf to begin with the same {batch_dims} batch dimensions, got shapes "
                f"{[spec.shape for spec in specs]}: lower batch_dims, or give the leaves equal leading sizes"
            )
    if any(spec.sharding is not None for spec in specs):
        _require_one_mesh(specs, batch_dims)


def _require_one_mesh(specs: tuple[TensorSpec, ...], batch_dims: int) -> None:
    meshes = [None if spec.sharding is None else spec.sharding.mesh for spec in specs]
    if any(mesh != meshes[0] for mesh in meshes):
        raise SpaceMismatchError(
            f"expected every leaf of a sharded space on one mesh, got {meshes}: a leaf that is the same on all "
            "processes is adjointlab.distributed.replicated(space, mesh)"
        )
    if batch_dims:
        raise SpaceMismatchError(
            f"expected batch_dims=0 for a sharded space, got {batch_dims}: its sizes are fixed, for all "
            "processes have to agree on them"
        )


def spec_of(leaf: Any) -> TensorSpec:
    """Return the spec of a leaf of an example; raise where it is neither a tensor nor a spec."""
    if isinstance(leaf, TensorSpec):
        return leaf
    if not isinstance(leaf, Tensor):
        raise SpaceMismatchError(
            "expected a domain given as an example tensor, a shape such as (1, 1, 64, 64), a TensorSpec, a Space or a "
            f"pytree of these, got {describe(leaf)}{': pass torch.from_numpy of it' if is_array(leaf) else ''}"
        )
    refuse_dtensor(leaf)
    return TensorSpec.of(leaf)


def mismatch(space: Space, name: str, x: Any, leaf: Any = None, spec: TensorSpec | None = None) -> SpaceMismatchError:
    """Return the error of an x that is not in a space, because a leaf does not fit its spec where one is given."""
    if spec is None or not isinstance(leaf, Tensor):
        came = describe(x) if not has_tensor(x) or isinstance(x, Tensor) else f"the pytree {_outline(x)}"
        remedy = "pass torch.from_numpy of it" if is_array(x) else "pass an element with the structure of the space"
    else:
        came, remedy = describe(leaf), spec.remedy(leaf)
    return SpaceMismatchError(f"expected {name} to be an element of {space}, got {came}; {remedy}")


def _outline(tree: Any) -> str:
    return str(pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf), tree))


def refuse_sharded(space: Space) -> None:
    """Raise on a space whose elements are nowhere as a whole."""
    if space.is_sharded:
        raise SpaceMismatchError(
            f"expected a space of one process, got the sharded {space}: its elements are nowhere as a whole; use "
            "inner products and solvers, or adjointlab.distributed.gather"
        )


def remedy_for(result: Any) -> str:
    """Return advice on a leaf that a function returned and that is no tensor."""
    if is_array(result):
        return "a pair of functions of arrays goes to al.from_pair(f, adjoint, domain, codomain, arrays='numpy')"
    return "return tensors only"
