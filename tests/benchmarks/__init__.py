"""One file a subject; `python tests/bench.py` lists the commands, which are functions in them."""
