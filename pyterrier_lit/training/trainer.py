"""The training loop: transformers' Trainer around a network and the functions that give it examples and their loss.

Each step samples `batch_size` training lists (a query with its passages), makes an example of each, and updates the
weights once by the mean loss of these examples. Where they do not fit into memory together, the gradient is accumulated
over micro batches. What differs between rerankers is handed to `train` as an `Objective`.

Knows no frames, no texts and no rerankers.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pyterrier_lit.models.devices import choose_dtype

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

MEASURE = "nDCG@10"  # what `validate` measures, in the log
STARTED_WITH = "training.json"  # in the folder of a training: the recipe, the seed and the student it was started with

Log = list[
    dict[str, float]
]  # in order of the steps: step, and of loss, learning_rate, grad_norm, nDCG@10 what there is


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a training is run, whatever is learned. Any recipe can be combined with any of these.

    Args:
        folder: where the state is saved; a training that was killed resumes from there when it is started again in the
            same way. None saves nothing.
        every: steps between saved states, and between measurements on validation frames. None is a tenth of all steps.
        patience: stop after this many measurements in a row without a better nDCG@10. None never stops early.
        seed: fixes the order of the lists and everything that is sampled.
        verbose: show progress.
    """

    folder: str | Path | None = None
    every: int | None = None
    patience: int | None = None
    seed: int = 42
    verbose: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How much and how fast to train. A paper's setting is a value of this; each reranker's own recipe adds fields.

    Args:
        learning_rate: of AdamW, the same for all parameters.
        batch_size: lists per step, over all devices (the global batch size).
        steps: updates of the weights; None trains for `epochs`.
        epochs: passes over all lists, where steps is None.
        warmup: steps in which the learning rate rises from 0, or below 1 their share of all steps.
        schedule: what follows the warm-up: "constant", "linear" or "cosine".
        weight_decay: of AdamW.
        clip: the largest norm of a gradient; 0 does not clip.
        micro_batch: the most lists in memory at once on a device; batch_size is a multiple of it.
        precision: "bfloat16" computes under autocast with weights in float32, "float32" without autocast; None is
            bfloat16 on a GPU that has it.
        checkpointing: gradient checkpointing, which recomputes activations in the backward pass: slower, less memory.
        workers: processes that prepare batches; 0 prepares them in the training process.
        options: further arguments of transformers.TrainingArguments, such as deepspeed.
    """

    learning_rate: float
    batch_size: int = 32
    steps: int | None = None
    epochs: float = 1.0
    warmup: float = 0
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip: float = 0.0
    micro_batch: int = 1
    precision: str | None = None
    checkpointing: bool = False
    workers: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with some fields changed. Raises TypeError, which lists the fields, for a name that is none."""
        names = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in names]
        if unknown:
            others = ", ".join(field.name for field in dataclasses.fields(Settings))
            raise TypeError(
                f"{unknown[0]!r} is no setting of {type(self).__name__}; there are {', '.join(names)}; and, whatever"
                f" the recipe, {others}"
            )
        return dataclasses.replace(self, **changes)

    def objective(self, student: Any) -> "Objective":
        """What a student learns by this recipe."""
        raise NotImplementedError(f"{type(self).__name__} names no objective; use one of a reranker's recipes")


class Objective(NamedTuple):
    """What a student learns: its network, and the functions that lead from training lists to a loss.

    With Recipe.workers the functions travel to other processes: they are functions of modules or `partial`s of these.
    """

    network: nn.Module
    """What is trained, in place."""
    column_sets: Sequence[Mapping[str, type]]
    """The columns that a training frame must have: the first set that is complete is read, as by `frames.rankings`.
    The column "target" among them asks for labels or for a teacher."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]]
    """All lists -> those that something can be learned from, in any form that `sample` reads."""
    sample: Callable[[Any, random.Random], Any]
    """One of the prepared lists -> an example of it. Whatever is random comes from the given generator."""
    collate: Callable[[list[Any]], Any]
    """M examples -> a batch."""
    loss: Callable[[Any], torch.Tensor]
    """A batch -> the mean loss of its examples, a scalar with a gradient."""
    wanted: str = "wanted queries with passages that are not all worth the same"
    """What the error says when `prepare` leaves nothing."""


def train(
    objective: Objective,
    lists: Sequence[Any],
    recipe: Recipe,
    settings: Settings | None = None,
    *,
    described: str = "",
    validate: Callable[[], float] | None = None,
) -> Log:
    """Train the objective's network in place, and return what was measured on the way.

    Args:
        lists: what `objective.prepare` returned.
        settings: None takes the defaults of `Settings`.
        described: which student this is; a training in `settings.folder` only resumes for the same one.
        validate: measures the network, higher is better. It is called every `settings.every` steps, and the network
            ends with the weights of the best measurement.

    Raises ValueError for no lists, for a batch_size that is no multiple of micro_batch times the devices, for less than
    one step, and for a folder that holds a training with another recipe, seed or `described`.
    """
    from transformers import TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    settings = settings or Settings()
    device = device_of(objective.network)
    arguments = training_arguments(len(lists), recipe, settings, device, validated=validate is not None)
    examples = Samples(objective.sample, lists, arguments["max_steps"] * recipe.batch_size, settings.seed)
    with (
        tempfile.TemporaryDirectory() as temporary,
        _float32_in_training_mode(objective.network),
        _eager_attention_on_cpu(objective.network),
    ):
        folder = _claim(settings, recipe, described) if settings.folder else Path(temporary)
        one_gpu = _one_gpu(TrainingArguments(output_dir=str(folder), **arguments))
        loop = _loop(objective, examples, one_gpu, validate, settings.patience)
        loop.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return _log(loop.state.log_history)


# Settings


def training_arguments(
    n_lists: int, recipe: Recipe, settings: Settings, device: torch.device, *, validated: bool
) -> dict[str, Any]:
    """A recipe and settings in the words of transformers.TrainingArguments. Raises ValueError as `train` does."""
    micro_batch, accumulated = _micro_batches(n_lists, recipe)
    steps = _steps(n_lists, recipe)
    every = settings.every or max(steps // 10, 1)
    precision = choose_dtype(recipe.precision, device)
    return {
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": int(recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps),
        "max_grad_norm": recipe.clip,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": settings.seed,
        "train_sampling_strategy": "sequential",  # `Samples` has shuffled
        "logging_steps": max(steps // 200, 1),
        "logging_first_step": True,
        "save_strategy": "steps" if settings.folder or validated else "no",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": every,
        "load_best_model_at_end": validated,
        "metric_for_best_model": MEASURE if validated else None,
        "greater_is_better": True if validated else None,
        "dataloader_num_workers": recipe.workers,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": not settings.verbose,
        **recipe.options,
    }


def _micro_batches(n_lists: int, recipe: Recipe) -> tuple[int, int]:
    """Lists in memory at once on each device, and over how many such micro batches a step accumulates."""
    devices = int(os.environ.get("WORLD_SIZE", 1))  # processes, as `accelerate launch` and torchrun say; one GPU each
    micro_batch = min(recipe.micro_batch, max(recipe.batch_size // devices, 1))
    accumulated, rest = divmod(recipe.batch_size, micro_batch * devices)
    if not n_lists or rest or not accumulated:
        raise ValueError(
            f"{n_lists} lists to learn from in batches of {recipe.batch_size}, {micro_batch} at once on {devices}"
            " device(s); wanted some lists, and a batch_size that is a multiple of micro_batch times the devices"
        )
    return micro_batch, accumulated


def _steps(n_lists: int, recipe: Recipe) -> int:
    steps = math.ceil(recipe.epochs * n_lists / recipe.batch_size) if recipe.steps is None else recipe.steps
    if steps < 1:
        raise ValueError(
            f"steps={recipe.steps}, epochs={recipe.epochs}: that is no step; wanted steps of 1 or more, or None and"
            " epochs above 0"
        )
    return steps


def _claim(settings: Settings, recipe: Recipe, described: str) -> Path:
    """The folder of a training, if it is new or holds a training that was started in the same way."""
    folder = Path(str(settings.folder)).expanduser()
    started = {"recipe": repr(recipe), "seed": settings.seed, "of": described}
    file = folder / STARTED_WITH
    if file.exists() and (held := json.loads(file.read_text(encoding="utf-8"))) != started:
        name = next(name for name in started if held.get(name) != started[name])
        raise ValueError(
            f"{folder} holds a training with another {name}: {held.get(name)}, now {started[name]}; give another"
            " folder, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(started, indent=2) + "\n", encoding="utf-8")
    return folder


# Loop


class Samples(torch.utils.data.Dataset[Any]):
    """Examples by number: number i is always the same one, so that a training resumes as if it had never stopped.

    Every len(lists) numbers are an epoch, which has each list once, in an order of its own.
    """

    def __init__(self, sample: Callable[[Any, random.Random], Any], lists: Sequence[Any], count: int, seed: int):
        self.sample, self.lists, self.count, self.seed = sample, lists, count, seed
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch, and its order of the lists

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        epoch, position = divmod(i, len(self.lists))
        if self._order[0] != epoch:
            shuffled = list(range(len(self.lists)))
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self._order = epoch, shuffled
        return self.sample(self.lists[self._order[1][position]], random.Random(f"{self.seed} {i}"))


class NetworkWithLoss(nn.Module):
    """A network whose `forward` is its loss on a batch: the Trainer calls a model and reads "loss" of what it returns.

    The loss is a mean over a micro batch, which the Trainer divides by the number of micro batches.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: SimpleNamespace) -> dict[str, torch.Tensor]:
        """The loss of one micro batch, as `_as_argument` gives it."""
        return {"loss": self.loss(batch.examples)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Each tensor once, also where a network shares some: safetensors refuses two names for one tensor."""
        kept: dict[tuple[int, torch.Size], str] = {}
        found = super().state_dict(*args, **kwargs)
        for name, tensor in found.items():
            kept.setdefault((tensor.data_ptr(), tensor.shape), name)
        return {name: found[name] for name in kept.values()}


def _as_argument(collate: Callable[[list[Any]], Any], examples: list[Any]) -> dict[str, SimpleNamespace]:
    """A batch as the argument of `NetworkWithLoss.forward`, in a wrapper that the Trainer does not take apart."""
    return {"batch": SimpleNamespace(examples=collate(examples))}


def _loop(
    objective: Objective,
    examples: Samples,
    arguments: "TrainingArguments",
    validate: Callable[[], float] | None,
    patience: int | None,
) -> "Trainer":
    """transformers.Trainer with AdamW over all parameters that learn, validated by a function."""
    import transformers

    class Loop(transformers.Trainer):
        model: nn.Module

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            assert validate is not None  # eval_strategy is "no" without it
            self.model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                measured = validate()
            self.model.train()
            self.log({MEASURE: measured})
            metrics = {f"eval_{MEASURE}": measured}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    learned = [parameter for parameter in objective.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    loop = Loop(
        NetworkWithLoss(objective.network, objective.loss),
        arguments,
        train_dataset=examples,
        data_collator=partial(_as_argument, objective.collate),
        eval_dataset=[] if validate else None,
        optimizers=(optimizer, None),
        callbacks=[transformers.EarlyStoppingCallback(patience)] if patience and validate else None,
    )
    loop.remove_callback(transformers.PrinterCallback)
    return loop


def _one_gpu(arguments: "TrainingArguments") -> "TrainingArguments":
    """The arguments with at most one GPU: with several the Trainer would use DataParallel, and each would get the
    same batch."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# What the network is while it learns


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are. It can change between the making of an objective and its loss."""
    return next(network.parameters()).device


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Make the models of transformers in a network recompute the activations of their layers in the backward pass."""
    for module in network.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            enable: Any = (
                getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})


@contextlib.contextmanager
def _float32_in_training_mode(network: nn.Module) -> Iterator[None]:
    """Weights in float32 and dropout on; afterwards the network has its device and dtype again, and dropout is off."""
    device, dtype = device_of(network), next(network.parameters()).dtype
    try:
        network.float().train()
        yield
    finally:
        network.to(device, dtype).eval()


@contextlib.contextmanager
def _eager_attention_on_cpu(network: nn.Module) -> Iterator[None]:
    """On a CPU attention as products of matrices, "eager": there the gradient of the fused kernel ("sdpa") takes
    several times as long. Afterwards every model has its own attention again."""
    models: list[Any] = [module for module in network.modules() if hasattr(module, "set_attn_implementation")]
    before = [model.config._attn_implementation for model in models]
    try:
        if device_of(network).type == "cpu":
            for model in models:
                model.set_attn_implementation("eager")
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


# Log


def _log(history: list[dict[str, float]]) -> Log:
    """What the Trainer logged of the steps, without its summaries of the whole training."""
    kept = ("step", "loss", "learning_rate", "grad_norm", MEASURE)
    entries = [{name: entry[name] for name in kept if name in entry} for entry in history]
    return [entry for entry in entries if len(entry) > 1]
