"""Settings of the whole suite: deterministic, strict about warnings apart from those named here, and on one device."""

import contextlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "adjointlab",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("adjointlab")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("adjointlab").addoption(
        "--on",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="the torch device that tests and benchmarks make their tensors on (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch says so whenever a module is moved to a complex dtype.
    config.addinivalue_line("filterwarnings", "ignore:Complex modules are a new feature:UserWarning")
    # What torch says about an even kernel under padding="same" is about speed, and no concern of a test.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")
    if torch.device(config.getoption("--on")).type != "cpu":  # to set it, "cpu" too, has all that makes a tensor slower
        torch.set_default_device(config.getoption("--on"))
    # Tests compare with what float32 can: tests of what torch's TF32 does to the engine turn it on.
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _where(request: pytest.FixtureRequest) -> Iterator[None]:
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere and request.node.get_closest_marker("cpu") else contextlib.nullcontext():
        yield
