"""Real processes joined by torch.distributed over gloo, to call functions on all of them at once.

    parent ── (function, arguments), pickled, on stdin ──▶ rank ── an answer, pickled, on stdout ──▶ parent

The ranks are interpreters of their own, not `multiprocessing`'s: those would run the user's __main__ again. They
end when their stdin does, so none outlives its parent, however that ends.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, TypeVar

T = TypeVar("T")

# All in seconds. How long a rank may take to import torch, on a machine however busy.
_IMPORT = 300.0
# How long to search for a rank that died after another one raised: its peers may notice first.
_DEATH = 0.5
# How long a rank may take to exit on request, before it is killed.
_LEAVE = 2.0

# sys.path comes from the parent before anything is imported, for a folder's own `signal.py` not to come first.
_INTERPRETER = "import sys; sys.path[:] = sys.argv[1:]; from voxloss_verify.subject.ranks import _serve; _serve()"


class RanksError(RuntimeError):
    """A rank died, raised or did not answer in time; names the rank, and the exception's type and text.

    The cause of an exception raised in a rank is its traceback there.
    """


class Ranks:
    """A context manager of `size` processes, one per rank, of one gloo process group.

    They start with the first `run`, or the next one after a failure, and stay until `close`. `timeout`, in
    seconds, holds for a run, not counting the import of torch, and for every collective in it. What ranks print
    goes to stderr. Raises ValueError if `size` is not positive, or `timeout` not positive and finite.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        if size < 1 or not 0 < timeout < math.inf:
            raise ValueError(
                f"expected a positive size and a finite timeout, received size={size}, timeout={timeout}"
            )
        self.size = size
        self.timeout = timeout
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call function(*arguments[rank]) on every rank at once, within the process group; results by rank.

        Raises ValueError, before anything is sent, if there are not `size` tuples of arguments or if something
        cannot be pickled or lives in __main__, which the ranks do not have; RanksError if a rank fails. Then all
        are killed, since others may wait for it for ever; only a result that cannot be pickled leaves them be.
        """
        if len(arguments) != self.size:
            raise ValueError(f"expected arguments for {self.size} ranks, received them for {len(arguments)}")
        tasks = [pickled(function, of_rank) for of_rank in arguments]
        try:
            if not self._processes:
                self._start()
            answers = self._ask(tasks, self.timeout)
        except BaseException:
            self._kill()
            raise
        results: list[T] = []
        for rank, answer in enumerate(answers):
            if answer.result is None:
                raise RanksError(f"rank {rank}: the result cannot be pickled: {answer.error}")
            try:
                results.append(pickle.loads(answer.result))
            except Exception as error:
                raise RanksError(f"rank {rank}: the result cannot be unpickled: {_line(error)}") from error
        return results

    def close(self) -> None:
        """End all processes and wait for them; without any, do nothing. A later `run` starts new ones."""
        try:
            for process in self._processes:
                with suppress(OSError):  # it has died
                    _stdin(process).close()
            deadline = time.monotonic() + _LEAVE
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))
        finally:
            self._kill()

    def _start(self) -> None:
        self._folder = TemporaryDirectory(prefix="voxloss-ranks-", ignore_cleanup_errors=True)
        path = [entry for entry in sys.path if isinstance(entry, str)]
        for _ in range(self.size):
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _INTERPRETER, *path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
                )
            )
        self._ask([pickled(_import, ())] * self.size, _IMPORT)
        # Not with the imports, as the ranks wait for each other here, and some are slower to import.
        store = str(Path(self._folder.name, "store"))
        joins = [pickled(_join, (store, rank, self.size, self.timeout)) for rank in range(self.size)]
        self._ask(joins, self.timeout)

    def _ask(self, tasks: Sequence[bytes], timeout: float) -> list[_Answer]:
        """Let every rank do its task; answers by rank. Raises RanksError for the first that fails."""
        heard: queue.SimpleQueue[tuple[int, _Answer | None]] = queue.SimpleQueue()
        # With threads, a rank that does not even read cannot block the others, and Ctrl-C is handled.
        for rank, (process, task) in enumerate(zip(self._processes, tasks, strict=True)):
            threading.Thread(target=_converse, args=(rank, process, task, heard), daemon=True).start()
        answers: dict[int, _Answer] = {}
        failed: tuple[int, _Answer] | None = None
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            try:
                rank, answer = heard.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if answer is None:
                raise RanksError(f"rank {rank} {_death(self._processes[rank])}")
            answers[rank] = answer
            if answer.raised and failed is None:
                failed = rank, answer
                deadline = min(deadline, time.monotonic() + _DEATH)
        if failed is not None:
            rank, answer = failed
            raise RanksError(f"rank {rank}: {answer.error}") from _RemoteTraceback(answer.traceback)
        missing = [str(rank) for rank in range(self.size) if rank not in answers]
        if missing:
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            raise RanksError(f"expected an answer of {ranks} within {timeout:g} s, received none")
        return [answers[rank] for rank in range(self.size)]

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                if sys.platform == "win32":
                    process.kill()
                else:
                    # With its children, which might hold its pipes open.
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not sent yet
                    if pipe is not None:
                        pipe.close()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _RemoteTraceback(Exception):
    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class _Answer(NamedTuple):
    """A rank's answer; `raised` if the function did so, and no result if it cannot be pickled."""

    result: bytes | None
    error: str = ""
    raised: bool = False
    traceback: str = ""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        # Only what is pickled by its name has a qualified one: functions, classes, but not instances.
        if getattr(value, "__module__", None) == "__main__" and hasattr(value, "__qualname__"):
            raise pickle.PicklingError(f"{value.__qualname__} lives in __main__; move it to a module")
        return NotImplemented


def pickled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """A call as it is sent to a rank; raises ValueError for what cannot be sent."""
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump((function, arguments))
    except Exception as error:  # whatever a __reduce__ raises
        raise ValueError(
            "expected a function of an importable module and arguments that can be pickled, received "
            f"{_line(error)}"
        ) from error
    return stream.getvalue()


def _line(error: BaseException) -> str:
    """The exception's type and text, even if its __str__ raises."""
    return "".join(traceback.format_exception_only(error)).strip()


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _converse(
    rank: int, process: subprocess.Popen[bytes], task: bytes, heard: queue.SimpleQueue[tuple[int, _Answer | None]]
) -> None:
    """Send the task and wait for the answer, None if the rank has died."""
    assert process.stdout is not None
    answer: _Answer | None = None
    # A pipe that ended or, after Ctrl-C, was closed; an answer too large for the memory.
    with suppress(Exception):
        pickle.dump(task, _stdin(process))
        _stdin(process).flush()
        answer = pickle.load(process.stdout)
    heard.put((rank, answer))


def _death(process: subprocess.Popen[bytes]) -> str:
    with suppress(subprocess.TimeoutExpired):  # its pipes end a little before the process
        process.wait(_DEATH)
    code = process.returncode
    if code is None:
        return "gave no answer"
    if code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"died with exit code {code}"


# What follows happens in the ranks.


def _serve() -> None:
    """Call what comes and answer, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What functions read and print must not get among tasks and answers. Nothing reads what C++ libraries print
    # on stdout, as torch 2.8 does.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.stdout = sys.stderr
    received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(tasks, received), daemon=True).start()
    while (task := received.get()) is not None:
        answer = _call(task)
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except OSError:
            os._exit(1)
    _leave()


def _receive(tasks: IO[bytes], received: queue.SimpleQueue[bytes | None]) -> None:
    """A thread of its own, since the parent may die while a function runs, or waits for ever."""
    with suppress(OSError, EOFError, pickle.UnpicklingError):
        while True:
            received.put(pickle.load(tasks))
    received.put(None)
    time.sleep(_LEAVE)
    os._exit(1)


def _call(task: bytes) -> _Answer:
    try:
        function, arguments = pickle.loads(task)
        result = function(*arguments)
    except BaseException as error:  # also what sys.exit raises
        return _Answer(None, _line(error), True, traceback.format_exc())
    try:
        return _Answer(pickle.dumps(result))
    except BaseException as error:
        return _Answer(None, _line(error))


def _import() -> None:
    import torch.distributed

    import voxloss  # noqa: F401

    torch.set_num_threads(1)


def _join(store: str, rank: int, size: int, timeout: float) -> None:
    from datetime import timedelta

    from torch import distributed

    # By default gloo looks the host's name up, which can fail or be slow; "lo" is Linux's, "lo0" macOS's.
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    os.environ.setdefault("LOCAL_RANK", str(rank))  # else ignite, which MONAI imports, guesses it from host names
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, size),  # type: ignore[attr-defined]  # public, but not in __all__
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def _leave() -> None:
    """As torch requires, though gloo exits without it; but torch is not imported for this alone."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
