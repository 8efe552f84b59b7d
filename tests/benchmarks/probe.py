"""What there is to read in the base's hidden states, layer by layer, before any side network."""

from itertools import islice

import torch

from benchmarks.common import print_row, print_table
from data.frozen.hidden import channel_statistics
from data.tasks.examples import collate
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained
from train import load_task, parse_args, resolve

EXAMPLES = 1200, 400  # to learn from, and to test
cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits


def probe(*flags):
    """Per layer: the channels' size, and how well a linear classifier learns in 100 steps of 16
    from the states as they are, and standardized (the best of three learning rates each); and the
    classifier that ridge regression finds from all of the examples.

    flags: those of train.py, with a --task of two labels and --head lm
    """
    cfg = resolve(parse_args(flags))
    tokenizer, base = load_tokenizer(cfg.base), from_pretrained(cfg.base, cfg.quant, torch.float32)
    task, n = load_task(cfg, tokenizer, base.config), EXAMPLES[0]
    states, y = last_states(base, (task.train + task.held_out)[: sum(EXAMPLES)])
    print_table("Reading the base", "layer", "largest mean", "median std", "100 steps: raw",
                "standardized", "ridge")
    for i in range(states.shape[1]):
        x = states[:, i]
        mean, std = x[:64].mean(dim=0), x[:64].std(dim=0) + 1e-3
        z, rates = (x - mean) / std, (1e-4, 1e-3, 1e-2)
        accuracies = [max(classify(v, y, n, rate) for rate in rates) for v in (x, z)]
        accuracies.append(max(regress(z, y, n, weight) for weight in (10, 100, 1e3, 1e4)))
        sizes = f"{mean.abs().max():.1f}", f"{std.median():.2f}"
        print_row(i + 1, *sizes, *(f"{accuracy:.3f}" for accuracy in accuracies))


def reader(*flags):
    """The held-out loss and accuracy of a linear classifier of the last token's states, trained to
    the end on all training examples: what can be read from the frozen base.

    flags: those of train.py, with a --task of two labels and --head lm
    """
    cfg = resolve(parse_args(flags))
    tokenizer, base = load_tokenizer(cfg.base), from_pretrained(cfg.base, cfg.quant, torch.float32)
    task, n = load_task(cfg, tokenizer, base.config), cfg.eval_examples
    states, y = last_states(base, task.train + task.held_out)
    end = len(task.train)
    tried = end - end // 8  # the others choose the weight of the penalty
    x = (states - states[:end].mean(dim=0)) / (states[:end].std(dim=0) + 1e-3)
    N = x.shape[1]
    print_table("A linear reader", "layers", "penalty", f"{n} held out", f"{len(y) - end} held out")
    for name, layers in {"all": range(N), "every fifth": range(4, N, 5), "last": [N - 1]}.items():
        z = x[:, list(layers)].flatten(1)
        penalty = min(
            (1e-3, 1e-2, 1e-1),
            key=lambda weight: judged(trained(z[:tried], y[:tried], weight), z, y, tried, end)[0],
        )
        linear = trained(z[:end], y[:end], penalty)
        found = [judged(linear, z, y, end, stop) for stop in (end + n, len(y))]
        print_row(name, penalty, *(f"{loss:.3f}; {accuracy:.1%}" for loss, accuracy in found))


def trained(x, y, penalty):
    """Logistic regression, by L-BFGS."""
    linear = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def step():
        optimizer.zero_grad()
        loss = cross_entropy(linear(x)[:, 0], y.float()) + penalty * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    return linear


@torch.no_grad()
def judged(linear, x, y, start, stop):
    """Loss and accuracy on x[start:stop]."""
    logits, y = linear(x[start:stop])[:, 0], y[start:stop]
    return cross_entropy(logits, y.float()).item(), ((logits > 0) == y).float().mean().item()


@torch.no_grad()
def last_states(base, examples, batch_size=32):
    """Hidden states of every layer at the last token, (n, N, C), and the examples' two targets."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    states = torch.empty(len(examples), base.config.n_layer, base.config.n_embd)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        idx, _ = collate([examples[i] for i in rows])
        last = [len(examples[i][0]) - 1 for i in rows]
        for i, x in enumerate(islice(base.states(idx), 1, base.config.n_layer + 1)):
            states[rows, i] = x[range(len(rows)), last]
    targets = torch.tensor([targets[-1] for _, targets in examples])
    return states, (targets == targets.max()).long()


def classify(x, y, n, learning_rate):
    """Accuracy on x[n:] of a linear classifier after 100 steps of Adam on 16 of x[:n] each."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(x.shape[1], 2)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.Adam(linear.parameters(), learning_rate)
    for _ in range(100):
        rows = torch.randint(n, (16,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(x[rows]), y[rows]).backward()
        optimizer.step()
    return (linear(x[n:]).argmax(dim=1) == y[n:]).float().mean().item()


def regress(x, y, n, weight):
    """Accuracy on x[n:] of ridge regression on all of x[:n]."""
    a, b = x[:n], 2.0 * y[:n] - 1
    w = torch.linalg.solve(a.T @ a + weight * torch.eye(a.shape[1]), a.T @ b)
    return ((x[n:] @ w > 0) == y[n:].bool()).float().mean().item()


def channels(*flags):
    """How far the channels' standard deviations over some training examples are from those over
    the other half of them: what --standardize divides by, and how many texts it takes; and what
    each text's first position makes of them.

    flags: those of train.py, with --max_examples for some hundred examples
    """
    cfg = resolve(parse_args(flags))
    tokenizer, base = load_tokenizer(cfg.base), from_pretrained(cfg.base, cfg.quant, torch.float32)
    task = load_task(cfg, tokenizer, base.config)
    texts = [ids for ids, _ in task.train]
    half = len(texts) // 2
    std = lambda texts, skip=1: channel_statistics(base, texts, 1, skip)[1].clamp(min=1e-12).sqrt()
    known = std(texts[half:])
    print_table("Channels' standard deviations", "texts", "half within", "99 of 100", "furthest")
    for n in [n for n in (16, 32, 64, 128, 256) if n < half] + [half]:
        ratio = (std(texts[:n]) / known).log()
        off = [ratio.abs().flatten().quantile(q).item() for q in (0.5, 0.99)]
        furthest = f"{ratio.min().exp():.2f} and {ratio.max().exp():.2f} times"
        print_row(n, *(f"{o:.1%}" for o in off), furthest)
    print_table("With the first position, and without", "after layer", "largest", "median")
    with_it, without = std(texts[:64], 0), std(texts[:64])
    for i in range(5, len(base.layers) + 1, 5):
        two = with_it[i], without[i]
        print_row(i, "; ".join(f"{s.max():.1f}" for s in two),
                  "; ".join(f"{s.median():.2f}" for s in two))
