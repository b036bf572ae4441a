"""The bytes that each op must move, whatever the implementation: every input byte that the result
depends on is read once, every output byte is written once.

They follow the parameter structs in csrc/include/inferlab. Arguments are sizes; `size` is bytes per
element.
"""

from __future__ import annotations


def build_tree(batch: int, nodes: int) -> int:
    """Reads parents; writes depth, first_child, next_sibling and the ancestor words."""
    words = (nodes + 63) // 64
    return batch * nodes * (4 + 3 * 4 + 8 * words)


def sample(rows: int, vocab: int, size: int, num_samples: int = 1) -> int:
    """Reads the logits and each row's position; writes the tokens."""
    return rows * (vocab * size + 8 + 4 * num_samples)


def verify(rows: float, vocab: int, size: int, batch: int, nodes: int) -> int:
    """Reads `rows` rows of logits: those the walk visits (with `rejection`, of the target and, at
    nodes that have children, of the draft). Writes accepted nodes and tokens, and their number."""
    return round(rows * vocab * size) + batch * (8 * nodes + 4)


def attention(
    batch: int,
    nodes: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    length: int,
    size: int,
    page_size: int,
    tree: bool,
) -> int:
    """Reads K and V of the prefix and of the nodes, q, the block table, and a tree's ancestor
    words; writes the output."""
    slots = length + nodes
    kv = 2 * slots * kv_heads * dim * size
    q_and_out = 2 * nodes * q_heads * dim * size
    table = 4 * ((slots + page_size - 1) // page_size)
    ancestors = 8 * nodes * ((nodes + 63) // 64) if tree else 0
    return batch * (kv + q_and_out + table + ancestors)


def kv_append(rows: int, row_bytes: int) -> int:
    """Reads and writes `rows` rows of K and of V."""
    return 2 * 2 * rows * row_bytes


def kv_compact(layers: int, rows: int, row_bytes: int) -> int:
    """Reads and writes, in every layer, the rows of K and V that do not already lie in place."""
    return 2 * 2 * layers * rows * row_bytes


def kv_gather(rows: int, row_bytes: int) -> int:
    """Reads and writes `rows` rows of K or V."""
    return 2 * rows * row_bytes


def kv_copy_pages(layers: int, moves: int, page_bytes: int) -> int:
    """Reads and writes `moves` pages of K and V in every layer."""
    return 2 * 2 * layers * moves * page_bytes


def packed_linear(rows: int, outputs: int, inputs: int, tile_bytes: int, size: int) -> int:
    """The packed weight once, in tiles of 16 outputs of so many bytes; x and y once."""
    return -(-outputs // 16) * tile_bytes + rows * (inputs + outputs) * size


def linear(rows: int, inputs: int, outputs: int, size: int) -> int:
    """Reads the weight and x, writes y."""
    return (inputs * outputs + rows * (inputs + outputs)) * size


def rms_norm(rows: int, dim: int, size: int) -> int:
    """Reads x and the weight, writes as much as x."""
    return (2 * rows + 1) * dim * size


def silu_mul(rows: int, dim: int, size: int) -> int:
    """Reads gate and up, writes their product."""
    return 3 * rows * dim * size


def rope_append(batch: int, nodes: int, q_heads: int, kv_heads: int, dim: int, size: int) -> int:
    """Reads q, k, v, cos and sin; writes q back, and k and v to the pages."""
    return batch * nodes * (2 * (q_heads + 2 * kv_heads) + 2) * dim * size
