"""Processes: how they are set up, what they tell each other, and how they stop.

Nothing here is about reinforcement learning. Only train_grpo.py is sharded. Multi-node runs are accelerate's
launcher's.
"""

import contextlib
import ctypes
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch


# ---- set-up ------------------------------------------------------------------------------------------------
def make_accelerator(layers: list[str], timeout_min: float = 120, **options):
    """FSDP2 over all processes: fp32 masters sharded, bf16 compute on a GPU, fp32 gradient reduction.

    A single GPU is a mesh of one. A single process on a CPU shards nothing: the copies would cost the tiny
    model half of its speed.

    Args: layers: names of the module classes that are gathered one at a time; timeout_min: minutes that a
        process waits for the others (torch's 10 are less than a large checkpoint may take); options: of the
        Accelerator. Raises: ValueError if the launcher was configured for another kind of sharding, or
        started one process where several were asked for.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs
    from torch.distributed.fsdp import MixedPrecisionPolicy

    refuse_other_sharding()
    refuse_lone_processes()
    on_gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
    if on_gpu:
        launch_alone()
    # accelerate's own bf16 policy would reduce gradients and return log-probs in bf16 as well.
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=precision,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision="no",
        fsdp_plugin=plugin if on_gpu else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_min))],
        **options,
    )
    torch.set_num_threads(threads)  # accelerate counts physical cores, hence half of them in most containers
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate shards on GPUs only; gloo can
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def refuse_other_sharding():
    """Raises: ValueError if `accelerate launch`, often by a forgotten config file, would shard otherwise."""
    from accelerate.commands.config.config_args import default_config_file

    asked = {
        "DeepSpeed": os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "FSDP1": os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") != "2",
    }
    if kind := next((kind for kind, is_asked in asked.items() if is_asked), None):
        file = default_config_file if os.path.exists(default_config_file) else "--config_file or flags"
        raise ValueError(
            f"accelerate launch: expected no sharding of its own, since the trainer sets up FSDP2, got "
            f"{kind} (from {file}): move the file away, or name one with distributed_type MULTI_GPU"
        )


def refuse_lone_processes():
    """Raises: ValueError if `accelerate launch` was asked for several processes and told them nothing.

    Where a node has one GPU or none it starts one process with an address and no rank: each node would train
    alone, all into one folder.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        raise ValueError(
            "accelerate launch: expected a process that knows its rank, got none: add --multi_gpu (on CPUs "
            "as well), or unset MASTER_ADDR to train with one process"
        )


def launch_alone():
    """Set what a launcher would have set for a single process, unless one has."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": free_port()}).items():
        os.environ.setdefault(name, str(value))


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process, as one of several or alone."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def in_turn(accelerator):
    """Let the processes of each node through one after the other. Collective; nothing inside may be.

    For what takes much host memory for a while: a model that is loaded whole and then sharded.
    """
    place = int(os.environ.get("LOCAL_RANK", 0))
    n = max(gather([place])) + 1  # of the largest node: the others wait for it
    for _ in range(place):  # n times in all on every process, each for one that has finished
        accelerator.wait_for_everyone()
    yield
    for _ in range(n - place):
        accelerator.wait_for_everyone()


# ---- exchange ----------------------------------------------------------------------------------------------
def gather(items: list) -> list:
    """The items of all processes, in order of rank, on every process. Collective; they are pickled."""
    from accelerate.utils import gather_object

    return gather_object(items)


def whole_weights(model):
    """Yield (published name, whole tensor) one at a time, with the adapters (lora.py) merged into it.

    Collective: a sharded weight is gathered by all processes.
    """

    def whole(p):
        return p.full_tensor() if hasattr(p, "full_tensor") else p

    # state_dict, not named_parameters: a tied head is listed in it, and would go stale in vLLM otherwise.
    state = model.state_dict()
    for name, p in state.items():
        if ".lora_" in name:
            continue
        # Of shards in bf16: what vLLM holds, half the traffic.
        p = whole(p.bfloat16() if p.is_cuda and hasattr(p, "full_tensor") else p)
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a, b = (whole(state[f"{layer}.lora_{x}.default.weight"]) for x in "AB")
            p = (p.float() + model.get_submodule(layer).scaling["default"] * (b @ a)).to(p.dtype)
        yield name.replace(".base_layer", ""), p


def remove_stale_shared_memory():
    """Remove what an earlier, killed run has left behind. Collective.

    On CPUs the processes of one vLLM engine share memory under one name for all runs, and only an orderly
    exit removes it. Whoever still has it mapped keeps it.
    """
    if os.environ["LOCAL_RANK"] == "0":
        for left in Path("/dev/shm").glob("*tp:*cpushm*"):
            left.unlink(missing_ok=True)
    torch.distributed.barrier()


def return_freed_memory():
    """Hand the holes in the C library's heap back to the system, where that library is glibc.

    Tensors and images of ever other sizes do not fit where earlier ones were freed, so the heap would grow by
    megabytes a step over hundreds of steps.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


# ---- the end -----------------------------------------------------------------------------------------------
class Stop:
    """Ctrl-C and SIGTERM ask for a stop at the next safe point; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signal = 0
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> int:
        """The signal that any process got, or 0. Collective: all stop at the same point, or none does."""
        return max(gather([self.signal]))


def leave():
    """End one of several processes at once, when all is written.

    Python's own exit can meet a thread of gloo that lets go of its last tensor, wants the interpreter's lock
    for that, and aborts the process.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
