"""Ranks: what they answer, that no failure hangs, and that nothing is left of them, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from voxloss_verify.subject.ranks import Ranks, RanksError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the tests need POSIX signals")


@pytest.fixture
def ranks(two_ranks: Ranks) -> Ranks:
    """A test that breaks them leaves it to the next one to start new ones."""
    return two_ranks


def pids(ranks: Ranks) -> list[int]:
    return ranks.run(os.getpid, [()] * ranks.size)


def alive(pid: int) -> bool:
    """A process that only waits for being reaped, perhaps by an init that does not care, is dead."""
    status = Path(f"/proc/{pid}/status")
    if Path("/proc/self/status").exists():
        return status.exists() and "State:\tZ" not in status.read_text()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path) -> str:
    """What a process writes there, once it has."""
    started = time.monotonic()
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() - started < 60
        time.sleep(0.02)
    return path.read_text()


def wait_for_the_end_of(pids: list[int]) -> None:
    """Of processes that nobody here can reap, and which may take a moment to die."""
    started = time.monotonic()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() - started < 20
        time.sleep(0.02)


@contextmanager
def children_hear_ctrl_c() -> Iterator[None]:
    """A shell's background job, as the tests may be, ignores SIGINT, and so would its children."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, inherited)


# What the ranks do.


def total(number: float, seconds: float = 0.0) -> tuple[float, float, int]:
    time.sleep(seconds)
    tensor = torch.tensor([number])
    distributed.all_reduce(tensor)
    time.sleep(seconds)
    return number, tensor.item(), distributed.get_rank()


def doubled(tensor: Tensor) -> Tensor:
    return tensor * 2


class Unsendable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def fail(rank: int, how: str) -> None:
    """Rank 1 fails, and the others wait for it."""
    if rank == 1:
        if how == "raise":
            raise Unsendable("what has happened")
        if how == "os._exit":
            distributed.destroy_process_group()
            time.sleep(0.1)  # gloo notifies the others first
            os._exit(3)
    distributed.barrier()


def fork_and_sleep(rank: int, folder: Path) -> None:
    if rank == 1:
        child = os.fork()
        if child:
            (folder / "pid").write_text(f"{child}\n")
        time.sleep(1000)


class Inedible:
    """Is pickled as int("x"), which cannot be unpickled."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("x",)


def make(what: str) -> object:
    if what == "good":
        return what
    return threading.Lock() if what == "lock" else Inedible()


def interrupt() -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return os.getpid()


def use_standard_streams() -> str:
    print("printed")
    os.write(1, b"written")
    return sys.stdin.read()


# What they answer.


def test_ranks_work_together_and_answer_in_their_order(ranks: Ranks) -> None:
    """Rank 0 is the last to answer."""
    assert ranks.run(total, [(1, 0.3), (2,)]) == [(1, 3, 0), (2, 3, 1)]


def test_ranks_stay_for_later_runs(ranks: Ranks) -> None:
    first = pids(ranks)
    assert len({*first, os.getpid()}) == 3
    assert pids(ranks) == first


def test_ranks_have_one_thread_and_use_the_loopback(ranks: Ranks) -> None:
    assert ranks.run(torch.get_num_threads, [()] * 2) == [1, 1]
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    assert ranks.run(os.getenv, [("GLOO_SOCKET_IFNAME",)] * 2) == [interface] * 2


def test_tensors_larger_than_a_pipe_holds(ranks: Ranks) -> None:
    tensors = [torch.full((500, 1000), float(rank)) for rank in range(2)]
    for tensor, twice in zip(tensors, ranks.run(doubled, [(tensor,) for tensor in tensors]), strict=True):
        assert torch.equal(twice, 2 * tensor)


def test_standard_streams_do_not_mix_with_the_answers(ranks: Ranks) -> None:
    assert ranks.run(use_standard_streams, [()] * 2) == ["", ""]


# What fails.


@pytest.mark.integration
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1: test_ranks.Unsendable: what has happened"),
        ("os._exit", "rank 1 died with exit code 3"),
    ],
)
def test_a_rank_that_fails_is_named_at_once_and_a_later_run_starts_new_ones(
    how: str, message: str, ranks: Ranks
) -> None:
    """Although rank 0 waits for it, or gets an error of gloo."""
    before = pids(ranks)
    started = time.monotonic()
    with pytest.raises(RanksError) as error:
        ranks.run(fail, [(0, how), (1, how)])
    assert time.monotonic() - started < ranks.timeout / 4
    assert str(error.value) == message
    if how == "raise":
        assert "in fail\n" in str(error.value.__cause__)
    assert not any(alive(pid) for pid in before)
    assert [answer[1] for answer in ranks.run(total, [(1,), (2,)])] == [3, 3]


@pytest.mark.integration
def test_a_rank_that_died_between_two_runs(ranks: Ranks) -> None:
    os.kill(pids(ranks)[1], signal.SIGKILL)
    with pytest.raises(RanksError, match=r"^rank 1 was killed by SIGKILL$"):
        pids(ranks)


@pytest.mark.integration
def test_a_rank_that_does_not_answer_in_time(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what it forked keep anybody waiting, though it holds the pipes."""
    ranks.run(fork_and_sleep, [(0, tmp_path)] * 2)  # they import this file
    before = pids(ranks)
    monkeypatch.setattr(ranks, "timeout", 1.0)
    started = time.monotonic()
    with pytest.raises(RanksError, match=r"^expected an answer of rank 1 within 1 s, received none$"):
        ranks.run(fork_and_sleep, [(0, tmp_path), (1, tmp_path)])
    assert 1 <= time.monotonic() - started < 15
    assert not any(alive(pid) for pid in before)
    wait_for_the_end_of([int(wait_for(tmp_path / "pid"))])


def test_what_cannot_be_sent_is_an_error_before_anything_starts() -> None:
    with Ranks(2) as ranks:
        started = time.monotonic()
        for function, argument in ((lambda _: None, 0), (partial(str, threading.Lock()), 0), (total, lambda: 0)):
            with pytest.raises(ValueError, match="function of an importable module and arguments that can be"):
                ranks.run(function, [(0,), (argument,)])
        with pytest.raises(ValueError, match="arguments for 2 ranks, received them for 1"):
            ranks.run(total, [(1,)])
        assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lock", "rank 1: the result cannot be pickled: TypeError: cannot pickle '_thread.lock' object"),
        ("inedible", "rank 1: the result cannot be unpickled: ValueError: invalid literal for int"),
    ],
)
def test_what_cannot_be_answered_is_an_error_and_the_ranks_stay(what: str, message: str, ranks: Ranks) -> None:
    before = pids(ranks)
    with pytest.raises(RanksError) as error:
        ranks.run(make, [("good",), (what,)])
    assert str(error.value).startswith(message)
    assert pids(ranks) == before


@pytest.mark.parametrize(("size", "timeout"), [(0, 1.0), (2, 0.0), (2, float("nan")), (2, float("inf"))])
def test_sizes_and_timeouts_without_sense(size: int, timeout: float) -> None:
    with pytest.raises(ValueError, match="expected a positive size and a finite timeout"):
        Ranks(size, timeout)


# How they end.


@pytest.mark.integration
def test_close_leaves_no_process() -> None:
    """Not even one that does not react."""
    ranks = Ranks(2)
    ranks.close()
    before = pids(ranks)
    assert all(alive(pid) for pid in before)
    os.kill(before[1], signal.SIGSTOP)
    started = time.monotonic()
    ranks.close()
    assert not any(alive(pid) for pid in before)
    ranks.close()
    assert time.monotonic() - started < 15


@pytest.mark.integration
def test_ranks_are_deaf_to_ctrl_c() -> None:
    """One is enough, and works alone."""
    with Ranks(1) as ranks:
        with children_hear_ctrl_c():
            before = pids(ranks)
        assert ranks.run(interrupt, [()]) == before
        assert ranks.run(total, [(5,)]) == [(5, 5, 0)]


# The parents import no torch, which would take them a second.
HELPERS = """
import os, time

def greet(name):
    from torch import distributed
    print(f"hello {name}\\n", end="")  # at once, or the ranks' lines mix
    distributed.barrier()
    return os.getpid()

def wait(rank, path):
    from torch import distributed
    with open(f"{path}/{rank}", "w") as file:
        print(os.getpid(), file=file)
    if rank:
        time.sleep(1000)
    distributed.barrier()
"""
MAIN = """
print("main")
import os
import helpers
from voxloss_verify.subject.ranks import Ranks

def mine():
    return lambda: 0

class Mine:
    pass

with Ranks(2) as ranks:
    pids = ranks.run(helpers.greet, [("a",), ("a",)])
    for function, argument in ((mine, "x"), (helpers.greet, Mine()), (helpers.greet, [Mine])):
        try:
            ranks.run(function, [(argument,), (argument,)])
        except ValueError as error:
            print(str(error).partition("PicklingError: ")[2])
    assert ranks.run(os.getpid, [(), ()]) == pids
"""


@pytest.mark.integration
@pytest.mark.parametrize("source", [pytest.param("stdin", marks=pytest.mark.thorough), "script"])
def test_the_main_module_is_neither_run_again_nor_searched(source: str, tmp_path: Path) -> None:
    """It needs no guard and no file. The ranks import what it can, not other files, and print nothing else."""
    for folder in ("home", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "home" / "helpers.py").write_text(HELPERS)
    (tmp_path / "home" / "script.py").write_text(MAIN)
    (tmp_path / "elsewhere" / "pickle.py").write_text("raise ImportError('the wrong pickle')")
    program, folder = ("-", "home") if source == "stdin" else ("../home/script.py", "elsewhere")
    process = subprocess.run(
        [sys.executable, program], cwd=tmp_path / folder, input=MAIN, capture_output=True, text=True, timeout=60
    )
    assert process.stderr == "hello a\n" * 2
    lines = [f"{name} lives in __main__; move it to a module" for name in ("mine", "Mine", "Mine")]
    assert process.stdout.splitlines() == ["main", *lines]
    assert process.returncode == 0


def parent(folder: Path) -> subprocess.Popen[str]:
    """A process with two ranks, of which rank 0 waits for rank 1 for ever."""
    (folder / "helpers.py").write_text(HELPERS)
    code = f"""
import sys
import helpers
from voxloss_verify.subject.ranks import Ranks
try:
    with Ranks(2) as ranks:
        print("starting", file=open("start", "w"))
        ranks.run(helpers.wait, [(rank, {str(folder)!r}) for rank in range(2)])
except KeyboardInterrupt:
    sys.exit(130)
"""
    with children_hear_ctrl_c():
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.mark.integration
@pytest.mark.parametrize("seconds", [pytest.param(0.05, marks=pytest.mark.thorough), 0.5, None])
def test_ctrl_c_leaves_no_rank_and_no_traceback(seconds: float | None, tmp_path: Path) -> None:
    """While interpreters start, while they import torch, and while a function runs."""
    process = parent(tmp_path)
    wait_for(tmp_path / "start")
    running: list[int] = []
    if seconds is None:
        running = [int(wait_for(tmp_path / str(rank))) for rank in range(2)]
        assert all(alive(pid) for pid in running)
    else:
        time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert not any(alive(pid) for pid in running)
    # stdout and stderr end only when every process that inherited them has gone.
    assert process.communicate(timeout=60) == ("", "")
    assert not list(tmp_path.glob("voxloss-ranks-*"))


@pytest.mark.integration
def test_ranks_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = parent(tmp_path)
    running = [int(wait_for(tmp_path / str(rank))) for rank in range(2)]
    process.kill()
    assert process.communicate(timeout=60) == ("", "")
    wait_for_the_end_of(running)
