"""The guard itself: a guard that cannot fail guards nothing."""

import pytest
import torch
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("on a GPU nothing is interpreted", allow_module_level=True)

import triton
import triton.language as tl
from guard import guarded


@triton.jit
def copy_kernel(x_ptr, y_ptr, start, step, BLOCK: tl.constexpr):
    offsets = start + tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


def run(x, y, programs, start=0, step=8):
    guarded(copy_kernel, (programs,), dict(x_ptr=x, y_ptr=y, start=start, step=step, BLOCK=8))


def test_a_good_launch_passes():
    x, y = torch.randn(16), torch.zeros(16)
    run(x, y, 2)
    assert torch.equal(x, y)


@pytest.mark.parametrize(("programs", "start"), [(3, 0), (1, -1), (2, 4)])
def test_outside(programs, start):
    memory = torch.randn(3, 64)  # what lies around is a tensor too, but not of the launch
    with pytest.raises(Exception, match="outside the tensors"):
        run(memory[0, 16:32], memory[1, 16:32], programs, start)


def test_two_programs_write_one_element():
    with pytest.raises(AssertionError, match=r"one program writes y\[4\]"):
        run(torch.randn(16), torch.zeros(16), 2, step=4)


def test_one_program_reads_what_another_writes():
    x = torch.randn(16)
    with pytest.raises(AssertionError, match=r"one program writes x\[4\]"):
        run(x, x, 2, step=4)


def test_the_gap_of_a_view():
    memory = torch.randn(4, 8)
    with pytest.raises(Exception, match="gap of x"):
        run(memory[:, :4], torch.zeros(32), 1)
