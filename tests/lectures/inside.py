"""What happens inside of the steps of the embedded default, in numbers, and drawn in --out_dir.

    python tests/lectures/inside.py kept           which tensors one step keeps: QST, and QLoRA
    python tests/lectures/inside.py gradients      how large the gradients of the first steps are
    python tests/lectures/inside.py gates          alpha and every gate over the iterations
    python tests/lectures/inside.py downsamplers   the five beside each other

Flags of train.py may follow, such as --max_iters. README.md explains what is to be seen.
"""

import sys
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]  # tests/, and above

import torch  # noqa: E402

import train  # noqa: E402
from data import InputError  # noqa: E402
from data.devices.device import loss_and_kept  # noqa: E402
from data.formats.files import make_writable_folder  # noqa: E402
from data.run.charts import line_chart  # noqa: E402
from benchmarks.charts import bar_chart  # noqa: E402
from data.run.run import Run  # noqa: E402
from data.settings.flags import run_main  # noqa: E402
from data.tasks import tiny  # noqa: E402
from data.tasks.examples import collate, iteration_batches  # noqa: E402
from side import DOWNSAMPLERS  # noqa: E402

LANES = "inside of the base", "h_f, for a downsampler", "inside of the side network"


def start(cfg):
    """The model and the data of the embedded default, before the first step."""
    if cfg.base or cfg.side:
        raise InputError("This is of the embedded default: leave out --base and --side.")
    cfg = train.resolve(cfg)
    make_writable_folder(cfg.out_dir, "--out_dir")
    folder = tiny.base_folder(train.make_tiny_base)
    tokenizer = train.load_tokenizer(folder)
    base = train.from_pretrained(folder, cfg.quant, torch.float32)
    task = train.load_task(cfg, tokenizer, base.config)
    torch.manual_seed(cfg.seed)
    return cfg, train.make_model(cfg, base, task), task


def steps(cfg, model, task):
    """Train; yield each iteration's number and loss before its optimizer steps on."""
    run = Run(model, cfg)
    rows = iteration_batches(task.train, cfg.batch_size, 1, cfg.seed)
    for i, batches in enumerate(islice(rows, cfg.max_iters)):
        ((loss, _),) = train.train_step([run], batches, i + 1)
        yield i + 1, loss.item()


def kept_tensors(model, idx, targets):
    """The storages that a forward pass keeps for backward: [(name of the module that keeps it,
    shape, bytes), ...], without the weights themselves."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    running, kept, alive = [""], {}, weakref.WeakValueDictionary()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in alive:
            alive[storage._cdata] = storage
            kept[storage._cdata] = running[-1], tuple(tensor.shape), storage.nbytes()
        return tensor

    hooks = []
    for name, module in model.named_modules():
        enter = lambda *args, name=name: running.append(name)
        hooks += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(lambda *args: running.pop() and None),
        ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(idx, targets)  # held until here, and with it what it keeps
    for hook in hooks:
        hook.remove()
    found = [kept[key] for key in kept if key in alive]
    del loss
    return found


def lane(name, shape, width):
    """Where a tensor belongs in the picture: its lane and its row."""
    parts = name.split(".")
    if parts[:2] == ["side", "downsample"]:
        return LANES[1] if shape[-1] == width else LANES[2], f"layer {parts[2]}"
    if parts[1:2] == ["layers"]:
        return LANES[0] if parts[0] == "base" else LANES[2], f"layer {int(parts[2]) + 1}"
    return (LANES[2] if parts[0] == "side" else LANES[0]), "end"


def kept(cfg):
    """Print and draw what each layer of QST and of QLoRA keeps."""
    bars, rows = {}, {}
    for method in ("qst", "qlora"):
        own, model, task = start(replace(cfg, method=method))
        longest = sorted(task.train, key=lambda example: len(example[0]))[-own.batch_size :]
        idx, targets = collate(longest)
        N = model.config.n_layer
        for row in ["layer 0", *(f"layer {i}" for i in range(1, N + 1))]:
            bars[f"{method.upper()}, {row}"] = dict.fromkeys(LANES, 0.0)
        rows[method] = kept_tensors(model, idx, targets)
        for name, shape, nbytes in rows[method]:
            where, row = lane(name, shape, model.config.n_embd)
            if row != "end":
                bars[f"{method.upper()}, {row}"][where] += nbytes / 1e6
    B, T = idx.shape
    print(f"MB that a step of {B} x {T} tokens keeps for backward (layer 0: the embedding)")
    print(f"{'':20}" + "".join(f"{name:>28}" for name in LANES))
    for row, parts in bars.items():
        print(f"{row:20}" + "".join(f"{value:28.3f}" for value in parts.values()))
    print("\nOf QST, layer 3:")
    for name, shape, nbytes in rows["qst"]:
        if lane(name, shape, 0)[1] == "layer 3":
            print(f"{name:40} {' x '.join(map(str, shape)):16} {nbytes / 1e3:8.1f} kB")
    picture(cfg, bar_chart, "kept", "MB that a step keeps for backward", bars)


def gradients(cfg):
    """Print the norm of the gradient of each part, for the first steps."""
    cfg, model, task = start(replace(cfg, method="qst"))
    parts = "alpha", "gamma", "downsample", "layers", "upsample"
    norms = dict.fromkeys(parts, 0.0)

    def note(name):
        def add(gradient):
            norms[name] = (norms[name] ** 2 + gradient.norm().item() ** 2) ** 0.5
        return add

    for name, parameter in model.side.named_parameters():
        parameter.register_hook(note(name.split(".")[0]))
    print("iteration     alpha" + "".join(f"{f'|d {part}|':>16}" for part in parts))
    alpha = model.side.alpha.item()
    for i, _ in steps(cfg, model, task):
        print(f"{i:9} {alpha:9.5f}" + "".join(f"{norms[part]:16.6f}" for part in parts))
        alpha, norms = model.side.alpha.item(), dict.fromkeys(parts, 0.0)


def gates(cfg):
    """Train, and print and draw alpha and the gate of every layer."""
    cfg, model, task = start(replace(cfg, method="qst", gate="scalar", mix="alpha"))
    names = ["alpha", *(f"beta {i}" for i in range(1, model.config.n_layer + 1))]
    values = lambda: [model.side.alpha.item(), *torch.sigmoid(model.side.gamma).tolist()]
    lines = {name: [(0, value)] for name, value in zip(names, values())}
    print("iteration     loss" + "".join(f"{name:>9}" for name in names))
    for i, loss in steps(cfg, model, task):
        for line, value in zip(lines.values(), values()):
            line.append((i, value))
        if i in (1, cfg.max_iters) or i % 10 == 0:
            print(f"{i:9}{loss:9.3f}" + "".join(f"{value:9.4f}" for value in values()))
    picture(cfg, line_chart, "gates", "alpha, and the gate beta of each layer", "iteration", lines)


def downsamplers(cfg):
    """Train with each of the downsamplers, and compare."""
    print("              trainable   of these, down   MB kept      loss of the last ten iterations")
    for kind in DOWNSAMPLERS:
        own, model, task = start(replace(cfg, method="qst", downsample=kind))
        idx, targets = collate(task.train[: own.batch_size])
        down = sum(p.numel() for p in model.side.downsample.parameters())
        total = sum(p.numel() for p in model.parameters())
        size = loss_and_kept(model, idx, targets)[1] / 1e6
        losses = [loss for _, loss in steps(own, model, task)][-10:]
        mean = sum(losses) / len(losses)
        print(f"{kind:12}{total:11,}{down:17,}{size:10.1f}{mean:31.3f}", flush=True)


def picture(cfg, draw, name, title, *content):
    path = Path(cfg.out_dir or "out") / f"{name}.svg"
    draw(path, title, *content)
    print(f"\nDrawn in {path}.")


VIEWS = {  # its name: (function, iterations)
    "kept": (kept, 1), "gradients": (gradients, 3), "gates": (gates, 60),
    "downsamplers": (downsamplers, 20),
}


def main(words):
    if not words or words[0] not in VIEWS:
        known = ", ".join(VIEWS)
        raise InputError(f"It is `python tests/lectures/inside.py VIEW`, VIEW one of {known}.")
    view, iterations = VIEWS[words[0]]
    view(train.parse_args(["--max_iters", str(iterations), *words[1:]]))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
