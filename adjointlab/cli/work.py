"""The work of the commands on a target: check a map, its derivative or a pair of functions, explain, export."""

from __future__ import annotations

import functools
import html
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import adjointlab as al
from adjointlab.cli.report import FAILED, PASSED, Outcome, page
from adjointlab.cli.target import UnusableError, load, parse_target

_AFFINE = "This map is affine: it has an offset, such as a bias."


_FAILURES = (al.NotLinearError, al.NotDifferentiableError, al.AdjointMismatchError, al.NotExportableError)


@dataclass(frozen=True)
class Subject:
    """A target made ready: the map, its domain, the options of the command, and the core that derives operators."""

    function: Callable[..., Any]
    domain: Any
    options: Any
    linear_operator: Callable[..., al.LinearOperator]
    memory: float

    @classmethod
    def of(cls, text: str, options: Any, surroundings: Any) -> Subject:
        """Return the map that ``text`` names, moved to the dtype and device asked for, with its domain."""
        import torch

        torch.manual_seed(options.seed)
        function, own = _loaded(text, options, surroundings.memory)
        dtype = options.dtype or own or torch.get_default_dtype()
        specs = tuple(al.TensorSpec(shape, dtype, options.device) for shape in options.shape or ())
        return cls(
            function, specs[0] if len(specs) == 1 else specs, options, surroundings.linear_operator, surroundings.memory
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The options that every function of the core takes."""
        return {"batch_dims": self.options.free, "kwargs": self.options.kwargs or None}

    def describe(self) -> list[dict[str, Any]]:
        """Return shape, dtype and device of every input."""
        specs = self.domain if isinstance(self.domain, tuple) else (self.domain,)
        return [
            {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch."), "device": str(s.device)}
            for s in specs
        ]

    def operator(self) -> tuple[al.LinearOperator, al.AffineOperator | None]:
        """Return the operator and, where the map has an offset, the affine operator whose linear part it is."""
        settings = {**self.settings, "engine": self.options.engine, "tol": self.options.tol}
        try:
            return self.linear_operator(self.function, self.domain, **settings), None
        except al.NotLinearError as refusal:
            try:
                affine = al.affine_operator(self.function, self.domain, **settings)
            except al.NotLinearError:
                raise refusal from None  # it says more
            return affine.linear, affine


def check(subject: Subject) -> Outcome:
    """Check a map and its derived adjoint, its derivative, or a pair of functions."""
    options = subject.options
    if options.jacobian:
        return _check_derivative(subject)
    if options.adjoint is not None:
        return _check_pair(subject)
    linearity = al.check_linearity(subject.function, subject.domain, **subject.settings, seed=options.seed)
    record: dict[str, Any] = {"domain": subject.describe(), "linearity": linearity.to_dict()}
    try:
        A, affine = subject.operator()
    except _FAILURES as failure:
        return _failed(failure, {**record, "passed": False}, linearity)
    report = al.check_adjoint(A, **options.draws).within(options.tol)
    code = PASSED if report.passed else FAILED
    record |= {"passed": report.passed, "engine": A.engine, "affine": affine is not None, "adjoint": report.to_dict()}
    text = html_ = ""
    if affine is not None:
        text = f"{_AFFINE} Its linear part x ↦ f(x) − f(0) was checked.\n\n"
        html_ = f"<p>{html.escape(text.strip())}</p>"
    return Outcome(code, f"{text}{report}\n\n{linearity}", record, html_ + page(report, linearity))


def _check_pair(subject: Subject) -> Outcome:
    """Check a function and the hand-written adjoint of it."""
    options = subject.options
    forward = functools.partial(subject.function, **options.kwargs) if options.kwargs else subject.function
    backward, _ = _loaded(options.adjoint, options, subject.memory)
    if options.arrays != "torch":
        forward, backward = _of_arrays(forward, options.arrays), _of_arrays(backward, options.arrays)
    space = al.Space.of(subject.domain, batch_dims=options.batch_dims)
    report = al.check_adjoint(forward, backward, domain=space, **options.draws).within(options.tol)
    record = {
        "domain": subject.describe(), "claimed": options.adjoint, "passed": report.passed, "adjoint": report.to_dict(),
    }  # fmt: skip
    return Outcome(PASSED if report.passed else FAILED, str(report), record, page(report))


def _loaded(text: str, options: Any, memory: float) -> tuple[Callable[..., Any], Any]:
    """Return the map of a target, moved to the dtype and device asked for, and the dtype of a module's parameters."""
    import torch

    function = load(parse_target(text), memory)
    if not isinstance(function, torch.nn.Module):
        return function, None
    function = function.to(device=options.device, dtype=options.dtype)
    if options.evaluation:
        function = function.eval()
    own = (p.dtype for p in function.parameters() if p.is_floating_point() or p.is_complex())
    return function, next(own, None)


def _of_arrays(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Return a function of arrays of NumPy or JAX as one of tensors."""
    import numpy as np
    import torch

    from adjointlab.tree import map_leaves

    try:
        given: Any = importlib.import_module("jax.numpy").asarray if kind == "jax" else np.asarray
    except ModuleNotFoundError as error:
        raise UnusableError(f"expected --arrays of a library that is installed, got {kind}: {error}") from error

    def run(*x: Any) -> Any:
        arrays = [map_leaves(lambda t: given(t.detach().resolve_conj().cpu().numpy()), each) for each in x]
        return map_leaves(lambda a: torch.from_numpy(np.array(a)), function(*arrays))

    return run


def _check_derivative(subject: Subject) -> Outcome:
    import torch

    from adjointlab.verify.derivative import check_jacobian

    options, record = subject.options, {"domain": subject.describe(), "passed": False}
    space = al.Space.of(subject.domain, batch_dims=options.batch_dims)
    x0 = space.randn(torch.Generator().manual_seed(options.seed))
    try:
        report = check_jacobian(
            al.jacobian(subject.function, x0, **subject.settings, engine=options.engine), options.seed
        )
    except _FAILURES as failure:
        return _failed(failure, record)
    record |= {"passed": report.passed, "derivative": report.to_dict()}
    return Outcome(PASSED if report.passed else FAILED, str(report), record, page(report))


def explain(subject: Subject) -> Outcome:
    """Return the account of how the adjoint is computed."""
    try:
        A, affine = subject.operator()
    except _FAILURES as failure:
        return _failed(failure, {})
    note = "" if affine is None else f"{_AFFINE} This is about its linear part x ↦ f(x) − f(0).\n\n"
    explanation = str(A.explain())
    record = {"engine": A.engine, "affine": affine is not None, "explanation": explanation}
    return Outcome(PASSED, note + explanation, record, page(note + explanation))


def export(subject: Subject) -> Outcome:
    """Write a map, or its adjoint, as a file for PyTorch alone."""
    options = subject.options
    try:
        A, affine = subject.operator()
        written: Any = A.H if options.adjoint else affine or A
        al.export(written, options.output, batch=options.batch)
    except _FAILURES as failure:
        return _failed(failure, {})
    record = {"engine": A.engine, "affine": affine is not None, "output": str(options.output)}
    text = f"{written!r}\nwritten to {options.output}"
    return Outcome(PASSED, text, record, page(text))


def _failed(failure: Exception, record: dict[str, Any], *reports: Any) -> Outcome:
    line = f"{type(failure).__name__}: {failure}"
    record |= {"error": type(failure).__name__, "message": str(failure)}
    return Outcome(FAILED, "\n\n".join(map(str, (line, *reports))), record, page(*reports, line))
