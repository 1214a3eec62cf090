"""The commands ``check``, ``explain`` and ``demo``.

Exit codes: 0 passed, 1 failed the check, 2 unusable input, with one line on stderr and no traceback.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import inspect
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import adjointlab as al
from adjointlab.cli.demonstration import CLONE
from adjointlab.cli.demonstration import load as load_demonstration
from adjointlab.cli.report import FAILED, PASSED, UNUSABLE, Outcome, document, page, plain
from adjointlab.cli.target import (
    COMMON_DTYPES,
    UnusableError,
    check_memory,
    current_directory_importable,
    load,
    memory_of_machine,
    one_line,
    parse_device,
    parse_dtype,
    parse_kwargs,
    parse_shape,
    parse_target,
)

_AFFINE = "This map is affine: it has an offset, such as a bias."
_FAILURES = (al.NotLinearError, al.NotDifferentiableError, al.AdjointMismatchError)


def _linear_operator(*arguments: Any, **options: Any) -> al.LinearOperator:
    return al.linear_operator(*arguments, **options)  # imported at the first call, with torch


@dataclass(frozen=True)
class Surroundings:
    """The machine, the clone and the core that the commands use; tests pass others as the context's ``obj``."""

    memory: int = field(default_factory=memory_of_machine)
    clone: Path = CLONE
    linear_operator: Callable[..., al.LinearOperator] = _linear_operator


# -- options -------------------------------------------------------------------------------------------------------


def _complete_dtype(incomplete: str) -> list[str]:
    return [name for name in COMMON_DTYPES if name.startswith(incomplete)]


def _complete_target(incomplete: str) -> list[str]:
    modules = ("torch.nn", "torch.nn.functional", "torch.fft")
    module, colon, name = incomplete.partition(":")
    if not colon:
        return [f"{path}:" for path in modules if path.startswith(module)]
    if module not in modules:
        return []
    return [f"{module}:{n}" for n in dir(importlib.import_module(module)) if n.startswith(name) and n[0] != "_"]


_TARGETS = typer.Argument(
    metavar="TARGET",
    help="import.path:name or import.path:name(literal, name=literal); the current directory is importable.",
    autocompletion=_complete_target,
    show_default=False,
)
_SHAPE = typer.Option(
    parser=parse_shape, metavar="<list[str]>", help="Shape of the input, as 1,1,64,64; once per input of the module."
)
_DTYPE = typer.Option(
    parser=parse_dtype,
    metavar="<str>",
    help="Dtype of the input; a module is converted to it. Default: the module's own.",
    autocompletion=_complete_dtype,
)
_DEVICE = typer.Option(parser=parse_device, metavar="<str>", help="Where to run; a module is moved there.")
_BATCH = typer.Option(min=0, help="The first so many dimensions may change size from call to call.")
_KWARGS = typer.Option(
    parser=parse_kwargs, metavar="<str>", help="Fixed keyword arguments of the forward, as name=literal, name=literal."
)
_ENGINE = typer.Option(help="How the adjoint is computed.")
_EVAL = typer.Option("--eval", help="Put the module into evaluation mode first (dropout, batch-norm).")
_SEED = typer.Option(min=0, max=2**63 - 1, help="Of a module's initial weights and of the random draws.")
_TRIALS = typer.Option(min=1, max=10**6, help="Number of random draws.")
_JACOBIAN = typer.Option("--jacobian", help="Check the derivative at a random point, of a map that is not linear.")
_JSON = typer.Option("--json", help="Print one JSON object, or a list of them for several targets.")
_HTML = typer.Option("--html", help="Write the reports to this HTML file.")
_DEBUG = typer.Option("--debug", help="Show tracebacks.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that the commands share."""

    targets: Annotated[list[str], _TARGETS]
    shape: Annotated[list[Any] | None, _SHAPE] = None
    dtype: Annotated[Any, _DTYPE] = None
    device: Annotated[Any, _DEVICE] = "cpu"
    batch_dims: Annotated[int, _BATCH] = 0
    kwargs: Annotated[Any, _KWARGS] = ""
    engine: Annotated[Literal["auto", "eager", "traced", "compiled"], _ENGINE] = "auto"
    evaluation: Annotated[bool, _EVAL] = False
    seed: Annotated[int, _SEED] = 0
    as_json: Annotated[bool, _JSON] = False
    html_file: Annotated[Path | None, _HTML] = None
    debug: Annotated[bool, _DEBUG] = False

    def check(self, memory: int) -> None:
        """Raise ``UnusableError`` unless the shapes are given, have the batch dimensions, and fit into memory."""
        shapes = self.shape or []
        if not shapes:
            raise UnusableError("expected --shape, the shape of the input, as in --shape 1,1,64,64")
        dims = min(map(len, shapes))
        if self.batch_dims > dims:
            raise UnusableError(f"expected --batch-dims of at most {dims}, got {self.batch_dims}")
        # A check holds some ten elements of the domain at once, in double precision.
        text = " ".join(",".join(map(str, shape)) for shape in shapes)
        check_memory(10 * 8 * sum(map(math.prod, shapes)), f"--shape {text}", memory)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """The options of the command ``check``."""

    trials: Annotated[int | None, _TRIALS] = None
    jacobian: Annotated[bool, _JACOBIAN] = False

    def check(self, memory: int) -> None:
        """Raise ``UnusableError`` for options that do not go together too."""
        super().check(memory)
        if self.jacobian and self.trials is not None:
            raise UnusableError("expected --jacobian or --trials, got both: leave --trials out")


# -- the commands --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A target made ready: the map, its domain, the options of the command, and the core that derives operators."""

    function: Callable[..., Any]
    domain: Any
    options: Any
    linear_operator: Callable[..., al.LinearOperator]

    @classmethod
    def of(cls, text: str, options: Options, surroundings: Surroundings) -> Subject:
        """Return the map that ``text`` names, moved to the dtype and device asked for, with its domain."""
        import torch

        target = parse_target(text)
        torch.manual_seed(options.seed)
        function = load(target, surroundings.memory)
        dtype = options.dtype
        if isinstance(function, torch.nn.Module):
            function = function.to(device=options.device, dtype=dtype)
            if options.evaluation:
                function = function.eval()
            own = (p.dtype for p in function.parameters() if p.is_floating_point() or p.is_complex())
            dtype = dtype or next(own, None)
        dtype = dtype or torch.get_default_dtype()
        specs = tuple(al.TensorSpec(shape, dtype, options.device) for shape in options.shape or ())
        return cls(function, specs[0] if len(specs) == 1 else specs, options, surroundings.linear_operator)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that every function of the core takes."""
        return {"batch_dims": self.options.batch_dims, "kwargs": self.options.kwargs or None}

    def describe(self) -> list[dict[str, Any]]:
        """Return shape, dtype and device of every input."""
        specs = self.domain if isinstance(self.domain, tuple) else (self.domain,)
        return [
            {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch."), "device": str(s.device)}
            for s in specs
        ]

    def operator(self) -> tuple[al.LinearOperator, al.AffineOperator | None]:
        """Return the operator and, where the map has an offset, the affine operator whose linear part it is."""
        settings = {**self.settings, "engine": self.options.engine}
        try:
            return self.linear_operator(self.function, self.domain, **settings), None
        except al.NotLinearError as refusal:
            try:
                affine = al.affine_operator(self.function, self.domain, **settings)
            except al.NotLinearError:
                raise refusal from None  # it says more
            return affine.linear, affine


def _check(subject: Subject) -> Outcome:
    options = subject.options
    if options.jacobian:
        return _check_derivative(subject)
    linearity = al.check_linearity(subject.function, subject.domain, **subject.settings, seed=options.seed)
    record: dict[str, Any] = {"domain": subject.describe(), "linearity": linearity.to_dict()}
    try:
        A, affine = subject.operator()
    except _FAILURES as failure:
        return _failed(failure, {**record, "passed": False}, linearity)
    number = {} if options.trials is None else {"trials": options.trials}  # how many is the core's to choose
    report = al.check_adjoint(A, seed=options.seed, **number)
    code = PASSED if report.passed else FAILED
    record |= {"passed": report.passed, "engine": A.engine, "affine": affine is not None, "adjoint": report.to_dict()}
    text = html_ = ""
    if affine is not None:
        text = f"{_AFFINE} Its linear part x ↦ f(x) − f(0) was checked.\n\n"
        html_ = f"<p>{html.escape(text.strip())}</p>"
    return Outcome(code, f"{text}{report}\n\n{linearity}", record, html_ + page(report, linearity))


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


def _explain(subject: Subject) -> Outcome:
    try:
        A, affine = subject.operator()
    except _FAILURES as failure:
        return _failed(failure, {})
    note = "" if affine is None else f"{_AFFINE} This is about its linear part x ↦ f(x) − f(0).\n\n"
    explanation = str(A.explain())
    record = {"engine": A.engine, "affine": affine is not None, "explanation": explanation}
    return Outcome(PASSED, note + explanation, record, page(note + explanation))


def _failed(failure: Exception, record: dict[str, Any], *reports: Any) -> Outcome:
    line = f"{type(failure).__name__}: {failure}"
    record |= {"error": type(failure).__name__, "message": str(failure)}
    return Outcome(FAILED, "\n\n".join(map(str, (line, *reports))), record, page(*reports, line))


def _answer(text: str, work: Callable[[Subject], Outcome], options: Options, surroundings: Surroundings) -> Outcome:
    """Return the outcome for one target; whatever goes wrong with it becomes one line."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            outcome = work(Subject.of(text, options, surroundings))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a target may exit, or raise what is no Exception, as pytest.skip does
        if options.debug:
            traceback.print_exc()
        kind = "" if isinstance(error, (UnusableError, al.SpaceMismatchError)) else f"{type(error).__name__}: "
        line = f"{one_line(text)}: {kind}{one_line(error)}"
        typer.echo(f"error: {line}", err=True)
        return Outcome(UNUSABLE, "", {"error": type(error).__name__, "message": line}, target=text)
    for warning in {str(w.message): w for w in caught}.values():
        typer.echo(f"{warning.category.__name__}: {one_line(str(warning.message))}", err=True)
    return replace(outcome, target=text)


def _run(work: Callable[[Subject], Outcome], options: Options, surroundings: Surroundings) -> int:
    options.check(surroundings.memory)
    outcomes = []
    with current_directory_importable():
        for text in options.targets:
            # A module may print while it is imported or run: stdout belongs to the JSON alone.
            with contextlib.redirect_stdout(sys.stderr) if options.as_json else contextlib.nullcontext():
                outcome = _answer(text, work, options, surroundings)
            outcomes.append(outcome)
            if not options.as_json and outcome.text:
                typer.secho(outcome.headline, fg="red" if outcome.code else "green", bold=True)
                typer.echo(f"{outcome.text.rstrip()}\n")
    if options.as_json:
        records = [plain(outcome.as_json()) for outcome in outcomes]
        typer.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2, allow_nan=False))
    if options.html_file is not None:
        try:
            options.html_file.write_text(document(outcomes), encoding="utf-8")
        except (OSError, ValueError) as error:
            typer.echo(f"error: cannot write {one_line(str(options.html_file))}: {one_line(error)}", err=True)
            return UNUSABLE
    return max(outcome.code for outcome in outcomes)


class _OneLineErrors(TyperGroup):
    """Errors in options become one line on stderr and exit code 2, as all unusable input does."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standalone = kwargs.get("standalone_mode", True)
        kwargs["standalone_mode"] = False
        if not standalone:
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **kwargs)
        except typer.TyperException as error:
            if error.format_message():  # empty where the help text was shown
                typer.echo(f"error: {one_line(error.format_message())}", err=True)
            code = UNUSABLE
        except typer.Abort:
            code = 130
        except OSError as error:  # what is found cannot be written: a full disk
            typer.echo(f"error: cannot write the results: {one_line(error)}", err=True)
            code = UNUSABLE
        sys.exit(code if isinstance(code, int) else PASSED)


app = typer.Typer(
    name="adjointlab",
    cls=_OneLineErrors,
    help="Exact adjoints of linear PyTorch modules: check them, explain them, see them at work.",
    no_args_is_help=True,
    rich_markup_mode=None,  # to import rich takes longer than all else that help needs
    pretty_exceptions_enable=False,
)


def _command(work: Callable[[Subject], Outcome], options: type[Options]) -> Callable[..., None]:
    """Return a command whose options are the fields of a class."""

    def command(context: typer.Context, **given: Any) -> None:
        raise typer.Exit(_run(work, options(**given), context.obj))

    own = inspect.signature(options, eval_str=True).parameters.values()
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *own])  # type: ignore[attr-defined]  # which typer reads
    return command


app.command(
    "check",
    short_help="Check a map and its adjoint.",
    help="Check that a map is linear and ⟨A x, y⟩ = ⟨x, Aᴴ y⟩; with --jacobian, the derivative of one that is not. "
    "Exit with 0 if so, 1 if not, 2 if it cannot be said.",
)(_command(_check, CheckOptions))
app.command(
    "explain",
    short_help="Show how the adjoint is computed.",
    help="Show how Aᴴ is computed: the engine, the derived program, and the evidence that the map is linear.",
)(_command(_explain, Options))


@app.command(short_help="Recover a photograph and an MRI volume.")
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", help="Where the figures go.")] = Path("build"),
    quick: Annotated[bool, typer.Option("--quick", help="Small images and few iterations.")] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> None:
    """Recover a photograph and an MRI volume with x ← x − Aᴴ(A x − y) / ‖A‖², and write figures."""
    try:
        demonstration = load_demonstration(context.obj.clone)
        output.mkdir(parents=True, exist_ok=True)
        passed = demonstration.run(output, quick=quick)
    except (ImportError, OSError, ValueError) as error:
        if debug:
            traceback.print_exc()
        remedy = ', pip install "adjointlab[demo]"' if isinstance(error, ImportError) else ""
        typer.echo(f"error: the demo cannot run: {one_line(error)}{remedy}", err=True)
        raise typer.Exit(UNUSABLE) from error
    raise typer.Exit(PASSED if passed else FAILED)


@app.callback(invoke_without_command=True)
def _begin(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    context.obj = context.obj or Surroundings()
    if version:
        typer.echo(al.__version__)
        raise typer.Exit
