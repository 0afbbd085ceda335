"""Launches for sets of channels that no program can hold: cut into pieces, in the split form of several
launches, or by the teams of one cooperative launch. Both compute the same bits."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels import channel as channel_kernels
from ..kernels import fold as fold_kernels
from ..kernels import team as team_kernels
from ..views import ChannelView
from .common import FP_FUSION, Kernel, device_facts, parameter_partials, planned

channel_gradient_sums = Kernel(channel_kernels.channel_gradient_sums)
channel_input_gradient = Kernel(channel_kernels.channel_input_gradient)
channel_moments = Kernel(channel_kernels.channel_moments)
channel_normalize = Kernel(channel_kernels.channel_normalize)
fold_gradient_means = Kernel(fold_kernels.fold_gradient_means)
fold_moments = Kernel(fold_kernels.fold_moments)
team_backward = Kernel(team_kernels.team_backward)
team_forward = Kernel(team_kernels.team_forward)


@dataclass(frozen=True, eq=False)
class Sets:
    """What shares statistics in a view: cg channels, of an image or (`over_batch`) of all of them. They
    are made once for each view, and compared by identity, which is quick."""

    view: ChannelView
    align: int | None
    cg: int
    over_batch: bool
    choices: heuristics.table.Choices

    @property
    def an_image(self) -> int:
        """Sets an image; 0 where images share theirs."""
        return 0 if self.over_batch else self.view.c // self.cg

    @property
    def channels(self) -> int:
        """Channels of the tensors."""
        return self.view.c // self.view.columns

    @property
    def images(self) -> int:
        """Images to those who fold partial results: each column of a channel counts as one."""
        return self.view.n * self.view.columns

    @property
    def elements(self) -> int:
        """Elements of a set."""
        return self.cg * self.view.s * (self.images if self.over_batch else 1)

    @cached_property
    def arguments(self):
        """The arguments of every kernel on the view."""
        view = self.view
        return dict(N=view.n, C=view.c, S=view.s, ADJACENT=view.adjacent, ALIGN=self.align, **FP_FUSION)

    def choose(self, heuristic, itemsize: int) -> heuristics.channels.Pieces:
        """The pieces that a heuristic cuts the view into."""
        return _choose(self, heuristic, itemsize)

    def programs(self, pieces: heuristics.channels.Pieces) -> tuple[int]:
        """The grid of a kernel that takes a piece a program."""
        return (pieces.programs(self.view.n, self.view.c, self.view.s),)

    def count(self, pieces: heuristics.channels.Pieces) -> int:
        """Pieces of a channel, over all images."""
        return pieces.count(self.view.n, self.view.s) * self.view.columns


@planned
def _choose(sets: Sets, heuristic, itemsize) -> heuristics.channels.Pieces:
    view = sets.view
    n = view.n if sets.over_batch else 1
    finer = view.adjacent == "s"  # across channels_last a unit is too large for teams, however cut
    sizes = n, view.c, view.s
    return sets.choices(heuristic, *sizes, itemsize, view.adjacent, sets.over_batch, finer, sets.cg)


def in_pieces(pieces: heuristics.channels.Pieces):
    """The arguments of a kernel that takes a piece a program."""
    return dict(
        IMAGES=pieces.images,
        STEPS=pieces.steps,
        BLOCK_C=pieces.block_c,
        BLOCK_S=pieces.block_s,
        STAGES=pieces.stages,
        num_warps=pieces.num_warps,
        maxnreg=pieces.registers,
    )


@planned
def in_sets(sets: Sets, pieces: heuristics.channels.Pieces):
    """Grid and arguments of a kernel that takes a piece of the view a program, and how many pieces of a
    channel there are."""
    return sets.programs(pieces), sets.arguments | in_pieces(pieces), sets.count(pieces)


@planned
def _for_moments(sets: Sets, pieces: heuristics.channels.Pieces, itemsize: int):
    """The arguments of channel_moments that are known before its tensors are."""
    most = heuristics.channels.moments_registers(pieces, itemsize)
    return sets.arguments | in_pieces(pieces) | dict(maxnreg=most, COLUMNS=sets.view.columns)


def normalize(
    sets: Sets, pieces, x, y, weight, bias, eps, mean=None, rest=None, rstd=None, variance=None
):
    """Launches channel_normalize with the statistics that are there."""
    grid, arguments, _ = in_sets(sets, pieces)
    channel_normalize[grid](
        x_ptr=x,
        y_ptr=y,
        weight_ptr=weight,
        bias_ptr=bias,
        mean_ptr=mean,
        rest_ptr=rest,
        rstd_ptr=rstd,
        variance_ptr=variance,
        x_strides=sets.view.strides[0],
        y_strides=sets.view.strides[1],
        eps=eps,
        COLUMNS=sets.view.columns,
        CG=sets.cg,
        SETS=sets.an_image,
        **arguments,
    )


@planned
def _fold(sets: Sets, pieces: heuristics.channels.Pieces):
    """Grid and arguments of a fold of pieces, but for the size of its tile's second dimension."""
    images = 1 if sets.over_batch else sets.view.n
    count = sets.count(pieces) // images
    one_set = sets.cg > 1
    tile = heuristics.channels.fold_sets(count, sets.cg if one_set else pieces.block_c, one_set)
    programs = images * ceil(sets.channels / (sets.cg if one_set else tile.block_n))
    arguments = dict(CG=sets.cg, SETS=sets.an_image, PIECES=count, ONE_SET=one_set, BLOCK_P=tile.rows)
    return (
        (programs,),
        arguments,
        dict(
            BLOCK_C=tile.block_n,
            num_warps=tile.num_warps,
            maxnreg=tile.registers,
            **FP_FUSION,
        ),
    )


@planned
def _prefers_teams(sets: Sets, itemsize: int, backward: bool) -> bool:
    view, teams = sets.view, heuristics.teams
    magnitude = teams.magnitude((view.n, view.c, view.s), sets.cg, sets.over_batch)
    kind = backward, magnitude, itemsize, view.adjacent, sets.over_batch
    return sets.choices(teams.prefer_teams, *kind)


def _team(
    sets: Sets, pieces: heuristics.channels.Pieces, x, backward: bool
) -> heuristics.teams.Team | None:
    """The team that takes the pieces of x, and in the backward pass of dy; None for the split form."""
    view = sets.view
    _, fold, fold_tile = _fold(sets, pieces)
    fold_shape = fold["BLOCK_P"], fold_tile["BLOCK_C"]
    if (
        view.columns > 1
        # The sums of a fold must have one order: that of its own warps, and of a layout that the
        # compiler does not share with tiles of x, as it does among accesses of one shape.
        or pieces.num_warps != heuristics.common.MIN_WARPS
        or fold_shape in ((pieces.block_c, pieces.block_s), (pieces.block_s, pieces.block_c))
    ):
        return None
    return heuristics.teams.team(
        (view.n, view.c, view.s),
        sets.cg,
        sets.over_batch,
        pieces,
        (2 if backward else 1) * x.element_size(),
        device_facts(x.device) if _prefers_teams(sets, x.element_size(), backward) else None,
    )


def _in_team(team: heuristics.teams.Team, device):
    """Grid and arguments of a team's kernel. Programs that wait for others must all be running."""
    arguments = dict(
        arrivals_ptr=None,
        UNITS=team.units,
        BLOCKS=team.blocks,
        MEMBERS=team.members,
        WIDTH=team.width,
        maxnreg=heuristics.teams.TEAM_REGISTERS,
    )
    if team.width > 1:
        arguments["arrivals_ptr"] = torch.zeros(team.units, dtype=torch.int32, device=device)
        arguments["launch_cooperative_grid"] = True
    return (team.teams * team.width,), arguments


def forward(sets: Sets, x, y, weight, bias, eps, statistics, moving):
    """Computes y and fills `statistics`, mean and rstd among them; `moving` are the arguments that
    running statistics add to a kernel."""
    pieces = sets.choose(heuristics.channels.channel_forward, x.element_size())
    pieces_grid, arguments, count = in_sets(sets, pieces)
    partial = count, sets.channels
    partials = dict(
        mean_partial_ptr=torch.empty(partial, dtype=torch.float64, device=x.device),
        squares_partial_ptr=torch.empty(partial, dtype=compute_dtype(x), device=x.device),
    )
    rest = torch.empty_like(statistics["mean"])
    grid, fold, fold_tile = _fold(sets, pieces)
    folded = dict(
        **partials,
        mean_ptr=statistics["mean"],
        rstd_ptr=statistics["rstd"],
        variance_ptr=statistics["variance"],
        rest_ptr=rest,
        inverse_count=1 / sets.elements,
        eps=eps,
        **moving,
        **fold,
    )
    if team := _team(sets, pieces, x, backward=False):
        team_grid, team_arguments = _in_team(team, x.device)
        team_forward[team_grid](
            x_ptr=x,
            y_ptr=y,
            weight_ptr=weight,
            bias_ptr=bias,
            x_strides=sets.view.strides[0],
            y_strides=sets.view.strides[1],
            FOLD_C=fold_tile["BLOCK_C"],
            **folded,
            **(arguments | team_arguments),
        )
        return
    channel_moments[pieces_grid](
        x_ptr=x,
        x_strides=sets.view.strides[0],
        **partials,
        **_for_moments(sets, pieces, x.element_size()),
    )
    fold_moments[grid](
        N=sets.images,
        C=sets.channels,
        S=sets.view.s,
        IMAGES=pieces.images,
        POSITIONS=pieces.steps * pieces.block_s,
        **folded,
        **fold_tile,
    )
    mean, rstd = statistics["mean"], statistics["rstd"]
    normalize(sets, pieces, x, y, weight, bias, eps, mean=mean, rest=rest, rstd=rstd)


def backward(sets: Sets, dy, x, dx, weight, mean, rstd):
    """Computes dx, unless it is None; returns partial dweight and dbias `[pieces, C]`."""
    pieces = sets.choose(heuristics.channels.channel_backward, x.element_size())
    view = sets.view
    pieces_grid, arguments, count = in_sets(sets, pieces)
    partials = parameter_partials(x, count, sets.channels, (mean.dtype, mean.dtype))
    sums = dict(dweight_partial_ptr=partials[0], dbias_partial_ptr=partials[1])
    inputs = dict(
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dy_strides=view.strides[1],
        x_strides=view.strides[0],
        **arguments,
    )
    located = dict(COLUMNS=view.columns, CG=sets.cg, SETS=sets.an_image)
    output = dict(dx_ptr=dx, dx_strides=view.strides[2]) if dx is not None else None
    grid, fold, fold_tile = _fold(sets, pieces)
    means = {name: torch.empty_like(mean) for name in ("c1_ptr", "c2_ptr")} if output else None

    if output and (team := _team(sets, pieces, x, backward=True)):
        team_grid, team_arguments = _in_team(team, x.device)
        team_backward[team_grid](
            inverse_count=1 / sets.elements,
            FOLD_C=fold_tile["BLOCK_C"],
            **sums,
            **means,
            **(inputs | team_arguments),
            **output,
            **fold,
        )
        return partials
    channel_gradient_sums[pieces_grid](
        variance_ptr=None, eps=0.0, dx_ptr=None, dx_strides=None, **sums, **inputs, **located
    )
    if output:
        fold_gradient_means[grid](
            weight_ptr=weight,
            inverse_count=1 / sets.elements,
            C=sets.channels,
            **sums,
            **means,
            **fold,
            **fold_tile,
        )
        channel_input_gradient[pieces_grid](**means, **inputs, **output, **located)
    return partials
