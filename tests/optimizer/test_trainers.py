"""Trainers, configuration files, adapters and launchers train with AdamCM, and resume.

Each trainer trains a small model whole, and again in two halves with a checkpoint between them;
both end with the same parameters. The packages are the extra `integration`, and timm in a folder
of its own.
"""

import itertools
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cm_fused import SAM, AdamCM, AdamWCM, param_groups_weight_decay
from tests.support.recipes import TIMM, recipe

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 12
BATCH = 4
OPTIONS: dict[str, Any] = {"lr": 0.02, "capacity": 3, "max_grad_norm": 1.0}
OPTIM_ARGS = (
    "capacity=3,buffer_dtype=int8,moment_dtype=bfloat16,priority_decay=0.9,fused=True,"
    "adjust_lr_fn=match_rms_adamw"
)


class Sums(Dataset[dict[str, Tensor]]):
    """Vectors, and the sums of their elements."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(STEPS * BATCH, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[i], "labels": self.inputs[i].sum()}


class Model(nn.Module):
    """A small network that returns its loss, as a Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        return {"loss": (self.layers(inputs).squeeze(-1) - labels).square().mean()}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What those packages warn of among themselves is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _assert_same(ours: nn.Module, expected: nn.Module) -> None:
    for mine, theirs in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def _changed(model: nn.Module) -> bool:
    return not any(map(torch.equal, model.parameters(), Model().parameters()))


# Hugging Face


def _hf_trainer(folder: Path, how: str, model: nn.Module, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_steps=STEPS,
        max_grad_norm=0.0,  # the optimizer clips
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=STEPS // 2,
        seed=3,
        learning_rate=0.02,
        optim_args=OPTIM_ARGS,
        **arguments,
    )
    given: dict[str, Any] = {}
    if how == "optimizers":
        optimizer = AdamWCM(model.parameters(), **OPTIONS)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        given["optimizers"] = (optimizer, scheduler)
    elif how == "optim_args":
        # As on a command line: numbers, names and truth values are YAML's.
        options = pytest.importorskip("yaml").safe_load(
            "{" + args.optim_args.replace("=", ": ") + "}"
        )
        given["optimizer_cls_and_kwargs"] = (AdamWCM, {"lr": args.learning_rate, **options})
    else:
        given["optimizer_cls_and_kwargs"] = (AdamWCM, OPTIONS)
    return transformers.Trainer(model, args, train_dataset=Sums(), **given)


def test_hugging_face_optim_args(tmp_path: Path) -> None:
    """Options that come as a string have their types in the optimizer."""
    trainer = _hf_trainer(tmp_path, "optim_args", Model())
    trainer.create_optimizer()
    expected = {
        "lr": 0.02,
        "capacity": 3,
        "buffer_dtype": torch.int8,
        "moment_dtype": torch.bfloat16,
        "priority_decay": 0.9,
        "adjust_lr_fn": "match_rms_adamw",
        "fused": True,
    }
    for group in trainer.optimizer.param_groups:
        assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs", "optim_args"])
def test_hugging_face_trainer(how: str, tmp_path: Path) -> None:
    """Given as an optimizer, as a class or by a string, resumed from the middle's checkpoint."""
    whole = Model()
    _hf_trainer(tmp_path, how, whole).train()
    assert _changed(whole)
    resumed = Model()
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    _hf_trainer(tmp_path / "resumed", how, resumed).train(resume_from_checkpoint=str(checkpoint))
    _assert_same(resumed, whole)


# Accelerate


def _accelerated(folder: Path, steps: range, save_at: int | None, load: bool) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = Model()
    optimizer = AdamCM(model.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader: Any = DataLoader(Sums(), batch_size=BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if load:
        accelerator.load_state(str(folder))
    for t, batch in enumerate(loader):
        if t not in steps:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if t == save_at:
            accelerator.save_state(str(folder), safe_serialization=False)
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    return unwrapped


def test_accelerate(tmp_path: Path) -> None:
    """With gradient accumulation and a scheduler, saved and loaded by the accelerator."""
    half = STEPS // 2
    whole = _accelerated(tmp_path / "a", range(STEPS), None, load=False)
    assert _changed(whole)
    _accelerated(tmp_path / "b", range(half), half - 1, load=False)
    resumed = _accelerated(tmp_path / "b", range(half, STEPS), None, load=True)
    _assert_same(resumed, whole)


# Lightning


def _lightning_trainer(folder: Path, max_epochs: int, **arguments: Any) -> Any:
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: Any = {**dict.fromkeys(names, False), "default_root_dir": folder, **arguments}
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(max_epochs=max_epochs, accelerator="cpu", **quiet)


def _lightning(
    folder: Path, max_epochs: int, checkpoint: Path | None, **arguments: Any
) -> tuple[nn.Module, Any]:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch)["loss"]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            # The Trainer clips where it is told to.
            limit = None if "gradient_clip_val" in arguments else OPTIONS["max_grad_norm"]
            groups = param_groups_weight_decay(self, 0.01)
            optimizer = AdamWCM(groups, **{**OPTIONS, "max_grad_norm": limit})
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def on_train_batch_end(self, *_: Any) -> None:
            norms.append(self.optimizers().grad_norm())

    norms: list[Tensor] = []
    trainer = _lightning_trainer(folder, max_epochs, **arguments)
    module = Module()
    trainer.fit(module, DataLoader(Sums(), batch_size=BATCH), ckpt_path=checkpoint)
    assert all(norm.isfinite() for norm in norms)
    assert len(norms) == STEPS * (max_epochs if checkpoint is None else 1)
    return module.model, trainer


@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 1.0}], ids=str)
def test_lightning(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Automatic optimization, a scheduler by steps, a checkpoint of the Trainer's, who may clip.

    It is taken between epochs: Lightning begins an epoch's data anew.
    """
    whole, _ = _lightning(tmp_path, 2, None, **arguments)
    assert _changed(whole)
    _, trainer = _lightning(tmp_path, 1, None, **arguments)
    checkpoint = tmp_path / "half.ckpt"
    trainer.save_checkpoint(checkpoint)
    resumed, _ = _lightning(tmp_path, 2, checkpoint, **arguments)
    _assert_same(resumed, whole)


def _lightning_sam(folder: Path, manual: bool, **arguments: Any) -> nn.Module:
    """Train with SAM, over pairs of batches if `manual`, and return the model."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.automatic_optimization = not manual
            self.waiting: list[dict[str, Tensor]] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
            if not manual:
                return self.model(**batch)["loss"]  # type: ignore[no-any-return]
            self.waiting.append(batch)
            if len(self.waiting) == 2:
                self.optimizers().step(self._closure)
                self.waiting.clear()
            return None

        def _closure(self) -> None:
            self.optimizers().zero_grad()
            for batch in self.waiting:
                self.manual_backward(self.model(**batch)["loss"] / 2)

        def configure_optimizers(self) -> Any:
            return SAM(torch.optim.SGD(self.parameters(), lr=0.02), rho=0.3)

    trainer = _lightning_trainer(folder, 2, **arguments)
    module = Module()
    try:
        trainer.fit(module, DataLoader(Sums(), batch_size=BATCH))
    except RuntimeError:
        assert trainer.global_step == (0 if "callbacks" not in arguments else STEPS)
        raise
    return module.model


def _sam_by_hand(batch: int, epochs: int = 2) -> nn.Module:
    model = Model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.02), rho=0.3)
    for _ in range(epochs):
        for items in DataLoader(Sums(), batch_size=batch):

            def closure(items: dict[str, Tensor] = items) -> Any:
                optimizer.zero_grad()
                loss = model(**items)["loss"]
                loss.backward()
                return loss

            optimizer.step(closure)
    return model


def test_lightning_sam(tmp_path: Path) -> None:
    """Lightning's automatic optimization calls SAM's step with a closure, as it should be."""
    _assert_same(_lightning_sam(tmp_path, manual=False), _sam_by_hand(BATCH))


def test_lightning_sam_accumulates_by_hand(tmp_path: Path) -> None:
    """With manual optimization a closure over two batches is SAM of both."""
    pairs = _lightning_sam(tmp_path, manual=True)
    for mine, theirs in zip(pairs.parameters(), _sam_by_hand(2 * BATCH).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("later", [False, True])
def test_lightning_does_not_accumulate_for_sam(later: bool, tmp_path: Path) -> None:
    """Accumulation has the closure compute one batch: refused, at first or by a scheduler later.

    SAM took the sum of both batches at the first call, and added one of them at the second.
    """
    arguments: dict[str, Any] = {"accumulate_grad_batches": 2}
    if later:
        callbacks = pytest.importorskip("lightning.pytorch.callbacks")
        arguments = {"callbacks": [callbacks.GradientAccumulationScheduler({1: 2})]}
    with pytest.raises(RuntimeError, match="closure must zero the gradients before it adds"):
        _lightning_sam(tmp_path, manual=False, **arguments)


# LightningCLI and Hydra


OF_A_FILE: dict[str, Any] = {
    "lr": 0.02,
    "betas": [0.9, 0.95],
    "capacity": 3,
    "buffer_dtype": "int8",
    "moment_dtype": "bfloat16",
    "adjust_lr_fn": "match_rms_adamw",
    "max_grad_norm": None,
    "fused": True,
}
IN_A_GROUP = {
    **OF_A_FILE,
    "betas": (0.9, 0.95),
    "buffer_dtype": torch.int8,
    "moment_dtype": torch.bfloat16,
}


def _assert_options(optimizer: Any, **others: Any) -> None:
    """Check that a group has the options of the file by their types, and can be saved."""
    group = optimizer.param_groups[0]
    expected = {**IN_A_GROUP, **others}
    found = {name: group[name] for name in expected}
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }
    pickle.dumps(optimizer.state_dict())


def test_lightning_cli(tmp_path: Path) -> None:
    """An optimizer named in a YAML file, changed on the command line; a dtype is a name there."""
    pytest.importorskip("jsonargparse")
    lightning = pytest.importorskip("lightning")
    make_cli: Any = pytest.importorskip("lightning.pytorch.cli").LightningCLI

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch)["loss"]  # type: ignore[no-any-return]

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Sums(), batch_size=BATCH)

    options = {"class_path": "cm_fused.AdamWCM", "init_args": {**OF_A_FILE, "lr": "LR"}}
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = {"max_epochs": 1, "accelerator": "cpu", **dict.fromkeys(names, False)}
    config = tmp_path / "config.yaml"
    # YAML 1.1 has no number 2e-2, but a string.
    text = json.dumps({"trainer": trainer, "optimizer": options}).replace('"LR"', "2e-2")
    config.write_text(text)
    for arguments, others in (
        ([], {}),
        (["--optimizer.buffer_dtype", "float16"], {"buffer_dtype": torch.float16}),
    ):
        cli = make_cli(
            Module, args=["fit", "--config", str(config), *arguments], save_config_callback=None
        )
        (optimizer,) = cli.trainer.optimizers
        assert type(getattr(optimizer, "optimizer", optimizer)) is AdamWCM
        _assert_options(optimizer, **others)
        assert _changed(cli.model.model)


def test_hydra() -> None:
    """An optimizer by `_target_`, for parameters and for groups; betas are OmegaConf's list."""
    hydra = pytest.importorskip("hydra")
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"_target_": "cm_fused.AdamWCM", **OF_A_FILE})
    model = Model()
    made = [
        hydra.utils.instantiate(config, params=model.parameters()),
        hydra.utils.instantiate(config, model.named_parameters()),
        hydra.utils.instantiate(config, param_groups_weight_decay(model, 0.1)),
        hydra.utils.instantiate(config, _partial_=True)(model.parameters()),
        AdamWCM(model.parameters(), **{k: v for k, v in config.items() if k != "_target_"}),
        AdamWCM([{"params": [*model.parameters()], **config}]),
    ]
    for optimizer in made:
        _assert_options(optimizer)
        # A group's list, put there by hand, is stepped with and saved as a tuple.
        optimizer.param_groups[0]["betas"] = config.betas
        model(**Sums()[0])["loss"].backward()
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][0]["betas"] == (0.9, 0.95)
    assert _changed(model)


# PEFT


def _lora(whole: bool) -> Any:
    """Return a model with adapters; the optimizer gets `whole` of it or the adapters alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["layers.0", "layers.2"], init_lora_weights=True)
    model = peft.get_peft_model(Model(), config)
    params = model.parameters() if whole else [p for p in model.parameters() if p.requires_grad]
    return model, AdamWCM(params, **OPTIONS, buffer_dtype="int8")


def _step_lora(model: Any, optimizer: AdamWCM, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        model(**next(itertools.islice(DataLoader(Sums(), batch_size=BATCH), t, None)))[
            "loss"
        ].backward()
        optimizer.step()


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "whole model"])
def test_lora(whole: bool, tmp_path: Path) -> None:
    """Adapters alone are stepped and have state; the checkpoint is of the adapters."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, optimizer = _lora(whole)
    _step_lora(model, optimizer, range(STEPS))
    assert {id(param) for param in optimizer.state} == {
        id(param) for param in model.parameters() if param.requires_grad
    }
    base = model.get_base_model()
    frozen = {n: p for n, p in base.named_parameters() if not p.requires_grad}
    for name, param in Model().named_parameters():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(frozen[f"{layer}.base_layer.{kind}"], param)

    torch.manual_seed(0)
    half, half_optimizer = _lora(whole)
    _step_lora(half, half_optimizer, range(STEPS // 2))
    half.save_pretrained(tmp_path)
    torch.save(half_optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, resumed_optimizer = _lora(whole)
    peft.set_peft_model_state_dict(resumed, peft.load_peft_weights(str(tmp_path)))
    resumed_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    _step_lora(resumed, resumed_optimizer, range(STEPS // 2, STEPS))
    _assert_same(resumed, model)


# Recipes that run in processes of their own


def _run(folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", *command)
    run = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not TIMM.exists(), reason="timm is not installed")
def test_timm(tmp_path: Path) -> None:
    """The registry makes it by its name, with timm's param groups; it resumes."""
    _run(tmp_path, "tests.support.recipes", "timm", str(tmp_path))


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The script runs on two processes; the parameters change, and both have the same norm."""
    script = tmp_path / "script.py"
    end = "torch.distributed.destroy_process_group()"
    checks = """
norms = [None] * 2
torch.distributed.all_gather_object(norms, optimizer.grad_norm().item())
assert norms[0] == norms[1] > 0
torch.manual_seed(0)
start = torch.nn.Linear(10, 10).weight
assert not torch.equal(model[0].weight.full_tensor(), start)
assert model[0].weight.to_local().shape == (5, 10)
open(f"checked_{torch.distributed.get_rank()}", "w").close()
"""
    script.write_text(recipe("torchrun with FSDP2").replace(end, checks + end))
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _run(tmp_path, *launcher, str(script))
    assert {path.name for path in tmp_path.glob("checked*")} == {"checked_0", "checked_1"}
