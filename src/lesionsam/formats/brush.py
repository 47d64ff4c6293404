"""Encode masks as Label Studio's brush regions: run lengths of RGBA bytes, packed in bits.

The stream: 32 bits number of bytes, 5 bits word size - 1, four times 4 bits size of a length - 1; then for each run
one bit (1: the word repeats), 2 bits that choose a size, the length - 1 in that many bits, and the word.
(label-studio-converter, brush.py; the packing is that of @thi.ng/rle-pack.)
"""

from __future__ import annotations

import numpy as np

WORD_BITS = 8
LENGTH_BITS = (3, 4, 8, 16)
LONGEST = 1 << LENGTH_BITS[-1]  # of one run; longer ones are cut


def encode_brush(mask: np.ndarray) -> list[int]:
    """Return (H, W) bool as the bytes of a brush region's `rle`."""
    flat = np.asarray(mask, bool).ravel()
    ends = np.append(np.flatnonzero(np.diff(flat)) + 1, flat.size)
    lengths = 4 * np.diff(ends, prepend=0)  # R, G, B and A of a pixel are equal
    parts = [f"{4 * flat.size:032b}{WORD_BITS - 1:05b}", *(f"{bits - 1:04b}" for bits in LENGTH_BITS)]
    for length, end in zip(lengths.tolist(), ends.tolist(), strict=True):
        word = "11111111" if flat[end - 1] else "00000000"
        while length:
            run = min(length, LONGEST)
            choice = next(k for k, bits in enumerate(LENGTH_BITS) if run <= 1 << bits)
            parts.append(f"1{choice:02b}{run - 1:0{LENGTH_BITS[choice]}b}{word}")
            length -= run
    bits = "".join(parts)
    return list(int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big"))
