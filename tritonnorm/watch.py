"""Who looks on while operators are called."""

import torch
from torch._subclasses import FakeTensor

EAGER = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors that dispatch nothing by themselves."""

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def pre_dispatch_modes() -> bool:
    """Whether a mode sees operators before autograd does, as make_fx(pre_dispatch=True) has one."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform is at work, now or in what is being compiled: vmap, torch.func, forward-mode
    AD, or torch.jit.trace."""
    return is_functional() or torch._C._is_tracing()


@torch.compiler.assume_constant_result
def is_functional() -> bool:
    """Whether vmap, torch.func or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_watched(*tensors) -> bool:
    """Whether somebody has to see the operator: a compiler, a dispatch mode, a fake tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if pre_dispatch_modes():
        return True
    for t in tensors:  # noqa: SIM110
        if type(t) is FakeTensor:
            return True
    return False


def check_constants(name, **arguments):
    """That autograd waits for no gradient of arguments, tensors or None, for which none is computed."""
    for argument, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: {argument} cannot require a gradient: none is computed for it")
