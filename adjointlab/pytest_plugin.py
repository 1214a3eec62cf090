"""A pytest plugin that tests ``⟨Ax, y⟩ = ⟨x, By⟩``: the fixture ``adjoint_check`` and the marker ``adjoint``.

If adjointlab is installed, this is a complete test module::

    @pytest.mark.adjoint({"blur": (Blur(), (1, 1, 64, 64)), "fft": (fft, my_ifft, (1, 32)), "mask": A})
    def test_adjoints(adjoint_check):
        adjoint_check()

pytest runs the test once for each operator. Since pytest imports this plugin in every environment with adjointlab, the
plugin imports nothing but pytest until a test uses the fixture.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from adjointlab.verify import AdjointReport

_MARKER = (
    "adjoint(operators, **options): run the test, which must take the fixture adjoint_check, once for each operator: a "
    "mapping or list of LinearOperator, (module, domain), (function, adjoint, domain), or a function that makes one of "
    "these; options, such as trials=20 or seed=1, go to adjointlab.check_adjoint"
)


class AdjointCheck:
    """The value of the fixture: a callable that tests ``⟨Ax, y⟩ = ⟨x, By⟩``, and raises with a diagnosis."""

    def __init__(self, case: Any, options: Mapping[str, Any]) -> None:
        self._case = case
        self._options = dict(options)
        self._called = False

    @property
    def forgotten(self) -> bool:
        """Whether the marker provides an operator that the test has not checked."""
        return self._case is not None and not self._called

    def __call__(self, A: Any = None, adjoint: Callable[[Any], Any] | None = None, **options: Any) -> AdjointReport:
        """Test ``⟨Ax, y⟩ = ⟨x, By⟩``; without arguments, for the operator of the marker.

        Parameters
        ----------
        A : LinearOperator, AffineOperator, module or function, optional
            The operator; a module or function needs ``domain=``.
        adjoint : callable, optional
            A hand-written adjoint.
        **options
            Options of :func:`adjointlab.check_adjoint`; they override the options of the marker.

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
        if "domain" in options and adjoint is None:
            try:
                A = linear_operator(A, options.pop("domain"))
            except (NotLinearError, NotDifferentiableError) as error:
                raise error.with_traceback(None) from None  # the message says all: where it was found says nothing
        return check_adjoint(A, adjoint, **{**self._options, **options})


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


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker ``adjoint``."""
    config.addinivalue_line("markers", _MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a marked test once for each operator of its marker."""
    marker = metafunc.definition.get_closest_marker("adjoint")
    if marker is None or not (marker.args or "operators" in marker.kwargs):
        return
    operators = marker.args[0] if marker.args else marker.kwargs["operators"]
    if len(marker.args) > 1 or not isinstance(operators, (Mapping, list, tuple)):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: expected one mapping or list of operators in the marker adjoint, got "
            f"{', '.join(type(value).__name__ for value in marker.args or (operators,))}: write "
            "@pytest.mark.adjoint({'name': A, ...}) or @pytest.mark.adjoint([A, ...])"
        )
    if "adjoint_check" not in metafunc.fixturenames:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid} is marked with adjoint, but does not take the fixture adjoint_check: "
            "nothing would be tested"
        )
    if isinstance(operators, Mapping):
        names, cases = list(map(str, operators)), list(operators.values())
    else:
        cases = list(operators)
        names = [f"{index}-{_name(case)}" for index, case in enumerate(cases)]
    if not cases:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} is marked with no operators: nothing would be tested")
    metafunc.parametrize("adjoint_check", cases, ids=names, indirect=True)


def _name(case: Any) -> str:
    first = case[0] if isinstance(case, (tuple, list)) and case else case
    return str(getattr(first, "__name__", type(first).__name__))


@pytest.fixture
def adjoint_check(request: pytest.FixtureRequest) -> AdjointCheck:
    """Return a function that tests an adjoint: ``adjoint_check(A)`` or ``adjoint_check(f, g, domain=…)``."""
    marker = request.node.get_closest_marker("adjoint")
    options = {key: value for key, value in (marker.kwargs if marker else {}).items() if key != "operators"}
    return AdjointCheck(getattr(request, "param", None), options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a marked test that never called its fixture, because it tested nothing."""
    yield
    check = getattr(item, "funcargs", {}).get("adjoint_check")
    if isinstance(check, AdjointCheck) and check.forgotten:
        pytest.fail("adjoint_check was never called, so nothing was tested: call adjoint_check()", pytrace=False)


__all__ = ["AdjointCheck", "adjoint_check"]
