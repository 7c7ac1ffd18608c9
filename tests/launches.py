"""Counts of what a forward pass asks of a device, taken on a CPU: where the host would wait, and what is launched.

A `wait` is what cannot return before a CUDA device has run everything launched: a value that is read (`tolist`), a
shape that depends on values (`nonzero`, `unique`, a mask among indices), and a blocking copy between ordinary memory
and the device. A `launch` is an operator that is no view and does more than take memory. Each is counted at a place:
"layer" (a decoder layer outside of its experts), "experts", "rest" (of a forward pass of the stock model), "between"
(passes), "replay" (routers asked again), and "copies" (of experts' rows, which a link makes beside all that).

Tensors that a transfer brought to host memory are told from those of the device. One that was brought without waiting
and is read before something waited is counted under `unready`: a card would have given anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "cpu", "__contains__"}
SHAPES = {"nonzero", "argwhere", "_unique2", "unique_dim", "unique_consecutive", "bincount", "masked_select", "equal"}
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "lift_fresh"}
HOST, UNREADY = "_counted_on_host", "_counted_unready"


class Counts:
    """The waits and launches by place, and what each wait was."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.unready: Counter[str] = Counter()
        self.causes: Counter[tuple[str, str]] = Counter()
        self.operators: Counter[tuple[str, str]] = Counter()
        self.places = ["outside"]
        self.under_way: list[torch.Tensor] = []  # brought to the host, and not waited for

    def wait(self, cause: str) -> None:
        self.waits[self.places[-1]] += 1
        self.causes[self.places[-1], cause] += 1
        self.all_ready()

    def all_ready(self) -> None:
        """Note that everything launched is over, and with it every transfer."""
        for tensor in self.under_way:
            vars(tensor).pop(UNREADY, None)
        self.under_way.clear()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        self.places.append(place)
        try:
            yield
        finally:
            self.places.pop()

    def placed(self, place: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*arguments: Any, **named: Any) -> Any:
            with self.at(place):
                return call(*arguments, **named)

        return inside


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _on_host(tensors: list[torch.Tensor]) -> bool:
    return bool(tensors) and all(hasattr(tensor, HOST) for tensor in tensors)


class _Functions(TorchFunctionMode):
    """Waits that show in the call and not in an operator, and which tensors lie in host memory."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), _tensors((args, kwargs))
        on_host = _on_host(given)
        if name in READS and not on_host:
            self.counts.wait(name)
        elif name in READS and any(hasattr(tensor, UNREADY) for tensor in given):
            self.counts.unready[self.counts.places[-1]] += 1
        if name == "tensor" and kwargs.get("device", "cpu") != "cpu":
            self.counts.wait("torch.tensor(..., device=...)")
        if name in READS or kwargs.get("device") == "cpu":  # one wait, whatever it is made of; no launch on the host
            with torch._C.DisableTorchFunction(), self.counts.at("counted"):
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        made = [tensor for tensor in _tensors(result) if not any(tensor is one for one in given)]
        if name in ("to", "cpu"):
            return self._moved(name, func, args, kwargs, result, on_host)
        made_there = (
            name == "from_numpy" or kwargs.get("device") == "cpu" or (name == "tensor" and "device" not in kwargs)
        )
        if on_host or (made_there and not given):
            for tensor in made:
                setattr(tensor, HOST, True)
                if any(hasattr(one, UNREADY) for one in given):
                    setattr(tensor, UNREADY, True)
        return result

    def _moved(self, name: str, func: Any, args: tuple, kwargs: Any, result: Any, on_host: bool) -> Any:
        target = kwargs.get("device", next((each for each in args[1:] if isinstance(each, str | torch.device)), None))
        waits = not kwargs.get("non_blocking", False)
        if name == "cpu" or target == "cpu":  # to the host
            moved = result.detach() if result is args[0] else result
            setattr(moved, HOST, True)
            if not on_host and not waits:
                setattr(moved, UNREADY, True)
                self.counts.under_way.append(moved)
                self.counts.launches[self.counts.places[-1]] += 1
                self.counts.operators[self.counts.places[-1], "copy to the host"] += 1
            return moved
        if target is not None and on_host:  # to the device
            if waits:
                self.counts.wait("to(device)")
            self.counts.launches[self.counts.places[-1]] += 1
            self.counts.operators[self.counts.places[-1], "copy to the device"] += 1
            return result.detach() if result is args[0] else result
        return result


class _Operators(TorchDispatchMode):
    """Operators, as they are dispatched."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        counts, kwargs = self.counts, kwargs or {}
        name, place = func._schema.name.removeprefix("aten::"), counts.places[-1]
        given = _tensors((args, kwargs))
        if _on_host(given) or place == "counted":
            return func(*args, **kwargs)
        if any(hasattr(tensor, HOST) for tensor in given if tensor.ndim):
            counts.wait(f"{name} of tensors here and there")
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in SHAPES or masked or name == "_local_scalar_dense":
            counts.wait("mask among indices" if masked else name)
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not is_view and name not in FREE and name != "detach":
            counts.launches[place] += 1
            counts.operators[place, name] += 1
        return func(*args, **kwargs)


@contextmanager
def counted(model: Any) -> Iterator[Counts]:
    """Count inside the block what forward passes of a model ask for, be it attached or stock."""
    counts = Counts()
    engine = getattr(model, "mobile", None)
    with ExitStack() as stack:
        # 1. Places: decoder layers that hold experts, the experts themselves, passes, and what is between them.
        experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
        for layer in model.modules():
            if any(part in experts for part in layer.children()) or any(
                part in experts for child in layer.children() for part in child.children()
            ):
                if not hasattr(layer, "self_attn") and not hasattr(layer, "mixer"):
                    continue
                stack.callback(setattr, layer, "forward", layer.forward) if "forward" in vars(
                    layer
                ) else stack.callback(vars(layer).pop, "forward")
                layer.forward = counts.placed("layer", layer.forward)
        for module in experts:
            _replace(stack, module, "forward", counts.placed("experts", module.forward))
        _replace(stack, model, "forward", counts.placed("rest" if engine is None else "between", model.forward))
        if engine is not None:
            _watch(stack, counts)
        stack.enter_context(counting(counts))
        yield counts


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count inside the block whatever is called, at the place where `counts` is."""
    with _Operators(counts), _Functions(counts):
        yield


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    own = vars(owner)
    if name in own:
        stack.callback(setattr, owner, name, own[name])
    else:
        stack.callback(own.pop, name)
    setattr(owner, name, value)


def _watch(stack: ExitStack, counts: Counts) -> None:
    """Tell apart the passes of an attached model, and the waits that its one way to read the device makes."""
    from unittest.mock import patch

    from mobile import transfer
    from mobile.kernels import host_experts
    from mobile.live_model.compat import MoeLayer
    from mobile.runtime.decoding import Forward
    from mobile.store import HostStore

    run = Forward.run
    stack.enter_context(
        patch.object(Forward, "run", lambda self, **changed: counts.placed("rest", run)(self, **changed))
    )
    compute = host_experts.expert_output

    def on_the_cpu(*arguments: Any) -> torch.Tensor:
        with counts.at("counted"):
            output = compute(*arguments)
        setattr(output, HOST, True)
        return output

    stack.enter_context(patch.object(host_experts, "expert_output", on_the_cpu))
    fill = HostStore.fill
    stack.enter_context(patch.object(HostStore, "fill", lambda self, *a: counts.placed("copies", fill)(self, *a)))
    route, choice = MoeLayer.route, MoeLayer.choice
    for name, call in (("route", route), ("choice", choice)):
        stack.enter_context(patch.object(MoeLayer, name, counts.placed("replay", call)))
    waiting = transfer.wait

    def wait(reading: Any) -> None:
        if any(hasattr(tensor, UNREADY) for tensor in reading._host):
            counts.wait("transfer")
        waiting(reading)

    stack.enter_context(patch.object(transfer, "wait", wait))


def decode_step(model: Any, token: int = 7, rows: int = 1) -> tuple[Counts, Any]:
    """Return the counts of one decode step after a short prompt, and its output."""
    with torch.no_grad():
        cache = model(torch.from_numpy(np.tile(np.arange(3, 9), (rows, 1))), use_cache=True).past_key_values
        fed = torch.full((rows, 1), token)
        with counted(model) as counts:
            output = model(fed, past_key_values=cache, use_cache=True)
    return counts, output


def launches_of(model: Any, slots: int) -> dict[str, float]:
    """Return the launches of a stock model's parts under our engine, of one token; attach and detach it for that.

    "layer" outside of its routed experts, "routing" what a layer of experts launches beside them, "expert" one of them,
    "head" the rest of a pass, with embedding, final norm and head, "confidence" the test of a little pass, "replay"
    asking a layer's router again, "fallback" the rest of a fallback.
    """
    import mobile

    def steps(strategy: str, **options: Any) -> Counts:
        mobile.attach(model, strategy, slots=slots, hardware="rtx4080-pcie4", **options)
        try:
            return decode_step(model)[0]
        finally:
            mobile.detach(model)

    full, little, sure, falls = (
        steps("lru").launches,
        steps("static-half").launches,
        steps("mobile", gamma=0.0).launches,
        steps("mobile", gamma=1.1).launches,
    )
    layers, k = sum(hasattr(module, "is_transposed") for module in model.modules()), _top_k(model)
    expert = (full["experts"] - little["experts"]) / (layers * (k - k // 2))
    return {
        "layer": full["layer"] / layers,
        "routing": full["experts"] / layers - k * expert,
        "expert": expert,
        "head": full["rest"],
        "confidence": sure["between"] - full["between"],
        "replay": falls["replay"] / layers,
        "fallback": falls["between"] - sure["between"],
    }


def _top_k(model: Any) -> int:
    from mobile.live_model import compat

    return compat.moe_layers(model)[0].top_k
