"""List the shapes of known models, as arguments of `ModelConfig`: to count memory without files."""


def llama(n_layer, n_head, n_embd, n_ffn, vocab_size=32000, max_positions=4096, **other):
    return dict(
        vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_ffn=n_ffn,
        max_positions=max_positions, bos_id=1, eos_id=2, **other
    )


def qwen3(*shape, **other):
    other |= dict(vocab_size=151936, max_positions=40960, head_dim=128, qk_norm=True)
    return llama(*shape, n_kv_head=8, rope_theta=1e6, **other)


def llama3(*shape, **other):
    return llama(*shape, 128256, 8192, rope_theta=5e5, n_kv_head=8, **other)


def opt(n_layer, n_head, n_embd, **other):
    return dict(
        vocab_size=50272, n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_ffn=4 * n_embd,
        family="opt", attention_bias=True, mlp_bias=True, tied=True, bos_id=2, eos_id=2, **other
    )


SHAPES = {
    "smollm2-135m": llama(30, 9, 576, 1536, 49152, 8192, n_kv_head=3, tied=True, rope_theta=1e5),
    "smollm2-360m": llama(32, 15, 960, 2560, 49152, 8192, n_kv_head=5, tied=True, rope_theta=1e5),
    "smollm2-1.7b": llama(24, 32, 2048, 8192, 49152, 8192, tied=True, rope_theta=1.3e5),
    "smollm3-3b": llama(
        36, 16, 2048, 11008, 128256, 65536, n_kv_head=4, tied=True, rope_theta=5e6,
        no_rope=tuple(range(4, 37, 4)),
    ),
    "qwen3-0.6b": qwen3(28, 16, 1024, 3072, tied=True),
    "qwen3-1.7b": qwen3(28, 16, 2048, 6144, tied=True),
    "qwen3-4b": qwen3(36, 32, 2560, 9728, tied=True), "qwen3-8b": qwen3(36, 32, 4096, 12288),
    "qwen3-14b": qwen3(40, 40, 5120, 17408), "qwen3-32b": qwen3(64, 64, 5120, 25600),
    "tinyllama-1.1b": llama(22, 32, 2048, 5632, max_positions=2048, n_kv_head=4),
    "llama-2-7b": llama(32, 32, 4096, 11008), "llama-2-13b": llama(40, 40, 5120, 13824),
    "llama-2-70b": llama(80, 64, 8192, 28672, n_kv_head=8),
    "llama-3-8b": llama3(32, 32, 4096, 14336),
    "llama-3.2-1b": llama3(16, 32, 2048, 8192, tied=True),
    "llama-3.2-3b": llama3(28, 24, 3072, 8192, tied=True),
    "opt-125m": opt(12, 12, 768),
    "opt-350m": opt(24, 16, 1024, embed_dim=512, pre_norm=False, final_norm=False),
    "opt-1.3b": opt(24, 32, 2048), "opt-2.7b": opt(32, 32, 2560),
    "opt-6.7b": opt(32, 32, 4096), "opt-13b": opt(40, 40, 5120),
    "opt-30b": opt(48, 56, 7168), "opt-66b": opt(64, 72, 9216),
}
