"""How operators are written: ``2 A + Bᴴ``, with a letter for each operator that is not made of others."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adjointlab.space import Space, TensorSpec

SUM, PRODUCT, POWER = range(3)  # how tightly an expression binds; one that binds less tightly is put into brackets
_LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"  # I is the identity
_MOST_PARTS = 6  # of a stack; of more, three are written and the last
_MOST_LEAVES = 3  # of a space whose sizes are all written


@dataclass(frozen=True)
class Notation:
    """How an operator is written in terms of its parts: ``"{} + {}"``, which binds as a sum, of parts that do so too.

    A stack, ``"vstack"``, is written with all its parts; one with a meaning is a letter.
    """

    template: str = ""
    level: int = POWER + 1
    parts: int = SUM  # the level below which a part is put into brackets
    is_stack: bool = False
    meaning: str = ""
    letter: str = "A"  # that it has by custom, if that is free


class Expression:
    """An operator as an expression in letters, and the operators that the letters stand for."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.letters: dict[str, Any] = {}
        self.text = self._write(operator, SUM)

    def _write(self, operator: Any, least: int) -> str:
        if operator._side != operator._body.main:  # a power of a power is put into brackets too: (Aᵀ)ᴴ
            text, level = f"{self._write(operator.H, POWER + 1)}ᴴ", POWER
        else:
            text, level = self._itself(operator)
        return f"({text})" if level < least else text

    def _itself(self, operator: Any) -> tuple[str, int]:
        notation, parts = operator._body.notation, operator.parts
        if notation is None or notation.meaning:
            return self._letter(operator), POWER + 1
        if notation.is_stack:
            shown = [self._write(part, SUM) for part in (parts if len(parts) <= _MOST_PARTS else parts[:3])]
            shown += ["…", self._write(parts[-1], SUM)] if len(parts) > _MOST_PARTS else []
            return f"{notation.template}({', '.join(shown)})", POWER + 1
        text = notation.template.format(*[self._write(part, notation.parts) for part in parts])
        return text.replace("+ −", "− "), notation.level

    def _letter(self, operator: Any) -> str:
        for letter, known in self.letters.items():
            if known is operator:
                return letter
        first = operator._body.notation.letter if operator._body.notation else "A"
        usual = *_LETTERS[_LETTERS.index(first) :], *_LETTERS
        rest = f"A{len(self.letters)}"
        letter = next((letter for letter in usual if letter not in self.letters), rest)
        self.letters[letter] = operator
        return letter

    def __str__(self) -> str:
        arrow = f"{outline(self.operator.domain)} → {outline(self.operator.codomain)}"
        meanings = [
            f"  {letter} = {textwrap.indent(meaning(operator), '  ').lstrip()}"
            for letter, operator in self.letters.items()
        ]
        return "\n".join([f"{type(self.operator).__name__} {self.text}: {arrow}", *meanings])


def meaning(operator: Any) -> str:
    """Return the meaning of an operator's letter, in words."""
    body = operator._body
    if body.notation is not None:
        return str(body.notation.meaning)
    if body.source is not None:
        return f"{'the linear part of ' * body.source.options.affine}{name_of(body.source.callable)}"
    function, adjoint = map(name_of, body.functions)
    return f"{function}, with the adjoint {adjoint}"


def number(scalar: Any) -> str:
    """Return a factor as it is written: a tensor is ``c``, since its value may change."""
    if isinstance(scalar, Tensor):
        return "c"
    return f"{scalar:g}".replace("-", "−") if isinstance(scalar, (int, float)) else str(scalar)


def multiple(scalar: Any) -> Notation:
    """Return the notation of ``cA``."""
    text = number(scalar)
    if text == "−1":
        return Notation("−{}", SUM, PRODUCT)
    return Notation(f"{text} {{}}", SUM if text.startswith("−") else PRODUCT, PRODUCT)


def name_of(function: Callable[..., Any]) -> str:
    """Return a module as PyTorch prints it, or a function by its name, a lambda by its place."""
    if isinstance(function, nn.Module):
        return repr(function)
    if {"selection", "__wrapped__"} <= getattr(
        function, "__dict__", {}
    ).keys():  # rows of what another function returns
        return f"{function} of {name_of(inspect.unwrap(function))}"
    if isinstance(function, functools.partial):
        return f"partial of {name_of(function.func)}"
    is_builtin = inspect.isbuiltin(function)
    name = getattr(function, "__name__" if is_builtin else "__qualname__", "")
    if not name:
        return f"a {type(function).__name__}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    if "<lambda>" in name and code is not None:
        return f"the lambda at {Path(code.co_filename).name}:{code.co_firstlineno}"
    return f"the function {name.rpartition('<locals>.')[2]}"


class _Plain(str):
    """Text without quotes around it."""

    __slots__ = ()
    __repr__ = str.__str__


def outline(space: Space) -> str:
    """Return the sizes of a space and its dtype, for people: a free size is ``*``."""

    def leaf(spec: TensorSpec) -> _Plain:
        sizes = ["*"] * space.batch_dims + [str(size) for size in spec.shape[space.batch_dims :]]
        shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        where = "" if spec.device.type == "cpu" else f" on {spec.device}"
        return _Plain(f"{shape} {str(spec.dtype).removeprefix('torch.')}{where}")

    weighted = "" if space.weight is None else ", weighted"
    if len(space.specs) > _MOST_LEAVES:
        return f"{len(space.specs)} tensors of {space.size:,} entries in all{weighted}"
    return f"{space.unflatten([leaf(spec) for spec in space.specs])!r}{weighted}"
