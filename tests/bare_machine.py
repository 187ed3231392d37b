"""Runs something as on a machine that has torch, Triton, numpy and pytest, with what they require, and nothing else.

python tests/bare_machine.py import MODULE...
python tests/bare_machine.py pytest ARGUMENTS...
python tests/bare_machine.py SCRIPT ARGUMENTS...
"""

import importlib
import importlib.metadata
import os
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("torch", "triton", "numpy", "pytest")


def required(names: Iterable[str]) -> set[str]:
    """Names of these distributions and of all that they require, as `normalized` has them."""
    found: set[str] = set()
    waiting = [normalized(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = [text for text in requirements if "extra ==" not in text]
        waiting += [normalized(re.match(r"[\w.-]+", text)[0]) for text in plain]
    return found


def normalized(name: str) -> str:
    """One spelling per distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


class BareFinder:
    """Finds modules on sys.path, except those of packages that the machine lacks."""

    def __init__(self) -> None:
        self.installed = required(INSTALLED)
        self.lacking = {
            module
            for module, owners in importlib.metadata.packages_distributions().items()
            if not self.installed & {normalized(owner) for owner in owners}
        }
        self.lacking -= {path.name.removesuffix(".py") for path in ROOT.iterdir()}  # this repository's own

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As importlib's finders."""
        return None if name.partition(".")[0] in self.lacking else PathFinder.find_spec(name, path, target)

    def find_distributions(self, *context: DistributionFinder.Context) -> Iterator[Distribution]:
        """As importlib's finders: torch, for one, asks for versions before it imports."""
        for distribution in PathFinder.find_distributions(*context):
            if normalized(distribution.metadata["Name"]) in self.installed:
                yield distribution

    invalidate_caches = staticmethod(PathFinder.invalidate_caches)


def main() -> None:
    """Run what the command line says."""
    what, *arguments = sys.argv[1:]
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, BareFinder()]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those plugins would not be there
    sys.path[0] = str(ROOT)
    if what == "import":
        for name in arguments:
            importlib.import_module(name)
        print("imported", *arguments)
    elif what == "pytest":
        sys.exit(importlib.import_module("pytest").main(arguments))
    else:
        sys.argv = [what, *arguments]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main()
