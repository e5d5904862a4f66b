"""The VQ-VAE on one page: python3 minimal.py [EPOCHS]

The paper's equations (van den Oord et al. 2017, arXiv:1711.00937), trained on 9,000 of the bundled digits and tested on
1,000. At the end it writes minimal.png, over an earlier one. modules.py and vector_quantizer.py compute the same values
and gradients, faster, and keep the codes alive.

Letters: B images, h×w = 7×7 latents of one image, D the size of a latent vector, K the number of codes.
"""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("epochs", nargs="?", type=int, default=10)
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"EPOCHS {args.epochs} is not a positive integer")

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

import data

D, K = 40, 512
BETA = 0.25                                                           # weight of the commitment loss, the paper's


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(D, D, kernel_size=3, padding=1), nn.BatchNorm2d(D),
                                   nn.ReLU(), nn.Conv2d(D, D, kernel_size=1), nn.BatchNorm2d(D))

    def forward(self, x):
        return F.relu(x) + self.block(x)                              # (B, D, h, w)


class VQVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(                                 # (B, 1, 28, 28)
            nn.Conv2d(1, D, kernel_size=4, stride=2, padding=1), nn.BatchNorm2d(D), nn.ReLU(),       # (B, D, 14, 14)
            nn.Conv2d(D, D, kernel_size=4, stride=2, padding=1), ResidualBlock(), ResidualBlock())     # (B, D, 7, 7)
        self.codebook = nn.Parameter(torch.empty(K, D).uniform_(-1 / K, 1 / K))
        self.decoder = nn.Sequential(                                 # (B, D, 7, 7)
            ResidualBlock(), ResidualBlock(), nn.ReLU(),
            nn.ConvTranspose2d(D, D, kernel_size=4, stride=2, padding=1), nn.BatchNorm2d(D), nn.ReLU(),
            nn.ConvTranspose2d(D, 1, kernel_size=4, stride=2, padding=1), nn.Tanh())                   # (B, 1, 28, 28)

    def quantize(self, z_e):
        """The nearest code to each latent: z_e (B, D, h, w) → e (B, D, h, w), and its index k (B, h, w)."""
        latents = z_e.permute(0, 2, 3, 1)                             # (B, h, w, D)
        k = torch.cdist(latents.flatten(0, 2), self.codebook).argmin(dim=1)         # eq. 1, argmin_j ‖z_e(x) − e_j‖
        e = self.codebook[k].view(latents.shape)                      # eq. 2, z_q(x) = e_k
        return e.permute(0, 3, 1, 2), k.view(latents.shape[:3])

    def forward(self, x):
        """Images x (B, 1, 28, 28) in [-1, 1] → their reconstructions, and the three losses of eq. 3."""
        z_e = self.encoder(x)
        e, _ = self.quantize(z_e)
        z_q = z_e + (e - z_e).detach()                                # straight-through: value e, gradient to z_e
        x_hat = self.decoder(z_q)
        reconstruction = F.mse_loss(x_hat, x)                         # −log p(x|z_q), up to constants
        codebook = F.mse_loss(e, z_e.detach())                        # ‖sg[z_e] − e‖²: moves the codes
        commitment = F.mse_loss(z_e, e.detach())                      # ‖z_e − sg[e]‖²: moves the encoder
        return x_hat, reconstruction, codebook, commitment


def main(epochs=10):
    torch.manual_seed(0)
    train_set, test_set = data.load("MNIST-10k", "MNIST")
    test_images = data.to_model_range(test_set.images)                # (1000, 1, 28, 28) in [-1, 1]
    model = VQVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    # The codes start on latents: of those that start around the origin, hardly any would ever be chosen.
    with torch.no_grad():
        latents = model.encoder(data.to_model_range(train_set.images[:128])).permute(0, 2, 3, 1).flatten(0, 2)
        model.codebook.copy_(latents[torch.randperm(len(latents))[:K]])

    for epoch in range(1, epochs + 1):
        model.train()
        for images, _ in data.batches(train_set, batch_size=64, generator=torch.Generator().manual_seed(epoch)):
            x = data.to_model_range(images)                           # (B, 1, 28, 28)
            _, reconstruction, codebook, commitment = model(x)
            loss = reconstruction + codebook + BETA * commitment      # eq. 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        with torch.no_grad():
            x_hat, reconstruction, _, commitment = model(test_images)
            used = model.quantize(model.encoder(test_images))[1].unique().numel()
        print(f"epoch {epoch}: test reconstruction loss {reconstruction:.4f}, commitment loss {commitment:.4f}, "
              f"{used} of {K} codes used", flush=True)

    rows = torch.cat([pair for i in range(0, 50, 10) for pair in (test_images[i:i + 10], x_hat[i:i + 10])])
    save_image(rows, "minimal.png", nrow=10, normalize=True, value_range=(-1, 1))
    print("minimal.png: rows of test digits, each above its reconstructions")


if __name__ == "__main__":
    main(args.epochs)
