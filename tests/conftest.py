"""What every test starts from."""

import atexit
import gc
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Modules and tests stay to the end: garbage is not looked for among them, which takes seconds. But
# at exit it is, where nanobind names what is not freed.
gc.disable()
atexit.register(gc.unfreeze)

# Before anything imports the kernels: without a GPU they are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.support import interpreter

    interpreter.mend()


# Interpreted, a step takes a hundred times as long as compiled. What such a test holds is the
# optimizer's, the same for every backend, or the kernel's for one combination of many: of those for
# triton some are enough. 13 has no divisor in common with the numbers of values of most parameters,
# so that all of them come up.
_SAMPLED = 13


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option to leave nothing out."""
    parser.addoption("--every-case", action="store_true", help="run all cases of sampled tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one in 13 of a sampled test's cases with Triton kernels, the first among them."""
    if config.getoption("--every-case"):
        return
    seen: Counter[Any] = Counter()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("sampled") and _runs_kernels(item):
            seen[item.originalname] += 1  # type: ignore[attr-defined]
            sampled = seen[item.originalname] % _SAMPLED == 1  # type: ignore[attr-defined]
            (kept if sampled else left_out).append(item)
        else:
            kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from now on, but only of what tests make, and seldom: tracing makes much."""
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


def _runs_kernels(item: Any) -> bool:
    """Return whether a test runs kernels in Python: interpreted, or their compiled code."""
    case = getattr(item, "callspec", None)
    return case is not None and ("triton" in case.params.values() or "workers" in item.fixturenames)


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """Seed torch's generator; one thread, unless a test asks for more, as tensors are tiny."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Forget what torch.compile has compiled, before a test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
