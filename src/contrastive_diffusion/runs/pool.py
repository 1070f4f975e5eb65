"""Work shared between processes of one thread each, and how far it is."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from contrastive_diffusion.sampling import Round, Watch


def tune_process(threads: int = 1) -> None:
    """One OpenMP thread, and an allocator that keeps freed memory: the page faults of large temporaries halve the speed of small nets.

    For programs, not for libraries: the command and its worker processes call it.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
                mallopt(parameter, 2**30)


@contextmanager
def stepping(label: str, steps: int, batches: int, position: int = 0, hidden: bool = False) -> Iterator[Watch]:
    """A progress bar over ``batches`` of a sampler, each ``steps`` long, as what the sampler calls after each round."""
    every = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=steps * batches, desc=label, position=position, unit="step", leave=False, disable=hidden, mininterval=every) as bar:
        seen = 0

        def watch(found: Round) -> None:
            nonlocal seen
            seen += found.number == 1
            bar.update(max((seen - 1) * steps + min(found.begin, steps) - bar.n, 0))

        yield watch


Task = tuple[Callable[..., Any], tuple[Any, ...]]


def work(tasks: list[Task], jobs: int) -> list[Any]:
    """Results of ``function(*args, position=slot)`` for each task, in order, over ``jobs`` processes of one thread; the first failure ends all."""
    if jobs == 1 or len(tasks) == 1:
        return [function(*args, position=0) for function, args in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _start_worker, (context.RLock(),)) as pool:
        futures = [pool.submit(function, *args, position=index % jobs) for index, (function, args) in enumerate(tasks)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for process in list((pool._processes or {}).values()):  # the others would otherwise run to their end
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _start_worker(lock: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all processes; the parent ends the workers, in one line
    tqdm.set_lock(lock)
    tune_process()
