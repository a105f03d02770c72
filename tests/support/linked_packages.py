"""A folder with some of the installed packages, as if nothing else were installed."""

import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def link_packages(folder: Path, requirements: Iterable[Requirement]) -> Path:
    """Link what ``requirements`` name, and all that they need, into ``folder``.

    ``PYTHONPATH=folder python -S`` then sees these packages and the standard library alone.
    """
    folder.mkdir()
    wanted, linked = [*requirements], set()
    while wanted:
        requirement = wanted.pop()
        package = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(package.version), (requirement, package.version)
        for extra in {"", *requirement.extras}:
            key = (package.name, extra)
            if key in linked:
                continue
            linked.add(key)
            needed = [Requirement(text) for text in package.requires or []]
            wanted += [r for r in needed if not r.marker or r.marker.evaluate({"extra": extra})]
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] != ".."}:
            if not os.path.lexists(folder / top):
                (folder / top).symlink_to(package.locate_file(top))
    return folder
