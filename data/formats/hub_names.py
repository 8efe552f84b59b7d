"""Models of the Hugging Face Hub, in the cache of the package huggingface_hub: so each finds what
the other has downloaded. Its environment variables are ours: HF_HUB_CACHE, HF_TOKEN, ...

    models--ORG--MODEL/blobs/HASH              the files, checked against the Hub's hashes
    models--ORG--MODEL/snapshots/COMMIT/FILE   links to them: the folder of a model
    models--ORG--MODEL/refs/REVISION           the commit of a branch or a tag, when last seen
"""

import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from data import InputError
from data.formats import config_json, hub
from data.formats.download import BROKEN, PAUSES, download, open_url, retry
from data.formats.fields import TABLE, TEXT, Kind, field, list_of, reason, whole
from data.formats.files import LARGEST_SETTINGS, locked, parse_json, write_atomically

NAME = r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*(@[a-z0-9][\w./-]*)?"
HASH = Kind("a hash", lambda v: type(v) is str and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", v))
SMALL = r"((generation_|tokenizer_)?config|tokenizer|added_tokens|special_tokens_map|vocab)\.json" \
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja"
WEIGHTS = (  # of the first that the model has, in the order of `hub.find_files`
    r"model\.safetensors", r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin", r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
)


def model_folder(name, weights=True):
    """Return the folder of ORG/MODEL[@REVISION], after downloading what it lacks. Without a
    connection it must be complete. What is no such name is returned as a path."""
    if not re.fullmatch(NAME, str(name), re.ASCII | re.IGNORECASE) or ".." in name:
        return Path(name)
    model, _, revision = name.partition("@")
    revision = revision or "main"
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    root = cache / f"models--{model.replace('/', '--')}"
    site = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    advice = f"or, if it is gated, accept its terms at {site}/{model} and set HF_TOKEN"
    about = ask(site, model, revision, headers, advice)
    ref = root / "refs" / revision
    commit = field(site, about, "sha", HASH, ref.read_text() if ref.is_file() else revision)
    folder = root / "snapshots" / commit
    if not (about or folder.is_dir()):
        raise InputError(f"{name} is neither a folder nor in {root}: connect to download it.")
    listed = field(site, about, "siblings", list_of(TABLE), [])
    files = {field(site, file, "rfilename", TEXT): file for file in listed}

    def get(pattern):
        """Download the files whose names match; return their names."""
        names = [name for name in files if re.fullmatch(pattern, name)]
        for name in names:
            url = f"{site}/{model}/resolve/{commit}/{name}"
            fetch(url, root / "blobs", folder / name, files[name], headers, advice)
        return names

    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        get(SMALL)
        config_json.read(folder)  # refuses a model that we cannot load, before its weights come
        if weights:
            any(get(pattern) for pattern in WEIGHTS)
            hub.find_files(folder)  # refuses a folder that lacks some
        if about and commit != revision:
            write_atomically(ref, lambda file: file.write(commit.encode()))
    return folder


def ask(site, model, revision, headers, advice):
    """Ask the Hub for the commit and the files of a revision: {} without a connection."""
    url = f"{site}/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {}
    try:
        with retry(lambda: open_url(url, headers, timeout=10)) as answer:
            return parse_json(answer.read(LARGEST_SETTINGS))
    except (*BROKEN, ValueError) as error:
        if getattr(error, "code", 500) in (401, 403, 404):
            what = f"{model} is no folder, and {site} has no such model or revision ({error})"
            raise InputError(f"{what}: check the name, {advice}.") from None
        print(f"{site}: {reason(error)}. We use what the cache holds.", file=sys.stderr)
        return {}


def fetch(url, blobs, path, file, headers, advice):
    """Download a file, unless `path` is there, to blobs, and link path to it. file: as listed"""
    if path.exists():
        return
    lfs = field(url, file, "lfs", TABLE, {"sha256": file.get("blobId")})
    blob = blobs / field(url, lfs, "sha256", HASH)
    size = field(url, file, "size", whole(0, 1 << 50))
    download(url, blob, blob.name, size, headers, advice, PAUSES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to a blob that is gone
    try:
        path.symlink_to(f"../../blobs/{blob.name}")
    except OSError:  # not every system has links
        blob.rename(path)
