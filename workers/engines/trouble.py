"""What an exception of a library means: the job's fault, the worker's trouble for now, or the end of the device."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastchat_q.errors import FastchatQError, JobFailedError, RetryableError

from .base import OUT_OF_MEMORY

ALLOCATION_MESSAGES = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED")
"""What torch's CPU allocator, its mapping of files and the CUDA libraries say, in a plain RuntimeError."""
DEVICE_MESSAGES = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error", "HIP error")


def job_error(error: Exception) -> FastchatQError:
    """The error with which the jobs of a failed step end.

    Raises:
        Exception: the same error: the device does not work any more, so every later step would fail too. The process
            has to end; its jobs have lost a worker, which counts as evidence against them.
    """
    if isinstance(error, FastchatQError):
        return error
    said = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return RetryableError(f"The worker ran out of memory: {said}", code=OUT_OF_MEMORY)
    if isinstance(error, torch.AcceleratorError) or _says(error, DEVICE_MESSAGES):
        if not _device_works():
            raise error
        return RetryableError(f"The worker's device failed: {said}", code="device_error")
    return JobFailedError(f"The engine failed: {said}", code="engine_error")


def is_out_of_memory(error: BaseException) -> bool:
    """Accelerators have a type for it, the CPU's allocator has words, and the system a number."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return _says(error, ALLOCATION_MESSAGES)


@contextmanager
def memory_permitting() -> Iterator[None]:
    """What is done inside is left undone, or half done, if there is no memory for it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def _device_works() -> bool:
    """A failed kernel leaves most devices unusable until their process ends: then even waiting for it fails."""
    try:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    except RuntimeError:
        return False
    return True
