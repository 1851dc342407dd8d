"""Join the processes that ``torchrun``, ``accelerate launch`` or another launcher has started."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import distributed as dist

from lrc.compressors.distributed.processes import Processes
from lrc.configs.errors import Problem, ProcessLost, RecipeError

START = timedelta(minutes=5)
"""Time in which all processes must have started; launchers start them together."""
FOREVER = timedelta(days=20)
"""Processes wait while the first one does what is not divided. `Watch` notices those that end."""
SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
EXAMPLE = "python -m torch.distributed.run --nproc-per-node 2 -m lrc compress recipe.yaml"


def process_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the device of this process: every process of a host has a separate GPU.

    Parameters
    ----------
    device : str
        As requested: ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    RecipeError
        If a variable of the launcher is missing, is not a number or contradicts another one, or if
        there are not enough GPUs.
    """
    missing = [name for name in SET_BY_LAUNCHERS if not environment.get(name)]
    numbers = [environment.get(name, "") for name in SET_BY_LAUNCHERS[:3]]
    if missing or not all(number.isdecimal() for number in numbers):
        raise _refused(
            "WORLD_SIZE",
            f"says that there are several processes, but {', '.join(missing) or 'RANK'} is not "
            f"set to what a launcher sets; unset WORLD_SIZE, or start with `{EXAMPLE}`",
        )
    rank, size, local = (int(number) for number in numbers)
    if rank >= size:
        raise _refused(
            "RANK",
            f"must be below WORLD_SIZE, the number of processes, {size}, got {rank}; unset "
            f"WORLD_SIZE, or start with `{EXAMPLE}`",
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if device != "cuda":
        raise _refused(
            "--device",
            f"must be auto, cpu or cuda for several processes, got {device!r}; with cuda, every "
            "process uses a separate GPU (CUDA_VISIBLE_DEVICES selects them)",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = int(environment.get("LOCAL_WORLD_SIZE") or local + 1)
    if here > count:
        remedy = f"start at most {count} with --nproc-per-node" if count else "use --device cpu"
        raise _refused(
            "--nproc-per-node",
            f"{here} processes on this host, but torch sees {count} GPUs, and each needs one; "
            f"{remedy}",
        )
    return f"cuda:{local}"


def join(device: str) -> Processes:
    """Connect to the other processes; `device` is from `process_device`.

    Raises
    ------
    ProcessLost
        If one of them does not start.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
        # `Watch` ends the processes when one is lost; PyTorch would abort without a message.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=START)
        tensors = dist.new_group(backend=backend, timeout=FOREVER)
        control = dist.new_group(backend="gloo", timeout=FOREVER)
    except RuntimeError as error:
        raise ProcessLost(
            f"not all of the {os.environ['WORLD_SIZE']} processes have started within "
            f"{START.seconds // 60} minutes, or one has ended ({str(error).splitlines()[0][:200]})"
            "; start all of them again"
        ) from error
    size = dist.get_world_size()
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
    return Processes(dist.get_rank(), size, device, control, tensors, on_host)


def is_first_failure(processes: Processes) -> bool:
    """Return whether no other process has reported a failure; at most one gets True."""
    lost = [] if processes.watch is None else processes.watch.lost()
    try:
        # torchrun keeps the store; other launchers let the first process do it.
        if 0 not in lost or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.distributed_c10d._get_default_store()
            return bool(store.add("lrc-failed", 1) == 1)
    except RuntimeError:  # the store is gone
        pass
    return all(rank in lost for rank in range(processes.rank))  # the first of those that are left


def _refused(where: str, message: str) -> RecipeError:
    return RecipeError([Problem("bad-launch", where, message)])
