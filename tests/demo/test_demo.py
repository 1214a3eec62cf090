"""The demonstration: everything it claims holds, its figures are there, and its claims can fail."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import adjointlab as al

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("nibabel")

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adjointlab.cli.app import Surroundings, app
from adjointlab.cli.demonstration import load

ROOT = Path(__file__).parents[2]

demo = load(ROOT)
Stage, gaussian, recover = demo.common.Stage, demo.common.gaussian, demo.common.recover
MultiCoil, coil_maps = demo.mri.MultiCoil, demo.mri.coil_maps
sampling_mask, volume = demo.mri.sampling_mask, demo.mri.volume
enlarge = demo.photograph.enlarge

pytestmark = [pytest.mark.cpu, pytest.mark.slow]  # as a demonstration is, unless it is told otherwise

PNG = b"\x89PNG\r\n\x1a\n"


def stage(folder):
    return Stage(Console(file=io.StringIO(), width=118), folder, quick=True)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The report of a quick run of the command, and its folder, which it makes."""
    folder = tmp_path_factory.mktemp("figures") / "new" / "folder"
    before = torch.random.get_rng_state()
    with torch.device("cpu"):
        result = CliRunner().invoke(
            app, obj=Surroundings(clone=ROOT), args=["demo", "--quick", "--output", str(folder)]
        )
    assert result.exit_code == 0, result.output
    assert torch.equal(before, torch.random.get_rng_state()), "the random number generator is left alone"
    return " ".join(result.output.split()), folder


def test_everything_holds(shown):
    report, _ = shown
    assert "everything holds" in report
    assert "FAILED" not in report
    assert report.count("decreased at every step") == 3
    for claim in ("wrong shape, 63 × 63", "wrong values", "the adjoint", "is_complex_linear = True"):
        assert claim in report


def test_figures_are_written(shown):
    _, folder = shown
    assert sorted(path.name for path in folder.iterdir()) == sorted(demo.FIGURES)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


@pytest.mark.parametrize(
    ("factor", "said"), [(2.5, "did not decrease at every step"), (-1.0, "did not decrease at every step")]
)
def test_a_wrong_adjoint_is_seen(tmp_path, factor, said):
    A = al.linear_operator(nn.Conv1d(1, 1, 3, padding=1, bias=False), (1, 1, 32))
    wrong = al.LinearOperator(A, lambda y: factor * A.H(y), A.domain, A.codomain)
    truth = A.domain.randn(torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = A(truth)
        here = stage(tmp_path)
        right = recover(here, "right", A, truth=truth, data=data, start=A.domain.zeros(), steps=5)
        with pytest.warns(al.ConvergenceWarning, match="has not converged"):  # of a norm that there is not
            failed = recover(here, "wrong", wrong, truth=truth, data=data, start=A.domain.zeros(), steps=5)
    assert right.passed
    assert not failed.exact
    assert not failed.passed
    assert said in " ".join(here.console.file.getvalue().split()) or failed.monotone


def test_the_multi_coil_adjoint_is_the_one_in_textbooks():
    generator = torch.Generator().manual_seed(0)
    maps = coil_maps(3, 12, 10).to(torch.complex128)
    mask = sampling_mask(12, generator).to(torch.float64)
    A = al.linear_operator(MultiCoil(maps, mask), al.TensorSpec((2, 12, 10), torch.complex128))
    y = A.codomain.randn(generator)
    expected = (maps.conj() * torch.fft.ifft2(mask * y, norm="ortho")).sum(1)
    gap = A.domain.norm(A.H(y) - expected)
    assert gap <= 16 * A.domain.eps * A.domain.norm(expected)
    assert A.is_complex_linear


def test_the_mask_keeps_the_low_frequencies_and_drops_others():
    mask = sampling_mask(96, torch.Generator().manual_seed(0))[:, 0]
    assert set(mask.tolist()) == {0.0, 1.0}
    assert bool(mask[[0, 1, 2, -1, -2]].all())


@given(st.lists(st.floats(0.3, 3.0), min_size=1, max_size=3))
def test_gaussians_are_symmetric_and_of_sum_one(sigmas):
    kernel = gaussian(*sigmas)
    assert kernel.ndim == len(sigmas)
    eps = torch.finfo(kernel.dtype).eps
    assert abs(float(kernel.sum()) - 1) <= 64 * eps
    assert torch.allclose(kernel, kernel.flip(tuple(range(kernel.ndim))), rtol=64 * eps, atol=0)


def test_enlarging_interpolates_at_every_second_pixel():
    y = torch.arange(12.0).reshape(1, 1, 3, 4)
    x = enlarge(y)
    assert x.shape == (1, 1, 6, 8)
    assert torch.allclose(x[..., ::2, ::2], y, rtol=4 * torch.finfo(y.dtype).eps)
    assert float(x[0, 0, 0, 1]) == pytest.approx(0.5)


def test_the_volume_is_real_data():
    x = volume()
    assert x.shape == (24, 96, 88)
    assert 0.0 <= float(x.min()) < float(x.median()) < 1.0 < float(x.max())
    assert volume(quick=True).shape == (8, 48, 44)


def test_the_command_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        app, obj=Surroundings(clone=ROOT), args=["demo", "--quick", "--output", str(tmp_path / "file")]
    )
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
