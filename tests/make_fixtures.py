"""Make tests/fixtures: what transformers and bitsandbytes say, to compare with. Not run by tests.

    pip install torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2
    python tests/make_fixtures.py

Random models of a few thousand weights, one for each way in which models differ, with their
logits, also under padding, and their greedy text; and tensors quantized by bitsandbytes.
"""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig,
    OPTForCausalLM,
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
    where = dict(dtype=compute, device_map="cpu")
    model = kind.from_pretrained(plain, quantization_config=options, **where)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    shutil.rmtree(plain)
    # Its own product on a CPU is in bf16; dequantized, the same weights give exact logits.
    model = kind.from_pretrained(folder, **where).dequantize()
    idx = torch.randint(3, 48, (2, 12))
    with torch.no_grad():
        logits = model(idx).logits
    np.savez_compressed(folder / "expected.npz", idx=idx.numpy(), logits=logits.numpy())
    (folder / "generation_config.json").unlink(missing_ok=True)


# As the models' files have them
QWEN2_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace("|\\p{N}|", "|\\p{N}{1,3}|")
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]


def nasty_text():
    """A long text with everything that has broken a tokenizer."""
    rng = random.Random(0)
    planes = [chr(p) for plane in range(17) for p in rng.sample(
        range(plane << 16, (plane + 1) << 16), 200) if not 0xD800 <= p < 0xE000]  # fmt: skip
    # not given a meaning after this Python's Unicode (planes 4 to 13 are without any)
    settled = lambda c: unicodedata.category(c) != "Cn" or 4 <= ord(c) >> 16 <= 13
    known = [c for c in planes if settled(c)]
    return "".join(known) + " ".join(known) + "\n".join(known[::7]) + "".join(
        f"{c}a{c}1 {c}" for c in known[::5]
    ) + (
        "👩‍👩‍👧‍👦 🏳️‍🌈🏴󠁧󠁢󠁥󠁮󠁧󠁿 👍🏽é e\u0301 Å A\u030a ﬁ Ǆ 각 "
        "ᄀ\u1161\u11a8 क्ष ชั้น مرحباً\t\t\ttabs\t x \t y"
        "       runs      of   spaces  \n   \n\n\n  \r\n\r\nCRLF\r\n "
        "\r mix\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003"
        "\u2028\u3000\u200b\ufeff end   \n 1 12 123 1234 12345 "
        "1234567 3.14 1,000,000 ٣٤٥ ½ Ⅷ 二〇二四 ²³ x2y3 "
        "I'm you're he's we'll they'd I've don't I'M YOU'RE HE'S "
        "WE'LL THEY'D I'VE DON'T 'ſ 'S's''s 'Ll "
        "<|im_start|>user\nHi<|im_end|> <s></s> "
        "<|endoftext|><|eot_id|><|begin_of_text|>< |im_end|> <pad><unk>"
        "\x00\x01\x7f��  !?!?...——“”‘’ _snake_case_ __init__ a_b "
        "CamelCase https://x.y/z?a=b&c=%20#d "
        "    def f(x):\n        return x  # café\n"
        + "a" * 3000 + " " * 3000 + "\n" * 300 + "é" * 500
        + "ab" * 2000 + "!" * 1000 + "日本語" * 300 + "１２３" + "<|im_end|>\u0338" + " "
    )  # fmt: skip


def make_tokenizer(name):
    """A small byte-level BPE in one model's way, the nasty text, and the library's ids of it."""
    words = {"llama3": LLAMA3_WORDS, "qwen2": QWEN2_WORDS}.get(name)
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    first = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm2" else []
    if words:
        first = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    made.decoder = decoders.ByteLevel()
    text = nasty_text()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([(HERE.parent / "make_fixtures.py").read_text(), text], trainer)
    spec = json.loads(made.to_str())
    if name == "llama3":  # words that no merge makes
        for word in ("Ġxylophonic", "zzzz"):
            spec["model"]["vocab"][word] = len(spec["model"]["vocab"])
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL])
    if words:
        made.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    folder = HERE / "tokenizers" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == "opt":
        vocab, merges = made.get_vocab(), json.loads(made.to_str())["model"]["merges"]
        (folder / "vocab.json").write_text(json.dumps(vocab))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        ends = {"bos_token_id": vocab[SPECIAL[0]], "eos_token_id": vocab[SPECIAL[1]]}
        (folder / "config.json").write_text(json.dumps(ends))
    else:
        made.save(str(folder / "tokenizer.json"), pretty=False)
        config = dict(bos_token=SPECIAL[0], eos_token={"content": SPECIAL[1]})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = {}
    for special in (False, True):
        made.encode_special_tokens = not special
        ids = made.encode(text, add_special_tokens=False).ids
        expected[f"special_{special}"] = np.array(ids, dtype=np.int16)
    np.savez_compressed(folder / "expected.npz", **expected)
    (HERE / "tokenizers" / "text.json").write_text(json.dumps(text))


def make_quantized():
    torch.manual_seed(1)
    ties = (bnb.get_4bit_type("nf4", "cpu")[:-1] + bnb.get_4bit_type("nf4", "cpu")[1:]) / 2
    with_zeros = torch.randn(20, 64)
    with_zeros[::3] = 0
    tensors = {
        "normal": torch.randn(40, 66), "odd": torch.randn(5, 7), "zeros": with_zeros,
        "ties": torch.stack([
            F.pad(torch.cat([a * torch.ones(1), a * ties]), (0, 48)) for a in (1, -3)
        ]),
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
    for name in ("smollm2", "opt", "llama3", "qwen2"):
        make_tokenizer(name)
    # bitsandbytes on a CPU wants multiples of 64
    llama = SMALL | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    double = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    single = dict(bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head", "fc2"])
    make_bnb("bnb_llama", LlamaForCausalLM, LlamaConfig(**llama), torch.float32, **double)
    opt = OPT | dict(hidden_size=64, ffn_dim=128, num_hidden_layers=1, word_embed_proj_dim=64)
    make_bnb("bnb_opt", OPTForCausalLM, OPTConfig(**opt), torch.float32, **single)
    for path in sorted(HERE.rglob("*.*")):
        print(f"{path.stat().st_size:8,} {path.relative_to(HERE)}")
