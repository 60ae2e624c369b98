"""The Triton kernels by their names."""

from fastdiff.backends.triton import affine, gaussian_kl, kl_normal, loss, posterior, programs, row_moments, step

_MOMENTS = row_moments.row_moments, row_moments.row_moments_gradient
_OF_MOMENTS = kl_normal.kl_normal, posterior.posterior, posterior.posterior_gradient
_OTHERS = affine.affine, programs.coefficients, gaussian_kl.gaussian_kl, loss.loss, step.step
KERNELS = {kernel.name: kernel for kernel in (*_OTHERS, *_MOMENTS, *_OF_MOMENTS)}
