"""An adapter merged into its base: a model folder of its own, for engines and kinds of adapters that need one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.merging.agreement import Agreement, Answers, Check
from dspy_lora.merging.model import contained, load_adapters, load_model, load_tokenizer, merge_in, require_packages
from dspy_lora.merging.place import output_folder, saving, write_metadata
from dspy_lora.merging.source import Source, common_base, find_source, record


@dataclass(frozen=True)
class MergedBase:
    """A base model with an adapter merged in.

    Attributes:
        folder: A Hugging Face model folder, tokenizer included.
        base: The base.
        source: The adapter.
        dtype: Number format of its weights: the base's own where that has 16 bits, else bfloat16.
        agreement: The merged model, read back from the disk, against the base with the adapter on it.
    """

    folder: Path
    base: Base
    source: Source
    dtype: str
    agreement: Agreement


def merge_into_base(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    registry: str | Path | None = None,
    check: Check | None = None,
    overwrite: bool = False,
) -> MergedBase:
    """Merges an adapter into its base and writes the model in 16 bit.

    The base is loaded from its stored weights, never in 4 bit, also for an adapter that was trained as QLoRA; the sum
    is made in float32 and rounded once. DoRA, PiSSA, OLoRA, biases and whole modules (``modules_to_save``) are merged
    too; a head that shares the embeddings' weights gets its own where the adapter changes one of the two.

    Args:
        adapter: Folder of an adapter, or its name in the registry (``"legal"``, ``"legal@0123456789ab"``).
        output: The folder to write.
        base: The base model; None takes the configuration's, else the one that the adapter names.
        registry: Folder of published adapters; None takes the configuration's.
        check: How merged and unmerged answers are compared; None is ``Check()``.
        overwrite: Whether an existing model or adapter in ``output`` is replaced.

    Returns:
        What was written.

    Raises:
        AdapterError: The adapter does not fit the base, cannot be merged, or the merged model answers differently.
        ConfigError: No such base, a quantised one, an output that exists, or too little GPU memory.
        DataError: Rows that cannot be asked.
        PublishError: The disk refused. Nothing was written.
    """
    require_packages()
    check = check or Check()
    source = find_source(adapter, AdapterRegistry(registry, base=base))
    found = common_base([source], base)
    place = output_folder(output, overwrite)
    place.check(found, [source])
    with contained(), place.draft() as draft:
        tokenizer = load_tokenizer(found.path)
        peft = load_adapters(found, [source])
        answers = Answers.of(peft, tokenizer, check, source)
        model = merge_in(peft, source)
        dtype = _save(model, found, draft, place.path)
        del model, peft
        agreement = answers.compare(load_model(draft), load_tokenizer(draft))
        agreement.require(check, source.name)
        lineage = record("merged base", [source], found, dtype=dtype, agreement=[asdict(agreement)])
        with saving(place.path):
            write_metadata(draft, lineage)
    return MergedBase(place.path, found, source, dtype, agreement)


def _save(model: Any, base: Base, draft: Path, output: Path) -> str:
    """Writes model and tokenizer; returns the number format."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    stored = AutoConfig.from_pretrained(base.path).dtype
    dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    with saving(output):
        model.to(dtype).save_pretrained(draft)
        AutoTokenizer.from_pretrained(base.path).save_pretrained(draft)
    return str(dtype).removeprefix("torch.")
