"""Shared by all tests: tiers, option pairs, seeds, devices, and torch.empty filled with NaN.

There are two tiers. `pytest` runs the quick one, `pytest -m integration` the rest, and --thorough both, with what
is marked as thorough; a test that is named (`pytest tests/test_nnunet.py::test_trains_resumes_and_predicts`) runs
whichever it belongs to.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

# Before torch is imported: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from allpairspy import AllPairs

# Before voxloss is imported: without a GPU the Triton kernels run in Triton's interpreter, slowly, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
from compile_kernels import compile_usual
from voxloss import backends
from voxloss.backends import BACKENDS
from voxloss_verify.subject.ranks import Ranks
from voxloss_verify.threads import torch_threads

hypothesis.settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)


COMBINATIONS = 500  # of a test's parameters with --thorough, if pairs alone are not more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="both tiers, 500 combinations of options, 1000 random examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    interpreter.hasten()
    thorough = config.getoption("--thorough")
    hypothesis.settings.load_profile("thorough" if thorough else "quick")
    if not (thorough or _named(config) or config.option.markexpr):
        config.option.markexpr = "not integration"


def _named(config: pytest.Config) -> bool:
    return any("::" in argument for argument in config.args)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Compile what most tests need, if it is not yet, before workers would each compile it."""
    compile_usual()


def pytest_report_header(config: pytest.Config) -> str:
    """Name the tier: without it `pytest tests/test_examples.py` would seem to find nothing."""
    if config.option.markexpr == "not integration":
        return "tier: quick (-m integration runs the other one, --thorough both)"
    return f"tier: {config.option.markexpr or 'all'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.pairwise(name=[values], …)` gives `options`, a dict: every pair of values at least once.

    With --thorough: every combination, or, if the test had more than 500 then, with what else it is parametrized
    by, random ones beside the pairs, the same in every run.
    """
    for mark in metafunc.definition.iter_markers("pairwise"):
        names, values = list(mark.kwargs), list(mark.kwargs.values())
        rows: list[Sequence[object]] = [*AllPairs(values)]
        if metafunc.config.getoption("--thorough"):
            others = math.prod(len(each.args[1]) for each in metafunc.definition.iter_markers("parametrize"))
            most, chance = COMBINATIONS // others, random.Random(0)
            if math.prod(map(len, values)) <= most:
                rows = [*product(*values)]
            else:
                rows += [[chance.choice(choices) for choices in values] for _ in range(most - len(rows))]
        metafunc.parametrize("options", [dict(zip(names, row, strict=True)) for row in rows])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`@pytest.mark.sampled(n)` leaves one of n combinations of parameters in the quick tier.

    They lie on a diagonal: each value of a parameter stays, if another parameter has n values or more, and the
    rest runs with --thorough. Of a single parameter the rest has other values, and runs in the other tier.
    """
    values: dict[tuple[str, str], list[object]] = {}
    for item in items:
        for mark in item.iter_markers("sampled"):
            assert isinstance(item, pytest.Function)
            place = 0
            for name, value in item.callspec.params.items():
                known = values.setdefault((item.nodeid.partition("[")[0], name), [])
                if not any(value is other for other in known):
                    known.append(value)
                place += next(i for i, other in enumerate(known) if value is other)
            if place % mark.args[0]:
                item.add_marker(pytest.mark.integration)
                if len(item.callspec.params) > 1:
                    item.add_marker(pytest.mark.thorough)
    if not (config.getoption("--thorough") or _named(config)):
        config.hook.pytest_deselected(items=[item for item in items if "thorough" in item.keywords])
        items[:] = [item for item in items if "thorough" not in item.keywords]
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def choice_of_a_backend() -> Iterator[None]:
    """No test leaves behind what it made of the backends."""
    yield
    backends._chosen.cache_clear()


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    """No code leaves it changed: the sums of a later training run would differ."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On small volumes, and on a busy machine, threads only wait for each other."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests, as each takes seconds to import torch and MONAI."""
    with Ranks(2) as ranks:
        ranks.run(os.getpid, [(), ()])  # now, and not with the environment that some test makes for itself
        yield ranks


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Memory that a kernel forgets to write shows as NaN."""
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every pass over a volume from here on, as (backend, function)."""
    made: list[tuple[str, str]] = []
    for name, backend in BACKENDS.items():
        for function in ("region_sums", "region_sums_backward", "voxel_terms"):

            def spy(*args: Any, made_by: tuple[str, str], original: Any, **arguments: Any) -> Any:
                made.append(made_by)
                return original(*args, **arguments)

            original = getattr(backend, function)
            monkeypatch.setattr(backend, function, partial(spy, made_by=(name, function), original=original))
    return made
