"""Launches for rows that no program holds alone, by the teams of one cooperative launch."""

import torch

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels import row_team as row_team_kernels
from ..views import RowView
from .common import CHOICES, Kernel, device_facts

row_team_backward = Kernel(row_team_kernels.row_team_backward)
row_team_forward = Kernel(row_team_kernels.row_team_forward)


def _team(view: RowView, x, backward: bool, walks: int) -> heuristics.teams.RowTeam | None:
    """The team that takes the rows of x; None where none does. Strided rows have no slabs."""
    teams, itemsize = heuristics.teams, x.element_size()
    if view.strided or not CHOICES[x.get_device()](teams.prefer_row_teams, backward, view.n, itemsize):
        return None
    slab = teams.ROW_BACKWARD_SLAB if backward else teams.ROW_FORWARD_SLAB
    return teams.row_team(view.n, itemsize, slab, walks, device_facts(x.device))


def _in_team(team: heuristics.teams.RowTeam, view: RowView, x):
    """Grid and arguments of a team's kernel. Programs that wait for others must all be running."""
    arguments = dict(
        arrivals_ptr=torch.zeros(view.m, dtype=torch.int32, device=x.device),
        BLOCK_P=heuristics.common.power_of_two(team.width),
        ROWS=1,
        BLOCK_N=team.block_n,
        num_warps=team.num_warps,
        maxnreg=team.registers,
    )
    if team.width > 1:
        arguments["launch_cooperative_grid"] = True
    return (team.teams * team.width,), arguments


def _partial(view: RowView, team: heuristics.teams.RowTeam, x, dtype=None):
    """What each program of a team publishes of each row, `[M, WIDTH]`."""
    return torch.empty(view.m, team.width, dtype=dtype or compute_dtype(x), device=x.device)


def forward(view: RowView, operands) -> bool:
    """Computes y and the statistics of `operands`, the arguments of a looped launch, unless there is no
    team for the rows."""
    x = operands["x_ptr"]
    team = _team(view, x, False, view.m)
    if team is None:
        return False
    grid, arguments = _in_team(team, view, x)
    row_team_forward[grid](
        mean_partial_ptr=_partial(view, team, x, torch.float64),
        squares_partial_ptr=_partial(view, team, x),
        **(operands | arguments),
    )
    return True


def backward(view: RowView, walks: int, operands) -> bool:
    """Computes dx and the partial gradients of so many walks of `operands`, the arguments of a split
    launch, unless there is no team for the rows."""
    x = operands["x_ptr"]
    team = _team(view, x, True, walks)
    if team is None:
        return False
    grid, arguments = _in_team(team, view, x)
    row_team_backward[grid](
        c1_partial_ptr=_partial(view, team, x),
        c2_partial_ptr=_partial(view, team, x),
        WALKS=walks,
        **(operands | arguments),
    )
    return True
