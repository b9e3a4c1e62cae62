"""Everything that the methods of one run share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from losia_pro import dispatch
from losia_pro.discover import find_targets, subnet_sizes

from . import hub
from .batches import Collate, plan
from .data import Data
from .encode import Encoded, encode
from .errors import CliError
from .heldout import Score, score, sums
from .memory import check_fits, is_out_of_memory
from .methods import losia_config
from .processes import Processes, local_rank, local_size
from .values import file_path

MOST_EXAMPLES = 100_000_000  # of a run, whose batches are planned before it begins: some 4 GB
MAX_LENGTH = 1024  # unless the flag says otherwise
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Job:
    """``kind``: of the data; ``batches``: indices into ``data.train`` of every batch that this process trains on;
    ``steps``: optimizer steps; ``parameters``: of the model."""

    options: argparse.Namespace
    console: Console
    device: torch.device
    precision: str
    tokenizer: Any
    kind: str
    data: Encoded
    batches: list[list[int]]
    steps: int
    collate: Collate
    parameters: int
    together: Processes

    @property
    def dtype(self) -> torch.dtype:
        """Of the finished model's weights."""
        return DTYPES[self.precision]

    def training_dtype(self, method: str) -> torch.dtype:
        """Of the weights while they are trained: full fine-tuning keeps them in fp32."""
        return torch.float32 if method == "full" else self.dtype

    def evaluate(self, model: Any) -> Score:
        """The held-out score of a model, of which each process takes its part; exact match only where there is a
        response to match."""
        part = self.data.held_out[self.together.rank :: self.together.size]
        mine = sums(model, part, self.collate, self.options.batch_size)
        found = score(self.together.all(mine))
        return found if self.kind == "pairs" else found._replace(exact=None)

    def load_model(self, method: str) -> Any:
        """The base model, in the dtype that ``method`` trains in, on the device."""
        from transformers import AutoModelForCausalLM

        dtype = self.training_dtype(method)
        with reading(f"--model {self.options.model}"):
            model: Any = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype)
        return model.to(self.device)


def make_job(
    options: argparse.Namespace,
    data: Data,
    console: Console,
    device: torch.device,
    together: Processes,
) -> Job:
    """Tokenize the data and plan the batches; the model is not loaded yet.

    Raises:
        CliError: a model or tokenizer that cannot be read, a precision that is not there, a model that does not
            fit into memory.
    """
    from transformers import AutoConfig, AutoTokenizer

    precision = choose_precision(options.precision, device)
    if options.subnet_dtype and precision != "bf16":
        raise CliError(
            f"--subnet-dtype {options.subnet_dtype} is for models in bf16, and this run is in {precision}; give "
            "--precision bf16, or leave it out"
        )
    check_model(options.model)
    with reading(f"--model {options.model}"), hub.quiet():
        config = AutoConfig.from_pretrained(options.model)
        empty = empty_model(config)
    with reading(f"--model {options.model}: no tokenizer that can be read"), hub.quiet():
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    _check_causal(empty, options.model)
    check_targets(empty, options)
    _check_impl(options.impl, device)
    longest = getattr(config, "max_position_embeddings", None)
    if options.max_length is None:
        options.max_length = min(MAX_LENGTH, longest or MAX_LENGTH)
    if longest and options.max_length > longest:
        raise CliError(
            f"--max-length {options.max_length}: the model reads {longest} tokens at most"
        )
    encoded = encode(data, tokenizer, options.max_length)
    _check_vocabulary(encoded, empty, options.model)
    if len(encoded.held_out) > options.eval_limit:
        stride = len(encoded.held_out) / options.eval_limit
        kept = [encoded.held_out[int(i * stride)] for i in range(options.eval_limit)]
        encoded = Encoded(encoded.train, kept, encoded.cut, encoded.dropped)
    collate = Collate(_pad_id(tokenizer))
    n = sum(p.numel() for p in empty.parameters())
    job = Job(
        options, console, device, precision, tokenizer, data.kind, encoded, [], 0, collate, n, together
    )  # fmt: skip
    for method in (options.method, *options.compare):
        check_fits(n, job.training_dtype(method), method, device, local_size())
    n_batches = _count_batches(options, len(encoded.train), together.size)
    lengths = [len(s.ids) for s in encoded.train]
    batches = plan(lengths, options.batch_size, n_batches * together.size, options.seed)
    job.batches = batches[together.rank :: together.size]
    job.steps = math.ceil(n_batches / options.accumulation)
    return job


def _count_batches(options: argparse.Namespace, n_examples: int, size: int) -> int:
    """How many batches each of ``size`` processes trains on; a CliError if that is more than can be planned."""
    if options.steps:
        a_batch = min(options.batch_size, n_examples)
        flag, value, each = "--steps", options.steps, a_batch * options.accumulation * size
    else:
        flag, value, each = "--epochs", options.epochs, n_examples
    if value * each > MOST_EXAMPLES:
        would_do = MOST_EXAMPLES // each
        raise CliError(
            f"{flag} {value if options.steps else f'{value:g}'}: of {each:,} examples each, and a run is planned for "
            f"{MOST_EXAMPLES:,} at most" + f"; {would_do:,} would do" * bool(would_do)
        )
    an_epoch = math.ceil(n_examples / options.batch_size)
    n: int = value * options.accumulation if options.steps else math.ceil(an_epoch * value / size)
    return n


def check_model(name: str, what: str = "--model") -> None:
    """Raise a CliError if the name is neither a folder nor a hub id."""
    if hub.is_on_the_hub(name):
        hub.announce("model", name)
        return
    path = file_path(name)
    if path.is_file():
        raise CliError(f"{what} {name}: a file; a model is a folder that holds config.json")
    if not path.exists():
        raise CliError(f"{what} {name}: no such folder")
    if not (path / "config.json").is_file():
        raise CliError(f"{what} {name}: the folder holds no config.json")


def empty_model(config: Any) -> Any:
    """The model that a Hugging Face config describes, on the meta device: nothing is allocated."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def _check_causal(model: Any, name: str) -> None:
    """Raise a CliError for an encoder (BERT, RoBERTa), which AutoModelForCausalLM makes too: unless its config says
    ``is_decoder``, it sees the tokens that it is to predict."""
    config = model.config
    if hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True):
        raise CliError(
            f"--model {name}: {type(model).__name__} is an encoder, which sees the tokens that it is to predict; "
            "give a causal language model"
        )


def _check_vocabulary(data: Encoded, model: Any, name: str) -> None:
    """Raise a CliError for a token that the model has no embedding of."""
    largest = max(max(sample.ids) for sample in (*data.train, *data.held_out))
    size = getattr(model.get_input_embeddings(), "num_embeddings", largest + 1)
    if largest >= size:
        raise CliError(
            f"--model {name}: its tokenizer gives token {largest}, and the model knows {size} tokens; use the "
            "tokenizer that it was trained with, or resize its embeddings"
        )


def _check_impl(impl: str | None, device: torch.device) -> None:
    """Raise a CliError for kernels that cannot run there."""
    for op in dispatch.PREFERENCE if impl else ():
        try:
            dispatch.resolve(op, device, impl)
        except RuntimeError as error:
            raise CliError(f"--impl {impl}: {error}; use --impl torch, or leave it out") from error


def check_targets(model: Any, options: argparse.Namespace) -> None:
    """Raise a CliError if the subnets that are asked for cannot be in that model."""
    try:
        for method in {options.method, *options.compare} - {"full"}:
            config = losia_config("losia" if method == "losia" else "losia-pro", options)
            targets = find_targets(model, config)
            if method != "lora":
                subnet_sizes(targets.linears, targets.head, config)
    except ValueError as error:
        raise CliError(str(error)) from error


def choose_device(name: str) -> torch.device:
    """``auto``: this process's CUDA GPU if there is one, the first where it is alone; else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise CliError("--device cuda: no CUDA GPU is visible to PyTorch; use --device cpu")
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """``auto``: bf16 on a GPU that computes in it natively, else fp32."""
    if name == "fp16" and device.type == "cpu":
        raise CliError("--precision fp16 needs a GPU; use fp32 (or bf16) on a CPU")
    if name != "auto":
        return name
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if native else "fp32"


def _pad_id(tokenizer: Any) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a config, a checkpoint or a tokenizer raises is a CliError that begins with ``what``; but for memory
    that ran out."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CliError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what it says, and the one that a colon announces."""
    lines = [line.strip() for line in str(error).strip().split("\n")] or [""]
    return " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(",") or type(error).__name__
