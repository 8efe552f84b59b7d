"""How much of what 4 bits break --repair mends: the perplexity of a text."""

import time
from unittest.mock import patch

import torch

from benchmarks.common import print_row, print_table
from data.frozen import repair as repair_py
from data.tasks import text
from data.tasks.scoring import mean_loss
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained
from qst import SharedBase
from train import load_task, parse_args, resolve

WEIGHTED = repair_py.low_rank_part
HOW = {  # what becomes of an error and of its inputs' size
    "weighted": WEIGHTED, "plain SVD": lambda error, size, rank: WEIGHTED(error, size**0, rank)
}


def repair(folder, instructions, file, ranks="8,16,32,64", windows="6"):
    """Perplexity of the first windows of 512 tokens of a text: of the base in fp32 and in NF4, and
    repaired with branches of some ranks, for the inputs that a file of instructions gives.

    The plain SVD is what LoftQ begins with, without the inputs.
    """
    cfg = resolve(parse_args(["--base", folder, "--data", instructions, "--max_examples", "400",
                              "--sequence_len", str(repair_py.LENGTH)]))
    tokenizer = load_tokenizer(folder)
    examples = text.read(file, tokenizer, 512, int(windows))
    loss = lambda base: mean_loss(SharedBase([base]), examples, 2)[0]
    perplexity = lambda base: f"{text.perplexity(loss(base)):.2f}"
    print_table("Repair", "base", "perplexity", "MB added", "seconds")
    base = from_pretrained(folder, "none", torch.float32)
    print_row("fp32", perplexity(base), "", "")
    task = load_task(cfg, tokenizer, base.config)
    base = from_pretrained(folder, "nf4", torch.float32)
    print_row("NF4", perplexity(base), "", "")
    for rank in map(int, ranks.split(",")):
        for how, function in HOW.items():
            torch.manual_seed(cfg.seed)
            repair_py.branches(base, 0)  # as it was
            with patch.object(repair_py, "low_rank_part", function):
                start = time.perf_counter()
                repair_py.mend(base, folder, [ids for ids, _ in task.train], rank)
                seconds = time.perf_counter() - start
            added = sum(b.nbytes for branch in repair_py.branches(base, rank).values()
                        for b in branch.buffers())
            row = f"{added / 1e6:.1f}", f"{seconds:.0f}"
            print_row(f"{how}, rank {rank}", perplexity(base), *row)
