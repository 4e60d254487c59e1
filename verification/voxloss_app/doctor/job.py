"""One stage in a process of its own: reads which from stdin, and writes what it finds to stdout, a line each.

Or, with a `part` of some `parts`, that share of what a stage will have compiled, which Triton keeps on disk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Gpu, Place
from voxloss_app.doctor.stages import STAGES


def main() -> None:
    """Run the stage on stdin."""
    job = json.load(sys.stdin)
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print, too

    def send(event: Mapping[str, Any]) -> None:
        print(json.dumps(event), file=out, flush=True)

    notes = Notes(send, job["deadline"])
    stage = STAGES[job["stage"] - 1]
    sizes = Sizes(**job["sizes"])
    place = Gpu(job["device"]) if job["device"].startswith("cuda") else Place(job["device"])
    try:
        if job["part"] is None:
            stage.run(place, sizes, notes)
        elif stage.launches is not None:
            for launch in islice(stage.launches(sizes), job["part"], None, job["parts"]):
                if notes.seconds_left() <= 0:
                    break
                send({"compiled": _compiles(launch)})
    except Exception as error:
        notes.error(error)


def _compiles(make: Any) -> bool:
    try:
        launch = make()
        launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.programs,))
    except Exception:  # the stage itself will meet the same error, and write it down
        return False
    return True


if __name__ == "__main__":
    main()
