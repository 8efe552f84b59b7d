"""Make tests/fixtures: what transformers and bitsandbytes say, to compare with. Not run by tests.

    pip install torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2
    python tests/make_fixtures.py

Random models of a few thousand weights, one for each way in which models differ, with their
logits, also under padding, and their greedy text; and tensors quantized by bitsandbytes.
"""

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM,
)  # fmt: skip

HERE = Path(__file__).parent / "fixtures"
SMALL = dict(
    vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
OPT = dict(
    vocab_size=48, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, dropout=0.0,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16, rope_theta=5000.0,
)  # fmt: skip

MODELS = {
    "llama_gqa": (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=8)),
    "llama_linear_bias_tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=10000.0),
        ),
    ),
    "llama_rope3": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "mistral": (
        MistralForCausalLM, MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=32)
    ),
    "opt_pre": (OPTForCausalLM, OPTConfig(**OPT)),
    "opt_350m": (
        OPTForCausalLM, OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16)
    ),
}  # fmt: skip


def make_model(name, kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        centre = 1.0 if parameter.dim() == 1 and not parameter.eq(0).all() else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    if name == "opt_pre":  # OPT's usual form
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="12KB" if name == "llama_gqa" else "1GB")
    if name == "llama_linear_bias_tied":  # the older spelling of the same
        settings = json.loads((folder / "config.json").read_text())
        settings |= dict(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.5})
        del settings["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(settings, indent=1))

    idx = torch.randint(3, 48, (2, 12))
    right, left = torch.ones(2, 2, 12, dtype=torch.long)
    right[1, 7:] = 0
    left[1, :5] = 0
    with torch.no_grad():
        expected = dict(
            idx=idx, right=right, left=left, logits=model(idx).logits,
            logits_right=model(idx, attention_mask=right).logits,
            logits_left=model(idx, attention_mask=left).logits,
            greedy=model.generate(
                idx[:, :4], attention_mask=torch.ones(2, 4), max_new_tokens=10, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            ),
        )  # fmt: skip
    np.savez_compressed(folder / "expected.npz", **{k: v.numpy() for k, v in expected.items()})
    for extra in folder.glob("generation_config.json"):
        extra.unlink()


def make_bnb(name, kind, config, compute, **options):
    """A folder that transformers and bitsandbytes have quantized, and its logits on a CPU."""
    plain, folder = HERE / "plain", HERE / name
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    model.to(compute).save_pretrained(plain)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **options)
    model = kind.from_pretrained(plain, quantization_config=options, dtype=compute, device_map="cpu")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    shutil.rmtree(plain)
    # Its own product on a CPU is in bf16; dequantized, the same weights give exact logits.
    model = kind.from_pretrained(folder, dtype=compute, device_map="cpu").dequantize()
    idx = torch.randint(3, 48, (2, 12))
    with torch.no_grad():
        logits = model(idx).logits
    np.savez_compressed(folder / "expected.npz", idx=idx.numpy(), logits=logits.numpy())
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_quantized():
    torch.manual_seed(1)
    ties = (bnb.get_4bit_type("nf4", "cpu")[:-1] + bnb.get_4bit_type("nf4", "cpu")[1:]) / 2
    with_zeros = torch.randn(20, 64)
    with_zeros[::3] = 0
    tensors = {
        "normal": torch.randn(40, 66), "odd": torch.randn(5, 7), "zeros": with_zeros,
        "ties": torch.stack([F.pad(torch.cat([a * torch.ones(1), a * ties]), (0, 48)) for a in (1, -3)]),
        "many_blocks": torch.randn(300 * 64) * torch.rand(300).repeat_interleave(64),
    }  # fmt: skip
    made = {}
    for name, x in tensors.items():
        made[f"{name}.x"] = x
        for kind in ("nf4", "fp4"):
            for nested in (False, True) if name != "many_blocks" else (True,):
                codes, s = bnb.quantize_4bit(x, quant_type=kind, compress_statistics=nested)
                key = f"{name}.{kind}.{'double' if nested else 'single'}"
                made |= {f"{key}.codes": codes.flatten(), f"{key}.absmax": s.absmax}
                if nested:
                    made |= {f"{key}.nested": s.state2.absmax, f"{key}.offset": s.offset}
                for dtype in (torch.float32, torch.bfloat16) if name != "many_blocks" else ():
                    s.dtype = dtype
                    made[f"{key}.{str(dtype)[6:]}"] = bnb.dequantize_4bit(codes, s).float()
    made["nf4"], made["fp4"] = (bnb.get_4bit_type(kind, "cpu") for kind in ("nf4", "fp4"))
    made["dynamic"] = bnb.create_dynamic_map()
    np.savez_compressed(HERE / "quantized.npz", **{k: v.numpy() for k, v in made.items()})


if __name__ == "__main__":
    for name, (kind, config) in MODELS.items():
        make_model(name, kind, config)
    make_quantized()
    # bitsandbytes on a CPU wants multiples of 64
    llama = SMALL | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    double = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    single = dict(bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head", "fc2"])
    make_bnb("bnb_llama", LlamaForCausalLM, LlamaConfig(**llama), torch.float32, **double)
    opt = OPT | dict(hidden_size=64, ffn_dim=128, num_hidden_layers=1, word_embed_proj_dim=64)
    make_bnb("bnb_opt", OPTForCausalLM, OPTConfig(**opt), torch.float32, **single)
    for path in sorted(HERE.rglob("*.*")):
        print(f"{path.stat().st_size:8,} {path.relative_to(HERE)}")
