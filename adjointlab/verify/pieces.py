"""Mistakes with A's own pieces: its derived adjoint with a tensor or an operation changed, as functions of y.

A knows the tensors that its function reads, with their names, and its adjoint as a program. A hand-written adjoint
shows the tensors that it reads as well.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from adjointlab.operators import LinearOperator
from adjointlab.space.algebra import conjugated
from adjointlab.transpose.graph.ops import packet_of
from adjointlab.transpose.runtime.derivation import Derivation
from adjointlab.transpose.runtime.program import canonical
from adjointlab.verify.checked_map import Tensors, listed
from adjointlab.verify.comparison import Change
from adjointlab.verify.tape import Function, Tape

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution, aten.convolution_backward)
_SAME = {
    aten._conj, aten.clone, aten.t, aten.transpose, aten.unsqueeze, aten.view, aten.expand, aten.view_as_real,
    aten.select, aten.add, aten.sub,
}  # fmt: skip
# The last four stand for the parts of a complex kernel.
_PRODUCTS = (aten.mm, aten.mv, aten.bmm, aten.addmm, aten.matmul)
_FACTORS = {*_PRODUCTS, aten.mul, aten._fft_c2c, aten.roll}  # that are told apart by their order
_PADDINGS = {"constant": "zero", "circular": "circular", "reflect": "reflecting", "replicate": "replicating"}


class Mistake(NamedTuple):
    """A mistake in words, and as a function of the leaves of y; ``turned`` is Aᴴ for i times the tensor at fault."""

    words: str
    function: Function
    turned: Function | None = None


@dataclass(frozen=True)
class _State:
    """One tensor that A reads: its place in the state, its name and value, and the kinds of operations that read it."""

    index: int
    name: str
    value: Tensor
    readers: frozenset[Any]


def of_pieces(operator: LinearOperator, adjoint: Callable[..., Any]) -> Iterator[Mistake]:
    """Yield the mistakes with the pieces of a derived operator, the likeliest first."""
    # There are none if the operator is made of others, has no graph, or has changed since.
    source = operator.source
    derivation = None if source is None else source.nominal
    values = None if derivation is None else derivation.state_now()
    if source is None or derivation is None or not derivation.programs or values is None:
        return
    name = "adjoint" if operator.codomain == source.codomain and operator.domain == source.domain else "linear"
    graph = derivation.graphs[name]
    known = read_tensors(source.callable)
    states = []
    for index, (value, node) in enumerate(zip(values, graph.placeholders, strict=False)):
        title = next((k for k, t in known.items() if t is value), derivation.state[index].name)
        readers = frozenset(map(packet_of, _reached(node.users, lambda n: n.users)))
        states.append(_State(index, f"`{title}`", value.detach(), readers))
    yield from _of_state(derivation, name, values, states, read_tensors(adjoint))
    tape = Tape(graph, values)
    yield from _of_program(tape, states)
    if name == "adjoint" and len(source.domain.specs) == 1:
        yield from _of_padding(tape, source.domain.specs[0].shape)


def read_tensors(function: Any, depth: int = 2) -> dict[str, Tensor]:
    """Return the tensors that a Python function names: variables that it closes over, globals, defaults, attributes."""
    while isinstance(function, (functools.partial, types.MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, nn.Module):
        return {**dict(function.named_parameters()), **dict(function.named_buffers())}
    if not isinstance(function, types.FunctionType):
        return {}
    names: dict[str, Any] = {
        k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty
    }
    names |= {k: function.__globals__[k] for k in function.__code__.co_names if k in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():  # a cell that is not filled yet has no contents
            names[name] = cell.cell_contents
    found = {name: value for name, value in names.items() if isinstance(value, Tensor)}
    for name, value in names.items() if depth else ():
        if isinstance(value, (types.FunctionType, nn.Module)) and not isinstance(value, LinearOperator):
            inner = read_tensors(value, depth - 1)
            found |= {k if isinstance(value, types.FunctionType) else f"{name}.{k}": t for k, t in inner.items()}
    return found


def _reached(nodes: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Yield nodes, and what is reached from them through operations that leave the numbers as they are."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        pending += onward(node) if packet_of(node) in _SAME else ()


# -- changed tensors -------------------------------------------------------------------------------------------------


def _of_state(
    derivation: Derivation, name: str, values: Tensors, states: list[_State], others: dict[str, Tensor]
) -> Iterator[Mistake]:
    """Yield the mistakes with single tensors, then with two and with all of them."""

    def swapped(changes: dict[int, Tensor]) -> Function:
        state = tuple(canonical(changes[k]) if k in changes else value for k, value in enumerate(values))
        return lambda y: derivation.run(name, state, y)

    changed = [s for s in states if s.value.is_floating_point() or s.value.is_complex()]
    complexes = [s for s in changed if s.value.is_complex()]
    for number in sorted({len(complexes), 2, 1} - {0}, reverse=True):
        for some in combinations(complexes, number):
            conjugates = swapped({s.index: conjugated(s.value) for s in some})
            # Aᴴ is linear or antilinear in a tensor, which its product with i shows.
            turned = swapped({s.index: 1j * s.value for s in some}) if number == 1 else None
            words = f"conjugate{'s' if number > 1 else ''} missing: conjugate {', '.join(s.name for s in some)}"
            yield Mistake(words, conjugates, turned)
    for s in changed:
        for words, change in _changes(s):
            value = change(s.value)
            if value.shape == s.value.shape:
                yield Mistake(words, swapped({s.index: value.contiguous()}))
    for s, r in combinations(changed, 2):
        if s.value.shape == r.value.shape and s.value.dtype == r.value.dtype:
            words = f"factors in the wrong order: {s.name} and {r.name} exchanged"
            yield Mistake(words, swapped({s.index: r.value, r.index: s.value}))
    unread = {title: t for title, t in others.items() if not any(t is s.value for s in states)}
    for (title, other), s in product(unread.items(), changed):
        alike = other.shape == s.value.shape and other.device == s.value.device
        if alike and f"`{title}`" != s.name and other.is_complex() <= s.value.is_complex():
            function = swapped({s.index: other.detach().to(s.value.dtype)})
            yield Mistake(f"reads `{title}` where A reads {s.name}", function)


def _changes(s: _State) -> Iterator[tuple[str, Change]]:
    """Yield the common mistakes with one tensor, in words and as changes of it."""
    t = s.value
    if s.readers & set(_CONVOLUTIONS) and t.ndim > 2:
        yield from _of_kernel(s)
        return
    if t.ndim >= 2 and s.readers & set(_PRODUCTS):
        yield f"matrix {s.name} not transposed", lambda t: t.mT
        if t.is_complex():
            yield f"matrix {s.name} neither transposed nor conjugated", lambda t: conjugated(t.mT)
        return
    yield f"{s.name} is missing (a forgotten mask or weight)", torch.ones_like
    if bool(t.all()):
        yield f"divides by {s.name}: an inverse, not an adjoint", lambda t: 1 / conjugated(t)
    yield f"{s.name} is applied twice", torch.square
    long = [d for d in range(t.ndim) if t.shape[d] > 1]
    for d in long:
        yield f"{s.name} is reversed along dim {d}", partial(torch.flip, dims=(d,))
    for dims in dict.fromkeys((tuple(long), tuple(long[-2:]))):
        if dims:
            shift = f"{s.name} is shifted by half its size along dim {listed(dims)} (fftshift)"
            yield shift, partial(torch.fft.fftshift, dim=dims)


def _of_kernel(s: _State) -> Iterator[tuple[str, Change]]:
    space = tuple(range(2, s.value.ndim))
    exchanges = {"": (0, 0), "kernel's channels exchanged (in and out)": (0, 1)}
    exchanges |= {f"kernel transposed along dims {i} and {j}": (i, j) for i, j in combinations(space, 2)}
    conjugations = ("", "conjugate missing") if s.value.is_complex() else ("",)
    for count in (len(space), 0, *range(len(space) - 1, 0, -1)):
        for some in combinations(space, count):
            flipped = f"kernel not flipped{'' if count == len(space) else f' along dim {listed(some)}'}" if some else ""
            for (exchanged, dims), missing in product(exchanges.items(), conjugations):
                words = ", ".join(filter(None, (flipped, exchanged, missing)))
                if words not in {"", "conjugate missing"} and (count in {0, len(space)} or not exchanged):
                    change = partial(_rearranged, flipped=some, exchanged=dims, conjugate=bool(missing))
                    yield f"{words} ({s.name})", change


def _rearranged(t: Tensor, flipped: tuple[int, ...], exchanged: tuple[int, int], conjugate: bool) -> Tensor:
    result = t.flip(flipped).transpose(*exchanged)
    return result.conj().resolve_conj() if conjugate else result


# -- changed operations ----------------------------------------------------------------------------------------------


def _of_program(tape: Tape, states: list[_State]) -> Iterator[Mistake]:
    """Yield the mistakes with single operations, then with their order."""
    graph = tape.graph
    names = {graph.placeholders[s.index]: s.name for s in states}
    for node, operand in tape.operands.items():
        if operand is not None:
            yield from _of_node(tape, node, operand, names)
    rolls = [n for n in tape.operands if packet_of(n) is aten.roll]
    if len(rolls) > 1:
        words = f"{_shift_words(rolls[0])} (all {len(rolls)} of them)"
        yield Mistake(words, tape.changed({node: _back(node) for node in rolls}))
        yield Mistake(f"all {len(rolls)} shifts are missing", tape.changed(dict.fromkeys(rolls)))
    chain = list(tape.operands) if None not in tape.operands.values() and len(graph.inputs) == 1 else []
    shapes = {_meta(n) for n in (*chain, *graph.inputs)}
    if len(shapes) == 1 and len(chain) > 1 and graph.outputs == [chain[-1]]:
        factors = [packet_of(n) in _FACTORS for n in chain]
        for k in range(len(chain) - 1):
            if factors[k] and factors[k + 1]:
                order = [*chain[:k], chain[k + 1], chain[k], *chain[k + 2 :]]
                words = f"factors in the wrong order: {_title(chain[k], names)} and {_title(chain[k + 1], names)}"
                yield Mistake(words, tape.reordered(order))
        if len(chain) > 2 and all(factors):
            yield Mistake("factors in the wrong order: all of them, last to first", tape.reordered(chain[::-1]))


def _of_node(tape: Tape, node: fx.Node, operand: fx.Node, names: dict[fx.Node, str]) -> Iterator[Mistake]:
    packet, left_out = packet_of(node), tape.changed({node: None})
    if packet is aten.roll:
        yield Mistake(_shift_words(node), tape.changed({node: _back(node)}))
        yield Mistake(f"a shift by {_by(node)} is missing (roll, fftshift or ifftshift)", left_out)
    elif packet is aten.convolution_backward:
        yield from _of_dilation(tape, node)
    elif packet is aten.flip:
        yield Mistake("a reversal is missing (flip)", left_out)
    elif packet is aten._conj:
        yield Mistake("conjugate missing: of an intermediate result", left_out)
    elif packet is aten._fft_c2c:
        wrong = tape.changed({node: {3: not node.args[3]}})
        yield Mistake("Fourier transform in the wrong direction (fft and ifft exchanged)", wrong)
    elif packet is aten.mul and _meta(operand) == _meta(node):
        place = 1 if node.args[0] is operand else 0
        factor = tape.known.get(node.args[place])  # type: ignore[arg-type]
        title = _title(node, names)
        if isinstance(factor, Tensor):
            yield Mistake(f"{title} is missing (a forgotten mask or weight)", left_out)
            if factor.is_complex():
                wrong = tape.changed({node: {place: conjugated(factor)}})
                yield Mistake(f"conjugate missing: conjugate {title}", wrong)


def _of_dilation(tape: Tape, node: fx.Node) -> Iterator[Mistake]:
    kernel: Any = node.args[2]
    paddings, dilations = (list(node.args[k]) for k in (5, 6))  # type: ignore[arg-type]
    for other in (1, 2, 3):
        moves = [(other - d) * (k - 1) for d, k in zip(dilations, kernel.meta["val"].shape[2:], strict=True)]
        found = [p + m // 2 for p, m in zip(paddings, moves, strict=True)]
        if any(moves) and not any(m % 2 for m in moves) and min(found) >= 0:
            words = f"dilation of {other} where A has {', '.join(map(str, dict.fromkeys(dilations)))}"
            yield Mistake(words, tape.changed({node: {5: found, 6: [other] * len(found)}}))


def _meta(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (None,)


def _moves(node: fx.Node) -> list[tuple[int, int]]:
    shifts, dims = node.args[1:3]
    return [(int(k), int(d)) for k, d in zip(shifts, dims, strict=True)]  # type: ignore[arg-type]


def _back(node: fx.Node) -> dict[int, Any]:
    """Return the arguments that change for a shift in the other direction."""
    return {1: [-k for k, _ in _moves(node)]}


def _by(node: fx.Node) -> str:
    return " and ".join(f"{abs(k)} along dim {d}" for k, d in _moves(node))


def _shift_words(node: fx.Node) -> str:
    shape = node.meta["val"].shape
    half = all(abs(k) in {shape[d] // 2, (shape[d] + 1) // 2} for k, d in _moves(node))
    why = " (fftshift and ifftshift exchanged)" if half else " (roll)"
    return f"shifted by {_by(node)} in the wrong direction{why}"


def _title(node: fx.Node, names: dict[fx.Node, str]) -> str:
    """Return the name of the tensor that an operation on y reads, or that of the operation."""
    read = _reached(node.all_input_nodes, lambda n: n.all_input_nodes)
    packet = packet_of(node)
    computed = {aten.mul: "a factor computed by A", aten._fft_c2c: "the Fourier transform"}
    unnamed = computed.get(packet, getattr(packet, "__name__", "an operation"))
    return next((names[n] for n in read if n in names), unnamed)


# -- other padding modes ---------------------------------------------------------------------------------------------


def _of_padding(tape: Tape, shape: tuple[int, ...]) -> Iterator[Mistake]:
    """Yield the adjoints of the last convolution for other padding modes; a convolution is A's first step."""
    steps = list(tape.operands)
    backward = [n for n in steps if packet_of(n) is aten.convolution_backward and n.args[7] is False]
    node: Any = backward[-1] if backward else None
    if node is None:
        return
    stride, padding, dilation, groups = (node.args[k] for k in (4, 5, 6, 9))
    assert isinstance(padding, list)
    dims = len(padding)
    primal = node.args[1].meta["val"].shape
    padded = [n + 2 * p for n, p in zip(primal[2:], padding, strict=True)]
    pads = [(n - m) // 2 for n, m in zip(padded, shape[-dims:], strict=True)]
    if len(shape) < dims or not any(pads) or min(pads) < 0:
        return
    inner = [n - 2 * p for n, p in zip(padded, pads, strict=True)]

    @functools.cache  # by draw, since the paddings share them
    def full(y: Tensors) -> Tensor:
        known = tape.values(y, steps[: steps.index(node)], {})
        grad, weight = (known[node.args[k]] for k in (0, 2))
        empty = torch.zeros((*primal[:2], *padded), dtype=grad.dtype, device=grad.device)
        none = [0] * dims
        args = (grad, empty, weight, None, stride, none, dilation, False, none, groups, [True, False, False])
        return aten.convolution_backward(*args)[0]  # type: ignore[no-any-return]

    def folded(y: Tensors, mode: str) -> Tensors:
        u = full(y)
        with torch.enable_grad():
            x = torch.zeros((*u.shape[:2], *inner), dtype=u.dtype, device=u.device, requires_grad=True)
            image = nn.functional.pad(x, [p for p in reversed(pads) for _ in range(2)], mode=mode)
        return (torch.autograd.grad(image, x, u)[0].reshape(shape),)

    for mode, title in _PADDINGS.items():
        if mode == "constant" or all(p < n for p, n in zip(pads, inner, strict=True)):
            yield Mistake(f"wrong padding mode: the adjoint for {title} padding", partial(folded, mode=mode))
