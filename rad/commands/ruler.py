"""`rad ruler`: documents of RULER tasks as files.

Nothing heavy is imported before the verb runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rad.commands.options import OPTIONAL, PATH, Verb
from rad.files import read_json


def ruler(args: argparse.Namespace) -> None:
    """Make the documents of RULER tasks; whole files of the same inputs are kept."""
    from rad.evaluation.chat import Chat
    from rad.evaluation.ruler import tasks
    from rad.evaluation.ruler.build import available, builder_of, missing
    from rad.evaluation.ruler.store import Store
    from rad.evaluation.tokenizer import counter, tokenizer_digest
    from rad.models.sources import tokenizer_folder

    if (args.tokenizer is None) == (args.model is None):
        raise ValueError("name the tokenizer with --tokenizer (folder, hub id) or --model FILE")
    if args.model is not None:
        record = read_json(args.model)
        tokenizer = tokenizer_folder(record["source"], revision=record["revision"])
    elif Path(args.tokenizer).is_dir():  # a tokenizer alone is enough
        tokenizer = args.tokenizer
    else:
        tokenizer = tokenizer_folder(args.tokenizer)
    wrap = None
    if args.chat:
        wrap = Chat(args.name, tokenizer, args.chat_template).wrap
    builder = builder_of(
        args.name, counter(tokenizer), args.haystack, args.questions, Path(), args.data, wrap
    )
    store = Store(args.output, builder, tokenizer_digest(tokenizer))
    for asked in args.task or list(tasks.TASKS):
        tasks.find(asked)
        name = available(asked, builder.questions)
        if why := missing(args.name, name, builder.texts.files, builder.questions, args.data):
            # one of all is passed over; one that was asked for is not
            if args.task:
                raise ValueError(why)
            print(f"{name}: missing data: {why}")
            continue
        for length in args.length:
            kept = store.ensure(name, length, args.samples, args.seed)
            fill = kept.facts["fill"]
            print(
                f"{name} {length}: {len(kept.documents)} documents, filled {fill['min']:.1%} at "
                f"least, {fill['mean']:.1%} on average, {'made' if kept.made else 'kept'}"
            )


VERBS: dict[str, Verb] = {
    "ruler": (
        ruler,
        [
            ("--tokenizer", {"default": None, "help": "checkpoint or tokenizer folder, or hub id"}),
            ("--model", {**OPTIONAL, "help": "instead: description of a model (source.json)"}),
            (
                "--task",
                {"nargs": "+", "default": [], "help": "niah_single_1, ..., qa_2; default: all 13"},
            ),
            (
                "--length",
                {"type": int, "nargs": "+", "default": [4096], "help": "prompt + answer in tokens"},
            ),
            ("--samples", {"type": int, "default": 100, "help": "documents per task and length"}),
            ("--seed", {"type": int, "default": 1234}),
            (
                "--data",
                {"type": Path, "default": Path("data"), "help": "folder with books and questions"},
            ),
            ("--haystack", {"nargs": "+", "default": [], "help": "text files, not the books"}),
            (
                "--questions",
                {"nargs": "+", "default": [], "help": "SQuAD or HotpotQA files, for qa_1 and qa_2"},
            ),
            ("--chat", {"action": "store_true", "help": "wrap prompts by the chat template"}),
            ("--chat-template", {"default": None, "help": "file with another chat template"}),
            ("--name", {"default": "ruler", "help": "of the configured task, in messages"}),
            ("--output", {**PATH, "help": "folder for TASK/LENGTH.jsonl and its sidecar"}),
        ],
    ),
}
