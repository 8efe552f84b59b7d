"""QLoRA put together of transformers, peft and bitsandbytes, with random weights."""

import torch
from torch import nn

LIBRARIES = ("transformers", "peft", "bitsandbytes", "accelerate")


def their_qlora(sizes, config, cfg):
    """A model as `from_pretrained(load_in_4bit)` and `get_peft_model` leave it, and its loss.

    It computes as transformers' Trainer does with bf16=True: in autocast, the pairs stored in fp32.
    A layer is made at a time, so that 70B needs no copy in 16 bits.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_ffn,
        num_hidden_layers=0, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, max_position_embeddings=config.max_positions,
        tie_word_embeddings=False, use_cache=False,
    )
    with torch.device(sizes.device):
        model = LlamaForCausalLM(shape).to(sizes.dtype)
    shape.num_hidden_layers = config.n_layer
    shape._attn_implementation = "sdpa"
    for i in range(config.n_layer):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(shape, i).to(sizes.dtype)
        model.model.layers.append(made_in_4_bits(layer, sizes))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    if cfg.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=cfg.rank, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, lora).train()
    half = sizes.device.type == "cuda"

    def loss_of(idx, targets):
        with torch.autocast(sizes.device.type, torch.bfloat16, enabled=half):
            return model(idx, labels=idx, shift_labels=idx, use_cache=False).loss

    return model, loss_of


def made_in_4_bits(layer, sizes):
    """A layer on meta with random weights instead, its matrices in bitsandbytes' 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = dict(compress_statistics=True, quant_type="nf4")
    more = options | dict(compute_dtype=sizes.dtype, device="meta")
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            width = module.in_features, module.out_features
            new = Linear4bit(*width, bias=False, **more)
            weight = torch.empty(*width[::-1], dtype=sizes.dtype, device=sizes.device)
            weight.normal_(std=0.02)
            new.weight = Params4bit(weight, requires_grad=False, module=new, **options)
            new.weight = new.weight.to(sizes.device)
            layer.set_submodule(name, new)
        elif "norm" in name:
            module.to_empty(device=sizes.device).weight.data.fill_(1)
    return layer
