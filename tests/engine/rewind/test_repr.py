"""A sequence printed: a table of its blocks, the streams that they make, and their parameters."""

import torch
from torch import nn

import revflow
from engine.nets import Scale, additive, affine_two, image, mixed, network

A_CONDITIONER = 4 * 6 * 9 + 6 + 2 * 6 + 6 * 4 * 9 + 4
"""Parameters: two convolutions of 3 x 3 and a GroupNorm between."""


def lines(net):
    """Without the frame and the indentation."""
    return [" ".join(line.split()) for line in repr(net).splitlines()]


def blocks():
    return [additive(), additive(), revflow.PixelUnshuffle(2), additive(16)]


def test_a_table_of_blocks_and_parameters():
    """Runs of equal blocks stand in one line."""
    net = revflow.ReversibleSequence(blocks(), guard="raise", memory_budget="6GiB")
    wide = 16 * 6 * 9 + 6 + 2 * 6 + 6 * 16 * 9 + 16
    assert lines(net) == [
        "ReversibleSequence(",
        "split_dim=1, guard=\"raise\", memory_budget='6GiB'",
        "block parameters",
        f"0-1 AdditiveCoupling(Conditioner) 2 x {A_CONDITIONER}",
        "2 PixelUnshuffle(2) 0",
        f"3 AdditiveCoupling(Conditioner) {wide:,}",
        f"4 blocks {2 * A_CONDITIONER + wide:,}",
        ")",
    ]


def test_shapes_are_those_of_the_last_training_call_or_plan():
    net = revflow.ReversibleSequence(blocks())
    with torch.no_grad():
        net(image(dtype=torch.float32))
    assert "streams" not in repr(net)
    net(image(dtype=torch.float32))
    assert lines(net)[2:6] == [
        "block streams parameters",
        f"0-1 AdditiveCoupling(Conditioner) 2 x (2, 4, 6, 4) 2 x {A_CONDITIONER}",
        "2 PixelUnshuffle(2) 2 x (2, 16, 3, 2) 0",
        "3 AdditiveCoupling(Conditioner) 2 x (2, 16, 3, 2) 1,762",
    ]
    net.plan(image(3, 8, 2, 2, dtype=torch.float32))
    net.inverse(net(image(3, 8, 2, 2, dtype=torch.float32)))
    assert [line.split(")")[1].strip(" x(2") for line in lines(net)[3:6]] == ["3, 4, 2,", "3, 16, 1, 1", "3, 16, 1, 1"]


def test_kept_blocks_have_their_shapes_too():
    net = revflow.ReversibleSequence(blocks(), memory_budget="1GiB")
    for _ in range(2):
        net(image(dtype=torch.float32))
    assert "2 x (2, 16, 3, 2)" in lines(net)[5]


def test_streams_that_differ():
    net = revflow.ReversibleSequence([Scale()])
    net((torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 2)))
    assert lines(net)[3] == "0 Scale() 2 x (1, 2), (1, 3), (1, 2) 1"


def test_columns_stand_one_below_the_other():
    net = network(mixed)
    net(image())
    for heading in ("streams", "AdditiveCoupling"):
        assert heading in repr(net)
    _, _, *rows, _ = repr(net).splitlines()
    assert len({len(row) for row in rows}) == 1
    streams = rows[0].index("streams")
    assert all(row[streams : streams + 3] == "2 x" for row in rows[1:-1])


def test_blocks_that_differ_inside_do_not_share_a_line():
    """Though they look alike in the table, and have as many parameters."""
    silu, tanh = (
        revflow.AdditiveCoupling(nn.Sequential(nn.Conv2d(4, 4, 1), activation)) for activation in (nn.SiLU(), nn.Tanh())
    )
    rows = lines(revflow.ReversibleSequence([silu, tanh]))[3:5]
    assert rows == ["0 AdditiveCoupling(Sequential) 20", "1 AdditiveCoupling(Sequential) 20"]


def test_shared_parameters_count_once_in_the_sum():
    block = additive()
    assert lines(revflow.ReversibleSequence([block, block]))[3:5] == [
        f"0-1 AdditiveCoupling(Conditioner) 2 x {A_CONDITIONER}",
        f"2 blocks {A_CONDITIONER}",
    ]


def test_names_and_sequences_inside():
    inner = revflow.ReversibleSequence([affine_two(), affine_two()])
    net = revflow.ReversibleSequence({"stem": Scale(), "body": inner})
    net(image(dtype=torch.float32))
    its = sum(p.numel() for p in inner[0].parameters())
    assert lines(net)[3:6] == [
        "stem Scale() 2 x (2, 4, 6, 4) 1",
        f"body.0-body.1 AffineCoupling(Conditioner, Conditioner) 2 x (2, 4, 6, 4) 2 x {its:,}",
        f"3 blocks {2 * its + 1:,}",
    ]


def test_an_empty_one_a_lazy_one_and_one_inside_of_a_network():
    assert repr(revflow.ReversibleSequence([])) == 'ReversibleSequence(split_dim=1, guard="warn")'
    lazy = revflow.ReversibleSequence([revflow.AdditiveCoupling(nn.LazyConv2d(4, 1))])
    assert lines(lazy)[3:5] == ["0 AdditiveCoupling(LazyConv2d) 0", "1 block 0"]
    outer = repr(nn.Sequential(nn.Flatten(), revflow.ReversibleSequence([Scale()])))
    assert '  (1): ReversibleSequence(\n    split_dim=1, guard="warn"\n    block' in outer
