"""Options and fixtures of the benchmarks; `make bench` runs them and renders the results."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from interleave import Comparison

PACKAGES = ("adjointlab", "torch", "numpy", "scipy", "pylops", "jax", "jaxlib", "deepinv", "pytest-benchmark")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adjointlab benchmarks")
    group.addoption("--share", type=float, default=1.0, help="the part of its usual time that each comparison gets")
    group.addoption("--remark", default="", help="a sentence on how it was measured, for the page")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.device(config.getoption("--on"))
    machine_info.pop("node", None)  # the name of the host is nobody's business
    machine_info["adjointlab"] = {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "quick": config.getoption("--quick"),
        "share": config.getoption("--share"),
        "remark": config.getoption("--remark"),
    }


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick", default=False)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--on"))


@pytest.fixture(autouse=True)
def _nothing_by_default(device: torch.device) -> Iterator[None]:
    """Have no default device, under which each call of torch takes longer."""
    torch.set_default_device(None)
    yield
    torch.set_default_device(None if device.type == "cpu" else device)


@pytest.fixture
def compare(
    benchmark: Any, quick: bool, device: torch.device, request: pytest.FixtureRequest
) -> Iterator[Callable[..., dict[str, float]]]:
    """Time ways in turns: `compare(ways, share=seconds for each, **facts)`, the first one being ours."""
    comparison = Comparison(benchmark, device, quick=quick, part=request.config.getoption("--share", default=1.0))
    with torch.no_grad():
        yield comparison
