"""What the notebooks build by hand, gathered into files: they need no slimlib, and do what slimlib does."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import standalone
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes
from PIL import Image

from slimlib import SlimCodec
from slimlib.data.scenes import PocketScenes
from slimlib.scales import ASSETS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return standalone.write(tmp_path_factory.mktemp("by_hand"))


@pytest.fixture(scope="module")
def by_hand(files: list[Path]) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(files[-1].parent))
        return importlib.import_module("slim_by_hand")


def test_every_file_is_complete(files: list[Path]) -> None:
    """No name is missing, nothing stands twice or goes unused, nothing comes from slimlib; all can be imported."""
    assert [path.name for path in files] == [*(f"ch{i:02d}.py" for i in (1, 2, 3, 4, 5, 6, 7, 9)), "slim_by_hand.py"]
    rules = ["check", "--isolated", "--select", "F", "--output-format", "concise"]
    told = subprocess.run([sys.executable, "-m", "ruff", *rules, *files], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert not [path.name for path in files if "slimlib" in path.read_text().partition('"""')[2].partition('"""')[2]]
    load = "import sys; sys.modules['slimlib'] = None; import " + ", ".join(path.stem for path in files)
    subprocess.run([sys.executable, "-c", load], cwd=files[0].parent, check=True, timeout=300)


def test_the_whole_method_makes_the_same_picture(files: list[Path], tmp_path: Path) -> None:
    """As a program of its own: the caption, the bytes but for the header, and the picture are slimlib's."""
    image = PocketScenes("test")[0].image
    image.save(tmp_path / "scene.png")
    command = [sys.executable, files[-1], ASSETS, tmp_path / "scene.png", tmp_path / "out.png", "--quality", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True).stdout
    codec = SlimCodec.from_pretrained("pocket", "cpu")
    stream = codec.compress(image, 0.2)
    report = codec.inspect(stream)
    assert f"caption: {report.caption or 'none'}," in said
    assert 0 < len(stream) - report.bits["header"] / 8 - int(said.split()[0]) + 3 < 6
    apart = np.abs(np.subtract(codec.decompress(stream), Image.open(tmp_path / "out.png"), dtype=float))
    assert (apart > 1).mean() < 0.02


def test_any_symbols_come_back(by_hand: ModuleType) -> None:
    """With weights that nobody has trained: what the encoder writes the decoder reads, h first, then y."""
    torch.manual_seed(0)
    model, counts = by_hand.Compressor().eval(), by_hand.frequency_tables().tolist()
    byte = torch.tensor([200])
    codes = by_hand.latent_codes(model, torch.randn(1, 4, 32, 32), byte)
    data = by_hand.arithmetic_encode(codes, by_hand.latent_tables(model, counts, byte, codes, (4, 4)))
    read: list[int] = []
    for code in by_hand.arithmetic_decode(data, by_hand.latent_tables(model, counts, byte, read, (4, 4))):
        read.append(code)
    assert read == codes and len(codes) == 8 * 16 + 64 * 64 and len(set(codes)) > 3
    assert by_hand.decoded_latent(model, byte, read, (4, 4)).shape == (1, 4, 32, 32)


def test_a_step_of_each_stage_trains_every_part(by_hand: ModuleType) -> None:
    """On toys for the frozen networks: losses are finite, and encoder, decoder and integer network move."""
    torch.manual_seed(0)
    model, mix = by_hand.Compressor().train(), torch.nn.Conv2d(4, 3, 1)
    unet = lambda z_t, t, encoder_hidden_states: SimpleNamespace(sample=0.1 * z_t + encoder_hidden_states.mean())  # noqa: E731
    machine = lambda x: x.mean((2, 3))  # noqa: E731
    z, m, abar = torch.randn(4, 4, 32, 32), torch.rand(4, 1, 32, 32).round(), torch.linspace(0.999, 0.01, 1000)
    optimizer = by_hand.optimizer_for(model, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(map(math.isfinite, by_hand.train_step(model, optimizer, z, m, 4, 1e-3)))
    how = torch.tensor([0, 1, 2, 0]), torch.randn(4, 7, 16), unet, mix, [machine, machine], abar
    told = by_hand.stage2_step(model, optimizer, z, m, *how, lambda q: 0 if q > 0.5 else 400, 1e-3)
    assert all(map(math.isfinite, told)) and told[1] > 0 and told[2] > 0
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("from slimlib.roi import gradcam", "uses slimlib"),
        ("print(1)", "runs nothing"),
    ],
)
def test_what_a_tagged_cell_may_not_do(source: str, why: str, tmp_path: Path) -> None:
    tagged = new_code_cell("def f():\n    return gradcam", metadata={"tags": ["standalone"]})
    if source.startswith("print"):
        tagged.source += f"\n\n\n{source}"
    cells = [new_markdown_cell("# 01 · Title"), new_code_cell(source), tagged]
    path = tmp_path / "01_one.ipynb"
    path.write_text(writes(new_notebook(cells=cells)))
    with pytest.raises(ValueError, match=why):
        standalone.read_cells([path])
