"""Measurements, each in a process of its own: memory of loading, ...

    python tests/bench.py load          peak memory of `from_pretrained`, and its parts
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model import ModelConfig, Transformer, from_pretrained, model_bytes, save_pretrained  # noqa: E402


def peak():
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function, *args):
    """Call a function of this file in a fresh process, and return what it prints."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import bench; bench.{function}(*{args!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(word) for word in done.stdout.split()]


def load_once(folder, quant):
    from_pretrained(ROOT / "tests/fixtures/llama_rope3", quant)  # torch has loaded what it needs
    start, before = time.perf_counter(), peak()
    model = from_pretrained(folder, quant, torch.float32)
    print(peak() - before, model_bytes(model), time.perf_counter() - start)


def make_model(folder):
    config = ModelConfig(32000, n_layer=12, n_head=16, n_embd=2048, n_ffn=5632, tied=True)
    torch.manual_seed(0)
    save_pretrained(Transformer(config).half(), folder)
    print(sum(p.numel() for p in Transformer(config).parameters()))


def load():
    """A LLaMA of 0.7 billion fp16 weights; its largest tensor is the embedding."""
    with tempfile.TemporaryDirectory() as folder:
        (numel,) = alone("make_model", folder)
        largest = 32000 * 2048 * 2
        print(f"{numel / 1e9:.2f} B weights in fp16, loaded to compute in fp32")
        print(f"the largest tensor of the file, the embedding: {largest / 1e6:.0f} MB")
        print("          model MB   peak growth MB   growth - model   seconds")
        for quant in ("nf4", "none"):
            growth, size, seconds = alone("load_once", folder, quant)
            print(
                f"{quant:6} {size / 1e6:11.0f} {growth / 1e6:16.0f} {(growth - size) / 1e6:16.0f} {seconds:9.1f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["load"])
    globals()[parser.parse_args().what]()
