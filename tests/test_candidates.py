"""Answers near those of the heuristics, which `python -m perf tune` tries."""

from dataclasses import replace

import pytest

from perf import candidates
from tritonnorm.heuristics import channels, common, rows, table

WALKS = {"n": 4096, "itemsize": 2, "strided": False}
ROWS = WALKS | {"cluster": 1}


def chosen_by(name, arguments):
    """The heuristic's own answer."""
    return table.TUNABLE[name].heuristic(*arguments.values())


def test_every_choice_has_neighbours():
    assert candidates.NEIGHBOURS.keys() == table.TUNABLE.keys()


@pytest.mark.parametrize("itemsize", [2, 8])
def test_neighbours_are_legal_and_others(itemsize):
    shared = {"itemsize": itemsize, "adjacent": "c"}
    batch = {"n": 8, "c": 320, "s": 4096, **shared, "over_batch": True, "finer": False, "cg": 1}
    for name, arguments in (
        *((name, ROWS | {"itemsize": itemsize}) for name in ("row_forward", "row_backward")),
        ("row_forward", ROWS | {"itemsize": itemsize, "n": 32768, "strided": True}),
        ("row_programs", WALKS),
        ("group_forward", {"cg": 40, "groups": 32, "s": 64, **shared}),
        ("group_backward", {"cg": 1, "groups": 7, "s": 12000, **shared}),
        ("channel_forward", batch),
        ("channel_backward", batch | {"n": 1, "over_batch": False}),
        ("prefer_teams", {"backward": True, "magnitude": 20, **shared, "over_batch": True}),
        ("prefer_row_teams", {"backward": True, "n": 20000, "itemsize": itemsize}),
    ):
        chosen = chosen_by(name, arguments)
        found = candidates.neighbours(name, arguments, chosen)
        assert found, name
        assert chosen not in found
        assert len(set(found)) == len(found)
        assert all(table.flaw(name, arguments, answer) is None for answer in found)


def test_neighbours_of_rows():
    """Half and twice the warps and rows, in a row that is resident; with a chunk of its own, and
    resident after all, in one that is not. No thread without an element."""
    tile = common.RowTile
    assert set(candidates.neighbours("row_forward", ROWS, tile(1, 4096, 8))) == {
        *(tile(1, 4096, 4), tile(1, 4096, 16), tile(2, 4096, 8), tile(2, 4096, 16))
    }
    looped = candidates.neighbours("row_forward", ROWS | {"n": 32768}, tile(1, 4096, 8))
    assert {tile(1, 2048, 4), tile(1, 8192, 16), tile(1, 32768, 32)} < set(looped)
    assert set(candidates.neighbours("row_forward", ROWS | {"n": 32}, tile(2, 32, 2))) == {
        *(tile(1, 32, 1), tile(4, 32, 2), tile(2, 32, 1), tile(4, 32, 4))
    }


def test_neighbours_of_rows_in_clusters():
    """Half and twice the blocks, within the largest cluster, with as many warps each or in all; of a row
    that a program holds, a cluster of two. None of strided rows, nor where there are none."""
    tile, long = common.RowTile, ROWS | {"n": 65536, "cluster": 8}

    def clusters(arguments, chosen):
        found = candidates.neighbours("row_forward", arguments, chosen)
        return {(answer.num_ctas, answer.num_warps) for answer in found} - {
            (chosen.num_ctas, answer.num_warps) for answer in found
        }

    chosen = tile(1, 65536, 16, num_ctas=4)
    assert clusters(long, chosen) == {(2, 16), (2, 32), (8, 16), (8, 8)}
    assert clusters(long | {"cluster": 4}, chosen) == {(2, 16), (2, 32)}
    resident = long | {"n": 16384}
    assert clusters(resident, tile(1, 16384, 16)) == {(2, 16), (2, 8)}
    assert clusters(resident | {"cluster": 1}, tile(1, 16384, 16)) == set()
    assert clusters(resident | {"strided": True}, tile(1, 16384, 16)) == set()
    assert clusters(resident | {"n": 1024}, tile(4, 1024, 4)) == set()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("n", [2560, 5120, 6144])
def test_neighbours_of_rows_in_chunks(n, direction):
    """In every other number of tiles that the pass may have, if none of them is empty; loaded ahead as
    the chosen ones are, and without that with few registers."""
    arguments, name = ROWS | {"n": n}, f"row_{direction}"
    counts = getattr(rows, f"{direction.upper()}_CHUNKS")[2]
    chosen = chosen_by(name, arguments)
    found = candidates.neighbours(name, arguments, chosen)
    widths = {count: common.power_of_two(-(-n // count)) for count in counts}
    others = {count for count in counts if (count - 1) * widths[count] < n} - {chosen.chunks}
    assert others
    for count in others:
        tiles = [answer for answer in found if answer.chunks == count]
        assert {answer.block_n for answer in tiles} == {count * widths[count]}
        few = {(1, candidates.CHUNK_REGISTERS)} if count > 1 else set()
        assert {(answer.stages, answer.registers) for answer in tiles} == {(chosen.stages, None)} | few
    due = replace(chosen, stages=1, registers=candidates.CHUNK_REGISTERS)
    assert (due in found) == (chosen.chunks > 1)


def test_neighbours_of_sets():
    arguments = {"cg": 10, "groups": 32, "s": 256, "itemsize": 2, "adjacent": "s"}
    found = candidates.neighbours("group_forward", arguments, channels.GroupTile(1, 16, 256, 8, None))
    assert None in found
    assert channels.GroupTile(2, 32, 256, 16, None) in found
    assert {answer.groups for answer in found if answer} == {1, 2}
    pieces = channels.Pieces(64, 16, 1, 8, 4, None, stages=4)
    arguments = {"n": 1, "c": 320, "s": 256, "itemsize": 2, "adjacent": "c", "over_batch": False}
    arguments |= {"finer": False, "cg": 10}
    found = candidates.neighbours("channel_forward", arguments, pieces)
    assert channels.Pieces(32, 32, 1, 4, 4, None, stages=4) in found
    assert {answer.stages for answer in found} == {2, 4, 8}
    assert all(answer.images == 1 for answer in found)
    over_batch = arguments | {"n": 4, "over_batch": True}
    assert 2 in {p.images for p in candidates.neighbours("channel_forward", over_batch, pieces)}
