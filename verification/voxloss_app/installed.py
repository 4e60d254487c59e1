"""Which version of a package is installed, without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(distribution: str) -> str | None:
    """Its version, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def named(distribution: str, title: str | None = None) -> str:
    """Words like "torch 2.13.0" or "no torch"."""
    found = version_of(distribution)
    return f"no {title or distribution}" if found is None else f"{title or distribution} {found}"
