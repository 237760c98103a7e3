"""The precisions that are compared, and what is trained with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.demo.data import stdlib_text
from bench.demo.tasks import TASKS as DEMO_TASKS
from bench.demo.tasks import Task, perplexity
from cm_fused.rounding import INT4

BASELINE = "float32"


@dataclass(frozen=True)
class Precision:
    """How the state is kept.

    Args:
        buffer_dtype: As of `AdamCM`.
        moment_dtype: As of `AdamCM`.
        backend: As of `AdamCM`.
    """

    buffer_dtype: torch.dtype | None = None
    moment_dtype: torch.dtype | None = None
    backend: str | None = None


# The eager backend rounds float32 otherwise: what a run's last bits do to it by themselves.
PRECISIONS = {
    BASELINE: Precision(),
    "float32, eager": Precision(backend="eager"),
    "bfloat16 slots": Precision(torch.bfloat16),
    "float16 slots": Precision(torch.float16),
    "float8 slots": Precision(torch.float8_e4m3fn),
    "int8 slots": Precision(torch.int8),
    "int8 slots, bfloat16 moments": Precision(torch.int8, torch.bfloat16),
    "int8 slots, int8 moments": Precision(torch.int8, torch.int8),
    "int4 slots": Precision(INT4),
    "int4 slots, bfloat16 moments": Precision(INT4, torch.bfloat16),
    "int4 slots, int8 moments": Precision(INT4, torch.int8),
}


@dataclass(frozen=True)
class Timed:
    """A step that is timed only: its moments and slots are float32 unless its options say more.

    Args:
        param_dtype: Of the parameter.
        grad_dtype: Of its gradient.
        options: Of `AdamCM`.
    """

    param_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)


_HALF = torch.bfloat16
TIMED = {
    "float32 parameters, bfloat16 gradients": Timed(grad_dtype=_HALF),
    **{
        f'bfloat16 parameters, "{how}"': Timed(_HALF, _HALF, {"low_precision_update": how})
        for how in ("nearest", "stochastic", "kahan", "split")
    },
    "capacity=0": Timed(options={"capacity": 0}),
    "capacity=0, bfloat16 moments": Timed(options={"capacity": 0, "moment_dtype": _HALF}),
}


class ByteTransformer(nn.Module):
    """Predicts each byte from those before it: two pre-norm layers of self-attention."""

    def __init__(self, width: int = 64, length: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.read_out = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (batch, length, 256) of the bytes int64 (batch, length)."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embedding(text) + self.positions[:length]
        logits: Tensor = self.read_out(self.layers(x, mask=mask, is_causal=True))
        return logits


# Those of `make demo`, and one more.
TASKS = {
    **DEMO_TASKS,
    "bytes transformer": Task(
        name="bytes transformer",
        title="Byte transformer on the standard library's sources",
        loss_unit="nats per byte",
        load=stdlib_text,
        build=ByteTransformer,
        batch_size=16,
        steps=400,
        learning_rates={"AdamCM": 1e-3},
        score=perplexity,
        score_name="perplexity",
    ),
}
