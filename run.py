"""
What every script's run needs: locks against a second run, Ctrl-C and SIGTERM, progress, precision.
"""

import atexit
import contextlib
import importlib.util
import io
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import UserError, require, say
from processes import barrier, leave_processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ----------------------------------------------------------------------------------------------------
# one run at a time

held = {}  # {path of a lock: its open file}


def hold(product):
    """Keeps other runs from writing `product`, a path without its suffix, until this process ends.

    Raises UserError if another run holds it. Does nothing on a platform or file system without locks.
    """
    if fcntl is None:
        return
    path = f"{product}.lock"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            file = open(path, "a")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held[path] = file
            if os.fstat(file.fileno()).st_nlink:
                break  # else its last holder removed the file after we opened it
    except BlockingIOError:
        raise UserError(f"another run is writing {product}: wait until it has ended, or write elsewhere") from None
    except OSError:
        pass  # a place that can't be written is reported at the first write


@atexit.register
def release(product=None):
    """Lets other runs write this product; without a name, every product held."""
    for path in [f"{product}.lock"] if product else [*held]:
        if file := held.pop(path, None):
            with contextlib.suppress(OSError):
                os.unlink(path)
            file.close()


@contextlib.contextmanager
def alone(product):
    """Process 0 holds `product` while the block runs, however it ends."""
    if os.environ.get("RANK", "0") == "0":
        hold(product)
    try:
        yield
    finally:
        release(product)


# ----------------------------------------------------------------------------------------------------
# being stopped


def catch_signals():
    """-> a list to which SIGTERM (pre-emption on a cluster) and Ctrl-C add their numbers.

    They no longer end the process. A second Ctrl-C does, unless it comes within a second: torchrun may
    deliver one Ctrl-C twice.
    """
    came, pressed = [], []

    def note(number, frame):
        if number == signal.SIGINT:
            pressed.append(time.monotonic())
            if pressed[-1] - pressed[0] > 1:
                raise KeyboardInterrupt
            if len(pressed) == 1 and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nCtrl-C: the run saves and stops after this step; press it again to end at once\n")
        came.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return came


@contextlib.contextmanager
def running(product):
    """A training run: it is `alone`, and gets the list of `catch_signals`. Afterwards the signals' handlers
    are as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with alone(product):
        try:
            yield catch_signals()
        finally:
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, handler)


def end(stopped, seen, checkpoint_path):
    """Ends all processes of a training run, once process 0 has saved.

    stopped: the signal's number, 0 if the run is finished; seen: the progress, such as "8,000 images".
    After a signal, every process exits with 128 + its number.
    """
    barrier()
    if stopped and os.environ.get("RANK", "0") == "0":
        by = "Ctrl-C" if stopped == signal.SIGINT else "SIGTERM"
        print(f"stopped by {by} after {seen}, which {checkpoint_path} has: the same command goes on from there",
              flush=True)
    leave_processes()
    if stopped:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun signals the others when the first has ended
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + stopped)


# ----------------------------------------------------------------------------------------------------
# progress


def progress(items=None, **options):
    """tqdm(items, **options) on a terminal. Elsewhere, as in a log file, the figures come as plain
    lines: at most one a minute, and one at the end (not with leave=False).
    """
    if sys.stderr.isatty():
        return tqdm(items, **options)
    form = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return Lines(items, **options, file=io.StringIO(), bar_format=form)


class Lines(tqdm):
    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def __del__(self):
        pass  # tqdm closes itself here, which would print after an error's one line

    def display(self, msg=None, pos=None):  # tqdm calls it to draw its bar, or with msg="" to clear it
        now = time.monotonic()
        self.shown = getattr(self, "shown", now)
        if msg is None and (now - self.shown >= 60 or self.disable):  # `close` sets `disable`
            self.shown = now
            print(self, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------
# precision


def set_precision(precision, device):
    """-> the context manager to run networks in. On a GPU, bf16 and fp16 are autocast, and tf32 is
    float32 with a shorter mantissa in products; elsewhere everything is float32.
    """
    require(precision in ("bf16", "fp16", "tf32", "fp32"),
            f"--precision is bf16, fp16, tf32 or fp32, not {precision}")
    if device.type != "cuda":
        return contextlib.nullcontext()
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        say("this GPU has no bfloat16: the run goes on in float32. --precision=fp16 is faster")
        precision = "tf32"
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast("cuda", dtype) if dtype else contextlib.nullcontext()


def can_compile(device):
    """Whether torch.compile works on this device. If a GPU lacks it, a line says why."""
    if device.type != "cuda":
        return False
    triton, new = importlib.util.find_spec("triton"), torch.cuda.get_device_capability(device) >= (7, 0)
    if not (triton and new):
        why = "Triton is not installed" if new else "this GPU is too old for Triton"
        say(f"torch.compile can't be used, since {why}: the run goes on without it, more slowly")
    return bool(triton and new)
