"""The demo's network: a small class-conditional U-Net for images of any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_SIZE = 8
COARSEST = 4  # halve the image until its longer side is at most this


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """[B] times, about 0 to 1000, to [B, width] sines and cosines of geometrically spaced frequencies."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000.0) / half))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def upsample(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, C, 2H, 2W], each pixel repeated. The gradient is a sum, deterministic on every device."""
    batch, channels, height, width = x.shape
    x = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
    return x.reshape(batch, channels, 2 * height, 2 * width)


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-convolution twice, scaled and shifted by the condition in between."""

    def __init__(self, width_in: int, width_out: int, width_condition: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(width_in // GROUP_SIZE, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.scale_shift = nn.Linear(width_condition, 2 * width_out)
        self.norm2 = nn.GroupNorm(width_out // GROUP_SIZE, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, width_in, H, W], condition [B, width_condition] -> [B, width_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(condition)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), scale + 1)
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Single-head self-attention over the pixels, written out because fused kernels' gradients vary run to run."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(width // GROUP_SIZE, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        query, key, value = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # each [B, C, HW]
        scores = query.transpose(1, 2) @ key * query.shape[1] ** -0.5
        mixed = value @ scores.softmax(dim=-1).transpose(1, 2)
        return x + self.out(mixed.reshape(x.shape))


class UNet(nn.Module):
    """Predicts an image-shaped target from a noised image, a time and a class.

    time_scale maps the network's time (0..999, [0, 1], ln(sigma)/4, ...) to about 0..1000, the range that the
    sinusoids resolve. Class `classes` (one past the last) means "no class", for classifier-free guidance. The channels,
    `width` at first, double at each halving of the image up to `widest` times as many.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        time_scale: float,
        width: int = 32,
        blocks: int = 1,
        attention: bool = True,
        widest: int = 2,
    ):
        super().__init__()
        self.settings = dict(
            channels=channels,
            size=size,
            classes=classes,
            time_scale=time_scale,
            width=width,
            blocks=blocks,
            attention=attention,
            widest=widest,
        )
        self.time_scale = time_scale
        self.null_class = classes
        levels = max(1, math.ceil(math.log2(size / COARSEST)) + 1)
        widths = [width * min(2**level, widest) for level in range(levels)]
        self.multiple = 2 ** (levels - 1)

        self.width_embedding = 2 * width
        width_condition = 4 * width
        self.time_mlp = nn.Sequential(
            nn.Linear(self.width_embedding, width_condition), nn.SiLU(), nn.Linear(width_condition, width_condition)
        )
        self.class_embedding = nn.Embedding(classes + 1, width_condition)

        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        current = width
        for level_width in widths:
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(ResidualBlock(current, level_width, width_condition))
                current = level_width
            self.down.append(stage)
        self.middle = ResidualBlock(current, current, width_condition)
        self.attention = Attention(current) if attention else nn.Identity()
        for level_width in reversed(widths):
            stage = nn.ModuleList()
            for index in range(blocks):
                stage.append(ResidualBlock(current + level_width * (index == 0), level_width, width_condition))
                current = level_width
            self.up.append(stage)
        self.norm = nn.GroupNorm(width // GROUP_SIZE, width)
        self.head = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """x [B, C, H, W], time [B], label [B] integers up to `null_class` -> [B, C, H, W]."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        embedding = sinusoidal_embedding(time * self.time_scale, self.width_embedding)
        condition = F.silu(self.time_mlp(embedding.to(x.dtype)) + self.class_embedding(label))

        h = self.stem(x)
        skips = []
        for level, stage in enumerate(self.down):
            if level > 0:
                h = F.avg_pool2d(h, 2)
            for block in stage:
                h = block(h, condition)
            skips.append(h)
        h = self.attention(self.middle(h, condition))
        for level, stage in enumerate(self.up):
            if level > 0:
                h = upsample(h)
            h = torch.cat([h, skips.pop()], dim=1)
            for block in stage:
                h = block(h, condition)
        h = self.head(F.silu(self.norm(h)))
        return h[..., :height, :width]
