"""The CUDA backend: a sampler step in one launch (csrc/cuda/). All else is the next backend's: Triton's where there is
one, or the reference. So are steps that the kernel does not do: of float64 data, with gradients, under ``torch.func``.

It is built where nvcc is found, loads without a driver, and uses the stream that is current in PyTorch. Nothing in it
waits for the device.
"""

from .backend import Cuda

backend = Cuda()

__all__ = ["Cuda", "backend"]
