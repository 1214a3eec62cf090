"""The command line: exit codes, one line per unusable input, JSON that parses, and no traceback whatever is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from built import needs_torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import adjointlab as al
from adjointlab.cli.app import Surroundings, app
from adjointlab.cli.target import UnusableError, load, one_line, parse_device, parse_dtype, parse_shape, parse_target

pytestmark = pytest.mark.slow

RUNNER = CliRunner()
GOOD = "torch.nn:Conv2d(1,2,3,padding=1,bias=False)"
SHAPE = ("--shape", "1,1,6,5")


def invoke(*arguments, **surroundings):
    result = RUNNER.invoke(app, arguments, obj=Surroundings(**surroundings))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def unusable(*arguments, **surroundings):
    """The one line that is printed for unusable input."""
    result = invoke(*arguments, **surroundings)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# -- check ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (GOOD, *SHAPE),
        ("torch.nn:Conv3d(1, 1, 3, padding=1, padding_mode='circular')", "--shape", "1,1,4,4,4", "--dtype", "float64"),
        ("torch.nn:Linear(3,4)", "--shape", "2,3", "--batch-dims", "1", "--trials", "3", "--seed", "7"),
        ("torch.fft:fft2", "--shape", "6x5", "--dtype", "complex64", "--kwargs", "norm='ortho'"),
        ("torch.fft:rfft", "--shape", "(6,)"),
        ("torch:add", "--shape", "3,4", "--shape", "4"),
        ("torch.nn:Dropout()", "--shape", "4,4", "--eval"),
        ("torch:nn.Identity()", "--shape", "4", "--engine", "eager", "--device", "cpu"),
    ],
)
def test_linear_and_affine_maps_pass(arguments):
    result = invoke("check", *arguments)
    assert result.exit_code == 0, result.output
    assert f"{arguments[0]}: passed" in result.stdout
    assert not result.stderr


def test_a_bias_is_said_to_make_the_map_affine():
    biased = invoke("check", "torch.nn:Linear(3,4)", "--shape", "3").stdout
    assert "affine" in biased.splitlines()[1]
    assert "Its linear part" in biased
    assert "linear part" not in invoke("check", "torch.nn:Linear(3,4,bias=False)", "--shape", "3").stdout


def test_nothing_is_said_to_be_refuted_beside_what_has_passed():
    biased = invoke("check", "torch.nn:Conv2d(1,1,3)", *SHAPE)
    assert ": passed" in biased.stdout
    assert "its linear part x ↦ f(x) − f(0) was checked" in biased.stdout.lower()
    assert "linearity: affine" in biased.stdout
    assert not any(word in biased.stdout for word in ("refuted", "fails", "counterexample"))


def test_derivatives_are_checked():
    done = invoke("check", "torch:sin", "--jacobian", "--shape", "4", "--dtype", "float64", "--json")
    record = json.loads(done.stdout)
    assert (done.exit_code, record["status"], record["passed"]) == (0, "passed", True)
    assert 1.9 < record["derivative"]["slope"] < 2.1
    done = invoke("check", "torch:round", "--jacobian", "--shape", "40")
    assert done.exit_code == 0  # whose derivative is zero
    done = invoke("check", "torch.nn:Dropout()", "--jacobian", "--shape", "40")
    assert done.exit_code == 1
    assert "NotDifferentiableError" in done.stdout
    assert "--trials" in unusable("check", "torch:sin", "--jacobian", "--shape", "4", "--trials", "3")


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("torch.nn:ReLU()", "NotLinearError"),
        ("torch.nn:MaxPool2d(2)", "NotLinearError"),
        ("torch.nn:Dropout()", "NotLinearError"),
        ("torch.nn:BatchNorm2d(1)", "NotLinearError"),
        ("torch:detach", "NotDifferentiableError"),
    ],
)
def test_other_maps_fail(target, error):
    result = invoke("check", target, *SHAPE)
    assert result.exit_code == 1, result.output
    assert f"{target}: failed" in result.stdout
    assert error in result.stdout
    record = json.loads(invoke("check", target, *SHAPE, "--json").stdout)
    assert (record["status"], record["exit_code"], record["error"]) == ("failed", 1, error)


def twice_too_large(*args, **kwargs):
    """Return an operator whose adjoint is twice too large."""
    A = al.linear_operator(*args, **kwargs)
    return al.LinearOperator(A, lambda y: 2 * A.H(y), A.domain, A.codomain)


def test_a_wrong_adjoint_fails():
    assert invoke("check", GOOD, *SHAPE, linear_operator=twice_too_large).exit_code == 1
    record = json.loads(invoke("check", GOOD, *SHAPE, "--json", linear_operator=twice_too_large).stdout)
    assert record["status"] == "failed"
    assert record["adjoint"]["error"] > record["adjoint"]["tolerance"]


def test_the_worst_exit_code_counts():
    assert invoke("check", GOOD, GOOD, *SHAPE).exit_code == 0
    assert invoke("check", GOOD, "torch.nn:ReLU()", *SHAPE).exit_code == 1
    result = invoke("check", "nowhere:f", GOOD, "torch.nn:ReLU()", *SHAPE)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"{GOOD}: passed" in result.stdout


def test_json_is_one_object_or_a_list():
    record = json.loads(invoke("check", GOOD, *SHAPE, "--json").stdout)
    assert record["target"] == GOOD
    assert (record["status"], record["exit_code"], record["passed"], record["affine"]) == ("passed", 0, True, False)
    assert record["domain"] == [{"shape": [1, 1, 6, 5], "dtype": "float32", "device": "cpu"}]
    assert record["adjoint"]["error"] <= record["adjoint"]["tolerance"]
    assert record["linearity"]["verdict"] in {"proved", "supported"}
    several = json.loads(invoke("check", GOOD, "torch.nn:ReLU()", "nowhere:f", *SHAPE, "--json").stdout)
    assert [record["exit_code"] for record in several] == [0, 1, 2]


def test_the_seed_fixes_everything():
    first, second, other = (
        json.loads(invoke("check", GOOD, *SHAPE, "--json", "--seed", seed).stdout) for seed in ("3", "3", "4")
    )
    assert first == second
    assert first["adjoint"]["error"] != other["adjoint"]["error"]


def test_the_random_number_generator_is_left_alone():
    before = torch.random.get_rng_state()
    invoke("check", GOOD, *SHAPE)
    assert torch.equal(before, torch.random.get_rng_state())


def test_html(tmp_path):
    page = tmp_path / "report.html"
    targets_ = (GOOD, "torch.nn:ReLU()", "nowhere:<b>")
    assert invoke("check", *targets_, *SHAPE, "--html", str(page)).exit_code == 2
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.count("<section>") == 3
    assert "nowhere:&lt;b&gt;" in text
    assert "<b>" not in text


def test_html_of_explanations(tmp_path):
    page = tmp_path / "report.html"
    assert invoke("explain", GOOD, "torch.nn:ReLU()", *SHAPE, "--html", str(page)).exit_code == 1
    text = page.read_text(encoding="utf-8")
    assert f"<h2><code>{GOOD}</code></h2>" in text
    assert "<h2><code>torch.nn:ReLU()</code>: failed</h2>" in text
    assert "<pre>" in text
    assert "NotLinearError" in text


def test_html_that_cannot_be_written(tmp_path):
    assert "cannot write" in unusable("check", GOOD, *SHAPE, "--html", str(tmp_path / "no" / "report.html"))


# -- explain -------------------------------------------------------------------------------------------------------


def test_explain_shows_the_account():
    result = invoke("explain", GOOD, *SHAPE, "--engine", "traced")
    assert result.exit_code == 0
    assert "traced" in result.stdout
    record = json.loads(invoke("explain", GOOD, *SHAPE, "--json").stdout)
    assert record["explanation"].strip() in invoke("explain", GOOD, *SHAPE).stdout


def test_explain_of_an_affine_and_of_a_nonlinear_map():
    assert "linear part" in invoke("explain", "torch.nn:Conv2d(1,1,3)", *SHAPE).stdout
    refused = invoke("explain", "torch.nn:ReLU()", *SHAPE)
    assert refused.exit_code == 1
    assert "NotLinearError" in refused.stdout


# -- unusable input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("torch.nn.Conv2d(1,1,3)", "did you mean torch.nn:Conv2d(1,1,3)?"),
        ("Conv2d", "no colon"),
        ("", "no colon"),
        ("./my/blur.py:Blur(3)", "did you mean my.blur:Blur(3)?"),
        ("torch.nn:", "after the colon"),
        (":Conv2d", "before the colon"),
        ("torch..nn:Conv2d(1,1,3)", "before the colon"),
        ("torch.nn:Conv2d(1,1,3", "after the colon"),
        ("torch.nn:Conv2d(1)(2)", "after the colon"),
        ("torch.nn:Conv2d(1,1,3).weight[0]", "after the colon"),
        ("torch.nn:Conv2d(1,1,3).forwards", "did you mean forward?"),
        ("torch.nn:Conv2d(1,1,3).weight", "is an object of type Parameter"),
        ("torch.nn:1+1", "after the colon"),
        ("torch.nn:Conv2d(1,1,3);f", "after the colon"),
        ("torch.nn:Conv2d(1,1,k)", "must be literals"),
        ("torch.nn:Conv2d(1,1,print('x'))", "must be literals"),
        ("torch.nn:Conv2d(*(1,1,3))", "must be literals"),
        ("torch.nn:Conv2d(**{'in_channels': 1})", "must be literals"),
        ("torch.nn:Conv2d(1,1,3,3**9)", "must be literals"),
        ("torch.nn:Conv2", "did you mean Conv2d?"),
        ("torch.nn:Conv2d", "is a class: add its arguments in parentheses"),
        ("torch.nn:Conv2d(1,1)", "missing 1 required positional argument"),
        ("torch.nn:Conv2d(1,1,0)", "cannot make"),
        ("torch.nn:Conv2d(1,1,3,kernel=3)", "unexpected keyword argument"),
        ("torch.nn:Linear(10000000,10000000)", "GiB"),
        ("torch:pi", "an object of type float"),
        ("torch:pi(3)", "cannot be called"),
        ("torch:zeros(3)", "an object of type Tensor"),
        ("nowhere.at.all:f", "cannot import"),
        ("torch.nn:Conv2d(1,1,9)", "Kernel size"),
        ("torch.nn:Conv2d(3,1,3)", "channels"),
        ("torch:argmax", "int64"),
        ("builtins:id", "got int"),
        ("builtins:bool", "is a class"),
        ("torch.nn:Module()", "forward"),
        ("sys:exit", "SystemExit"),
        ("pytest:skip()", "Skipped"),  # a BaseException that is no Exception
    ],
)
def test_unusable_targets_give_one_line(target, said):
    assert said in unusable("check", target, *SHAPE)
    assert said in unusable("explain", target, *SHAPE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected --shape"),
        (("--shape", ""), "1,1,64,64"),
        (("--shape", "a,b"), "1,1,64,64"),
        (("--shape", "1.5"), "1,1,64,64"),
        (("--shape", "1,,2"), "1,1,64,64"),
        (("--shape", "1,0"), "1 or more"),
        (("--shape", "-1,2"), "1 or more"),
        (("--shape", "9" * 5000), "1,1,64,64"),
        (("--shape", "9" * 40), "GiB"),
        (("--shape", ",".join(["1"] * 65)), "64 dimensions"),
        ((*SHAPE, "--dtype", "float33"), "float32"),
        ((*SHAPE, "--dtype", "int64"), "float32"),
        ((*SHAPE, "--dtype", "nn"), "float32"),
        ((*SHAPE, "--device", "toaster"), "--device"),
        ((*SHAPE, "--device", "meta"), "--device"),
        ((*SHAPE, "--batch-dims", "5"), "--batch-dims"),
        ((*SHAPE, "--batch-dims", "-1"), "--batch-dims"),
        ((*SHAPE, "--trials", "0"), "--trials"),
        ((*SHAPE, "--seed", "-1"), "--seed"),
        ((*SHAPE, "--engine", "steam"), "--engine"),
        ((*SHAPE, "--kwargs", "1"), "name=literal"),
        ((*SHAPE, "--kwargs", "a=b"), "name=literal"),
        ((*SHAPE, "--kwargs", "a=1)(b=2"), "name=literal"),
        ((*SHAPE, "--no-such-option"), "--no-such-option"),
        ((*SHAPE, "--tol", "2"), "--tol"),
        ((*SHAPE, "--tol", "nan"), "--tol"),
        ((*SHAPE, "--arrays", "numpy"), "--adjoint"),
        ((*SHAPE, "--adjoint", GOOD, "--jacobian"), "--jacobian"),
        ((*SHAPE, "--adjoint", "nowhere:f"), "cannot import"),
    ],
)
def test_unusable_options_give_one_line(options, said):
    assert said in unusable("check", GOOD, *options)


def test_unusable_commands_give_one_line():
    assert "chek" in unusable("chek")
    assert "TARGET" in unusable("check")


def test_debug_shows_the_traceback():
    result = RUNNER.invoke(app, ["check", "nowhere:f", *SHAPE, "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "ModuleNotFoundError" in result.stderr


# -- pairs of functions, and files ---------------------------------------------------------------------------------

PAIR = """
import numpy as np
import torch

def forward(x):
    return np.cumsum(np.asarray(x) if isinstance(x, np.ndarray) else stop())

def backward(y):
    return np.cumsum(y[::-1])[::-1]

def twice(y):
    return 2 * backward(y)

def rough(y):
    return backward(y) * np.float32(1.0003)

def stop():
    raise TypeError("an array, please")

class Physics:
    def __init__(self, n):
        self.n = n
        self.inner = self

    def A(self, x):
        return torch.nn.functional.pad(x, (0, self.n))

    def At(self, y):
        return y[..., : -self.n]
"""


@pytest.fixture
def pair(tmp_path, monkeypatch):
    (tmp_path / "pair.py").write_text(PAIR)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("pair", None)


def checked(*arguments):
    done = invoke("check", *arguments, "--shape", "6", "--json")
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.usefixtures("pair")
def test_pairs_of_functions_of_arrays_are_checked():
    arrays = "pair:forward", "--arrays", "numpy"
    code, record = checked(*arrays, "--adjoint", "pair:backward")
    assert (code, record["passed"], record["claimed"]) == (0, True, "pair:backward")
    code, record = checked(*arrays, "--adjoint", "pair:twice")
    assert code == 1
    diagnosis = record["adjoint"]["diagnosis"]
    assert "2.000 × too large" in diagnosis
    said = invoke("check", *arrays, "--adjoint", "pair:twice", "--shape", "6").stdout
    assert f"adjoint test FAILED: {diagnosis}" in said  # in the words of Python


def test_pairs_of_functions_of_jax_are_checked():
    pytest.importorskip("jax")
    flip = "jax.numpy:flip", "--arrays", "jax"
    assert checked(*flip, "--adjoint", "jax.numpy:flip")[0] == 0
    assert checked(*flip, "--adjoint", "jax.numpy:negative")[0] == 1


@pytest.mark.usefixtures("pair")
def test_a_tolerance_is_what_is_judged_by():
    claim = "pair:forward", "--arrays", "numpy", "--adjoint", "pair:rough"
    assert checked(*claim)[0] == 1
    code, record = checked(*claim, "--tol", "1e-3")
    assert (code, record["adjoint"]["tolerance"]) == (0, 1e-3)
    assert "within tol=0.001" in str(record["adjoint"]["notes"])
    assert checked(*claim, "--tol", "1e-4")[0] == 1


@pytest.mark.usefixtures("pair")
def test_targets_are_attributes_of_what_a_call_returns():
    assert checked("pair:Physics(2).A")[0] == 0
    assert checked("pair:Physics(n=2).inner.A", "--adjoint", "pair:Physics(2).At")[0] == 0
    code, record = checked("pair:Physics(2).A", "--adjoint", "pair:Physics(1).At")
    assert (code, record["passed"]) == (1, False)


def test_maps_are_written_to_files(tmp_path):
    file = tmp_path / "adjoint.pt2"
    target = "torch.nn:Conv2d(1,2,3,padding=1,bias=False)"
    done = invoke("export", target, *SHAPE, "--adjoint", "--batch", "1", "8", "--output", str(file), "--seed", "3")
    assert done.exit_code == 0, done.output
    assert f"{target}: written" in done.stdout
    torch.manual_seed(3)
    A = al.linear_operator(torch.nn.Conv2d(1, 2, 3, padding=1, bias=False), (1, 1, 6, 5), batch_dims=1)
    y = torch.randn(4, 2, 6, 5)
    torch.testing.assert_close(torch.export.load(file).module()(y), A.H(y).detach())
    refused = invoke("export", "torch.nn:ReLU()", *SHAPE, "--output", str(file))
    assert refused.exit_code == 1
    assert "NotLinearError" in refused.stdout
    assert "ends with .pt2" in unusable("export", target, *SHAPE, "--output", str(tmp_path / "a.txt"))
    assert "--output" in unusable("export", target, *SHAPE)
    assert "one TARGET" in unusable("export", target, target, *SHAPE, "--output", str(file))


# -- modules of the user's own -------------------------------------------------------------------------------------

MINE = """
import torch
print("hello from mine")
blur = torch.nn.Conv1d(1, 1, 3, bias=False)
double = lambda x: 2 * x

class Scale:
    def __init__(self, factor):
        self.factor = factor
    def __call__(self, x):
        return self.factor * x

def make(factor=1.0):
    return Scale(factor)

def wrong(x):
    raise RuntimeError("a message \\x1b[31mwith\\n\\nmany lines")

def leave():
    raise SystemExit("bye")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_own_operators.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "broken_operators.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield "my_own_operators"
    sys.modules.pop("my_own_operators", None)


def test_the_current_directory_is_importable(mine):
    before = list(sys.path)
    for name in ("blur", "double", "Scale(3.0)", "make()", "make(factor=2)"):
        shape = "1,1,8" if name == "blur" else "8"
        assert invoke("check", f"{mine}:{name}", "--shape", shape).exit_code == 0
    assert sys.path == before


def test_prints_of_a_module_do_not_spoil_the_json(mine):
    result = invoke("check", f"{mine}:double", "--shape", "4", "--json")
    assert "hello from mine" in result.stderr
    assert json.loads(result.stdout)["exit_code"] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("wrong", "a message \\x1b[31mwith"), ("leave()", "bye"), ("make('a', 'b')", "positional arguments")],
)
def test_failing_modules_give_one_line(mine, name, said):
    RUNNER.invoke(app, ["check", f"{mine}:double", "--shape", "4"])  # so that it is imported, and has printed
    assert said in unusable("check", f"{mine}:{name}", "--shape", "4")


@pytest.mark.usefixtures("mine")
def test_a_module_with_a_syntax_error_gives_one_line():
    assert "SyntaxError" in unusable("check", "broken_operators:f", "--shape", "4")


# -- whatever is typed ---------------------------------------------------------------------------------------------

numbers = st.integers(-2, 5) | st.integers() | st.floats()
atoms = st.none() | st.booleans() | numbers | st.text(max_size=5) | st.binary(max_size=3)
literals = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
names = st.sampled_from(
    ["Conv1d", "ConvTranspose1d", "Linear", "Identity", "ReLU", "AvgPool1d", "Upsample", "Fold", "Nope"]
)


def call(name, args, kwargs):
    return f"{name}({', '.join([*map(repr, args), *(f'{key}={value!r}' for key, value in kwargs.items())])})"


keywords = st.dictionaries(st.sampled_from(["bias", "padding", "kernel_size", "stride"]), literals, max_size=2)
calls = st.builds(call, names.map("torch.nn:{}".format), st.lists(literals, max_size=4), keywords)
mutated = st.builds(
    lambda text, at, new: text[:at] + new + text[at + 1 :], calls, st.integers(0, 40), st.text(max_size=2)
)
any_text = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too, as file names may hold
shapes = (
    st.text("0123456789,x-+.() eE٣", max_size=12) | st.lists(st.integers(-1, 10**30), max_size=5).map(str) | any_text
)
slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))  # `FUZZ_EXAMPLES=2000 make test ARGS="-k answered"`
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=slow)


def holds_whatever_is_typed(*arguments):
    result = invoke("check", *arguments, "--json", memory=2**27)  # so that large numbers are refused, not tried
    assert result.exit_code in {0, 1, 2}
    if result.exit_code == 2:
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
        assert len(result.stderr.splitlines()) == 1
    if result.exit_code < 2 or result.stdout:
        assert json.loads(result.stdout)["exit_code"] == result.exit_code


@fuzz
@given(calls | mutated | any_text)
@example("torch.nn:" + "(" * 300 + ")" * 300)
@example("torch.nn:Conv1d(" + "[" * 99 + "]" * 99 + ")")
@example("torch.nn:Conv1d(" + "9" * 5000 + ")")
@example("torch.nn:f(1_0if)")
@example("torch.nn:\x00")
@example("\ud800:\ud800")
@example("torch.nn:Linear(4, 4)\n\n\u2028")
@example("torch.nn:Linear(1000000, 1000000)")
def test_any_target_is_answered(target):
    assume(not target.startswith("-"))
    holds_whatever_is_typed(target, "--shape", "1,1,4")


@fuzz
@given(
    st.text("0123456789,x-+.() eE٣", max_size=12) | st.lists(st.integers(-1, 10**30), max_size=5).map(str) | any_text
)
@example("1," * 64 + "1")
@example("99999999999999999999")
def test_any_shape_is_answered(shape):
    holds_whatever_is_typed("torch.nn:Identity()", "--shape", shape)


@fuzz
@given(any_text, any_text, any_text)
def test_any_options_are_answered(dtype, kwargs, device):
    for options in (("--dtype", dtype), ("--kwargs", kwargs), ("--device", device)):
        holds_whatever_is_typed("torch.nn:Identity()", "--shape", "3", *options)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
def test_shapes_survive_writing(shape):
    for text in (",".join(map(str, shape)), "x".join(map(str, shape)), str(tuple(shape))):
        assert parse_shape(text) == tuple(shape)


@given(st.lists(literals, max_size=3), st.dictionaries(st.sampled_from("abc"), literals, max_size=3))
def test_literal_arguments_survive_writing(args, kwargs):
    written = call("a.b:c.d", args, kwargs)
    assume("inf" not in written and "nan" not in written)  # these are names, not literals
    parsed = parse_target(written)
    assert (parsed.module, parsed.path, parsed.called) == ("a.b", ("c", "d"), True)
    assert (list(parsed.args), parsed.kwargs) == (args, kwargs)


@given(st.text())
def test_one_line_is_one_printable_line(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.isprintable()
    assert len(line) <= 500


def test_parsers_refuse_in_their_own_words():
    with pytest.raises(UnusableError, match="expected --shape"):
        parse_shape("two")
    with pytest.raises(UnusableError, match="expected --dtype"):
        parse_dtype("bool")
    with pytest.raises(UnusableError, match="expected --device"):
        parse_device("nowhere")
    with pytest.raises(UnusableError, match="is a class"):
        load(parse_target("torch.nn:Linear"))


# -- as a program --------------------------------------------------------------------------------------------------


def program(*arguments, cwd, **environment):
    code = "from adjointlab.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )  # fmt: skip


@needs_torch("2.10", "torch.compile leaves a temporary directory to the end of the process, which warns")
def test_the_program_passes_and_prints_json(tmp_path):
    done = program("check", GOOD, *SHAPE, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["passed"]


def test_the_program_refuses_with_one_line(tmp_path: Path):
    done = program("check", "torch.nn:Conv2d", *SHAPE, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--help",), ("check", "--help"), ("--version",)], ids=" ".join)
def test_help_waits_for_no_large_library(tmp_path, arguments):
    code = (
        "import sys; from adjointlab.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({'torch', 'numpy', 'rich.console'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout or done.stdout.strip() == al.__version__


def test_the_package_is_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "adjointlab", "check", "--help"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: adjointlab check")


def test_the_program_completes_names(tmp_path):
    words = {"_ADJOINTLAB_COMPLETE": "complete_bash", "COMP_WORDS": "adjointlab ch", "COMP_CWORD": "1"}
    done = program(cwd=tmp_path, **words)
    assert done.stdout.split() == ["check"]


def test_without_typer_the_program_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')", encoding="utf-8")
    done = program("check", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == 'error: the command line needs typer: pip install "adjointlab[cli]"\n'


@pytest.mark.parametrize("stranger", [False, True])
def test_without_a_clone_the_demo_says_where_it_is(tmp_path, stranger):
    if stranger:  # what another project has installed under the same name is not run
        (tmp_path / "examples" / "demo").mkdir(parents=True)
        (tmp_path / "examples" / "demo" / "__init__.py").write_text("raise SystemExit(0)", encoding="utf-8")
    line = unusable("demo", "--quick", "--output", str(tmp_path / "figures"), clone=tmp_path)
    for told in ("examples/demo", "clone the repository", "make demo"):
        assert told in line
    assert "pip install" not in line
    assert not (tmp_path / "figures").exists()


def test_without_its_libraries_the_demo_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("", encoding="utf-8")
    (tmp_path / "examples" / "demo").mkdir(parents=True)
    (tmp_path / "examples" / "demo" / "__init__.py").write_text("import no_such_library", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "adjointlab_demo", raising=False)
    line = unusable("demo", "--output", str(tmp_path / "figures"), clone=tmp_path)
    assert "no_such_library" in line
    assert 'pip install "adjointlab[demo]"' in line
    assert "adjointlab_demo" not in sys.modules


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == al.__version__
