"""How much of what 4 bits lose `model.py quantize --calibrate` gives back: a text's perplexity."""

import time
from itertools import product

import torch

from benchmarks.common import perplexity, print_row, print_table
from data.frozen import calibrate as calibrate_py
from data.tasks import text
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained


def calibrate(folder, file, test, texts="32,64,128", draws="1", windows="6"):
    """Perplexity of the first windows of 512 tokens of a test text: of the base in fp32 and in NF4,
    and with codes that some numbers of a file's texts chose, for some draws of these texts."""
    examples = text.read(test, load_tokenizer(folder), 512, int(windows))

    def row(name, base, *cells):
        print_row(name, f"{perplexity(base, examples):.2f}", *cells)

    print_table("Calibration", "base", "perplexity", "seconds")
    row("fp32", from_pretrained(folder, "none", torch.float32), "")
    base = from_pretrained(folder, "nf4", torch.float32)
    row("NF4", base, "")
    for n, seed in product(map(int, texts.split(",")), range(int(draws))):
        found, start = calibrate_py.read_texts(file, folder, n, seed), time.perf_counter()
        calibrate_py.calibrate(base, folder, found)
        row(f"{n} texts, draw {seed}", base, f"{time.perf_counter() - start:.0f}")
