"""How an operator is to be derived: the engine, and the rules for kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adjointlab.transpose.kernels.convolution import ConvSpec
from adjointlab.transpose.kernels.select import (
    Chooser,
    MapChooser,
    SumChooser,
    choose,
    is_quicker,
    quickest,
    suits_transform,
)

ENGINES = ("auto", "eager", "traced", "compiled")
DERIVATIVES = ("autograd", "forward")


@dataclass(frozen=True)
class Options:
    """How an operator is to be derived.

    ``budget`` is in seconds; ``progress`` says whether builds show theirs; ``choose`` is the rule for kernels,
    ``choose_map`` that for maps by index, None for none, ``choose_sum`` that for sums of pieces; ``transform`` that for
    gradients in a kernel; ``options`` are for torch.compile. ``for_gram`` says that of an operator made
    of others nothing but the gram is wanted: only that is lowered.
    """

    requested: str = "auto"
    affine: bool = False
    lowering: bool = True
    autotune: bool = False
    derivative: str = "autograd"
    tol: float | None = None
    check: bool = True
    budget: float = 20.0
    progress: bool | None = None
    choose: Chooser | None = None
    choose_map: MapChooser | None = quickest
    choose_sum: SumChooser = is_quicker
    transform: Callable[[ConvSpec], bool] = suits_transform
    options: dict[str, Any] = field(default_factory=dict)
    for_gram: bool = False

    def __post_init__(self) -> None:
        if self.requested not in ENGINES:
            raise ValueError(f"expected engine to be one of {', '.join(ENGINES)}, got {self.requested!r}")
        if self.derivative not in DERIVATIVES:
            raise ValueError(f"expected derivative to be one of {', '.join(DERIVATIVES)}, got {self.derivative!r}")

    @property
    def chooser(self) -> Chooser:
        """The rule for kernels."""
        return self.choose or functools.partial(choose, thorough=self.autotune)

    @property
    def seconds(self) -> float:
        """How long a trace may take: as long as it takes where it was asked for."""
        return self.budget if self.requested == "auto" else math.inf

    @property
    def modes(self) -> list[str]:
        """The ways to run a graph, the most wanted first; the first that passes the self-check is used."""
        modes = ["lowered", "plain"] if self.lowering and not self.for_gram else ["plain"]
        return ["compiled", *modes] if self.requested == "compiled" else modes
