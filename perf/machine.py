"""The machine and the versions that a figure belongs to, and whether there is anything to measure."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import tritonnorm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"

NO_DEVICE_STATUS = 3
"""Exit status of a command that needs a GPU where there is none: neither success (0), failure (1)
nor a usage error (2)."""

INTERRUPTED_STATUS = 130
"""What a shell reports for a program that Ctrl-C ended."""


def refusal() -> str | None:
    """Why nothing can be timed here, in one line; None where it can."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: the interpreter's times say nothing of a GPU, nothing is timed"
    if not torch.cuda.is_available():
        return "no CUDA device: nothing is timed"
    return None


def device_slug(name: str) -> str:
    """A device's name as a folder's: `NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_folder() -> Path:
    """Where figures of this machine's GPU are kept."""
    return RESULTS / device_slug(torch.cuda.get_device_name())


def installed_version(*distributions: str) -> str:
    """The version of the first of these distributions that is installed, else ''."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _output(*command: str) -> str:
    """The first line that a command prints, '' if it fails or is absent."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.partition("\n")[0].strip()


def tritonnorm_version() -> str:
    """The version with, in a git checkout, the commit, and `-dirty` if tracked files other than results
    differ from it."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "diff", "--name-only", "HEAD", "--", ".", ":!perf/results")
    dirty = "-dirty" if changes else ""
    return f"{tritonnorm.__version__}+{commit}{dirty}" if commit else tritonnorm.__version__


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return ""
    return triton.__version__


def facts() -> dict[str, str]:
    """Device and versions, under the names of the CSV's columns; '' for what is not known."""
    on_device = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_device else "cpu",
        "driver_version": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_version": torch.version.cuda or "",
        "torch_version": torch.__version__,
        "triton_version": _triton_version(),
        "python_version": platform.python_version(),
        "tritonnorm_version": tritonnorm_version(),
    }
