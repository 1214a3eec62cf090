"""Names for type checkers: of what an operator maps to what, ``A: X → Y``; nothing here does anything at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

# An element, as opposed to the shape of one: type checkers tell them apart by what is at the leaves.
Element: TypeAlias = "Tensor | Sequence[Element] | Mapping[str, Element]"
Container: TypeAlias = "Sequence[Element] | Mapping[str, Element]"

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # whose variables have defaults, as those of typing do from Python 3.13 on

    X = TypeVar("X", default=Any)
    Y = TypeVar("Y", default=Any)
    Z = TypeVar("Z", default=Any)
    E = TypeVar("E", bound=Container)
    F = TypeVar("F", bound=Container)
else:
    from typing import TypeVar

    X, Y, Z, E, F = map(TypeVar, "XYZEF")
