"""The side checkpoint: what is saved is loaded, beside the same base, and nothing else is."""

import json
from dataclasses import fields, make_dataclass

import pytest
import torch
from helpers import FIXTURES, VARIANTS, shaken, sign_again, small_base, small_config

from data import InputError
from data.formats.safetensors import read_header, read_safetensors, write_safetensors
from data.frozen.fingerprint import alike, differences, fingerprint
from data.run import checkpoint
from model import Transformer, from_pretrained
from qst import QST
from side import SideConfig


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_side_is_the_same_side(changes, tmp_path, idx):
    """What is loaded into a fresh model gives the same logits, bit for bit."""
    model = shaken(QST(small_base(), SideConfig(reduction=4, **changes)))
    model.save_side(tmp_path)
    again = QST.from_side(small_base(), tmp_path)
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert again.side.config == model.side.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["side.json", "side.safetensors"]


@pytest.mark.parametrize("other, message", [
    (dict(seed=5), "weights"), (dict(quant="fp4"), "quant nf4 there and fp4 here"),
    (dict(quant="none"), "quant nf4 there and none here"), (dict(rope_theta=5e5), "weights"),
])
def test_a_side_refuses_another_base(other, message, tmp_path):
    """A checkpoint loads only beside the base that it was trained on."""
    QST(small_base(), SideConfig(reduction=4)).save_side(tmp_path)
    with pytest.raises(InputError, match=f"another base: .*{message}"):
        QST.from_side(small_base(**other), tmp_path)


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_the_fingerprint_does_not_depend_on_the_dtype(quant):
    """The same checkpoint, loaded to compute in fp32, fp16 or bf16, is the same base; one whose
    unquantized weights are otherwise, with the same signs, is another."""
    torch.manual_seed(0)
    state = Transformer(small_config()).state_dict()

    def print_of(dtype, factor=1.0):
        model = Transformer(small_config())
        model.load_state_dict(state | {"norm.weight": factor * state["norm.weight"]})
        return fingerprint(model.freeze(quant, dtype))

    one = print_of(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert not differences(one, print_of(dtype))
    assert differences(one, print_of(torch.float32, 1.1)) == [
        "other weights in what is not quantized"
    ]
    assert len(differences(one, one | {"quant": "fp4"})) == 1


def test_what_tells_two_bases_apart():
    """One packed code, and one of the eight values that are kept of a tensor; the ids of special
    tokens do not, nor does what fp16, whose least step is 2^-24, makes of small values."""
    one, packed, value = small_base(), small_base(), small_base()
    packed.layers[1].mlp.up_proj.weight.codes[0] ^= 1
    value.norm.weight[18] *= 1.5
    assert "weights" in differences(fingerprint(one), fingerprint(packed))[0]
    assert "not quantized" in differences(fingerprint(one), fingerprint(value))[0]
    assert not differences(fingerprint(one), fingerprint(small_base(eos_id=7)))
    kept = lambda x: x.bfloat16().view(torch.uint8).numpy().tobytes().hex()
    small = torch.logspace(-12, -4, 100)
    assert alike(kept(small), kept(small.half())) and not alike(kept(small), kept(0 * small))


@pytest.mark.parametrize("name, codes", [
    ("llama_gqa", "2469a3c7e20ebcca"), ("mistral", "bdf6570b34cd6594"),
    ("opt_pre", "470347a4c3770140"),
])
def test_a_base_keeps_its_fingerprint(name, codes):
    """Side checkpoints, states and hidden caches of all earlier commits belong to it; the hashes
    are of commit e4c4687. Fields of later families count only where they are used."""
    base = from_pretrained(FIXTURES / name, "nf4", torch.float32)
    assert fingerprint(base)["codes"] == codes
    codes = {fingerprint(small_base("none", **more))["codes"] for more in ({}, {"no_rope": (2,)})}
    assert len(codes) == 2


def test_a_changed_file_is_refused(tmp_path):
    """Be it a bit of a tensor, or a setting in the copy; a copy that is of other weights, as a
    crash may leave it, does not count."""
    base, path, copy = small_base(), tmp_path / "side.safetensors", tmp_path / "side.json"
    QST(base, SideConfig(reduction=4)).save_side(tmp_path)
    content, text = path.read_bytes(), copy.read_text()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="is damaged, its bytes are not those that were saved"):
        QST.from_side(base, tmp_path)
    path.write_bytes(content)
    copy.write_text(text.replace('"task": ""', '"task": "rte"'))
    with pytest.raises(InputError, match="side.json has other settings than"):
        QST.from_side(base, tmp_path)
    of = json.loads(text)["sha256"]
    copy.write_text(copy.read_text().replace(of, "0" * 64))
    QST.from_side(base, tmp_path)


def test_settings_must_be_those_of_the_tensors(tmp_path):
    """In the file itself, and in the side.json of an older commit, which may also have a setting
    that there is no more, if it is as it always is now."""
    base, path = small_base(), tmp_path / "side.safetensors"
    QST(base, SideConfig(reduction=4)).save_side(tmp_path)
    metadata = read_header(path)[1]
    tensors = {name: read().clone() for name, read in read_safetensors(path).items()}
    about = json.loads(metadata["side"])
    for change, message in (
        (dict(reduction=2), "is damaged"), (dict(task="x"), "is damaged"),
    ):
        side = json.dumps(about | dict(config=about["config"] | change))
        write_safetensors(path, tensors, metadata | dict(side=side))
        with pytest.raises(InputError, match=message):
            QST.from_side(base, tmp_path)
    swap = {f"downsample.{i}.down.weight": f"downsample.{3 - i}.down.weight" for i in (0, 3)}
    write_safetensors(path, {swap.get(n, n): tensor for n, tensor in tensors.items()}, metadata)
    with pytest.raises(InputError, match="is damaged"):  # two tensors under each other's name
        QST.from_side(base, tmp_path)
    write_safetensors(path, tensors, metadata)
    with pytest.raises(InputError, match="config has attention, which this code does not know"):
        sign_again(tmp_path, config=about["config"] | dict(attention="own"))
        QST.from_side(base, tmp_path)
    sign_again(tmp_path, config=about["config"] | dict(repair=0))
    QST.from_side(base, tmp_path)
    sign_again(tmp_path, config=about["config"] | dict(repair=2))
    with pytest.raises(InputError, match="its base had a --repair.*--calibrate FILE`, and train"):
        QST.from_side(base, tmp_path)


def test_a_tensor_missing_or_left_over_is_named(tmp_path):
    """Loading a side network is strict in both directions, and about shapes and formats."""
    base, path = small_base(), tmp_path / "side.safetensors"
    QST(base, SideConfig(reduction=4)).save_side(tmp_path)
    whole = {name: read().clone() for name, read in read_safetensors(path).items()}
    sign_again(tmp_path, {k: v for k, v in whole.items() if k != "upsample.weight"})
    with pytest.raises(InputError, match="lacks upsample.weight"):
        QST.from_side(base, tmp_path)
    sign_again(tmp_path, whole | {"extra": torch.zeros(1)})
    with pytest.raises(InputError, match="has extra, which"):
        QST.from_side(base, tmp_path)
    sign_again(tmp_path, whole | {"gamma": torch.zeros(7)})
    with pytest.raises(InputError, match="gamma has shape"):
        QST.from_side(base, tmp_path)
    sign_again(tmp_path, format=99)
    with pytest.raises(InputError, match="format is 99; it must be 2"):
        QST.from_side(base, tmp_path)


def test_scales_that_another_device_rounds_otherwise(tmp_path):
    """A base is told by its codes, which are exact on every device; the mean of the absmax values
    is a sum, which is not."""
    QST(small_base(), SideConfig(reduction=4, rank=2)).save_side(tmp_path)
    base = small_base()
    base.layers[0].mlp.up_proj.weight.offset *= 1 + 2**-23
    assert QST.from_side(base, tmp_path)
    assert fingerprint(base)["weights"] != fingerprint(small_base())["weights"]
    assert not differences(fingerprint(base), fingerprint(small_base()))


def test_checkpoints_of_before_there_were_heads(tmp_path, idx):
    """They have as many heads as the base, also where a new side network has fewer."""
    own = SideConfig(reduction=4, rank=2, heads=0)
    model = shaken(QST(small_base(), own))
    older = make_dataclass("Older", [f.name for f in fields(own) if f.name != "heads"])
    settings = {f.name: getattr(model.side.config, f.name) for f in fields(older)}
    checkpoint.write(tmp_path, model.side.state_dict(), older(**settings), model.fingerprint)
    again = QST.from_side(small_base(), tmp_path)
    assert again.side.model_config.n_head == 4 and torch.equal(again(idx)[0], model(idx)[0])
    assert QST(small_base(), SideConfig(reduction=4)).side.model_config.n_head == 1
