"""model.py quantize --calibrate: codes chosen with the inputs in mind, in the same format."""

import json
import shutil

import pytest
import torch
from helpers import run_script, small_config

from data import InputError
from data.formats.safetensors import read_safetensors
from data.formats.save import save_pretrained
from data.frozen import calibrate as leaf
from data.frozen.fingerprint import differences, fingerprint
from data.tokens.tokenizer import load_tokenizer
from model import Transformer, from_pretrained, quantize_folder
from quant import CODEBOOKS, NF4_CODEBOOK, Quantized4bit, quantize_4bit

WORDS = "the cat sat on a mat and then it was late so we all went home to sleep".split()


def correlated(tokens, channels, seed=0):
    """Inputs of which each channel is a mixture of a few."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 8, generator=draw) @ torch.randn(8, channels, generator=draw)
    return few + 0.3 * torch.randn(tokens, channels, generator=draw)


def scales_of(q):
    """The scale of each weight, from the definition."""
    unit = torch.full_like(q.codes, 17 * CODEBOOKS[q.kind].argmax().item())
    return Quantized4bit(unit, q.absmax, q.nested_absmax, q.offset, q.shape, q.kind).dequantize()


def brute_force(weight, scales, x, codebook):
    """Column by column in fp64, with an inverse of its own for each."""
    x = x.double() / x.double().norm(dim=1, keepdim=True)
    H = x.T @ x
    H += leaf.DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    W, s, levels = weight.double().clone(), scales.double(), codebook.double()
    codes, free = torch.empty(W.shape, dtype=torch.uint8), H.diagonal().argsort()
    while len(free):
        inverse, j = torch.linalg.inv(H[free][:, free]), free[-1]
        codes[:, j] = ((W[:, j] / s[:, j])[:, None] - levels).abs().argmin(dim=1)
        error = W[:, j] - levels[codes[:, j].long()] * s[:, j]
        W[:, free] -= error[:, None] * inverse[-1] / inverse[-1, -1]
        free = free[:-1]
    return codes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [1, 17, 128])
def test_it_is_gptq(kind, columns, monkeypatch):
    """With one factor for all columns, and with columns changed together, the codes are those of
    the definition; the outputs on these inputs are nearer than with the nearest codes."""
    monkeypatch.setattr(leaf, "COLUMNS", columns)
    monkeypatch.setattr(leaf, "TOKENS", 77)  # and in parts
    x, weight, codebook = correlated(300, 96), torch.randn(40, 96), CODEBOOKS[kind]
    q = quantize_4bit(weight, kind)
    scales, nearest = scales_of(q), q.dequantize()
    codes = leaf.choose_codes(weight, scales, *leaf.inverse_factor(x), codebook)
    levels = codebook[codes.int()]  # FP4 has two codes of 0
    assert torch.equal(levels, codebook[brute_force(weight, scales, x, codebook).int()])
    left = [((weight - w) @ x.T).norm() for w in (levels * scales, nearest)]
    assert left[0] < 0.5 * left[1]


def test_inputs_that_say_nothing():
    """Without correlations the codes are the nearest, but for the rounding of the scales; channels
    that are always 0, a weight of zeros and inputs that are not finite end well."""
    weight = torch.randn(24, 64)
    q = quantize_4bit(weight, double_quant=False)
    scales = scales_of(q)
    codes = leaf.choose_codes(weight, scales, *leaf.inverse_factor(torch.eye(64)), NF4_CODEBOOK)
    assert torch.equal(NF4_CODEBOOK[codes.int()] * scales, q.dequantize())
    for x in (torch.zeros(9, 64), torch.eye(64)[:3]):
        assert leaf.inverse_factor(x)[0].isfinite().all()
    zeros = torch.zeros(24, 64)
    codes = leaf.choose_codes(zeros, zeros, *leaf.inverse_factor(correlated(99, 64)), NF4_CODEBOOK)
    assert codes.max() < 16
    with pytest.raises(InputError, match="up_proj has inputs that are not finite"):
        leaf.inverse_factor(torch.full((9, 64), torch.inf), "up_proj")


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """{family: a random model's folder}, with a tokenizer."""
    found = {}
    for family in ("llama", "opt"):
        found[family] = folder = tmp_path_factory.mktemp("bases") / family
        shutil.copytree(tiny_model, folder)
        torch.manual_seed(0)
        size = load_tokenizer(folder).vocab_size
        wide = dict(n_embd=64, n_ffn=128) if family == "llama" else {}
        model = Transformer(small_config(family, vocab_size=size, max_positions=128, **wide))
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        save_pretrained(model.half() if family == "opt" else model, folder)
    return found


@pytest.fixture
def file(tmp_path):
    draw = torch.Generator().manual_seed(1)
    order = torch.randint(len(WORDS), (3000,), generator=draw).tolist()
    path = tmp_path / "texts.txt"
    path.write_text(" ".join(WORDS[i] for i in order))
    return path


def tensors_of(folder):
    return {n: r().clone() for n, r in read_safetensors(folder / "model.safetensors").items()}


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_folder(family, kind, folders, file, tmp_path, monkeypatch):
    """Only codes differ from those of a folder without it, and twice they are the same ones. The
    logits on other texts are nearer to the unquantized model's. A side network of the one base is
    refused by the other."""
    monkeypatch.setattr(leaf, "TEXTS", 32)
    quantize_folder(folders[family], tmp_path / "plain", kind)
    for name in ("once", "again"):
        quantize_folder(folders[family], tmp_path / name, kind, str(file), "cpu")
    plain, once, again = (tensors_of(tmp_path / name) for name in ("plain", "once", "again"))
    differ = {n for n in plain if not torch.equal(plain[n], once[n])}
    assert plain.keys() == once.keys() and len(differ) == (21 if family == "llama" else 18)
    assert all(once[n].dtype == torch.uint8 and n.endswith("weight") for n in differ)
    assert all(torch.equal(once[n], again[n]) for n in once)
    of = lambda path, quant: from_pretrained(path, quant, torch.float32)
    bases = [of(tmp_path / name, kind) for name in ("plain", "once")]
    ids = load_tokenizer(folders[family]).encode(" ".join(reversed(WORDS * 3)))
    idx, exact = torch.tensor([ids[:60]]), of(folders[family], "none")
    plain, once = ((base(idx) - exact(idx)).norm() for base in bases)
    assert once < 0.85 * plain
    assert differences(*map(fingerprint, bases))


def test_padding_does_not_count(folders, monkeypatch):
    """A text's inputs are the same beside a longer one; on a CPU they are in fp32."""
    seen, factor = [], leaf.inverse_factor
    monkeypatch.setattr(leaf, "inverse_factor", lambda x, name: seen.append(x) or factor(x, name))
    long, short = [1, *range(3, 60)], [1, *range(9, 30)]
    for texts in ([long, short], [short]):
        base = from_pretrained(folders["llama"], "nf4", torch.float16)
        leaf.calibrate(base, folders["llama"], texts)
    together, alone = seen[0], seen[len(seen) // 2]
    assert len(together) == len(long) + len(short)
    assert torch.allclose(together[-len(short) :], alone, atol=1e-5)
    assert {x.dtype for x in seen} == {torch.float32}
    assert len(seen) == 2 * 3 * 4  # one for each input of a layer, not for each matrix


def test_the_first_position_survives():
    """It is as large as a hundred others, and counts as one: what the others need decides."""
    x, weight = correlated(400, 64), torch.randn(32, 64)
    x[::40] = 100 * x[0]
    q = quantize_4bit(weight)
    scales = scales_of(q)
    codes = leaf.choose_codes(weight, scales, *leaf.inverse_factor(x), NF4_CODEBOOK)
    left = (weight - NF4_CODEBOOK[codes.int()] * scales) @ x.T
    plain = (weight - q.dequantize()) @ x.T
    assert left[:, 1:40].norm() < 0.5 * plain[:, 1:40].norm()
    assert left[:, 0].norm() < plain[:, 0].norm()


def test_memory(folders, file, monkeypatch):
    """The weights are read one at a time, and the inputs of one layer are held."""
    base, alive = from_pretrained(folders["llama"], "nf4", torch.float32), []
    read = leaf.hub.open_files

    def counted(folder, config):
        def counting(reader):
            tensor = reader()
            alive.append(torch.utils.weak.WeakTensorKeyDictionary({tensor: 1}))
            assert sum(map(len, alive)) == 1
            return tensor
        return {name: lambda reader=reader: counting(reader)
                for name, reader in read(folder, config).items()}

    monkeypatch.setattr(leaf.hub, "open_files", counted)
    leaf.calibrate(base, folders["llama"], leaf.read_texts(str(file), folders["llama"])[:4])
    assert len(alive) == 21


def test_what_is_read(folders, file, tmp_path, capsys):
    """At most TEXTS texts: a template that rewrites turns makes several of one conversation.
    A .TXT is text; what is left out is said."""
    about = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}] * 3
    rows = [{"messages": about}] * leaf.TEXTS
    (tmp_path / "turns.json").write_text(json.dumps([*rows, {"text": "no question"}]))
    shutil.copytree(folders["llama"], tmp_path / "rewrites")
    template = "{% for m in messages %}{{ loop.revindex }} {{ m.content }} {% endfor %}"
    settings = {"chat_template": template}
    (tmp_path / "rewrites/tokenizer_config.json").write_text(json.dumps(settings))
    texts = leaf.read_texts(str(tmp_path / "turns.json"), tmp_path / "rewrites")
    assert len(texts) == leaf.TEXTS
    assert "1 of 129 records left out" in capsys.readouterr().out
    shutil.copy(file, tmp_path / "TEXTS.TXT")
    upper, lower = (leaf.read_texts(str(path), folders["llama"])
                    for path in (tmp_path / "TEXTS.TXT", file))
    assert upper == lower


def test_a_long_question_is_cut(folders, tmp_path, monkeypatch):
    """It counts as a text, though its answer comes after the first LENGTH tokens."""
    monkeypatch.setattr(leaf, "LENGTH", 20)
    rows = [{"instruction": " ".join(WORDS * 3), "output": "yes"}] * 9
    (tmp_path / "long.json").write_text(json.dumps(rows))
    texts = leaf.read_texts(str(tmp_path / "long.json"), folders["llama"])
    assert [len(ids) for ids in texts] == [20] * 9


def test_every_matrix_is_calibrated(folders, file, tmp_path):
    """Also the projections around the layers of OPT-350m."""
    torch.manual_seed(0)
    vocab = load_tokenizer(folders["opt"]).vocab_size
    model = Transformer(small_config("opt", vocab_size=vocab, max_positions=128, embed_dim=16))
    shutil.copytree(folders["opt"], tmp_path / "base")
    save_pretrained(model, tmp_path / "base")
    quantize_folder(tmp_path / "base", tmp_path / "plain")
    quantize_folder(tmp_path / "base", tmp_path / "chosen", calibrate=file)
    plain, chosen = (tensors_of(tmp_path / name) for name in ("plain", "chosen"))
    codes = {n for n, t in plain.items() if t.dtype == torch.uint8 and n.endswith(".weight")}
    assert len(codes) == 20 and not any(torch.equal(plain[n], chosen[n]) for n in codes)


def test_on_the_command_line(folders, file, tmp_path):
    """Instructions and plain text; what cannot be used is refused before the model is loaded."""
    base, out = str(folders["llama"]), tmp_path / "out"
    rows = [{"instruction": f"Say {i} {w}", "output": f"{w} it is"} for i, w in enumerate(WORDS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.json", "texts.txt"):
        printed = run_script("model.py", "quantize", base, f"{out}-{name}", "--calibrate",
                             str(tmp_path / name), "--device", "cpu")
        assert "texts with" in printed and "nf4" in printed and "calibrated" in printed
    (tmp_path / "short.txt").write_text("the cat sat")
    (tmp_path / "empty.json").write_text("[]")
    for words, message in (
        (["--calibrate", str(tmp_path / "short.txt")], "only .* tokens .* give more texts"),
        (["--calibrate", str(tmp_path / "empty.json")], "empty.json holds no instructions"),
        (["--calibrate", str(tmp_path / "none.txt")], "none.txt is missing"),
        (["--calibrate", ""], "is missing: give a list"),
        (["--calibrate", str(file), "--device", "gpu"], "--device 'gpu' is unknown"),
        (["--device", "gpu"], "--device 'gpu' is unknown"),
        (["--calibrte", str(file)], "did you mean --calibrate"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_script("model.py", "quantize", base, str(out), *words)
        assert not out.exists()
    out.touch()  # seen before the texts pass through the model
    with pytest.raises(SystemExit, match="OUT .*out cannot be written to .File exists"):
        run_script("model.py", "quantize", base, str(out), "--calibrate", str(file))
    with pytest.raises(SystemExit, match="is in 4 bits already: there is nothing to do"):
        run_script("model.py", "quantize", f"{out}-rows.json", str(out), "--calibrate", str(file))


def test_bitsandbytes_reads_it(folders, file, tmp_path, monkeypatch):
    """transformers loads a calibrated folder, and computes our logits, where both are installed."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(leaf, "TEXTS", 16)
    quantize_folder(folders["llama"], tmp_path / "out", "nf4", str(file), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map="cpu"
    )
    assert any("4bit" in type(module).__name__ for module in theirs.modules())
    idx = torch.randint(3, 61, (3, 10))
    with torch.no_grad():
        expected = theirs.dequantize()(idx).logits
    ours = from_pretrained(tmp_path / "out", "nf4", torch.float32)
    assert (ours(idx) - expected).abs().max() < 1e-5 * expected.abs().max()
