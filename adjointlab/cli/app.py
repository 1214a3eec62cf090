"""The commands ``check``, ``explain`` and ``demo``.

Exit codes: 0 passed, 1 failed the check, 2 unusable input, with one line on stderr and no traceback.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
from torch import nn
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

_FAILURES = (al.NotLinearError, al.NotDifferentiableError, al.AdjointMismatchError)

Engine = Literal["auto", "eager", "traced", "compiled"]


@dataclass(frozen=True)
class Surroundings:
    """The machine, the clone and the core that the commands use; tests pass others as the context's ``obj``."""

    memory: int = field(default_factory=memory_of_machine)
    clone: Path = CLONE
    linear_operator: Callable[..., al.LinearOperator] = al.linear_operator


@dataclass(frozen=True)
class Options:
    """The options that all targets of one command share."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    device: torch.device
    batch_dims: int
    kwargs: dict[str, Any]
    engine: str
    evaluation: bool
    seed: int
    surroundings: Surroundings


def _options(
    shapes: Sequence[str] | None, dtype: str | None, device: str, batch_dims: int, kwargs: str, **rest: Any
) -> Options:
    try:
        if not shapes:
            raise UnusableError("expected --shape, the shape of the input, as in --shape 1,1,64,64")
        parsed = tuple(map(parse_shape, shapes))
        dims = min(map(len, parsed))
        if batch_dims > dims:
            raise UnusableError(f"expected --batch-dims of at most {dims}, got {batch_dims}")
        # A check holds some ten elements of the domain at once, in double precision.
        check_memory(10 * 8 * sum(map(math.prod, parsed)), f"--shape {' '.join(shapes)}", rest["surroundings"].memory)
        wanted = None if dtype is None else parse_dtype(dtype)
        return Options(parsed, wanted, parse_device(device), batch_dims, parse_kwargs(kwargs), **rest)
    except UnusableError as error:
        raise typer.TyperException(str(error)) from error


@dataclass(frozen=True)
class Subject:
    """A target made ready: the map, its domain, and the options of the command."""

    function: Callable[..., Any]
    domain: Any
    options: Options

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
            return self.options.surroundings.linear_operator(self.function, self.domain, **settings), None
        except al.NotLinearError as refusal:
            try:
                affine = al.affine_operator(self.function, self.domain, **settings)
            except al.NotLinearError:
                raise refusal from None  # it says more
            return affine.linear, affine


def prepare(text: str, options: Options) -> Subject:
    """Return the map that ``text`` names, moved to the dtype and device asked for, with its domain."""
    target = parse_target(text)
    torch.manual_seed(options.seed)
    function = load(target, options.surroundings.memory)
    dtype = options.dtype
    if isinstance(function, nn.Module):
        function = function.to(device=options.device, dtype=dtype)
        if options.evaluation:
            function = function.eval()
        own = (p.dtype for p in function.parameters() if p.is_floating_point() or p.is_complex())
        dtype = dtype or next(own, None)
    specs = tuple(al.TensorSpec(shape, dtype or torch.get_default_dtype(), options.device) for shape in options.shapes)
    return Subject(function, specs[0] if len(specs) == 1 else specs, options)


# -- the commands --------------------------------------------------------------------------------------------------


def _check(subject: Subject, trials: int | None) -> Outcome:
    options = subject.options
    text = html_ = ""
    record: dict[str, Any] = {"domain": subject.describe()}
    linearity = al.check_linearity(subject.function, subject.domain, **subject.settings, seed=options.seed)
    record["linearity"] = linearity.to_dict()
    try:
        A, affine = subject.operator()
    except _FAILURES as failure:
        record |= {"passed": False, "error": type(failure).__name__, "message": str(failure)}
        text = f"{type(failure).__name__}: {failure}\n\n{linearity}"
        return Outcome("", FAILED, text, record, page(linearity, f"{type(failure).__name__}: {failure}"))
    number: dict[str, Any] = {} if trials is None else {"trials": trials}  # how many is the core's to choose
    report = al.check_adjoint(A, seed=options.seed, **number)
    code = PASSED if report.passed else FAILED
    record |= {"passed": report.passed, "engine": A.engine, "affine": affine is not None, "adjoint": report.to_dict()}
    if affine is not None:
        text = "The map has an offset (a bias), so it is affine: this is about its linear part x ↦ f(x) − f(0).\n\n"
        html_ = f"<p>{html.escape(text.strip())}</p>"
    return Outcome("", code, f"{text}{report}\n\n{linearity}", record, html_ + page(report, linearity))


def _explain(subject: Subject) -> Outcome:
    try:
        A, affine = subject.operator()
    except _FAILURES as failure:
        reason = {"error": type(failure).__name__, "message": str(failure)}
        text = f"{type(failure).__name__}: {failure}"
        return Outcome("", FAILED, text, reason, page(text))
    note = "" if affine is None else "The map has an offset (a bias): this is its linear part x ↦ f(x) − f(0).\n\n"
    explanation = str(A.explain())
    record = {"engine": A.engine, "affine": affine is not None, "explanation": explanation}
    return Outcome("", PASSED, note + explanation, record, page(note + explanation))


def _answer(text: str, work: Callable[[Subject], Outcome], options: Options, debug: bool) -> Outcome:
    """Return the outcome for one target; whatever goes wrong with it becomes one line."""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            outcome = work(prepare(text, options))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a target may exit, or raise what is no Exception, as pytest.skip does
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, (UnusableError, al.SpaceMismatchError)) else f"{type(error).__name__}: "
        line = f"{one_line(text)}: {kind}{one_line(error)}"
        typer.echo(f"error: {line}", err=True)
        return Outcome(text, UNUSABLE, "", {"error": type(error).__name__, "message": line})
    for warning in {str(w.message): w for w in caught}.values():
        typer.echo(f"{warning.category.__name__}: {one_line(str(warning.message))}", err=True)
    return Outcome(text, outcome.code, outcome.text, outcome.record, outcome.html)


def _run(
    targets: Sequence[str],
    work: Callable[[Subject], Outcome],
    options: Options,
    *,
    as_json: bool,
    html_file: Path | None = None,
    debug: bool = False,
) -> NoReturn:
    outcomes = []
    with current_directory_importable():
        for text in targets:
            # A module may print while it is imported or run: stdout belongs to the JSON alone.
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                outcome = _answer(text, work, options, debug)
            outcomes.append(outcome)
            if not as_json and outcome.text:
                typer.secho(outcome.headline, fg="red" if outcome.code else "green", bold=True)
                typer.echo(f"{outcome.text.rstrip()}\n")
    if as_json:
        records = [plain(outcome.as_json()) for outcome in outcomes]
        typer.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2, allow_nan=False))
    code = max(outcome.code for outcome in outcomes)
    if html_file is not None:
        try:
            html_file.write_text(document(outcomes), encoding="utf-8")
        except (OSError, ValueError) as error:
            typer.echo(f"error: cannot write {one_line(str(html_file))}: {one_line(error)}", err=True)
            code = UNUSABLE
    raise typer.Exit(code)


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
    pretty_exceptions_enable=False,
)


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
_SHAPE = typer.Option("--shape", help="Shape of the input, as 1,1,64,64; once per input of the module.")
_DTYPE = typer.Option(
    "--dtype",
    help="Dtype of the input; a module is converted to it. Default: the module's own.",
    autocompletion=_complete_dtype,
)
_DEVICE = typer.Option("--device", help="Where to run; a module is moved there.")
_BATCH = typer.Option("--batch-dims", min=0, help="The first so many dimensions may change size from call to call.")
_KWARGS = typer.Option("--kwargs", help="Fixed keyword arguments of the forward, as name=literal, name=literal.")
_ENGINE = typer.Option("--engine", help="How the adjoint is computed.")
_EVAL = typer.Option("--eval", help="Put the module into evaluation mode first (dropout, batch-norm).")
_SEED = typer.Option("--seed", min=0, max=2**63 - 1, help="Of a module's initial weights and of the random draws.")
_JSON = typer.Option("--json", help="Print one JSON object, or a list of them for several targets.")
_HTML = typer.Option("--html", help="Write the reports to this HTML file.")
_DEBUG = typer.Option("--debug", help="Show tracebacks.")


@app.command()
def check(
    context: typer.Context,
    *,
    targets: Annotated[list[str], _TARGETS],
    shape: Annotated[list[str] | None, _SHAPE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    device: Annotated[str, _DEVICE] = "cpu",
    batch_dims: Annotated[int, _BATCH] = 0,
    kwargs: Annotated[str, _KWARGS] = "",
    engine: Annotated[Engine, _ENGINE] = "auto",
    evaluation: Annotated[bool, _EVAL] = False,
    seed: Annotated[int, _SEED] = 0,
    trials: Annotated[int | None, typer.Option("--trials", min=1, max=10**6, help="Number of random draws.")] = None,
    as_json: Annotated[bool, _JSON] = False,
    html_file: Annotated[Path | None, _HTML] = None,
    debug: Annotated[bool, _DEBUG] = False,
) -> None:
    """Check that a map is linear and ⟨A x, y⟩ = ⟨x, Aᴴ y⟩; exit with 0 if so, 1 if not, 2 if it cannot be said."""
    chosen = {"engine": engine, "evaluation": evaluation, "seed": seed, "surroundings": context.obj}
    options = _options(shape, dtype, device, batch_dims, kwargs, **chosen)
    _run(targets, functools.partial(_check, trials=trials), options, as_json=as_json, html_file=html_file, debug=debug)


@app.command()
def explain(
    context: typer.Context,
    *,
    targets: Annotated[list[str], _TARGETS],
    shape: Annotated[list[str] | None, _SHAPE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    device: Annotated[str, _DEVICE] = "cpu",
    batch_dims: Annotated[int, _BATCH] = 0,
    kwargs: Annotated[str, _KWARGS] = "",
    engine: Annotated[Engine, _ENGINE] = "auto",
    evaluation: Annotated[bool, _EVAL] = False,
    seed: Annotated[int, _SEED] = 0,
    as_json: Annotated[bool, _JSON] = False,
    html_file: Annotated[Path | None, _HTML] = None,
    debug: Annotated[bool, _DEBUG] = False,
) -> None:
    """Show how Aᴴ is computed: the engine, the derived program, and the evidence that the map is linear."""
    chosen = {"engine": engine, "evaluation": evaluation, "seed": seed, "surroundings": context.obj}
    options = _options(shape, dtype, device, batch_dims, kwargs, **chosen)
    _run(targets, _explain, options, as_json=as_json, html_file=html_file, debug=debug)


@app.command()
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
