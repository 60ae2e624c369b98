"""The small networks through which the terms of a run look at images, and their training on real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet import COARSEST

STEPS = 300  # of training, or those of a shorter run
BATCH = 128
LEARNING_RATE = 2e-3
HIDDEN, DIMS = 32, 16  # features of the classifier; of an embedding
TEMPERATURE = 0.1  # of the cosines that embeddings are trained on


def convolutions(channels: int, size: int, width: int = 16) -> tuple[list[nn.Module], int]:
    """(convolutions and what follows each, which halve images [B, channels, size, size] until they are coarse; how many
    numbers they make of an image)"""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
    narrow = width
    while size > COARSEST:
        layers += [nn.Conv2d(width, 2 * narrow, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width, size = 2 * narrow, (size + 1) // 2
    return layers, width * size**2


class Extractors(nn.Module):
    """A classifier, and an encoder of images and one of labels that agree about what goes together.

    Args:
        channels, size: of the images, [B, channels, size, size].
        classes: how many there are.
    """

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        layers, flat = convolutions(channels, size)
        self.classifier = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(flat, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, classes)
        )
        self.layers = list(range(1, len(layers), 2))  # outputs of the classifier that are features of a place
        layers, flat = convolutions(channels, size)
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, DIMS))
        self.label_encoder = nn.Embedding(classes, DIMS)

    def hidden(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, HIDDEN]: what the classifier decides by."""
        return self.classifier[:-1](images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """What both are trained on: cross-entropy of the logits; and of the cosines between an image and all labels,
        which is the contrastive loss (Radford et al. 2021, arXiv 2103.00020) where labels repeat in a batch."""
        image = F.normalize(self.image_encoder(images), dim=1)
        cosines = image @ F.normalize(self.label_encoder.weight, dim=1).T
        return F.cross_entropy(self.classifier(images), labels) + F.cross_entropy(cosines / TEMPERATURE, labels)


def discriminator(channels: int, size: int) -> nn.Sequential:
    """[B, channels, size, size] -> logits [B, 1], high for real images."""
    layers, flat = convolutions(channels, size, 32)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 1))


def train_extractors(made: Extractors, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator) -> None:
    """On images [N, C, H, W] with labels [N], of which the generator, on the CPU, chooses the batches."""
    optimizer = torch.optim.Adam(made.parameters(), LEARNING_RATE)
    for _ in range(min(steps, STEPS)):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(images.device)
        loss = made.loss(images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # the gradients are of no use to what only looks


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """Between the normal distributions of the means and covariances of features [N, D] and [M, D]: a scalar, float64
    (Heusel et al. 2017, arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    covariances = [torch.atleast_2d(features.T.cov()) for features in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * shared
