"""An optimizer's state that counts its changes, so that a step need not look for them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Changes:
    """Counts how often entries of an optimizer's state were set or removed."""

    def __init__(self) -> None:
        self.count = 0


# Of dicts that are no optimizer's.
_NOBODYS = Changes()


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
    was replaced. What walks nested data makes another one of a mapping, as of a dict; it counts
    once an optimizer's state takes it over.
    """

    __slots__ = ("changes",)

    def __init__(self, values: Mapping[str, Any] = {}, changes: Changes = _NOBODYS) -> None:
        super().__init__(values)
        self.changes = changes

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class OptimizerState(_Counted, defaultdict[Any, Any]):
    """The state of an optimizer, parameter to `ParamState`; counts changes of both.

    Made as a defaultdict is, since that is how a defaultdict copies itself, or of a mapping alone,
    as a dict is.
    """

    def __init__(
        self, default_factory: type[Any] | Mapping[Any, Any] = dict, values: Mapping[Any, Any] = {}
    ) -> None:
        super().__init__(dict)
        self.changes = Changes()
        if isinstance(default_factory, Mapping):
            values = default_factory
        for key, value in values.items():
            self[key] = ParamState(value, self.changes) if isinstance(key, Tensor) else value

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(value) is ParamState and value.changes is _NOBODYS:
            value.changes = self.changes
        super().__setitem__(key, value)

    def __missing__(self, key: Any) -> ParamState:
        self[key] = state = ParamState({}, self.changes)
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))

    def counts(self, key: Any) -> bool:
        """Return whether changes of a parameter's state are counted here."""
        state = self[key]
        return type(state) is ParamState and state.changes is self.changes


def _flatten(state: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(state.values()), list(state)


# A pytree walks only what it knows by its exact type.
pytree.register_pytree_node(
    ParamState,
    _flatten,
    lambda values, keys: ParamState(dict(zip(keys, values, strict=True))),
)
pytree.register_pytree_node(
    OptimizerState,
    _flatten,
    lambda values, keys: OptimizerState(dict(zip(keys, values, strict=True))),
)
