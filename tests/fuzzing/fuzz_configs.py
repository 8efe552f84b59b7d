"""config.json, field by field: our logits are those of transformers, or ours refuses by name.

    python tests/fuzzing/fuzz_configs.py [--minutes 1] [--cases N] [--seed N] [--number N]

A case is a small model of one of six classes, with random weights that transformers wrote, and
one to three fields of its config.json changed: taken out, null, or another value. The fields are
those of transformers' own classes, and EXTRA. --seed and the number decide which; --number runs
that one alone. transformers then loads the folder, and so does `from_pretrained`. A defect is

    logits that differ, at any length up to the longest sequence
    another longest sequence than transformers has: of positions, or of the attention's window
    a refusal that names none of the changed fields, or any other error than `InputError`

What transformers refuses is not compared. Prints what became of the cases, and of each kind of
defect the shortest example; exits with 1 if there are any. Needs transformers, 4 or 5.
"""

import argparse
import json
import logging
import math
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[:2]]
import helpers  # noqa: E402, F401, which finds the project and the tests

from data import InputError  # noqa: E402
from model import from_pretrained, read_config  # noqa: E402

CLOSE = 2e-5  # of the largest logit; what fp32 rounds otherwise
LARGE = 1 << 22  # weights of a model that is not built: of it only the sizes are compared
OFTEN = dict(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1,
    max_position_embeddings=12, eos_token_id=2,
)
SMALL = {  # the class: fields of a small model, some of which are drawn
    "llama": OFTEN | dict(intermediate_size=24, num_key_value_heads=[1, 2, None],
                          tie_word_embeddings=[False, True], attention_bias=[False, True],
                          mlp_bias=[False, True]),
    "mistral": OFTEN | dict(intermediate_size=24, num_key_value_heads=[1, 2],
                            tie_word_embeddings=[False, True], sliding_window=[5, 12, 30, None]),
    "opt": OFTEN | dict(ffn_dim=24, word_embed_proj_dim=[8, 16], enable_bias=[True, False],
                        do_layer_norm_before=[True, False], tie_word_embeddings=[True, False]),
}
SMALL["qwen2"] = SMALL["llama"] | dict(sliding_window=[5, 12, 30, None], use_sliding_window=[
    False, True])
SMALL["qwen3"] = SMALL["qwen2"] | dict(head_dim=[4, 8])
SMALL["smollm3"] = SMALL["qwen2"] | dict(
    pad_token_id=0, no_rope_layers=[None, [1, 0], [0, 0], [1, 1]])
SCALED = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=6)
LONG = dict(rope_type="longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
            original_max_position_embeddings=6)
ROPE = [
    {}, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 3}, {"rope_type": "linear"}, {"rope_theta": 77.0},
    {"rope_type": "dynamic", "factor": 2.0}, {"type": "dynamic", "factor": 1.3, "rope_theta": 50},
    {"rope_type": "linear", "type": "default", "factor": 2.0, "rope_theta": 300.0}, SCALED,
    {key: value for key, value in SCALED.items() if not key.startswith("original")}, LONG,
    SCALED | {"rope_theta": 30.0}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": None},
    {"rope_type": "default", "partial_rotary_factor": 0.5}, {"factor": 2.0}, {"type": None},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5}, {"rope_type": "mrope"},
    {"rope_type": "default", "factor": 8.0, "attention_factor": 3.0, "unknown": 1},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}}, {"rope_theta": None},
]
ACTIVATIONS = ["relu", "silu", "gelu", "gelu_new", "swish", "relu2", "tanh"]
LAYER = {"0": {"rms_norm_eps": 0.5}}, {"1": {"intermediate_size": 40}}, {"1": {"skip": ["mlp"]}}
VALUES = {  # legal but unusual values
    "hidden_size": [8, 24, 32], "intermediate_size": [8, 40], "ffn_dim": [8, 40],
    "num_hidden_layers": [1, 3], "num_attention_heads": [1, 4, 8], "vocab_size": [20, 40],
    "num_key_value_heads": [1, 2, 4, 8], "head_dim": [2, 4, 6, 10, 16, 7],
    "max_position_embeddings": [1, 2, 7, 20, 40], "word_embed_proj_dim": [4, 16, 24],
    "sliding_window": [1, 3, 11, 12, 100], "rms_norm_eps": [1e-3, 0.1, 1, 1e-12, 0.0],
    "rope_theta": [50.0, 500, 1e6, 1.5], "rope_scaling": ROPE, "rope_parameters": ROPE,
    "hidden_act": ACTIVATIONS, "activation_function": ACTIVATIONS, "tie_word_embeddings": [],
    "partial_rotary_factor": [0.5, 1.0, 0.25], "original_max_position_embeddings": [3, 6, 12],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"]],
    "per_layer_config": LAYER, "attention_chunk_size": [2, 8], "max_window_layers": [0, 1, 2],
    "attn_implementation": ["eager", "sdpa"], "_attn_implementation": ["eager"],
    "pruned_heads": [{"0": [1]}], "pretraining_tp": [2, 4], "transformers_weights": ["x.bin"],
    "bos_token_id": [0, 5, 30, 31, [1, 2]], "eos_token_id": [0, 7, [2, 3], [], [31], 99],
    "pad_token_id": [0, 3, 30], "dtype": ["bfloat16", "float16"], "architectures": [["LlamaModel"]],
    "torch_dtype": ["bfloat16", "float16"], "id2label": [{"0": "a"}], "num_labels": [1, 3],
    "layer_norm_eps": [0.1], "initializer_range": [0.5], "init_std": [0.5], "dropout": [0.9],
    "no_rope_layers": [[1, 0], [0, 1], [0], [1, 1, 0], [2, 0]], "no_rope_layer_interval": [1, 2, 3],
    "attention_dropout": [0.9], "layerdrop": [0.9], "kv_sharing_modes": [["reuse", "reuse"]],
}
ANY = [True, False, 0, 1, 2, -1, 0.5, 3.0, "", "x", [], [1], {}]
# Fields that no class has, but that files have, or code of transformers looks for.
EXTRA = """
    rope_theta rope_scaling partial_rotary_factor original_max_position_embeddings layer_types
    per_layer_config attention_chunk_size max_window_layers use_sliding_window attn_implementation
    _attn_implementation pruned_heads is_causal is_decoder add_cross_attention torch_dtype
    transformers_weights quantization_config num_labels layer_norm_eps kv_sharing_modes
    logits_scaling final_logit_softcapping attn_logit_softcapping residual_multiplier
    use_bidirectional_attention
    cross_attention_hidden_size embedding_multiplier attention_multiplier query_pre_attn_scalar
    qk_norm scale_embedding norm_eps layer_norm_epsilon rotary_dim head_dim sliding_window
    attention_bias mlp_bias hidden_act n_layer n_embd auto_map prefix tie_encoder_decoder
    num_key_value_heads intermediate_size use_qk_norm no_rope_layers output_attentions
""".split()


def classes():
    """transformers' six classes: {name: (its configuration, its model)}."""
    import transformers as t

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    t.logging.disable_progress_bar()
    names = "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "OPT"
    return {name.lower(): (getattr(t, f"{name}Config"), getattr(t, f"{name}ForCausalLM"))
            for name in names}


def good_fields(kind, kinds, choose=lambda values: values[0]):
    """config.json of a small model, as transformers writes it."""
    drawn = {k: choose(v) if isinstance(v, list) else v for k, v in SMALL[kind].items()}
    return json.loads(kinds[kind][0](**drawn).to_json_string(use_diff=False))


def make_case(rng, kinds):
    """Draw a case: (class, good fields, {field: change}, whether the weights are of the good)."""
    kind = rng.choice(list(SMALL))
    good = good_fields(kind, kinds, rng.choice)
    if rng.random() < 0.5:  # as transformers 4 writes it
        rope = good.pop("rope_parameters", None)
        if rope:
            good |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        good["torch_dtype"] = good.pop("dtype", None) or "float32"
    names = sorted({*good, *EXTRA} - {"model_type"})
    changes = {}
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        often = [name for name in names if name in VALUES]
        name = rng.choice(often if rng.random() < 0.7 else names)
        how = rng.choice(["out", "null", "value", "value", "value", "value"])
        values = (VALUES.get(name) if rng.random() < 0.9 else None) or ANY
        changes[name] = "out" if how == "out" else None if how == "null" else rng.choice(values)
    return kind, good, changes, rng.random() < 0.1


def apply(good, changes):
    kept = {name: value for name, value in good.items() if changes.get(name) != "out"}
    return kept | {name: value for name, value in changes.items() if value != "out"}


def n_weights(config):
    wide = max(config.hidden_size, getattr(config, "intermediate_size", 0),
               getattr(config, "ffn_dim", 0), 1)
    many = config.vocab_size + getattr(config, "max_position_embeddings", 0) * (wide != 16)
    return wide * (4 * wide * config.num_hidden_layers + many)


def theirs(config, model_class, folder, seed):
    """Write a model with random weights for a configuration, and load it as a user does: the model,
    and what of its weights the folder lacks or has in another shape."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 * (parameter.dim() == 1), std=0.3)
    text = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").unlink(missing_ok=True)
    float32 = dict(dtype=torch.float32, output_loading_info=True)
    model, info = model_class.from_pretrained(folder, **float32)
    return model.eval(), info["missing_keys"] or info["mismatched_keys"]


def longest(kind, config):
    """The longest sequence that no window cuts, in attention or in the cache of keys and values."""
    slides = getattr(config, "use_sliding_window", True) is not False or (
        kind in ("llama", "mistral") or "sliding_attention" in config.layer_types)
    names = ["attention_chunk_size"] + slides * ["sliding_window"]
    windows = [getattr(config, name, None) for name in names if kind != "opt"]
    windows = [window for window in windows if window is not None]
    return min(config.max_position_embeddings, *windows, math.inf)


def max_is_passed(model, length):
    """Whether our model takes a sequence of one token more."""
    try:
        model(torch.zeros(1, length + 1, dtype=torch.long))
    except InputError:
        return False
    return True


def outcome(kind, good, changes, other, folder, kinds, seed):
    """What becomes of a case: "equal", "refused", "theirs refuses", or the defect, in words.

    other: whether the weights are those of a model without the changes
    """
    config_class, model_class = kinds[kind]
    (folder / "config.json").write_text(json.dumps(apply(good, changes)))
    for path in folder.glob("model*"):
        path.unlink()
    try:
        config, unfit = config_class.from_pretrained(folder), False
        written = config_class(**good) if other else config
        small = n_weights(config) < LARGE
        if small:
            oracle, unfit = theirs(written, model_class, folder, seed)
            idx = torch.randint(config.vocab_size, (2, min(64, longest(kind, config))))
            with torch.no_grad():
                expected = oracle(idx, return_dict=True).logits
    except Exception as error:  # of any kind: what it says is not of interest
        return "theirs refuses", f"{type(error).__name__}: {str(error)[:300]}"
    try:
        ours = read_config(folder)
        model = from_pretrained(folder, "none", torch.float32) if small else None
        logits = model(idx[:, : ours.max_positions]) if small else None
    except InputError as error:
        text = str(error)
        inner = [key for value in changes.values() if isinstance(value, dict) for key in value]
        known = other or any(name in text for name in [*changes, *inner])
        return ("refused" if known else "refused without its name"), text
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    if unfit:
        return "weights that do not fit", str(unfit)
    if ours.max_positions != longest(kind, config):
        return "another length", f"{ours.max_positions}, not {longest(kind, config)}"
    for name in ("bos", "eos"):
        if getattr(ours, f"{name}_id") != getattr(config, f"{name}_token_id"):
            return "another id", f"{name}: {getattr(ours, f'{name}_id')}"
    if not small:
        sizes = ours.vocab_size, ours.n_layer, ours.n_embd, ours.n_head
        wanted = (config.vocab_size, config.num_hidden_layers, config.hidden_size,
                  config.num_attention_heads)
        return "equal" if sizes == wanted else "other sizes", str(sizes)
    if max_is_passed(model, ours.max_positions):
        return "another length", "it takes one token more"
    difference = (logits - expected).abs().max() / expected.abs().max()
    if not difference < CLOSE and not expected.isnan().any():
        return "other logits", f"{difference:.2g} of the largest"
    return "equal", ""


def run(seed, numbers, seconds=math.inf, loud=False):
    """Run cases, and print what became of them: the number of defects."""
    kinds, end, found = classes(), time.monotonic() + seconds, {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            if time.monotonic() > end:
                break
            case = make_case(random.Random(f"{seed} {number}"), kinds)
            torch.manual_seed(number)
            what, told = outcome(*case, Path(folder), kinds, number)
            found.setdefault(what, []).append((number, case[0], case[2], told))
            if loud:
                print(*map(json.dumps, case), what, told, sep="\n")
    for what, cases in sorted(found.items()):
        print(f"{len(cases):7} {what}")
    bad = [what for what in found if what not in ("equal", "refused", "theirs refuses")]
    for what in bad:
        for number, kind, changes, told in sorted(found[what], key=lambda c: len(str(c[2])))[:6]:
            print(f"\n{what}: --seed {seed} --number {number}: {kind} {changes}\n    {told}")
    return sum(len(found[what]) for what in bad)


def main(argv=None):
    as_it_stands = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--cases", type=int, help="as many, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int)
    args = parser.parse_args(argv)
    if args.number is not None:
        return min(1, run(args.seed, [args.number], loud=True))
    seconds = math.inf if args.cases else 60 * args.minutes
    return min(1, run(args.seed, range(args.cases or 1 << 60), seconds))


if __name__ == "__main__":
    sys.exit(main())
