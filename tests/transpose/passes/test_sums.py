"""Pieces move, lose and gain dimensions as slices, paddings and selections do; pieces of one rectangle become one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis.strategies import DataObject, data, integers, tuples
from laws import seeded
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import known
from adjointlab.transpose.passes.sums import Sum, merged, moved, uncovered, whole

SHAPE = (4, 5)


def _image() -> tuple[fx.Node, Tensor]:
    x = torch.randn(SHAPE, generator=seeded(0))
    return known(fx.Graph().placeholder("x"), x), x


def _written(pieces: Sum, x: Tensor, *shape: int) -> Tensor:
    result = torch.zeros(shape)
    for piece in pieces:
        read, write = piece.places
        result[write] += piece.factor * x[read]
    return result


def test_the_whole_of_a_node() -> None:
    node, x = _image()
    assert torch.equal(_written(whole(node, -2), x, *SHAPE), -2 * x)


def test_pieces_are_cut_and_padded() -> None:
    node, x = _image()
    assert torch.equal(_written(moved(whole(node), 1, -2, 3), x, 4, 3), x[:, 2:])
    assert torch.equal(_written(moved(whole(node), 0, 1, 6), x, 6, 5), torch.nn.functional.pad(x, [0, 0, 1, 1]))
    assert moved(whole(node), 0, 4, 4) == ()


def test_pieces_lose_and_gain_dimensions() -> None:
    node, x = _image()
    (row,) = moved(whole(node), 0, -2, 1)
    assert torch.equal(_written((row.dropped(0),), x, 5), x[2])
    stacked = row.dropped(0).inserted(1, 3)
    assert stacked.volume == 5
    assert torch.equal(_written((stacked,), x, 5, 4)[:, 3], x[2])


def test_pieces_that_meet() -> None:
    node, _ = _image()
    (first,), (second,) = moved(whole(node), 1, -2, 5), moved(whole(node), 1, 2, 5)
    assert not first.meets(*moved((second,), 1, 1, 5))
    assert first.meets(second)


def test_parts_of_one_rectangle_are_merged() -> None:
    node, x = _image()
    left, right = moved(moved(whole(node), 1, 0, 2), 1, 0, 5), moved(moved(whole(node), 1, -2, 3), 1, 2, 5)
    assert merged((*left, *right)) == whole(node)
    apart = (*left, *moved(whole(node), 1, 2, 5))  # which do not continue each other in the source
    assert set(merged(apart)) == set(apart)
    assert torch.equal(_written(merged(apart), x, *SHAPE), _written(apart, x, *SHAPE))


@given(data())
def test_the_rest_of_a_result_is_zeroed_once(draw: DataObject) -> None:
    shape = draw.draw(tuples(integers(1, 6), integers(1, 6)))
    node = known(fx.Graph().placeholder("x"), torch.zeros(shape))
    pieces: Sum = ()
    for _ in range(draw.draw(integers(0, 3))):
        piece = whole(node)
        for dim, n in enumerate(shape):
            piece = moved(piece, dim, draw.draw(integers(1 - n, n - 1)), n)
        if not any(piece[0].meets(other) for other in pieces):
            pieces += piece
    written = torch.zeros(shape)
    for place in uncovered(pieces, shape):
        written[place] += 1
    left = torch.ones(shape)
    for piece in pieces:
        left[piece.places[1]] = 0
    if 2 * left.sum() > left.numel():  # all of it is zeroed at once
        left.fill_(1)
    assert torch.equal(written, left)
