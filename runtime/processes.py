"""Several processes: those that torchrun started, or one.

All of them read the data and hold the same weights; rank 0 prints and writes.
"""

import contextlib
import ctypes
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist
import torch.nn as nn

from tasks.common import NonFinite

# Time to wait for a living process, such as rank 0 while it decodes a data set. A process that dies
# closes its connections, which the others see at once.
TIMEOUT = datetime.timedelta(hours=1)
# The launcher. If torchrun dies, this process must stop too.
PARENT = os.getppid()


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def local_rank():
    """Of the processes on this machine."""
    return int(os.environ["LOCAL_RANK"])


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun started, and end together with them; without it nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        print(f"train.py: error: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but "
              f"{', '.join(missing)} are not set: start with torchrun, which sets them all, or "
              "unset WORLD_SIZE", file=sys.stderr)
        sys.exit(2)
    # numbers are compared on the CPU, by gloo, which sees a dead process; nccl is for the gradients
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except RuntimeError as error:
        print(f"train.py: stopped: process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did "
              f"not meet the others: {error}", file=sys.stderr, flush=True)
        leave(1)
    with open(os.devnull, "w") as nothing:
        with contextlib.redirect_stdout(nothing if rank() else sys.stdout):
            yield
    with contextlib.suppress(RuntimeError):  # one that has died has been dealt with
        # torchrun ends the others when the first one fails: not before rank 0 has said why
        gather_objects(None)


def leave(code):
    """End this process, at once if there were others.

    The group is not destroyed, nor Python shut down: in torch 2.4 either can wait for ever for a
    thread of gloo that waits for Python's lock.
    """
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def gather_objects(value):
    """[value of rank 0, of rank 1, ...] in every process; all raise an exception among them."""
    values = [value] * world_size()
    if world_size() > 1:
        # evaluation runs in inference mode, and torch 2.4 cannot gather into tensors made there
        with torch.inference_mode(False):
            dist.all_gather_object(values, value)
    for gathered in values:
        if isinstance(gathered, Exception):
            gathered.shared = True
            raise gathered
    return values


def in_order(parts):
    """One list of the parts of all processes, of which rank r has parts r, r + world_size, ..."""
    gathered = gather_objects(parts)
    ordered = []
    for i in range(sum(map(len, gathered))):
        place, owner = divmod(i, world_size())
        ordered.append(gathered[owner][place])
    return ordered


def gather_rows(tensors, rows, chunk):
    """{name: tensor} of all processes joined, in the order of in_order, chunk rows at a time.

    tensors: {name: tensor}, of which the first `rows` rows count
    """
    parts = []
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        # cloned, as what is gathered is copied with all the memory behind it
        parts.append({name: values[start:stop].clone() for name, values in tensors.items()})
    parts = in_order(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sum_over_processes(numbers):
    """The sums of a list of numbers, float64; NaN and inf stay what they are."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


@contextlib.contextmanager
def raised_everywhere():
    """If one process raises inside the block, all processes raise the same error."""
    try:
        yield
    except (ValueError, OSError, ImportError, NonFinite) as error:
        if not hasattr(error, "shared"):
            gather_objects(error)
        raise
    gather_objects(None)


class ProcessLost(Exception):
    """Another process has died or hangs."""


@contextlib.contextmanager
def loss_of_a_process():
    """ProcessLost in place of what torch raises there; gloo has no class of its own for that."""
    try:
        yield
    except RuntimeError as error:
        of_gloo = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world_size() == 1 or not of_gloo:
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ProcessLost(f"process {rank()} of {world_size()} lost another one, which died or "
                          f"hangs; if it could say why, that stands above ({reason})") from error


def launcher():
    """How this process was started, in words that can be typed again."""
    if world_size() == 1:
        return "python"
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if local == world_size():
        return f"torchrun --nproc-per-node {local}"
    return (f"torchrun --nnodes {world_size() // local} --rdzv-backend c10d --rdzv-endpoint "
            f"HOST:PORT --nproc-per-node {local}")


class Interrupted(Exception):
    """A signal asked the run to end; --resume replays what is unfinished."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignal:
    """SIGINT and SIGTERM are noted and looked at between steps; a second one ends the process."""

    def __enter__(self):
        self.number = 0
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.number = number
        for handled in self.before:
            signal.signal(handled, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self):
        """Interrupted in all processes if one was asked to end, ProcessLost if a torchrun died."""
        orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        flags = [self.number == number for number in self.before]
        *asked, orphans = sum_over_processes(flags + [orphan])
        if orphans and world_size() > 1:
            raise ProcessLost(f"torchrun has died on the machine of {orphans:.0f} of the "
                              f"{world_size()} processes")
        for number, count in zip(self.before, asked):
            if count:
                raise Interrupted(number)


def tune_allocator():
    """Keep freed activations in the process instead of returning them to the kernel at every step.

    With glibc a CPU step of the default network becomes about twice as fast, with identical
    weights; without glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: serve blocks up to 1 GiB from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB of free heap


class LossOfBatch(nn.Module):
    """A task's loss as a forward: DistributedDataParallel wraps nothing else.

    So a loss may call any method of its network.
    """

    def __init__(self, network, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch, args, facts):
        return self.loss(self.network, batch, args, facts)


def share_gradients(loss):
    """The loss whose backward leaves the mean of the processes' gradients in each of them.

    Every trained parameter must have a gradient in every batch, be it 0 as for a modality that no
    row has.
    """
    return nn.parallel.DistributedDataParallel(loss) if world_size() > 1 else loss


def no_sync(loss, unless):
    """Gradients stay in this process, but in the last batch of a window (`unless`)."""
    if world_size() == 1 or unless:
        return contextlib.nullcontext()
    return loss.no_sync()


def share_buffers(*models):
    """Copy the buffers of rank 0, such as batch statistics, to all: they are scored and saved."""
    if world_size() > 1:
        for model in models:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
