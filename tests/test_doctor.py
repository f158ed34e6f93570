"""The self-check tells real weights from random ones, and what is missing from what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_codec import picture

from slimlib import doctor, paper
from slimlib.__main__ import main
from slimlib.imagenet import wnids
from slimlib.scales import PAPER, Scale

MACHINES = (PAPER.machine_a, PAPER.machine_b)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    return paper.save_stand_in(tmp_path_factory.mktemp("world"), tiny=True).with_(size=64)


def found(scale: Scale, data: str | None = None) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(scale, data, "cpu")}


def test_shipped_models_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STEPS", (1,))
    checks = found(Scale.from_name("pocket"))
    assert not [str(check) for check in checks.values() if check.status == "FAIL"]
    assert checks["stream"].status == "ok" and "K = 1" in checks["stream"].said
    assert {"VAE round trip", "latent", "UNet", "top-1, machine A", "top-1, machine B", "caption"} <= set(checks)


def test_random_weights_are_found_out(world: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STEPS", (1,))
    for i in range(4):
        path = tmp_path / wnids()[i] / f"{i}.JPEG"
        path.parent.mkdir()
        picture(70, 80, i).save(path)
    monkeypatch.setattr(doctor, "HANDFUL", 4)
    checks = found(world, str(tmp_path))
    failed = {name for name, check in checks.items() if check.status == "FAIL"}
    assert {"VAE round trip", "UNet", "top-1, machine A", "top-1, machine B"} <= failed
    assert checks["stream"].status == checks["diffusion model"].status == "ok"
    assert "predicts epsilon" in checks["diffusion model"].said and "scaling 0.18215" in checks["diffusion model"].said


def test_what_is_missing_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = found(PAPER.with_(compressor=str(tmp_path / "none"), size=64))
    for name in ("diffusion model", "captioner", "machine A", "machine B"):
        assert checks[name].status == "FAIL" and "--local-dir" in checks[name].said
    assert checks["compressor"].status == "note" and "train stage 1" in checks["compressor"].said
    assert checks["versions"].status == "ok" and checks["hub"].status == "note", "tests are offline"
    for name in ("VAE round trip", "latent", "UNet", "top-1, machine A", "top-1, machine B", "caption", "stream"):
        assert checks[name].status == "skip" and "needs the check" in checks[name].said
    assert all(len(line) <= doctor.WIDTH for check in checks.values() for line in str(check).splitlines())
    assert main(["doctor", "--scale", str(tmp_path)]) == 1
    assert "unknown scale" in capsys.readouterr().err


def test_models_are_asked_for_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub answers: a commit to pin, or why not; nothing is downloaded for that."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    asked = []

    def answer(self: HfApi, name: str, revision: str | None = None, timeout: float = 0) -> object:
        asked.append((name, revision))
        return type("ModelInfo", (), {"sha": "0123456789abcdef"})()

    monkeypatch.setattr(HfApi, "model_info", answer)
    said = doctor._hub(PAPER.with_(ldm=f"{PAPER.ldm}@main"))
    assert asked == [(PAPER.ldm, "main"), (PAPER.captioner, None), *((f"timm/{m}", None) for m in MACHINES)]
    assert f"{PAPER.ldm}@0123456789ab," in said and said.count("not pinned") == 3

    def refuse(self: HfApi, name: str, **options: object) -> object:
        import httpx

        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        raise HfHubHTTPError("403: access to this model is gated", response=response)

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(doctor.Failed, match="accept its terms"):
        doctor._hub(PAPER)
    assert doctor._hub(Scale.from_name("pocket")) == "not needed: all models are folders"


def test_short_of_memory_or_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: 11_000_000_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("usage", (), {"free": 5_000_000_000})())
    with pytest.raises(doctor.Failed, match=r"11\.0 GB free on cpu, 12 wanted"):
        doctor._memory(PAPER, torch.device("cpu"))
    with pytest.raises(doctor.Failed, match=r"5\.0 GB free.*HF_HOME"):
        doctor._disk(PAPER)
    assert "5 GB free" in doctor._disk(Scale.from_name("pocket"))


def test_a_wrong_prediction_type_is_found_out(tmp_path: Path) -> None:
    """On the shipped weights, which predict v: as epsilon they are far off."""
    pocket = Scale.from_name("pocket")
    shutil.copytree(pocket.ldm, tmp_path / "ldm")
    path = tmp_path / "ldm/scheduler/scheduler_config.json"
    said = json.loads(path.read_text())
    other = "epsilon" if said["prediction_type"] == "v_prediction" else "v_prediction"
    path.write_text(json.dumps(said | {"prediction_type": other}))
    from slimlib.ldm import LatentDiffusion

    pictures = doctor._pictures(pocket, None, None)
    ldm = LatentDiffusion.from_pretrained(tmp_path / "ldm", pocket.variant, "cpu")
    with pytest.raises(doctor.Failed, match="prediction_type"):
        doctor._unet(ldm, pictures)
