"""Triton kernels are interpreted here, on CPU tensors; this must be known before a kernel is decorated."""

import os

os.environ["TRITON_INTERPRET"] = "1"
