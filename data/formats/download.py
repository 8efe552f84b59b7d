"""Verified downloads: a file is received as a `.part`, which a later run continues, and gets its
name after a check of its hash. An existing file is checked, and never changed."""

import hashlib
import os
import time
from http.client import HTTPException
from urllib.request import HTTPRedirectHandler, Request, URLError, build_opener

from tqdm import tqdm

from data import InputError
from data.formats.files import checksum

BROKEN = OSError, HTTPException  # a URLError is an OSError


class Redirects(HTTPRedirectHandler):
    """Follow redirects, and send the token to no other host: it may be anyone's."""

    def redirect_request(self, request, *about):
        new = super().redirect_request(request, *about)
        if (new.type, new.host) != (request.type, request.host):
            new.remove_header("Authorization")
        return new


def open_url(url, token="", start=0, timeout=60):
    """Open an address from the byte `start` on. timeout: seconds without an answer"""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    return build_opener(Redirects).open(Request(url, headers=headers), timeout=timeout)


def download(url, path, expected, size=None, token="", advice="", pauses=(1, 4, 16)):
    """Download one file, unless it exists, and return its path.

    expected: its SHA-256, or git's SHA-1; size: in bytes; advice: what else to do after an error
    pauses: seconds before each retry, if a server is busy, and does not say when, or breaks off
    """
    part = path.with_name(path.name + ".part")
    if path.exists():
        if (found := hash_of(path, expected)) != expected:
            raise InputError(f"{path} has the hash {found} instead of {expected}: remove it.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for pause in (*pauses, None):
        try:
            receive(url, part, size, token)
            break
        except BROKEN as error:
            at_once = type(error) is URLError or type(error) is OSError and error.errno
            code = getattr(error, "code", 0 if at_once else 500)  # 0: not reached, or a full disk
            if code == 416 and part.exists():  # nothing is missing
                break
            if pause is None or code < 500 and code != 429:
                to_do = f"run this again to continue, or put the file at {path} yourself{advice}"
                raise InputError(f"{url} could not be downloaded ({error}): {to_do}.") from None
            asked = getattr(error, "headers", {}).get("Retry-After", "")
            time.sleep(min(60, float(asked)) if asked.isdecimal() else pause)
    if (found := hash_of(part, expected)) != expected:
        part.unlink()
        raise InputError(f"{url} has the hash {found} instead of {expected}: it was not kept.")
    return part.rename(path)


def receive(url, part, size, token):
    """Append the missing bytes to `part`, or write all bytes if the server knows no ranges."""
    have = part.stat().st_size if part.exists() else 0
    response = open_url(url, token, have)
    have = have if response.status == 206 else 0
    total = have + int(response.headers.get("Content-Length") or (size or have) - have)
    if size not in (None, total):
        raise InputError(f"{url} has {total:,} bytes instead of {size:,}: it was not kept.")
    about = dict(desc=url.rpartition("/")[2], total=total, initial=have)
    bar = tqdm(**about, unit="B", unit_scale=True, delay=1)  # none for a small file
    with response, open(part, "ab" if have else "wb") as file, bar:
        while piece := response.read(1 << 20):
            file.write(piece)
            bar.update(len(piece))
        if bar.n < total:
            raise OSError(f"it ended after {bar.n:,} of {total:,} bytes")
        file.flush()
        os.fsync(file.fileno())  # later runs trust what has its name


def hash_of(path, expected):
    """A file's SHA-256, or git's SHA-1 of it if that is expected."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    return checksum(path, git if len(expected) == 40 else None)
