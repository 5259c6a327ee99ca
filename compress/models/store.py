"""A model whose weights stay on disk: the module is a shell on the meta device, filled part by part.

`Weights` reads single tensors of a folder; `LazyModel` is the transformers module with no weights in it, the
anatomy of its family, and two verbs: `materialise` a part and `release` it. A model larger than memory runs like any
other under `streamed()`: each block is filled just before its forward pass and emptied right after.

No tensor is memory-mapped: a mapping would count towards the memory of the process, a read does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.core.hadamard import hadamard
from compress.core.inputs import round_inputs
from compress.core.scheme import Grid
from compress.errors import ModelError, RequestError, first_line
from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.experts import stacked, stacks
from compress.models.headers import Folder, TensorHeader, canonical, read_folder

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Weights:
    """The tensors of a folder under the names the module gives them, read one at a time."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.anatomy = self.find_anatomy()
        self.tensors = canonical(folder.tensors, self.anatomy)
        self.stacks = stacks(self.tensors)
        self.online: dict[str, int] = {}
        """Layer → the size of the Hadamard matrix that its inputs are rotated by while the model runs."""

    def find_anatomy(self) -> Anatomy:
        return anatomy_for(self.folder.config, self.folder.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self.stacks

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.tensors[name].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.stacks:
            return self.tensors[name].shape
        experts = [[self.tensors[part].shape for part in expert] for expert in self.stacks[name]]
        return len(experts), sum(rows for rows, _ in experts[0]), experts[0][0][1]

    def read(self, name: str) -> Tensor:
        """The stored tensor in its stored dtype. Raises ModelError where its bytes cannot be read."""
        if name not in self.stacks:
            return read_tensor(self.tensors[name])
        return stacked((self.read(part) for expert in self.stacks[name] for part in expert), self.shape(name))


def read_tensor(header: TensorHeader) -> Tensor:
    """Read one tensor's bytes into fresh memory."""
    if header.dtype not in DTYPES:
        raise ModelError(f"{header.file}: {header.name} has type {header.dtype}, which cannot be computed with")
    buffer = bytearray(header.nbytes)
    with header.file.open("rb", buffering=0) as stream:
        stream.seek(header.begin)
        view = memoryview(buffer)
        done = 0
        while done < len(buffer) and (count := stream.readinto(view[done:])):
            done += count
    if done < len(buffer):
        raise ModelError(f"{header.file}: ends inside {header.name}. Download it again")
    if not buffer:
        return torch.empty(header.shape, dtype=DTYPES[header.dtype])
    return torch.frombuffer(buffer, dtype=DTYPES[header.dtype]).view(header.shape)


class LazyModel:
    """A transformers module without weights, and the means to fill its parts from a folder."""

    def __init__(self, weights: Weights, *, dtype: torch.dtype, device: str = "cpu") -> None:
        self.weights = weights
        self.anatomy = weights.anatomy
        self.dtype = dtype
        self.device = torch.device(device)
        self.module = empty_module(weights.folder)
        self.tied: dict[str, str] = dict(getattr(self.module, "all_tied_weights_keys", None) or {})
        self._check()
        for name in weights.online:
            layer = self.module.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, args, name=name: (self.rotated(name, args[0]), *args[1:]))

    @classmethod
    def open(cls, path: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LazyModel:
        """Open an ordinary folder; nothing but headers is read. `dtype` is what parts are filled in."""
        return cls(Weights(read_folder(path)), dtype=dtype, device=device)

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.get_submodule(self.anatomy.blocks)  # type: ignore[return-value]

    def block_name(self, index: int) -> str:
        return f"{self.anatomy.blocks}.{index}"

    def outer(self) -> list[str]:
        """Module paths outside the blocks: what runs before, after, and the head."""
        head = [self.anatomy.head] if self.anatomy.head else []
        modules = dict(self.module.named_modules())
        return [name for name in (*self.anatomy.before, *self.anatomy.after, *head) if name in modules]

    def materialise(self, path: str) -> None:
        """Fill every parameter under a module path, in the compute dtype. Tied parameters share memory."""
        for name, parameter in self._parameters(path):
            if parameter.is_meta:
                self.set_parameter(name, self._shared(name))

    def release(self, path: str) -> None:
        """Empty every parameter under a module path, and hand its memory back."""
        for name, parameter in self._parameters(path):
            self.set_parameter(name, torch.empty_like(parameter, device="meta"))
        give_back()

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        if leaf == "weight" and hasattr(module, "nf"):
            module.nf = tensor.shape[1]  # type: ignore[assignment]  # a Conv1D goes by it

    def round_inputs(self, name: str, grid: Grid, scale: Tensor | None = None) -> RemovableHandle:
        """From now on a layer's inputs are rounded to a grid before it sees them, until the handle is removed."""
        layer = self.module.get_submodule(name)
        return layer.register_forward_pre_hook(lambda _, args: (round_inputs(args[0], grid, scale), *args[1:]))

    def rotated(self, name: str, inputs: Tensor) -> Tensor:
        """What a layer computes with, given these inputs: rotated ones where its weights are."""
        return hadamard(inputs, self.weights.online[name]) if name in self.weights.online else inputs

    @contextmanager
    def streamed(self) -> Iterator[nn.Module]:
        """The module, runnable as it is: each part is filled as the data reaches it and emptied behind it."""
        hooks = []
        for name in [*self.outer(), *(self.block_name(index) for index in range(len(self.blocks)))]:
            part = self.module.get_submodule(name)
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self.materialise(name)))
            hooks.append(part.register_forward_hook(lambda *_, name=name: self.release(name)))
        try:
            yield self.module
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of token ids [batch, length]; the model must be `streamed`."""
        return self.module(input_ids=tokens.to(self.device), use_cache=False).logits

    @contextmanager
    def resident(self, paths: list[str]) -> Iterator[None]:
        """Fill the given module paths, and empty them at the end."""
        try:
            for path in paths:
                self.materialise(path)
            yield
        finally:
            for path in paths:
                self.release(path)

    def _parameters(self, path: str) -> list[tuple[str, nn.Parameter]]:
        module = self.module.get_submodule(path)
        return [(f"{path}.{name}", tensor) for name, tensor in module.named_parameters(remove_duplicate=False)]

    def _shared(self, name: str) -> Tensor:
        """The tensor of a parameter; where it is tied to one that is filled already, that very tensor."""
        source = self.tied.get(name)
        if source is not None:
            present = self.module.get_parameter(source)
            if not present.is_meta:
                return present.data
        stored = self.weights.read(name if name in self.weights else source or name)
        return stored.to(device=self.device, dtype=self.dtype) if stored.is_floating_point() else stored

    def _check(self) -> None:
        """Every parameter of the module must be in the folder, with its shape."""
        problems = []
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            stored = name if name in self.weights else self.tied.get(name, name)
            if stored not in self.weights:
                problems.append(f"{name} is missing")
            elif (shape := self.weights.shape(stored)) != tuple(parameter.shape):
                problems.append(f"{name} has shape {list(shape)}, config.json says {list(parameter.shape)}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise ModelError(f"{self.weights.folder.path}: weights and config.json disagree: {shown}")


def give_back() -> None:
    """Hand freed memory back to the system.

    glibc keeps what lies between small things that live on, a little more with every block, so that memory would grow
    with depth although nothing is held. Elsewhere nothing is done.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def empty_module(folder: Folder) -> nn.Module:
    """The transformers module of a folder with parameters on the meta device and real buffers."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = read_config(folder.path)
    config = type(config).from_dict(folder.config)  # which may be that of another shape than the files have
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, architecture or "", None)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            module = model_class(config) if model_class else AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{folder.path / 'config.json'}: transformers cannot build {architecture}: {reason}"
        ) from error
    return module.eval().requires_grad_(False)


def read_config(folder: Path) -> Any:
    """The transformers config of a folder. Raises ModelError where transformers does not know the model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = first_line(error)
        raise ModelError(f"{folder / 'config.json'}: transformers does not know this model: {reason}") from error


def compute_dtype(stored: str, choice: str = "auto", device: str = "cpu") -> torch.dtype:
    """The arithmetic of the calibration pass. `auto` is the stored type where the device is fast at it.

    On a CPU without a matrix unit for it, bfloat16 is no faster than float32 (measured: half as fast on an Intel with
    AVX-512 BF16 only), and float16 is slow on every CPU.
    """
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    if torch.device(device).type != "cpu":
        return DTYPES[stored] if stored in {"F16", "BF16"} else torch.float32
    quick = torch.cpu.get_capabilities().get("amx_bf16") if hasattr(torch.cpu, "get_capabilities") else False
    return torch.bfloat16 if stored == "BF16" and quick else torch.float32


def local_folder(name: str) -> Path:
    """The folder of a model: a local one as it is, a hub id downloaded (safetensors, config, tokenizer).

    Raises ModelError where there is neither.
    """
    path = Path(name)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(f"{name}: no such folder here, and the hub did not give it ({reason})") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder. Give a folder with config.json and *.safetensors")
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
    )
    if not any((folder / name).exists() for name in names):
        raise ModelError(f"{folder}: has no tokenizer (looked for {', '.join(names)}). Copy it from the original model")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded: {reason}. Copy it from the original model"
        ) from error


def device_named(choice: str) -> str:
    """The device to compute on. Raises RequestError where there is no such device here."""
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=choice)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise RequestError(f"--device {choice}: cannot be used here ({reason}). Use auto or cpu") from error
    return choice
