"""The commands of `voxloss`. Each loads what it needs when it runs, so that help and errors are quick.

`app` has what all commands share, `options` the options that several have; a room per group of commands. A new
command is a function with `@command(GROUP)` in one of them.
"""

from __future__ import annotations

# In the order of the help.
from voxloss_app.cli import training, studies, label_maps, laws, machine  # isort: skip
from voxloss_app.cli.app import app

__all__ = ["app", "label_maps", "laws", "machine", "studies", "training"]
