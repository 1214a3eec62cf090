"""What the law of all passes, in `lawbook/passes.py`, would say of a wrong one."""

from __future__ import annotations

import pytest
from lawbook.passes import assert_equal, random, run

from adjointlab.space import Space
from adjointlab.transpose.frontend.capture import capture
from adjointlab.transpose.frontend.trace import trace_forward
from adjointlab.transpose.passes.normalise import normalise


def test_a_pass_that_is_wrong_is_seen() -> None:
    domain = Space.of((4,))
    graph = normalise(trace_forward(capture(lambda x: 2 * x, {}, domain, ())))
    tensors = random(graph)
    with pytest.raises(AssertionError, match="a wrong one"):
        assert_equal([3 * t for t in run(graph, tensors)], run(graph, tensors), "a wrong one")
