"""The linear recursion of a round, d[s] = r[s] + m[s] d[s-1], over a ring of slots, as a scan of short tensor operations."""

import math

from torch import Tensor


def slots_for(size: int, length: int | None = None) -> int:
    """The smallest ring of at least ``size`` slots that splits into equal blocks of ``length``, about its square root by default."""
    length = length or block_of(size)
    return -(-size // length) * length


def block_of(size: int) -> int:
    """The length of a block."""
    return max(1, math.isqrt(size))


def scan(r: Tensor, m: Tensor, length: int) -> Tensor:
    """Solves the recursion in place in r (P, B, C, E) and returns it; m (P, B, C) multiplies what arrives at a slot.

    The ring is cyclic: every lane needs one slot with m = 0, from which it starts. Blocks of ``length`` slots run side by side, then their
    ends are joined, so about 4 sqrt(P) operations do it, in an order that depends on ``length`` alone. Where all r up to a slot are zero the
    result there is exactly zero, which is what makes a round exact at its frontier.
    """
    blocks, factor = (v.reshape(len(r) // length, length, *v.shape[1:]) for v in (r, m))
    for t in range(1, length):
        blocks[:, t].addcmul_(factor[:, t, ..., None], blocks[:, t - 1])
    reach = factor.cumprod(1)  # what is left at a slot of the value that entered its block
    ends, carries, carry = blocks[:, -1], [], None
    for lap in range(2):  # the first lap finds what the last block hands to the first one
        for k in range(len(blocks)):
            if lap:
                carries.append(carry)
            carry = ends[k].clone() if carry is None else ends[k].addcmul(reach[k, -1, ..., None], carry)
    for k, entering in enumerate(carries):
        blocks[k].addcmul_(reach[k, ..., None], entering)
    return r
