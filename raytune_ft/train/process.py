"""How this process computes: with which threads, by which rules, in which memory."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`."""


def compute_alike(threads: int, device: torch.device) -> None:
    """Make the same work give the same bits in this process.

    Args:
        threads: that it computes with on CPU.
        device: what it computes on.
    """
    torch.set_num_threads(threads)
    if device.type == "cpu":
        # As `use_deterministic_algorithms`, which imports torch's compiler: more than a second.
        torch.set_deterministic_debug_mode("error")
        # Nothing here reads what it has not written. (torch types the module without this property.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory(device: torch.device) -> None:
    """Let a process that computes on CPU keep the memory of tensors that it frees.

    glibc gives large blocks back to the system at once, and each pass would fault all of their pages in
    again: a fifth of the time of a full fine-tune. Ray's processes of a run on this machine are started with
    what this needs beside; see `launch.ray_session`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
