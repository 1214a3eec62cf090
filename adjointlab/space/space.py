r"""Spaces: ``⟨a, b⟩ = Σ conj(aᵢ) bᵢ`` over all leaves of a pytree of tensors.

PyTorch's vector-Jacobian product is the adjoint for the *real* inner product ``Re⟨·, ·⟩``. If a map is
complex-linear between complex spaces, this adjoint is the Hermitian adjoint for ``⟨·, ·⟩``. If the domain or the
codomain is real (``rfft``, ``x.real``, ``x.to(complex)``), or the map is antilinear (``conj``), an adjoint exists for
``Re⟨·, ·⟩`` only.

A space may have a weight W: then ``⟨a, b⟩_W = ⟨a, Wb⟩``, and the adjoint of a map between spaces with the weights
``W_X`` and ``W_Y`` is ``W_X⁻¹ Aᴴ W_Y``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypedDict, Unpack, overload

import torch
from torch import Tensor

from adjointlab.compat import pytree
from adjointlab.space.refusals import mismatch, refuse_sharded, require_sizes, spec_of
from adjointlab.space.spec import OfDict, OfPair, OfTensor, TensorSpec, is_dtensor, is_shape, needs_device
from adjointlab.space.weights import Weight, joined, weight_of
from adjointlab.tree import SINGLE, Structure, tree_flatten
from adjointlab.typed import E, X

_DOUBLE = {True: torch.complex128, False: torch.float64}


class _Options(TypedDict, total=False):
    dtype: torch.dtype | None
    device: torch.device | str | None
    batch_dims: int
    weight: Any


@dataclass(frozen=True, eq=False)
class Space(Generic[X]):
    """A finite-dimensional inner-product space of pytrees of tensors, ``⟨a, b⟩ = Σ conj(aᵢ) bᵢ`` or ``⟨a, Wb⟩``.

    Parameters
    ----------
    specs : tuple of TensorSpec
        Shape, dtype and device of every leaf.
    structure : object
        How the leaves form an element. Use :meth:`Space.of` to make a space; it finds the structure.
    batch_dims : int
        The first ``batch_dims`` dimensions of every leaf are free: they may have any sizes, equal for all leaves. Free
        sizes do not count when spaces are compared.
    weight : Weight, optional
        ``W`` of ``⟨a, b⟩ = Σ conj(aᵢ) (Wb)ᵢ``, for a space that :meth:`Space.of` was asked to make with a weight.

    Raises
    ------
    SpaceMismatchError
        If there is no leaf, ``batch_dims`` does not fit the leaves or the weight, or leaves are sharded over different
        meshes.

    Examples
    --------
    >>> space = Space.of({"image": (1, 8, 8), "offset": (3,)})
    >>> space.size
    67
    >>> float(space.norm(space.zeros()))
    0.0
    """

    specs: tuple[TensorSpec, ...]
    structure: Structure = field(default=SINGLE, repr=False)
    batch_dims: int = 0
    weight: Weight | None = None

    def __post_init__(self) -> None:
        require_sizes(self.specs, self.batch_dims)
        if self.weight is not None:
            self.weight.require(self)

    @overload
    @classmethod
    def of(cls, domain: OfTensor, **options: Unpack[_Options]) -> Space[Tensor]: ...

    @overload
    @classmethod
    def of(cls, domain: OfPair, **options: Unpack[_Options]) -> Space[tuple[Tensor, Tensor]]: ...

    @overload
    @classmethod
    def of(cls, domain: OfDict, **options: Unpack[_Options]) -> Space[dict[str, Tensor]]: ...

    @overload
    @classmethod
    def of(cls, domain: Space[E] | E, **options: Unpack[_Options]) -> Space[E]: ...

    @overload
    @classmethod
    def of(cls, domain: Any, **options: Unpack[_Options]) -> Space[Any]: ...

    @classmethod
    def of(
        cls,
        domain: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batch_dims: int = 0,
        weight: Any = None,
    ) -> Space[Any]:
        """Return the space ``K^shape`` of an example tensor, or the product of spaces of a pytree of examples.

        Parameters
        ----------
        domain : Tensor, tuple of int, TensorSpec, Space or pytree of these
            An example element. The values of tensors are ignored. A non-empty tuple or list of integers is a shape.
        dtype, device : optional
            Dtype and device of the leaves that are given as a shape.
        batch_dims : int
            Number of leading dimensions that may have any size.
        weight : float, Tensor, pytree of these, or pair of callables, optional
            ``W`` of ``⟨a, b⟩ = Σ conj(aᵢ) (Wb)ᵢ``: a positive number; positive real tensors, one for each leaf, that
            broadcast to its dimensions (without free ones); or functions ``(W, W_inverse)`` on elements, linear,
            self-adjoint and positive, which are tested on random elements. Tensors are copied. It replaces the weights
            of spaces in ``domain``, which are kept otherwise.

        Returns
        -------
        Space
            The space that contains elements like ``domain``.

        Raises
        ------
        SpaceMismatchError
            If there is no leaf, or a leaf is of another type, is empty, or is neither floating-point nor complex; or
            if the weight is not positive, is not real, or does not fit.

        Examples
        --------
        >>> Space.of((2, 3), dtype=torch.complex64)
        Space.of((2, 3), dtype=torch.complex64)
        >>> cells = Space.of((2,), weight=torch.tensor([1.0, 3.0]))
        >>> cells.inner(torch.ones(2), torch.ones(2))
        tensor(4., dtype=torch.float64)
        """
        if weight is not None:
            plain = cls.of(domain, dtype=dtype, device=device, batch_dims=batch_dims).plain
            return replace(plain, weight=weight_of(plain, weight))
        if isinstance(domain, Space):
            return replace(domain, batch_dims=batch_dims) if batch_dims else domain
        weights: list[tuple[Weight | None, int]] = []  # of each space or example in the pytree, for so many leaves

        # A space inside a pytree is replaced by one of its elements, so that its leaves become leaves of the pytree.
        def opened(leaf: Any) -> Any:
            if isinstance(leaf, Space):
                weights.append((leaf.weight, len(leaf.specs)))
                return leaf.unflatten(leaf.specs)
            weights.append((None, len(tree_flatten(leaf)[0])))
            return TensorSpec(tuple(leaf), dtype, device) if is_shape(leaf) else leaf  # type: ignore[arg-type]

        leaves, structure = tree_flatten(pytree.tree_map(opened, domain, is_leaf=is_shape))
        specs = tuple(map(spec_of, leaves))
        return cls(specs, SINGLE if structure == SINGLE else structure, batch_dims, joined(weights, specs))

    @property
    def _key(self) -> tuple[Any, ...]:
        k = self.batch_dims
        return k, tuple((spec.shape[k:], spec.dtype, spec.device, spec.sharding) for spec in self.specs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Space):
            return NotImplemented
        if self is other:
            return True
        return self._key == other._key and self.structure == other.structure and self.weight == other.weight

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def is_complex(self) -> bool:
        """Whether any leaf is complex."""
        return any(spec.is_complex for spec in self.specs)

    @property
    def size(self) -> int:
        """Number of entries over all leaves and, if the space is sharded, over all processes."""
        return sum(spec.size for spec in self.specs)

    @property
    def is_sharded(self) -> bool:
        """Whether elements are distributed over several processes, each of which holds a part."""
        return self.specs[0].sharding is not None

    @property
    def eps(self) -> float:
        """Unit roundoff of the coarsest leaf dtype."""
        return max(float(torch.finfo(spec.dtype).eps) for spec in self.specs)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the free leading dimensions of the example that defined this space."""
        return self.specs[0].shape[: self.batch_dims]

    @property
    def is_autocast(self) -> bool:
        """Whether autocast is active on the device of this space; it would change the dtype of elements."""
        return self.specs[0].device.type != "meta" and torch.is_autocast_enabled(self.specs[0].device.type)

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Return a context that turns autocast off on the device of this space."""
        return torch.autocast(self.specs[0].device.type, enabled=False) if self.is_autocast else nullcontext()

    def with_batch(self, batch_shape: Sequence[int]) -> Space[X]:
        """Return the same space with the free leading dimensions set to ``batch_shape``."""
        batch = tuple(batch_shape)
        if batch == self.batch_shape:
            return self
        specs = tuple(replace(spec, shape=batch + spec.shape[self.batch_dims :]) for spec in self.specs)
        return replace(self, specs=specs)

    @property
    def plain(self) -> Space[X]:
        """The same space without a weight."""
        return self if self.weight is None else replace(self, weight=None)

    def with_batch_dims(self, batch_dims: int) -> Space[X]:
        """Return the same space with the first ``batch_dims`` dimensions free."""
        return self if batch_dims == self.batch_dims else replace(self, batch_dims=batch_dims)

    def leaves(self, x: X, name: str = "x") -> tuple[Tensor, ...]:
        """Return the leaves of x, as they are; raise ``SpaceMismatchError``, naming x, unless x is in this space."""
        flat = self.structure.leaves(x)
        if flat is None:
            raise mismatch(self, name, x)
        found = tuple(flat)
        k = self.batch_dims
        for leaf, spec in zip(found, self.specs, strict=True):
            if (
                not isinstance(leaf, Tensor)
                or (leaf.shape[k:] != spec.shape[k:] if k else leaf.shape != spec.shape)
                or leaf.dtype != spec.dtype
                or leaf.device != spec.device
                or leaf.layout != torch.strided
                or (type(leaf) is not Tensor and is_dtensor(leaf))
            ):
                raise mismatch(self, name, x, leaf, spec)
        if k and any(leaf.shape[:k] != found[0].shape[:k] or leaf.ndim < k for leaf in found):
            raise mismatch(self, name, x)
        return found

    def check(self, x: Any, name: str = "x") -> None:
        """Raise ``SpaceMismatchError`` unless ``x`` is an element of this space."""
        self.leaves(x, name)

    def unflatten(self, leaves: Sequence[Any]) -> X:
        """Return the element with the given leaves: the inverse of :meth:`leaves`."""
        element: X = leaves[0] if self.structure is SINGLE else self.structure.unflatten(leaves)
        return element

    def zeros(self) -> X:
        """Return the zero element."""
        return self.unflatten([torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in self.specs])

    def randn(self, generator: torch.Generator | None = None) -> X:
        """Return an element of independent standard normal entries (variance 1, complex ones as well).

        Parameters
        ----------
        generator : torch.Generator, optional
            A *CPU* generator; torch's global one if not given. The draws are the same for every device. In a sharded
            space, all processes must pass generators in the same state; replicated leaves are then equal.

        Returns
        -------
        pytree of tensors
            The random element.
        """
        draws = (
            torch.randn(s.shape, dtype=s.drawn_dtype, generator=source, device="cpu")
            for s, source in zip(self.specs, self.sources(generator), strict=True)
        )
        return self.unflatten([d.to(device=s.device, dtype=s.dtype) for d, s in zip(draws, self.specs, strict=True)])

    def sources(self, generator: torch.Generator | None) -> Iterator[torch.Generator | None]:
        """Yield the generator for each leaf: the given one or, for a sharded leaf, the generator of its shard."""
        for spec in self.specs:
            yield generator if spec.sharding is None else spec.sharding.generator(generator)

    # -- geometry ------------------------------------------------------------------------------------------------

    def inner(self, a: X, b: X) -> Tensor:
        """Return ``⟨a, b⟩ = Σ conj(aᵢ) (Wb)ᵢ``, accumulated in double precision; without a weight, W is one.

        Parameters
        ----------
        a, b : pytree of tensors
            Elements of this space.

        Returns
        -------
        Tensor
            Zero-dimensional, ``complex128`` if any leaf is complex, else ``float64``.

        Examples
        --------
        >>> Space.of((2,), dtype=torch.complex64).inner(torch.tensor([1j, 0]), torch.tensor([1.0 + 0j, 0])).imag
        tensor(-1., dtype=torch.float64)
        """
        wide = _DOUBLE[self.is_complex]
        left, right = self.leaves(a, "a"), self.leaves(b, "b")
        weighted = right if self.weight is None else self.weight.times(right, wide=True)
        pairs = zip(left, weighted, strict=True)
        return self.total([torch.vdot(u.reshape(-1).to(wide), v.reshape(-1).to(wide)) for u, v in pairs])

    def weigh(self, a: X) -> X:
        """Return ``Wa``, from which plain inner products are weighted ones; without a weight, a itself.

        Parameters
        ----------
        a : pytree of tensors
            An element of this space.

        Returns
        -------
        pytree of tensors
            Another one; where a is a gradient in this space, it is that of autograd.

        Examples
        --------
        >>> Space.of((2,), weight=torch.tensor([1.0, 3.0])).weigh(torch.ones(2))
        tensor([1., 3.])
        """
        return a if self.weight is None else self.unflatten(self.weight.times(self.leaves(a, "a")))

    def unweigh(self, a: X) -> X:
        """Return ``W⁻¹a``: where a is a gradient of autograd, the gradient in this space (its Riesz representative)."""
        return a if self.weight is None else self.unflatten(self.weight.divided(self.leaves(a, "a")))

    def norm(self, a: X) -> Tensor:
        """Return ``‖a‖ = √⟨a, a⟩`` as a zero-dimensional ``float64`` tensor."""
        if self.weight is not None:
            return self.inner(a, a).real.clamp(min=0).sqrt()
        squares = [torch.linalg.vector_norm(u, dtype=_DOUBLE[u.is_complex()]).square() for u in self.leaves(a, "a")]
        return self.total(squares).sqrt() if self.is_sharded else torch.stack(squares).sum().sqrt()

    def total(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the sum of terms of one shape, one per leaf, over all processes: bitwise equal on all of them."""
        # All inner products and norms use this method, so that all processes make the same decisions.
        sharding = self.specs[0].sharding
        if sharding is not None:
            shares = tuple(spec.sharding.share for spec in self.specs if spec.sharding is not None)
            return sharding.total(torch.stack(list(terms)), shares)
        return functools.reduce(torch.add, terms)

    def every(self, condition: bool) -> bool:
        """Return whether a condition holds on this process and, if the space is sharded, on every other process."""
        if not self.is_sharded:
            return condition
        failed = torch.tensor(float(not condition), dtype=torch.float64, device=self.specs[0].device)
        zero = torch.zeros_like(failed)
        return float(self.total([failed, *[zero] * (len(self.specs) - 1)])) == 0.0

    def vector(self, a: X) -> Tensor:
        """Return the coordinates of ``a`` as one vector of ``size`` entries, leaf after leaf."""
        refuse_sharded(self)
        return torch.cat([leaf.reshape(-1) for leaf in self.leaves(a, "a")])

    def element(self, vector: Tensor) -> X:
        """Return the element with the coordinates ``vector``: the inverse of :meth:`vector`."""
        refuse_sharded(self)
        parts = torch.split(vector, [spec.numel for spec in self.specs])
        pairs = zip(parts, self.specs, strict=True)
        leaves = [(p.real if p.is_complex() and not s.is_complex else p).to(s.dtype).reshape(s.shape) for p, s in pairs]
        return self.unflatten(leaves)

    def __deepcopy__(self, memo: dict[int, Any]) -> Space[X]:
        return self  # a frozen value

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(Space.of, batch_dims=self.batch_dims, weight=self.weight)
        return make, (self.unflatten(self.specs),)  # a pytree of specs defines the space

    def __repr__(self) -> str:
        """Return Python code that makes an equal space, for ``from adjointlab import Space, TensorSpec``."""
        # Weights that are not one number are written by their shapes.
        first, options = self.specs[0], []
        leaves: list[Any] = list(self.specs)
        if all(spec == replace(first, shape=spec.shape) and spec.shape for spec in leaves) and not self.is_sharded:
            leaves, options = [spec.shape for spec in leaves], [f"dtype={first.dtype}"]
            options += [f"device={str(first.device)!r}"] if needs_device(first.device) else []
        options += [f"batch_dims={self.batch_dims}"] if self.batch_dims else []
        options += [] if self.weight is None else [f"weight={self.weight}"]
        return f"Space.of({', '.join([repr(self.unflatten(leaves)), *options])})"
