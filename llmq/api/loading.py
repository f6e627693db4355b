"""From a path on disk to a model that runs: load, quantize if asked, choose kernels."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmq.algorithms.report import LayerReport
from llmq.api.calibrating import calibration_set
from llmq.api.distilling import distill_model, distill_settings
from llmq.api.kernel_choice import check_kernel, lay_out
from llmq.api.recipes import Recipe, settle
from llmq.api.sizes import Size, size_of
from llmq.calibration.recorder import CalibrationSet
from llmq.calibration.sequential import quantize_sequential
from llmq.checkpoint import Checkpoint, load_model, load_tokenizer_for, open_checkpoint
from llmq.checkpoint.rotated import rotate_model_, rotation_of
from llmq.errors import UsageError, suggest
from llmq.model.kv_cache import AUTO, kv_bytes_per_token, kv_dtype, kv_name
from llmq.model.llama import Llama
from llmq.model.runtime import AUTO as ANY_RUNTIME
from llmq.model.runtime import ModelRunner, Runtime, check_runtime, choose_runtime
from llmq.model.tokenizer import Tokenizer
from llmq.ops.select import KernelChoice
from llmq.progress import SILENT, Progress
from llmq.ranks import default_threads
from llmq.results.coverage import Coverage
from llmq.results.environment import capture
from llmq.results.record import Cache, Environment, Subject
from llmq.schemes.apply import quantize_
from llmq.schemes.overrides import Override
from llmq.schemes.registry import ResolvedScheme

DEVICES = ("cpu", "cuda")
"""What a model may run and be quantized on; everything else follows the tensors, and knows no names."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Setup:
    """Where and how a model runs.

    `dtype` is one of `DTYPES`; `kernel` is what `kernel_choice.lay_out` takes; `kv_cache` is `AUTO`, the model's own dtype, or
    one of `KV_DTYPES`; `runtime` is one of `model.runtime.RUNTIMES`.
    """

    device: str = "cpu"
    dtype: str = "bf16"
    threads: int | None = None
    kernel: str | None = None
    seed: int = 0
    kv_cache: str = AUTO
    runtime: str = ANY_RUNTIME

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}.{suggest(self.dtype, list(DTYPES))}")
        return DTYPES[self.dtype]

    def apply(self) -> None:
        """Set torch's thread count and seed; check the device and the dtypes."""
        kv_dtype(self.kv_cache, self.torch_dtype)  # refuses unknown ones before anything is loaded
        check_runtime(self.runtime)
        check_kernel(self.kernel)
        self.check_device()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no CUDA device; use --device cpu (`llmq env` says more).")
        torch.set_num_threads(self.threads or default_threads())
        torch.manual_seed(self.seed)

    def check_device(self) -> None:
        """Refuse a device that nothing is known of; whether this machine has it is another question."""
        if self.device not in DEVICES:
            raise UsageError(f"unknown device {self.device!r}; allowed are {' and '.join(DEVICES)}.")

    @property
    def device_name(self) -> str:
        """The device, and which it is: other GPUs round sums otherwise."""
        return f"cuda ({torch.cuda.get_device_name()})" if self.device == "cuda" else self.device

    def environment(self) -> Environment:
        """What a result record says of the machine."""
        return capture(threads=torch.get_num_threads(), device=self.device_name)


@dataclass
class Loaded:
    """A model ready to run, and everything that a record must say about it."""

    checkpoint: Checkpoint
    model: Llama
    resolved: ResolvedScheme | None
    setup: Setup
    coverage: Coverage | None = None
    reports: list[LayerReport] = field(default_factory=list)
    choices: list[KernelChoice] = field(default_factory=list)
    calibration: CalibrationSet | None = None
    overrides: tuple[Override, ...] = ()
    distillation: dict[str, Any] | None = None
    progress: Progress = SILENT

    @cached_property
    def size(self) -> Size:
        """What the model stores in the canonical layout: kernels may lay it out with more, so ask before `prepare`."""
        return size_of(self.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; raises TokenizerError when it has none."""
        return load_tokenizer_for(self.checkpoint)

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder or file."""
        return Path(self.checkpoint.path).resolve().name

    @property
    def scheme(self) -> str:
        """The scheme's name; for llmq's own artefacts the one they were made with."""
        if self.resolved:
            return self.resolved.name
        manifest = self.checkpoint.manifest
        return manifest.scheme if manifest else self.setup.dtype

    @property
    def options(self) -> dict[str, Any]:
        """The scheme's options, all of them resolved, and what overrides it where something does."""
        manifest = self.checkpoint.manifest
        if self.resolved:
            options, overrides = self.resolved.options_json(), [override.to_json() for override in self.overrides]
        else:
            options, overrides = (dict(manifest.options), manifest.overrides) if manifest else ({}, [])
        return {**options, "overrides": [str(Override(**data)) for data in overrides]} if overrides else options

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype of the model's KV cache."""
        return kv_dtype(self.setup.kv_cache, self.model.dtype)

    def with_kv_cache(self, name: str) -> Loaded:
        """The same model, with nothing copied, to be run with another KV cache."""
        other = copy(self)
        other.setup = replace(self.setup, kv_cache=name)
        other.__dict__.pop("runtime", None)  # chosen for the other cache
        return other

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the model, chosen at the first call: the weights must be laid out for their kernels by then."""
        return choose_runtime(self.model, self.setup.runtime, kv_dtype=self.kv_dtype, progress=self.progress)

    @property
    def runner(self) -> ModelRunner:
        """The model as everything but calibration runs it."""
        return self.runtime.runner

    def subject(self, *, with_tokenizer: bool = True, with_cache: bool = True) -> Subject:
        """What a result record says of the model; the KV cache is left out where no token is computed."""
        config = self.model.config
        cache = Cache(
            dtype=kv_name(self.kv_dtype),
            bytes_per_token=kv_bytes_per_token(config, self.kv_dtype),
            context_tokens=config.max_position_embeddings,
        )
        return Subject(
            model=self.name,
            checkpoint_sha256=self.checkpoint.sha256,
            tokenizer_sha256=self.tokenizer.sha256 if with_tokenizer else None,
            scheme=self.scheme,
            options=self.options,
            bits_per_weight=self.size.matrix_bits_per_weight,
            file_bits_per_weight=self.size.file_bits_per_weight,
            size_bytes=self.size.bytes,
            kv_cache=cache if with_cache else None,
        )


def open_model(path: str, recipe: Recipe | None = None, setup: Setup | None = None, *, progress: Progress = SILENT) -> Loaded:
    """Load a checkpoint, apply `recipe`'s scheme to it if there is one, and choose a kernel for every linear.

    Without a recipe an original checkpoint runs in the compute dtype, and llmq's own artefact as it was saved.

    Raises:
        InputError: the checkpoint, tokenizer or calibration text cannot be used.
        SchemeError: the scheme does not fit the model.
        KernelError: `setup.kernel` or `setup.runtime` cannot run here.
    """
    setup = setup or Setup()
    setup.apply()
    checkpoint = open_checkpoint(path)
    if checkpoint.manifest is not None and recipe is not None:
        raise UsageError(
            f"{path} is quantized already (scheme {checkpoint.manifest.scheme}); --scheme applies to an original checkpoint: "
            "leave it out, or name the original."
        )
    if checkpoint.manifest is None and recipe is None:
        recipe = Recipe(setup.dtype)
    model = load_model(checkpoint, dtype=setup.torch_dtype, device=setup.device, progress=progress)
    loaded = Loaded(checkpoint, model, None, setup, progress=progress)
    if recipe is not None:
        apply_recipe(loaded, recipe, progress=progress)
    loaded.size  # noqa: B018 - counted now, before kernels lay the weights out
    loaded.choices = lay_out(loaded.model, setup.kernel, setup.device, progress)
    if setup.device == "cuda":
        fused = loaded.model.fuse_attention()
        if not fused.ok:
            progress.note(f"decode steps attend without the fused kernel: {fused.reason}")
    if loaded.runtime.fell_back:
        progress.note(loaded.runtime.note)
    return loaded


def apply_recipe(loaded: Loaded, recipe: Recipe, *, progress: Progress = SILENT) -> None:
    """Quantize `loaded.model` in place, with calibration when a linear's scheme needs it."""
    resolved = recipe.resolve()
    if resolved.baseline_dtype is not None:
        loaded.setup = replace(loaded.setup, dtype=resolved.name)
    settled = settle(recipe, loaded.model, loaded.setup.torch_dtype)
    loaded.resolved, loaded.overrides = resolved, recipe.overrides
    rotation = rotation_of(settled.rotate, loaded.model.config, loaded.setup.seed)
    if rotation is not None:
        rotate_model_(loaded.model, rotation)
    how: dict[str, Any] = {"skip": settled.skip, "skip_unfit": recipe.skip_unfit, "overrides": settled.overrides}
    if settled.needs_calibration:
        calibration = calibration_set(
            loaded.tokenizer, loaded.model.config, recipe.calibration, seed=loaded.setup.seed, progress=progress
        )
        loaded.calibration = calibration
        covered, loaded.reports = quantize_sequential(loaded.model, resolved, calibration, progress=progress, **how)
        distilling = distill_settings(settled.decisions, seed=loaded.setup.seed)
        if distilling is not None:
            original = load_model(loaded.checkpoint, dtype=loaded.setup.torch_dtype, device=loaded.setup.device)
            loaded.distillation = distill_model(loaded.model, original, calibration.tokens, distilling, progress=progress)
    else:
        covered = quantize_(loaded.model, resolved, dtype=loaded.setup.torch_dtype, **how)
    loaded.coverage = recipe.explain(covered)
