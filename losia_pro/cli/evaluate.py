"""``losia-pro evaluate``: a model, or a base and a delta, on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from . import values
from .errors import CliError
from .merge import DTYPES, load_model, put
from .rundir import written

FIGURES = (  # of lm-evaluation-harness, that are kept
    "results",
    "groups",
    "n-samples",
    "n-shot",
    "versions",
    "higher_is_better",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The tasks and their data are lm-evaluation-harness's, which scores them too."
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub id of a causal language model"
    )
    parser.add_argument(
        "--tasks", type=values.names, required=True, metavar="NAME,...", help="e.g. gsm8k,piqa"
    )
    parser.add_argument(
        "--delta", metavar="FILE", help="what losia.save_delta wrote, if MODEL is its base"
    )
    parser.add_argument("--shots", type=int, metavar="N", help="examples (default: the task's own)")
    parser.add_argument(
        "--limit", type=values.count, metavar="N", help="documents of each task, at most"
    )
    parser.add_argument(
        "--batch-size", type=values.count, default=8, metavar="N", help="(default: 8)"
    )
    parser.add_argument(
        "--max-length", type=values.count, metavar="TOKENS", help="(default: the model's)"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="(default: as it is stored)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put tasks into the model's chat template"
    )
    parser.add_argument("--include", metavar="DIR", help="a folder with tasks of your own")
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run the code that the model writes, here and unguarded, as humaneval needs",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON, in place of a file that is there (default: evaluation.json in MODEL; in the current folder, if "
        "that is a hub id or --delta is given)",
    )


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise CliError("evaluate needs lm-evaluation-harness: pip install 'lm-eval[hf]'")
    output = _output(args)
    if args.shots is not None and args.shots < 0:
        raise CliError(f"--shots {args.shots}: must be 0 or more")
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    if args.include and not Path(args.include).is_dir():
        raise CliError(f"--include {args.include}: no such folder")
    manager = TaskManager(include_path=args.include)
    _check_tasks(args.tasks, manager.all_tasks)
    model = _load(args)
    if args.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # their metric asks for it as well
    try:
        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=args.tasks,
            num_fewshot=args.shots,
            limit=args.limit,
            apply_chat_template=args.chat,
            task_manager=manager,
            confirm_run_unsafe_code=args.run_code,
            log_samples=False,
        )
    except (OSError, ValueError, ImportError) as error:
        why = "it runs code that the model writes; give --run-code" if _unsafe(error) else error
        raise CliError(
            f"--tasks {','.join(args.tasks)}: {str(why).strip().splitlines()[0]}"
        ) from error
    record = _no_nan(_record(args, found, model))
    print(make_table(found))  # before the file, which a full disk may refuse
    if found.get("groups"):
        print(make_table(found, "groups"))
    with written(f"--output {output}"):
        output.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"{output}: every figure")
    return 0


def _load(args: argparse.Namespace) -> Any:
    """The model behind lm-evaluation-harness's interface, with the delta in it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from .job import choose_device, first_line

    device = choose_device(args.device)
    model = load_model(args.model, args.dtype, "MODEL")
    if args.delta:
        put(args.delta, model, f"MODEL is {args.model}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CliError(f"MODEL {args.model}: no tokenizer ({first_line(error)})") from error
    model = model.to(device).eval()
    logging.getLogger(HFLM.__module__).setLevel(
        logging.ERROR
    )  # it warns of models that are loaded already
    return HFLM(model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=args.max_length)


def _check_tasks(wanted: list[str], known: list[str]) -> None:
    if not wanted:
        raise CliError("--tasks: give one name at least, e.g. gsm8k")
    for name in wanted:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, 3)) or "none of a like name"
            raise CliError(
                f"--tasks {name}: no such task ({near}); lm-eval ls tasks lists them, and --include adds "
                "your own"
            )


def _output(args: argparse.Namespace) -> Path:
    """Where the figures go; asked before hours are spent on them."""
    folder = values.file_path(args.model)
    if args.output:
        path = values.file_path(args.output)
    else:
        path = (folder if folder.is_dir() and not args.delta else Path()) / "evaluation.json"
    if path.is_dir() or not path.parent.is_dir():
        raise CliError(f"--output {path}: a file in a folder that is there is needed")
    there, needed = (path, os.W_OK) if path.exists() else (path.parent, os.W_OK | os.X_OK)
    if not os.access(there, needed):
        raise CliError(f"--output {path}: cannot be written; give a file in a folder of your own")
    return path


def _unsafe(error: Exception) -> bool:
    return "confirm_run_unsafe_code" in str(error)


def _record(args: argparse.Namespace, found: Any, model: Any) -> dict[str, Any]:
    from .report import environment

    settings = {k: v for k, v in vars(args).items() if k not in ("command", "run", "output")}
    figures = {key: found[key] for key in FIGURES if key in found}
    record = {"arguments": settings, "dtype": str(model.model.dtype).removeprefix("torch.")}
    return {**record, "figures": figures, **environment(model.device)}


def _no_nan(value: Any) -> Any:
    """With None, which JSON has, for NaN and infinity, which it has not."""
    if isinstance(value, dict):
        return {key: _no_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
