"""What the checks of all pieces share: a sentence for what is wrong, and a hint."""

import traceback
from pathlib import Path

import torch

HERE = Path(__file__).parent
CHECKS, HINTS = {}, {}  # {piece: its check, or its hint}


def check_of(piece, hint):
    """Register the function below as the check of a piece."""

    def register(function):
        CHECKS[piece], HINTS[piece] = function, hint
        return function

    return register


def expect(ok, sentence):
    if not ok:
        raise AssertionError(sentence)


def expect_like(what, found, expected):
    """A tensor with the shape and the dtype of another."""
    expect(isinstance(found, torch.Tensor), f"{what} is a {type(found).__name__}, not a tensor.")
    shapes = tuple(found.shape), tuple(expected.shape)
    expect(shapes[0] == shapes[1], f"{what} has the shape {shapes[0]}, and must have {shapes[1]}.")
    dtypes = str(found.dtype)[6:], str(expected.dtype)[6:]
    expect(dtypes[0] == dtypes[1], f"{what} is {dtypes[0]}, and must be {dtypes[1]}.")


def expect_near(what, found, expected, mistakes=(), tolerance=1e-5):
    """A tensor with the values of another. mistakes: [(sentence, what one gets by it), ...]"""
    expect_like(what, found, expected)
    found, expected = found.detach().double(), expected.detach().double()
    near = lambda a: a.shape == found.shape and torch.allclose(found, a, 1e-4, tolerance)
    if near(expected):
        return
    for sentence, wrong in mistakes:
        expect(not near(wrong.detach().double()), sentence)
    expect(found.isfinite().all(), f"{what} has values that are NaN or infinite.")
    at = (found - expected).abs().argmax()
    place = [int(k) for k in torch.unravel_index(at, found.shape)]
    where = f" at {place}" if place else ""
    values = f"it is {found.flatten()[at]:.4g}, and must be {expected.flatten()[at]:.4g}"
    raise AssertionError(f"{what} differs most{where}: {values}.")


def expect_tuple(what, found, names):
    ok = isinstance(found, (tuple, list)) and len(found) == len(names)
    expect(ok, f"{what} must return {len(names)} things: {', '.join(names)}.")


def problem(piece, test):
    """Run a test of a piece: None, or what is wrong, with the piece's hint. A piece that is not
    written yet raises NotImplementedError."""
    try:
        torch.manual_seed(0)
        test()
    except NotImplementedError:
        raise
    except AssertionError as error:
        text = str(error).strip() or "an assertion in the code fails"
    except Exception as error:
        text = f"it stops with {type(error).__name__}: {str(error).strip()}{own_line(error)}"
    else:
        return None
    return f"{piece}: {text}\n\nHint: {HINTS[piece]}"


def own_line(error):
    """Where in mine.py an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == HERE / "mine.py"]
    return f" (mine.py, line {lines[-1]})" if lines else ""
