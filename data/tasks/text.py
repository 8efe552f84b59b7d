"""Plain text in windows, for language modelling and perplexity.

The text is encoded as a whole and cut into windows of `sequence_len` tokens that do not overlap.
A window has no bos of its own, so that 1,024 tokens give 1,023 predictions. The last, shorter
window counts too.
"""

import math

from data import IGNORE_INDEX, InputError
from data.formats.files import read_text
from data.tasks.examples import Task
from data.tasks.scoring import mean_loss


def read(path, tokenizer, sequence_len, max_examples=0):
    """Read UTF-8 text: [(ids, targets), ...], the first `max_examples` windows (0: all)."""
    if sequence_len < 2:
        raise InputError(f"--sequence_len {sequence_len}: a window needs at least 2 tokens.")
    ids = tokenizer.encode(read_text(path))
    windows = [ids[i : i + sequence_len] for i in range(0, len(ids) - 1, sequence_len)]
    if not windows:
        raise InputError(f"{path} has less than two tokens: nothing can be predicted.")
    return [(w, w[1:] + [IGNORE_INDEX]) for w in windows[: max_examples or None]]


def perplexity(loss):
    """Compute the perplexity from a mean loss in nats; infinity beyond the range of a float."""
    return math.exp(loss) if loss < 700 else math.inf


def load(cfg, tokenizer):
    """Read the windows of --data, and return the `Task`. The end of the text is held out."""
    windows = read(cfg.data, tokenizer, cfg.sequence_len, cfg.max_examples)
    kept = 0 if cfg.eval_only else len(windows) - max(1, round(len(windows) * cfg.held_out))
    train, held_out = windows[:kept], windows[kept:]

    def score(models):
        losses = mean_loss(models, held_out, cfg.batch_size, "perplexity")
        more = lambda loss: {"loss": loss} if cfg.eval_only else {}  # or train.py computes it again
        n = len(held_out)
        return [dict(perplexity=perplexity(loss), examples=n) | more(loss) for loss in losses]

    return Task(train, held_out, score)
