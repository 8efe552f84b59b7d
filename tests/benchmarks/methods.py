"""A training step of each method, and of the same in transformers, peft and bitsandbytes."""

import importlib.util
import statistics
import tempfile

import torch
from tqdm import tqdm

from benchmarks import step
from benchmarks.common import FREED, alone, print_row, print_table, write_model
from benchmarks.step import measure, ours, parse_step

STEPS = {  # name: flags of train.py
    "forward alone, nf4": "--method qlora --eval_only", "qst": "",
    "qst, as written": step.AS_WRITTEN, "qst, 4 bits": step.FEW_BITS, "lst": "--method lst",
    "qlora": "--method qlora", "qlora, checkpoint": "--method qlora --checkpoint",
    "lora": "--method lora", "lora, checkpoint": "--method lora --checkpoint",
    "adapter": "--method adapter", "peqa": "--method peqa", "full": "--method full",
}
THEIRS = ("forward alone, nf4", "qlora", "qlora, checkpoint", "lora", "full")
LIBRARIES = ("transformers", "peft", "bitsandbytes", "accelerate")
ROUNDS = 3


def theirs(cfg, folder):
    """As `ours`, put together of the libraries: a model, and its loss as a function of the ids."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quant = four_bits if cfg.quant == "nf4" else None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quant)
    if cfg.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.eval_only:
        model.requires_grad_(False)
    elif cfg.method != "full":
        lora = LoraConfig(r=cfg.rank, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, lora)
    model.train()
    return model, lambda idx: model(idx, labels=idx, shift_labels=idx, use_cache=False).loss


def methods():
    """A step of 4 x 256 tokens, each with a target: a LLaMA of 12 layers x 768 in fp32.

    Memory is `account`'s, measured once. Seconds are the processor's, of one thread: those of a
    clock where there is no other work, and not much more where there is. Each process has its turn
    in every round, and the table has the medians.
    """
    absent = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    turns = {(name, ours): [] for name in STEPS}
    turns |= {(name, theirs): [] for name in THEIRS if not absent}
    with tempfile.TemporaryDirectory() as folder:
        alone(write_model, folder, step.MODEL)
        for i in tqdm(range(1 + ROUNDS)):  # the first for the memory, the others for the time
            for (name, make), figures in turns.items():
                cfg, how = parse_step(STEPS[name]), FREED if i == 0 else {}
                figures.append(alone(measure, make, cfg, folder, OMP_NUM_THREADS="1", **how))
    seconds = {one: statistics.median(row[1] for row in rows[1:]) for one, rows in turns.items()}
    memory = {one: rows[0][0] for one, rows in turns.items()}
    beside = ("qlora", ours if absent else theirs)
    whose = beside[1].__name__
    print_table("A training step", "method", "whose", "s", "MB above the model", "trainable",
                f"s / qlora, {whose}", f"MB / qlora, {whose}")
    for one, rows in turns.items():
        name, make = one
        print_row(
            name, make.__name__, f"{seconds[one]:.2f}", f"{memory[one] / 1e6:,.0f}",
            f"{rows[0][3]:,.0f}", f"{seconds[one] / seconds[beside]:.2f}",
            f"{memory[one] / memory[beside]:.2f}",
        )
    if absent:
        print(f"\nTheirs are left out: pip install {' '.join(absent)}.")
