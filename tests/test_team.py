"""Teams of a cooperative launch against the split form. In the interpreter programs run one after
another, so a team has one program there, and nobody waits; on a GPU teams are as wide as they come."""

from dataclasses import replace

import pytest
import torch
from channels import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, every_format, in_format, make_small, run
from conftest import HAS_GPU, INTERPRETED

import tritonnorm.functional as tF
from perf.launches import H100, TEAMS, choosing, observe
from tritonnorm import heuristics, launch
from tritonnorm.heuristics.channels import Pieces
from tritonnorm.heuristics.teams import Team

SETS = [
    (GROUP_NORM, (2, 6, 13, 11), 2),
    (GROUP_NORM, (2, 12, 5, 5), 1),
    (GROUP_NORM, (1, 40, 4, 4), 4),
    (INSTANCE_NORM, (2, 3, 19, 21), None),
    (BATCH_NORM, (3, 6, 13, 11), None),
    (BATCH_NORM, (3, 17, 9, 9), None),
]


@pytest.fixture
def teams(monkeypatch):
    """Collects the teams that are chosen from here on; they take every set in pieces."""
    chosen = []

    def narrow(*arguments):
        team = choose(*arguments)
        if team is not None and INTERPRETED:
            team = replace(team, teams=min(team.teams, 3), width=1)
        chosen.append(team)
        return team

    choose = heuristics.teams.team
    facts = launch.common.device_facts(torch.device("cuda")) if HAS_GPU else H100
    monkeypatch.setattr(heuristics.teams, "team", narrow)
    monkeypatch.setattr(launch.pieces, "device_facts", lambda device: facts)
    with choosing(TEAMS):
        yield chosen


@pytest.mark.parametrize(("operator", "shape", "groups"), SETS, ids=str)
@every_format
def test_same_bits_as_the_split_form(
    operator, shape, groups, memory_format, device, monkeypatch, request
):
    make_small(monkeypatch)
    monkeypatch.setattr(heuristics.channels, "PIECE_ELEMENTS", 96)
    x, dy = (in_format(torch.randn(shape, device=device), memory_format) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], device=device)
    split = run(operator, x, weight, bias, dy, groups)
    teams = request.getfixturevalue("teams")
    together = run(operator, x, weight, bias, dy, groups)
    assert [team is not None for team in teams] == [True, True]
    assert torch.equal(split[0], together[0])
    for a, b in zip(split[1], together[1], strict=True):
        assert torch.equal(a, b)


def test_running_statistics(device, monkeypatch, request):
    make_small(monkeypatch)
    x = torch.randn(4, 6, 13, 11, device=device)
    split, together = (torch.stack([torch.zeros(6), torch.ones(6)]).to(device) for _ in range(2))
    tF.batch_norm(x, *split, training=True)
    teams = request.getfixturevalue("teams")
    tF.batch_norm(x, *together, training=True)
    assert teams[0] is not None
    assert torch.equal(split, together)
    assert not torch.equal(split[0], torch.zeros(6, device=device))


@pytest.mark.parametrize("shape", [(3, 17, 9, 9), (4, 64, 8, 8)], ids=str)
def test_alone(shape, device, monkeypatch):
    """Sets of one piece: a launch each way, on any GPU, with the bits of three."""
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], device=device)
    counted = []
    with observe(lambda kernel, grid, arguments: counted.append(kernel.__name__)):
        run(BATCH_NORM, x, weight, bias, dy)
    assert counted == ["team_forward", "team_backward", "fold_parameter_gradients"]
    alone = run(BATCH_NORM, x, weight, bias, dy)
    monkeypatch.setattr(heuristics.teams, "team", lambda *arguments: None)
    split = run(BATCH_NORM, x, weight, bias, dy)
    assert torch.equal(split[0], alone[0])
    for a, b in zip(split[1], alone[1], strict=True):
        assert torch.equal(a, b)


PIECES = Pieces(block_c=64, block_s=32, images=1, steps=4, num_warps=4, registers=None)
LINES = Pieces(block_c=1, block_s=2048, images=1, steps=4, num_warps=4, registers=None)


def test_no_team_without_a_gpu():
    assert heuristics.teams.team((1, 320, 4096), 10, False, PIECES, 2, H100) is not None
    assert heuristics.teams.team((1, 320, 4096), 10, False, PIECES, 2, None) is None


def test_a_set_has_a_magnitude():
    """A group of 10 channels of 4,096 positions, or a channel of 8 images: 2^16 elements hold either."""
    assert heuristics.teams.magnitude((8, 320, 4096), 10, False) == 16
    assert heuristics.teams.magnitude((8, 320, 4096), 1, True) == 15


@pytest.mark.parametrize("pieces", [PIECES, LINES])
@pytest.mark.parametrize(
    ("sizes", "cg", "over_batch"),
    [
        ((1, 320, 4096), 10, False),
        ((8, 320, 4096), 10, False),
        ((1, 128, 1310720), 4, False),
        ((112, 64, 262144), 8, False),
        ((2, 32, 2097152), 1, False),
        ((256, 64, 12544), 1, True),
        ((4, 128, 1048576), 1, True),
        ((256, 512, 49), 1, True),
    ],
)
def test_teams_are_legal(sizes, cg, over_batch, pieces):
    """All programs run at once, what they read twice fits, and every piece has a unit."""
    n, c, s = sizes
    team = heuristics.teams.team(sizes, cg, over_batch, pieces, 2, H100)
    images = 1 if over_batch else n
    if team is None:  # one unit alone is too large, or what fits leaves SMs idle
        blocks = c if pieces is PIECES else cg
        unit_bytes = 2 * min(blocks, c) * s * n // images
        fitting = int(H100.l2_bytes / 3) // unit_bytes
        assert fitting * pieces.count(n, s) // images < heuristics.teams.TEAM_BUSY * H100.processors
        return
    assert team.teams * team.width <= heuristics.teams.TEAM_PROGRAMS * H100.processors
    assert team.width <= team.members
    assert team.units * team.members == pieces.programs(n, c, s)
    assert team.blocks * pieces.block_c % cg == 0 or team.units == images
    unit_bytes = 2 * min(team.blocks * pieces.block_c, c) * s * n // images
    assert team.teams * unit_bytes <= H100.l2_bytes / 3


def test_no_team_that_leaves_the_gpu_idle():
    """Two channels of 8 MB fit: as 32 pieces each they have 64 programs, as 256 they have 512."""
    sizes = (4, 128, 2**20)
    coarse, fine = (replace(LINES, steps=steps) for steps in (64, 8))
    assert heuristics.teams.team(sizes, 1, True, coarse, 2, H100) is None
    team = heuristics.teams.team(sizes, 1, True, fine, 2, H100)
    assert team == Team(units=128, blocks=1, members=256, teams=2, width=256)


def test_one_image_fills_the_gpu():
    team = heuristics.teams.team((1, 320, 4096), 10, False, LINES, 2, H100)
    assert team == Team(units=32, blocks=10, members=10, teams=32, width=10)
