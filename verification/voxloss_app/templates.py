"""How the suite's pages are rendered."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(folder: str, html: bool = True) -> Environment:
    """The templates of a folder of this package; a name that is not given is an error, and HTML is escaped."""
    return Environment(
        loader=PackageLoader("voxloss_app", folder),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
