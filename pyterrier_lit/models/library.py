"""Builds networks of the transformers library from a config.json, and loads a checkpoint's weights strictly."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pyterrier_lit.models.errors import wrong_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]  # name -> tensor
Network = TypeVar("Network", bound=nn.Module)
NORM = {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}  # layer norm weights: names before 2019 -> current names
_OLD_NORM = re.compile(r"LayerNorm\.(gamma|beta)$")
# Fields of a config.json that do not affect the shape of the network
NO_SHAPE = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings")
# Fields of a config.json that are ignored. They would let a checkpoint choose the code, kernels, quantisation and
# devices that transformers uses, and what a model returns. Fields whose names begin with _ are ignored, too
NOT_HANDED_ON = (
    *("auto_map", "custom_pipelines", "attn_implementation", "experts_implementation", "use_kernels"),
    *("quantization_config", "compression_config", "base_model_tp_plan", "base_model_pp_plan", "device_map"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript"),
)
# Fields of a config.json that state the number of layers, in different architectures
LAYERS = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers"),
)


def library_config(config: dict[str, Any], config_class: type) -> Any:
    """Return a configuration object of transformers with the fields of a config.json that `config_class` knows. Fields
    in NO_SHAPE and NOT_HANDED_ON are left out.

    Args:
        config: the fields of config.json.
        config_class: the configuration class of transformers.
    """
    known = config_class().to_dict()
    return config_class(
        **{key: value for key, value in handed_on(config).items() if key in known and key not in NO_SHAPE}
    )


def auto_config(config: dict[str, Any], kind: str) -> Any:
    """Return the configuration object of transformers for a model type, with the fields of a config.json.

    Unlike `library_config`, this function also passes on fields that the configuration class does not know. References
    to code in config.json are ignored.

    Args:
        config: the fields of config.json.
        kind: the model type, such as "bert".

    Raises KeyError if transformers does not have this model type.
    """
    from transformers import CONFIG_MAPPING

    ties = config.keys() & {"tie_word_embeddings"}
    fields = {key: value for key, value in handed_on(config).items() if key in ties or key not in NO_SHAPE}
    return CONFIG_MAPPING[kind](**fields)


def handed_on(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json without the fields in NOT_HANDED_ON and the fields whose names begin with _. In nested
    configs, these fields are left out, too."""
    return {
        key: handed_on(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in NOT_HANDED_ON and not str(key).startswith("_")
    }


def build(make: Callable[[], Network], config: dict[str, Any], weights: Weights, source: str) -> Network:
    """Return the network that `make` builds from a config.json. The network is on the CPU, and its weights are not
    loaded yet.

    Args:
        make: a function that builds the network.
        config: the fields of config.json.
        weights: the weights of the checkpoint.
        source: the name of the checkpoint, for error messages.

    Raises ValueError if the config describes more layers than the checkpoint has weight tensors. Raises ValueError,
    too, if the network would have more than twice as many parameters as the checkpoint. These checks come before memory
    is allocated.
    """
    check_size(make, config, weights, source)
    with torch.device("cpu"):
        return make()


def check_size(make: Callable[[], nn.Module], config: dict[str, Any], weights: Weights, source: str) -> None:
    """Raise ValueError if the network has too many layers or parameters for the checkpoint, as `build` does. The
    arguments are those of `build`."""
    check_layers(config, weights, source)
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in make().parameters())
    held = sum(tensor.numel() for tensor in weights.values())
    if numbers > 2 * held:  # not numbers > held, since a tensor with two names may be stored once
        raise wrong_weights(source, [f"the config describes {numbers:,} numbers, and the weights are {held:,}"])


def check_layers(config: dict[str, Any], weights: Weights, source: str) -> None:
    """Raise ValueError if the config has more layers than the checkpoint has weight tensors. The arguments are those
    of `build`.

    `check_size` calls this function before it builds the network. Building a million layers would take hours, even
    without memory for their weights.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_layers(value, weights, source)
        elif name in LAYERS and isinstance(value, int) and value > len(weights):
            raise wrong_weights(source, [f"{name}={value} in the config, and {len(weights)} weights"])


def load_strictly(module: nn.Module, weights: Weights, source: str) -> None:
    """Load weights into a module.

    Args:
        module: the module, which is changed in place.
        weights: the weights.
        source: the name of the checkpoint, for the error message.

    Raises ValueError if a weight is missing, unexpected or of another shape. The message names up to ten such weights.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own.keys() - weights.keys()]
    problems += [f"unexpected {name}" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, wanted {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        raise wrong_weights(source, problems)
    module.load_state_dict(weights, assign=True)


def library_model(
    mapping: Any, config: dict[str, Any], kind: str, weights: Weights, source: str, dtype: torch.dtype
) -> "PreTrainedModel":
    """Return the model of the transformers library that a config.json describes, with the given weights.

    Args:
        mapping: a mapping from configuration classes to model classes, such as transformers.MODEL_MAPPING.
        config: the fields of config.json.
        kind: the model type, such as "bert".
        weights: the weights of the checkpoint.
        source: the name of the checkpoint, for error messages.
        dtype: the dtype of the weights in the model.

    Raises KeyError if `mapping` has no model of this type. Raises ValueError if a weight is missing, unexpected or of
    another shape. Also raises the errors of `build`.
    """
    model, found = _library_model(mapping, config, kind, weights, source, dtype)
    _refuse(found, ("missing", "unexpected", "mismatched"), source)
    return model


def library_body(config: dict[str, Any], weights: Weights, source: str, dtype: torch.dtype) -> "PreTrainedModel":
    """Return a model of the transformers library without its head. Weights of a head in `weights` are ignored. The
    arguments are explained at `library_model`.

    Raises the same errors as `library_model`, but no error for unexpected weights.
    """
    from transformers import MODEL_MAPPING

    model, found = _library_model(MODEL_MAPPING, config, str(config.get("model_type")), weights, source, dtype)
    _refuse(found, ("missing", "mismatched"), source)
    return model


def library_student(config: dict[str, Any], weights: Weights, source: str) -> "PreTrainedModel":
    """Return a sequence classifier of the transformers library in float32, whose body has the given weights. The body
    is the model without its head. Weights of the head that are missing in `weights` or have another shape are
    initialised at random. The arguments are explained at `library_model`.

    Raises KeyError if transformers has no such classifier. Raises ValueError if a weight of the body is missing or of
    another shape. Also raises the errors of `build`.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kind, mapping = str(config.get("model_type")), MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    model, found = _library_model(mapping, config, kind, weights, source, torch.float32)
    body = f"{model.base_model_prefix}."
    of_body = {
        f"{problem}_keys": [
            name for name in found[f"{problem}_keys"] if (name if isinstance(name, str) else name[0]).startswith(body)
        ]
        for problem in ("missing", "mismatched")
    }
    _refuse(of_body, ("missing", "mismatched"), source)
    return model


def _library_model(
    mapping: Any, config: dict[str, Any], kind: str, weights: Weights, source: str, dtype: torch.dtype
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Return the model, and transformers' report about its weights. The report has the keys "missing_keys",
    "unexpected_keys" and "mismatched_keys". Under each key, a weight is given as its name, or as a tuple that starts
    with its name."""
    check_layers(config, weights, source)
    shape = auto_config(config, kind)
    make = mapping[type(shape)]
    check_size(lambda: make(shape), config, weights, source)
    with torch.device("cpu"):
        model, found = make.from_pretrained(
            None, config=shape, state_dict=weights, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return model, found


def _refuse(found: dict[str, Any], problems: tuple[str, ...], source: str) -> None:
    """Raise ValueError if a report of `_library_model` lists weights with one of `problems`, such as "missing"."""
    names = [
        (problem, name if isinstance(name, str) else name[0])
        for problem in problems
        for name in found[f"{problem}_keys"]
    ]
    listed = [f"{problem} {name}" for problem, name in names if "position_ids" not in name]
    if listed:
        raise wrong_weights(source, listed)


def positions(network: nn.Module) -> int | None:
    """Return the maximum input length in tokens that a network's table of position embeddings allows, or None if the
    network has no such table."""
    counts = [
        # In RoBERTa, the first position is the one after the padding index
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in network.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return min(counts, default=None)


def position_limit(config: Any) -> float:
    """Return the maximum input length of a language model in tokens, according to its configuration. If the
    configuration states no maximum, return infinity.

    With some rotary embeddings, one input above a certain length changes the results of all inputs in its batch. The
    returned limit is at most this length. A ranking then does not depend on the other prompts in the batch.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for fields in [rope, *rope.values()]:
        if isinstance(fields, dict) and fields.get("rope_type") in ("dynamic", "longrope"):
            limits.append(fields.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=float("inf"))


def today(weights: Weights) -> Weights:
    """Return weights under their current names. In older checkpoints, the weights of layer norms are named gamma and
    beta. Tensors named `embeddings.position_ids`, which hold the numbers 0, 1, 2 and so on, are left out."""
    kept = [name for name in weights if not name.endswith("embeddings.position_ids")]
    return {_OLD_NORM.sub(lambda found: NORM[found[1]], name): weights[name] for name in kept}


def below(weights: Weights, prefix: str) -> Weights:
    """Return the weights whose names start with a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
