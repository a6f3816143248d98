"""Dropout that does not wait for its random numbers on a CPU."""

import torch
from torch import Tensor, nn

# torch draws a random number for each entry, on one thread. 16 bits are enough, and four times that come in one draw.
LEVELS = 2**16
LOWEST_INT64 = -(2**63)
# Entries whose bits are held at once: so many that they stay in the cache.
ENTRIES_AT_ONCE = 2**18


class ScFoundationDropout(nn.Dropout):
    """`nn.Dropout`, on a CPU in a third of the time and with its probability rounded to the next 65,536th.

    What is kept grows by what the rounded probability says, so the expected output is the input. `torch.manual_seed`
    seeds it, as torch's, and checkpointing draws the same again; which entries are dropped differs from torch's.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Any shape to the same; in training mode some entries are 0 and the others larger."""
        num_dropped = round(self.p * LEVELS)
        draws_here = self.training and states.device.type == "cpu" and not torch.compiler.is_compiling()
        if not draws_here or num_dropped in (0, LEVELS):
            return super().forward(states)
        return states * _draw_factors(states, num_dropped)


def _draw_factors(states: Tensor, num_dropped: int) -> Tensor:
    """What each entry is multiplied by: 0, `num_dropped` times in `LEVELS`, or what makes up for that."""
    factors = torch.empty_like(states, memory_format=torch.contiguous_format)
    blocks = factors.view(-1).split(ENTRIES_AT_ONCE)
    bits = torch.empty(-(-len(blocks[0]) // 4), dtype=torch.int64)
    lowest_kept = num_dropped - LEVELS // 2  # 16 bits are read as a number with a sign
    for block in blocks:
        levels = bits.random_(LOWEST_INT64, None).view(torch.int16)[: len(block)]
        torch.ge(levels, lowest_kept, out=block).mul_(LEVELS / (LEVELS - num_dropped))
    return factors
