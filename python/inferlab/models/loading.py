"""From a name to a loaded Hugging Face model: device, dtype, memory limit, safety, clear errors."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import __version__ as TRANSFORMERS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from inferlab.models.architecture import check_config
from inferlab.models.assets import resolve_model_path
from inferlab.models.forked import use_threads_that_exist
from inferlab.models.generation_defaults import check_file
from inferlab.models.mapped import unmap
from inferlab.models.other_formats import settings_of
from inferlab.models.packed_checkpoint import PackedConfig, checksum
from inferlab.models.quantized import QuantizedLinear, check_device
from inferlab.models.unpacking import (
    Settings,
    UnknownLayoutError,
    Weights,
    read_weights,
    rounded_by,
)

logger = logging.getLogger(__name__)

DEVICE_PRIORITY = ("mps", "cuda", "cpu")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

_INDEX = "model.safetensors.index.json"


class ModelLoadError(ValueError):
    """A model that cannot be loaded; the message says what was found and what to do."""


class ModelTooLargeError(ModelLoadError, MemoryError):
    """A model whose weights exceed ``max_memory_mb``."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its tokenizer, and what was decided for it, in sentences."""

    model: Any
    tokenizer: Any
    notes: tuple[str, ...]


def load(
    name_or_path: str | PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_priority: Sequence[str] = DEVICE_PRIORITY,
    max_memory_mb: float | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device_map: str | Mapping[str, int | str] | None = None,
    tensor_parallel: int = 1,
    quantization: str | None = None,
    dense: bool = False,
) -> LoadedModel:
    """Loads a causal LM and its tokenizer.

    Hub models come from the local cache when they are complete there, else from the network.

    Args:
        name_or_path: directory, bundled name or hub id, in this order.
        device: "auto" takes the first of `device_priority` that is present.
        dtype: "auto" is the stored dtype.
        max_memory_mb: limit for the weights in MB (2^20 bytes), checked before they are read.
        trust_remote_code: run the Python files that a checkpoint brings along.
        allow_pickle: read ``pytorch_model.bin``, whose unpickling can run code.
        device_map: which modules lie on which devices, as accelerate takes it ("auto", "balanced",
            "sequential", or device by module); `device` does not count then.
        tensor_parallel: reads this rank's part of so many; the ranks have met before.
        quantization: of `other_formats.PACKAGES`: a format that weights get while they are read.
        dense: weights that come rounded (`unpacking`) are made dense, also where they could be
            multiplied with as they are.

    Raises:
        FileNotFoundError: a directory that does not exist.
        ModelLoadError: no config, weights or tokenizer; corrupt files; not to be had offline.
        UnsupportedArchitectureError: an architecture that the paged cache cannot serve.
        ModelTooLargeError: over `max_memory_mb`.
        ValueError: an unknown device or dtype; a `device_map` that names no module, or leaves some
            without a device.
    """
    use_threads_that_exist()
    name = str(name_or_path)
    source = resolve_model_path(name_or_path)
    target_device = choose_device(device, device_priority)
    wanted_dtype = parse_dtype(dtype)

    if isinstance(source, Path) and not (source / "config.json").is_file():
        raise ModelLoadError(f"{name}: no config.json in {source}; is it a model directory?")
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _quiet_transformers():
        config = _from_cache_or_hub(AutoConfig.from_pretrained, name, source, "config", **common)
        remote_class = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if isinstance(model_class, (tuple, list)):
            model_class = model_class[0]
        is_remote = bool(remote_class and trust_remote_code)
        if not is_remote:
            check_config(config, name, model_class)

        packed = _packed_as(name, config, target_device)
        rounded = None
        if target_device.type != "cuda" and not is_remote:  # there, others have kernels
            rounded = _rounded_by(name, config)
        learnt = config
        if packed is not None and packed.tied:
            learnt = copy.deepcopy(config)
            learnt.tie_word_embeddings = True
        skeleton = _skeleton(learnt, trust_remote_code)
        parameters = sum(weight.numel() for weight in skeleton.parameters())
        chosen, why = choose_dtype(wanted_dtype, config)
        if packed is None and rounded is None:
            _check_memory(name, parameters, chosen, max_memory_mb)
        if isinstance(source, Path):
            _check_weight_files(name, source, allow_pickle)
            files = _safetensors_files(name, source)
        else:
            files = _cached_safetensors(name, source)
            for file in files:
                _check_safetensors(name, file)
        if packed is not None:
            _check_packed(name, packed, files, max_memory_mb)
        if quantization is not None:
            _check_plain(name, config, quantization)
            common["quantization_config"] = settings_of(quantization, chosen, target_device)
        where: dict[str, Any] = {}
        if tensor_parallel > 1:
            _check_sharable(name, config, target_device)
            where = {"distributed_config": _shared_out(skeleton, tensor_parallel, name)}
        elif isinstance(device_map, str):
            where = {"device_map": device_map}
        elif device_map is not None:
            _check_device_map(device_map, skeleton, name)
            where = {"device_map": dict(device_map)}
        elif quantization is not None or _is_others(config, rounded):  # they cannot be moved later
            where = {"device_map": {"": target_device}}

        _check_generation_config(name, source)
        tokenizer = _load_tokenizer(name, source, trust_remote_code=trust_remote_code)
        if rounded is not None:
            packable: set[str] = set()
            if target_device.type == "cpu" and not where and not dense:
                packable = _linears(skeleton)
            folder = source if isinstance(source, Path) else _hub_folder(name, source)
            weights = _read_rounded(name, folder, rounded, chosen, packable)
            size = sum(tensor.nbytes for tensor in weights.tensors.values())
            _check_size(name, size, rounded["quant_method"], max_memory_mb)
            model = _load_rounded(name, folder, model_class, config, weights, chosen, **where)
            model.name_or_path = model.config._name_or_path = str(source)
        else:
            model = _load_weights(name, source, chosen, allow_pickle, **where, **common)
        if not where:
            model = model.to(target_device)
    unmap(model)

    place = f"on {target_device}"
    if tensor_parallel > 1:
        place = f"shared out over {tensor_parallel} ranks on {target_device.type}"
    elif device_map is not None:
        place = f"on {', '.join(_places(model))}"
    model.inferlab_quantization = quantization or _stored_format(model)
    if rounded is not None:
        done = "as they come" if weights.packed else "unpacked"
        why += f"; {done} from {rounded['quant_method']}"
    notes = (
        f"{name}: {parameters / 1e6:.1f} M parameters, {_dtype_name(chosen)} ({why}), {place}",
    )
    logger.info(notes[0])
    return LoadedModel(model, tokenizer, notes)


def load_tokenizer(name_or_path: str | PathLike[str]) -> Any:
    """Loads a model's tokenizer alone, found as :func:`load` finds models; runs no code of it.

    Raises:
        FileNotFoundError: a directory that does not exist.
        ModelLoadError: there is no usable tokenizer, or it is not to be had offline.
    """
    with _quiet_transformers():
        return _load_tokenizer(str(name_or_path), resolve_model_path(name_or_path))


def choose_device(
    device: str | torch.device, priority: Sequence[str] = DEVICE_PRIORITY
) -> torch.device:
    """The device to use; "auto" is the first present one of `priority`, which ends at the CPU.

    Raises:
        ValueError: an unknown or absent device, named.
    """
    if str(device) == "auto":
        for candidate in priority:
            if candidate not in ("cpu", "cuda", "mps"):
                raise ValueError(
                    f"device_priority names {candidate!r}; allowed are 'cuda', 'mps' and 'cpu'"
                )
        return torch.device(next((d for d in priority if _is_present(d)), "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(
            f"device is {device!r}; allowed are 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'"
        )
    if not _is_present(chosen.type):
        raise ValueError(
            f"device {str(device)!r} is not available on this machine; use 'auto' or 'cpu'"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {str(device)!r}, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype; None for "auto".

    Raises:
        ValueError: anything but float32, float16 and bfloat16 (or fp32, fp16, bf16).
    """
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif dtype == "auto":
        return None
    elif dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype is {dtype!r}; allowed are 'auto', {', '.join(map(repr, DTYPES))}")


def choose_dtype(wanted: torch.dtype | None, config: Any) -> tuple[torch.dtype, str]:
    """The dtype to load in and the reason, in words (see `load`)."""
    if wanted is not None:
        return wanted, "as asked"
    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype
    if stored not in DTYPES.values():
        return torch.float32, "the config names no other"
    return stored, "as stored"


def _skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The model's modules and shapes: nothing is read or allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _check_device_map(device_map: Mapping[str, int | str], skeleton: Any, name: str) -> None:
    """Raises ValueError for names that are not in the model, and for what has no device."""
    parts = {module for module, _ in skeleton.named_modules()}
    parts |= {parameter for parameter, _ in skeleton.named_parameters()}
    unknown = [key for key in device_map if key not in parts]
    missing = [
        parameter
        for parameter, _ in skeleton.named_parameters()
        if not any(key == "" or f"{parameter}.".startswith(f"{key}.") for key in device_map)
    ]
    if unknown or missing:
        names = [key for key, _ in skeleton.named_modules() if key and key.count(".") < 2]
        wrong = f"has no module {unknown[0]}" if unknown else f"is given no device for {missing[0]}"
        raise ValueError(
            f"device_map: {name} {wrong}; its modules are {', '.join(names)}, '' is all"
        )


def _shared_out(skeleton: Any, size: int, name: str) -> Any:
    """`plans.shared_out`, which needs a newer transformers than the rest."""
    try:
        from inferlab.models.parallel.plans import shared_out
    except ImportError as error:
        raise ModelLoadError(
            f"{name}: tensor_parallel needs transformers 5.24 or newer, this is {TRANSFORMERS}: "
            f"{error}"
        ) from error
    return shared_out(skeleton, size, name)


def _places(model: Any) -> list[str]:
    """Devices of a model's weights; "meta": accelerate brings them when they are needed."""
    return sorted({str(weight.device) for weight in model.parameters()})


def _check_sharable(name: str, config: Any, device: torch.device) -> None:
    """Refuses what has no parts, and devices that ranks do not run on."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError(
            f"{name} has quantised weights, which tensor_parallel does not share out; take a "
            "checkpoint of 16 or 32 bits, or one device"
        )
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != accelerator.type:
        raise ModelLoadError(
            f"{name}: device is {device.type!r}, but ranks of tensor_parallel run on this "
            f"machine's {accelerator.type!r}; leave device out"
        )


def _check_memory(name: str, parameters: int, dtype: torch.dtype, limit_mb: float | None) -> None:
    if limit_mb is None:
        return
    needed_mb = parameters * dtype.itemsize / 2**20
    if needed_mb > limit_mb:
        raise ModelTooLargeError(
            f"{name}: {parameters / 1e6:.1f} M parameters in {_dtype_name(dtype)} need "
            f"{needed_mb:.0f} MB, over max_memory_mb = {limit_mb:g}; raise it, use a smaller model "
            "or a 16-bit dtype"
        )


def _check_size(name: str, size: int, format_: str, limit_mb: float | None) -> None:
    if limit_mb is not None and size / 2**20 > limit_mb:
        raise ModelTooLargeError(
            f"{name}: {size / 2**20:.0f} MB of {format_} weights, over max_memory_mb = "
            f"{limit_mb:g}; raise it, or use a smaller model"
        )


def _packed_as(name: str, config: Any, device: torch.device) -> PackedConfig | None:
    """How a checkpoint's weights are packed; None: they are not, as far as inferlab knows."""
    try:
        packed = PackedConfig.of(config)
    except ValueError as error:
        raise ModelLoadError(f"{name}: {error}") from None
    if packed is not None:
        check_device(packed.format, device)
    return packed


def _check_packed(
    name: str, packed: PackedConfig, files: Sequence[Path], limit_mb: float | None
) -> None:
    """Refuses packed weights that are not as they were written, or too large."""
    _check_size(name, sum(file.stat().st_size for file in files), packed.format, limit_mb)
    for file in files:
        if packed.sha256 and checksum(file) != packed.sha256.get(file.name):
            raise ModelLoadError(
                f"{name}: {file} is damaged: it is not the file that was packed; get it again, or "
                "make it anew with inferlab quantize"
            )


def _check_weight_files(name: str, directory: Path, allow_pickle: bool) -> None:
    """Finds missing, pickled and truncated weight files before transformers reads any."""
    files = _safetensors_files(name, directory)
    for file in files:
        if not file.is_file():
            raise ModelLoadError(
                f"{name}: {_INDEX} lists {file.name}, which is not in {directory}; get it, or "
                f"delete {_INDEX} if the weights are in another file"
            )
    if not files:
        pickles = sorted(directory.glob("pytorch_model*.bin"))
        if pickles and not allow_pickle:
            raise ModelLoadError(
                f"{name}: {directory} has only {pickles[0].name}, a pickle, whose loading can run "
                "code. Convert it to safetensors, or pass allow_pickle=True if you trust it"
            )
        if not pickles:
            raise ModelLoadError(f"{name}: no model.safetensors in {directory}")
    for file in files:
        _check_safetensors(name, file)


def _safetensors_files(name: str, directory: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors, and without it what the index lists,
    there or not. An index beside a whole file counts for nothing."""
    whole, index = directory / "model.safetensors", directory / _INDEX
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return [directory / shard for shard in sorted(shards)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{name}: {index} is not a valid shard index: {error}") from error


def _check_safetensors(name: str, file: Path) -> None:
    """Compares the header's extents with the file's size, which a cut-off download fails."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > size - 8:
                raise ModelLoadError(
                    f"{name}: {file} is truncated: {size} bytes, the header alone {header_bytes}"
                )
            header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{name}: {file} is not a safetensors file: {error}") from error
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise ModelLoadError(
            f"{name}: {file} is {what}: {size} bytes, its header describes {expected}; get it again"
        )


def _cached_safetensors(name: str, repo: str) -> list[Path]:
    """The weight files of a hub model that the local cache has; others come from the hub."""
    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return []
    return [file for file in _safetensors_files(name, Path(config).parent) if file.is_file()]


def _check_generation_config(name: str, source: Path | str) -> None:
    """Says what transformers would stumble over, and when: while it loads, or while it decodes."""
    file = (
        source / "generation_config.json"
        if isinstance(source, Path)
        else try_to_load_from_cache(source, "generation_config.json")
    )
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return
    try:
        check_file(Path(file))
    except ValueError as error:
        raise ModelLoadError(
            f"{name}: {error}. Correct the entry in {file}, or take it out"
        ) from error


def _check_plain(name: str, config: Any, quantization: str) -> None:
    """Refuses to quantize what is."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        raise ModelLoadError(
            f"{name}: quantization is {quantization!r}, but its weights come quantized; leave "
            "quantization out, or take a checkpoint of 16 or 32 bits"
        )


def _is_others(config: Any, rounded: Settings | None) -> bool:
    """Whether a checkpoint's weights come quantized as transformers alone reads them."""
    stored = getattr(config, "quantization_config", None)
    return stored is not None and rounded is None and PackedConfig.of(config) is None


def _stored_format(model: Any) -> str | None:
    """How a model's weights came quantized."""
    stored = getattr(model.config, "quantization_config", None)
    packed = getattr(model, "inferlab_quantization", None)
    if stored is None or packed is not None:
        return packed
    return str(getattr(stored.quant_method, "value", stored.quant_method))


def _rounded_by(name: str, config: Any) -> Settings | None:
    try:
        return rounded_by(config)
    except UnknownLayoutError as error:
        raise ModelLoadError(f"{name}: {error}") from None


def _linears(skeleton: Any) -> set[str]:
    """Modules whose weights can be packed."""
    return {name for name, module in skeleton.named_modules() if type(module) is nn.Linear}


def _read_rounded(
    name: str, folder: Path, rounded: Settings, dtype: torch.dtype, packable: set[str]
) -> Weights:
    """See `unpacking.read_weights`."""
    files = _safetensors_files(name, folder)
    if not files:
        raise ModelLoadError(
            f"{name}: {rounded['quant_method']} weights are read from safetensors, and {folder} "
            "has none"
        )
    try:
        return read_weights(files, rounded, dtype, packable)
    except UnknownLayoutError as error:
        raise ModelLoadError(f"{name}: {error}") from error


def _load_rounded(
    name: str,
    folder: Path,
    model_class: Any,
    config: Any,
    weights: Weights,
    dtype: torch.dtype,
    **where: Any,
) -> Any:
    """A model of weights that came rounded."""
    own = copy.deepcopy(config)
    method = own.quantization_config["quant_method"]
    del own.quantization_config
    if weights.packed:
        packed = {
            module: (of.bits, of.group, of.zeros, of.order is not None)
            for module, of in weights.packed.items()
        }
        own.quantization_config = PackedConfig(method, modules=packed).to_dict()
    model, unknown = _whole(
        name,
        lambda: model_class.from_pretrained(
            None,
            config=own,
            state_dict=weights.tensors,
            dtype=dtype,
            output_loading_info=True,
            **where,
        ),
    )
    # Some writers add biases of zeros to modules that have none.
    tensors = weights.tensors
    if lost := [key for key in unknown if key.endswith(".bias") and bool(tensors[key].any())]:
        raise ModelLoadError(f"{name}: {type(model).__name__} has no {lost[0]}, which is not zero")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _hub_folder(name: str, repo: str) -> Path:
    """Where the files of a hub model lie, once they are there."""
    wanted = ["*.safetensors", "*.json"]

    def fetch(source: str, local_files_only: bool = False) -> str:
        found = snapshot_download(source, allow_patterns=wanted, local_files_only=local_files_only)
        files = _safetensors_files(name, Path(found))
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"the weights of {source} are not all there")
        return found

    return Path(_from_cache_or_hub(fetch, name, repo, "weights"))


def _load_weights(
    name: str, source: Path | str, dtype: torch.dtype, allow_pickle: bool, **common: Any
) -> Any:
    model, unknown = _whole(
        name,
        lambda: _from_cache_or_hub(
            AutoModelForCausalLM.from_pretrained,
            name,
            source,
            "weights",
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **common,
        ),
    )
    modules = dict(model.named_modules())
    for key in unknown:
        module, _, part = key.rpartition(".")
        if part == "order" and isinstance(modules.get(module), QuantizedLinear):
            raise ModelLoadError(f"{name}: {key} is there, and its config says of no order")
    return model


def _whole(
    name: str, load_model: Callable[[], tuple[Any, dict[str, Any]]]
) -> tuple[Any, list[str]]:
    """What is loaded, unless it cannot be, or weights are missing; and weights that it has no place
    for."""
    try:
        model, info = load_model()
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{name}: the weights could not be read: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{name}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"{missing[0]!r} among them; it would run on random numbers"
        )
    return model, sorted(info["unexpected_keys"])


def _load_tokenizer(name: str, source: Path | str, **common: Any) -> Any:
    try:
        return _from_cache_or_hub(
            AutoTokenizer.from_pretrained, name, source, "tokenizer", **common
        )
    except ModelLoadError as error:
        cause: BaseException = error.__cause__ or error
        if not isinstance(source, Path):
            raise
    except Exception as error:
        cause = error
    raise ModelLoadError(
        f"{name}: no usable tokenizer in {source} (tokenizer.json, or a vocabulary file with "
        f"tokenizer_config.json): {cause}"
    ) from cause


def _from_cache_or_hub(
    load_part: Any, name: str, source: Path | str, part: str, **options: Any
) -> Any:
    """Loads from a directory or the hub's local cache, and only where that fails from the hub."""
    try:
        return load_part(str(source), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(source, Path):
            raise ModelLoadError(
                f"{name}: the {part} in {source} cannot be used: {error}"
            ) from error
        if not isinstance(error, OSError):
            raise ModelLoadError(f"{name}: the {part} cannot be used: {error}") from error
    try:
        return load_part(source, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{name}: there is no directory of this name, its {part} is not in the local hub "
            f"cache, and the hub did not serve it ({_first_line(error)}). With network access "
            f"run 'hf download {source}', or use the bundled 'inferlab/tiny'"
            + (". Only safetensors are read unless allow_pickle=True" if part == "weights" else "")
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings, which what is raised here replaces."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_present(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_available()
    if device == "mps":
        return torch.backends.mps.is_available()
    return device == "cpu"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
