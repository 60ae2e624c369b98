"""The Triton kernels by their names."""

from fastdiff.backends.triton import affine, gaussian_kl, loss, programs, row_moments, step

_MOMENTS = row_moments.row_moments, row_moments.row_moments_gradient
KERNELS = {
    kernel.name: kernel
    for kernel in (*(affine.affine, programs.coefficients, gaussian_kl.gaussian_kl, loss.loss, *_MOMENTS, step.step),)
}
