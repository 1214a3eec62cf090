"""The space ``K^shape`` of one tensor: shape, dtype, device and, for a part of a larger tensor, its sharding."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError

if TYPE_CHECKING:
    from adjointlab.space.space import Space

# The types of a description of a space of tensors, of pairs and of dictionaries of them, and of other containers.
OfTensor: TypeAlias = "Tensor | TensorSpec | Space[Tensor] | tuple[int, ...] | list[int]"
OfPair: TypeAlias = "tuple[OfTensor, OfTensor] | Space[tuple[Tensor, Tensor]]"
OfDict: TypeAlias = "Mapping[str, OfTensor] | Space[dict[str, Tensor]]"
OfContainer: TypeAlias = "Sequence[OfTensor | OfContainer] | Mapping[str, OfTensor | OfContainer]"


class ShardingProtocol(Protocol):
    """How one tensor is distributed over processes, as far as a space must know; see `adjointlab.distributed`."""

    @property
    def mesh(self) -> Any:
        """The mesh of processes; all leaves of a space have the same mesh."""

    @property
    def size(self) -> int:
        """Number of entries of the whole tensor, each counted once."""

    @property
    def share(self) -> float:
        """The reciprocal of the number of processes that hold the same entries."""

    def total(self, terms: Tensor, shares: tuple[float, ...]) -> Tensor:
        """Return ``Σ shareᵢ termsᵢ`` summed over all processes, bitwise equal on all of them."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes that should hold the same entries."""

    def generator(self, generator: torch.Generator | None) -> torch.Generator:
        """Return a generator whose seed is equal on processes that hold the same entries, and different on others."""


@dataclass(frozen=True)
class TensorSpec:
    """The space ``K^shape`` of one tensor, ``K`` being the reals or the complex numbers of ``dtype``.

    Parameters
    ----------
    shape : tuple of int
        Size of every dimension.
    dtype : torch.dtype, optional
        A floating-point or complex dtype; torch's default dtype if not given.
    device : torch.device or str, optional
        The device of the tensors; torch's default device if not given.
    sharding : Sharding, optional
        How a larger tensor is distributed, if this process holds only a part of it; see :mod:`adjointlab.distributed`.

    Raises
    ------
    SpaceMismatchError
        If the dtype is neither floating-point nor complex, or the shape has no elements.

    Examples
    --------
    >>> TensorSpec((2, 3))
    TensorSpec((2, 3), torch.float32)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = None  # type: ignore[assignment]  # set in __post_init__, so that the default dtype is read at the call
    device: torch.device = None  # type: ignore[assignment]
    sharding: ShardingProtocol | None = None

    def __post_init__(self) -> None:
        dtype = torch.get_default_dtype() if self.dtype is None else self.dtype
        if not isinstance(dtype, torch.dtype) or not isinstance(self.shape, (tuple, list)):
            raise SpaceMismatchError(
                "expected the sizes of all dimensions as a tuple and a dtype such as torch.float32, got "
                f"{self.shape!r} and {dtype!r}"
            )
        # An empty tensor gives the full device: "cuda" and "cuda:0" are the same device but compare as different.
        device = torch.empty(0, device=self.device).device
        vars(self).update(shape=tuple(int(size) for size in self.shape), dtype=dtype, device=device)  # it is frozen
        if not (dtype.is_floating_point or dtype.is_complex):
            raise SpaceMismatchError(
                f"expected a floating-point or complex dtype, got {dtype}: linear maps act on real or complex "
                "numbers; convert first, e.g. x.float()"
            )
        if min(self.shape, default=1) < 1:
            raise SpaceMismatchError(
                f"expected a shape with at least one element, got the empty shape {self.shape}: give every dimension "
                "a size of 1 or more"
            )

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return the spec of ``tensor``: its shape, dtype and device."""
        if tensor.is_nested:
            raise SpaceMismatchError("expected tensors of one size, got a nested tensor: pass a tuple of tensors")
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    @property
    def is_complex(self) -> bool:
        """Whether the scalars are complex."""
        return self.dtype.is_complex

    @property
    def numel(self) -> int:
        """Number of (real or complex) entries on this process."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of entries over all processes."""
        return self.numel if self.sharding is None else self.sharding.size

    @property
    def drawn_dtype(self) -> torch.dtype:
        """The dtype of random draws, for not every device can draw in dtypes of less than 32 bits."""
        small = torch.finfo(self.dtype).bits < 32
        return {True: torch.complex64, False: torch.float32}[self.is_complex] if small else self.dtype

    def remedy(self, tensor: Tensor) -> str:
        """Return advice for a tensor that is not in this space."""
        if is_dtensor(tensor):
            return "pass what this process holds of it, .to_local()"
        if tensor.device != self.device:
            return f"move it with .to({str(self.device)!r}), or the operator with A.to({str(tensor.device)!r})"
        if tensor.is_complex() and not self.is_complex:
            return "pass its real part, or use al.complexify(A), which takes complex numbers"
        if tensor.dtype != self.dtype:
            fits = tensor.is_complex() if self.is_complex else tensor.is_floating_point()
            also = f", or the operator with A.to({tensor.dtype})" if fits else ""
            return f"convert it with .to({self.dtype}){also}"
        if tensor.layout != torch.strided:
            return f"its layout is {tensor.layout}: pass a dense tensor, .to_dense()"
        return "reshape it, or build the operator for this shape (batch_dims=k leaves the first k sizes free)"

    def __repr__(self) -> str:
        device = [repr(str(self.device))] if needs_device(self.device) else []
        of = [] if self.sharding is None else [repr(self.sharding)]
        return f"TensorSpec({', '.join([str(self.shape), str(self.dtype), *device, *of])})"


def needs_device(device: torch.device) -> bool:
    """Return whether a device has to be written for a tensor to be made there: it is not the CPU by default."""
    return device.type != "cpu" or torch.empty(0).device.type != "cpu"


def is_dtensor(value: Any) -> bool:
    """Return whether a tensor is a DTensor, without importing the DTensor module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def refuse_dtensor(value: Any) -> None:
    """Raise on a DTensor: some of torch's ops are silently wrong on it, such as convolutions of sharded images."""
    if type(value) is not Tensor and is_dtensor(value):
        raise SpaceMismatchError(
            f"expected a plain tensor, got {describe(value)}: an element of a sharded space is the tensor that each "
            "process holds, x.to_local(), in the space adjointlab.distributed.space(x.shape, x.device_mesh, "
            "x.placements)"
        )


def is_shape(value: Any) -> bool:
    """Return whether a value is a shape: a non-empty tuple or list of integers."""
    return isinstance(value, (tuple, list)) and bool(value) and all(type(size) is int for size in value)


def is_array(value: Any) -> bool:
    """Return whether a value is an array of NumPy's."""
    return isinstance(value, np.ndarray)


def describe(value: Any) -> str:
    """Return a value in words, for an error message."""
    if isinstance(value, Tensor):
        if is_dtensor(value):
            return f"a DTensor of shape {tuple(value.shape)}"
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    if isinstance(value, (bool, int, float, complex)) or value is None:
        return repr(value)
    if is_array(value):
        return f"a NumPy array of shape {value.shape}, {value.dtype}"
    return f"an object of type {type(value).__name__}"
