"""Refusals of an attached model: to save, copy, convert or load it without its experts, and not say so.

While a model is attached its experts' parameters are empty placeholders. Every method that reads or converts parameters
from outside would miss them in silence, so each refuses in one sentence that says how it can be done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from mobile.errors import Refused
from mobile.live_model.overrides import Overrides

SAVING = "The experts are in the host store, so saving would lose them; call mobile.detach(model) first."
COPYING = "An attached model cannot be copied or pickled: its experts are in the host store; call mobile.detach first."
LOADING = "The experts are in the host store, where load_state_dict does not reach; call mobile.detach(model) first."
OF_ADAPTERS = ("peft.utils.save_and_load", "transformers.core_model_loading")  # look into state_dict() for keys


def guard(outermost: nn.Module, experts: Sequence[nn.Module], overrides: Overrides) -> None:
    """Have `outermost` and every part of it that holds experts refuse what would lose or miss them."""
    for module in experts:
        overrides.hook(module.register_state_dict_pre_hook, _refuse_to_save)
    for module in holders(outermost, experts):
        if isinstance(module, PreTrainedModel):
            for name in ("save_pretrained", "push_to_hub"):
                overrides.put(module, name, partial(_refuse, SAVING))
        for name in ("__deepcopy__", "__reduce_ex__"):
            overrides.put(module, name, partial(_refuse, COPYING))
        keys = [f"{name}." for name, part in module.named_modules() if part in experts]
        overrides.hook(module.register_load_state_dict_pre_hook, partial(_refuse_to_load, keys))
        overrides.put(module, "_apply", partial(_apply_unless_it_converts, module, module._apply))


def holders(outermost: nn.Module, experts: Sequence[nn.Module]) -> list[nn.Module]:
    """Return every module that holds one of `experts` or is one, the outermost first."""
    inside = set(experts)
    return [module for module in outermost.modules() if not inside.isdisjoint(module.modules())]


def _refuse(sentence: str, *_: Any, **__: Any) -> NoReturn:
    raise Refused(sentence)


def _refuse_to_save(*_: Any) -> None:
    """Raise Refused, unless an adapter is read or written, which takes its own weights out of all that there are."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in OF_ADAPTERS:
            return
        frame = frame.f_back
    raise Refused(SAVING)


def _refuse_to_load(keys: Sequence[str], _module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise Refused, with nothing loaded, if `state` has weights of experts, whose keys begin like one of `keys`."""
    starts = tuple(f"{prefix}{key}" if key != "." else prefix for key in keys)
    if any(key.startswith(starts) for key in state):
        raise Refused(LOADING)


def _apply_unless_it_converts(
    module: nn.Module,
    apply: Callable[..., nn.Module],
    convert: Callable[[torch.Tensor], torch.Tensor],
    *more: Any,
    **named: Any,
) -> nn.Module:
    """Stand in for Module._apply, through which go to(), half(), cuda() and all their like: they may change nothing.

    Raise Refused, with nothing converted, if one of the module's tensors would get another dtype or device.
    """
    for dtype, device in _kinds(module.parameters()) | _kinds(module.buffers()):
        probe = torch.empty(0, dtype=dtype, device=device)
        became = convert(probe)
        if (became.dtype, became.device) != (dtype, device):
            raise Refused(
                f"An attached model stays {str(dtype).removeprefix('torch.')} on {device}: its experts are in the host "
                "store, which to(), half() and the like do not reach; call mobile.detach(model), convert, attach again."
            )
    return apply(convert, *more, **named)


def _kinds(tensors: Iterable[torch.Tensor]) -> set[tuple[torch.dtype, torch.device]]:
    return {(tensor.dtype, tensor.device) for tensor in tensors}
