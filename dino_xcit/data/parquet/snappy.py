"""Where a block of Snappy's can be entered: so that a few bytes of it can be had without decompressing the rest.

Snappy's compressors start afresh every 64 KiB of input, so that these pieces do not refer to each other. The format
does not promise it, but whether it is so can be seen from the block's instructions, which are few where there is
nothing to compress: about two for each 64 KiB of photographs.

Format: https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

PIECE = 1 << 16
"""Bytes, before compression."""
MAX_EXPANSION = 32
"""No block makes so many bytes of one: the densest instruction makes 64 of three."""


class NotSnappy(ValueError):
    """The block is damaged."""


class NoPieces(ValueError):
    """The block may be right, but cannot be entered."""


def pieces(packed: memoryview, unpacked: int) -> list[int]:
    """Where the pieces begin in a compressed block, and where the last one ends.

    Follows the block's instructions without carrying them out.

    Args:
        packed: the block.
        unpacked: its size after decompression, in bytes.

    Raises:
        NotSnappy: it is no Snappy block of that size.
        NoPieces: its pieces refer to each other, or it has too many instructions to follow them all.
    """
    found: list[int] = []
    made, piece_end, left = 0, 0, 10_000 + unpacked // 32
    end = len(packed)
    try:
        size, at = varint(packed, 0)
        while at < end:
            if made == piece_end:
                found.append(at)
                piece_end += PIECE
            tag = packed[at]
            kind = tag & 3
            at += 1
            if kind == 0:  # bytes as they are, which follow
                length = (tag >> 2) + 1
                if length > 60:
                    digits = length - 60
                    length = int.from_bytes(packed[at : at + digits], "little") + 1
                    at += digits
                at += length
            else:  # bytes from so far back
                if kind == 1:
                    length, back = ((tag >> 2) & 7) + 4, (tag >> 5 << 8) | packed[at]
                    at += 1
                else:
                    digits = 2 if kind == 2 else 4
                    length, back = (tag >> 2) + 1, int.from_bytes(packed[at : at + digits], "little")
                    at += digits
                if back > made - (piece_end - PIECE):
                    raise NoPieces("pieces that refer to each other")
            made += length
            left -= 1
            if made > piece_end or left == 0:
                raise NoPieces("compressed in other pieces, or in too many steps")
    except IndexError as error:
        raise NotSnappy("a compressed block is cut short") from error
    if at != end or made != unpacked or size != unpacked:
        raise NotSnappy("a compressed block has another size than its header says")
    return [*found, end]


def piece_run(packed: bytes, unpacked: int) -> bytes:
    """A block of its own from consecutive pieces of another: ``unpacked`` is their size after decompression."""
    header = bytearray()
    while unpacked > 127:
        header.append(unpacked & 127 | 128)
        unpacked >>= 7
    return bytes([*header, unpacked]) + packed


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends. Raises IndexError at the end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError("a number without an end")
