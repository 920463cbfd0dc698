"""
One process or many: rank, device, and messages between processes.

torchrun starts the processes; without it there is one. Sums and flags travel by gloo on the CPU, so
nothing waits for a GPU.
"""

import os
import sys
import time
import weakref
from datetime import timedelta

import torch

from configurator import UserError, require


def start_processes(device):
    """-> rank, number of processes, torch.device. Under torchrun, joins the other processes.

    device: "auto", "cpu", "cuda", "cuda:1", or "mps" (Apple's GPUs, one process). Raises UserError if
    this machine has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    kind = device.partition(":")[0]
    require(kind in ("cpu", "cuda", "mps"),
            f"--device={device} can't be used here: it is auto, cpu, cuda or mps")
    require(kind != "mps" or world == 1,
            f"--device={device} is for one process: {world} can't work together there")
    require(kind != "mps" or torch.backends.mps.is_available(),
            f"--device={device} can't be used here: it is for Apple's GPUs")
    try:
        place = torch.device(device)
        if place.type == "cuda" and (world > 1 or place.index is None):
            place = torch.device("cuda", local_rank)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device={device} can't be used here: {str(error).splitlines()[0]}") from None
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        hook = sys.excepthook  # init_process_group wraps it in its own, which would swallow our one line
        limit = timedelta(hours=1)  # process 0 draws previews and encodes data sets while the others wait
        store, rank, _ = next(torch.distributed.rendezvous("env://", timeout=limit))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's store outlives its workers: restarted ones would find the addresses of the
            # dead. (On several nodes the counts may differ: docs/running.md says what to set there.)
            store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", store=store,
                                             rank=rank, world_size=world, timeout=limit)
        sys.excepthook = hook
    return int(os.environ.get("RANK", 0)), world, place


_in_flight = []  # weak references to tensors that gloo's threads may hold


def _all_reduce(x, op):
    """-> the sum or maximum of the processes' tensors, a new tensor on the CPU"""
    x = x.cpu().clone()
    torch.distributed.all_reduce(x, op)
    _in_flight[:] = [ref for ref in (*_in_flight, weakref.ref(x)) if ref() is not None]
    return x


def leave_processes():
    """Ends what `start_processes` began. Call `barrier` first: process 0 may still have work to finish.

    gloo's threads hold tensors a little beyond the end of an operation, a `barrier` above all, and need
    Python to release them. If Python ends at that moment, the process aborts (SIGABRT): so wait.
    """
    while any(ref() is not None for ref in _in_flight):
        time.sleep(0.001)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier():
    """Waits until all processes have come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def sum_over_processes(x):
    """The sum of the processes' tensors, in place of each."""
    if torch.distributed.is_initialized():
        x.copy_(_all_reduce(x, torch.distributed.ReduceOp.SUM))


def mean_over_processes(x):
    """The mean of the processes' tensors."""
    if torch.distributed.is_initialized():
        x = _all_reduce(x, torch.distributed.ReduceOp.SUM) / torch.distributed.get_world_size()
    return x


def max_over_processes(number):
    """The largest of the processes' numbers. All must call it; nothing waits for a GPU."""
    if torch.distributed.is_initialized():
        number = _all_reduce(torch.tensor(number), torch.distributed.ReduceOp.MAX).item()
    return number


def on_any_process(flag):
    """Whether `flag` is true on any process. All must call it."""
    return bool(max_over_processes(int(flag)))


def same_on_all(number):
    """Whether all processes have the same number. All must call it."""
    return max_over_processes(number) == -max_over_processes(-number)
