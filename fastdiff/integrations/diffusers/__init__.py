"""The schedulers of diffusers, fused: the same objects, arguments, numbers and draws, with one launch a step::

    from fastdiff.integrations.diffusers import fuse, patch, unpatch, fused_calls, fallbacks

    fuse(pipeline.scheduler)        # this object
    patch()                         # all of them, until unpatch(); or: with patch(): ...
    fused_calls(), fallbacks()      # which calls were fused; which were not, and why

Nothing happens on import. What is covered, what is left to diffusers and what is equal to the bit: docs/diffusers.md.
"""

from .call_counts import fallbacks, fused_calls, reset_counts
from .patching import fuse, patch, unfuse, unpatch

__all__ = ["fallbacks", "fuse", "fused_calls", "patch", "reset_counts", "unfuse", "unpatch"]
