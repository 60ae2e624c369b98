"""The CUDA backend: a sampler step in one launch (csrc/cuda/). It is one kernel for all of a step: guidance, x0, clamp
or threshold, update with history, noise given or made in place, mask, learned variance, history entry, next model
input.

Everything else goes to its fallback: Triton's backend where there is one, or the reference. So do steps that the kernel
does not do: float64 data, gradients, ``torch.func``, coefficients for less than a sample, and offset noise or masks
that have to be made into a tensor first.

It is built where CMake finds nvcc, with machine code for compute capability 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0, and PTX
of the last. The CUDA runtime is linked in and hidden, so the module loads without a driver, and beside PyTorch's own
runtime. It uses the stream that is current in PyTorch. Nothing in it waits for the device.
"""

from .backend import Cuda

backend = Cuda()

__all__ = ["Cuda", "backend"]
