"""The numbers and names that Python and the kernels share. Python has them here; C++ has them in csrc/codes.h, and
``fastdiff._C.codes`` tells what it was built with. A test compares the two.
"""

import torch

# The columns of a table of steps, one row a step:
#   x0 = p_x x + p_m m, clamped
#   y  = c_x x + c_m m + c_x0 x0 + sum_j c_hj H_j + c_noise exp((l_0 + l_v v) / 2) z
#   y  = mask (k_x0 known + k_n z_known) + (1 - mask) y, with a mask
#   H' = h_x x + h_m m + h_x0 x0
#   the next input of the network = c_in y
# All history entries enter as one sum, so every multistep method is the same kernel.
COLUMNS = (
    *("p_x", "p_m", "c_x", "c_m", "c_x0", "c_h1", "c_h2", "c_h3", "c_h4", "c_noise"),
    *("l_0", "l_v", "h_x", "h_m", "h_x0", "k_x0", "k_n", "c_in"),
)
REDUCTIONS = ("mean", "sum", "none")
NORMALIZATIONS = ("none", "row", "global")  # by a mask's sum, in kernels
# What ``fastdiff.ops.row_moments`` sums up, and those that need no b.
MOMENTS = ("aa", "ab", "bb", "ss", "l1", "b1", "a", "b")
OF_ONE = ("aa", "l1", "a")
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.bool: 4,
    torch.int64: 5,
}
DATA = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of full-size tensors
# The stream of a seed's offset noise, which kernels name themselves: ``fastdiff.philox.Stream.OFFSET``.
OFFSET_STREAM = 1
KEPT_STEPS = 4  # history entries that a step takes at most
