"""The codomain of a map: the space of what it returns, or in words why that is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.space.space import Space
from adjointlab.space.spec import TensorSpec
from adjointlab.tree import SINGLE, Structure


def space_of(outputs: Sequence[Tensor], structure: Structure | None, domain: Space, target: Space | None) -> Space:
    """Return the space of outputs, which have the batch dimensions of the domain; None is the structure of one tensor.

    ``target`` is the codomain that was asked for: it says how outputs are spread over processes, if they are.
    """
    for out in outputs:
        if not (out.is_floating_point() or out.is_complex()):
            raise SpaceMismatchError(
                f"expected the forward to return floating-point or complex tensors, got {out.dtype}: "
                "a map to integers or booleans is not linear"
            )
    specs = tuple(TensorSpec(tuple(out.shape), out.dtype, out.device) for out in outputs)
    k = domain.batch_dims
    if any(spec.shape[:k] != domain.batch_shape for spec in specs):
        raise SpaceMismatchError(
            f"expected every output to begin with the {k} batch dimensions {domain.batch_shape} of the input, "
            f"got shapes {[spec.shape for spec in specs]}: lower batch_dims"
        )
    found = Space(specs, structure or SINGLE, k)
    return _sharded(found, domain, target) if domain.is_sharded or target is not None else found


def _sharded(found: Space, domain: Space, target: Space | None) -> Space:
    """Return the space of outputs with the sharding of the codomain that was given."""
    if target is None:
        raise SpaceMismatchError(
            f"expected a codomain beside the sharded domain {domain}: how outputs are spread cannot be seen "
            "from one process; use adjointlab.distributed.linear_operator(f, domain, codomain)"
        )
    shapes = [[spec.shape for spec in space.specs] for space in (target, found)]
    if not domain.every(shapes[0] == shapes[1] and target.structure == found.structure):
        raise SpaceMismatchError(
            f"expected outputs in the codomain {target}, got {found} (or it is another process whose outputs do "
            "not fit): what each process returns has to be its part of the codomain"
        )
    pairs = zip(found.specs, target.specs, strict=True)
    return replace(found, specs=tuple(replace(spec, sharding=given.sharding) for spec, given in pairs))


def require_outputs(outputs: Sequence[Tensor], structure: Structure | None, codomain: Space) -> None:
    """Raise unless outputs are what they were: a function that has changed must go on mapping to the codomain."""
    k, fits = codomain.batch_dims, (structure or SINGLE) == codomain.structure
    for out, spec in zip(outputs, codomain.specs, strict=False):
        fits = fits and tuple(out.shape[k:]) == spec.shape[k:] and out.dtype == spec.dtype
    if not fits:
        found = ", ".join(f"{tuple(out.shape)} {out.dtype}" for out in outputs)
        raise SpaceMismatchError(
            f"expected outputs in {codomain}, but the function has changed, and returns {found}: build the operator "
            "anew"
        )
