"""A classifier of digits, which judges samples: a small CNN.

Letters: B images, H×W pixels.
"""

from torch import nn

FEATURES = 128
HIDDEN_SIZE = 96            # numbers that its largest layers hold for a pixel


class DigitClassifier(nn.Module):
    """Which digit an image shows. It is trained on real digits, independently of any VQ-VAE."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(1, 32), *_convolution(32, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            *_convolution(64, FEATURES), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(FEATURES, 10))

    def features(self, x):
        """Images (B, 1, H, W) in [-1, 1] → (B, 128), the inputs of the last layer."""
        return self.convolutions(x)

    def forward(self, x):
        """Images (B, 1, H, W) in [-1, 1] → logits (B, 10)."""
        return self.head(self.features(x))


def _convolution(inputs, outputs):
    return (nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
