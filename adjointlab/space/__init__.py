"""Inner-product spaces of pytrees of tensors: ``⟨a, b⟩ = Σ conj(aᵢ) bᵢ``."""

from adjointlab.space.space import Space
from adjointlab.space.spec import TensorSpec

__all__ = ["Space", "TensorSpec"]
