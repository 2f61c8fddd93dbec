"""Encoded documents: by worker processes in the order of their numbers, which change no batch, or from a stream.

A worker encodes single documents; joining, cutting and shuffling stay in the main process. The position is the number
of the next document, with any number of workers or none.
"""

import atexit
import collections
import copy
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import grain

from jaxllm.config import DataConfig
from jaxllm.data import DataError, first_line
from jaxllm.data.packing import Batch
from jaxllm.data.recipes import Objective
from jaxllm.data.records import Stream, file_of
from jaxllm.data.tokenizer import Tokenizer

TIME_LIMIT = 300.0  # seconds to wait for a worker, which may need a minute to start on a busy machine
_GRACE = 5.0  # seconds to wait for a killed process
# Text of a request: enough to spare messages, little enough to share the work evenly.
_REQUEST_BYTES, _REQUEST_DOCUMENTS = 2**16, 256


class Task(NamedTuple):
    """The task of a worker; sent to it once."""

    order: Sequence[int]  # number of a document -> number of its record
    records: Sequence[dict[str, Any]]  # records of the corpus
    objective: Objective  # its recipe is made again in the worker
    config: DataConfig  # lengths and fields of the recipe
    tokenizer: Tokenizer  # text to ids
    start_id: int  # first decoder token

    def encoder(self) -> Callable[[int], Batch]:
        """The number of a document to its arrays."""
        recipe = self.objective.recipe(self.config, self.tokenizer, self.start_id)
        return lambda number: recipe.encode(self.records[self.order[number]])


class EncodedDocuments(grain.IterDataset[Batch]):
    """Documents in a given order, encoded by processes that start when the first one is read."""

    def __init__(self, task: Task, *, workers: int, size: float, ahead: float) -> None:
        """`size` is the mean bytes of a document, `ahead` the bytes of text that are encoded early."""
        super().__init__()
        self._task, self._workers = task, workers
        self._request = min(max(int(_REQUEST_BYTES / size), 1), _REQUEST_DOCUMENTS)
        self._depth = max(int(ahead / (size * self._request)), 2 * workers)

    def __iter__(self) -> "_Iterator":
        return _Iterator(_Pool(self._task, self._workers), request=self._request, depth=self._depth)


class _Iterator(grain.DatasetIterator[Batch]):
    """Has the state of grain's reader of documents, so that checkpoints do not depend on workers."""

    def __init__(self, pool: "_Pool", *, request: int, depth: int) -> None:
        super().__init__()
        self._pool, self._request, self._depth = pool, request, depth
        self._next = self._asked = 0
        self._ready: collections.deque[Batch] = collections.deque()
        self._jobs: collections.deque[_Job] = collections.deque()

    def __next__(self) -> Batch:
        if not self._ready:
            self._assert_not_closed()
            while len(self._jobs) < self._depth:
                self._jobs.append(self._pool.submit(range(self._asked, self._asked + self._request)))
                self._asked += self._request
            self._ready.extend(self._pool.result(self._jobs.popleft()))
        self._next += 1
        return self._ready.popleft()

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = self._asked = state["next_index"]
        for job in self._jobs:
            job.answer.cancel()
        self._jobs.clear()
        self._ready.clear()

    def close(self) -> None:
        super().close()
        self._pool.close()


class _Job:
    """Numbers of documents, their arrays once they are encoded, and the worker that encodes them."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        self.answer: Future[list[Batch]] = Future()
        self.pid: int | None = None


class _Pool:
    """Worker processes, each with a thread that sends it one job after the other.

    Because of the threads, a worker that is stopped in the middle of an answer cannot block the main thread.
    """

    def __init__(self, task: Task, workers: int) -> None:
        self._task, self._workers = task, workers
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._processes: list[BaseProcess] = []
        self._threads: list[threading.Thread] = []

    def submit(self, numbers: range) -> _Job:
        """Puts a job into the queue; the first one starts the workers."""
        job = _Job(numbers)
        self._jobs.put(job)
        if not self._processes:
            atexit.register(self.close)  # before multiprocessing waits for processes that ignore SIGTERM
            self._start()
        return job

    def result(self, job: _Job) -> list[Batch]:
        """Encoded documents of a job; DataError when they cannot be made, or the worker ended or does not answer."""
        try:
            return job.answer.result(TIME_LIMIT)
        except TimeoutError:
            who = "no worker process has" if job.pid is None else f"worker process {job.pid} has not"
            raise DataError(
                f"{who} answered for {TIME_LIMIT:g} s; it was to read {self._where(job)}. It is stopped, or the "
                f"file cannot be read: check its disk or network, then start the same command again"
            ) from None

    def close(self) -> None:
        """Kills the workers and ends their threads: a thread that outlives the interpreter would abort it."""
        processes, self._processes = self._processes, []
        if not processes:  # grain closes again when the interpreter has taken its modules apart
            return
        atexit.unregister(self.close)
        for process in processes:
            process.kill()
            self._jobs.put(None)
        for each in (*self._threads, *processes):
            each.join(_GRACE)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Ctrl-C and SIGTERM reach workers too, but the main process needs them until its current step is complete.
        # A process inherits blocked signals, which covers its start as well. The tracker's start would unblock them.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            for _ in range(self._workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, self._task), daemon=True)
                process.start()
                theirs.close()  # so that the end of the worker ends the connection
                self._processes.append(process)
                self._threads.append(threading.Thread(target=self._attend, args=(process, ours), daemon=True))
                self._threads[-1].start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _attend(self, process: BaseProcess, connection: Connection) -> None:
        with connection:
            while (job := self._jobs.get()) is not None:
                if not job.answer.set_running_or_notify_cancel():
                    continue
                job.pid = process.pid
                try:
                    connection.send(job.numbers)
                    answer = connection.recv()
                except (EOFError, OSError):
                    process.join(_GRACE)
                    job.answer.set_exception(DataError(_ended(process, self._where(job))))
                    return
                if isinstance(answer, str):
                    job.answer.set_exception(DataError(answer))
                else:
                    job.answer.set_result(answer)

    def _where(self, job: _Job) -> str:
        order, records = self._task.order, self._task.records
        files = dict.fromkeys(file_of(records, order[number]) for number in job.numbers)
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return f"{len(job.numbers)} documents of {next(iter(files))}{more}"


def _ended(process: BaseProcess, where: str) -> str:
    code = process.exitcode
    how = f"exit code {code}"
    fix = 'its message is above; a script that uses data.workers needs `if __name__ == "__main__":`'
    if code is not None and code < 0:
        how = f"signal {-code}" + (", as when memory runs out" if code == -signal.SIGKILL else "")
        fix = "start the same command again, with fewer data.workers if memory was short"
    return f"worker process {process.pid} ended ({how}) while it read {where}; {fix}"


def _work(connection: Connection, task: Task) -> None:
    """Body of a worker: receives numbers, sends encoded documents or an error's message."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encode = task.encoder()
    while True:
        try:
            numbers = connection.recv()
            connection.send(_answer(encode, numbers))
        except (EOFError, OSError):  # the main process has ended
            return


def _answer(encode: Callable[[int], Batch], numbers: range) -> list[Batch] | str:
    try:
        return [encode(number) for number in numbers]
    except DataError as error:
        return str(error)
    except Exception as error:
        return f"documents cannot be encoded: {type(error).__name__}: {first_line(error)}"


def _end_with_parent() -> None:
    """Ends this process when the main one ends, even while this one waits."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _StreamIterator(grain.DatasetIterator[Batch]):
    def __init__(self, stream: Stream, encode: Callable[[dict[str, Any]], Batch]) -> None:
        super().__init__()
        self._stream, self._encode = stream, encode

    def __next__(self) -> Batch:
        try:
            return self._encode(next(self._stream))
        except (StopIteration, DataError):
            raise
        except Exception as error:  # of the caller's code, such as a download
            raise DataError(f"the stream of documents failed: {first_line(error)}") from error

    def get_state(self) -> dict[str, Any]:
        return {"stream": copy.deepcopy(self._stream.get_state())}  # the stream may change it as it reads on

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["stream"])


class EncodedStream(grain.IterDataset[Batch]):
    """The records of a stream, encoded in their order."""

    def __init__(self, stream: Stream, encode: Callable[[dict[str, Any]], Batch]) -> None:
        super().__init__()
        self._stream, self._encode = stream, encode

    def __iter__(self) -> _StreamIterator:
        return _StreamIterator(self._stream, self._encode)
