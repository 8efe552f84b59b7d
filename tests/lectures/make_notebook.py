"""Write qst.ipynb from notebook.py, whose cells begin with `# %%`, or `# %% [markdown]`.

    python tests/lectures/make_notebook.py
"""

import json
import re
from pathlib import Path

SOURCE = Path(__file__).parent / "notebook.py"


def cells(text):
    """Split a script in percent format into cells: [("code" or "markdown", text), ...]."""
    found = re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.S | re.M)
    return [
        ("markdown", re.sub(r"^# ?", "", body, flags=re.M).strip()) if mark
        else ("code", body.strip()) for mark, body in found
    ]


def notebook(text):
    """The same as nbformat 4 in JSON, without outputs."""
    made = []
    for i, (kind, body) in enumerate(cells(text)):
        cell = dict(cell_type=kind, id=f"cell-{i}", metadata={}, source=body.splitlines(True))
        made.append(cell | (dict(execution_count=None, outputs=[]) if kind == "code" else {}))
    kernel = dict(display_name="Python 3", language="python", name="python3")
    metadata = dict(kernelspec=kernel, language_info=dict(name="python"))
    whole = dict(cells=made, metadata=metadata, nbformat=4, nbformat_minor=5)
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path = SOURCE.with_name("qst.ipynb")
    path.write_text(notebook(SOURCE.read_text()))
    print(f"Written: {path}.")
