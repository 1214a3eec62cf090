"""Settings of the whole suite: deterministic, and strict about warnings apart from those named here."""

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


def pytest_configure(config: pytest.Config) -> None:
    # torch says so whenever a module is moved to a complex dtype.
    config.addinivalue_line("filterwarnings", "ignore:Complex modules are a new feature:UserWarning")
    # What torch says about an even kernel under padding="same" is about speed, and no concern of a test.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
