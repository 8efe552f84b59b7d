"""Verified downloads: a file is received as a `.part`, which a later run continues, and gets its
name after a check of its hash. An existing file is checked, and never changed."""

import http.client
import time
from urllib.request import HTTPRedirectHandler, Request, URLError, build_opener

from tqdm import tqdm

from data import InputError
from data.formats.files import checksum

BROKEN = OSError, http.client.HTTPException  # a URLError is an OSError
PAUSES = (1, 4, 16)  # seconds before each retry, unless the server gives others


class Redirects(HTTPRedirectHandler):
    """Follow redirects. Another host, which may be anyone's, does not receive the token."""

    def redirect_request(self, request, *about):
        new = super().redirect_request(request, *about)
        if (new.type, new.host) != (request.type, request.host):
            new.remove_header("Authorization")
        return new


def open_url(url, headers, timeout=60):
    return build_opener(Redirects).open(Request(url, headers=headers), timeout=timeout)


def retry(action, pauses=PAUSES):
    """Call a function, and again after each pause if the server is busy or breaks off."""
    for pause in (*pauses, None):
        try:
            return action()
        except BROKEN as error:
            code = getattr(error, "code", 0 if type(error) is URLError else 500)  # 0: not reached
            if pause is None or code < 500 and code != 429:
                raise
            asked = getattr(error, "headers", {}).get("Retry-After", "")
            time.sleep(min(60, int(asked)) if asked.isdecimal() else pause)


def download(url, path, expected, size=None, headers={}, advice="", pauses=()):
    """Download one file, unless it exists, and return its path.

    expected: its SHA-256, or git's SHA-1; size: in bytes; advice: what else to do after an error
    """
    part = path.with_name(path.name + ".part")
    if path.exists():
        if (found := checksum(path, expected)) != expected:
            raise InputError(f"{path} has the SHA-256 {found} instead of {expected}: remove it.")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        retry(lambda: receive(url, part, size, headers), pauses)
    except BROKEN as error:
        if getattr(error, "code", 0) != 416:  # nothing is missing
            advice = advice or f"or get the file in another way and put it at {path}"
            what = f"could not be downloaded ({error}): run this again to continue, {advice}"
            raise InputError(f"{url} {what}.") from None
    if (found := checksum(part, expected)) != expected:
        part.unlink()
        raise InputError(f"{url} has the SHA-256 {found} instead of {expected}: it was not kept.")
    return part.rename(path)


def receive(url, part, size, headers):
    """Append the missing bytes to `part`, or write all bytes if the server knows no ranges."""
    have = part.stat().st_size if part.exists() else 0
    response = open_url(url, headers | ({"Range": f"bytes={have}-"} if have else {}))
    have = have if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else size or 0
    if size not in (None, total):
        raise InputError(f"{url} has {total:,} bytes instead of {size:,}: it was not kept.")
    desc = url.rpartition("/")[2]
    bar = tqdm(desc=desc, initial=have, total=total, unit="B", unit_scale=True, delay=1)
    with response, open(part, "ab" if have else "wb") as file, bar:
        while piece := response.read(1 << 20):
            file.write(piece)
            bar.update(len(piece))
        if bar.n < total:
            raise OSError(f"it ended after {bar.n:,} of {total:,} bytes")
