"""Counts the norms of Hugging Face's transformers that `convert` replaces, for the README.

    python tests/count_transformers.py

Counted are the classes of transformers' modeling files that are named *norm*, are defined there, have no
submodules, and are built by a size alone: `cls(64)`. Not a test: importing all models takes minutes.
"""

import inspect
import os
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

import tritonnorm as tn

SIZE = 64


def classes():
    """Of modules that can be imported, by their dotted names; the other modules."""
    found, failed = {}, []
    for package in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        for module in pkgutil.iter_modules(
            [str(Path(package.module_finder.path, package.name.split(".")[-1]))]
        ):
            if not module.name.startswith("modeling_"):
                continue
            name = f"{package.name}.{module.name}"
            try:
                loaded = import_module(name)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
                continue
            for cls in vars(loaded).values():
                is_module = inspect.isclass(cls) and issubclass(cls, torch.nn.Module)
                if is_module and cls.__module__ == name and "norm" in cls.__name__.lower():
                    found[f"{name}.{cls.__name__}"] = cls
    return found, failed


def main():
    found, failed = classes()
    built, replaced, left = 0, 0, []
    for name, cls in sorted(found.items()):
        try:
            module = cls(SIZE)
        except Exception:
            continue  # it wants a configuration, or several sizes
        if any(module.children()):
            continue
        built += 1
        report = tn.convert(module)
        replaced += len(report.replaced)
        if not report.replaced:
            left.append(f"{name}: {report.left[0].reason if report.left else 'not seen'}")
    print(*(f"not imported  {line}" for line in failed), *(f"left  {line}" for line in left), sep="\n")
    print(f"transformers {transformers.__version__}: {replaced} of {built} classes are replaced")


if __name__ == "__main__":
    main()
