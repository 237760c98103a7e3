"""The paper's models in plain torch."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class LanguageModel(nn.Module):
    """A single-layer LSTM language model: embedding, LSTM, linear read-out.

    Args:
        tokens: Size of the vocabulary.
        width: Of the embedding and of the hidden state.
    """

    def __init__(self, tokens: int, width: int = 200) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.readout = nn.Linear(width, tokens)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits (batch, time, tokens) of what follows each int64 token of ``text``."""
        hidden, _ = self.lstm(self.embedding(text))
        return cast(Tensor, self.readout(hidden))


class _WideBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        alike = channels == out_channels
        self.shortcut = None if alike else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.norm1(x))
        # A projection reads what is activated, an identity what came in.
        residual = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv2(functional.relu(self.norm2(self.conv1(activated))))
        return cast(Tensor, out + residual)


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(out + self.shortcut(x))


def _read_out(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def wide_resnet(depth: int, width: int, classes: int, channels: int = 3) -> nn.Sequential:
    """Return the wide residual network WRN-depth-width for small images.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (2016).

    Args:
        depth: Number of convolutions, 6n + 4.
        width: Multiplies the channels 16, 32 and 64 of the three stages.
        classes: Number of logits.
        channels: Of the images.

    Raises:
        ValueError: The depth is not 6n + 4.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 4 with n >= 1, got {depth}")
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    before = 16
    for stage in range(3):
        after = 16 * width * 2**stage
        for i in range(blocks):
            layers.append(_WideBlock(before, after, stride=2 if stage and not i else 1))
            before = after
    return nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU(), *_read_out(before, classes))


def resnet34(classes: int) -> nn.Sequential:
    """Return ResNet-34 for 32x32 images: a 3x3 first convolution and no pooling after it.

    Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2015).

    Args:
        classes: Number of logits.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        after = 64 * 2**stage
        for i in range(blocks):
            layers.append(_BasicBlock(before, after, stride=2 if stage and not i else 1))
            before = after
    return nn.Sequential(*layers, *_read_out(before, classes))


def efficientnet_b0(classes: int) -> nn.Module:
    """Return timm's EfficientNet-B0, freshly initialised.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "EfficientNet-B0 comes from timm, which is not installed: pip install timm"
        ) from error
    model: nn.Module = timm.create_model("efficientnet_b0", num_classes=classes)
    return model


def parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(map(torch.numel, model.parameters()))
