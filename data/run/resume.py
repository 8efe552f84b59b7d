"""--resume: continue a run from the state in its out_dir.

The state may come from a stranger: it is no pickle, and every value in it is checked.
"""

import json

import torch

from data import InputError, leaf
from data.formats.fields import (
    TABLE, TEXT, Kind, either, field, first_few, list_of, number, shown, table_of, whole,
)
from data.formats.files import file_size
from data.formats.safetensors import copy_into, tensor_bytes
from data.run import checkpoint
from data.run.log import NAMES
from data.run.optim import kept_state
from data.run.state import FILES

TENSOR = Kind("a tensor", lambda v: isinstance(v, torch.Tensor))
COUNT = whole(0, 1 << 50)
MOMENT = either(TENSOR, COUNT)
REAL = Kind("a number", lambda v: type(v) in (int, float))  # also NaN: the loss of a step left out
POINTS = table_of(list_of(list_of(REAL, 2, 2)))
CURVES = Kind(f"the curves {', '.join(NAMES)}",
              lambda v: POINTS.fits(v) and (*v,) == NAMES and v["held out"])
TEXTS = {"prompt", "expected", "answer"}
SAMPLE = Kind("a table of texts", lambda v: table_of(TEXT).fits(v) and {*v} == TEXTS)
LOG = {  # what is neither a count nor any number in the log
    "seconds": number(0, 1e12),
    "before": table_of(either(REAL, table_of(REAL), list_of(SAMPLE))),
    "step_ms": list_of(REAL), "curves": CURVES, "rows": list_of(list_of(either(COUNT, TEXT), 8, 8)),
}
SCALER = {"scale": number(1e-30, 1e30), "_growth_tracker": whole(0, 1 << 31)}  # what fp16 changes
PARTS = dict(about=TABLE, side=table_of(TENSOR), moments=table_of(TABLE), scaler=TABLE, log=TABLE)
MAY_DIFFER = "resume out_dir max_iters epochs device stream compile log_interval".split()
MAY_DIFFER += ["preamble"]  # it belongs to the data


def load(run):
    """Load the newest state in a `Run`'s out_dir into it; returns whether there is one."""
    state, path = load_state(run.out_dir)
    if state is None:
        if (run.out_dir / "result.json").exists():
            raise InputError(f"{run.out_dir} has a result.json, and no state: leave out --resume.")
        print(f"{run.out_dir} has no state to continue from: the run begins.")
        return False
    about, side, moments, scaler, log = (field(path, state, *part) for part in PARTS.items())
    refuse_others(run.out_dir, about, run.about)
    log.setdefault("before", {})  # not in older states
    kinds = {int: COUNT, float: REAL}
    log = {name: field(path, log, f"log.{name}", LOG.get(name) or kinds[type(value)])
           for name, value in run.log.state().items()}
    if run.scaler.is_enabled():
        scaler = {name: field(path, scaler, f"scaler.{name}", k) for name, k in SCALER.items()}
    copy_into(run.model.side, side, path)
    load_moments(run.optimizer, moments, path)
    run.scaler.load_state_dict(run.scaler.state_dict() | scaler)
    vars(run.log).update(log)
    ended = "" if run.interrupted else " It had ended, and is scored again."
    print(f"{run.out_dir} continues after iteration {run.log.iteration}.{ended}")
    return True


def refuse_others(out_dir, old, new):
    """Refuse to continue a run with other settings."""
    old = dict(heads=new.get("heads"), nproc_per_node=new.get("nproc_per_node"), layers=0) | old
    for name, value in new.items():
        if name not in MAY_DIFFER and old.get(name) != value:
            values = f"{shown(old.get(name))} and not {shown(value)}: give the same"
            raise InputError(f"--resume: {out_dir} was begun with another --{name}, {values}.")


def load_moments(optimizer, moments, where):
    """Load an optimizer's state strictly. Its groups, and so the learning rates, stay as they are.

    `Optimizer.load_state_dict` would convert 8-bit moments into the parameters' dtype.
    moments: {number of a parameter, as a text: {name: tensor}}; "step" is a number for 8 bits
    """
    parameters = [(g, p) for g in optimizer.param_groups for p in g["params"]]
    form = lambda v: (v.shape, v.dtype == torch.uint8) if isinstance(v, torch.Tensor) else None
    if unknown := sorted(set(moments) - {str(i) for i in range(len(parameters))}):
        raise InputError(f"{where}: the optimizer has no parameter {first_few(unknown)}.")
    for index, own in moments.items():
        group, p = parameters[int(index)]
        own = {name: field(where, own, name, MOMENT) for name in own}
        expected = kept_state(type(optimizer), group.get("muon"), p.shape, p.dtype)
        if "root" in own:  # of a commit whose code book for it was the signed one
            expected = {name.removeprefix("unsigned_"): kept for name, kept in expected.items()}
        if {n: form(v) for n, v in own.items()} != {n: form(v) for n, v in expected.items()}:
            message = f"the moments of parameter {index} are not of this optimizer"
            raise InputError(f"{where}: {message}: leave out --resume.")
        for name in [name for name, value in own.items() if form(value)]:
            own[name] = own[name].to(p.device, expected[name].dtype, copy=True)
        if "root" in own:
            in_8_bits = leaf("adamw8bit")
            root = in_8_bits.decode([own], "root", [p])
            in_8_bits.encode([own], "unsigned_root", [p], root, p.new_zeros(()) > 0)
            del own["root"], own["root_absmax"]
        optimizer.state[p] = own


def load_state(out_dir):
    """The state that there is, and its path; None, None without any. A damaged one stays."""
    for path in [out_dir / name for name in FILES if (out_dir / name).exists()]:
        file_size(path, "remove it")  # no folder, device or pipe
        try:
            return read_state(path), path
        except (ValueError, KeyError, RecursionError):  # also an InputError
            do = "without --resume the run begins anew, and replaces all"
            raise InputError(f"{path} is damaged: {do}.") from None
    return None, None


def read_state(path):
    """A state's tree; a ValueError, KeyError or RecursionError if it is damaged."""
    tensors = checkpoint.load(path.parent, path.name)
    text = bytes(tensor_bytes(tensors.pop("tree")))

    def with_tensor(table):
        is_one = [*table] == ["tensor"] and isinstance(table["tensor"], str)
        return tensors[table["tensor"]] if is_one else table

    return field(path, {"tree": json.loads(text, object_hook=with_tensor)}, "tree", TABLE)
