"""Which noise goes with which data: the noise of a batch, permuted so that it lies near its data.

    noise = torch.randn_like(x0)
    noised = objective.noise(x0, noise=fastdiff.pairing.immiscible(x0, noise))

The data keeps its order, and with it labels and conditions. Noise and target are those of the pair, as the noise is
given. The assignment is solved on the CPU by SciPy, in B^3 for a batch of B, so a GPU is waited for. Under gradient
accumulation each micro-batch is paired by itself.

Across processes, ``group=torch.distributed.group.WORLD`` pairs the batches of all ranks as one: each keeps its own
data, and gets the noise that was assigned to it, its own or another rank's. Each rank holds the noise of all meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.checks import check_alike, check_floating

__all__ = ["immiscible", "optimal_transport"]


def immiscible(x0: Tensor, noise: Tensor, group: Any = None) -> Tensor:
    """The noise of a batch, permuted so that the sum of the distances, norm(x0_i - n_i), is least (Li et al. 2024,
    Immiscible Diffusion).

    Args:
        x0: data [B, ...], floating point.
        noise: shaped as x0, on its device.
        group: a process group, whose ranks have batches of the same shape and noise of their own; None: this batch
            alone.

    Returns the noise, shaped and typed as noise. Raises TypeError or ValueError for unfit inputs, ImportError without
    SciPy.
    """
    return _paired(x0, noise, group, squared=False)


def optimal_transport(x0: Tensor, noise: Tensor, group: Any = None) -> Tensor:
    """The noise of a batch, permuted so that the sum of the squared distances, norm(x0_i - n_i)^2, is least: the
    optimal transport between the two halves of a minibatch (Tong et al. 2024, OT-CFM; Pooladian et al. 2023).

    torchcfm draws pairs from this plan with replacement; here each sample is taken once, in the order of x0.

    Args and errors as in ``immiscible``.
    """
    return _paired(x0, noise, group, squared=True)


@torch.no_grad()
def _paired(x0: Tensor, noise: Tensor, group: Any, squared: bool) -> Tensor:
    solve = _solver()
    check_floating(x0=x0, noise=noise)
    if not x0.ndim:
        raise ValueError("x0 must have a batch dimension; got a scalar.")
    check_alike(x0=x0, noise=noise)
    if group is None:
        return noise[_assigned(_costs(x0, noise, squared), solve).to(noise.device)]
    batch = len(x0)
    sizes = _gathered(torch.tensor([batch], device=x0.device), group).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"all ranks must have a batch of the same size to be paired as one; got {sizes}.")
    every = _gathered(noise.contiguous(), group)
    # A rank measures its own data against all noise. The whole is solved on each rank: from the same numbers, so to the
    # same end.
    assigned = _assigned(_gathered(_costs(x0, every, squared), group), solve)
    first = dist.get_rank(group) * batch
    return every[assigned[first : first + batch].to(noise.device)]


def _solver() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("pairing needs the SciPy library: install fastdiff[pairing].") from error
    return linear_sum_assignment


def _costs(x0: Tensor, noise: Tensor, squared: bool) -> Tensor:
    """The distances of each x0 from each noise, [len(x0), len(noise)], float32 (float64 with float64 data)."""
    dtype = torch.promote_types(torch.promote_types(x0.dtype, noise.dtype), torch.float32)
    # (flatten refuses a batch of none)
    x, n = (data.to(dtype).reshape(len(data), data[:1].numel()) for data in (x0, noise))
    products = x @ n.T
    if squared:  # norm(x)^2 + norm(n)^2 is the same for every permutation
        return -2 * products
    lengths = x.square().sum(1)[:, None] + n.square().sum(1)
    return (lengths - 2 * products).clamp(min=0).sqrt()


def _assigned(costs: Tensor, solve: Any) -> Tensor:
    """For each row the column that is assigned to it, int64 [rows]."""
    costs = costs.double().cpu()
    if not bool(costs.isfinite().all()):
        raise ValueError("x0 and noise must be finite to be paired; a distance is NaN or infinite.")
    return torch.from_numpy(solve(costs.numpy())[1])


def _gathered(tensor: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks of the group, one after another."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.cat(parts)
