"""Training, for tests that compare a model's losses with another's."""

import torch


def losses(loss, parameters, steps):
    """Of as many steps of Adam; `loss()` is a forward pass."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    found = []
    for _ in range(steps):
        found.append(loss())
        optimizer.zero_grad()
        found[-1].backward()
        optimizer.step()
    return torch.stack([one.detach() for one in found])


def assert_trained_alike(ours, theirs):
    """The losses fall, and are those of PyTorch's model but for sums in another order."""
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
