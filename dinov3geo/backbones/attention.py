"""Softmax attention by the fastest way there is for a device, dtype and length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured with torch 2.14 on two cores with AVX512-BF16, in bfloat16, GFLOP/s of the fused kernel, of three
# operations on all scores and of chunks of queries: 98, 134, 118 (B 20, H 6, T 201); 137, 106, 218 (B 4,
# T 1029); 140, 111, 214 (B 1, T 4101). Scores of up to 32 MiB are computed at once, more in pieces of 4 MiB.
_MAX_SCORES = 2**24
_CHUNK_SCORES = 2**21
_MAX_QUERIES = 256


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, [B, H, T, dh] each."""
    slow_kernel = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not slow_kernel or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value)
    batch, heads, length, _ = query.shape
    # The fused kernel's backward takes 4 to 9 times as long (B 128, T 54; B 384, T 14).
    if query.requires_grad or batch * heads * length**2 <= _MAX_SCORES:
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        mixed: Tensor = scores.softmax(-1) @ value
        return mixed
    return _attend_in_chunks(query, key, value)


def _attend_in_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Some queries of one image at a time, in buffers that stay in the cache; without gradients only."""
    batch, heads, length, width = query.shape
    queries = min(max(_CHUNK_SCORES // (heads * length), 32), _MAX_QUERIES, length)
    query, turned, value = query * width**-0.5, key.mT.contiguous(), value.contiguous()
    mixed = query.new_empty(batch, length, heads, width).transpose(1, 2)
    buffers = query.new_empty(2, heads * queries * length)
    for image in range(batch):
        for start in range(0, length, queries):
            some = query[image, :, start : start + queries]
            count = some.shape[1]
            scores, shares = buffers[:, : heads * count * length].view(2, heads, count, length)
            torch.bmm(some, turned[image], out=scores)
            torch.softmax(scores, -1, out=shares)
            mixed[image, :, start : start + count] = torch.bmm(shares, value[image])
    return mixed
