"""The Triton kernels by their names."""

from fastdiff.backends.triton import affine, gaussian_kl, loss, programs, step

KERNELS = {
    kernel.name: kernel
    for kernel in (affine.affine, programs.coefficients, gaussian_kl.gaussian_kl, loss.loss, step.step)
}
