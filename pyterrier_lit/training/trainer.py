"""The training loop: trains a network with the Trainer of transformers.

A list is a query with its passages. Each step takes `batch_size` training lists, samples an example from each list, and
updates the weights once with the mean loss of these examples. The step processes the examples in micro-batches, which
need less memory, and accumulates the gradients. The functions that differ between rerankers are passed to `train` as an
`Objective`.

This module does not deal with frames, texts or rerankers.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pyterrier_lit.models.devices import choose_dtype

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

MEASURE = "nDCG@10"  # the name of the result of `validate` in the log
STARTED_WITH = "training.json"  # a file in the training folder: the recipe, seed, data and weights at the start
WHOLE = "whole.json"  # the file that is written last in each checkpoint. It has the sizes of all other files in bytes
WEIGHTS = "digest of the starting weights"  # a key in STARTED_WITH
# Network -> the training folder of its last training, and the digest of its weights before this training. Resuming in
# the same process needs this digest, since the network no longer has these weights
_began: weakref.WeakKeyDictionary[nn.Module, tuple[Path, str]] = weakref.WeakKeyDictionary()

# Log entries in the order of the steps. Each entry has `step`. An entry of the training also has `loss`,
# `learning_rate` and `grad_norm`. An entry of a measurement also has `nDCG@10`
Log = list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of training that do not depend on the recipe.

    Args:
        folder: the folder in which checkpoints are saved. If training is started again with the same recipe, seed, data
            and student, it resumes from the last checkpoint in this folder. If one of these four differs, training
            raises ValueError. None saves no checkpoints.
        every: steps between two checkpoints, and between two measurements on the validation frame. None is a tenth of
            all steps.
        patience: stop after this many measurements in a row without a better `nDCG@10`. None never stops early.
        seed: the random seed. It determines the order of the lists and everything that is sampled.
        verbose: show progress.
    """

    folder: str | Path | None = None
    every: int | None = None
    patience: int | None = None
    seed: int = 42
    verbose: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training. Each reranker has a subclass with more fields. A list is a query with its
    passages.

    Args:
        learning_rate: the peak learning rate of AdamW, the same for all parameters.
        batch_size: lists per step, over all devices (the global batch size).
        steps: the number of steps. Each step updates the weights once. None trains for `epochs`.
        epochs: passes over all lists. `epochs` has no effect if `steps` is given.
        warmup: the number of steps in which the learning rate rises linearly to its peak. A value below 1 is a fraction
            of all steps.
        schedule: the learning rate schedule after warm-up: "constant", "linear" or "cosine".
        weight_decay: the weight decay of AdamW.
        clip: the maximum gradient norm. 0 does not clip gradients.
        micro_batch: maximum lists per forward pass on a device (the micro-batch size). The product of micro_batch and
            the number of devices must divide batch_size.
        precision: "bfloat16" is mixed precision (autocast with float32 weights), "float32" is full precision. None is
            "bfloat16" on a GPU that supports bfloat16, else "float32".
        checkpointing: use gradient checkpointing, which saves memory by recomputing activations in the backward pass.
        workers: number of processes that prepare batches. 0 prepares them in the training process.
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
        """Return a copy of this recipe in which the given fields have other values. Raises TypeError, with the names of
        all fields, if a field is unknown."""
        names = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in names]
        if unknown:
            others = ", ".join(field.name for field in dataclasses.fields(Settings))
            raise TypeError(
                f"{unknown[0]!r} is not a setting of {type(self).__name__}; there are {', '.join(names)}; and, whatever"
                f" the recipe, {others}"
            )
        return dataclasses.replace(self, **changes)

    def objective(self, student: Any) -> "Objective":
        """Return the objective that `train` optimises for a student (a reranker) with this recipe."""
        raise NotImplementedError(f"{type(self).__name__} has no objective; use a recipe of a reranker")


def as_it_is(seed: int) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that does nothing. The random seed has no effect."""
    return contextlib.nullcontext()


class Objective(NamedTuple):
    """A student's network, and the functions that compute a training loss from lists.

    If the recipe's `workers` is above 0, `sample` and `collate` run in other processes and may be pickled. They must
    therefore be module-level functions, or `functools.partial` objects of such functions.
    """

    network: nn.Module
    """The network to train. It is trained in place."""
    column_sets: Sequence[Mapping[str, type]]
    """Alternative sets of columns of a training frame, each as column name -> type of its values. As in
    `frames.rankings`, the first set whose columns are all in the frame is read. A set with the column "target" requires
    labels or a teacher."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]]
    """A function: all lists -> the lists to train on. `sample` reads one of them at a time."""
    sample: Callable[[Any, random.Random], Any]
    """A function: one of the prepared lists, a random generator -> a training example. The function takes all its
    random numbers from this generator."""
    collate: Callable[[list[Any]], Any]
    """A function: M examples -> a batch."""
    loss: Callable[[Any], torch.Tensor]
    """A function: a batch -> the mean loss of its examples, a scalar tensor with gradients."""
    wanted: str = "wanted queries with passages that are not all worth the same"
    """The end of the error message that is raised if `prepare` returns no lists."""
    around: Callable[[int], contextlib.AbstractContextManager[None]] = as_it_is
    """A function: seed -> a context manager. Training runs inside this context manager, which can change the network
    until training ends, for example by adding adapters. The default, `as_it_is`, changes nothing."""


def train(
    objective: Objective,
    lists: Sequence[Any],
    recipe: Recipe,
    settings: Settings | None = None,
    *,
    described: Mapping[str, str] | None = None,
    validate: Callable[[], float] | None = None,
    begins: Callable[[], None] | None = None,
) -> Log:
    """Train the objective's network in place, and return the log.

    Args:
        objective: the network, and the functions that compute a training loss from lists.
        lists: the lists that `objective.prepare` returned.
        recipe: the hyperparameters.
        settings: the settings that do not depend on the recipe. None is `Settings()`.
        described: name -> value, such as a digest of the data. Training resumes from `settings.folder` only if these
            values, the recipe, the seed and the initial weights are unchanged.
        validate: a function that returns the quality of the network (higher is better). It is called every
            `settings.every` steps. At the end, the network has the weights for which `validate` returned the highest
            value.
        begins: a function that is called after all checks and before the first step.

    Raises ValueError

    - if there are no lists;
    - if batch_size is not a multiple of micro_batch times the number of devices;
    - if there would be less than one step;
    - if `settings.folder` has a checkpoint from training with another recipe, another seed, another `described` or
      other initial weights.
    """
    from transformers import TrainingArguments

    settings = settings or Settings()
    device = device_of(objective.network)
    arguments = training_arguments(len(lists), recipe, settings, device, validated=validate is not None)
    examples = Samples(objective.sample, lists, arguments["max_steps"] * recipe.batch_size, settings.seed)
    with (
        tempfile.TemporaryDirectory() as temporary,
        objective.around(settings.seed),
        _float32_in_training_mode(objective.network, autocast=arguments["bf16"] or arguments["fp16"]),
        _eager_attention_on_cpu(objective.network) as usual_attention,
    ):
        folder = Path(temporary)
        if settings.folder:
            folder = Path(settings.folder).expanduser().absolute()
            started = {"recipe": repr(recipe), "seed": settings.seed, **(described or {})}
            _claim(folder, started | {WEIGHTS: _starting_weights(objective.network, folder)})
        one_gpu = _one_gpu(TrainingArguments(output_dir=str(folder), **arguments))
        loop = _loop(objective, examples, one_gpu, validate and usual_attention(validate), settings.patience)
        if begins is not None:
            begins()
        last = _last_whole(folder)
        if last:
            _find_best(Path(last))
        loop.train(resume_from_checkpoint=last)
    return _log(loop.state.log_history)


# Settings


def training_arguments(
    n_lists: int, recipe: Recipe, settings: Settings, device: torch.device, *, validated: bool
) -> dict[str, Any]:
    """Return the arguments of transformers.TrainingArguments for a recipe and settings, as name -> value. `validated`
    says whether `train` has a function `validate`.

    Raises ValueError, as `train` does, if there are no lists, if the batch sizes do not match, or if there would be
    less than one step. Warns if the warm-up is at least as long as the training.
    """
    micro_batch, accumulated = _micro_batches(n_lists, recipe)
    steps = _steps(n_lists, recipe)
    every = settings.every or max(steps // 10, 1)
    precision = choose_dtype(recipe.precision, device)
    warmup = int(recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps)
    if warmup >= steps:
        warnings.warn(
            f"the learning rate rises for {warmup} steps, and the training has {steps}: it never reaches"
            f" {recipe.learning_rate}. Give more steps, or a smaller warmup",
            stacklevel=2,
        )
    return {
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": warmup,
        "max_grad_norm": recipe.clip,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": settings.seed,
        "train_sampling_strategy": "sequential",  # `Samples` shuffles
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
    """Return the micro-batch size per device, and the number of micro-batches per step on each device."""
    devices = int(os.environ.get("WORLD_SIZE", 1))  # processes of `accelerate launch` or torchrun, each with one GPU
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
            f"steps={recipe.steps}, epochs={recipe.epochs}: that is less than one step; wanted steps of 1 or"
            " more, or None and epochs above 0"
        )
    return steps


# The training folder


def _claim(folder: Path, started: dict[str, Any]) -> None:
    """Record in a folder the values with which training starts: name -> value. Raises ValueError if the folder has a
    checkpoint from training that started with other values."""
    file = folder / STARTED_WITH
    if _last_whole(folder) and file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        name = next((name for name in started if held.get(name) != started[name]), None)
        if name is not None:
            raise ValueError(
                f"{folder} has checkpoints of training with another {name} ({held.get(name)}; now {started[name]}):"
                " give another folder, or delete this folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{STARTED_WITH}.{os.getpid()}")
    written.write_text(json.dumps(started, indent=2) + "\n", encoding="utf-8")
    written.replace(file)


def _starting_weights(network: nn.Module, folder: Path) -> str:
    """Return a digest of a network's weights before training in a folder. Usually, these are the current weights. If
    this process has already trained the network in this folder, and the folder has a complete checkpoint, these are the
    weights before that earlier training."""
    before = _began.get(network)
    if before is None or before[0] != folder or not _last_whole(folder):
        before = _began[network] = folder, digest(network)
    return before[1]


def digest(network: nn.Module) -> str:
    """Return a digest of the weights of a network, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _last_whole(folder: Path) -> str | None:
    """Return the path of the last complete checkpoint in a folder, or None. A checkpoint is incomplete if the process
    was killed while it wrote this checkpoint."""
    states = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in states if _is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if whole else None


def _find_best(state: Path) -> None:
    """Correct trainer_state.json in the checkpoint `state`. The file names the path of the best checkpoint, which is
    wrong if the training folder was moved."""
    file, whole = state / "trainer_state.json", state / WHOLE
    held = json.loads(file.read_text(encoding="utf-8"))
    best = held.get("best_model_checkpoint")
    if best is not None and (here := state.with_name(Path(best).name)) != Path(best):
        file.write_text(json.dumps(held | {"best_model_checkpoint": str(here)}, indent=2) + "\n", encoding="utf-8")
        sizes = json.loads(whole.read_text(encoding="utf-8"))
        whole.write_text(json.dumps(sizes | {file.name: file.stat().st_size}), encoding="utf-8")


def _is_whole(state: Path) -> bool:
    try:
        sizes = json.loads((state / WHOLE).read_text(encoding="utf-8"))
        return all((state / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _keeper() -> "TrainerCallback":
    """Return a callback that adds the file WHOLE to each checkpoint after all other files."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero:
                files = [file for file in saved.rglob("*") if file.is_file() and file.name != WHOLE]
                sizes = {file.relative_to(saved).as_posix(): file.stat().st_size for file in files}
                (saved / WHOLE).write_text(json.dumps(sizes), encoding="utf-8")

    return Keeper()


# The loop


class Samples(torch.utils.data.Dataset[Any]):
    """Training examples by index. An index always gives the same example, so resumed training sees the same examples as
    training without interruption.

    Each epoch is a block of len(lists) indices. Each epoch contains each list once, in a new order. `sample` is the
    function of an Objective, and `count` is the number of examples.
    """

    def __init__(self, sample: Callable[[Any, random.Random], Any], lists: Sequence[Any], count: int, seed: int):
        self.sample, self.lists, self.count, self.seed = sample, lists, count, seed
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch, and the order of the lists in it

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
    """A network with a `forward` that returns the mean loss of a micro-batch, as the Trainer expects. The Trainer
    divides this loss by the number of micro-batches per step. `loss` is the function of an Objective."""

    def __init__(self, network: nn.Module, loss: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: SimpleNamespace) -> dict[str, torch.Tensor]:
        """Return {"loss": the loss of one micro-batch}, a scalar tensor. `batch.examples` is the micro-batch, as the
        function `collate` of an Objective returns it."""
        return {"loss": self.loss(batch.examples)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the trainable parameters and the buffers. A tensor with several names appears under its first name
        only, since safetensors refuses two names for one tensor."""
        found = super().state_dict(*args, **kwargs)
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: found[name] for name in _first_names(found).values() if name not in frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what the method `state_dict` returned. Each tensor is loaded under all of its names. Tensors that the
        argument `state_dict` does not contain are unchanged."""
        own = super().state_dict()
        first = _first_names(own)
        given = {name: state_dict[first[name]] for name in first if first[name] in state_dict}
        return super().load_state_dict({**own, **state_dict, **given}, *args, **kwargs)


def _first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return a dict: each name -> the first name of the same tensor."""
    first: dict[tuple[int, torch.Size], str] = {}
    return {name: first.setdefault((tensor.data_ptr(), tensor.shape), name) for name, tensor in tensors.items()}


def _as_argument(collate: Callable[[list[Any]], Any], examples: list[Any]) -> dict[str, SimpleNamespace]:
    """Collate examples to a batch, and return it as the keyword argument of `NetworkWithLoss.forward`. The batch is
    wrapped in a SimpleNamespace, so that the Trainer does not unpack it."""
    return {"batch": SimpleNamespace(examples=collate(examples))}


def _loop(
    objective: Objective,
    examples: Samples,
    arguments: "TrainingArguments",
    validate: Callable[[], float] | None,
    patience: int | None,
) -> "Trainer":
    """Return a transformers.Trainer with AdamW over all trainable parameters. Where the Trainer would evaluate, it
    calls `validate`."""
    import transformers

    class Loop(transformers.Trainer):
        model: nn.Module

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            assert validate is not None  # eval_strategy is "no" without it
            self.model.eval()
            measured = validate()
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
        callbacks=[_keeper(), *([transformers.EarlyStoppingCallback(patience)] if patience and validate else [])],
    )
    loop.remove_callback(transformers.PrinterCallback)
    if loop.accelerator.state.deepspeed_plugin is None:
        loop.accelerator.gradient_accumulation_steps = 1  # the Trainer of transformers 5.4 would divide the loss again
    return loop


def _one_gpu(arguments: "TrainingArguments") -> "TrainingArguments":
    """Set the number of GPUs in the arguments to at most one, and return the arguments. Otherwise, the Trainer would
    use DataParallel on a machine with several GPUs, and each GPU would get the same batch."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# The network during training


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's parameters. This device can change between creating an objective and computing
    its loss."""
    return next(network.parameters()).device


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Enable gradient checkpointing in each part of a network that is a model of the transformers library."""
    for module in network.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            enable: Any = (
                getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})


def _disable_gradient_checkpointing(network: nn.Module) -> None:
    """Undo `enable_gradient_checkpointing`. Also remove the hook that transformers adds for gradient checkpointing,
    since this hook cannot be pickled."""
    for module in network.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            disable: Any = (
                getattr(module, "activation_checkpointing_disable", None) or module.gradient_checkpointing_disable
            )
            disable()
        if hasattr(module, "_require_grads_hook"):
            module.disable_input_require_grads()  # type: ignore[operator]


@contextlib.contextmanager
def _float32_in_training_mode(network: nn.Module, autocast: bool) -> Iterator[None]:
    """Return a context manager in which the network is in training mode and all weights are float32. If `autocast` is
    true, frozen weights keep their dtype to save memory. At the end, the network is in evaluation mode, with its former
    device and dtypes, and gradient checkpointing is off."""
    device = device_of(network)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(network)}
    try:
        for _, tensor in _tensors(network):
            if tensor.is_floating_point() and not (
                autocast and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            ):
                tensor.data = tensor.data.float()
        network.train()
        yield
    finally:
        network.to(device).eval()
        _disable_gradient_checkpointing(network)
        for name, tensor in _tensors(network):
            tensor.data = tensor.data.to(dtypes[name])


def _tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())


@contextlib.contextmanager
def _eager_attention_on_cpu(network: nn.Module) -> Iterator[Callable[[Callable[[], float]], Callable[[], float]]]:
    """Return a context manager in which a network on a CPU uses "eager" attention. On a CPU, the backward pass of
    "eager" attention is several times faster than that of the fused kernel ("sdpa"). At the end, the network has its
    usual attention again. The context manager yields a decorator: a decorated function runs with the usual
    attention."""
    models: list[Any] = [module for module in network.modules() if hasattr(module, "set_attn_implementation")]
    usual = [model.config._attn_implementation for model in models]
    in_training = ["eager"] * len(models) if device_of(network).type == "cpu" else usual

    def use(implementations: list[str]) -> None:
        for model, implementation in zip(models, implementations, strict=True):
            model.set_attn_implementation(implementation)

    def with_usual(call: Callable[[], float]) -> Callable[[], float]:
        def inner() -> float:
            use(usual)
            try:
                return call()
            finally:
                use(in_training)

        return inner

    use(in_training)
    try:
        yield with_usual
    finally:
        use(usual)


# Log


def _log(history: list[dict[str, float]]) -> Log:
    """Return the log entries of the steps, without the Trainer's summaries of the whole training."""
    kept = ("step", "loss", "learning_rate", "grad_norm", MEASURE)
    entries = [{name: entry[name] for name in kept if name in entry} for entry in history]
    return [entry for entry in entries if len(entry) > 1]
