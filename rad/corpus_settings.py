"""Settings of the token corpora: where documents come from, how rows are filled, what weighs what.

Part of `rad.settings`, which re-exports everything here. No torch, no transformers.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rad.mixer_settings import Settings

SourceKind = Literal["nano", "text", "jsonl", "parquet", "hub"]
Packing = Literal["concatenate", "whole", "isolate"]


class SourceKeys(Settings):
    """Keys that say where documents are read from."""

    files: list[str] = Field(
        default_factory=list, description="files of sources `text`, `jsonl` and `parquet`"
    )
    dataset: str | None = Field(
        None, description="of source `hub`: id, or a folder of .jsonl, .jsonl.gz, .parquet files"
    )
    subset: str | None = Field(None, description="configuration of a hub dataset")
    revision: str | None = Field(None, description="hub revision (commit) of the dataset to pin")
    split: str = Field("train", description="split of source `hub`")
    column: str = Field("text", description="column that holds the text")
    messages: str | None = Field(
        None,
        description="column that holds a conversation, written out by the chat template; used in "
        "place of `column`",
    )
    chat_template: str | None = Field(
        None, description="file with a Jinja chat template; default: the tokenizer's own"
    )


class SourceSettings(SourceKeys):
    """One of several sources of a corpus."""

    source: SourceKind = Field(description="as in the corpus")
    weight: float = Field(1.0, gt=0, description="share of this source, relative to the others'")


class CorpusSettings(SourceKeys):
    source: SourceKind | None = Field(
        None,
        description="`nano` generators, plain `text`, `jsonl` or `parquet` files, or a `hub` "
        "dataset (id or local folder)",
    )
    sources: list[SourceSettings] = Field(
        default_factory=list, description="several sources, in place of `source` and its keys"
    )
    weigh_by: Literal["tokens", "documents"] = Field(
        "tokens",
        description="what the sources' weights are shares of; `documents` is how retrieval-aware "
        "distillation alternates its two data sets",
    )
    tokens: int = Field(gt=0, description="training tokens to prepare")
    held_out_tokens: int = Field(32768, gt=0, description="held-out tokens, never trained on")
    context: int = Field(gt=8, description="row length in tokens")
    packing: Packing | None = Field(
        None,
        description="`concatenate`: documents laid end to end and cut into rows; `whole`: rows of "
        "whole documents, padded; in both, attention and states run on from one document into "
        "the next. `isolate`: rows as `whole`, and every document is run by itself. Default: "
        "`whole` where all sources are `nano`, else `concatenate`",
    )
    separators: Literal["both", "bos", "eos", "none"] = Field(
        "both",
        description="special tokens around each text document (retrieval-aware distillation: "
        "`bos`; KL-guided selection: `none`); chat templates bring their own",
    )
    shuffle_buffer: int = Field(
        10_000,
        ge=1,
        description="documents held while shuffling; 1 keeps the order in which they are read",
    )
    prompt_weight: float = Field(
        1.0, ge=0, le=1, description="loss weight of prompt tokens (answers and text weigh 1)"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _one_way_of_naming_sources(self) -> CorpusSettings:
        if self.source is None and not self.sources:
            raise ValueError("give `source`, or `sources` for several")
        if self.sources:
            # by value, not by what was set: settings also come back from a dump of every key
            keys = {"source": None, **SourceKeys().model_dump()}
            doubled = [key for key, default in keys.items() if getattr(self, key) != default]
            if doubled:
                raise ValueError(
                    f"`sources` and {doubled[0]!r} are both given; put it into the source it is of"
                )
        return self

    @property
    def every_source(self) -> list[SourceSettings]:
        """The sources, whichever way they were given."""
        if self.source is None:
            return self.sources
        keys: dict[str, Any] = {key: getattr(self, key) for key in SourceKeys.model_fields}
        return [SourceSettings(source=self.source, **keys)]

    @property
    def row_packing(self) -> Packing:
        """The packing in use, with the default filled in."""
        if self.packing is not None:
            return self.packing
        nano = all(source.source == "nano" for source in self.every_source)
        return "whole" if nano else "concatenate"

    @property
    def input_files(self) -> list[str]:
        """Every single file that building the corpus reads; data set folders are not listed."""
        named = [
            [*source.files, *([source.chat_template] if source.chat_template else [])]
            for source in self.every_source
        ]
        return [file for files in named for file in files]
