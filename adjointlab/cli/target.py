"""Conversion of a target ``import.path:name(literal, name=literal).name`` into a callable.

The text is never evaluated: :mod:`ast` parses it, and :func:`ast.literal_eval` reads the arguments.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typer import TyperException

if TYPE_CHECKING:  # imported where it is needed: `--help` is not to wait for it
    import torch

COMMON_DTYPES = ("float32", "float64", "complex64", "complex128", "bfloat16", "float16")
_NOT_A_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)
_LONGEST_LINE = 500


class UnusableError(TyperException):
    """The input cannot be used; the message is the line that the user sees."""


@dataclass(frozen=True)
class Target:
    """``module:path`` or ``module:path(*args, **kwargs)``, ``called`` tells which, with attributes ``after`` a call."""

    text: str
    module: str
    path: tuple[str, ...]
    called: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()


def parse_target(text: str) -> Target:
    """Parse ``import.path:name(literal, name=literal).name``, without importing or evaluating anything.

    >>> parse_target("torch.nn:Conv2d(1, 8, (3, 5), bias=False)").args
    (1, 8, (3, 5))
    >>> parse_target("mymodels:Physics(3).A").after
    ('A',)
    """
    module, colon, call = (part.strip() for part in text.partition(":"))
    if not colon:
        guess = re.fullmatch(r"((?:\w+\.)+)(\w+(?:\(.*\))?)", module, re.DOTALL)
        hint = f"; did you mean {guess[1][:-1]}:{guess[2]}?" if guess else ""
        raise UnusableError(f"expected import.path:name or import.path:name(arguments), got no colon{hint}")
    if not all(part.isidentifier() for part in module.split(".")):
        guessed = module.removesuffix(".py").removeprefix("./").replace("/", ".")
        hint = f"; did you mean {guessed}:{call}?" if module.endswith(".py") else ""
        raise UnusableError(f"expected an import path such as torch.nn before the colon, got {module!r}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "0or 1" is refused below anyway
            node = ast.parse(call, mode="eval").body
    except _NOT_A_LITERAL:
        raise UnusableError(f"expected name or name(arguments) after the colon, got {call!r}") from None
    after: list[str] = []
    if any(isinstance(part, ast.Call) for part in ast.walk(node)):
        while isinstance(node, ast.Attribute):
            after.insert(0, node.attr)
            node = node.value
    name, called = (node.func, True) if isinstance(node, ast.Call) else (node, False)
    args, kwargs = _literals(node) if isinstance(node, ast.Call) else ((), {})
    if not all(isinstance(part, (ast.Name, ast.Attribute, ast.Load)) for part in ast.walk(name)):
        raise UnusableError(f"expected name or name(arguments) after the colon, got {call!r}")
    return Target(text, module, tuple(ast.unparse(name).split(".")), called, args, kwargs, tuple(after))


def _literals(call: ast.Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def literal(node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except _NOT_A_LITERAL:
            raise UnusableError(
                f"arguments must be literals (numbers, strings, tuples, True, None, …), got {_source(node)!r}; for "
                "anything else write a function without arguments in a file, and name that"
            ) from None

    if any(keyword.arg is None for keyword in call.keywords):
        raise UnusableError("arguments must be literals, got **")
    return tuple(map(literal, call.args)), {str(k.arg): literal(k.value) for k in call.keywords}


def _source(node: ast.expr) -> str:
    with contextlib.suppress(Exception):
        return ast.unparse(node)
    return type(node).__name__


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse ``"1,1,64,64"`` or ``"1x1x64x64"`` as a shape with at least one element.

    >>> parse_shape("1,1,64,64")
    (1, 1, 64, 64)
    """
    bare = re.sub(r"^\((.*)\)$", r"\1", text.strip()).rstrip(",")
    sizes = re.split(r"\s*[,x]\s*", bare.strip())
    if not all(re.fullmatch(r"[+-]?[0-9]{1,4000}", size) for size in sizes):
        raise UnusableError(f"expected --shape as sizes such as 1,1,64,64, got {text!r}")
    shape = tuple(map(int, sizes))
    if min(shape) < 1:
        raise UnusableError(f"expected every size in --shape to be 1 or more, got {text!r}")
    if len(shape) > 64:
        raise UnusableError(f"expected at most 64 dimensions in --shape, got {len(shape)}")
    return shape


def parse_dtype(text: str) -> torch.dtype:
    """Return the floating-point or complex dtype called ``text`` in torch.

    >>> parse_dtype("complex64")
    torch.complex64
    """
    import torch

    name = text.strip().removeprefix("torch.")
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        known = ", ".join(COMMON_DTYPES)
        raise UnusableError(f"expected --dtype to be a floating-point or complex dtype ({known}), got {text!r}")
    return dtype


def parse_device(text: str) -> torch.device:
    """Return the device called ``text``, after creating a tensor on it as a test.

    >>> parse_device("cpu")
    device(type='cpu')
    """
    import torch

    try:
        probe = torch.zeros(1, device=text.strip())
        probe.cpu()  # "meta" holds no numbers
    except Exception as error:
        raise UnusableError(
            f"expected --device to be a device of this machine, got {text!r}: {one_line(error)}"
        ) from error
    return probe.device


def parse_kwargs(text: str) -> dict[str, Any]:
    """Parse ``"name=literal, name=literal"`` as a dictionary.

    >>> parse_kwargs("n=64, norm='ortho'")
    {'n': 64, 'norm': 'ortho'}
    """
    try:
        target = parse_target(f"kwargs:f({text})")
    except UnusableError:
        target = None
    if target is None or not target.called or target.args or target.path != ("f",):
        raise UnusableError(f"expected --kwargs as name=literal, …, got {text!r}")
    return target.kwargs


def memory_of_machine() -> int:
    """Return the memory of this machine in bytes, or 2³⁴ if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**34


def check_memory(needed: int, what: str, memory: float) -> None:
    """Raise ``UnusableError`` if ``what`` needs more than half of this machine's memory."""
    if needed > memory / 2:
        have = memory / 2**30
        raise UnusableError(
            f"{what} needs about {needed / 2**30:.3g} GiB, and this machine has {have:.3g} GiB of memory"
        )


def one_line(error: BaseException | str) -> str:
    """Return the message on one printable line of reasonable length."""
    text = error if isinstance(error, str) else str(error) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 1] + "…"


# -- from names to operators ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Put the current directory first on the import path, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def load(target: Target, memory: float = math.inf) -> Callable[..., Any]:
    """Return the module or function that ``target`` names, or the result of a call that fits into ``memory``."""
    try:
        found: Any = importlib.import_module(target.module)
    except (Exception, SystemExit) as error:
        raise UnusableError(f"cannot import {target.module}: {type(error).__name__}: {one_line(error)}") from error
    found, where = _inside(found, target.module, target.path)
    if target.called:
        found, where = _inside(_call(target, found, memory), where, target.after)
    elif isinstance(found, type):
        text = target.text.strip()
        raise UnusableError(f"{where} is a class: add its arguments in parentheses, as in {text}{_signature(found)}")
    if not callable(found):
        what = "returned" if target.called and not target.after else "is"
        raise UnusableError(
            f"expected a module or a function, but {where} {what} an object of type {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]


def _inside(found: Any, where: str, path: tuple[str, ...]) -> tuple[Any, str]:
    """Return an attribute of an object, or the object for no path, and what to call it."""
    for name in path:
        try:
            found = getattr(found, name)
        except Exception as error:
            close = difflib.get_close_matches(name, dir(found), 1, 0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnusableError(f"{where} has no {name!r}{hint}") from error
        where = f"{where}.{name}"
    return found, where


def _signature(cls: type) -> str:
    required: list[str] = []
    with contextlib.suppress(Exception):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(cls).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    return f"({', '.join(required)})"


def _call(target: Target, factory: Any, memory: float) -> Any:
    import torch

    from adjointlab.tree import tree_flatten

    text = target.text.strip()
    if not callable(factory):
        raise UnusableError(
            f"{'.'.join(target.path)} cannot be called: it is an object of type {type(factory).__name__}"
        )
    numbers = [abs(n) for n in tree_flatten((target.args, target.kwargs))[0] if type(n) is int and n]
    try:
        if math.prod(numbers) > 10**8 and isinstance(factory, type) and issubclass(factory, torch.nn.Module):
            with torch.device("meta"):  # parameters without memory, to compute how much memory they need
                draft = factory(*target.args, **target.kwargs)
            check_memory(sum(p.numel() * p.element_size() for p in draft.parameters()), "the module", memory)
        return factory(*target.args, **target.kwargs)
    except UnusableError:
        raise
    except (Exception, SystemExit) as error:
        raise UnusableError(f"cannot make {text}: {type(error).__name__}: {one_line(error)}") from error
