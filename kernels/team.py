"""Sets of the channel view `[N, C, S]` spread over the programs of a cooperative launch: one read from
DRAM. Notation: kernels/README.md.

A unit is the least that is closed under sharing statistics: BLOCKS blocks of channels of an image, or of
the batch. A team of WIDTH programs does to it what channel.py and fold.py do in launches of their own,
with the same pieces in the same folds, hence the same bits. It meets in between, and finds x in L2 when
it reads it again. A unit of one piece has a team of one program, and no arrivals to count: the launches
of the split form in one, which need not be cooperative.

The meeting, as sm_80, sm_90 and sm_100 have it (read off PTX and SASS): bar.sync orders what all threads
of a program wrote before its first thread's atom.acq_rel.gpu, which is a MEMBAR.GPU before the addition
and an invalidation of L1 (CCTL.IVALL) after it. A program that is not the last polls with
ld.acquire.gpu, each poll an invalidation too, and a second bar.sync orders what its threads read after
that. So the weak loads of partial results and statistics that follow find no older line in L1; none is
ld.global.nc, which would not be held to that order. Counters only grow, so that nobody who is late
misses a meeting. There is no pause between polls: only a program's first thread polls, once in the
time of an access to L2.
"""

import triton
import triton.language as tl

from .channel import channel_gradient_sums, channel_input_gradient, channel_moments, channel_normalize
from .fold import fold_gradient_means, fold_moments
from .names import kernel


@triton.jit
def meet(arrivals_ptr, unit, count):
    """Returns when `count` arrivals at a unit were counted, or at once where a program is alone: what
    programs wrote before is visible to all after."""
    tl.debug_barrier()
    if arrivals_ptr is not None:
        arrived = tl.atomic_add(arrivals_ptr + unit, 1, sem="acq_rel") + 1
        while arrived < count:
            arrived = tl.atomic_add(arrivals_ptr + unit, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def member_program(
    unit,
    member,
    C,
    S,
    STEPS,
    BLOCKS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    """The number that the piece of a unit has as a program of channel.py."""
    blocks = tl.cdiv(C, BLOCK_C)
    parts = tl.cdiv(S, STEPS * BLOCK_S)
    units_an_image = tl.cdiv(blocks, BLOCKS)
    part = member % parts
    block = unit % units_an_image * BLOCKS + member // parts % BLOCKS
    images = unit // units_an_image + member // (parts * BLOCKS)
    if ADJACENT == "c":
        program = (images * parts + part) * blocks + block
    else:
        program = (images * blocks + block) * parts + part
    return program


@triton.jit
def unit_folds(unit, C, CG, BLOCKS, ONE_SET: tl.constexpr, BLOCK_C: tl.constexpr, FOLD_C: tl.constexpr):
    """The first program of fold.py that a unit has, and how many it has."""
    channels = BLOCKS * BLOCK_C
    units_an_image = tl.cdiv(C, channels)
    image, first = unit // units_an_image, unit % units_an_image * channels
    channels = tl.minimum(channels, C - first)
    if ONE_SET:
        width = CG
    else:
        width = FOLD_C
    return image * tl.cdiv(C, width) + first // width, tl.cdiv(channels, width)


@kernel(do_not_specialize=["N", "C", "S", "SETS", "IMAGES", "STEPS", "PIECES"])
def team_forward(
    x_ptr,  # [N, C, S]
    y_ptr,  # [N, C, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_partial_ptr,  # [pieces, C], float64
    squares_partial_ptr,  # [pieces, C]
    mean_ptr,  # [sets]
    rest_ptr,  # [sets]
    rstd_ptr,  # [sets]
    variance_ptr,  # [sets] or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    momentum_ptr,  # [] or None, float64
    arrivals_ptr,  # [units], int32, zeros; None for teams of one program
    x_strides,
    y_strides,
    momentum: "fp64",
    unbiased: "fp64",
    inverse_count: "fp64",
    eps: "fp64",
    N,
    C,
    S,
    CG,
    SETS,
    IMAGES,
    STEPS,
    PIECES,
    UNITS,
    BLOCKS,
    MEMBERS,
    WIDTH,
    ONE_SET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FOLD_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    team, place = tl.program_id(0) // WIDTH, tl.program_id(0) % WIDTH
    for unit in range(team, UNITS, tl.num_programs(0) // WIDTH):
        for member in range(place, MEMBERS, WIDTH):
            channel_moments(
                x_ptr,
                mean_partial_ptr,
                squares_partial_ptr,
                x_strides,
                N,
                C,
                S,
                IMAGES,
                STEPS,
                BLOCK_C,
                BLOCK_S,
                ADJACENT,
                ALIGN,
                STAGES,
                program=member_program(unit, member, C, S, STEPS, BLOCKS, BLOCK_C, BLOCK_S, ADJACENT),
            )
        meet(arrivals_ptr, unit, WIDTH)

        first_fold, folds = unit_folds(unit, C, CG, BLOCKS, ONE_SET, BLOCK_C, FOLD_C)
        for fold in range(place, folds, WIDTH):
            fold_moments(
                mean_partial_ptr,
                squares_partial_ptr,
                mean_ptr,
                rest_ptr,
                rstd_ptr,
                variance_ptr,
                running_mean_ptr,
                running_var_ptr,
                momentum_ptr,
                momentum,
                unbiased,
                inverse_count,
                eps,
                N,
                C,
                S,
                CG,
                SETS,
                IMAGES,
                STEPS * BLOCK_S,
                PIECES,
                ONE_SET,
                BLOCK_P,
                FOLD_C,
                program=first_fold + fold,
            )
        meet(arrivals_ptr, unit, 2 * WIDTH)

        for member in range(place, MEMBERS, WIDTH):
            channel_normalize(
                x_ptr,
                y_ptr,
                weight_ptr,
                bias_ptr,
                mean_ptr,
                rest_ptr,
                rstd_ptr,
                None,
                x_strides,
                y_strides,
                eps,
                N,
                C,
                S,
                CG,
                SETS,
                IMAGES,
                STEPS,
                BLOCK_C,
                BLOCK_S,
                ADJACENT,
                ALIGN,
                STAGES,
                program=member_program(unit, member, C, S, STEPS, BLOCKS, BLOCK_C, BLOCK_S, ADJACENT),
            )


@kernel(do_not_specialize=["N", "C", "S", "SETS", "IMAGES", "STEPS", "PIECES"])
def team_backward(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    dx_ptr,  # [N, C, S]
    weight_ptr,  # [C] or None
    mean_ptr,  # [sets]
    rstd_ptr,  # [sets]
    c1_ptr,  # [sets]
    c2_ptr,  # [sets]
    dweight_partial_ptr,  # [pieces, C]
    dbias_partial_ptr,  # [pieces, C]
    arrivals_ptr,  # [units], int32, zeros; None for teams of one program
    dy_strides,
    x_strides,
    dx_strides,
    inverse_count: "fp64",
    N,
    C,
    S,
    CG,
    SETS,
    IMAGES,
    STEPS,
    PIECES,
    UNITS,
    BLOCKS,
    MEMBERS,
    WIDTH,
    ONE_SET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FOLD_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    team, place = tl.program_id(0) // WIDTH, tl.program_id(0) % WIDTH
    for unit in range(team, UNITS, tl.num_programs(0) // WIDTH):
        for member in range(place, MEMBERS, WIDTH):
            channel_gradient_sums(
                dy_ptr,
                x_ptr,
                None,
                weight_ptr,
                mean_ptr,
                rstd_ptr,
                None,
                dweight_partial_ptr,
                dbias_partial_ptr,
                dy_strides,
                x_strides,
                None,
                0.0,
                N,
                C,
                S,
                CG,
                SETS,
                IMAGES,
                STEPS,
                BLOCK_C,
                BLOCK_S,
                ADJACENT,
                ALIGN,
                STAGES,
                program=member_program(unit, member, C, S, STEPS, BLOCKS, BLOCK_C, BLOCK_S, ADJACENT),
            )
        meet(arrivals_ptr, unit, WIDTH)

        first_fold, folds = unit_folds(unit, C, CG, BLOCKS, ONE_SET, BLOCK_C, FOLD_C)
        for fold in range(place, folds, WIDTH):
            fold_gradient_means(
                dweight_partial_ptr,
                dbias_partial_ptr,
                weight_ptr,
                c1_ptr,
                c2_ptr,
                inverse_count,
                C,
                CG,
                SETS,
                PIECES,
                ONE_SET,
                BLOCK_P,
                FOLD_C,
                program=first_fold + fold,
            )
        meet(arrivals_ptr, unit, 2 * WIDTH)

        for member in range(place, MEMBERS, WIDTH):
            channel_input_gradient(
                dy_ptr,
                x_ptr,
                dx_ptr,
                weight_ptr,
                mean_ptr,
                rstd_ptr,
                c1_ptr,
                c2_ptr,
                dy_strides,
                x_strides,
                dx_strides,
                N,
                C,
                S,
                CG,
                SETS,
                IMAGES,
                STEPS,
                BLOCK_C,
                BLOCK_S,
                ADJACENT,
                ALIGN,
                STAGES,
                program=member_program(unit, member, C, S, STEPS, BLOCKS, BLOCK_C, BLOCK_S, ADJACENT),
            )
