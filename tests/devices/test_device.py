"""Which device and dtype a command takes, and what it says of a GPU that torch cannot use; the GPUs
are pretended."""

import json
import os
import re

import pytest
import torch
from helpers import Forked

import qst
import train
from data import InputError
from data.devices.device import pick_device, pick_dtype
from data.run import report
from data.settings.flags import run_main
from train import TrainConfig


def test_apples_gpu_is_taken_where_there_is_no_cuda(monkeypatch):
    """`auto` takes it, in fp32; fp16 works, and bf16, which it lacks, is refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = pick_device("auto")
    assert device == pick_device("mps") == torch.device("mps")
    assert pick_dtype("auto", device) == torch.float32
    assert pick_dtype("fp16", device) == torch.float16
    with pytest.raises(InputError, match="--dtype bf16"):
        pick_dtype("bf16", device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device mps: torch sees 0 such GPUs here"):
        pick_device("mps")


def pretend_gpus(monkeypatch, n, error=None):
    """NVML counts n GPUs. Returns a list: on which of them a kernel was run, or would have been."""
    started, ones = [], torch.ones

    def on_gpu(*size, device=None, **more):
        if not str(device).startswith("cuda"):
            return ones(*size, device=device, **more)
        started.append(device)
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(torch, "ones", on_gpu)
    return started


def test_each_process_takes_its_own_gpu(monkeypatch):
    """torchrun numbers the processes of a machine; a number that is not there is refused."""
    started = pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InputError, match="--device cuda:2: torch sees 2 such GPUs here"):
        pick_device("cuda:2")
    assert started == ["cuda:1", "cuda:1", "cuda:0"]
    monkeypatch.delenv("LOCAL_RANK")
    assert pick_device("cuda") == torch.device("cuda:0")


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/"
)
OLD_GPU = (
    "CUDA error: no kernel image is available for execution on the device\nSearch for "
    "`cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/ for more information.\n"
)


@pytest.mark.parametrize("error", [OLD_DRIVER, OLD_GPU], ids=["driver", "GPU"])
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_that_this_torch_cannot_use(name, error, monkeypatch, tiny_model, tmp_path, capsys):
    """NVML counts it, and CUDA fails: one sentence, with why and what to do, in every command."""
    pretend_gpus(monkeypatch, 2, RuntimeError(error))
    with pytest.raises(InputError, match="or give --device cpu.$") as caught:
        pick_device(name)
    sentence = str(caught.value)
    assert re.split(r"\. |\n", error)[0] in sentence and "update its driver" in sentence
    assert "https://download.pytorch.org/whl/cu126" in sentence and "\n" not in sentence
    assert "Please" not in sentence and len(sentence) < 300
    flags = ["--base", str(tiny_model), "--device", name]
    run = [*flags, "--data", str(tmp_path / "x.jsonl"), "--out_dir", str(tmp_path / "out")]
    for main in (lambda: train.main(train.parse_args(run)),
                 lambda: qst.main([*flags, "--prompt", "x"])):
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        assert str(ended.value) == f"error: {sentence}"


def test_a_gpu_without_memory_is_not_called_old(monkeypatch):
    """The error goes on to where one sentence says that there is no more memory."""
    pretend_gpus(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(torch.OutOfMemoryError):
        pick_device("auto")
    with pytest.raises(SystemExit, match="There is no more memory: wait."):
        run_main(lambda: pick_device("auto"), "wait")


def test_the_dtype_of_a_gpu(monkeypatch):
    """`auto` is fp16 before Ampere, whose tensor cores know no bf16, and bf16 from there on."""
    gpus = {"V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "4090": (8, 9), "B200": (10, 0)}
    devices = [torch.device(f"cuda:{i}") for i in range(len(gpus))]
    sizes = dict(zip(devices, gpus.values()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", sizes.get)
    found = [pick_dtype("auto", device) for device in devices]
    assert found == 2 * [torch.float16] + 3 * [torch.bfloat16]
    assert pick_dtype("bf16", devices[1]) == torch.bfloat16  # who asks for it gets it
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("meta")) == torch.bfloat16


def test_attention_on_a_gpu_is_not_cudnns(monkeypatch):
    """It would build a plan for each new length of a batch."""
    pretend_gpus(monkeypatch, 1)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        pick_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        pick_device("auto")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_grows_in_place(name):
    """A command asks torch for it, but what the user has asked for counts more."""

    def settings():
        for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            os.environ.pop(other, None)
        os.environ.update({name: "max_split_size_mb:64"} if name else {})
        run_main(lambda: print(torch._C._accelerator_getAllocatorSettings()) or 0)

    expected = "max_split_size_mb:64" if name else "expandable_segments:True"
    assert Forked(settings).wait() == (0, f"{expected}\n", "")


def test_what_a_gpu_has_reserved(monkeypatch, tmp_path):
    """result.json has it beside what was allocated; on a CPU there is no such figure."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3)
    for device, reserved in (torch.device("cuda:0"), 3), (torch.device("cpu"), None):
        result = {}
        report.write_result(TrainConfig(out_dir=str(tmp_path)), result, device, 1.0)
        written = json.loads((tmp_path / "result.json").read_text())
        assert written == json.loads(json.dumps(result))
        assert written.get("peak_reserved_bytes") == reserved
        assert (written["peak_memory_bytes"] == 2) == bool(reserved)


@pytest.mark.parametrize("name", ["meta", "xpu", "cpu:3", "tpu", "cuda:x", "a" * 1000])
def test_other_devices_are_refused(name):
    """In one short sentence."""
    message = "is unknown: choose auto, cuda, cuda:1, mps or cpu"
    with pytest.raises(InputError, match=message) as caught:
        pick_device(name)
    assert len(str(caught.value)) < 200
