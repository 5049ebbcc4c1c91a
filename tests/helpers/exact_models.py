"""Models for `--precision exact`, as users write them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with group norm, as in a ResNet."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(2, out), nn.GroupNorm(2, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def resnet(classes: int) -> nn.Module:
    """A small ResNet."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, 3), Block(4, 4, 1), Block(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, classes),
    )  # fmt: skip


class Attention(nn.Module):
    """Self-attention, written out."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.heads, self.dropout = heads, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, size = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / (size // self.heads) ** 0.5
        weights = self.dropout(scores.softmax(dim=-1))
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, size))


class VisionTransformer(nn.Module):
    """A small vision transformer: two ways to attend, a class token, positions, and a scale of a branch."""

    def __init__(self, classes: int, size: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, size, 7, 7)
        self.token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = nn.Parameter(torch.randn(1, 17, size) * 0.1)
        self.norm, self.attention = nn.LayerNorm(size), Attention(size, 2)
        self.scale = nn.Parameter(torch.full((size,), 0.5))
        self.encoder = nn.TransformerEncoderLayer(
            size, 2, 16, dropout=0.1, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        x = x + self.scale * self.attention(self.norm(x))
        return self.head(self.encoder(x)[:, 0])


def vit(classes: int) -> nn.Module:
    """A small vision transformer."""
    return VisionTransformer(classes)


def separable(classes: int) -> nn.Module:
    """Depthwise separable convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, padding=1), nn.ReLU6(), nn.Conv2d(6, 6, 3, 2, padding=2, dilation=2, groups=6,
        bias=False), nn.SiLU(), nn.Conv2d(6, 8, 1), nn.Hardtanh(), nn.Dropout2d(0.2), nn.Conv2d(8, 8, 3,
        padding="same", groups=4), nn.AvgPool2d(2, 2, 1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(8 * 16,
        classes),
    )  # fmt: skip


class Branching(nn.Module):
    """Refused: which layer it uses depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer(images.flatten(1))
        return x if x.sum() > 0 else F.relu(x)


class InEvaluation(nn.Module):
    """Refused: it has an inexact layer in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(784, 10), nn.Softsign()

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer(images.flatten(1))
        return x if self.training else self.last(x)


def branching(classes: int) -> nn.Module:
    """A model that is refused."""
    return Branching()


def in_evaluation(classes: int) -> nn.Module:
    """A model that is refused."""
    return InEvaluation()


class OneOutput(nn.Module):
    """Refused: `linear` with a vector of weights, which only torch's has."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight, self.classes = nn.Parameter(torch.zeros(784)), classes

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight).unsqueeze(1).expand(-1, self.classes)


def one_output(classes: int) -> nn.Module:
    """A model that is refused."""
    return nn.Sequential(nn.Flatten(), OneOutput(classes))


def batch_norm(classes: int) -> nn.Module:
    """A model that is refused."""
    return nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, classes))
