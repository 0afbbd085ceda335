"""The arrows of the house: perf, tests -> tritonnorm -> kernels -> triton."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = "tritonnorm.kernels"
LAUNCH = ROOT / "tritonnorm" / "launch"


def imports(path, text=None):
    """What a file imports, by full dotted names: `from .a import b` may be the module a or a.b."""
    package = path.relative_to(ROOT).parent.parts
    package = ("tritonnorm", *package) if package[0] == "kernels" else package
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


def files(folder):
    """Of a folder and the packages in it; the kernels, which tritonnorm links to, are another folder."""
    found = sorted(p for p in (ROOT / folder).rglob("*.py") if p.parent.name != "kernels")
    assert found
    return found


def every_file(folder):
    return pytest.mark.parametrize(
        "path", files(folder), ids=lambda p: str(p.relative_to(ROOT / folder))
    )


def forbidden(path, text=None):
    """The imports of a file of the library that go against an arrow, or past `launch`."""
    for name in imports(path, text):
        is_lower = within(name, KERNELS) or within(name, "triton")
        if name.split(".")[0] in ("kernels", "perf", "tests") or (
            is_lower and LAUNCH not in path.parents
        ):
            yield name


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_triton_alone(path):
    for name in imports(path):
        assert within(name, "triton") or within(name, KERNELS)


@every_file("tritonnorm")
def test_the_library_imports_no_script_and_kernels_by_launch_alone(path):
    assert not [*forbidden(path)]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("rows.py", "import triton.language as tl"),
        ("rows.py", "from tritonnorm.kernels.row import row_backward"),
        ("rows.py", "from .kernels import row"),
        ("rows.py", "def f():\n    from . import kernels"),
        ("heuristics/rows.py", "from ..kernels.row import row_backward"),
        ("heuristics/rows.py", "from .. import kernels"),
        ("launch/rows.py", "import perf.launches"),
        ("launch/rows.py", "from kernels import row"),
    ],
)
def test_an_import_against_an_arrow_is_found(file, text):
    assert [*forbidden(ROOT / "tritonnorm" / file, text)]


def test_launch_imports_kernels():
    found = {name for path in files("tritonnorm/launch") for name in imports(path)}
    assert any(within(name, KERNELS) for name in found)
    assert any(within(name, "triton") for name in found)


@every_file("perf")
def test_scripts_import_no_test_and_no_kernel(path):
    for name in imports(path):
        assert not any(within(name, package) for package in ("tests", "kernels", KERNELS))


def test_device_code_is_in_kernels():
    for folder in ("tritonnorm", "perf"):
        for path in files(folder):
            assert "triton.jit\n" not in path.read_text(), path


def test_kernels_is_no_package_of_its_own():
    """With an __init__.py, the bare name `kernels` would shadow Hugging Face's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "tritonnorm" / "kernels").is_symlink()
