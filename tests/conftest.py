"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """Seed torch's generator; one thread, unless a test asks for more, as tensors are tiny."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
