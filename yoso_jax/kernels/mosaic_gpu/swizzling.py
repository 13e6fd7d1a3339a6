"""Where the elements of a tile are in shared memory."""

from yoso_jax.kernels.mosaic_gpu.lane import I32


def swizzle_bytes(row_bytes: int) -> int:
    """Bytes of a swizzled row: the most that divide a row."""
    return next(size for size in (128, 64, 32) if row_bytes % size == 0)


def tile_offset(row: I32, byte: I32, *, row_bytes: int) -> I32:
    """The offset of a byte of a row, in the arrangement that matrix products read.

    Shared memory has, for each eight rows, blocks of `swizzle_bytes` bytes of each; in a block,
    pieces of 16 bytes are exchanged so that eight rows of a column lie in different banks. The tile
    begins at a multiple of 1024 bytes.
    """
    size = swizzle_bytes(row_bytes)
    block = (row >> 3) * (row_bytes // size) + byte // size
    offset = block * (8 * size) + (row & 7) * size + byte % size
    return offset ^ ((offset >> 7 & (size // 16 - 1)) << 4)
