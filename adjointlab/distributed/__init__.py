"""Operators larger than one machine, over ``torch.distributed``: ``⟨a, b⟩ = Σᵣ ⟨aᵣ, bᵣ⟩`` on sharded spaces.

On each process, an element is represented by the tensor that this process holds. Solvers, checks and norms are called
as on one machine.
"""

from adjointlab.distributed.blocks import block_diag, hstack, vstack
from adjointlab.distributed.communication import all_reduce, replicate
from adjointlab.distributed.convolution import convolution, halo_exchange
from adjointlab.distributed.derive import linear_operator
from adjointlab.distributed.failure import raise_on_all_ranks
from adjointlab.distributed.parts import gather, shard
from adjointlab.distributed.sharding import Sharding, direct_sum, replicated, space

__all__ = [
    "Sharding", "all_reduce", "block_diag", "convolution", "direct_sum", "gather", "halo_exchange", "hstack",
    "linear_operator", "raise_on_all_ranks", "replicate", "replicated", "shard", "space", "vstack",
]  # fmt: skip
