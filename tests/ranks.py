"""Runs a function on the two ranks of a process group."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, Path], None]


def run(work: Work, folder: Path) -> None:
    """Calls work(rank, folder) in two processes; a function of a module, as it is sent to them."""
    mp.spawn(_in_group, (work, folder), nprocs=2)


def _in_group(rank: int, work: Work, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    work(rank, folder)
    # Wrapped models are in cycles, and hold the group: its threads must end before the process.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
