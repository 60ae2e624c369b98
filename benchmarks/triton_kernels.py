"""The Triton kernels by their names."""

from fastdiff.backends.triton import affine, loss, programs, row_moments, step

_MOMENTS = row_moments.row_moments, row_moments.row_moments_gradient
KERNELS = {k.name: k for k in (affine.affine, programs.coefficients, loss.loss, *_MOMENTS, step.step)}
