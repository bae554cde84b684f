"""torch's containers of modules, with the class of their members for the type checker: `ModuleDict[Tower]`.

When the program runs these are `nn.ModuleDict` and `nn.ModuleList` themselves. For the same reason the modules here
say `if TYPE_CHECKING: __call__ = forward`: torch types a call of any module as one of anything that returns Any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
    from typing import Generic, TypeVar

    M = TypeVar("M", bound=nn.Module)

    class ModuleDict(nn.ModuleDict, Generic[M]):
        def __init__(self, modules: Mapping[str, M] | None = None) -> None: ...
        def __getitem__(self, key: str) -> M: ...
        def items(self) -> ItemsView[str, M]: ...
        def values(self) -> ValuesView[M]: ...

    class ModuleList(nn.ModuleList, Generic[M]):
        def __init__(self, modules: Iterable[M] | None = None) -> None: ...
        def __getitem__(self, index: int) -> M: ...  # type: ignore[override]  # no slices
        def __iter__(self) -> Iterator[M]: ...

else:
    ModuleDict, ModuleList = nn.ModuleDict, nn.ModuleList
