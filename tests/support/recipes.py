"""The recipes of `docs/recipes.md` that run in processes of their own.

`python -m tests.support.recipes timm FOLDER` runs that of timm, in FOLDER.
"""

import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from cm_fused import AdamWCM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
# Where the Makefile installs timm and the torchvision that it imports.
TIMM = Path(sys.prefix) / "timm"


def recipe(heading: str) -> str:
    """Return the Python block under a heading of the page."""
    _, _, section = PAGE.read_text().partition(f"\n## {heading}\n")
    return re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)[0]  # type: ignore[no-any-return]


def _import_timm() -> None:
    """Make timm's import possible, also beside a torch without CUDA.

    Such a torch does not load the library of PyPI's torchvision, and torchvision then fails where
    it names two operators of that library. Nothing here calls them.
    """
    sys.path.append(str(TIMM))
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(  # type: ignore[no-untyped-call]
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        _libraries.append(library)
    import timm.optim  # noqa: F401


_libraries: list[Any] = []  # whose operators live as long as they do


def _train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def _run_timm() -> None:
    """Check the optimizer of the recipe, and others that the registry makes by the same name."""
    _import_timm()
    names: dict[str, Any] = {}
    exec(compile(recipe("timm"), "timm", "exec"), names)
    optimizer, model = names["optimizer"], names["model"]
    assert type(optimizer) is AdamWCM
    norms_and_biases, weights = optimizer.param_groups
    assert (norms_and_biases["weight_decay"], weights["weight_decay"]) == (0.0, 0.05)
    assert [param.dim() for param in weights["params"]] == [2, 2]
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}

    # As of timm's command line: names, numbers and a list. A prefix wraps it.
    options = {"betas": [0.9, 0.99], "capacity": 3, "buffer_dtype": "int8", "lr": 0.1}
    for name in ("AdamWCM", "lookahead_adamwcm"):
        results = []
        for halves in (range(8),), (range(4), range(4, 8)):
            copied = copy.deepcopy(model)
            saved = None
            for steps in halves:
                optimizer = names["create_optimizer_v2"](copied, name, weight_decay=0.1, **options)
                if saved is not None:
                    optimizer.load_state_dict(saved)
                _train(optimizer, steps)
                saved = optimizer.state_dict()
            base = getattr(optimizer, "_base_optimizer", optimizer)
            assert (type(base), base.defaults["capacity"]) == (AdamWCM, 3)
            results.append(list(copied.parameters()))
        assert all(map(torch.equal, *results))
        assert not any(map(torch.equal, results[0], model.parameters()))


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    {"timm": _run_timm}[sys.argv[1]]()
