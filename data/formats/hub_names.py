"""Models of the Hugging Face Hub by name, in the cache of the package huggingface_hub, and with its
environment variables. models--ORG--MODEL there has the files in blobs/HASH, links to them in
snapshots/COMMIT, which is the model's folder, and a branch's or tag's commit in refs/REVISION."""

import os
import re
import sys
from pathlib import Path

from data import InputError
from data.formats import config_json, hub
from data.formats.download import BROKEN, download, open_url
from data.formats.fields import TABLE, Kind, field, list_of, whole
from data.formats.files import locked, make_writable_folder, parse_json, write_atomically

SMALL = r"((generation_|tokenizer_)?config|tokenizer|added_tokens|special_tokens_map|vocab)\.json" \
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja"
WEIGHTS = (  # the first that matches, as in `hub.find_files`
    r"model\.safetensors", r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin", r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
)
HASH = Kind("a hash", lambda v: type(v) is str and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", v))


def model_folder(name, weights=True):
    """Return the folder of ORG/MODEL[@REVISION], after downloading what it lacks. Without a
    connection it must be complete."""
    if not re.fullmatch(r"(?!.*\.\.)\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", str(name)):
        raise InputError(f"{name} is not a folder: give one, or ORG/MODEL of huggingface.co.")
    model, revision = f"{name}@main".split("@")[:2]
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface"
    home = os.environ.get("HF_HUB_CACHE", os.environ.get("HF_HOME", home) + "/hub")
    root = Path(os.path.expandvars(home)).expanduser() / f"models--{model.replace('/', '--')}"
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    advice = f"; if it is gated, accept its terms at {site}/{model} and set HF_TOKEN"
    about, problem, token = {}, "", "".join(os.environ.get("HF_TOKEN", "").split())
    url = f"{site}/api/models/{model}/revision/{revision.replace('/', '%2F')}?blobs=true"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("1", "ON", "YES", "TRUE"):
            about = {**parse_json(open_url(url, token, timeout=10).read())}
    except (*BROKEN, TypeError, ValueError) as error:
        if getattr(error, "code", 500) in (401, 403, 404):
            what = "there is no such folder, and the Hub shows no such model or revision"
            raise InputError(f"{name}: {what} ({error}): check the name{advice}.") from None
        problem = f"{url}: {error}"
    old = ref.read_text(errors="replace") if (ref := root / "refs" / revision).is_file() else ""
    commit = field(url, about, "sha", HASH, old or revision)
    folder, files = root / "snapshots" / commit, field(url, about, "siblings", list_of(TABLE), [])
    if not (about or folder.is_dir()):
        why = problem or "HF_HUB_OFFLINE is set"
        raise InputError(f"{name} is neither a folder nor in {root}: connect to get it ({why}).")
    if problem:
        print(f"{problem}. We use what was downloaded before.", file=sys.stderr)

    def get(pattern):
        """Download the files whose names match, and return them."""
        found = [file for file in files if re.fullmatch(pattern, str(file.get("rfilename")))]
        for file in found:
            path, size = folder / file["rfilename"], field(url, file, "size", whole(0, 1 << 50))
            lfs = field(url, file, "lfs", TABLE, {"sha256": file.get("blobId")})
            blob = root / "blobs" / field(url, lfs, "sha256", HASH)
            if not path.exists():
                address = f"{site}/{model}/resolve/{commit}/{path.name}"
                download(address, blob, blob.name, size, token, advice)
                path.unlink(missing_ok=True)  # a link whose blob was gone
                path.symlink_to(f"../../blobs/{blob.name}")
        return found

    if not folder.is_dir():
        make_writable_folder(folder, "HF_HOME or HF_HUB_CACHE:")
    with locked(root):
        get(SMALL)
        config_json.read(folder)  # refuses a model that we cannot load, before its weights come
        if weights:
            any(get(pattern) for pattern in WEIGHTS)
            hub.find_files(folder)  # refuses a folder that lacks some
        if about and commit not in (revision, old):
            write_atomically(ref, lambda file: file.write(commit.encode()))
    return folder
