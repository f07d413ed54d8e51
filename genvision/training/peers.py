"""Telling the death of another process from a fault of this one.

When a process of a job dies or hangs, the others hear of it in their next collective operation, as an error that looks like any other.
"""

import torch.distributed as dist

GLOO = "gloo/transport/"
"""The source file that all errors of its connections name."""
GLOO_SAYS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
)
NCCL_SAYS = ("ncclRemoteError", "communicator was aborted", "collective operation timeout")


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone, or has not answered within the time limit of the process group.

    Gloo raises plain `RuntimeError`s, whose text alone tells. NCCL's texts are those of PyTorch's sources; with it, PyTorch's own watchdog
    mostly ends the process before an error is raised.
    """
    if isinstance(error, dist.DistNetworkError):
        return True  # the process that keeps the store, the first one, is gone
    text = str(error)
    if isinstance(error, dist.DistBackendError):
        return any(words in text for words in NCCL_SAYS)
    return isinstance(error, RuntimeError) and GLOO in text and any(words in text for words in GLOO_SAYS)
