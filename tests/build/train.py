"""Train the built-in example of the project with the pieces that you wrote in mine.py.

    python tests/build/train.py                        as `python train.py`, with Muon
    python tests/build/train.py --downsample maxpool   any flag of train.py, but --sweep

It ends with the number of calls of each piece. --method qlora uses FrozenLinear's backward.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The project's train.py must be found before this file, which has its name.
sys.path[:] = [str(HERE.parents[1]), *(p for p in sys.path if Path(p).resolve() != HERE), str(HERE)]

from plug import PIECES, counted, plugged, unwritten  # noqa: E402

import train  # noqa: E402
from data import InputError  # noqa: E402
from data.settings.flags import run_main  # noqa: E402


def run(cfg, pieces):
    """Train with all pieces in place; return the result and the calls of each piece."""
    if missing := [name for name in PIECES if unwritten(getattr(pieces, name))]:
        message = f"not written yet: {', '.join(missing)}"
        raise InputError(f"{message}. Run `python -m pytest tests/build -rs`.")
    if cfg.sweep:
        raise InputError("--sweep trains several networks at once: leave it out here.")
    own, calls = counted(pieces)
    with plugged(own):
        return train.main(cfg), calls


def main():
    import mine

    cfg = train.parse_args()
    cfg.optimizer = cfg.optimizer or "muon"  # which calls newton_schulz
    _, calls = run(cfg, mine)
    print("\nYour code ran:", ", ".join(f"{name} {calls[name]:,}" for name in PIECES))


if __name__ == "__main__":
    run_main(main)
