"""An independent judge of digits: a small CNN, and the Fréchet distance between sets of its features.

Letters: B images, H×W pixels.
"""

import torch
from torch import nn

FEATURES = 128


class DigitClassifier(nn.Module):
    """Which digit an image shows. It never sees the VQ-VAE, and is trained on real digits alone."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(1, 32), *_convolution(32, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            *_convolution(64, FEATURES), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(FEATURES, 10))

    def features(self, x):
        """Images (B, 1, H, W) in [-1, 1] → (B, 128), what the last layer sees."""
        return self.convolutions(x)

    def forward(self, x):
        """Images (B, 1, H, W) in [-1, 1] → logits (B, 10)."""
        return self.head(self.features(x))


def _convolution(inputs, outputs):
    return (nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def frechet_distance(one, other):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two sets of features (N, E), (M, E), as Gaussians, in float64.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule …", there with Inception's
    features. The trace of the root is the sum of the roots of the eigenvalues of Σ₁Σ₂, which are
    real and not negative but for rounding.
    """
    one, other = one.double(), other.double()
    difference = one.mean(dim=0) - other.mean(dim=0)
    covariances = [torch.cov(features.T) for features in (one, other)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return (difference.square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()).item()
