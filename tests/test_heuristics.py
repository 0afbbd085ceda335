"""Launch choices as pure functions."""

import inspect

import pytest

from tritonnorm.heuristics import channels as channel_choices
from tritonnorm.heuristics import common, rows, table, weights

ITEM_SIZES = (2, 4, 8)
ONE_ROW = common.RowTile(1, 1024, common.MIN_WARPS)
LENGTHS = [*range(1, 70), 96, 127, 1000, 1023, 4097, 5120]
LENGTHS += [2**k + more for k in range(13, 19) for more in (0, 1)] + [4_200_000]


def test_rows_choose_nothing():
    """What changes the order of a row's sums must not know how many rows there are."""
    for choose in (rows.row_forward, rows.row_backward):
        assert list(inspect.signature(choose).parameters) == ["n", "itemsize", "strided", "cluster"]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("cluster", [1, 8, 16])
@pytest.mark.parametrize("choose", [rows.row_forward, rows.row_backward])
def test_tiles_are_legal(choose, cluster, itemsize, strided):
    for n in LENGTHS:
        tile = choose(n, itemsize, strided, cluster)
        elements = tile.rows * tile.block_n
        assert tile.block_n % tile.chunks == 0
        for size in (tile.rows, tile.block_n // tile.chunks, tile.num_warps, tile.num_ctas):
            assert size > 0
            assert size & (size - 1) == 0
        assert tile.num_ctas <= cluster
        assert elements <= 2**20  # Triton's largest tensor
        fewest = rows.AHEAD_WARPS if tile.stages > 1 else common.MIN_WARPS
        assert fewest <= tile.num_warps <= common.MAX_WARPS
        assert elements >= tile.num_ctas * tile.num_warps * common.WARP  # no thread without an element
        assert tile.block_n < 2 * n or tile.block_n == 1  # no wider than the row needs


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_passes_from_the_output_hold_what_others_hold(itemsize):
    """In one tile, or several of rows that are short as well as narrow; loaded when it is due."""
    for n in LENGTHS:
        usual = rows.row_backward(n, itemsize, False)
        tile = rows.from_output(usual, n, itemsize)
        assert (tile.block_n >= n) == (usual.block_n >= n)
        assert tile.stages == 1
        assert tile.num_warps >= common.MIN_WARPS
        assert tile.chunks == 1 or n * itemsize <= rows.LEAST_BACKWARD_CHUNKS
        assert tile.rows * tile.block_n >= tile.num_warps * common.WARP


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_short_rows_are_a_warp_s(itemsize):
    """Of whole words, forward: from two words a thread to as many as it may hold, without more padding
    than another tile would have."""
    word = common.WORD_BYTES // itemsize
    lanes = common.WARP * word
    for chunks in range(2, rows.FORWARD_IN_WARP[itemsize] // word + 1):
        tile = rows.row_forward(chunks * lanes, itemsize, False)
        assert (tile.block_n, tile.chunks) == (chunks * lanes, chunks)
        assert tile.rows % tile.num_warps == 0
        shorter = rows.row_forward(chunks * lanes - word, itemsize, False)
        assert shorter.block_n <= tile.block_n


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_resident_up_to_the_limit(itemsize):
    forward, backward = (
        rows.FORWARD_RESIDENT[itemsize],
        rows.BACKWARD_RESIDENT[itemsize],
    )
    for choose, limit in (
        (rows.row_forward, forward),
        (rows.row_backward, backward),
    ):
        assert choose(limit, itemsize, False).block_n == limit
        assert choose(limit + 1, itemsize, False).block_n < limit


@pytest.mark.parametrize("largest", [8, 16])
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_clusters_hold_longer_rows(direction, itemsize, largest):
    """As many times longer as they have blocks, none of which holds more than a program alone can; a
    cluster that is not portable only where no other would do. Strided and longer rows are as without."""
    choose = getattr(rows, f"row_{direction}")
    limit = getattr(rows, f"{direction.upper()}_RESIDENT")[itemsize]
    assert choose(limit, itemsize, False, largest) == choose(limit, itemsize, False)
    for n in (limit + 1, 2 * limit, 2 * limit + 1, 8 * limit, 8 * limit + 1, largest * limit):
        if n > largest * limit:
            continue
        tile = choose(n, itemsize, False, largest)
        assert n <= tile.block_n
        assert limit // 2 <= tile.block_n // tile.num_ctas <= limit
        assert tile.num_ctas <= rows.PORTABLE_CLUSTER or n > rows.PORTABLE_CLUSTER * limit
        assert tile.num_warps <= rows.CLUSTER_WARPS
        assert choose(n, itemsize, True, largest) == choose(n, itemsize, True)
    beyond = largest * limit + 1
    assert choose(beyond, itemsize, False, largest) == choose(beyond, itemsize, False)


def test_who_has_clusters():
    def largest(capability, version, processors=132):
        return rows.largest_cluster(common.DeviceFacts(capability, processors, 50 * 2**20), version)

    assert largest((9, 0), (3, 9)) == largest((10, 0), (3, 8)) == rows.LARGEST_CLUSTER
    assert largest((12, 0), (3, 9)) == rows.PORTABLE_CLUSTER
    assert largest((9, 0), (3, 9), processors=78) == rows.PORTABLE_CLUSTER
    assert largest((8, 0), (3, 9)) == largest((9, 0), (3, 7)) == 1
    assert rows.largest_cluster(None, (3, 9)) == 1


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_length_has_a_tile_that_can_be_launched(direction, itemsize):
    """Chunks that hold the row, none of them empty, and no more registers than there are."""
    name = f"row_{direction}"
    for n in range(1, 17000):
        tile = getattr(rows, name)(n, itemsize, False)
        arguments = dict(n=n, itemsize=itemsize, strided=False, cluster=1)
        assert table.flaw(name, arguments, tile) is None, (n, tile)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_leave_little_padding(itemsize):
    """One tile leaves up to half of itself; 5,120 and 6,144 columns leave nothing, or a sixth."""
    for n in range(256, rows.FORWARD_RESIDENT[itemsize], 128):
        assert rows.row_forward(n, itemsize, False).block_n < n * 4 / 3
    assert rows.row_forward(5120, itemsize, False).block_n == 5120
    assert rows.row_backward(5120, itemsize, False).block_n <= 6144


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("choose", [rows.row_forward, rows.row_backward])
def test_short_narrow_rows_stay_in_a_warp(choose, itemsize):
    """A chunk is no wider than what the lanes of a warp access: no row is spread over several warps."""
    for n in (33, 65, 127, 129, 255):
        tile = choose(n, itemsize, False)
        assert tile.block_n // tile.chunks == common.WARP
        assert tile.block_n - n < common.WARP


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_strided_tiles_take_whole_sectors(itemsize):
    for n in LENGTHS:
        for choose in (rows.row_forward, rows.row_backward):
            assert choose(n, itemsize, True).rows * itemsize >= 32


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("n", [64, 1000, 4096, 8192, 65537, 4_200_000])
@pytest.mark.parametrize("m", [1, 7, 4096, 32768, 2**22, 2**31 + 5])
def test_partials(m, n, itemsize):
    """Few enough to be cheap, and a legal second dimension of a grid."""
    for parameters in (0, 1, 2):
        programs = rows.row_partials(m, n, itemsize, parameters, ONE_ROW)
        assert 1 <= programs <= min(m, common.MAX_PARTIALS, 65535)
        written_and_read = 2 * programs * parameters * n * max(itemsize, 4)
        traffic = 3 * m * n * itemsize
        assert (
            written_and_read <= common.PARTIAL_SHARE * traffic
            or written_and_read <= 2 * common.PARTIAL_BYTES
            or programs == 1
        )


def test_programs_that_walk_are_a_power_of_two():
    """As blocks of an SM are: no wave is nearly empty. Of those of one step or two none is left over."""
    assert rows.row_partials(16384, 4096, 2, 2, ONE_ROW) == 256  # of 307 that may be
    assert rows.row_partials(16384, 4096, 2, 1, ONE_ROW) == 512
    assert rows.row_partials(200, 1024, 2, 2, ONE_ROW) == 200
    assert rows.row_partials(300, 1024, 2, 2, ONE_ROW) == 256
    assert rows.row_partials(600, 1024, 2, 2, ONE_ROW) == 300
    assert rows.row_partials(600, 1024, 2, 0, ONE_ROW) == 600  # nothing to fold
    two_warps = common.RowTile(1, 1024, rows.AHEAD_WARPS)
    assert rows.row_partials(600, 1024, 2, 2, two_warps) == 256
    assert rows.row_partials(1200, 1024, 2, 2, two_warps) == 300
    assert rows.row_partials(2**20, 1024, 2, 0, ONE_ROW) == common.MAX_PARTIALS


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("choose", [channel_choices.channel_forward, channel_choices.channel_backward])
def test_pieces_of_contiguous_groups_are_legal(choose, itemsize):
    """Of few positions as of many; no tile is narrower than its lines, or than LINE_BYTES."""
    for cg in [odd << shift for odd in (1, 3, 9) for shift in range(14)]:
        for s in (1, 2, 3, 5, 6, 7, 12, 49, 100, 784, 3136, 4096, 65536):
            arguments = dict(n=1, c=cg, s=s, itemsize=itemsize, adjacent="s")
            arguments |= dict(over_batch=False, finer=True, cg=cg)
            pieces = choose(*arguments.values())
            assert table.flaw(choose.__name__, arguments, pieces) is None
            assert pieces.block_s >= min(s, channel_choices.LINE_BYTES // itemsize)


def test_rows_are_under_way_ahead_of_the_work():
    """Rows in wide accesses, of 32 bits if they are long. No narrow or strided ones, whose accesses are
    no copies, nor float64."""

    def stages(n, itemsize, **more):
        return rows.row_backward(n, itemsize, more.pop("strided", False), **more).stages

    for n in (8, 512, 768, 1000, 1024, 4096, 8192):
        assert stages(n, 2) == 3
        assert rows.row_forward(n, 2, False).stages == stages(n, 8) == 1
    assert [stages(n, 4) for n in (512, 1024, 4096, 8192)] == [1, 3, 3, 2]
    assert [stages(n, 2, cluster=16) for n in (16384, 65536)] == [3, 3]
    assert [stages(n, 4, cluster=16) for n in (16384, 65536)] == [3, 2]
    assert [stages(n, itemsize) for itemsize in (2, 4) for n in (3072, 5120, 6144)] == [3] * 6
    assert [stages(n, 2) for n in (127, 1001, 5124, 8193)] == [1] * 4
    assert stages(4096, 2, strided=True) == 1


def test_two_warps_load_rows_ahead():
    """Each thread has as many elements as of other tiles. Four take the shortest, those that four share,
    and those of which none is loaded ahead."""
    for n in (8, 64, 128, 256, 512, 768, 1024, 2048):
        tile = rows.row_backward(n, 2, False)
        assert tile.num_warps == (rows.AHEAD_WARPS if 64 < n < 2048 else 4)
        assert tile.rows * tile.block_n == tile.num_warps * common.WARP * rows.BACKWARD_ELEMENTS[2]
    assert rows.row_backward(1280, 4, False).num_warps == rows.AHEAD_WARPS  # in five tiles
    assert rows.row_backward(512, 4, False).num_warps == 4


def test_partials_fill_a_gpu():
    """A training step's tensor gives every SM of a B200 (148) work."""
    assert rows.row_partials(4096, 4096, 2, 2, ONE_ROW) >= 148


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("n", [128, 1024])
def test_small_tensors_take_a_wave(n, itemsize):
    """Up to 8 MB at most 512 programs, whatever else would be allowed; beyond, up to as many as large
    tensors. Without parameters there is nothing to fold."""
    small = 8 * 2**20 // (n * itemsize)
    most = {m: rows.row_partials(m, n, itemsize, 1, ONE_ROW) for m in (64, small, small + 1)}
    assert most[64] == 64
    assert most[small] == common.SMALL_PARTIALS
    assert most[small + 1] == min(small // 2 + 1, common.MAX_PARTIALS)  # of two steps each
    assert rows.row_partials(small, n, itemsize, 0, ONE_ROW) == common.MAX_PARTIALS
    assert rows.row_partials(small, n, itemsize, 1, ONE_ROW, programs=256) == 256


def test_fold_covers_its_rows():
    for partials in (1, 3, 64, 256, 1000, 1024):
        tile = common.fold(partials)
        assert tile.rows * tile.block_n == common.FOLD_ELEMENTS
        assert tile.block_n >= common.FOLD_COLUMNS
        assert tile.rows >= min(partials, common.FOLD_ELEMENTS // common.FOLD_COLUMNS)


CHANNELS = [(1, 1), (6, 3), (64, 64), (64, 1), (320, 32), (1280, 32), (30, 3), (2048, 2048), (2048, 1)]
"""Channels and groups."""

POSITIONS = [1, 2, 7, 49, 64, 196, 784, 1000, 3136, 4096, 12544, 2**18, 1310720]
ADJACENT = ("s", "c", None)


def test_groups_choose_without_images():
    """What changes the order of the sums of an image must not know how many images there are."""
    for choose in (channel_choices.group_forward, channel_choices.group_backward):
        assert list(inspect.signature(choose).parameters) == [
            "cg",
            "groups",
            "s",
            "itemsize",
            "adjacent",
        ]
    for choose in (channel_choices.channel_forward, channel_choices.channel_backward):
        for c, _ in CHANNELS:
            for s in POSITIONS:
                assert len({choose(n, c, s, 2, "s", False) for n in (1, 7, 1000)}) == 1


@pytest.mark.parametrize("adjacent", ADJACENT)
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_group_tiles_are_legal(direction, itemsize, adjacent):
    choose = getattr(channel_choices, f"group_{direction}")
    limit = getattr(channel_choices, f"GROUP_{direction.upper()}_RESIDENT")[itemsize]
    for c, groups in CHANNELS:
        for s in POSITIONS:
            tile = choose(c // groups, groups, s, itemsize, adjacent)
            if tile is None:
                continue
            channels = tile.groups * (c // groups)
            assert tile.block_c * tile.block_s <= limit
            assert channels <= tile.block_c < 2 * channels
            width = tile.block_s // tile.chunks
            assert width <= common.power_of_two(s)
            assert (tile.chunks - 1) * width < s <= tile.block_s
            assert tile.chunks == 1 or adjacent == "s"
            assert (
                c == groups or groups % tile.groups == 0
            )  # a group's place in a tile is one for all images
            for size in (tile.block_c, width, tile.num_warps):
                assert size & (size - 1) == 0
            assert tile.num_warps <= common.MAX_WARPS
            if tile.registers is not None:
                assert tile.registers * tile.num_warps * common.WARP <= common.SM_REGISTERS
            if adjacent != "s" and tile.groups < groups:
                assert channels * itemsize >= channel_choices.LINE_BYTES


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_short_lines_stay_in_a_warp(direction, itemsize):
    """A line of a tile is at most 32 accesses wide, and a sector at least; a thread has few lines."""
    choose = getattr(channel_choices, f"group_{direction}")
    for s in (49, 64, 196, 256):
        tile, access = choose(1, 2048, s, itemsize, "s"), min(s & -s, 16 // itemsize)
        width = tile.block_s // tile.chunks
        assert channel_choices.LINE_TILE_BYTES // itemsize <= width <= common.WARP * access
        a_thread = tile.block_c * width // (tile.num_warps * common.WARP)
        assert a_thread <= max(channel_choices.THREAD_LINES, access)


def test_resident_sets():
    """Those of a diffusion UNet's inner layers, in both memory formats; not those of its outer ones."""
    for adjacent in ("s", "c"):
        assert channel_choices.group_forward(40, 32, 64, 2, adjacent)
        assert channel_choices.group_backward(40, 32, 64, 2, adjacent)
        assert channel_choices.group_forward(20, 32, 256, 2, adjacent)
        assert channel_choices.group_forward(10, 32, 4096, 2, adjacent) is None


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("adjacent", ADJACENT)
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pieces_are_legal(direction, itemsize, adjacent, over_batch):
    choose = getattr(channel_choices, f"channel_{direction}")
    for c, _ in CHANNELS:
        for s in POSITIONS:
            for n in (1, 3, 256):
                pieces = choose(n, c, s, itemsize, adjacent, over_batch)
                for size in (pieces.block_c, pieces.block_s, pieces.num_warps):
                    assert size > 0
                    assert size & (size - 1) == 0
                assert pieces.images == 1 or over_batch
                assert pieces.steps >= 1
                assert (pieces.steps - 1) * pieces.block_s < s
                assert pieces.block_c < 2 * c
                assert pieces.programs(n, c, s) < 2**31
                if not over_batch:
                    assert pieces.count(1, s) <= channel_choices.GROUP_PARTS


@pytest.mark.parametrize("adjacent", ["s", "c"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pieces_fill_a_gpu(direction, adjacent):
    """One image of 320 channels gives every SM of an H100 (132) work; a batch of ResNet's more so."""
    choose = getattr(channel_choices, f"channel_{direction}")
    assert choose(1, 320, 4096, 2, adjacent, False).programs(1, 320, 4096) >= 132
    n, s = (256, 3136) if adjacent == "s" else (1, 256 * 3136)
    assert choose(n, 64, s, 2, adjacent, True).programs(n, 64, s) >= 4 * 132


@pytest.mark.parametrize("adjacent", ["s", "c"])
def test_partial_moments_stay_small(adjacent):
    """12 bytes a channel and piece, written and read: at most a tenth of the traffic, or 8 MB."""
    for n, c, s in [(8, 320, 4096), (32, 256, 3136), (112, 64, 2**18), (2, 32, 2**21)]:
        pieces = channel_choices.channel_forward(n, c, s, 2, adjacent, False)
        partial = 12 * c * pieces.count(n, s)
        assert 2 * partial <= 0.1 * 3 * 2 * n * c * s or partial <= common.PARTIAL_BYTES


@pytest.mark.parametrize(
    ("n", "c", "s", "itemsize", "preferred"),
    [
        (256, 512, 49, 2, True),
        (256, 512, 49, 8, True),
        (32, 1024, 196, 2, True),
        (32, 1024, 196, 4, False),  # images have lines of whole words
        (256, 3, 49, 2, False),  # columns have none either
        (15, 512, 49, 2, False),  # too few images to be worth the folds
        (256, 64, 3025, 2, False),
        (16, 4096, 289, 2, False),  # partial moments that neither L2 holds
        (80, 4096, 289, 2, True),  # nor are they little traffic, with fewer images than this
    ],
)
def test_columns(n, c, s, itemsize, preferred):
    assert channel_choices.prefer_columns(n, c, s, itemsize) is preferred


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("n", "c", "s"), [(16, 512, 49), (256, 64, 49), (512, 1024, 49), (80, 4096, 289)]
)
def test_partial_results_of_columns_stay_small(n, c, s, direction, itemsize):
    """12 bytes a column and piece, written and read: at most 5% of the traffic, or 8 MB."""
    assert channel_choices.prefer_columns(n, c, s, itemsize)
    pieces = getattr(channel_choices, f"channel_{direction}")(1, c * s, n, itemsize, "c", True)
    partial = channel_choices.COLUMN_MOMENTS * c * s * pieces.count(1, n)
    traffic = 3 * n * c * s * itemsize
    assert 2 * partial <= common.PARTIAL_SHARE * traffic or partial <= common.PARTIAL_BYTES


def test_folds_have_the_warps_of_pieces():
    """Teams fold within a kernel of pieces; the sums of both forms then have one order."""
    for pieces in (1, 3, 128, 4096):
        for channels in (1, 10, 64, 2048):
            for one_set in (False, True):
                tile = channel_choices.fold_sets(pieces, channels, one_set)
                assert tile.num_warps == channel_choices.PIECE_WARPS == common.MIN_WARPS
                assert tile.rows * tile.block_n <= channel_choices.FOLD_SET_ELEMENTS


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize("direction", ["FORWARD", "BACKWARD"])
@pytest.mark.parametrize("wide", [True, False])
def test_tiles_of_weights(wide, direction, itemsize):
    """Powers of two, the smallest that hold a channel, no thread without an element; None past the limit
    of a channel. A launch of many gives each tensor the tile that it has alone."""
    resident = getattr(weights, f"WEIGHT_{direction}_RESIDENT")
    for s in LENGTHS:
        tile = weights.weight_tile(s, itemsize, resident, wide)
        if s > resident[itemsize]:
            assert tile is None
            continue
        block_c, block_s = tile
        assert s <= block_s < 2 * s or s == block_s == 1
        assert block_c & (block_c - 1) == block_s & (block_s - 1) == 0
        assert block_c * block_s >= weights.WEIGHT_WARPS * common.WARP
        assert block_c * block_s <= max(weights.WEIGHT_TILE[itemsize], resident[itemsize])
    assert list(inspect.signature(weights.weight_tile).parameters) == [
        "s",
        "itemsize",
        "resident",
        "wide",
    ]


@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_few_positions_of_adjacent_channels_fill_a_tile(itemsize):
    """Two images of many channels, [2, 4096]: as many elements as a tile of long columns."""
    few, many = (channel_choices.channel_forward(1, 4096, s, itemsize, "c", True) for s in (2, 4096))
    assert few.block_c * few.block_s == many.block_c * many.block_s
