"""The pytest plugin, as a project sees it that has adjointlab installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch._dynamo
import torch._inductor.compile_fx

import adjointlab as al

pytestmark = pytest.mark.slow

# Pytester forgets what its tests import, and these must not be imported twice: run alone, this file would fail.
IMPORTED = (
    torch._dynamo,
    torch._inductor,
    al.linear_operator,
    al.affine_operator,
    al.check_adjoint,
    al.check_derivative,
)

pytest_plugins = ["pytester"]

OPERATORS = """
import pytest, torch
import adjointlab as al

def blur(dtype=torch.float64):
    return torch.nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=dtype)

A = al.linear_operator(blur(), (1, 1, 6, 6), engine="eager")
"""


@pytest.fixture
def project(pytester: pytest.Pytester):
    """Run a project's test module, in this process and with the plugin that its entry point names."""

    def run(text: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(OPERATORS + text)
        return pytester.runpytest("-p", "no:benchmark", "-p", "no:cacheprovider", "--strict-markers", *options)

    return run


def test_three_lines_test_every_operator(project) -> None:
    done = project(
        """
@pytest.mark.adjoint({"operator": A, "module": (blur(), (1, 1, 5, 5)), "pair": (torch.neg, torch.neg, (4,))})
def test_adjoints(adjoint_check):
    adjoint_check()
""",
        "-v",
    )
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines(["*test_adjoints?operator?*", "*test_adjoints?module?*", "*test_adjoints?pair?*"])


ROUGH = """
def rough(y):
    return 2 * y + 1e-4 * y.roll(1)
"""


def test_a_tolerance_is_what_is_judged_by(project) -> None:
    def checked(options: str) -> pytest.RunResult:
        return project(f"""{ROUGH}
@pytest.mark.adjoint([(lambda x: 2 * x, rough, (8,))], tol=1e-3)
def test_adjoints(adjoint_check):
    report = adjoint_check({options})
    assert report.tolerance == 1e-3
    assert "where 1.0e-03 was asked for" in str(report)
    assert "within tol=0.001" in str(report.notes)
""")

    checked("").assert_outcomes(passed=1)
    for tol in ("1e-6", "None"):  # which override the marker
        done = checked(f"tol={tol}")
        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(["*AdjointMismatchError*"])
    done = checked("tol=2")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*expected tol between 0 and 1, got 2*"])


def test_wrong_adjoint_fails_with_its_diagnosis(project) -> None:
    done = project("""
@pytest.mark.adjoint([(lambda x: 2 * x, lambda y: -2 * y, (4,)), A])
def test_adjoints(adjoint_check):
    adjoint_check()
""")
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["*AdjointMismatchError: *sign*", "*adjoint test FAILED*"])


def test_a_failure_shows_its_reason_and_nothing_else(project) -> None:
    done = project(
        """
@pytest.mark.adjoint([(torch.fft.fft, torch.fft.ifft, torch.zeros(8, dtype=torch.complex64)), (torch.relu, (4,))])
def test_adjoints(adjoint_check):
    adjoint_check()
""",
        "-p", "logging",
    )  # fmt: skip
    done.assert_outcomes(failed=2)
    shown = [line for line in done.outlines if line.startswith("E ")]
    assert shown[0].endswith("AdjointMismatchError: Aᴴ is 8.000 × too small: B is the inverse of A")
    assert all(line.split() != ["E"] for line in shown)
    assert not any("DEBUG" in line or "derive.py" in line for line in done.outlines)


def test_operators_are_made_when_they_are_tested(project) -> None:
    done = project("""
def broken():
    raise RuntimeError("made too early")

@pytest.mark.adjoint({"good": lambda: A, "broken": broken})
def test_adjoints(adjoint_check):
    adjoint_check()
""")
    done.assert_outcomes(passed=1, failed=1)


def test_fixture_alone(project) -> None:
    done = project("""
def test_right(adjoint_check):
    assert adjoint_check(A).passed
    assert adjoint_check(blur(), domain=(1, 1, 5, 5)).passed
    assert adjoint_check(A, A.H).passed

def test_wrong(adjoint_check):
    adjoint_check(A, lambda y: 2 * A.H(y))

def test_not_linear(adjoint_check):
    adjoint_check(torch.relu, domain=(4,))
""")
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(["*2.000 × too large*", "*NotLinearError*"])


def test_options_of_the_marker_reach_the_check(project) -> None:
    done = project("""
@pytest.mark.adjoint(trials=17)
def test_trials(adjoint_check):
    assert adjoint_check(A).trials == 17
    assert adjoint_check(A, trials=2).trials == 2
""")
    done.assert_outcomes(passed=1)


def test_operators_by_keyword_and_skips(project) -> None:
    done = project("""
@pytest.mark.adjoint(operators={"a": A, "b": A}, trials=2)
def test_named(adjoint_check):
    assert adjoint_check().trials == 2

@pytest.mark.adjoint([A])
def test_skipped(adjoint_check):
    pytest.skip("not today")
""")
    done.assert_outcomes(passed=2, skipped=1)


def test_derivatives(project) -> None:
    done = project("""
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, v):
        return ctx.saved_tensors[0] * v

@pytest.mark.derivative({"sin": (torch.sin, torch.ones(3)), "made": lambda: (torch.exp, torch.ones(2))}, seed=3)
def test_derivatives(derivative_check):
    assert derivative_check().passed

@pytest.mark.derivative([(Square.apply, torch.ones(3)), (torch.sqrt, torch.zeros(3))])
def test_wrong(derivative_check):
    derivative_check()

def test_alone(derivative_check):
    assert derivative_check(torch.sin, torch.ones(3), batch_dims=1).passed
""")
    done.assert_outcomes(passed=3, failed=2)
    shown = [line for line in done.outlines if line.startswith("E ")]
    assert shown[0].endswith("AdjointMismatchError: the backward of f is wrong: J is 2 × too small")
    assert any("NotDifferentiableError" in line for line in shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@pytest.mark.adjoint([A])\ndef test_x():\n    pass", "*does not take the fixture adjoint_check*"),
        ("@pytest.mark.adjoint([])\ndef test_x(adjoint_check):\n    adjoint_check()", "*marked with no operators*"),
        ("def test_x(adjoint_check):\n    adjoint_check()", "*needs an operator*"),
        ("@pytest.mark.adjoint([A])\ndef test_x(adjoint_check):\n    pass", "*was never called*"),
        ("@pytest.mark.adjoint(A)\ndef test_x(adjoint_check):\n    adjoint_check()", "*expected one mapping or list*"),
        ("@pytest.mark.adjoint([A], [A])\ndef test_x(adjoint_check):\n    pass", "*expected one mapping or list*"),
        ("@pytest.mark.derivative([1])\ndef test_x(adjoint_check):\n    pass", "*take the fixture derivative_check*"),
        (
            "@pytest.mark.derivative([1])\ndef test_x(derivative_check):\n    pass",
            "*derivative_check was never called*",
        ),
        ("def test_x(derivative_check):\n    derivative_check()", "*needs a function and a point*"),
    ],
    ids=[
        "without the fixture",
        "no operators",
        "nothing to test",
        "not called",
        "one operator",
        "two lists",
        "without derivative_check",
        "derivative not called",
        "no function",
    ],
)
def test_tests_that_would_test_nothing_are_errors(project, text: str, message: str) -> None:
    done = project(text)
    assert done.ret != pytest.ExitCode.OK
    done.stdout.fnmatch_lines([message])


def test_nothing_heavy_is_imported_until_used() -> None:
    program = "import sys, adjointlab.pytest_plugin; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
