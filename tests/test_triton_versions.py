"""The GPU kernels compile with the oldest and the newest Triton, and never spill registers; no GPU is needed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import triton_matrix
from triton_matrix import NEWEST, OLDEST, run_with, unsupported

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(unsupported() != "", reason=unsupported()),
]
# The installed one is between them, and tests/test_triton.py looks at what it compiles.
versions = pytest.mark.parametrize("version", [OLDEST, pytest.param(NEWEST, marks=pytest.mark.thorough)])


@versions
def test_every_kernel_compiles_without_spills(version: str, request: pytest.FixtureRequest) -> None:
    cases, least = ["pairs", "--part", "1/3"], 50
    if request.config.getoption("--thorough"):
        cases, least = ["thorough"], 150
    done = run_with(version, [triton_matrix.__file__, "--here", "--cases", *cases])
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["triton"] == version
    assert report["kernels"] > least


# Classes, dtype, sums; of the forward and the backward pass the most instructions per element, the fewest KB in
# flight on an SM and programs of an SM.
DICE = ("intersection", "prediction", "target")
DICE_CE = (*DICE, "cross_entropy")
GOALS = [
    (4, "float32", DICE, (18, 70, 16), (21, 80, 18)),
    (14, "float32", DICE, (16, 100, 14), (17, 80, 11)),
    (14, "float32", DICE_CE, (24, 40, 11), (19, 50, 14)),
    (14, "bfloat16", DICE, (18, 50, 14), (19, 45, 12)),
    # Less in flight, but nothing by way of shared memory: on an H200 three times as fast as 60 KB by it.
    (118, "float32", DICE, (22, 30, 4), (25, 45, 3)),
    (118, "bfloat16", DICE, (22, 15, 4), (26, 22, 3)),
    (118, "bfloat16", DICE_CE, (33, 11, 3), (24, 22, 3)),
]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.thorough
def test_kernels_keep_a_gpu_busy(version: str) -> None:
    """Few instructions for each element, and enough requested from memory while a program waits for its own."""
    code = """
import json, sys
import torch
from voxloss.backends.voxels import PassSpec
from voxloss_app.bench.gpu_resources import KernelCase, resources
for classes, dtype, sums in json.loads(sys.argv[1]):
    case = KernelCase("", classes, getattr(torch, dtype), PassSpec("softmax", sums, None))
    print(json.dumps([(r.spills, r.instructions, r.in_flight, r.programs) for r in resources(case)]))
"""
    done = run_with(version, ["-c", code, json.dumps([goal[:3] for goal in GOALS])])
    lines = done.stdout.splitlines()
    assert len(lines) == len(GOALS)
    for (classes, dtype, sums, *bounds), line in zip(GOALS, lines, strict=True):
        for (most, fewest_kb, fewest), measured in zip(bounds, json.loads(line), strict=True):
            spills, instructions, in_flight, programs = measured
            problem = (version, classes, dtype, sums, measured)
            assert spills == 0, problem
            assert instructions <= most, problem
            assert in_flight >= fewest_kb, problem
            assert programs >= fewest, problem


def test_an_unfinished_installation_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that fails, after it has written something, leaves nothing behind, and its message is shown."""
    pip = tmp_path / "pip"
    pip.write_text(
        '#!/bin/sh\nwhile [ "$1" != --target ]; do shift; done\ntouch "$2/half"\necho no index >&2\nexit 1\n'
    )
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setattr(triton_matrix, "user_cache_path", lambda name: tmp_path / "cache" / name)
    with pytest.raises(RuntimeError, match="no index"):
        triton_matrix.environment("3.4.0")
    assert list((tmp_path / "cache" / "voxloss" / "triton").iterdir()) == []


def test_the_oldest_is_what_the_development_environment_allows() -> None:
    project = Path(triton_matrix.__file__).parent.parent / "pyproject.toml"
    bound = re.findall(r'"triton>=([\d.]+);', project.read_text(encoding="utf-8"))
    assert bound == ["3.4"]
    assert OLDEST.startswith("3.4." if sys.version_info < (3, 14) else "3.5.")
