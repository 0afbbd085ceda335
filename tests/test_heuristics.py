"""Launch choices as pure functions."""

import inspect

import pytest

from tritonnorm import heuristics

ITEM_SIZES = (2, 4, 8)
LENGTHS = [*range(1, 70), 96, 127, 1000, 1023, 4097, 5120]
LENGTHS += [2**k + more for k in range(13, 19) for more in (0, 1)] + [4_200_000]


def test_rows_choose_nothing():
    """What changes the order of a row's sums must not know how many rows there are."""
    for choose in (heuristics.row_forward, heuristics.row_backward):
        assert list(inspect.signature(choose).parameters) == ["n", "itemsize", "strided"]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("choose", [heuristics.row_forward, heuristics.row_backward])
def test_tiles_are_legal(choose, itemsize, strided):
    for n in LENGTHS:
        tile = choose(n, itemsize, strided)
        elements = tile.rows * tile.block_n
        for size in (tile.rows, tile.block_n, tile.num_warps):
            assert size > 0
            assert size & (size - 1) == 0
        assert elements <= 2**20  # Triton's largest tensor
        assert heuristics.MIN_WARPS <= tile.num_warps <= heuristics.MAX_WARPS
        assert elements >= tile.num_warps * heuristics.WARP  # no thread without an element
        assert tile.block_n < 2 * n or tile.block_n == 1  # no wider than the row needs


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_resident_up_to_the_limit(itemsize):
    forward, backward = heuristics.FORWARD_RESIDENT[itemsize], heuristics.BACKWARD_RESIDENT[itemsize]
    for choose, limit in ((heuristics.row_forward, forward), (heuristics.row_backward, backward)):
        assert choose(limit, itemsize, False).block_n == limit
        assert choose(limit + 1, itemsize, False).block_n < limit


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_strided_tiles_take_whole_sectors(itemsize):
    for n in LENGTHS:
        for choose in (heuristics.row_forward, heuristics.row_backward):
            assert choose(n, itemsize, True).rows * itemsize >= 32


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("n", [64, 1000, 4096, 8192, 65537, 4_200_000])
@pytest.mark.parametrize("m", [1, 7, 4096, 32768, 2**22, 2**31 + 5])
def test_partials(m, n, itemsize):
    """Few enough to be cheap, and a legal second dimension of a grid."""
    for parameters in (0, 1, 2):
        programs = heuristics.row_partials(m, n, itemsize, parameters, rows=1)
        assert 1 <= programs <= min(m, heuristics.MAX_PARTIALS, 65535)
        written_and_read = 2 * programs * parameters * n * max(itemsize, 4)
        traffic = 3 * m * n * itemsize
        assert (
            written_and_read <= heuristics.PARTIAL_SHARE * traffic
            or written_and_read <= 2 * heuristics.PARTIAL_BYTES
            or programs == 1
        )


def test_partials_fill_a_gpu():
    """A training step's tensor gives every SM of a B200 (148) work."""
    assert heuristics.row_partials(4096, 4096, 2, 2, rows=1) >= 148


def test_fold_covers_its_rows():
    for partials in (1, 3, 64, 256, 1000, 1024):
        tile = heuristics.fold(partials)
        assert tile.rows * tile.block_n == heuristics.FOLD_ELEMENTS
        assert tile.block_n >= heuristics.FOLD_COLUMNS
        assert tile.rows >= min(partials, heuristics.FOLD_ELEMENTS // heuristics.FOLD_COLUMNS)
