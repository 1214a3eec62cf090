r"""Is a map linear? ``f(αx + βz) = α f(x) + β f(z)``: proved from the graph of its derivative, or tested by numbers.

A *proof* is a derivative that does not read the input (the map is affine), no number taken from the input,
``f(0) = 0``, and a dot test against what autograd may hide. Everything else is evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from adjointlab.errors import NotDifferentiableError, SpaceMismatchError
from adjointlab.evidence import DETERMINISM, Counterexample, Numbers
from adjointlab.modules import buffers_kept, modules_of
from adjointlab.reporting import aligned, html_table, strict_json
from adjointlab.space import Space
from adjointlab.transpose import Derivation, Options, ReadsInputError, Transposition
from adjointlab.transpose.selfcheck import Sketch


@dataclass(frozen=True)
class LinearityReport:
    """The report on the linearity of a map, with its evidence; made by :func:`check_linearity`.

    Attributes
    ----------
    verdict : str
        ``"proved"``, ``"supported"`` (numerical evidence only) or ``"refuted"``.
    is_affine : bool
        Whether ``f(x) − f(0)`` passed as linear; true for linear maps too.
    is_complex_linear : bool
        Whether ``f(ix) = i f(x)``, as far as the spaces are complex.
    differentiable : bool
        Whether autograd's derivative passed the dot test.
    deterministic : bool
        Whether equal inputs gave equal outputs and left no trace.
    offset : float
        ``‖f(0)‖``.
    evidence : tuple of str
        What was seen, in words.
    reads_input : tuple of str
        Ops of the derivative (or reads of a number) that read the input.
    counterexample : Counterexample or None
        The law that failed.
    """

    verdict: str
    is_affine: bool
    is_complex_linear: bool
    differentiable: bool
    deterministic: bool
    offset: float
    evidence: tuple[str, ...]
    reads_input: tuple[str, ...]
    counterexample: Counterexample | None

    @property
    def _title(self) -> str:
        is_only_affine = self.is_affine and self.verdict == "refuted"
        return "linearity: affine, f(x) = A x + f(0)" if is_only_affine else f"linearity: {self.verdict}"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("affine", f"{'yes' if self.is_affine else 'no'}, ‖f(0)‖ = {self.offset:.3g}"),
            ("complex-linear", "yes" if self.is_complex_linear else "no"),
            *(("evidence", item) for item in self.evidence),
        ]
        if self.reads_input:
            rows.append(("reads the input", ", ".join(self.reads_input)))
        if self.counterexample is not None and not self.is_affine:
            rows.append(("counterexample", str(self.counterexample)))
        return rows

    def __str__(self) -> str:
        return aligned(self._title, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, self.is_affine, self._rows())

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON; numbers that are not finite become ``null``."""
        return strict_json(self.to_dict(), indent)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        seen = self.counterexample
        lists = {"evidence": list(self.evidence), "reads_input": list(self.reads_input)}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | lists | {"counterexample": None if seen is None else str(seen)}


def check_linearity(
    f: Callable[..., Any], domain: Any, *, batch_dims: int = 0, kwargs: dict[str, Any] | None = None, seed: int = 0,
    progress: bool | None = None,
) -> LinearityReport:  # fmt: skip
    """Report whether ``f(αx + βz) = α f(x) + β f(z)`` for all elements x, z of the domain.

    Parameters
    ----------
    f : nn.Module or callable
        The map; called as :func:`adjointlab.linear_operator` would.
    domain : Tensor, tuple of int, TensorSpec, Space or pytree of these
        Where it is defined.
    batch_dims : int
        Number of leading dimensions of free size.
    kwargs : dict, optional
        Fixed keyword arguments of the map.
    seed : int
        Seed of the random inputs; torch's global generator is left alone.
    progress : bool, optional
        Whether to show a line on standard error with the progress; by default on a terminal, after two seconds.

    Returns
    -------
    LinearityReport
        Verdict, evidence and counterexample; nothing is raised for a map that is not linear.

    Raises
    ------
    SpaceMismatchError
        If the domain is none, or the map does not take its elements or does not return tensors.

    Examples
    --------
    >>> import torch
    >>> check_linearity(torch.nn.Conv2d(1, 1, 3, bias=False), (1, 1, 8, 8)).verdict
    'proved'
    >>> report = check_linearity(torch.relu, (8,))
    >>> report.verdict, report.reads_input
    ('refuted', ('threshold_backward',))
    """
    require_map(f)
    space = like_parameters(f, domain, batch_dims).plain
    source = Transposition(f, space, kwargs, Options(progress=progress))
    return assess(source, source.nominal, seed)


def require_map(function: Any) -> None:
    """Raise unless a value is a function of tensors; the message says what makes an operator of a matrix."""
    name = type(function).__name__
    if hasattr(function, "rmatvec"):  # an operator of SciPy or PyLops, which is callable, but not with tensors
        library = "pylops" if type(function).__module__.startswith("pylops") else "scipy"
        remedy = f"convert it with adjointlab.adapters.{library}.from_{library}"
    elif callable(function):
        return
    elif hasattr(function, "shape"):
        remedy = "make an operator of a matrix with al.matrix, which takes tensors, NumPy arrays and SciPy's matrices"
    else:
        remedy = "pass the map itself"
    raise SpaceMismatchError(f"expected an nn.Module or a function of tensors, got {name}: {remedy}")


def like_parameters(f: Any, domain: Any, batch_dims: int) -> Space:
    """Return the space of ``domain``; where it gives a shape only, dtype and device are those of f's parameters."""
    # The modules that a function closes over, or whose method it is, are f's as well.
    dtype = device = None
    for module in modules_of(f):
        for tensor in (*module.parameters(), *module.buffers()):
            if dtype is None and (tensor.is_floating_point() or tensor.is_complex()):
                dtype, device = tensor.dtype, tensor.device
    return Space.of(domain, dtype=dtype, device=device, batch_dims=batch_dims)


def assess(
    map_: Transposition, derivation: Derivation, seed: int = 0, *, domain: Space | None = None, brief: bool = False,
    called: Sketch | None = None,
) -> LinearityReport:  # fmt: skip
    """Return the evidence for the linearity of a map, from what was derived of it on a domain and from numbers."""
    # Where it is to be brief, a function without a graph is called three times, if all is well; what is known of a
    # call before that saves one of them.
    with map_.domain.without_autocast():
        return _assess(map_, derivation, Numbers(map_, derivation, domain or map_.domain, seed), brief, called)


def _assess(
    map_: Transposition, derivation: Derivation, numbers: Numbers, brief: bool, called: Sketch | None
) -> LinearityReport:
    explanation = derivation.explanation
    evidence, reads = _of_graph(map_, derivation)
    # Where the graph agrees with the function, and shows all that it does, f(0) = 0 is all that is left to test.
    quick = map_.domain.every(explanation.is_evident and derivation.checked)
    changes: list[str] = []
    counterexample, differentiable = None, True
    settled = False
    if quick:
        with torch.no_grad():
            numbers.offset = numbers.norm(derivation.function("function")(numbers.zero))
    elif brief and derivation.user is not None:
        with buffers_kept(map_.modules) as changes, torch.no_grad():
            settled = numbers.is_affine_at_points(derivation.user, called)
    if settled:
        evidence.append("values at three points, and the derivative at one of them, are those of one affine map")
    elif not quick:
        with buffers_kept(map_.modules) as changes, torch.no_grad():
            counterexample = numbers.counterexample()
            if counterexample is None:
                evidence.append("additivity and homogeneity hold to rounding on random inputs")
                try:
                    differentiable = numbers.adjoint_agrees()
                except NotDifferentiableError as error:
                    evidence.append(str(error))
                    differentiable = False
    if counterexample is None:
        evidence.append("the dot test holds" if differentiable else "the dot test fails: autograd hides something")
    if not changes and not map_.domain.every(not changes):
        changes = ["something on another process"]
    if changes and counterexample is None:
        counterexample = Counterexample(f"a call leaves {changes[0]} as it was, which", math.inf, 0.0)
    deterministic = not changes and (counterexample is None or counterexample.law != DETERMINISM)
    if changes:
        evidence.append(f"a call changes {', '.join(changes)}")
    if numbers.offset > 0.0:
        evidence.append(f"f(0) is not zero: its norm is {numbers.offset:.3g}")
    is_affine = counterexample is None
    complete = not explanation.cut and not explanation.is_stateful
    verdict = "proved" if explanation.independent and complete and differentiable else "supported"
    if not is_affine or numbers.offset > 0.0:
        verdict = "refuted"
        counterexample = counterexample or Counterexample("f(0) = 0", numbers.offset, 0.0, (map_.domain.zeros(),))
    return LinearityReport(
        verdict, is_affine, is_affine and numbers.is_complex_linear(), differentiable, deterministic, numbers.offset,
        tuple(evidence), reads, counterexample,
    )  # fmt: skip


def _of_graph(map_: Transposition, derivation: Derivation) -> tuple[list[str], tuple[str, ...]]:
    """Return the evidence that the graph of the derivative gives, in words, and the operations that read the input."""
    explanation, evidence = derivation.explanation, []
    reads = explanation.readers or ()
    if explanation.independent:
        evidence.append("the derivative does not read the input" + ("" if explanation.cut else ": the map is affine"))
    elif reads:
        evidence.append(f"the derivative reads the input in {', '.join(reads)}")
    if explanation.cut:
        evidence.append(f"autograd does not see all of it: {explanation.cut} cuts the input off")
    if map_.untraceable is not None:
        evidence.append(str(map_.untraceable))
        if isinstance(map_.untraceable, ReadsInputError):
            reads = (str(map_.untraceable).split(" ", 1)[0],)
    return evidence, reads
