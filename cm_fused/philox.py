"""The random numbers of stochastic rounding: Philox, a function of a counter and a key.

No generator is kept and none of torch's is touched: the words of an element depend on the seed, the
parameter's index, the step and the element alone, whatever the backend, the number of threads or
the interruptions of a run.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The fewest rounds at which Philox-4x32 passes BigCrush, and the number its authors recommend for
# speed is 7, with 10 for a margin (Salmon et al., section 4.4 and table 2).
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
# The words of one counter, which serve as many consecutive elements.
WORDS = 4


class ShardLayout(NamedTuple):
    """The positions of a parameter's local elements in the full parameter.

    Both are counted in memory order: element e is the full parameter's element
    `offset + (e div length) * stride + e mod length`. The default is the full parameter.

    Attributes:
        offset: Of the first element.
        length: Of the runs of consecutive elements, >= 1.
        stride: From the start of one run to that of the next; equal to `length` where all local
            elements are one run.
    """

    offset: int = 0
    length: int = 1
    stride: int = 1


FULL = ShardLayout()


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> list[Tensor]:
    """Return the four words of each counter.

    Args:
        counter: Four int64 tensors of one shape, with values in [0, 2^32).
        key: Two numbers in [0, 2^32).

    Returns:
        Four int64 tensors of that shape, with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        # The product's low 64 bits are its bits, whatever their sign.
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + WEYL[0]) & _WORD, (key1 + WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def random_words(
    seed: int,
    param_index: int,
    step: Tensor,
    numel: int,
    layout: ShardLayout = FULL,
) -> Tensor:
    """Return one word for each element of a parameter, in the state's memory order.

    Element p of the whole parameter has word p mod 4 of the counter (p div 4, param_index, step)
    under the key `seed`.

    Args:
        seed: In [0, 2^63).
        param_index: The parameter's place among the optimizer's, in [0, 2^32).
        step: The step, counted from 1; any dtype, ().
        numel: Elements of the parameter that this process holds.
        layout: Where they lie in the whole parameter.

    Returns:
        int64 (numel,) with values in [0, 2^32).
    """
    if layout.length != layout.stride:
        elements = torch.arange(numel, dtype=torch.int64, device=step.device)
        runs = torch.div(elements, layout.length, rounding_mode="floor")
        whole = elements + (layout.offset + runs * (layout.stride - layout.length))
        quads = torch.div(whole, WORDS, rounding_mode="floor")
        words = _words_of(seed, param_index, step, quads)
        return words.gather(1, (whole % WORDS).unsqueeze(1)).squeeze(1)
    first, skipped = divmod(layout.offset, WORDS)
    quads = torch.arange(-(-(skipped + numel) // WORDS), dtype=torch.int64, device=step.device)
    words = _words_of(seed, param_index, step, first + quads)
    return words.flatten()[skipped : skipped + numel]


def _words_of(seed: int, param_index: int, step: Tensor, quads: Tensor) -> Tensor:
    """Return the words of each four elements, int64 (quads, 4)."""
    counter = (
        quads & _WORD,
        quads >> 32,
        torch.full_like(quads, param_index),
        (step.to(torch.int64) & _WORD).expand_as(quads),
    )
    return torch.stack(philox(counter, (seed & _WORD, seed >> 32)), dim=1)
