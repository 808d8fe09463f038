"""Training steps of ``transformers.Trainer`` on a fake model, by the Trainer's own code.

The Trainer makes the optimizer, wraps the model for autocast, and runs the forward and backward pass of each
micro-batch; what its training loop does between them (clipping, the optimizer's step, clearing the gradients) is
repeated here in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from forge.memory.profile.cuda import cuda_attention
from forge.memory.profile.isolation import masks_as_in_training, undisturbed
from forge.memory.profile.structure import structural_copy
from forge.memory.profile.trace import DataDependentError, Event, Recorder
from forge.memory.storage import stored_tensors

Task = Literal["causal-lm", "sequence-classification", "masked-lm", "seq2seq-lm"]
Target = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class StepSettings:
    """One training step; every value is decided."""

    task: Task
    batch_size: int
    sequence_length: int
    padding: bool
    optimizer: str
    bf16: bool
    gradient_checkpointing: bool | None
    """None: as the model stands."""
    gradient_accumulation_steps: int
    max_grad_norm: float
    attention: str | None
    """None: as the model stands."""
    target: Target


def record_step(model: Any, settings: StepSettings) -> tuple[list[Event], int]:
    """Run a training step on a fake copy of the model, which stays as it is.

    The step that is recorded is one whose optimizer has its state already. Of several micro-batches the last is run:
    from the second on, all meet the gradients of those before, and are alike.

    Returns:
        The log of allocations, and the index of the step's first event.

    Raises:
        ValueError: if the step depends on the values of tensors, or the model cannot be copied.
    """
    recorder = Recorder(truth=not settings.padding)
    with undisturbed(), masks_as_in_training(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = structural_copy(model)
        device = cuda_attention() if settings.target == "cuda" else _random_states_seen(recorder)
        with device, recorder.names_of(fake), recorder:
            recorder.label(stored_tensors(fake), "parameters")
            trainer = _trainer(fake, settings, recorder)
            try:
                _step(trainer, settings, recorder)
            except DynamicOutputShapeException as error:
                raise DataDependentError(
                    f"the step must not depend on the values of tensors, got one whose shapes do ({error.func}), such "
                    "as the routing to experts; measure this model's step with MeasureMemory"
                ) from error
    return recorder.log, recorder.start


class _Arguments(TrainingArguments):
    @property
    def place_model_on_device(self) -> bool:
        """Fake tensors cannot be moved, and are where they should be."""
        return False


class _PhasedTrainer(Trainer):
    """Tells the recorder where the forward pass of a micro-batch ends."""

    recorder: Recorder

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.recorder.phase = "forward"
        loss = super().compute_loss(*args, **kwargs)
        self.recorder.phase = "backward"
        return loss


class _NoData(Dataset[Any]):
    def __len__(self) -> int:
        return 1


def _trainer(model: Any, settings: StepSettings, recorder: Recorder) -> _PhasedTrainer:
    """A Trainer that is as ready as it is at the first step of ``train()``."""
    arguments = _Arguments(
        output_dir="unused",
        use_cpu=True,
        bf16=settings.bf16,
        optim=settings.optimizer,
        max_grad_norm=settings.max_grad_norm,
        report_to=[],
        disable_tqdm=True,
    )
    if settings.attention is not None:
        model.set_attn_implementation(settings.attention)
    trainer = _PhasedTrainer(model, arguments, train_dataset=_NoData())
    trainer.recorder = recorder
    _set_checkpointing(model, settings.gradient_checkpointing)
    model.train()
    trainer.create_optimizer()
    if settings.target == "cuda":
        _prefer_foreach(trainer.optimizer)
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(
        model, trainer.optimizer, device_placement=[False, False]
    )
    trainer.current_gradient_accumulation_steps = settings.gradient_accumulation_steps
    return trainer


def _set_checkpointing(model: Any, enabled: bool | None) -> None:
    if enabled is None:
        return
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if enabled:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_disable")()


def _step(trainer: _PhasedTrainer, settings: StepSettings, recorder: Recorder) -> None:
    """One optimizer step, as the loop of the Trainer has it."""
    count = settings.gradient_accumulation_steps
    loaded = iter([_batch(settings) for _ in range(count)])
    batches, items = trainer.get_batch_samples(loaded, count, trainer.args.device)
    recorder.label((tensor for batch in batches for tensor in batch.values()), "inputs")
    model: Any = trainer.model_wrapped
    optimizer: Any = trainer.optimizer
    with _earlier_gradients(model, recorder) if count > 1 else nullcontext():
        recorder.start = len(recorder.log)
        loss = trainer.training_step(model, batches[-1], items)
    recorder.phase, end = "optimizer", len(recorder.log)
    recorder.label((p.grad for p in model.parameters() if p.grad is not None), "gradients")
    optimizer.step()
    state = (tensor for held in optimizer.state.values() for tensor in held.values())
    recorder.label((tensor for tensor in state if isinstance(tensor, Tensor)), "optimizer_state")
    recorder.settle(end)
    norm = trainer.accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or float("inf"))
    optimizer.step()
    model.zero_grad()
    del loss, norm  # alive until here, as in the Trainer


@contextmanager
def _earlier_gradients(model: Any, recorder: Recorder) -> Iterator[None]:
    """Gradients as earlier micro-batches have left them: of the parameters that get one in this one, too."""
    reached: set[int] = set()
    trainable = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: reached.add(id(p))) for p in trainable]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    recorder.label((p.grad for p in trainable), "gradients")
    yield
    for hook in hooks:
        hook.remove()
    for parameter in trainable:
        if id(parameter) not in reached:
            recorder.erase(parameter.grad)
            parameter.grad = None


def _batch(settings: StepSettings) -> dict[str, Tensor]:
    shape = (settings.batch_size, settings.sequence_length)
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.zeros(shape[:1], dtype=torch.long) if settings.task == "sequence-classification" else ids.clone()
    batch = {"input_ids": ids, "labels": labels}
    if settings.padding:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return batch


@contextmanager
def _random_states_seen(recorder: Recorder) -> Iterator[None]:
    """Log the generator's states that checkpointing stores for each layer: real tensors, which no operation makes."""
    own = torch.get_rng_state

    def get_rng_state() -> Tensor:
        state = own()
        recorder.label([state], "activations")
        return state

    torch.get_rng_state = get_rng_state
    try:
        yield
    finally:
        torch.get_rng_state = own


def _prefer_foreach(optimizer: Any) -> None:
    """Torch's own optimizers update all parameters at once on CUDA, unless they are told to do otherwise."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
