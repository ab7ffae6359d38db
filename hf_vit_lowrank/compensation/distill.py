"""Train the whole smaller model to do what the dense one does, without labels (design 3.5.3).

Teacher and student see the same image, or the same random view of it. The loss is the Kullback-Leibler divergence of
their class probabilities plus the relative error of the student's stream after every block; labels, if asked for, add a
cross-entropy. The training loop is transformers' Trainer: `accelerate launch` spreads it over GPUs. Every view follows
from the seed and its place in the schedule alone, so that a run that died goes on to the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..augmentation import RandomViews
from ..precision import half_precision
from ..progress import track
from ..remote.modeling_lowrank_vit import LowRankViTForImageClassification

# Weight of the stream's error beside the divergence of the class probabilities, which are soon learnt by heart where
# images are few: see README, trials.
STREAM_WEIGHT = 10.0
# Share of the batches that are of images as they are prepared for use; the others are of random views.
PLAIN = 0.5
# Mixup: this share of the batches of views are blended with themselves in reverse order, by a share drawn from
# Beta(MIXUP, MIXUP). Not with labels, which the loss takes as they are.
MIXED = 0.5
MIXUP = 0.8
WARM_UP = 0.1
EVALUATIONS = 20
SMALLEST_VARIANCE = 1e-6
# Newer releases of transformers rename it, and warn of the old name.
_CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def distill(
    dense: LowRankViTForImageClassification,
    small: LowRankViTForImageClassification,
    views: RandomViews,
    held_back: Sequence[int],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    labels: Sequence[int] | None,
    folder: Path,
    images_at_once: int,
    gradient_checkpointing: bool,
) -> list[tuple[int, float]]:
    """Train `small` but for its embeddings in place on random views; of the steps evaluated the best on the held-back
    images stays, whether it is better than the start or not.

    held_back: indices of the images in `views` that nothing is fitted on. labels: the dense model's class for every
    image, to learn from them as well. folder: where the Trainer's checkpoints go; those of a run that died are gone on
    with. images_at_once: of a batch, which the dense model sees whole, so many go through `small` at once.
    gradient_checkpointing: compute the activations of `small` twice and do not keep them.

    Returns (images seen, divergence from the dense model in nats) of every evaluation, in the training's precision.
    """
    chosen = set(held_back)
    fitting = [index for index in range(len(views)) if index not in chosen]
    arguments = _arguments(folder, epochs * len(fitting), learning_rate, batch_size, seed, dense.device)
    setattr(arguments, _CHECKPOINTING, gradient_checkpointing)
    # They stay as they are, as in every other step; so the first block's inputs have no gradient.
    embeddings = small.vit.embeddings.requires_grad_(False)
    setattr(arguments, f"{_CHECKPOINTING}_kwargs", {"use_reentrant": False})
    trainer = _Distiller(
        model=small,
        args=arguments,
        train_dataset=_Schedule(fitting, epochs, seed),
        eval_dataset=[(index, None) for index in held_back],
        data_collator=_Collator(views, labels, seed),
        callbacks=[_Progress(batch_size)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.teacher, trainer.images_at_once = dense, images_at_once
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    # Or it would go on computing in the precision of the training.
    trainer.accelerator.unwrap_model(small, keep_fp32_wrapper=False)
    small.eval()
    embeddings.requires_grad_(True)
    # A run that goes on evaluates once more where it stopped.
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    images = batch_size * arguments.world_size
    return [(images * step, loss) for step, loss in losses.items()]


def _arguments(
    folder: Path, views: int, learning_rate: float, batch_size: int, seed: int, device: torch.device
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device.type == "cpu",
        bf16=half_precision(device),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        num_train_epochs=1,  # the schedule holds them all
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_on_start=True,
        save_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        seed=seed,
        dataloader_pin_memory=False,  # the views are made on the device
    )
    # One process trains on one GPU: on several at once by torch's DataParallel it would take other steps.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    steps = -(-views // (batch_size * arguments.world_size))
    arguments.warmup_steps = int(WARM_UP * steps)
    arguments.eval_steps = arguments.save_steps = max(1, steps // EVALUATIONS)
    return arguments


def _last_checkpoint(folder: Path) -> str | None:
    """The Trainer writes its state last: a checkpoint without a whole one was being written when the run died."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:
            json.loads((Path(last) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(last)
        else:
            return last
    return None


class _Distiller(Trainer):
    """The divergence from `teacher` in place of the model's own loss; in evaluation nothing but that."""

    teacher: LowRankViTForImageClassification
    images_at_once: int

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        schedule: Any = self.train_dataset
        return SequentialSampler(schedule)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The teacher sees the batch at once; the student, whose activations are kept, a part after the other."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        images, total = len(inputs["pixel_values"]), torch.zeros((), device=self.args.device)
        with torch.no_grad(), self._precision():
            teacher = self.teacher(inputs["pixel_values"], output_hidden_states=True)
        for start in range(0, images, self.images_at_once):
            part = slice(start, start + self.images_at_once)
            last = start + self.images_at_once >= images
            # The gradients of several processes are added up once.
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss = self._loss(model, inputs, teacher, part) * (len(inputs["pixel_values"][part]) / images)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _precision(self) -> torch.autocast:
        """That of the training, for the teacher: accelerate sees to it for the student alone."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _loss(self, model: nn.Module, inputs: dict[str, Any], teacher: Any, part: slice) -> Tensor:
        student = model(inputs["pixel_values"][part], output_hidden_states=True)
        loss = _divergence(student.logits, teacher.logits[part])
        loss = loss + STREAM_WEIGHT * self._stream_error(student.hidden_states[1:], teacher.hidden_states[1:], part)
        if (labels := inputs.get("labels")) is not None:
            loss = loss + cross_entropy(student.logits.float(), labels[part])
        return loss

    def _stream_error(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], part: slice) -> Tensor:
        """Mean over blocks, of a part of the batch; behind the last one only the tokens read matter."""
        num_read = self.teacher.config.num_tokens_read
        pairs = [(student[-1][None, :, :num_read], teacher[-1][None, :, :num_read])]
        if len(student) > 1:
            pairs.append((torch.stack(student[:-1]), torch.stack(teacher[:-1])))
        errors = [_relative_errors(ours.float(), theirs.float(), part, num_read) for ours, theirs in pairs]
        return torch.cat(errors).mean()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        pixels = self._prepare_inputs(inputs)["pixel_values"]
        with torch.no_grad(), self._precision():
            return _divergence(model(pixels).logits, self.teacher(pixels).logits), None, None


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, mean over images; logits (images, classes)."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return kl_div(student, teacher, log_target=True, reduction="batchmean")


def _relative_errors(student: Tensor, teacher: Tensor, part: slice, num_read: int) -> Tensor:
    """Mean squared error of a part of the batch, relative to the variance of the whole batch of the teacher: that of
    the tokens read (of all tokens where the batch is one image) plus half that of all tokens. (blocks, images, tokens,
    d) both; one error a block."""
    errors, read = (student - teacher[:, part]).square(), teacher[:, :, :num_read]
    all_scale = teacher.var((1, 2), correction=0).mean(1).clamp_min(SMALLEST_VARIANCE)
    several = teacher.shape[1] > 1
    scale = read.var(1, correction=0).mean((1, 2)).clamp_min(SMALLEST_VARIANCE) if several else all_scale
    return errors[:, :, :num_read].mean((1, 2, 3)) / scale + 0.5 * errors.mean((1, 2, 3)) / all_scale


class _Schedule(Dataset[tuple[int, int]]):
    """All passes over the images one after the other, each in an order of its own: (index of an image, place here)."""

    def __init__(self, images: Sequence[int], epochs: int, seed: int):
        self.images, self.epochs, self.seed = images, epochs, seed
        self.order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.epochs * len(self.images)

    def __getitem__(self, place: int) -> tuple[int, int]:
        epoch, position = divmod(place, len(self.images))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.images)).tolist()
        return self.images[self.order[1][position]], place


class _Collator:
    """(index of an image, place in the schedule) to a batch: a random view of each, or the image as it is prepared for
    use, as always without a place."""

    def __init__(self, views: RandomViews, labels: Sequence[int] | None, seed: int):
        self.views, self.labels, self.seed = views, labels, seed

    def __call__(self, items: list[tuple[int, int | None]]) -> dict[str, Tensor]:
        indices, place = [index for index, _ in items], items[0][1]
        if place is None:
            return {"pixel_values": self.views.plain(indices)}
        random = np.random.default_rng((self.seed, place, 1))
        if random.random() < PLAIN:
            pixels = self.views.plain(indices)
        else:
            pixels = self.views.batch(indices, torch.Generator().manual_seed(int(random.integers(2**62))))
            if self.labels is None and random.random() < MIXED:
                share = random.beta(MIXUP, MIXUP)
                pixels = share * pixels + (1 - share) * pixels.flip(0)
        if self.labels is None:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "labels": torch.tensor([self.labels[index] for index in indices])}


class _Progress(TrainerCallback):
    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.steps: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        size = self.batch_size * args.world_size
        left = range(state.global_step, state.max_steps)
        self.steps = track(left, "Distilling", size * len(left), size=lambda _: size)
        next(self.steps, None)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        next(self.steps, None)
