"""List the shapes of known models, as arguments of `ModelConfig`: to count memory without files."""

import json
from pathlib import Path

SHAPES = json.loads(Path(__file__).with_name("presets.json").read_text())
for shape in SHAPES.values():  # JSON has no tuples
    shape["no_rope"] = tuple(shape.get("no_rope", ()))
