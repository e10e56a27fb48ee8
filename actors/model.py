"""Loading the language model under study: weights, tokenizer, limits, and a digest of what decides its output.

Every refusal names the setting to change. A checkpoint that lacks weights, or a model whose positions see later
tokens, would give scores that look right and are wrong, so both are refused here.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pyarrow.fs import LocalFileSystem
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig
from transformers.utils.hub import cached_file

from actors.digests import remembered_digests
from actors.errors import ConfigError
from actors.sharding import check_sharding, created_in_slices, gather_in_passes, is_communication, zero_settings
from conf.schema import ModelConfig, Offload
from influence.exchange import Alone, Exchange

_CONTENT = ("*.safetensors", "*.bin", "*.index.json", "config.json", "adapter_config.json", "*.py")  # decide the output
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_EXAMPLES = 3  # missing weights that a message names

T = TypeVar("T")


def load_model(config: ModelConfig, device: torch.device | str = "cpu", exchange: Exchange | None = None) -> nn.Module:
    """Load a causal language model, frozen and in evaluation mode, without a cache of keys and values.

    Args:
        config: Where it is, its type of numbers, how its attention is computed, and where its weights lie.
        device: Where its weights are used.
        exchange: The other ranks of a replica, which hold it together (`actors.sharding`) and all make this call; None
            if this process holds all of it.

    Raises:
        ConfigError: If there is no model, it needs code that is not trusted, it is not a causal language model, or
            weights are missing. On all ranks, whichever of them found it.
    """
    exchange, device = exchange or Alone(), torch.device(device)
    model_config = load_model_config(config)

    def load() -> Any:
        return _read_weights(config, model_config)

    if exchange.size == 1 and config.offload is Offload.none:
        model = load().to(device)
    else:
        model = _load_sharded(config, device, exchange, load)
    model.config.use_cache = False
    causal = _is_causal(model, device, vocabulary_size(model_config))
    if not all(exchange.agree(causal)):
        raise _not_causal(config, "the output at a position depends on later tokens")
    return model


def load_skeleton(config: ModelConfig) -> nn.Module:
    """Build the model without weights, on the meta device: its module tree and shapes, for planning.

    `select_layers` reads it; `group_inputs` with meta tokens works where the forward pass looks at no value (dense
    models). Its cache of keys and values is left on, since transformers looks at the values of a mask without it.

    Raises:
        ConfigError: As `load_model`.
    """
    model_config = load_model_config(config)
    options = {name: value for name, value in _options(config).items() if name != "revision"}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, **options).eval()
    except (OSError, ValueError, ImportError) as error:
        raise _refusal(config, error) from error


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """Read the model's own config, without its weights.

    Raises:
        ConfigError: If there is none, or it is not a decoder's.
    """
    if not Path(_location(config.path)).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path):
        raise ConfigError(f"model.path={config.path!r}: there is no such folder")
    try:
        found = AutoConfig.from_pretrained(
            _location(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _refusal(config, error) from error
    if getattr(found, "is_encoder_decoder", False):
        raise _not_causal(config, f"{found.model_type} is an encoder-decoder")
    return found


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, from `model.tokenizer` or from beside the weights.

    Raises:
        ConfigError: If there is none, or it needs code that is not trusted.
    """
    path = config.tokenizer or config.path
    revision = None if config.tokenizer else config.revision
    try:
        return AutoTokenizer.from_pretrained(
            _location(path), revision=revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise _refusal(config, error) from error
        raise ConfigError(
            f"no tokenizer can be loaded from {path!r}: {_first_line(error)}",
            remedy="set model.tokenizer to a folder or hub name that AutoTokenizer loads",
        ) from error


def model_digest(path: str, revision: str | None = None) -> str:
    """What identifies a model's bits: part of the fingerprint of everything computed with it.

    Args:
        path: A local folder: SHA-256 over the names and contents of its weights, config and code, each of which is
            read again only if it seems to have changed (`actors.digests`). Anything else is a hub name: the commit
            that it resolves to, or name and revision where that cannot be found out.
        revision: Of a hub name.
    """
    folder = Path(_location(path))
    if not folder.is_dir():
        return _commit(path, revision) or f"{path}@{revision or 'main'}"
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in _CONTENT)
    ]
    digest = hashlib.sha256()
    contents = remembered_digests(LocalFileSystem(), [str(file) for file in files], str(folder.absolute()))
    for file, content in zip(files, contents, strict=True):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def context_length(model_config: PretrainedConfig) -> int | None:
    """The most tokens a sequence may have; None where the model states no limit (ALiBi, recurrent models)."""
    text = model_config.get_text_config()
    return next((int(getattr(text, name)) for name in _CONTEXT_NAMES if getattr(text, name, None)), None)


def vocabulary_size(model_config: PretrainedConfig) -> int:
    """The number of tokens that the model has an embedding for."""
    return int(model_config.get_text_config().vocab_size)


def _location(path: str) -> str:
    """A local path with ~ expanded; a hub name as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "revision": config.revision,
        "dtype": getattr(torch, config.dtype.name),
        "trust_remote_code": config.trust_remote_code,
    }
    return options if config.attention is None else options | {"attn_implementation": config.attention}


def _read_weights(config: ModelConfig, model_config: PretrainedConfig) -> Any:
    """The model, frozen, with the weights of its checkpoint.

    Raises:
        ConfigError: If there is none, or it is not complete.
    """
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            _location(config.path), config=model_config, output_loading_info=True, **_options(config)
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if is_communication(error):
            raise
        raise _refusal(config, error) from error
    model, loading = found
    _check_weights(config, loading)
    return model.eval().requires_grad_(False)


def _load_sharded(config: ModelConfig, device: torch.device, exchange: Exchange, load: Callable[[], Any]) -> Any:
    """The model over all ranks; what any of them refuses, all of them refuse."""
    gpu = device.type == "cuda"
    _by_all(exchange, lambda: check_sharding(config, gpu))
    largest = max(parameter.numel() for parameter in load_skeleton(config).parameters())
    settings = zero_settings(config, exchange.size, gpu, largest)
    with created_in_slices(settings, gpu):
        model = _by_all(exchange, load)
    gather_in_passes(model, settings, device)
    return model


def _by_all(exchange: Exchange, action: Callable[[], T]) -> T:
    """What the action returns, or on every rank the first ConfigError that any of them raised."""
    result, problem = None, None
    try:
        result = action()
    except ConfigError as error:
        problem = error
    problems = [found for found in exchange.agree(problem) if found is not None]
    if problems:
        raise problem or problems[0]
    return cast(T, result)


def _check_weights(config: ModelConfig, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint whose missing weights were made up at random."""
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        names = ", ".join(missing[:_EXAMPLES])
        raise ConfigError(
            f"model.path={config.path!r}: {len(missing)} weights are not in the checkpoint, such as {names}",
            remedy="give a complete checkpoint of a causal language model",
        )


def _is_causal(model: nn.Module, device: torch.device, vocabulary: int) -> bool:
    """Whether no position's output depends on later tokens (a masked language model's does)."""
    first = torch.tensor([[1, 2, 3, 4]], device=device) % vocabulary
    second = torch.tensor([[1, 2, 3, 5]], device=device) % vocabulary
    with torch.no_grad():
        change_TV = (model(input_ids=first).logits - model(input_ids=second).logits)[0].abs()
    rounding = 1e-2 if change_TV.dtype.itemsize < 4 else 1e-4
    return not bool(change_TV[:-1].max() > rounding * change_TV[-1].max())


def _refusal(config: ModelConfig, error: Exception) -> ConfigError:
    """Say which setting is at fault when transformers cannot load a model."""
    reason, shown = str(error), f"model.path={config.path!r}"
    if "trust_remote_code" in reason:
        return ConfigError(
            f"{shown} needs code of its own, which is not run unless model.trust_remote_code=true",
            remedy="read that code, then set model.trust_remote_code=true",
        )
    if "Unrecognized configuration class" in reason:
        return _not_causal(config, "AutoModelForCausalLM has no class for it")
    if "attn_implementation" in reason or isinstance(error, ImportError):
        return ConfigError(
            f"model.attention={config.attention!r} cannot be used: {_first_line(error)}",
            remedy="leave model.attention unset, or use eager or sdpa",
        )
    return ConfigError(
        f"{shown} cannot be loaded: {_first_line(error)}",
        remedy="give a folder or hub name that AutoModelForCausalLM loads",
    )


def _not_causal(config: ModelConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"model.path={config.path!r} is not a causal language model: {reason}",
        remedy="give a folder or hub name that AutoModelForCausalLM loads",
    )


def _first_line(error: Exception) -> str:
    """The first line, and the one that it announces."""
    first, *others = str(error).strip().splitlines() or [""]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub name, from the cache or the hub."""
    try:
        resolved = cached_file(name, "config.json", revision=revision)
    except (OSError, ValueError):
        return None
    found = re.search(r"snapshots/([0-9a-f]{40})/", Path(resolved or "").as_posix())
    return found and f"{name}@{found[1]}"
