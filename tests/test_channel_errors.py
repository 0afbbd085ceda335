"""Errors of batch_norm, group_norm, instance_norm and layer_norm2d."""

import pytest
import torch
import torch.nn.functional as F
from channels import X, statistics, train

import tritonnorm.functional as tF

META = torch.ones(4, device="meta")


MISTAKES = {
    # what is called, our error and what it names, and PyTorch's error where that is another one
    "batch, no channels": (lambda f, m, v: train(f, m, v, x=X[0, 0]), RuntimeError, "input"),
    "batch, no channels, no statistics": (
        lambda f, m, v: train(f, None, None, x=X[0, 0]),
        RuntimeError,
        "input",
        IndexError,
    ),
    "batch, one value": (lambda f, m, v: train(f, m, v, x=X[:1, :, :1]), ValueError, "per channel"),
    "batch, one value, no spatial": (lambda f, m, v: train(f, m, v, x=X[:1, :, 0]), ValueError, "input"),
    "batch, mean alone": (lambda f, m, v: train(f, m, None), ValueError, "running_mean and running_var"),
    "batch, variance alone": (lambda f, m, v: train(f, None, v), ValueError, "running_mean"),
    "batch, evaluation without mean": (
        lambda f, m, v: f.batch_norm(X, None, v),
        RuntimeError,
        "running_mean",
    ),
    "batch, evaluation without variance": (
        lambda f, m, v: f.batch_norm(X, m, None),
        RuntimeError,
        "running_var",
    ),
    "batch, mean of 3": (lambda f, m, v: train(f, m[:3], v), RuntimeError, "running_mean"),
    "batch, variance of 3": (lambda f, m, v: train(f, m, v[:3]), RuntimeError, "running_var"),
    "batch, mean of two dimensions": (
        lambda f, m, v: train(f, m[None], v),
        RuntimeError,
        "running_mean",
    ),
    "batch, weight of 3": (lambda f, m, v: train(f, m, v, weight=m[:3]), RuntimeError, "weight"),
    "batch, bias of 3": (lambda f, m, v: train(f, m, v, bias=m[:3]), RuntimeError, "bias"),
    "batch, mean elsewhere": (lambda f, m, v: train(f, META, v), RuntimeError, "running_mean"),
    "batch, variance elsewhere": (lambda f, m, v: train(f, m, META), RuntimeError, "running_var"),
    "batch, weight elsewhere": (lambda f, m, v: train(f, m, v, weight=META), RuntimeError, "weight"),
    "batch, mean that needs a gradient": (
        lambda f, m, v: train(f, m.requires_grad_(), v),
        RuntimeError,
        "running_mean",
    ),
    "batch, variance that needs a gradient": (
        lambda f, m, v: f.batch_norm(X, m, v.requires_grad_()),
        RuntimeError,
        "running_var",
    ),
    "batch, no momentum": (lambda f, m, v: train(f, m, v, momentum=None), TypeError, "momentum"),
    "batch, two momenta": (
        lambda f, m, v: train(f, m, v, momentum=torch.ones(2)),
        TypeError,
        "momentum",
    ),
    "batch, momentum that needs a gradient": (
        lambda f, m, v: train(f, m, v, momentum=torch.tensor(0.1, requires_grad=True)),
        TypeError,
        "momentum",
    ),
    "batch, momentum in words": (
        lambda f, m, v: f.batch_norm(X, m, v, momentum="1"),
        TypeError,
        "momentum",
    ),
    "batch, eps in words": (lambda f, m, v: train(f, m, v, eps="small"), TypeError, "eps"),
    "batch, no eps": (lambda f, m, v: train(f, m, v, eps=None), TypeError, "eps"),
    "batch, eps of 0": (lambda f, m, v: train(f, m, v, eps=0), ValueError, "eps"),
    "batch, eps below 0": (lambda f, m, v: f.batch_norm(X, m, v, eps=-1e-5), ValueError, "eps"),
    "batch, training is no bool": (
        lambda f, m, v: f.batch_norm(X, m, v, training=1),
        TypeError,
        "training",
    ),
    "group, no channels": (lambda f, m, v: f.group_norm(X[0, 0], 1), RuntimeError, "input"),
    "group, one value": (lambda f, m, v: f.group_norm(X[:1, :, :1], 4), ValueError, "input"),
    "group, 3 of 4 channels": (lambda f, m, v: f.group_norm(X, 3), RuntimeError, "num_groups"),
    "group, more than channels": (lambda f, m, v: f.group_norm(X, 8), RuntimeError, "num_groups"),
    "group, none": (lambda f, m, v: f.group_norm(X, 0), RuntimeError, "num_groups", ZeroDivisionError),
    "group, fewer than none": (lambda f, m, v: f.group_norm(X, -2), RuntimeError, "num_groups"),
    "group, number that is no int": (lambda f, m, v: f.group_norm(X, 2.0), TypeError, "num_groups"),
    "group, no number": (lambda f, m, v: f.group_norm(X, None), TypeError, "num_groups"),
    "group, weight of 3": (lambda f, m, v: f.group_norm(X, 2, m[:3]), RuntimeError, "weight"),
    "group, weight of two dimensions": (
        lambda f, m, v: f.group_norm(X, 2, m[None]),
        RuntimeError,
        "weight",
    ),
    "group, bias of 3": (lambda f, m, v: f.group_norm(X, 2, None, m[:3]), RuntimeError, "bias"),
    "group, bias elsewhere": (lambda f, m, v: f.group_norm(X, 2, None, META), RuntimeError, "bias"),
    "group, no eps": (lambda f, m, v: f.group_norm(X, 2, eps=None), TypeError, "eps"),
    "instance, no channels": (
        lambda f, m, v: f.instance_norm(X[0, 0], m, v),
        RuntimeError,
        "input",
        ValueError,
    ),
    "instance, one position": (lambda f, m, v: f.instance_norm(X[..., :1], m, v), ValueError, "input"),
    "instance, no spatial dimension": (
        lambda f, m, v: f.instance_norm(X[..., 0], m, v),
        ValueError,
        "input",
    ),
    "instance, mean alone": (lambda f, m, v: f.instance_norm(X, m), ValueError, "running_var"),
    "instance, no statistics": (
        lambda f, m, v: f.instance_norm(X, use_input_stats=False),
        RuntimeError,
        "running_mean",
    ),
    "instance, mean of 3": (lambda f, m, v: f.instance_norm(X, m[:3], v), RuntimeError, "running_mean"),
    "instance, mean of two dimensions": (
        lambda f, m, v: f.instance_norm(X, m[:, None], v),
        RuntimeError,
        "running_mean",
    ),
    "instance, weight of 8": (
        lambda f, m, v: f.instance_norm(X, m, v, torch.ones(8)),
        RuntimeError,
        "weight",
    ),
    "instance, bias elsewhere": (
        lambda f, m, v: f.instance_norm(X, m, v, bias=META),
        RuntimeError,
        "bias",
    ),
    "instance, mean that needs a gradient": (
        lambda f, m, v: f.instance_norm(X, m.requires_grad_(), v),
        RuntimeError,
        "running_mean",
    ),
    "instance, no momentum": (
        lambda f, m, v: f.instance_norm(X, m, v, momentum=None),
        TypeError,
        "momentum",
    ),
    "instance, eps in words": (lambda f, m, v: f.instance_norm(X, m, v, eps="small"), TypeError, "eps"),
    "instance, use_input_stats is no bool": (
        lambda f, m, v: f.instance_norm(X, m, v, use_input_stats=None),
        TypeError,
        "use_input_stats",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_argument(mistake, no_kernel):
    """And are raised where PyTorch raises one, before anything is written."""
    call, error, named, *theirs = MISTAKES[mistake]
    mean, var = statistics()
    with pytest.raises(error, match=named):
        call(tF, mean, var)
    assert all(map(torch.equal, (mean, var), statistics()))
    with pytest.raises(tuple(theirs) or error):
        call(F, *statistics())


def test_parameters_are_vectors(no_kernel):
    """A weight of C elements in another shape is an error, but not for PyTorch's operator on the CPU."""
    for parameter in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=parameter):
            train(tF, None, None, **{parameter: torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (lambda x: tF.layer_norm2d(x[0]), "input"),
        (lambda x: tF.layer_norm2d(x, torch.ones(3)), "weight"),
        (lambda x: tF.layer_norm2d(x, None, torch.ones(5, 4)), "bias"),
        (lambda x: tF.layer_norm2d(x, META), "weight"),
    ],
)
def test_layer_norm2d_errors(mistake, named, no_kernel):
    with pytest.raises(RuntimeError, match=named):
        mistake(torch.ones(2, 4, 3, 5))


def test_layer_norm2d_wants_an_eps(no_kernel):
    with pytest.raises(TypeError, match="eps"):
        tF.layer_norm2d(torch.ones(2, 4, 3, 5), eps=None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_no_normalization_has(dtype, no_kernel):
    """PyTorch's operator is asked, and refuses."""
    x, (mean, var) = torch.ones(2, 4, 3).to(dtype), statistics()
    for call in (
        lambda: train(tF, mean, var, x=x),
        lambda: tF.group_norm(x, 2),
        lambda: tF.instance_norm(x, mean, var),
        lambda: tF.layer_norm2d(x[..., None]),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()
    assert all(map(torch.equal, (mean, var), statistics()))


def test_empty_inputs_are_checked(no_kernel):
    with pytest.raises(RuntimeError, match="weight"):
        train(tF, None, None, x=X[:0], weight=torch.ones(3))
