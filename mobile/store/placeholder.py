"""The stand-in for an experts parameter whose numbers lie in the host store."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from mobile.errors import Refused

ADAPTING = "The experts are in the host store, so nothing can be put around their weights; call mobile.detach first."


class Placeholder(nn.Parameter):
    """A parameter without elements that keeps its dtype and device; a parameter becomes one by its class, in place."""

    @property
    def ds_shape(self) -> NoReturn:
        """Raise Refused. DeepSpeed's name for the shape of a parameter that lies elsewhere: PEFT asks for it first."""
        raise Refused(ADAPTING)
