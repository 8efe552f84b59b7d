"""Rows of ids of unequal length as one tensor: padded right to learn, and left to answer."""

import torch

from data import IGNORE_INDEX


def collate(examples, pad_id=0):
    """Pad examples on the right to one length: idx int64 and targets (int64 or fp32), (B, T).

    Causal attention never looks to the right, so no token sees the padding, and no mask is needed.
    """
    T = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (T - len(row))
    idx = torch.tensor([pad(ids, pad_id) for ids, _ in examples])
    targets = torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in examples])
    return idx, targets


def pad_left(prompts, pad_id=0, device=None):
    """Stack prompts of unequal length: list of lists of ids -> idx (B, T) and keep (B, T)."""
    T = max(map(len, prompts))
    idx = torch.tensor([[pad_id] * (T - len(p)) + list(p) for p in prompts], device=device)
    keep = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
    return idx, keep
