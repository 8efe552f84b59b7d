"""How large the channels of a base's hidden states are, measured on some texts."""

import torch

from data.tokens.padding import collate


@torch.no_grad()
def channel_statistics(model, prompts, skip=1, every=1):
    """Mean and variance of each channel of the hidden states of a base over some texts' tokens.

    prompts: lists of ids; skip: how many positions at the start of each do not count
    returns two of (N / every + 1, C), in fp64: of the embedding and of each every-th layer's output
    """
    n, C = model.config.n_layer // every + 1, model.config.n_embd
    sums = torch.zeros(2, n, C, dtype=torch.float64)
    for start in range(0, len(prompts), 4):  # a few at a time, so that little memory is needed
        rows = prompts[start : start + 4]
        idx, _ = collate([(ids, []) for ids in rows])
        counts = torch.tensor([[skip <= i < len(ids) for i in range(idx.shape[1])] for ids in rows])
        states = model.states(idx.to(model.device), None, None, every)
        for i, h in zip(range(n), states):  # not the last, which is normed
            exact = torch.float32 if h.device.type == "mps" else torch.float64
            h = h[counts.to(h.device)].to(exact)
            sums[:, i] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)]).cpu()
    mean, square = sums / max(1, sum(max(0, len(prompt) - skip) for prompt in prompts))
    return mean, square - mean.square()
