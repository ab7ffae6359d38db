"""Train the whole smaller model to do what the dense one does, without labels (design 3.5.3).

Teacher and student see the same random view of an image. The loss is the Kullback-Leibler divergence of their class
probabilities plus the relative error of the student's stream after every block; labels, if asked for, add a
cross-entropy. The training loop is transformers' Trainer: `accelerate launch` spreads it over GPUs, and a run that died
goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..augmentation import RandomViews
from ..precision import half_precision
from ..progress import track
from ..remote.modeling_lowrank_vit import LowRankViTForImageClassification, LowRankViTImageClassifierOutput

# Weight of the stream's error beside the divergence of the class probabilities.
STREAM_WEIGHT = 0.5
# Mixup: half of the batches are blended with themselves in reverse order, by a share drawn from Beta(0.8, 0.8). Not
# with labels, which the loss takes as they are.
MIXUP = 0.8
WARM_UP = 0.1
EVALUATIONS = 20
SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class DistillationRecord:
    """Divergence from the dense model (nats) on held-back images at the start, and at the best of the evaluated steps;
    `kept` says whether that beat the start and stayed. curve: (images seen, divergence) of every evaluation."""

    before: float
    after: float
    kept: bool
    curve: list[tuple[int, float]]


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
) -> DistillationRecord:
    """Train `small` in place on random views; the step that was best on the held-back images stays, or the start.

    held_back: indices of the images in `views` that nothing is fitted on. labels: the dense model's class for every
    image, to learn from them as well. folder: where the Trainer's checkpoints go; those of a run that died are gone on
    with.
    """
    chosen = set(held_back)
    fitting = [index for index in range(len(views)) if index not in chosen]
    start = {name: tensor.detach().cpu().clone() for name, tensor in small.state_dict().items()}
    arguments = _arguments(folder, len(fitting), epochs, learning_rate, batch_size, seed, dense.device)
    trainer = _Distiller(
        model=small,
        args=arguments,
        train_dataset=[(index, True) for index in fitting],
        eval_dataset=[(index, False) for index in held_back],
        data_collator=_Collator(views, labels),
        callbacks=[_Progress(batch_size)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.teacher = dense
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    small.eval()
    # A run that goes on evaluates once more where it stopped.
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    before, after = losses[0], min(loss for step, loss in losses.items() if step > 0)
    if not after < before:
        small.load_state_dict(start)
    images = batch_size * arguments.world_size
    curve = [(images * step, loss) for step, loss in losses.items()]
    return DistillationRecord(before, after, after < before, curve)


def _arguments(
    folder: Path, images: int, epochs: int, learning_rate: float, batch_size: int, seed: int, device: torch.device
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device.type == "cpu",
        bf16=half_precision(device),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        num_train_epochs=epochs,
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
        # On a GPU the views are made by other processes meanwhile; on a CPU they would fight for the same cores.
        dataloader_num_workers=0 if device.type == "cpu" else 8,
    )
    steps = epochs * -(-images // (batch_size * arguments.world_size))
    arguments.warmup_steps = int(WARM_UP * steps)
    arguments.eval_steps = arguments.save_steps = max(1, steps // EVALUATIONS)
    return arguments


class _Distiller(Trainer):
    """The divergence from `teacher` in place of the model's own loss; in evaluation nothing but that."""

    teacher: LowRankViTForImageClassification

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        loss, student = self._loss(model, **inputs)
        return (loss, student) if return_outputs else loss

    def _loss(
        self, model: nn.Module, pixel_values: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, LowRankViTImageClassifierOutput]:
        student = model(pixel_values, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(pixel_values, output_hidden_states=True)
        loss = _divergence(student.logits, teacher.logits)
        if model.training:
            loss = loss + STREAM_WEIGHT * self._stream_error(student.hidden_states[1:], teacher.hidden_states[1:])
            if labels is not None:
                loss = loss + cross_entropy(student.logits.float(), labels)
        return loss, student

    def _stream_error(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean over blocks; behind the last one only the tokens read matter."""
        num_read, last = self.teacher.config.num_tokens_read, len(teacher) - 1
        errors = []
        for block, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
            tokens = slice(num_read if block == last else None)
            errors.append(_relative_error(ours[:, tokens].float(), theirs[:, tokens].float(), num_read))
        return torch.stack(errors).mean()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._loss(model, **self._prepare_inputs(inputs))[0], None, None


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, mean over images; logits (images, classes)."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return kl_div(student, teacher, log_target=True, reduction="batchmean")


def _relative_error(student: Tensor, teacher: Tensor, num_read: int) -> Tensor:
    """Mean squared error relative to the teacher's variance: that of the tokens read plus half that of all tokens."""
    errors, read = (student - teacher).square(), teacher[:, :num_read]
    scale = read.var(0, correction=0).mean().clamp_min(SMALLEST_VARIANCE)
    all_scale = teacher.var((0, 1), correction=0).mean().clamp_min(SMALLEST_VARIANCE)
    return errors[:, :num_read].mean() / scale + 0.5 * errors.mean() / all_scale


class _Collator:
    """(index, random) of images to a batch: a random view of each, or the image as it is prepared for use."""

    def __init__(self, views: RandomViews, labels: Sequence[int] | None):
        self.views, self.labels = views, labels

    def __call__(self, items: list[tuple[int, bool]]) -> dict[str, Tensor]:
        indices = [index for index, _ in items]
        if not items[0][1]:
            return {"pixel_values": self.views.plain(indices)}
        pixels = self.views.batch(indices)
        if self.labels is not None:
            return {"pixel_values": pixels, "labels": torch.tensor([self.labels[index] for index in indices])}
        if torch.rand(()) < 0.5:
            share = torch.distributions.Beta(MIXUP, MIXUP).sample()
            pixels = share * pixels + (1 - share) * pixels.flip(0)
        return {"pixel_values": pixels}


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
