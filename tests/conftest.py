"""Settings of the whole suite: deterministic, strict about warnings apart from those named here, on one device."""

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
    group = parser.getgroup("adjointlab")
    group.addoption(
        "--on",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="the torch device that tests and benchmarks make their tensors on (default: %(default)s)",
    )
    group.addoption(
        "--quick",
        action="store_true",
        help="every fifth operator of the zoo, in one dtype, no slow tests; of benchmarks, tiny sizes and few rounds",
    )


def pytest_configure(config: pytest.Config) -> None:
    pytest.register_assert_rewrite("laws", "lawbook")
    # torch says so whenever a module is moved to a complex dtype.
    config.addinivalue_line("filterwarnings", "ignore:Complex modules are a new feature:UserWarning")
    # What torch says about an even kernel under padding="same" is about speed, and no concern of a test.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")
    if torch.device(config.getoption("--on")).type != "cpu":  # to set it, "cpu" too, has all that makes a tensor slower
        torch.set_default_device(config.getoption("--on"))
    # Tests compare with what float32 can: tests of what torch's TF32 does to the engine turn it on.
    torch.backends.cudnn.allow_tf32 = False


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):  # layers made at import are the same whatever was imported before
        torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from built import needs_torch

    # Before, the end of a group holds the GIL while it waits for threads that may want it: PyTorch's request 154976.
    ends = needs_torch("2.8", "a process that ends its gloo group may hang")
    for item in items:
        if item.nodeid.startswith("adjointlab/distributed/"):
            item.add_marker(ends)
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_quick(item)])
        items[:] = [item for item in items if _is_quick(item)]


def _is_quick(item: pytest.Item) -> bool:
    from operator_zoo import QUICK, Entry

    if item.get_closest_marker("slow"):
        return False
    given = item.callspec.params if hasattr(item, "callspec") else {}
    entry, dtype = given.get("entry"), given.get("dtype")
    return not isinstance(entry, Entry) or (entry.name in QUICK and dtype in {None, QUICK[entry.name]})


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _where(request: pytest.FixtureRequest) -> Iterator[None]:
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere and request.node.get_closest_marker("cpu") else contextlib.nullcontext():
        yield
