"""Whether results are the same but for the order of sums."""

import torch

from perf.agreement import disagreement


def test_results_may_differ_by_the_order_of_sums():
    torch.manual_seed(0)
    x = torch.randn(64, 4096) + 1
    forwards, backwards = torch.zeros(4096), torch.zeros(4096)
    for row in x:
        forwards += row
    for row in x.flip(0):
        backwards += row
    off = forwards + 64 * torch.finfo(torch.float32).eps * forwards.abs().max()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        one, other = forwards.to(dtype), backwards.to(dtype)
        assert not torch.equal(one, other)
        assert disagreement(one, other, terms=64) is None
        two_ulps = one * (1 + 2.5 * torch.finfo(dtype).eps)
        assert (disagreement(one, two_ulps, terms=64) is None) == (dtype == torch.float32)
    assert "another order of sums" in disagreement(forwards, off, terms=64)


def test_nan_and_infinities_agree_with_themselves():
    x = torch.tensor([1.0, torch.nan, torch.inf])
    assert disagreement(x, x.clone(), terms=1) is None
    assert "NaN" in disagreement(x, torch.tensor([torch.nan, torch.nan, torch.inf]), terms=1)
    assert "NaN" in disagreement(x, torch.tensor([1.0, 1.0, torch.inf]), terms=1)
    assert "infinite" in disagreement(x, torch.tensor([1.0, torch.nan, -torch.inf]), terms=1)
    assert disagreement(x, torch.tensor([torch.inf, torch.nan, torch.inf]), terms=1)
    assert "shape" in disagreement(x, x[:2], terms=1)
    assert "dtype" in disagreement(x, x.double(), terms=1)
    empty = torch.empty(0)
    assert disagreement(empty, empty, terms=1) is None
