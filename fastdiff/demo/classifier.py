"""A judge of generated digits: a support vector machine that has seen real digits alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import extras


@dataclass(frozen=True)
class DigitClassifier:
    """Trained on three quarters of the real digits; ``held_out_accuracy`` is on the fourth, 0 to 1."""

    model: Any
    held_out_accuracy: float

    def recognise(self, images: Tensor) -> Tensor:
        """[N, 1, 8, 8] in [-1, 1] -> the digit seen in each, int64 [N]."""
        return torch.from_numpy(self.model.predict(_features(images))).long()


def train_classifier(images: Tensor, labels: Tensor) -> DigitClassifier:
    """Train on real digits [N, 1, 8, 8] with labels [N]."""
    extras.require("sklearn")
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    seen, held_out, seen_labels, held_out_labels = train_test_split(
        _features(images), labels.numpy(), test_size=0.25, stratify=labels.numpy(), random_state=0
    )
    model = SVC(C=10.0, gamma=0.001).fit(seen, seen_labels)
    return DigitClassifier(model, float(model.score(held_out, held_out_labels)))


def _features(images: Tensor) -> Any:
    """Pixels as scikit-learn has them: [N, 64] in 0..16, which its usual gamma of 0.001 is for."""
    return ((images.clamp(-1, 1) + 1) * 8).flatten(1).cpu().numpy()
