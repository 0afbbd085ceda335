"""Without a GPU the kernels run in Triton's interpreter, and every launch is guarded; or, where
TRITONNORM_EMULATE names a target such as sm_90, as they are compiled for it, in an emulator."""

import os

import pytest
import torch

EMULATED = os.environ.get("TRITONNORM_EMULATE")
HAS_GPU = not EMULATED and torch.cuda.is_available()
if not HAS_GPU:
    if not EMULATED:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    # The tensors are small. Where other processes want the cores, as pytest-xdist's do, threads waiting
    # for each other took five times as long (test_transformers.py, two cores).
    torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is filled with NaN: what a kernel fails to write does not pass for a result."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_plans_kept():
    """Launches are planned anew in every test; one that changes heuristics between two calls forgets
    plans itself (`forget_plans`)."""
    from tritonnorm.launch.common import forget_plans

    forget_plans()


@pytest.fixture(autouse=True)
def _guarded():
    """Accesses outside a launch's tensors and, in the interpreter, races between its programs fail the
    test."""
    if EMULATED:
        from emulation import emulated

        with emulated(EMULATED):
            yield
        return
    if not INTERPRETED:
        yield
        return
    from guard import guarded_launches

    with guarded_launches():
        yield


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test if a kernel is launched."""
    from tritonnorm import launch  # after TRITON_INTERPRET is set

    def refuse(*_, **__):
        raise AssertionError("a kernel was launched")

    for name in launch.__all__:
        if name.endswith(("forward", "backward", "apply")):
            monkeypatch.setattr(launch, name, refuse)


@pytest.fixture
def registry_kept(monkeypatch):
    """What a test registers is gone after it."""
    from tritonnorm import registry  # after TRITON_INTERPRET is set

    monkeypatch.setattr(registry, "CANDIDATES", registry.CANDIDATES[:])
