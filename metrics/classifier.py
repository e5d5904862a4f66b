"""Two classifiers of digits, built differently, which judge samples: a small CNN and a small vision transformer.

Letters: B images, H×W pixels, P patches of one image, E width of the transformer.
"""

import torch
from torch import nn

FEATURES = 128
ACTIVATIONS_PER_PIXEL = 96  # at most, in the largest layer of either

WIDTH = 64                  # E
PATCH = 4                   # pixels along a side
PATCHES = (28 // PATCH)**2  # P


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


class DigitTransformer(nn.Module):
    """Which digit an image shows, from its patches: a vision transformer (Dosovitskiy et al. 2021).

    It shares no layer with DigitClassifier, so that a peculiarity of one of them shows as a difference.
    """

    def __init__(self, layers=4, heads=4):
        super().__init__()
        self.patches = nn.Linear(PATCH**2, WIDTH)
        self.positions = nn.Parameter(torch.zeros(PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, heads, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)
        nn.init.normal_(self.positions, std=0.5)

    def features(self, x):
        """Images (B, 1, 28, 28) in [-1, 1] → (B, E), the mean of the tokens after the last norm."""
        patches = nn.functional.unfold(x, PATCH, stride=PATCH).transpose(1, 2)                # (B, P, 16)
        return self.encoder(self.patches(patches) + self.positions).mean(dim=1)

    def forward(self, x):
        """Images (B, 1, 28, 28) in [-1, 1] → logits (B, 10)."""
        return self.head(self.features(x))


# By the name in a checkpoint's configuration.
ARCHITECTURES = {"cnn": DigitClassifier, "transformer": DigitTransformer}
