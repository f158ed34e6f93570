"""What the paper scale costs: counts that can be made by hand, and tables that hold what their columns say."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from slimlib.__main__ import main
from slimlib.machines import Machine
from slimlib.measure import costs, methods
from slimlib.measure.costs import PARTS, Plan, build, count, published
from slimlib.roi import gradcam


@pytest.mark.parametrize("part", published("parameters"))
def test_networks_have_the_published_numbers_of_parameters(part: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(published(part)).parameters()) == published("parameters")[part]


@pytest.mark.parametrize(("part", "name"), [("machine_a", "resnet50.tv_in1k"), ("machine_b", "convnext_tiny.fb_in1k")])
def test_machines_are_prepared_as_timm_says(part: str, name: str) -> None:
    theirs = timm.get_pretrained_cfg(name).to_dict()  # type: ignore[union-attr]
    ours = published(part)
    assert ours["architecture"] == theirs["architecture"]
    for key, value in ours["pretrained_cfg"].items():
        assert theirs[key] == (tuple(value) if isinstance(value, list) else value), key


def test_counting_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen convolution and a ReLU, at 224 px."""
    monkeypatch.setattr(costs, "build", lambda config: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    found, pixels = count.__wrapped__("machine A"), 224 * 224
    assert (found.parameters, found.products) == (8 * 3 * 9 + 8, 0)
    assert found.forward == found.backward == 2 * 8 * 3 * 9 * pixels, "no gradient of weights"
    assert found.kept == 4 * (3 + 8) * pixels, "what went in and what came out, and no weights"


def test_counts_are_those_that_are_commonly_given() -> None:
    """0.8 TFLOP for Stable Diffusion's UNet at 512 px; 4.09 and 4.47 G multiply-adds for the machines."""
    assert count("UNet", 512).forward == pytest.approx(0.8e12, rel=0.02)
    machines = [count("machine A").forward, count("machine B").forward]
    assert machines == pytest.approx([2 * 4.09e9, 2 * 4.47e9], rel=0.02)
    between = (8 * 8 + 8) + (4 * 4 + 4)  # the 1 x 1 convolutions at the latent belong to neither half of the VAE
    halves = count("VAE encoder").parameters + count("VAE decoder").parameters
    assert halves + between == published("parameters")["vae"]
    assert count("UNet", family="sd15").parameters == published("parameters")["unet_sd15"]
    assert count("text encoder", family="sd15").forward < count("text encoder").forward
    assert count("text encoder").products == count("text encoder").forward
    small, large = (count("VAE decoder", size) for size in (256, 512))
    assert 4 <= large.forward / small.forward < 4.3 and 4 <= large.kept / small.kept < 8
    learned = count("compressor")
    assert 2 < learned.backward / learned.forward < 2.5, "all weights, and the latent"
    with pytest.raises(KeyError):
        count("UNET")


def test_grad_cam_takes_the_passes_that_are_counted() -> None:
    """One for a given class, two for the first guess, and nothing to speak of on the way back."""
    config = {"architecture": "resnet18", "num_classes": 1000}
    machine, x = Machine(build(config), ["x"] * 1000), torch.rand(1, 3, 224, 224)
    for label, passes in ((3, 1), (None, 2)):
        with FlopCounterMode(display=False) as one:
            machine(x)
        with FlopCounterMode(display=False) as all_of_them:
            gradcam(machine, x, label)
        assert all_of_them.get_total_flops() == pytest.approx(passes * one.get_total_flops(), rel=0.01)


def test_autocast_keeps_half_and_copies_of_frozen_weights() -> None:
    """What `memory` takes for granted, on machine A: two bytes a weight, once; half of what float32 keeps."""
    kept: dict[int, int] = {}
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        network = build(published("machine_a")).eval().requires_grad_(False)
        for batch in (1, 2):
            held: dict[int, Tensor] = {}
            keep = lambda tensor, held=held: held.setdefault(tensor.untyped_storage()._cdata, tensor)  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                network(torch.zeros(batch, 3, 224, 224, requires_grad=True))
            own = {weight.untyped_storage()._cdata for weight in (*network.parameters(), *network.buffers())}
            kept[batch] = sum(held[at].untyped_storage().nbytes() for at in held.keys() - own)
    assert kept[2] - kept[1] == pytest.approx(count("machine A").kept / 2, rel=0.03)
    assert 2 * kept[1] - kept[2] == pytest.approx(2 * count("machine A").parameters, rel=0.01)


def test_work_counts_what_the_evaluation_does() -> None:
    plan = Plan(images=7, qualities=3, compressors=1, seeds=2, stage1_steps=2, stage2_steps=5, ablation_images=0)
    work, part = costs.work(plan), {name: count(name) for name in PARTS}
    assert [job.times for job in work.values()] == [200_000, 2 * 64, 2 * 5 * 16, 7 * 3, 7 * 3 * 3, 7]
    found = costs.operations(plan)
    encoder, decoder, unet, words, _, a, b, compressor = part.values()
    assert 8 * unet.forward + words.forward + decoder.forward == found.bf16["decoding"]
    assert found.loc["decoding", ["TF32", "float32"]].sum() == a.forward + b.forward
    assert found.bf16["files"] == 3 * encoder.forward, "once a file"
    captioner, matte = part["captioner"].forward, a.forward
    assert found.loc["files", ["TF32", "float32"]].sum() == matte + 3 * (captioner + 3 * compressor.forward)
    through = sum(cost.forward + cost.backward for cost in (compressor, unet, decoder, a))
    assert found.bf16["stage 2"] == through and found.loc["stage 2"].sum() == through + words.forward
    assert costs.CLASSIC_FILES == sum(len(methods.classic(name).settings) for name in methods.CLASSIC_NAMES) == 75
    own = costs.work(replace(plan, ablation_images=1, qualities=1))["ablations"]
    assert own.half["UNet"] == 2 * (3 * 4 + 1 + 2 + 20 + 4 * 4 + 2 * 4 + 20), "captions, K, t0, seeds, caption only"
    assert own.cpu == {"caption": 1, "code": 3, "judge": 14} and own.half["text encoder"] == 13
    kept, n = costs.memory(plan), {name: cost.parameters for name, cost in part.items()}
    frozen, copied = sum([*n.values()][:4]) + n["machine A"], n["UNet"] + n["VAE decoder"] + n["machine A"]
    assert kept.weights["stage 2"] == 4 * frozen + 2 * copied + 20 * n["compressor"]
    assert kept["a picture"]["decoding"] == 0 < kept["a picture"]["stage 1"] < kept["a picture"]["stage 2"]


def test_the_table_extrapolates_from_the_best_case_to_the_worst() -> None:
    plan = Plan(tflops=[100.0, 50.0, 10.0], share=[0.25, 0.5], gpus=2, cores=1, price=3)
    table, found, work = costs.jobs_table(plan), costs.operations(plan), costs.work(plan)
    bf16, tf32, fp32 = found.loc["files"]
    peak = work["files"].times * (bf16 / 1e14 + tf32 / 5e13 + fp32 / 1e13) / 3600
    cpu = work["files"].times * 6 * (costs.CPU_SECONDS["caption"] + costs.CPU_SECONDS["code"]) / 3600
    row = table.loc["files"]
    assert row[["GPU hours*", "to", "core hours*"]].tolist() == pytest.approx([2 * peak, 4 * peak, cpu])
    assert row[["hours*", "to "]].tolist() == pytest.approx([max(peak, cpu), 2 * peak + cpu])
    assert row["to  "] == pytest.approx(2 * 3 * row["to "]) and row["bound by"] == "either"
    steps = plan.compressors * plan.stage1_steps * costs.CPU_SECONDS["stage 1"] / 3600
    assert table["bound by"]["stage 1"] == "CPU" and table["hours*"]["stage 1"] == pytest.approx(steps), "no core helps"
    assert table["hours*"]["all"] == pytest.approx(table["hours*"].drop("all").sum())
    assert costs.jobs_table(replace(plan, cores=10**6))["bound by"]["classic codecs"] == "GPU"


def test_the_command_takes_a_plan_and_single_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("costs --plan look --steps 20 --gpus 2 --share 0.5 0.6 --images 5000".split()) == 0
    text, plan = capsys.readouterr().out, Plan(**{**costs.PLANS["look"], "steps": 20, "gpus": 2, "share": [0.5, 0.6]})
    assert f"{costs.as_text(costs.jobs_table(replace(plan, images=5000)))}\n" in text and "train_images=50000" in text
    assert all(f"\n{part} " in text for part in PARTS)
    assert main(["costs", "--size", "7"]) == 1
    assert "argument --size: 7 is not a multiple of 64" in capsys.readouterr().err
    for peaks in ("312", "1 2 3 4"):
        assert main(f"costs --tflops {peaks}".split()) == 1
        assert "argument --tflops: expected three peaks, of bf16, TF32 and float32" in capsys.readouterr().err
    digits = costs.as_text(pd.DataFrame({"x": [1234567.0, 0.00123456, math.nan]})).split()
    assert digits[2::2] == ["1,234,567", "0.001235", "-"]
