"""A device that is not the CPU, where there is none: ``far``, played by CPU memory, with a GPU's rules for operands.

A tensor on it is a :class:`Far`: what it holds lies in CPU memory, what it says of itself is ``far:0``. Its
dispatcher computes on what is held, wraps what comes out, and refuses what a GPU refuses: operands on two devices
(numbers without dimensions, indices and copies are let through, as there), generators of the CPU for draws on the
device, and ``numpy`` of its tensors. It says nothing about kernels, precision, streams or memory.

Its first use registers the device in the process for good: use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only


class _Module:
    """What ``torch.far`` answers."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


FAR = "far"
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._local_scalar_dense.default)
_INDEXING = (  # what is indexed, indices, and in some values
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class Mixed(RuntimeError):
    """Operands on two devices, in the words of a real one."""


class Far(Tensor):
    """A tensor that says it is on the device.

    Attributes:
        held: its values, in CPU memory.
    """

    held: Tensor

    @staticmethod
    def __new__(cls: type[Far], held: Tensor) -> Far:  # noqa: PYI034
        """A wrapper around values in CPU memory."""
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(FAR, 0),
        )
        made.held = held
        return cast(Far, made)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Far:
        return Far(inner["held"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Far({self.held!r})"

    def tolist(self) -> Any:
        """The values, copied to the CPU (a subclass has to say so itself)."""
        return self.detach().cpu().tolist()

    def storage(self) -> Any:
        """Where the values lie: libraries that save ask which tensors share memory."""
        return self.held.storage()

    def untyped_storage(self) -> Any:
        """As :meth:`storage`."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation as the device would.

    Raises:
        Mixed: its operands are on two devices.
    """
    operands = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    far = any(isinstance(value, Far) for value in operands)
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if not far and (wanted is None or wanted.type != FAR):
        return func(*args, **kwargs)
    if far and _mixed(func, args, operands):
        raise Mixed(
            f"Expected all tensors to be on the same device, but found at least two devices, {FAR} and cpu! "
            f"({func}: {[(type(each).__name__, tuple(each.shape)) for each in operands]})"
        )
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != FAR:
        raise Mixed(f"Expected a '{FAR}' device type for generator but found '{generator.device.type}' ({func})")
    if func is torch.ops.aten._fused_sdp_choice.default:
        return 0  # the kernel written out; the others have operators of their own on every device
    stays = wanted is not None and wanted.type != FAR  # a copy to another device
    if wanted is not None and wanted.type == FAR:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    out = func(*_held(args), **_held(kwargs))
    if stays:
        return out
    if func is torch.ops.aten.copy_.default and not isinstance(args[0], Far):
        return args[0]
    wrapped = tree_map_only(Tensor, lambda value: Far(_filled(value)), out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if far else wrapped


def _mixed(func: Any, args: tuple[Any, ...], operands: list[Tensor]) -> bool:
    """Whether a GPU would refuse these operands, of which at least one is on the device."""
    if func in _COPIES:
        return False
    if func in _INDEXING:  # indices of the CPU are let through, values without dimensions too
        operands = [value for value in (args[0], *args[2:3]) if isinstance(value, Far) or value.dim()]
        return not all(isinstance(value, Far) for value in operands)
    numbers = torch.Tag.pointwise in func.tags
    return not all(isinstance(value, Far) or (numbers and value.dim() == 0) for value in operands)


def _filled(value: Tensor) -> Tensor:
    """Forward derivatives make zeros without memory, which only the layers above understand."""
    return torch.zeros(value.shape, dtype=value.dtype) if value._is_zerotensor() else value


def _held(tree: Any) -> Any:
    return tree_map_only(Far, lambda value: value.held, tree)


def _made_there(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that asks for the device without a tensor on it."""
    return compute(func, args, kwargs)


@cache
def _registered() -> torch.library.Library:
    """Make the device known to torch, once."""
    backend_registration._setup_privateuseone_for_python_backend(FAR, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_made_there, "PrivateUse1")
    return library


def _pinned(value: Tensor, device: Any = None) -> Tensor:
    if isinstance(value, Far):
        raise Mixed("cannot pin a tensor of the device, only dense CPU tensors can be pinned")
    return value


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Have the device for the duration of a ``with`` block.

    Yields:
        The device.
    """
    _registered()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=far): made on the CPU, then copied
    try:
        with patch.object(Tensor, "pin_memory", _pinned):
            yield torch.device(FAR, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swap)
