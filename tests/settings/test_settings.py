"""Settings and command lines: flags, defaults, and the user's mistakes."""

import re
from dataclasses import asdict, fields, replace

import pytest
from helpers import ROOT, run_forked, run_script

import qst
import train
from data import InputError
from data.formats.files import write_json
from data.settings.flags import GROUPS, run_main
from data.settings.methods import RELEASED
from side import METHODS, SideConfig
from train import TrainConfig


def test_every_field_is_a_flag(capsys):
    """`--name value` and `--name=value` both work, and booleans need no value."""
    flags = "--max_iters 7 --learning_rate=1e-3 --compile --final_norm=false --base=a=b"
    cfg = train.parse_args(flags.split())
    assert (cfg.max_iters, cfg.learning_rate, cfg.compile, cfg.final_norm) == (7, 1e-3, True, False)
    assert cfg.base == "a=b" and cfg.rank == 16
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert (f"--{f.name} " in shown) == f.metadata["flag"]


def test_the_help_of_data_leads_somewhere():
    """To the page of formats, which names the scripts that say where data comes from."""
    page = TrainConfig.__dataclass_fields__["data"].metadata["help"]
    page = (ROOT / re.search(r"data/[\w/]+\.md", page)[0]).read_text()
    named = sorted(set(re.findall(r"python (data/tasks/\w+\.py)", page)))
    for script in named:
        assert "where it comes from" in run_script(script, "--help"), script
    assert len(named) >= 3


def test_every_flag_has_a_group(capsys):
    """The most used come first; there are ten of them."""
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    _, *groups = re.split(r"\n\n(?=[a-z ]+:\n)", capsys.readouterr().out)
    titles = [group.partition(":")[0] for group in groups]
    assert titles == ["options", *GROUPS]
    flags = [re.findall(r"^  --(\w+)", group, re.M) for group in groups]
    assert len(flags[1]) == 10 and flags[0] == ["config"]
    assert sorted(sum(flags[1:], [])) == sorted(
        f.name for f in fields(TrainConfig) if f.metadata["flag"]
    )


def test_help_mentions_every_command(capsys):
    """Each command of qst.py has its --help, and the first names the others."""
    for words in ([], ["chat"], ["answer"], ["import-released"]):
        with pytest.raises(SystemExit) as stopped:
            qst.main([*words, "--help"])
        assert stopped.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "--base" in out and (words or "qst.py chat" in out and "qst.py answer" in out)


def test_defaults_are_the_papers():
    """With a real base, where the user says nothing."""
    cfg = train.resolve(TrainConfig(base="x", data="y"))
    assert (cfg.reduction, cfg.rank, cfg.downsample, cfg.quant) == (16, 16, "adapter", "nf4")
    assert (cfg.learning_rate, cfg.lr_schedule, cfg.sequence_len) == (2e-4, "constant", 384)


def test_defaults_of_a_method():
    """The base's storage, and LST's reduction, where the user says nothing."""
    done = {m: train.resolve(TrainConfig(base="x", data="y", method=m)) for m in METHODS}
    assert {m: c.quant for m, c in done.items()} == dict(
        qst="nf4", qlora="nf4", lst="none", lora="none", adapter="none", full="none", peqa="int4"
    )
    assert {m: c.reduction for m, c in done.items() if c.reduction != 16} == {"lst": 8}
    assert train.resolve(TrainConfig(method="lst", reduction=4)).reduction == 4


def test_a_variant_is_one_flag():
    """--variant sets what the architecture's own flags leave at the paper's values."""
    cfg = train.resolve(train.parse_args(["--variant", "fast", "--mix", "released"]))
    assert (cfg.mix, cfg.gate, cfg.standardize) == ("released", "sum", True)
    released = train.resolve(train.parse_args(["--variant", "released"]))
    side = replace(train.side_config(released), task="")
    assert side == SideConfig(**RELEASED | dict(reduction=4))
    message = "--variant .best. is unknown: choose paper, released, fast"
    with pytest.raises(InputError, match=message):
        train.resolve(train.parse_args(["--variant", "best"]))


@pytest.mark.parametrize("args, message", [
    (["train.py", "--lerning_rate", "1"], "--lerning_rate 1 (did you mean --learning_rate?)"),
    (["train.py", "--max_iters", "many"], "--max_iters"),
    (["train.py", "--compile=perhaps"], "--compile"),
    (["train.py", "--base", "/nowhere", "--data", "x"], "/nowhere is not a folder"),
    (["train.py", "--base", "/nowhere"], "--base needs --data"),
    (["train.py", "--data", "x"], "--data needs --base"),
    (["train.py", "--preset", "opt-125m"], "--preset"), (["train.py", "--plan"], "--plan"),
    (["train.py", "--batch_size", "0"], "--batch_size 0"),
    (["train.py", "--held_out", "1.5"], "--held_out 1.5"),
    (["train.py", "--learning_rate=-1"], "--learning_rate -1"),
    (["train.py", "--beta1", "1.5"], "--beta1 1.5"),
    (["train.py", "--downsample", "sum"], "--downsample 'sum'"),
    (["train.py", "--lr_schedule", "up"], "--lr_schedule 'up'"),
    (["train.py", "--device", "gpu"], "--device 'gpu'"),
    (["train.py", "--out_dir", str(ROOT / "LICENSE")], "LICENSE cannot be written to (File"),
    (["train.py", "--method", "QST"], "--method 'QST' is unknown"),
    (["train.py", "--method", ""], "--method '' is unknown"),
    (["train.py", "--out_dir", ""], "--out_dir is empty"),
    (["train.py", "--quant="], "--quant is empty"),
    (["train.py", "--learning_rate=nan"], "--learning_rate nan"),
    (["train.py", "--learning_rate=inf"], "--learning_rate inf must be below 1000"),
    (["train.py", "--learning_rate=1e30"], "--learning_rate 1e+30 must be below 1000"),
    (["train.py", "--alpha_lr_factor=inf"], "--alpha_lr_factor inf must be below"),
    (["train.py", "--weight_decay=inf"], "--weight_decay inf must be below 1000"),
    (["train.py", "--weight_decay=nan"], "--weight_decay nan must be at least 0"),
    (["train.py", "--seed", "1" + "0" * 22], "--seed 1"), (["train.py", "--seed=-1"], "--seed -1"),
    (["train.py", "--head", "classifier"], "--head classifier is not for --task tiny"),
    (["train.py", "--epochs", "2", "--max_iters", "9"], "--epochs sets the iterations of training"),
    (["train.py", "--epochs", "2", "--eval_only"], "leave out --max_iters and --eval_only"),
    (["train.py", "--lr", "1"], "--lr 1 (did you mean --learning_rate?)"),
    (["train.py", "--num_train_epochs", "3"], "(did you mean --epochs?)"),
    (["train.py", "--instructions", "x"], "--instructions is for --task mmlu, not tiny"),
    (["train.py", "--method", "lst", "--mix", "alpha"], "leave out --mix"),
    (["train.py", "--max_iters", "x" * 10**6], "invalid int value"),
    (["qst.py", "--base", "/nowhere", "--prompt", "x"], "/nowhere is not a folder"),
    (["qst.py", "--base", "/nowhere", "--prompt", "x", "--temprature=1"], "--temprature=1"),
])
def test_mistakes_on_the_command_line(args, message):
    """One sentence that names the flag or the file."""
    script, *flags = args
    with pytest.raises(SystemExit) as stopped:
        if script == "train.py":
            run_main(lambda: train.main(train.parse_args(flags)))
        run_main(lambda: qst.main(flags))
    assert message in stopped.value.code and "\n" not in stopped.value.code
    assert len(stopped.value.code) < 500


@pytest.mark.parametrize("flags, message", [
    (dict(h_f_bits=5), "--h_f_bits 5 is unknown: choose 16, 8, 4"),
    (dict(optimizer_bits=4), "--optimizer_bits 4 is unknown: choose 32, 8"),
    (dict(method="qlora", h_f_bits=8), "--h_f_bits is for --method qst and lst, not for qlora"),
    (dict(method="full", reduction=4), "--reduction is for --method qst"),
    (dict(method="peqa", variant="fast"), "--variant is for"),
    (dict(method="peqa", quant="int5"), "--quant int4 or int3, and not int5"),
    (dict(method="full", dtype="fp16"), "cannot train weights in --dtype fp16"),
])
def test_flags_that_contradict_the_method(flags, message):
    """The sentence names the flag, and the methods that read it or what they allow."""
    with pytest.raises(InputError, match=message):
        train.resolve(TrainConfig(**flags))


@pytest.mark.parametrize("method", METHODS)
def test_settings_can_be_given_back(method, tmp_path):
    """--config: those in a result.json make the same run, whatever the method; flags count more,
    of another method too."""
    given = dict(base="a/b", data="c d.jsonl", seed=2**40, method=method, max_iters=7, held_out=0.2)
    more = dict(variant="fast", h_f_bits=4) if method == "qst" else {}
    cfg = train.resolve(TrainConfig(**given | more))
    path = tmp_path / "result.json"
    write_json(path, dict(loss_before=1.0, config=asdict(cfg)))
    words = ["--config", str(path)]
    assert train.resolve(train.parse_args(words)) == cfg
    again = train.resolve(train.parse_args([*words, "--max_iters=9", "--seed", "3"]))
    assert again == replace(cfg, max_iters=9, seed=3)
    write_json(path, asdict(cfg))  # the settings alone
    assert train.resolve(train.parse_args(words)) == cfg
    other = train.resolve(train.parse_args([*words, "--method=qlora", "--quant=nf4"]))
    assert (other.method, other.max_iters) == ("qlora", 7)


def test_a_few_settings_in_a_file(tmp_path):
    """What is not in it has its default; a setting of earlier commits is left out."""
    path = tmp_path / "mine.json"
    write_json(path, dict(rank=4, compile=True, learning_rate=1, samples_interval=2))
    assert train.parse_args(["--config", str(path)]) == TrainConfig(
        rank=4, compile=True, learning_rate=1
    )


@pytest.mark.parametrize("text, message", [
    ("{", "mine.json"), ("[1]", "mine.json"), ('{"config": 3}', "config is 3; it must be a table"),
    ('{"lerning_rate": 1}', "lerning_rate"), ('{"rank": "x"}', "config.rank is 'x'"),
    ('{"rank": 0}', "config.rank is 0"), ('{"method": "QST"}', "config.method is 'QST'"),
    ('{"method": "lora"} --reduction 4', "--reduction is for --method qst"),
    ('{"base": 3}', "config.base is 3"),
])
def test_a_file_of_settings_that_is_wrong(text, message, tmp_path):
    """It is refused in one sentence, by its name and the field's; and so are flags that do not go
    with it."""
    path, (content, _, flags) = tmp_path / "mine.json", text.partition(" --")
    path.write_text(content)
    words = ["--config", str(path), *(f"--{flags}".split() if flags else ())]
    with pytest.raises(InputError) as error:
        train.resolve(train.parse_args(words))
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="nowhere.json"):
        train.parse_args(["--config", "nowhere.json"])


def test_a_mistake_shows_no_traceback():
    """The same from outside: a line on stderr and a failing exit code."""
    code, _, said = run_forked("train.py", "--base", "/nowhere", "--data", "x").wait()
    assert code == 1 and said.startswith("error: ") and len(said.strip().split("\n")) == 1
    with pytest.raises(SystemExit, match="^error: .*--promt x .did you mean --prompt"):
        run_script("qst.py", "--base", "x", "--promt", "x")


@pytest.mark.parametrize("flags, message", [
    (dict(temperature="nan"), "temperature nan must be 0, or from 0.001"),
    (dict(temperature="1e-300"), "temperature 1e-300"),
    (dict(temperature="inf"), "temperature inf"),
    (dict(top_p="0"), "top_p 0.0 must be above 0"), (dict(top_k="-1"), "top_k -1"),
    (dict(max_new_tokens="0"), "max_new_tokens 0"), (dict(seed="-1"), "seed -1"),
    (dict(seed="1" + "0" * 22), "seed 1"), (dict(quant="int5"), "--quant int5"),
])
def test_mistakes_when_generating(flags, message, tiny_model):
    """Each is one sentence; and `answer` leaves no empty file behind."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: qst.main(["--base", str(tiny_model), "--prompt", "x", *words]))
    assert message in stopped.value.code and "\n" not in stopped.value.code


def test_resume_in_the_default_folder(tmp_path, monkeypatch):
    """--resume alone goes on in out/, with the settings of the run there; an evaluation does not
    go on, and to merge is to merge something."""
    monkeypatch.chdir(tmp_path)
    assert train.parse_args(["--resume"]).max_iters is None
    (tmp_path / "out").mkdir()
    write_json("out/settings.json", {"max_iters": 7})
    assert train.parse_args(["--resume"]).max_iters == 7
    with pytest.raises(InputError, match="leave out --eval_only"):
        train.resolve(TrainConfig(resume=True, eval_only=True))
    (tmp_path / "out-eval").mkdir()
    write_json("out-eval/settings.json", {})
    with pytest.raises(InputError, match="--out_dir out-eval has a run whose result.json"):
        train.resolve(TrainConfig(base="x", data="y", eval_only=True))
    with pytest.raises(InputError, match="merge needs --side"):
        qst.main(["merge", "--base", "none", "--out", "merged"])
