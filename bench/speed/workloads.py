"""The workloads of the optimizers: lists of parameter shapes."""

import math
from dataclasses import dataclass, replace

Shapes = tuple[tuple[int, ...], ...]

# A smoke run keeps this many tensors of a workload, and this many elements of a dimension.
_SMOKE_TENSORS = 4
_SMOKE_DIMENSION = 64


def _resnet50() -> Shapes:
    shapes: list[tuple[int, ...]] = []

    def convolution(outputs: int, inputs: int, kernel: int) -> None:
        # A batch norm follows each.
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


def _gpt2_small() -> Shapes:
    width = 768

    def linear(outputs: int, inputs: int) -> Shapes:
        return ((outputs, inputs), (outputs,))

    norm = ((width,), (width,))
    attention = (*linear(3 * width, width), *linear(width, width))
    feed_forward = (*linear(4 * width, width), *linear(width, 4 * width))
    block = (*norm, *attention, *norm, *feed_forward)
    # The read-out is the embedding, so it is no parameter of its own.
    return ((50257, width), (1024, width), *block * 12, *norm)


@dataclass(frozen=True)
class Workload:
    """A model as an optimizer sees it.

    Attributes:
        name: Its name in the results.
        shapes: Of the parameters, float32.
        rounds: Timed steps of a provider that keeps pace with the baseline.
        memory_bound: Whether the state is far larger than any cache, so that the byte model
            predicts the time.
    """

    name: str
    shapes: Shapes
    rounds: int
    memory_bound: bool

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def for_smoke(self) -> "Workload":
        """Return a workload of the same kind that takes no time."""
        shapes = tuple(
            tuple(min(size, _SMOKE_DIMENSION) for size in shape)
            for shape in self.shapes[:_SMOKE_TENSORS]
        )
        return replace(self, shapes=shapes, rounds=2)


_WORKLOADS = (
    Workload("one 30 M tensor", ((30_000_000,),), rounds=30, memory_bound=True),
    Workload("one 16 M tensor", ((16 * 2**20,),), rounds=30, memory_bound=True),
    Workload("1000 tensors of 256", ((256,),) * 1000, rounds=200, memory_bound=False),
    Workload("10,000 tensors of 16", ((16,),) * 10_000, rounds=100, memory_bound=False),
    Workload("ResNet-50", _resnet50(), rounds=20, memory_bound=True),
    Workload("GPT-2 small", _gpt2_small(), rounds=10, memory_bound=True),
)
# For a GPU: tens of gigabytes of state, and slots beyond what 32 bits count.
_BILLION = Workload("one 1 B tensor", ((1_000_000_000,),), rounds=10, memory_bound=True)
# The tensor that the memory of a step is measured on.
LARGE = _WORKLOADS[0]


def workloads(device: str) -> tuple[Workload, ...]:
    """Return the workloads of a device."""
    return (*_WORKLOADS, _BILLION) if device == "cuda" else _WORKLOADS
