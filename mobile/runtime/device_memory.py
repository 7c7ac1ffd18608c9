"""The memory of the device that a model computes on: how much of a card can be had, and errors of running out."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mobile.costs.memory import CONTEXT_NBYTES, NEAR_MEMORY
from mobile.errors import Refused, one_line

GIB = 2**30
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # as PyTorch words it, card and host


@dataclass(frozen=True)
class CardMemory:
    """A card's memory at one moment, in bytes.

    `free_nbytes` is what nobody holds. Of this process, `context_nbytes` is the CUDA context (an upper bound where
    other processes use the card), `model_nbytes` the model that is to be attached, `other_nbytes` all other tensors,
    and `unused_nbytes` what the allocator holds and no tensor uses.
    """

    total_nbytes: int
    free_nbytes: int
    context_nbytes: int
    model_nbytes: int
    other_nbytes: int
    unused_nbytes: int

    @property
    def available_nbytes(self) -> int:
        """Return the most that the model can have here, its CUDA context included."""
        return self.free_nbytes + self.unused_nbytes + self.model_nbytes + self.context_nbytes

    def budget(self, asked_nbytes: int | None, device: torch.device) -> int:
        """Return the bytes of a budget on this card: as asked, or all that can be had where None is.

        A budget of the card's nominal size counts as all that can be had, which a RuntimeWarning says: a card sold with
        16 GB shows less than 16 GiB. Raise Refused for any other that is more than that.
        """
        available = self.available_nbytes
        if asked_nbytes is None or asked_nbytes <= available:
            return available if asked_nbytes is None else asked_nbytes
        if abs(asked_nbytes - self.total_nbytes) <= NEAR_MEMORY * asked_nbytes:
            warnings.warn(
                f"{device} shows {self.total_nbytes / GIB:.2f} GiB, of which {available / GIB:.2f} can be had: that is "
                f"what a budget of {asked_nbytes / GIB:.2f} GiB is taken for.",
                RuntimeWarning,
                stacklevel=1,  # of one place, so that it is said once
            )
            return available
        raise Refused(
            f"A budget of {asked_nbytes / GIB:.2f} GiB is more than the {available / GIB:.2f} GiB that can be had on "
            f"{device}, which shows {self.total_nbytes / GIB:.2f}; give less memory, or end what else uses it."
        )

    def cap(self, budget_nbytes: int) -> float:
        """Return the share of the card that PyTorch's allocator may take, for `set_per_process_memory_fraction`.

        The context is no part of it, and other tensors of this process are beside the budget.
        """
        return min(1.0, max(0, budget_nbytes - self.context_nbytes + self.other_nbytes) / self.total_nbytes)


def card_memory(device: torch.device, model: Any) -> CardMemory:
    """Return what is true of a CUDA device now; `model` may lie there, or elsewhere."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type == "cuda"
    }
    mine = min(allocated, sum(storages.values()))
    return CardMemory(
        total_nbytes=total,
        free_nbytes=free,
        context_nbytes=max(0, min(CONTEXT_NBYTES, total - free - reserved)),
        model_nbytes=mine,
        other_nbytes=allocated - mine,
        unused_nbytes=reserved - allocated,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether it says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def refusing(doing: str, instead: str) -> Iterator[None]:
    """Turn running out of memory inside the block into a refusal: what was being done, and what to do instead."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Refused(f"{doing} ran out of memory ({one_line(error)}); {instead}.") from error


def lift_cap(device: torch.device) -> None:
    """Let this process allocate all of a device again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def forget_frames(error: BaseException | None) -> None:
    """Clear the local variables of all calls that an error, and those that it came of, broke off.

    They may hold slots and activations, and the experts that come back to a card need the room.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
