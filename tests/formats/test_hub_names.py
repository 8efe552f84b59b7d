"""data/formats/hub_names.py, against a Hub on this machine that redirects, breaks off and lies."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from account import AccountConfig, config_of
from small_hub import COMMIT, LATER, SHARDS, Handler, Hub, git_hash, sha256

import model
import qst
import train
from data import InputError, find_folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub(server.server_port, tmp_path / "cache")
    hub.server = server
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.cache))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def stop(hub):
    hub.server.shutdown()
    hub.server.server_close()


def test_a_model_is_downloaded_once(hub, monkeypatch, capsys):
    """Only what we load, in the layout of huggingface_hub; afterwards it is there without a
    connection, and without the question if the environment says so."""
    folder = find_folder("org/model")
    needed = {"config.json", "tokenizer_config.json", "model.safetensors.index.json", *SHARDS}
    assert folder == hub.snapshot() and {p.name for p in folder.iterdir()} == needed
    assert {*hub.asked[1:]} == needed and len(hub.asked) == 1 + len(needed)
    for name in needed:
        content = hub.files[name]
        large = name.endswith("safetensors")
        stated = sha256(content) if large else git_hash(content)
        assert (folder / name).read_bytes() == content
        assert (folder / name).readlink() == Path("../../blobs") / stated
    assert len(list((hub.root / "blobs").iterdir())) == len(needed)  # no .part is left
    assert (hub.root / "refs" / "main").read_text() == COMMIT
    ref = (hub.root / "refs" / "main").stat()
    assert find_folder("org/model") == folder and len(hub.asked) == 2 + len(needed)
    assert (hub.root / "refs" / "main").stat() == ref  # others' cache may not be ours to write to
    stop(hub)
    capsys.readouterr()
    assert find_folder("org/model") == folder and "downloaded before" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_folder("org/model") == folder and capsys.readouterr().err == ""
    (hub.root / "refs/main").write_bytes(b"\xff\0")  # which is damaged
    with pytest.raises(InputError, match="neither a folder nor in .*: connect"):
        find_folder("org/model")


def test_what_is_not_whole_is_refused_without_a_connection(hub, monkeypatch, capsys):
    """A model that was never seen, and one of which a part is missing: one sentence."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="neither a folder nor in .*: connect .*OFFLINE is set"):
        find_folder("org/model")
    assert not hub.cache.exists() and hub.asked == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, value, why in (("HF_ENDPOINT", "127.0.0.1", "connect .*127.0.0.1/api.*unknown url"),
                             ("HF_HUB_CACHE", "/proc/no", "HF_HUB_CACHE: /proc/no/.* written to")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=why):
            patch.setenv(name, value)
            find_folder("org/model")
    assert "downloaded before" not in capsys.readouterr().err
    folder = find_folder("org/model")
    stop(hub)
    (folder / SHARDS[2]).resolve().unlink()
    with pytest.raises(InputError, match=f"{SHARDS[2]} is missing"):
        find_folder("org/model")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing"):
        find_folder("org/model")


def test_a_revision(hub):
    """A branch, a tag or a commit; a commit has no ref, and the same file is kept once."""
    main = find_folder(f"org/model@{COMMIT}")
    assert main == hub.snapshot() and not (hub.root / "refs").exists()
    folder = find_folder("org/model@refs/pr/1")
    assert folder == hub.snapshot(LATER) and (hub.root / "refs/refs/pr/1").read_text() == LATER
    assert (folder / SHARDS[0]).resolve() == (main / SHARDS[0]).resolve()
    assert hub.asked.count(SHARDS[0]) == 1
    stop(hub)
    assert find_folder("org/model@refs/pr/1") == folder
    assert find_folder(f"org/model@{COMMIT}") == main


def test_only_the_settings(hub):
    """tests/account.py needs no weights, which come later."""
    folder = find_folder("org/model", weights=False)
    assert {p.name for p in folder.iterdir()} == {"config.json", "tokenizer_config.json"}
    config = config_of(AccountConfig(base="org/model"))
    assert config == model.read_config(folder) and not (folder / SHARDS[0]).exists()
    assert (find_folder("org/model") / SHARDS[0]).exists()


def test_the_token_stays_with_its_host(hub, monkeypatch):
    """A redirect to another host is followed without it, and one to the same host with it."""
    monkeypatch.setenv("HF_TOKEN", "sec\nret\n")
    hub.elsewhere = hub.other_host
    find_folder("org/model")
    here, there = hub.url.partition("//")[2], hub.other_host.partition("//")[2]
    assert {*hub.tokens} == {(here, "Bearer secret"), (there, None)}
    hub.elsewhere, hub.tokens[:] = hub.url, []
    find_folder("org/model@refs/pr/1")
    hub.root.rename(hub.cache / "away")
    find_folder("org/model")
    assert {*hub.tokens} == {(here, "Bearer secret")} and len(hub.tokens) > 16


def test_a_broken_transfer_goes_on(hub):
    """From where it broke off; nothing is asked for twice."""
    hub.breaks = {SHARDS[1]: 1000}
    folder = find_folder("org/model")
    assert (folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]
    assert hub.asked.count(SHARDS[1]) == 2 and len(hub.asked) == 10
    assert hub.ranges == ["bytes=1000-"]


def test_a_busy_server_is_asked_again(hub, monkeypatch):
    """After the time that it names, but not for ever; and an error is a sentence."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    find_folder("org/model", weights=False)
    hub.answers = [None, (429, {"Retry_After": "7"}), (503, {"Retry_After": "9999"})]
    find_folder("org/model")
    assert pauses == [7, 60]
    hub.root.rename(hub.cache / "away")
    hub.answers = [None] + [(500, {})] * 4
    with pytest.raises(InputError, match="HTTP Error 500.*run this again to continue"):
        find_folder("org/model")
    assert pauses[2:] == [1, 4, 16]
    hub.answers = [None, (429, {"Retry_After": "9" * 5000}), (416, {})]
    with pytest.raises(InputError, match="HTTP Error 416.*run this again to continue"):
        find_folder("org/model")  # there is no part that could be whole
    assert pauses[5:] == [60]


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_the_hub_refuses(hub, code):
    """The sentence says what may be wrong, and how to get a gated model."""
    terms = f"accept its terms at {hub.url}/org/model and set HF_TOKEN"
    hub.answers = [(code, {})]
    with pytest.raises(InputError, match=f"no such folder.*{code}.*name.*{terms}"):
        find_folder("org/model")
    hub.answers = [None, (code, {})]
    with pytest.raises(InputError, match=f"config.json.*{code}.*{terms}"):
        find_folder("org/model")
    assert not hub.snapshot().exists() or not list(hub.snapshot().iterdir())


@pytest.mark.parametrize("name, lie, message", [
    (SHARDS[0], {"size": 5}, "bytes instead of 5: it was not kept"),
    (SHARDS[0], {"size": 10**9}, "bytes instead of 1,000,000,000: it was not kept"),
    (SHARDS[0], {"lfs": {"sha256": "0" * 64}}, f"instead of {'0' * 64}: it was not kept"),
    ("config.json", {"blobId": "0" * 40}, f"instead of {'0' * 40}: it was not kept"),
    ("config.json", {"blobId": "../../../x"}, "must be a hash"),
    ("config.json", {"size": "5"}, "must be a whole number"),
])
def test_lies_are_refused(hub, name, lie, message):
    """A size or a hash that is not as stated leaves neither a file nor a part of one."""
    hub.lies = {name: lie}
    with pytest.raises(InputError, match=message):
        find_folder("org/model")
    assert not (hub.snapshot() / name).exists()
    assert not list(hub.root.glob("blobs/*.part")) and not list(hub.root.glob("refs/*"))


@pytest.mark.parametrize("name, value, cache", [
    ("XDG_CACHE_HOME", "x", "x/huggingface/hub"), ("HF_HOME", "x", "x/hub"),
    ("HF_HUB_CACHE", "$HERE/x", "h/x"), ("HF_HOME", "${HERE}", "h/hub"),
])
def test_where_the_cache_is(hub, name, value, cache, monkeypatch):
    """Where huggingface_hub has it, for all that its documentation names."""
    monkeypatch.setenv("HERE", "h")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(name, value)
    folder = find_folder("org/model", weights=False)
    assert folder == Path(cache) / "models--org--model" / "snapshots" / COMMIT and folder.is_dir()


def test_answers_that_are_none(hub, monkeypatch):
    """A commit that is no hash becomes no path, and a page of a gateway is no connection."""
    hub.revisions["main"] = "../../x"
    with pytest.raises(InputError, match="must be a hash"):
        find_folder("org/model")
    hub.answers = [(200, {})]
    with pytest.raises(InputError, match="neither a folder nor in"):
        find_folder("org/model")
    for content in ("[]", "null", '"x"'):
        monkeypatch.setattr("small_hub.json.dumps", lambda about: content)
        with pytest.raises(InputError, match="neither a folder nor in"):
            find_folder("org/model")


def test_pickled_weights_only_without_safetensors(hub):
    """And a model that has none of both is refused."""
    for name in [*SHARDS, "model.safetensors.index.json"]:
        del hub.files[name]
    bin_file = hub.cache.parent / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.ones(3)}, bin_file)
    hub.files["pytorch_model.bin"] = bin_file.read_bytes()
    assert (find_folder("org/model") / "pytorch_model.bin").exists()
    del hub.files["pytorch_model.bin"]
    hub.revisions["main"] = LATER
    with pytest.raises(InputError, match="has no weights"):
        find_folder("org/model")


def test_an_unknown_architecture_is_refused_before_its_weights(hub):
    hub.files["config.json"] = b'{"model_type": "gpt2"}'
    with pytest.raises(InputError, match="config.json: model_type is 'gpt2'"):
        find_folder("org/model")
    assert SHARDS[0] not in hub.asked


def test_what_huggingface_hub_has_cached_is_used(hub):
    """Its layout, written by hand: a whole blob, and a link to one that was removed."""
    content, blobs = hub.files[SHARDS[0]], hub.root / "blobs"
    hub.snapshot().mkdir(parents=True)
    blobs.mkdir()
    for name in (SHARDS[0], SHARDS[1]):
        stated = sha256(hub.files[name])
        (hub.snapshot() / name).symlink_to(f"../../blobs/{stated}")
    (blobs / sha256(content)).write_bytes(content)
    folder = find_folder("org/model")
    assert SHARDS[0] not in hub.asked and hub.asked.count(SHARDS[1]) == 1
    assert (folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]
    assert (blobs / sha256(hub.files[SHARDS[1]])).exists() and (folder / SHARDS[1]).is_symlink()


def test_a_full_disk(hub, monkeypatch):
    """One sentence, at once: to ask again does not help."""
    resource = pytest.importorskip("resource")  # which Windows lacks
    monkeypatch.setattr("time.sleep", lambda seconds: 1 / 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(InputError, match="File too large.*run this again to continue"):
            find_folder("org/model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_two_at_once(hub):
    """One downloads while the other waits."""
    folders = set(ThreadPoolExecutor(4).map(find_folder, ["org/model"] * 4))
    assert folders == {hub.snapshot()} and len(hub.asked) == 4 + 8


def test_folders_and_other_names(hub, tmp_path):
    """A folder wins, and what is no name of the Hub is not asked for."""
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert find_folder("org/model") == Path("org/model")
    for name in "./x ../x /a/b a/b/c a a/ a/.. a/b@../x a/b@ -a/b ~/x https://x/a".split():
        with pytest.raises(InputError, match="is not a folder: give one, or ORG/MODEL"):
            find_folder(name)
    assert hub.asked == []


def test_a_run_and_its_commands(hub, cfg, tiny_model, tmp_path, capsys):
    """train.py, its --resume and --sweep, qst.py and model.py take the name; settings keep it."""
    hub.files = {path.name: path.read_bytes() for path in Path(cfg["base"]).iterdir()}
    settings = cfg | dict(base="org/model", max_iters=1, eval_examples=2, batch_size=2)
    train.main(train.TrainConfig(**settings))
    result = train.main(train.TrainConfig(**settings | dict(max_iters=2, resume=True)))
    assert result["iterations"] == 2 and result["config"]["base"] == "org/model"
    assert "--base org/model " in capsys.readouterr().out  # the command to ask it
    swept = train.main(train.TrainConfig(**settings | dict(sweep="seed=1,2", out_dir="sweep")))
    assert [run["iterations"] for run in swept["runs"]] == [1, 1]
    capsys.readouterr()
    ask = ["--side", cfg["out_dir"], "--prompt", "x", "--max_new_tokens", "3"]
    qst.main(["--base", "org/model", *ask])
    of_name = capsys.readouterr().out
    qst.main(["--base", str(tiny_model), *ask])
    assert capsys.readouterr().out == of_name != ""
    model.main(["quantize", "org/model", "packed"])
    assert (tmp_path / "packed" / "tokenizer.model").exists()
