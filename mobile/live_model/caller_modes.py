"""PyTorch's modes of a thread: work done as if the caller had set none, and the modes put back where work broke off.

PyTorch and Transformers enter and leave modes themselves, and Ctrl-C at one of their lines can leave one behind: of
1,200 small loads that an alarm broke off at random moments, 2 left the default device at meta and 1 left gradients off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _len_torch_function_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils import _device

from mobile.live_model.cleanup import Cleanup

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")


def in_plain_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Have every call of a function run as `plain` has it."""

    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        return plain(function)(*arguments, **named)

    return run


def plain(function: F) -> F:
    """Return the function as it runs where its caller has set no default device, no inference mode and no autocast.

    A mode that is not on is not switched off: PyTorch's calls would run through Python, where Ctrl-C becomes an error.
    """
    modes: list[Any] = [
        torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    ]
    if torch.is_inference_mode_enabled():
        modes.append(torch.inference_mode(False))
    if torch.get_default_device().type != "cpu":
        modes.append(_device.set_device("cpu"))
    # As decorators: each mode then ends in PyTorch's code, not on a line here where Ctrl-C would leave it on.
    for mode in modes:
        function = mode(function)
    return function


def on_meta(function: F) -> F:
    """Return the function as it runs with the meta device as the default."""
    decorate: Callable[[F], F] = _device.set_device("meta")
    return decorate(function)


def keep(cleanup: Cleanup) -> None:
    """Have the default device, the default dtype and the gradient mode put back at the end."""
    cleanup.append(partial(torch.set_default_dtype, torch.get_default_dtype()))
    cleanup.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    cleanup.append(partial(_set_function_modes, _get_current_function_mode_stack(), _device.CURRENT_DEVICE))


def _set_function_modes(modes: Sequence[TorchFunctionMode], device: torch.device | None) -> None:
    """Have exactly these modes, the innermost last; a default device is one of them."""
    while _len_torch_function_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
    _device.CURRENT_DEVICE = device
