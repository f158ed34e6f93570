"""The one training loop: AdamW on a cosine rate, for the compressor's two stages and for every other model here.

Any number of processes may share it (`torchrun`, `accelerate launch`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from slimlib.scales import reading
from slimlib.utils import Device, option, pick_device, rank_and_world, whole_file, write_file

Losses = tuple[Tensor, dict[str, Tensor]]
"""A loss, and its parts for the log."""


@dataclass
class FitConfig:
    """Settings of the loop."""

    steps: int = option(8000, "optimiser steps", 1)
    batch: int = option(32, "items that go through the networks together", 1, 10**6)
    lr: float = option(1e-3, "peak of the cosine rate (AdamW)", 1e-12, 100)
    warmup: int = option(200, "steps until the peak", 0)
    beta2: float = option(0.98, "AdamW's decay of the squared gradient", 0, 0.999999)
    weight_decay: float = option(1e-4, "AdamW's decay of the weights", 0, 100)
    clip: float = option(1.0, "largest norm of the gradient", 1e-12, math.inf)
    accumulate: int = option(1, "batches on each process that make a step, of batch * accumulate * processes items", 1)
    ema: float = option(0.0, "decay of the weights' moving average, which becomes the result; 0: none", 0, 0.999999)
    save_every: int = option(500, "steps between checkpoints", 1)
    log_every: int = option(20, "steps between lines of the log", 1)
    probe_every: int = option(500, "steps between points of the learning curve", 1)
    seed: int = option(0, "every draw is a function of (seed, step, number of the batch in the step)", 0)


def fit(
    config: FitConfig,
    modules: dict[str, nn.Module],
    loss_of: Callable[[dict[str, nn.Module]], Losses],
    folder: str | Path,
    *,
    groups: list[dict] | None = None,
    settings: dict | None = None,
    probe: Callable[[dict[str, nn.Module]], dict[str, float]] | None = None,
    resume: bool = True,
    progress: bool = True,
    max_seconds: float | None = None,
    device: Device = None,
) -> dict[str, nn.Module]:
    """Minimise a loss; resumes exactly.

    Interrupted at any step and started again it ends with the same weights as in one go: a checkpoint holds modules
    and optimiser, and each batch is drawn from (seed, step, number of the batch) alone, whichever process draws it.

    Args:
        modules: what is trained (parameters that ask for a gradient) and stored; they lie on `pick_device(device)`.
        loss_of: draws a batch from PyTorch's generator, runs the networks on it (the modules, wrapped where several
            processes share the work), and returns the loss and its parts.
        folder: gets checkpoint.pt, log.csv, and curve.csv if there is a probe.
        groups: parameter groups; "speed" multiplies a group's rate. None: all parameters alike.
        settings: what a checkpoint must have been trained with, besides the config.
        probe: measures the modules for the learning curve, every `probe_every` steps.
        resume: go on from the checkpoint in `folder` if there is one.
        max_seconds: stop (with a checkpoint) after this time; call again to go on.
        device: as for `pick_device`.

    Returns:
        The modules in evaluation mode, with their averaged weights where the config asks for an average.

    Raises:
        ValueError: the checkpoint is damaged, was trained with other settings, or is not seen by all processes.
        FloatingPointError: 20 steps on end have no finite gradient: they would go on, and change nothing.
    """
    on_cpu = rank_and_world()[1] > 1 and pick_device(device).type == "cpu"
    accelerator, folder, start = Accelerator(cpu=on_cpu, device_placement=False), Path(folder), time.monotonic()
    if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"{kind} cuts weights into shards, and a checkpoint would hold one: launch with MULTI_GPU")
    if (world := rank_and_world()[1]) != accelerator.num_processes:  # each would train alone, into one folder
        raise ValueError(f"WORLD_SIZE is {world}, and {accelerator.num_processes} would train: launch with torchrun")
    main, checkpoint = accelerator.is_main_process, folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    groups = groups or [{"params": trained, "speed": 1.0, "weight_decay": config.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))
    parameters = [p for group in groups for p in group["params"]]
    ema = get_ema_multi_avg_fn(config.ema)
    averages = {name: AveragedModel(m, multi_avg_fn=ema) for name, m in modules.items()} if config.ema else {}
    stored = {**modules, **{f"average of {name}": module for name, module in averages.items()}}
    settings, first, before, lost = {**asdict(config), **(settings or {})}, 0, 0.0, 0
    settings["accumulate * processes"] = settings.pop("accumulate") * accelerator.num_processes
    goes_on = resume and checkpoint.exists()
    seeing = int(accelerator.reduce(torch.tensor(float(goes_on), device=accelerator.device), "sum"))
    if 0 < seeing < accelerator.num_processes:  # the others would begin anew, and all would wait for ever
        raise ValueError(f"{seeing} of {accelerator.num_processes} processes see {checkpoint}: share its disk")
    if goes_on:
        state = _load(checkpoint, settings)
        with reading(checkpoint, "a checkpoint of this training"):
            first, before = state["step"], state["seconds"]
            optimizer.load_state_dict(state["optimizer"])
            for name, module in stored.items():
                module.load_state_dict(state["modules"][name])
    for log in ("log.csv", "curve.csv") if main else ():
        _forget(folder / log, first)
    *networks, stepper = accelerator.prepare(*modules.values(), optimizer)
    wrapped = dict(zip(modules, networks, strict=True))
    for module in modules.values():
        module.train()

    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not (progress and main))
    for step in bar:
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["speed"]
        stepper.zero_grad(set_to_none=True)
        shown: dict[str, Tensor] = {}
        for turn in range(config.accumulate):
            number = accelerator.process_index * config.accumulate + turn
            torch.manual_seed((config.seed * 1_000_003 + step + 1 + number * 1_000_000_007) % 2**63)
            with ExitStack() as apart:
                if turn + 1 < config.accumulate:  # gradients are shared between processes once a step
                    for network in networks:
                        apart.enter_context(accelerator.no_sync(network))
                loss, parts = loss_of(wrapped)
                accelerator.backward(loss / config.accumulate)
            for name, value in {"loss": loss, **parts}.items():
                shown[name] = shown.get(name, 0) + torch.as_tensor(value).detach() / config.accumulate
        lost = 0 if bool(accelerator.clip_grad_norm_(parameters, config.clip).isfinite()) else lost + 1
        if lost == min(20, config.steps):  # one bad batch must not end a long run
            raise FloatingPointError(f"no finite gradient in {lost} steps on end: are the weights and the data finite?")
        if not lost:
            stepper.step()
            for name, average in averages.items():
                average.update_parameters(modules[name])

        done, ended, seconds = step + 1, step + 1 == config.steps, before + time.monotonic() - start
        if done % config.log_every == 0 or ended:
            means = {name: float(value) for name, value in accelerator.reduce(shown, "mean").items()}
            bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            if main:
                _append(folder / "log.csv", {"step": done, "seconds": round(seconds, 1), **means, "rate": rate})
        if probe and main and (done % config.probe_every == 0 or ended):
            with torch.no_grad():  # what it draws harms nothing: every batch seeds anew
                seen = {name: averages[name].module if averages else module for name, module in modules.items()}
                figures = probe({name: module.eval() for name, module in seen.items()})
            _append(folder / "curve.csv", {"step": done, "seconds": round(seconds, 1), **figures})
            for module in modules.values():
                module.train()
        late = max_seconds is not None and time.monotonic() - start > max_seconds
        if max_seconds is not None:  # all processes must stop at the same step
            late = bool(accelerator.reduce(torch.tensor(float(late), device=accelerator.device), "sum") > 0)
        if main and (done % config.save_every == 0 or ended or late):
            weights = {name: module.state_dict() for name, module in stored.items()}
            state = {"step": done, "seconds": seconds, "settings": settings, "modules": weights}
            with whole_file(checkpoint) as writing:
                torch.save({**state, "optimizer": optimizer.state_dict()}, writing)
        if late:
            break
    for name, average in averages.items():
        modules[name].load_state_dict(average.module.state_dict())
    accelerator.wait_for_everyone()
    return {name: module.eval() for name, module in modules.items()}


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def _load(path: Path, settings: dict) -> dict:
    with reading(path, "a checkpoint of this program"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = {**settings, **state["settings"]}  # what an older version did not store cannot be compared
    differing = [f"{k}: {there[k]} there, {v} asked for" for k, v in settings.items() if there[k] != v]
    if differing:
        raise ValueError(f"{path} was trained with other settings ({'; '.join(differing)}). Use another folder.")
    return state


def _append(path: Path, row: dict[str, float]) -> None:
    pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.6g")


def _forget(path: Path, step: int) -> None:
    """Drop what a log says beyond the step that training goes on from, and lines that were cut or damaged."""
    there = path.read_bytes() if path.exists() else b""
    head, *rows = there.splitlines(keepends=True) or [b""]
    whole = [row for row in rows if row.endswith(b"\n") and row.partition(b",")[0].isdigit()]
    kept = [row for row in whole if int(row.partition(b",")[0]) <= step]
    if not kept:
        path.unlink(missing_ok=True)
    elif len(kept) < len(rows):
        write_file(path, b"".join([head, *kept]))
