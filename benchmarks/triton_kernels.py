"""The Triton kernels by their names."""

from fastdiff.backends.triton import affine, loss, programs, step

KERNELS = {kernel.name: kernel for kernel in (affine.affine, programs.coefficients, loss.loss, step.step)}
