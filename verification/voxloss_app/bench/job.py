"""One case in its own process: reads the job from stdin, reports progress on stdout, writes a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from voxloss_app.bench.cases import BenchCase
from voxloss_app.bench.measure import Options, measure
from voxloss_app.bench.results import to_json
from voxloss_data.files import save_json


def _report(share: float, what: str) -> None:
    print(json.dumps({"share": share, "what": what}), flush=True)


def main() -> None:
    """Measure the case on stdin and write its result to the file named beside it."""
    job = json.load(sys.stdin)
    result = measure(BenchCase(**job["case"]), Options(**job["options"]), _report)
    save_json(Path(job["result"]), to_json(result))


if __name__ == "__main__":
    main()
