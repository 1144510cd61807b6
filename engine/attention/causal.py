"""Causal attention of one sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from the last `num_queries` tokens of a sequence to it up to themselves.

    Args:
        query: `[num_queries, num_heads, head_dim]`.
        key: `[num_keys, num_kv_heads, head_dim]`; `num_keys >= num_queries`, and heads are shared in equal runs.
        value: `[num_keys, num_kv_heads, head_dim]`.

    Returns:
        `[num_queries, num_heads, head_dim]`.
    """
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    share = num_heads // num_kv_heads
    # The KV heads are the batch and those that share one are the heads: keys and values are broadcast, not copied.
    grouped = query.view(num_queries, num_kv_heads, share, head_dim).permute(1, 2, 0, 3)
    key, value = (x.transpose(0, 1)[:, None].expand(-1, share, -1, -1) for x in (key, value))
    whole = num_queries == num_keys
    mask = None if whole else _offset_mask(num_queries, num_keys, query.device)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, is_causal=whole)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def _offset_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return visible.tril(num_keys - num_queries)
