"""Packed tokens: a network that works on patches of an image, [B, L, C p q], where the data is [B, C, H, W].

Nothing is packed: the kernel of noising writes x_t in the order of the tokens, that of the loss reads the prediction in
it. Both count elements, rows and noise in the data's own order, so they compute what they compute without tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends.layout import TOKENS
from .numeric import check_numbers
from .ops.checks import check_tensor
from .showing import brief


@dataclass(frozen=True)
class Tokens:
    """How an image [B, C, H, W] is cut into patches that are tokens, [B, (H / p) (W / q), C p q], row by row.

    Args:
        patch: height and width of a patch, (p, q), or one number for both.
        order: of the elements in a token. "c p q": channels first, as Flux packs its latents. "p q c": channels last,
            as DiT, PixArt and SD3 have them before they unpatchify their output.

    Raises TypeError or ValueError for other values.
    """

    patch: int | tuple[int, int] = 2
    order: str = "c p q"

    def __post_init__(self):
        sizes = self.patch if isinstance(self.patch, (tuple, list)) else (self.patch, self.patch)
        if len(sizes) != 2:
            raise ValueError(f"patch must be a size, or (height, width); got {self.patch!r}.")
        for size in sizes:
            check_numbers(patch=size)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"patch must be whole sizes of at least 1; got {self.patch!r}.")
        object.__setattr__(self, "patch", self.patch if isinstance(self.patch, int) else tuple(sizes))
        if self.order not in TOKENS:
            raise ValueError(f"order must be one of {', '.join(map(repr, TOKENS))}; got {self.order!r}.")

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of ``x`` [B, C, H, W], contiguous: [B, (H / p) (W / q), C p q]. Raises ValueError for others."""
        return self.joined(self.split(x, "x")).contiguous()

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of ``pack``: [B, C, height, width]. Raises ValueError where the tokens do not fit."""
        check_tensor("tokens", tokens, "tokens")
        p, q = self.sizes
        batch, _, size = tokens.shape if tokens.ndim == 3 else (0, 0, 0)
        shape = torch.Size((batch, size // (p * q), height, width))
        self.check(shape)
        return self.patches(tokens, shape, "tokens").reshape(shape)

    # ---- for Objective

    @property
    def sizes(self) -> tuple[int, int]:
        return self.patch if isinstance(self.patch, tuple) else (self.patch, self.patch)

    @property
    def in_memory(self) -> tuple[int, ...]:
        """The order in memory of the dimensions [B, C, h, p, w, q], where they are tokens."""
        return TOKENS[self.order]

    def check(self, shape: torch.Size, name: str = "x0") -> None:
        """Raise ValueError unless data of ``shape`` can be cut into patches."""
        p, q = self.sizes
        if len(shape) != 4:
            raise ValueError(f"tokens are of images: {name} must be [B, C, H, W]; got {tuple(shape)}.")
        if shape[2] % p or shape[3] % q:
            raise ValueError(
                f"{name} has shape {tuple(shape)}, whose height and width must be multiples of the patch, {p} x {q}."
            )

    def split(self, x: Tensor, name: str = "x0") -> Tensor:
        """[B, C, H, W] as [B, C, h, p, w, q], a view."""
        check_tensor(name, x, name)
        self.check(x.shape, name)
        return _split(x, *self.sizes)

    def joined(self, x: Tensor) -> Tensor:
        """[B, C, h, p, w, q] as tokens: a view where it lies in their order."""
        b, c, h, p, w, q = x.shape
        return x.permute(self.in_memory).reshape(b, h * w, c * p * q)

    def patches(self, tokens: Tensor, shape: torch.Size, name: str = "prediction") -> Tensor:
        """Tokens of data of ``shape`` as [B, C, h, p, w, q], a view."""
        check_tensor(name, tokens, name)
        (b, c, height, width), (p, q) = shape, self.sizes
        h, w = height // p, width // q
        if tokens.shape != (b, h * w, c * p * q):
            hint = " It is unpacked: noise without tokens= for it." if tokens.shape == shape else ""
            raise ValueError(
                f"{name} has shape {tuple(tokens.shape)}, but the tokens of {tuple(shape)} are "
                f"{(b, h * w, c * p * q)}.{hint}"
            )
        sizes = {"c": c, "p": p, "q": q}
        order = self.in_memory
        parts = tokens.reshape(b, h, w, *(sizes[name] for name in self.order.split()))
        return parts.permute(*(order.index(d) for d in range(6)))

    def of_loss(
        self, x0: Tensor, n: Any, prediction: Tensor, mask: Any, weight: Any, target: Any, y: Any
    ) -> tuple[Tensor, Any, Tensor, Any, Any, Any, Any]:
        """The operands of a loss, in order, as [B, C, h, p, w, q]: ``prediction``, ``target`` and ``y`` are tokens;
        ``mask``, and a weight an element, broadcast to ``x0``."""
        names = {"prediction": prediction, "target": target, "y": y}
        prediction, target, y = (None if x is None else self.patches(x, x0.shape, name) for name, x in names.items())
        mask, weight = self._spread(mask, "mask", x0.shape), self._spread(weight, "weight", x0.shape)
        return *split(self, x0, n)[:2], prediction, mask, weight, target, y

    def _spread(self, x: Any, name: str, shape: torch.Size) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 3:
            return x
        if x.ndim > 4 or any(own not in (1, size) for own, size in zip(x.shape, shape)):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, which does not fit {tuple(shape)}: with tokens= too it is laid "
                f"out as x0, and aligned at the left."
            )
        p, q = self.sizes
        p, q = (p if x.shape[2] > 1 else 1), (q if x.ndim > 3 and x.shape[3] > 1 else 1)
        return _split(x, p, q)


def _split(x: Tensor, p: int, q: int) -> Tensor:
    rows = x.unflatten(2, (x.shape[2] // p, p))
    return rows.unflatten(4, (x.shape[3] // q, q)) if x.ndim > 3 else rows


def times_of(tokens: Tokens, x0: Tensor, t: Any) -> Any:
    """``t`` as times of the samples of ``x0``, [batch] where it is a tensor of one a sample. Raises TypeError or
    ValueError for other tokens, data or times."""
    if not isinstance(tokens, Tokens):
        raise TypeError(f"tokens must be a fastdiff.Tokens, such as Tokens(patch=2); got {brief(tokens)}.")
    tokens.check(x0.shape)
    if not isinstance(t, Tensor) or t.ndim < 2:
        return t
    if t.shape != (len(x0), *(1,) * (t.ndim - 1)):
        raise ValueError(f"with tokens= there is one time a sample, {tuple(x0.shape[:1])}; got t {tuple(t.shape)}.")
    return t.reshape(-1)


def split(tokens: Tokens | None, x0: Tensor, n: Any) -> tuple[Tensor, Any, tuple[int, ...] | None]:
    """(x0, noise, the order of x_t in memory) as kernels take them: with tokens, as patches [B, C, h, p, w, q]. Noise
    that is no tensor stays as it is."""
    if tokens is None:
        return x0, n, None
    return tokens.split(x0), _split(n, *tokens.sizes) if isinstance(n, Tensor) else n, tokens.in_memory


def joined(tokens: Tokens | None, x0: Tensor, x_t: Tensor, n: Any, target: Tensor | None) -> tuple[Tensor, Any, Any]:
    """(x_t, noise, target) of noising: x_t and target as tokens, the noise as x0."""
    if tokens is None:
        return x_t, n, target
    if isinstance(n, Tensor) and n.shape != x0.shape:
        n = n.reshape(x0.shape)
    return tokens.joined(x_t), n, None if target is None else tokens.joined(target)
