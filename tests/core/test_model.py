"""model.py, against what transformers gives (tests/fixtures, made by make_fixtures.py)."""

import pytest
import torch
from helpers import FIXTURES, TEST_DATA, needs_test_data, small_base, small_config
from samples import oracle

from data import InputError
from data.tokens.tokenizer import load_tokenizer
from model import PRESETS, count_weights, from_pretrained, make_norm, rotary_table

FOLDERS = [FIXTURES / name for name in (
    "llama_gqa", "llama_linear_bias_tied", "llama_rope3", "mistral", "qwen2", "qwen3", "smollm3",
    "opt_pre", "opt_350m",
)] + sorted((TEST_DATA / "oracle/hf").glob("*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_logits_equal_transformers(folder):
    """fp32 logits are those of transformers within 1e-4 of their scale, also beside padding."""
    z, model = oracle(folder), from_pretrained(folder, "none", torch.float32)
    scale = z["logits"].abs().max()
    assert (model(z["idx"]) - z["logits"]).abs().max() < 1e-4 * scale
    for side in ("right", "left"):
        keep = z[side]
        logits = model(z["idx"], keep)
        assert logits.isfinite().all()
        assert (logits - z[f"logits_{side}"])[keep.bool()].abs().max() < 1e-4 * scale


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_greedy_text_equals_transformers(folder):
    """Greedy generation with the cache gives the same tokens."""
    greedy = oracle(folder)["greedy"]
    prompt = 8 if greedy.shape[1] == 20 else 4
    model = from_pretrained(folder, "none", torch.float32)
    assert torch.equal(model.generate(greedy[:, :prompt], greedy.shape[1] - prompt), greedy)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_norms_are_their_formulas(family):
    """With the config's epsilon; and in 16 bits what fp32 gives, rounded."""
    norm, x = make_norm(small_config(family, norm_eps=0.3)), torch.randn(5, 32) + 1
    torch.nn.init.normal_(norm.weight)
    centred = x if family == "llama" else x - x.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 0.3).sqrt()
    bias = 0 if family == "llama" else torch.nn.init.normal_(norm.bias)
    expected = normed * norm.weight + bias
    assert torch.allclose(norm(x), expected, atol=1e-5)
    assert torch.allclose(norm(x.bfloat16()).float(), expected, rtol=0.02, atol=0.05)


def test_angles_are_worked_out_in_fp32():
    """Rounded to 16 bits are cosines and sines alone, also far from the first position."""
    config, positions = small_config(), torch.arange(2048).unsqueeze(0)
    exact = rotary_table(config, positions, torch.float32)
    for one, two in zip(exact, rotary_table(config, positions, torch.bfloat16)):
        assert torch.equal(one.bfloat16(), two)


def test_weights_of_the_presets():
    """The presets have as many weights as their authors say."""
    billions = {
        "llama-2-7b": 6.738, "llama-2-13b": 13.016, "llama-2-70b": 68.977, "opt-1.3b": 1.316,
        "llama-3-8b": 8.030, "opt-6.7b": 6.658, "smollm2-135m": 0.1345,
    }
    for name, expected in billions.items():
        assert count_weights(PRESETS[name]) / 1e9 == pytest.approx(expected, abs=6e-4)
    exact = {  # of the safetensors files on the Hub, as it shows them
        "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384, "smollm3-3b": 3_075_098_624,
        "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
        "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    }
    assert {name: count_weights(PRESETS[name]) for name in exact} == exact


def test_a_sequence_longer_than_the_positions():
    """It is refused, by the model and by what generates, with what to do."""
    model = small_base()
    with pytest.raises(InputError, match="65 tokens.*64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="lower max_new_tokens"):
        model.generate(torch.zeros(1, 60, dtype=torch.long), 10)
    with pytest.raises(InputError, match="shorten the prompt"):
        model.generate(torch.zeros(1, 70, dtype=torch.long), 10)


def test_each_position_of_opt_has_its_row():
    """Position i adds row i + 2 of the table, also the last one."""
    model = small_base(family="opt")
    table, T = model.embed_positions.weight, model.config.max_positions
    idx = torch.full((1, T), 5)
    embedding = next(model.states(idx))[0]
    expected = model.embed_tokens.weight[5] + table[2 : T + 2]
    assert len(table) == T + 2 and torch.equal(embedding, expected)


@needs_test_data
def test_the_known_story():
    """stories260K in full precision tells the story that it is known for."""
    folder = TEST_DATA / "models/stories260K"
    model, tokenizer = from_pretrained(folder, "none", torch.float32), load_tokenizer(folder)
    idx = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("Once upon a time")]])
    story = "Once upon a time, there was a little girl named Lily. She loved to play"
    assert tokenizer.decode(model.generate(idx, 40)[0].tolist()).startswith(story)
