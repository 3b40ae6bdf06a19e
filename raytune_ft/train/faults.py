"""Whose fault an error is: that of the device, which all jobs on it share, or of whoever met with it."""

import torch

from raytune_ft.errors import DeviceFailed, OutOfMemory

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    # cuBLAS takes its memory beside torch's, and says no more when there is none left.
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
"""How a RuntimeError begins, or what it names, where memory was not to be had."""


def fault_of_device(error: BaseException) -> OutOfMemory | DeviceFailed | None:
    """What an error says of the device; None: the device is well, and whoever met with the error is to blame.

    A GPU that met with an error of one kind answers every later call of the process with it, so that whoever
    comes next would be blamed. It is asked whether it still works.

    The error gives up its frames, which hold the memory of the pass.
    """
    if isinstance(error, OutOfMemory | DeviceFailed):
        return error
    if is_out_of_memory(error):
        error.__traceback__ = None
        return OutOfMemory(
            f"the device's memory is full ({_first_line(error)}); train fewer jobs at once, or use a smaller "
            "batch.sequences_per_worker or model.gradient_checkpointing: true"
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch does not type it
        try:
            torch.cuda.synchronize()
        except Exception as failure:  # noqa: BLE001  whatever it is, the device does not work
            error.__traceback__ = failure.__traceback__ = None
            return DeviceFailed(
                f"the device does not work any more ({_first_line(failure)}); look at it with nvidia-smi and "
                "dmesg, and run the same command again without it"
            )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not to be had, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
