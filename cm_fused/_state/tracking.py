"""An optimizer's state that counts its changes, so that a step does not look for them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from cm_fused._state.flush import flush_where_it_fits_


class Changes:
    """Counts how often entries of an optimizer's state were set or removed."""

    def __init__(self) -> None:
        self.count = 0


# The counter of dicts that belong to no optimizer.
_NOBODYS = Changes()


class _Counted(dict[Any, Any]):
    """A dict that counts its changes.

    Its methods are written out, since torch.compile traces no generated ones.
    """

    changes: Changes

    def _before_change(self, *keys: Any) -> None:
        """Count a change; `keys` are those that are replaced or removed by name."""
        self.changes.count += 1

    def __setitem__(self, key: Any, value: Any) -> None:
        self._before_change(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self._before_change(key)
        super().__delitem__(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self._before_change()
        return super().__ior__(other)

    def clear(self) -> None:
        self._before_change()
        super().clear()

    def pop(self, *arguments: Any) -> Any:
        self._before_change(*arguments[:1])
        return super().pop(*arguments)

    def popitem(self) -> tuple[Any, Any]:
        self._before_change()
        return super().popitem()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._before_change()
        return super().setdefault(key, default)

    def update(self, *arguments: Any, **items: Any) -> None:
        values = dict(*arguments, **items)
        self._before_change(*values)
        super().update(values)


class ParamState(_Counted):
    """The state of a parameter: a dict that counts its changes.

    A step of many small tensors would otherwise spend most of its time finding out that no entry
    was replaced. Code that walks nested data makes a new one from a mapping, as with a dict; its
    changes are counted once an optimizer's state has taken it over.
    """

    __slots__ = ("changes",)

    def __init__(self, values: Mapping[str, Any] = {}, changes: Changes | None = None) -> None:
        super().__init__(values)
        # Not a default argument: torch.compile of 2.11 cannot trace an object as such.
        self.changes = _NOBODYS if changes is None else changes

    def _before_change(self, *keys: Any) -> None:
        """Flush `exp_avg` to its slot before it is replaced."""
        if "exp_avg" in keys and "exp_avg" in self and "pending_slot" in self:
            flush_where_it_fits_(self)
        super()._before_change(*keys)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class OptimizerState(_Counted, defaultdict[Any, Any]):
    """The state of an optimizer, parameter to `ParamState`; counts changes of both.

    Its arguments are a defaultdict's, since a defaultdict copies itself by them, or a dict's: a
    mapping or pairs.
    """

    def __init__(
        self,
        default_factory: Callable[[], Any] | Mapping[Any, Any] | Iterable[Any] | None = dict,
        values: Mapping[Any, Any] = {},
    ) -> None:
        super().__init__(dict)
        self.changes = Changes()
        if default_factory is not None and not callable(default_factory):
            values = dict(default_factory)
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

    def tracks(self, key: Any) -> bool:
        """Return whether changes of a parameter's state are counted here."""
        state = self[key]
        return type(state) is ParamState and state.changes is self.changes


def _flatten(state: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(state.values()), list(state)


def _unflatten(kind: type[Any], values: Iterable[Any], keys: list[Any]) -> Any:
    return kind(dict(zip(keys, values, strict=True)))


def _flatten_with_keys(state: dict[Any, Any]) -> tuple[list[tuple[Any, Any]], list[Any]]:
    return [(pytree.MappingKey(key), value) for key, value in state.items()], list(state)


# A pytree walks only containers whose exact type it knows.
for _kind in (ParamState, OptimizerState):
    pytree.register_pytree_node(
        _kind, _flatten, partial(_unflatten, _kind), flatten_with_keys_fn=_flatten_with_keys
    )
