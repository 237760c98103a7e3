"""The two models."""

from torch import Tensor, nn


def digit_net() -> nn.Sequential:
    """Return three convolutions and two linear layers for 8x8 images of 10 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class ByteLSTM(nn.Module):
    """A language model over bytes: embedding, one LSTM layer, linear read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.lstm = nn.LSTM(64, 192, batch_first=True)
        self.readout = nn.Linear(192, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the byte that follows each byte of ``text``.

        Args:
            text: int64 bytes, (batch, time).
        """
        hidden, _ = self.lstm(self.embedding(text))
        logits: Tensor = self.readout(hidden)
        return logits
