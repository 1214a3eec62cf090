"""The commands ``check``, ``explain``, ``export`` and ``demo``.

Exit codes: 0 passed, 1 failed the check, 2 unusable input, with one line on stderr and no traceback.
"""

from __future__ import annotations

import contextlib
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
from adjointlab.cli.report import FAILED, PASSED, UNUSABLE, Outcome, document, plain
from adjointlab.cli.target import (
    COMMON_DTYPES,
    UnusableError,
    check_memory,
    current_directory_importable,
    memory_of_machine,
    one_line,
    parse_device,
    parse_dtype,
    parse_kwargs,
    parse_shape,
)
from adjointlab.cli.work import Subject, check, explain, export


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
    help="import.path:name or import.path:name(literal, name=literal).name; the current directory is importable.",
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
_TOL = typer.Option(help="The relative accuracy to judge by, where a map computes in lower precision inside.")
_CLAIMED = typer.Option("--adjoint", metavar="<str>", help="The hand-written adjoint to check: a target, as TARGET is.")
_ARRAYS = typer.Option(help="What TARGET and --adjoint take and return.")
_OUTPUT = typer.Option("--output", "-o", help="The file, which ends with .pt2.")
_OF_ADJOINT = typer.Option("--adjoint", help="Write the adjoint, and not the map.")
_SIZES = typer.Option("--batch", help="The smallest and largest batch size that the file is to take.")
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
    tol: Annotated[float | None, _TOL] = None
    evaluation: Annotated[bool, _EVAL] = False
    seed: Annotated[int, _SEED] = 0
    as_json: Annotated[bool, _JSON] = False
    html_file: Annotated[Path | None, _HTML] = None
    debug: Annotated[bool, _DEBUG] = False

    @property
    def free(self) -> int:
        """The number of dimensions that may change size."""
        return self.batch_dims

    def check(self, memory: int) -> None:
        """Raise ``UnusableError`` unless the shapes are given, have the batch dimensions, and fit into memory."""
        shapes = self.shape or []
        if not shapes:
            raise UnusableError("expected --shape, the shape of the input, as in --shape 1,1,64,64")
        dims = min(map(len, shapes))
        if self.batch_dims > dims:
            raise UnusableError(f"expected --batch-dims of at most {dims}, got {self.batch_dims}")
        if self.tol is not None and not 0 < self.tol < 1:
            raise UnusableError(f"expected --tol between 0 and 1, got {self.tol}")
        # A check holds some ten elements of the domain at once, in double precision.
        text = " ".join(",".join(map(str, shape)) for shape in shapes)
        check_memory(10 * 8 * sum(map(math.prod, shapes)), f"--shape {text}", memory)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """The options of the command ``check``."""

    trials: Annotated[int | None, _TRIALS] = None
    jacobian: Annotated[bool, _JACOBIAN] = False
    adjoint: Annotated[str | None, _CLAIMED] = None
    arrays: Annotated[Literal["torch", "numpy", "jax"], _ARRAYS] = "torch"

    @property
    def draws(self) -> dict[str, Any]:
        """The options of the dot test."""
        number = {} if self.trials is None else {"trials": self.trials}  # how many is the core's to choose
        return {"seed": self.seed, **number}

    def check(self, memory: int) -> None:
        """Raise ``UnusableError`` for options that do not go together too."""
        super().check(memory)
        if self.jacobian and self.trials is not None:
            raise UnusableError("expected --jacobian or --trials, got both: leave --trials out")
        if self.jacobian and self.tol is not None:
            raise UnusableError("expected --jacobian or --tol, got both: leave --tol out")
        if self.adjoint is None and self.arrays != "torch":
            raise UnusableError(
                f"expected --adjoint beside --arrays {self.arrays}, whose functions PyTorch cannot derive"
            )
        if self.adjoint is not None and (self.jacobian or len(self.targets) > 1):
            raise UnusableError("expected one TARGET and no --jacobian beside --adjoint")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """The options of the command ``export``."""

    output: Annotated[Path, _OUTPUT]
    adjoint: Annotated[bool, _OF_ADJOINT] = False
    batch: Annotated[tuple[int, int] | None, _SIZES] = None

    @property
    def free(self) -> int:
        """The number of dimensions that may change size: at least one, if their sizes are given."""
        return self.batch_dims or int(self.batch is not None)

    def check(self, memory: int) -> None:
        """Raise ``UnusableError`` for several targets too."""
        super().check(memory)
        if len(self.targets) > 1:
            raise UnusableError(f"expected one TARGET, which is written to --output, got {len(self.targets)}")


# -- the commands --------------------------------------------------------------------------------------------------


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
    "With --adjoint, check a hand-written pair. Exit with 0 if so, 1 if not, 2 if it cannot be said.",
)(_command(check, CheckOptions))
app.command(
    "explain",
    short_help="Show how the adjoint is computed.",
    help="Show how Aᴴ is computed: the engine, the derived program, and the evidence that the map is linear.",
)(_command(explain, Options))
app.command(
    "export",
    short_help="Write a map as a file for PyTorch alone.",
    help="Write a map, or with --adjoint its adjoint, as a program that torch.export.load reads without adjointlab.",
)(_command(export, ExportOptions))


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
