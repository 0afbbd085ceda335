"""The arrows of the house: perf, tests -> tritonnorm -> kernels -> triton."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = ("kernels", "perf", "tests")


def imports(path):
    """(module, names) of every import of a file; a relative one starts with dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def files(folder):
    found = sorted((ROOT / folder).glob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_import_triton_alone(path):
    for module, _ in imports(path):
        assert module.split(".")[0] in ("triton", "")  # a relative import stays in the folder


@pytest.mark.parametrize("path", files("tritonnorm"), ids=lambda p: p.name)
def test_the_library_imports_no_script(path):
    for module, names in imports(path):
        assert module.split(".")[0] not in OWN
        if ".kernels" in module or "kernels" in names:
            assert path.name == "launch.py", "only launch.py imports the kernels"
        if module.split(".")[0] == "triton":
            assert path.name == "launch.py"


@pytest.mark.parametrize("path", files("perf"), ids=lambda p: p.name)
def test_scripts_import_no_test_and_no_kernel(path):
    for module, _ in imports(path):
        assert module.split(".")[0] != "tests"
        assert "kernels" not in module.split(".")


def test_device_code_is_in_kernels():
    for folder in ("tritonnorm", "perf"):
        for path in files(folder):
            assert "triton.jit\n" not in path.read_text(), path


def test_kernels_is_no_package_of_its_own():
    """With an __init__.py, the bare name `kernels` would shadow Hugging Face's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "tritonnorm" / "kernels").is_symlink()
