"""What launches of rows and of channels share."""

from contextlib import nullcontext
from functools import lru_cache
from math import ceil

import torch

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels.fold import fold_parameter_gradients

FP_FUSION = {"enable_fp_fusion": True}
"""Multiply and add contract to FMA: stated, since the default differs between Triton releases."""


def on_device(x: torch.Tensor):
    """The context in which Triton launches on the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache
def device_facts(device: torch.device) -> heuristics.DeviceFacts | None:
    """What launch choices may know of a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return heuristics.DeviceFacts(
        capability=(properties.major, properties.minor),
        processors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
    )


def parameter_partials(x, programs: int, n: int, dtypes):
    """Partial gradients `[programs, n]` for each parameter whose gradient's dtype is not None."""
    return [d and torch.empty(programs, n, dtype=compute_dtype(x), device=x.device) for d in dtypes]


def fold_parameters(partials, dtypes):
    """dweight and dbias `[n]` in their dtypes, from `parameter_partials`; None for those that are."""
    present = [p for p in partials if p is not None]
    if not present:
        return None, None
    programs, n = present[0].shape
    # Of float64 input the fold leaves float64: Triton's interpreter casts it wrongly to 16 bits.
    wide = present[0].dtype == torch.float64
    dweight, dbias = (
        d and torch.empty(n, dtype=torch.float64 if wide else d, device=present[0].device)
        for d in dtypes
    )
    fold = heuristics.fold(programs)
    fold_parameter_gradients[(ceil(n / fold.block_n),)](
        dweight_partial_ptr=partials[0],
        dbias_partial_ptr=partials[1],
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        P=programs,
        N=n,
        BLOCK_P=fold.rows,
        BLOCK_N=fold.block_n,
        num_warps=fold.num_warps,
        **FP_FUSION,
    )
    return [t if t is None else t.to(d) for t, d in zip((dweight, dbias), dtypes, strict=True)]
