"""Whatever plain PyTorch can differentiate is wrapped: each idiom gets the engine that the documentation says."""

import re
from pathlib import Path

import pytest
import torch
from idioms import IDIOMS, Idiom, N
from laws import seeded

import adjointlab as al

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "idioms.md"


@pytest.mark.slow
@pytest.mark.parametrize("idiom", IDIOMS, ids=[idiom.make.__name__ for idiom in IDIOMS])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:The .grad attribute of a Tensor")
def test_idiom(idiom: Idiom) -> None:
    torch.manual_seed(0)
    function = idiom.make()
    A = al.linear_operator(function, (N,))
    assert A.engine in {idiom.engine, "traced"}, A.explain()  # newer versions of PyTorch trace more
    x = A.domain.randn(seeded(0))
    torch.testing.assert_close(A(x), function(x).detach())
    assert al.check_adjoint(A).passed


def test_the_page_lists_every_idiom_with_its_engine() -> None:
    rows = re.findall(r"^\| (.+?) \| (traced|eager) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(idiom.name, idiom.engine) for idiom in IDIOMS]
