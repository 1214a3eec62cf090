"""A pytest plugin that tests ``⟨Ax, y⟩ = ⟨x, By⟩``, and derivatives of functions that are not linear.

It has the fixtures ``adjoint_check`` and ``derivative_check`` with the markers ``adjoint`` and ``derivative``. If
adjointlab is installed, this is a complete test module::

    @pytest.mark.adjoint({"blur": (Blur(), (1, 1, 64, 64)), "fft": (fft, my_ifft, (1, 32)), "mask": A})
    def test_adjoints(adjoint_check):
        adjoint_check()


    @pytest.mark.derivative({"signal": (signal, torch.ones(4)), "phase": (phase, torch.zeros(8, 8))})
    def test_derivatives(derivative_check):
        derivative_check()

pytest runs the test once for each operator or function. Since pytest imports this plugin in every environment with
adjointlab, the plugin imports nothing but pytest until a test uses the fixture.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from adjointlab.verify import AdjointReport, DerivativeReport

_MARKERS = (
    "adjoint(operators, **options): run the test, which must take the fixture adjoint_check, once for each operator: a "
    "mapping or list of LinearOperator, (module, domain), (function, adjoint, domain), or a function that makes one of "
    "these; options, such as trials=20 or seed=1, go to adjointlab.check_adjoint; tol=1e-3 is what to judge "
    "by",
    "derivative(functions, **options): run the test, which must take the fixture derivative_check, once for each "
    "function: a mapping or list of (function, x0), or a function without arguments that makes one of these; options, "
    "such as seed=1, go to adjointlab.check_derivative",
)
# Each marker with its meaning, and how it is written.
_WHAT = {"adjoint": ("operators", "A"), "derivative": ("functions", "(f, x0)")}


class _Check:
    """The common part of both fixtures: the case of the marker, its options, and whether the test has checked it."""

    def __init__(self, case: Any, options: Mapping[str, Any]) -> None:
        self._case = case
        self._options = dict(options)
        self._called = False

    @property
    def forgotten(self) -> bool:
        """Whether the marker provides an operator that the test has not checked."""
        return self._case is not None and not self._called


class AdjointCheck(_Check):
    """The value of ``adjoint_check``: a callable that tests ``⟨Ax, y⟩ = ⟨x, By⟩``, and raises with a diagnosis."""

    def __call__(self, A: Any = None, adjoint: Callable[[Any], Any] | None = None, **options: Any) -> AdjointReport:
        """Test ``⟨Ax, y⟩ = ⟨x, By⟩``; without arguments, for the operator of the marker.

        Parameters
        ----------
        A : LinearOperator, AffineOperator, module or function, optional
            The operator; a module or function needs ``domain=``.
        adjoint : callable, optional
            A hand-written adjoint.
        **options
            Options of :func:`adjointlab.check_adjoint`, and ``tol``, the relative accuracy to judge by, where a map
            computes in lower precision inside; they override the options of the marker.

        Returns
        -------
        AdjointReport
            The report of the passed test.

        Raises
        ------
        AdjointMismatchError
            If the test failed; the first line of the message is the diagnosis.
        NotLinearError, NotDifferentiableError, SpaceMismatchError
            If there is no adjoint to test; the message says why.
        """
        __tracebackhide__ = True
        from adjointlab.errors import AdjointMismatchError

        self._called = True
        with _compiler_records_dropped():
            report = self._report(A, adjoint, options)
        if not report.passed:
            raise AdjointMismatchError(report.failure)
        return report

    def _report(self, A: Any, adjoint: Any, options: dict[str, Any]) -> AdjointReport:
        __tracebackhide__ = True
        from adjointlab.derive import linear_operator
        from adjointlab.errors import NotDifferentiableError, NotLinearError
        from adjointlab.verify import check_adjoint

        if A is None:
            A, own, domain = _operator(self._case)
            adjoint = own if adjoint is None else adjoint
            options = options if domain is None else {"domain": domain, **options}
        options = {**self._options, **options}
        tol = options.pop("tol", None)
        if "domain" in options and adjoint is None:
            try:
                A = linear_operator(A, options.pop("domain"), tol=tol)
            except (NotLinearError, NotDifferentiableError) as error:
                raise error.with_traceback(None) from None  # the message says all: where it was found says nothing
        return check_adjoint(A, adjoint, **options).within(tol)


class DerivativeCheck(_Check):
    """The value of ``derivative_check``: a callable that tests the derivative of f, and raises with a diagnosis."""

    def __call__(self, f: Callable[..., Any] | None = None, x0: Any = None, **options: Any) -> DerivativeReport:
        """Test ``f(x₀ + h d) = f(x₀) + h J d + O(h²)`` and J.H; without arguments, for the function of the marker.

        Parameters
        ----------
        f : module or function, optional
            The function.
        x0 : pytree of tensors, optional
            The point.
        **options
            Options of :func:`adjointlab.check_derivative`; they override the options of the marker.

        Returns
        -------
        DerivativeReport
            The report of the passed test.

        Raises
        ------
        AdjointMismatchError
            If the test failed; the first line of the message is the diagnosis.
        NotDifferentiableError, SpaceMismatchError
            If there is no derivative to test; the message says why.
        """
        __tracebackhide__ = True
        from adjointlab.errors import AdjointMismatchError, NotDifferentiableError
        from adjointlab.verify import check_derivative

        self._called = True
        if f is None:
            f, x0 = _function(self._case)
        with _compiler_records_dropped():
            try:
                report = check_derivative(f, x0, **{**self._options, **options})
            except NotDifferentiableError as error:
                raise error.with_traceback(None) from None  # the message says all: where it was found says nothing
        if not report.passed:
            raise AdjointMismatchError(report.failure)
        return report


@contextlib.contextmanager
def _compiler_records_dropped() -> Iterator[None]:
    """Keep from pytest the records that PyTorch's compiler writes at each step, by the hundred and without text."""
    records = logging.getLogger("torch.__trace")
    handlers = [handler for handler in records.handlers if type(handler).__module__ == "_pytest.logging"]
    for handler in handlers:
        records.removeHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            records.addHandler(handler)


def _operator(case: Any) -> tuple[Any, Any, Any]:
    """Return A, its adjoint and its domain for one operator of a marker; None for what it does not say."""
    __tracebackhide__ = True
    from torch.nn import Module

    if case is None:
        raise pytest.UsageError(
            "adjoint_check() needs an operator: pass one, adjoint_check(A), or mark the test with "
            "@pytest.mark.adjoint({'name': A, ...})"
        )
    if callable(case) and not isinstance(case, Module):
        case = case()
    if not isinstance(case, (tuple, list)):
        return case, None, None
    if len(case) not in {2, 3}:
        raise pytest.UsageError(f"expected (module, domain) or (function, adjoint, domain), got {len(case)} values")
    return case[0], case[1] if len(case) == 3 else None, case[-1]


def _function(case: Any) -> tuple[Any, Any]:
    """Return f and x₀ for one function of a marker."""
    __tracebackhide__ = True
    if case is None:
        raise pytest.UsageError(
            "derivative_check() needs a function and a point: pass them, derivative_check(f, x0), or mark the test "
            "with @pytest.mark.derivative({'name': (f, x0), ...})"
        )
    if callable(case):
        case = case()
    if not isinstance(case, (tuple, list)) or len(case) != 2:
        what = f"{len(case)} values" if isinstance(case, (tuple, list)) else type(case).__name__
        raise pytest.UsageError(f"expected (function, x0), got {what}")
    return case[0], case[1]


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers ``adjoint`` and ``derivative``."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a marked test once for each operator or function of its marker."""
    for name in _WHAT:
        _generate(metafunc, name)


def _generate(metafunc: pytest.Metafunc, name: str) -> None:
    marker, (plural, example) = metafunc.definition.get_closest_marker(name), _WHAT[name]
    if marker is None or not (marker.args or plural in marker.kwargs):
        return
    marked = marker.args[0] if marker.args else marker.kwargs[plural]
    if len(marker.args) > 1 or not isinstance(marked, (Mapping, list, tuple)):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: expected one mapping or list of {plural} in the marker {name}, got "
            f"{', '.join(type(value).__name__ for value in marker.args or (marked,))}: write "
            f"@pytest.mark.{name}({{'name': {example}, ...}}) or @pytest.mark.{name}([{example}, ...])"
        )
    fixture = f"{name}_check"
    if fixture not in metafunc.fixturenames:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid} is marked with {name}, but does not take the fixture {fixture}: "
            "nothing would be tested"
        )
    if isinstance(marked, Mapping):
        names, cases = list(map(str, marked)), list(marked.values())
    else:
        cases = list(marked)
        names = [f"{index}-{_name(case)}" for index, case in enumerate(cases)]
    if not cases:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} is marked with no {plural}: nothing would be tested")
    metafunc.parametrize(fixture, cases, ids=names, indirect=True)


def _name(case: Any) -> str:
    first = case[0] if isinstance(case, (tuple, list)) and case else case
    return str(getattr(first, "__name__", type(first).__name__))


@pytest.fixture
def adjoint_check(request: pytest.FixtureRequest) -> AdjointCheck:
    """Return a function that tests an adjoint: ``adjoint_check(A)`` or ``adjoint_check(f, g, domain=…)``."""
    return AdjointCheck(getattr(request, "param", None), _options(request, "adjoint"))


@pytest.fixture
def derivative_check(request: pytest.FixtureRequest) -> DerivativeCheck:
    """Return a function that tests a derivative: ``derivative_check(f, x0)``."""
    return DerivativeCheck(getattr(request, "param", None), _options(request, "derivative"))


def _options(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    marker = request.node.get_closest_marker(name)
    return {key: value for key, value in (marker.kwargs if marker else {}).items() if key != _WHAT[name][0]}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a marked test that never called its fixture, because it tested nothing."""
    yield
    for name in _WHAT:
        fixture = f"{name}_check"
        check = getattr(item, "funcargs", {}).get(fixture)
        if isinstance(check, _Check) and check.forgotten:
            pytest.fail(f"{fixture} was never called, so nothing was tested: call {fixture}()", pytrace=False)


__all__ = ["AdjointCheck", "DerivativeCheck", "adjoint_check", "derivative_check"]
