"""Weight normalization, of one tensor and of many."""

import operator

import torch

from ..dispatch import fits, is_plain, normalize_weights, prepared, takes_kernel
from ..dtypes import SUPPORTED
from ..formulas import weight_formula


def weight_norm(v, g, dim=0):
    """Weight normalization (Salimans and Kingma, arXiv:1602.07868).

        w = g * v / ||v||_2

    with one norm for each index of `dim`, over all other dimensions; of a tensor of one dimension that
    is each element's magnitude. None, and as in `torch._weight_norm` also -1, mean one norm of the whole
    tensor: -1 is not the last dimension. Other negative dims count from the end. A norm of zero gives
    NaN, as with PyTorch. Autocast changes nothing.

    Args:
        v: the direction, of any shape; dense tensors, whatever the order of their dimensions in memory
            (contiguous, channels_last), are read where they lie, others are copied.
        g: the magnitudes: of v's shape with 1 for every dimension but `dim`, or for None one element.
            Its dtype may be another one than v's.
        dim: int or None.

    Returns:
        A tensor of v's shape, dtype and, where v is dense, memory format. Norms are computed in
        float32, of float64 in float64.

    Raises:
        RuntimeError: the shape or device of g does not fit.
        IndexError: dim is out of range.
        TypeError: v or g is no tensor, or dim neither an int nor None.
    """
    call = prepared(v, g, None, ("weight_norm", dim, type(dim)))
    if call is not None:
        return call(v, g)
    return weight_norms_by_name("weight_norm", [v], [g], [dim], ["v"], ["g"])[0]


def weight_norms(vs, gs, dim=0):
    """`weight_norm` of many tensors at once, in one launch for all whose channels one program holds.

    With dim=0, the default of PyTorch, these are all channels up to 16,384 elements (in the backward
    pass 8,192; float64: 8,192 and 4,096). Others take two launches for every way in which they are cut.
    Tensors do not share launches if they differ in device, in the dtype of v or g, in whether channels
    and addresses are multiples of 16 bytes, or, in the backward pass, in which of v and g need
    gradients. Each result has the bits that `weight_norm` gives it.

    The results of one device share one node of the graph: backward is called once for all of them (or
    with `retain_graph=True`), and runs when the gradients of all that are used are there.

    Args:
        vs, gs: sequences of tensors, as in `weight_norm`.
        dim: int or None for all of them, or a sequence of such, one for each.

    Returns:
        A list of tensors.

    Raises:
        ValueError: vs, gs and dim differ in length.
        RuntimeError, IndexError, TypeError: as by `weight_norm`; the message names the tensor.
    """
    vs, gs = list(vs), list(gs)
    dims = list(dim) if isinstance(dim, (tuple, list)) else [dim] * len(vs)
    if not len(vs) == len(gs) == len(dims):
        raise ValueError(
            f"weight_norms: vs has {len(vs)} tensors, gs {len(gs)}, and dim {len(dims)} dimensions"
        )
    names = [[f"{which}[{i}]" for i in range(len(vs))] for which in ("vs", "gs")]
    return weight_norms_by_name("weight_norms", vs, gs, dims, *names)


def weight_norms_by_name(function, vs, gs, dims, v_names, g_names):
    """`weight_norms` for a function whose errors name the tensors in its own way."""
    checked = [
        _check_weight(function, *of_one) for of_one in zip(vs, gs, dims, v_names, g_names, strict=True)
    ]
    by_device = {}
    for i, (v, g, dim) in enumerate(zip(vs, gs, checked, strict=True)):
        sizes = (1, v.numel()) if dim is None else (v.shape[dim], v.numel() // max(v.shape[dim], 1))
        if is_plain(v, g) and takes_kernel(v, g) and v.numel() and fits(*sizes):
            by_device.setdefault(v.device, []).append(i)
    ws = [None] * len(vs)
    for numbers in by_device.values():
        of_device = ([t[i] for i in numbers] for t in (vs, gs, checked))
        for i, w in zip(numbers, normalize_weights(*of_device), strict=True):
            ws[i] = w
    return [
        _torch_weight_norm(v, g, dim) if w is None else w
        for w, v, g, dim in zip(ws, vs, gs, checked, strict=True)
    ]


def _check_weight(function, v, g, dim, v_name, g_name):
    """That g has a magnitude for every norm of v. Returns dim, not negative; None for one norm."""
    for name, tensor in ((v_name, v), (g_name, g)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, not {type(tensor).__name__}")
    if dim is not None:
        try:
            dim = operator.index(dim)
        except TypeError:
            raise TypeError(f"{function}: dim must be an int or None, not {dim!r}") from None
    if dim is None or dim == -1:
        dim = None
        if g.numel() != 1:
            raise RuntimeError(f"{function}: {g_name} must have one element, not shape {list(g.shape)}")
    else:
        if not -v.dim() <= dim < v.dim():
            raise IndexError(
                f"{function}: dim={dim} is out of range for {v_name} of shape {list(v.shape)}"
            )
        dim %= v.dim()
        shape = [size if d == dim else 1 for d, size in enumerate(v.shape)]
        if list(g.shape) != shape:
            raise RuntimeError(f"{function}: {g_name} must have shape {shape}, not {list(g.shape)}")
    if v.device != g.device:
        raise RuntimeError(f"{function}: {g_name} is on {g.device}, but {v_name} is on {v.device}")
    return dim


def _torch_weight_norm(v, g, dim):
    """The formula. PyTorch's operator has no forward-mode AD, is a loop under vmap, and its second
    derivative takes the norms for constants; it serves dtypes that are not ours."""
    if {v.dtype, g.dtype} <= set(SUPPORTED):
        return weight_formula(v, g, dim)
    return torch._weight_norm(v, g, -1 if dim is None else dim)
