"""An optimizer's state that counts its changes, so that a step need not look for them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Changes:
    """Counts how often entries of an optimizer's state were set or removed."""

    def __init__(self) -> None:
        self.count = 0


class _Counted(dict[Any, Any]):
    """A dict that counts its changes.

    Written out, since torch.compile traces no generated methods.
    """

    changes: Changes

    def __setitem__(self, key: Any, value: Any) -> None:
        self.changes.count += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.changes.count += 1
        super().__delitem__(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.changes.count += 1
        return super().__ior__(other)

    def clear(self) -> None:
        """Count, and clear."""
        self.changes.count += 1
        super().clear()

    def pop(self, *arguments: Any) -> Any:
        """Count, and pop."""
        self.changes.count += 1
        return super().pop(*arguments)

    def popitem(self) -> tuple[Any, Any]:
        """Count, and pop an item."""
        self.changes.count += 1
        return super().popitem()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Count, and set where there is nothing."""
        self.changes.count += 1
        return super().setdefault(key, default)

    def update(self, *arguments: Any, **items: Any) -> None:
        """Count, and update."""
        self.changes.count += 1
        super().update(*arguments, **items)


class ParamState(_Counted):
    """The state of a parameter: a dict that counts its changes.

    A step of many small tensors would otherwise spend most of its time finding out that no entry
    was replaced.
    """

    __slots__ = ("changes",)

    def __init__(self, values: Mapping[str, Any], changes: Changes) -> None:
        super().__init__(values)
        self.changes = changes

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class OptimizerState(_Counted, defaultdict[Any, Any]):
    """The state of an optimizer, parameter to `ParamState`; counts changes of both.

    Made as a defaultdict is, since that is how a defaultdict copies itself.
    """

    def __init__(self, default_factory: type[Any] = dict, values: Mapping[Any, Any] = {}) -> None:
        super().__init__(default_factory)
        self.changes = Changes()
        for key, value in values.items():
            self[key] = ParamState(value, self.changes) if isinstance(key, Tensor) else value

    def __missing__(self, key: Any) -> ParamState:
        self[key] = state = ParamState({}, self.changes)
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))
