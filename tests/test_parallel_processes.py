"""Parallel sampling in several processes under gloo: the same bits as in one, and nobody hangs."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from contrastive_diffusion.cli import main

HEAD = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.sampling import Sequential
dist.init_process_group("gloo")
rank, group, grid = dist.get_rank(), dist.group.WORLD, schedules.grid(schedules.ddpm(), 60)
"""


def torchrun(code: str, processes: int = 2, *args: str) -> subprocess.CompletedProcess[str]:
    """``code`` in each process, as torchrun starts them; what torch calls deprecated is an error there too."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-W", "error::FutureWarning", *(args if args else ["-c", HEAD + textwrap.dedent(code)])]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for r in range(processes)
    ]  # fmt: skip
    ends = [process.communicate(timeout=120) for process in running]
    worst = max(process.returncode for process in running)
    return subprocess.CompletedProcess(command, worst, "".join(out for out, _ in ends), "".join(err for _, err in ends))


def test_two_processes_share_the_rows_evenly_and_give_the_bits_of_one():
    done = torchrun(
        """
        rows = []
        def counted(z, logsnr):
            rows.append(len(z))
            return dino()(z, logsnr)
        exact = Sequential(solvers.ddpm())(dino(), grid, (5, 2), seed=1).x
        for solver in (solvers.ddpm(), solvers.heun(), solvers.dpmpp()):
            for tolerance in (0.0, 0.05):
                rows.clear()
                shared = Parallel(solver, window=13, tolerance=tolerance, group=group)(counted, grid, (5, 2), seed=1)
                alone = Parallel(solver, window=13, tolerance=tolerance)(dino(), grid, (5, 2), seed=1)
                assert shared.x.equal(alone.x) and shared.rounds == alone.rounds and shared.evals == alone.evals
                every = [None, None]
                dist.all_gather_object(every, list(rows))
                if solver.evals == 1:
                    assert all(abs(a - b) <= 1 for a, b in zip(*every)), every
                    assert sum(map(sum, every)) == alone.evals
        assert Parallel(solvers.ddpm(), tolerance=0.0, group=group)(dino(), grid, (5, 2), seed=1).x.equal(exact)
        print("fine")
        """
    )
    assert done.stdout.count("fine") == 2, done.stderr


@pytest.mark.slow
def test_four_processes_give_the_bits_of_one():
    done = torchrun(
        """
        shared = Parallel(solvers.ddpm(), window=13, group=group)(dino(), grid, (3, 2), seed=1)
        assert shared.x.equal(Parallel(solvers.ddpm(), window=13)(dino(), grid, (3, 2), seed=1).x)
        print("fine")
        """,
        4,
    )
    assert done.stdout.count("fine") == 4, done.stderr


def test_a_denoiser_that_raises_in_one_process_stops_all():
    done = torchrun(
        """
        calls = []
        def broken(z, logsnr):
            calls.append(1)
            if rank == 1 and len(calls) == 3:
                raise ValueError("out of memory, say")
            return dino()(z, logsnr)
        try:
            Parallel(solvers.ddpm(), window=8, group=group)(broken, grid, (5, 2))
        except Exception as error:
            print(f"process {rank}: {type(error).__name__}: {error} after {len(calls)}")
        """
    )
    assert "process 1: ValueError: out of memory, say after 3" in done.stdout, done.stderr
    assert "process 0: RunError: given a denoiser that failed in process 1" in done.stdout


def test_processes_with_different_tasks_are_told_at_the_start():
    done = torchrun(
        """
        for seed, steps in ((rank, 60), (0, 60 + rank)):
            try:
                Parallel(solvers.ddpm(), window=8, group=group)(dino(), schedules.grid(schedules.ddpm(), steps), (5, 2), seed=seed)
            except ValueError as error:
                print(error)
        """
    )
    assert done.stdout.count("different seed (0; 1)") == 2, done.stdout + done.stderr
    assert done.stdout.count("different grid") == 2


def test_the_command_under_torchrun_writes_once_and_the_same(tmp_path):
    options = ["sample", "dino", "--parallel", "--n", "6", "--steps", "40", "--out"]
    done = torchrun("", 2, "-m", "contrastive_diffusion.cli", *options, str(tmp_path / "two.npy"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 samples") == 1
    assert main([*options, str(tmp_path / "one.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))
