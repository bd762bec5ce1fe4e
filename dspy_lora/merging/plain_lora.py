"""Any adapter as a plain LoRA of a chosen rank, by the singular values of what it changes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.adapters.revision import Revision
from dspy_lora.config import Rank
from dspy_lora.errors import AdapterError, ConfigError
from dspy_lora.merging.agreement import Agreement, Answers, Check
from dspy_lora.merging.lora_folder import write_lora
from dspy_lora.merging.model import contained, load_adapters, load_model, load_tokenizer, merge_in, require_packages
from dspy_lora.merging.place import place_of, saving, write_metadata
from dspy_lora.merging.source import Source, common_base, find_source, record

if TYPE_CHECKING:
    import torch

    from dspy_lora.merging.lora_folder import Factors


@dataclass(frozen=True)
class Approximation:
    """How well a low rank holds the change of one module, or of all of them.

    Attributes:
        norm: Frobenius norm of the change.
        rest: Frobenius norm of what the low rank, rounded to its number format, leaves out.
    """

    norm: float
    rest: float

    @property
    def error(self) -> float:
        """The rest relative to the change."""
        return self.rest / self.norm


@dataclass(frozen=True)
class PlainLora:
    """An adapter turned into a plain LoRA.

    Attributes:
        folder: Where it lies.
        revision: The published revision; None where it was written to a folder.
        base: The base.
        source: The adapter that it was made from.
        rank: Its rank.
        modules: Approximation by module.
        agreement: The base with the plain LoRA on it against the base with the source on it.
    """

    folder: Path
    revision: Revision | None
    base: Base
    source: Source
    rank: int
    modules: dict[str, Approximation]
    agreement: Agreement

    @property
    def total(self) -> Approximation:
        """All modules together."""
        return total(self.modules)


def total(modules: dict[str, Approximation]) -> Approximation:
    """The approximation of all modules as if they were one matrix."""
    norm = sum(each.norm**2 for each in modules.values()) ** 0.5
    return Approximation(norm, sum(each.rest**2 for each in modules.values()) ** 0.5)


def check_rank(rank: int) -> int:
    """Returns a rank that vLLM has slots for.

    Raises:
        ConfigError: It has none.
    """
    if rank not in get_args(Rank):
        allowed = ", ".join(map(str, get_args(Rank)))
        raise ConfigError(f"rank {rank!r} is none that vLLM takes: {allowed}. Take the next larger one.")
    return rank


def to_plain_lora(
    adapter: str | Path,
    rank: int,
    *,
    output: str | Path | None = None,
    publish: str | None = None,
    base: str | None = None,
    registry: str | Path | None = None,
    check: Check | None = None,
    overwrite: bool = False,
) -> PlainLora:
    """Turns an adapter that vLLM cannot serve (DoRA, PiSSA, OLoRA, a head of its own) into a plain LoRA.

    The adapter is merged in float32, and the difference of each weight to the base's is cut off behind its ``rank``
    largest singular values, which is the nearest matrix of that rank (Eckart & Young 1936). PiSSA and OLoRA of rank r
    have differences of rank 2r and are exact from there on; DoRA's have full rank.

    Args:
        adapter: Folder of an adapter, or its name in the registry. Plain ones can be brought to a lower rank.
        rank: 1, 8, 16, 32, 64, 128, 256, 320 or 512.
        output: The folder to write; or
        publish: the name to publish it under.
        base: The base model; None takes the configuration's, else the one that the adapter names.
        registry: Folder of published adapters; None takes the configuration's.
        check: How the two adapters' answers are compared; None is ``Check()``.
        overwrite: Whether an existing model or adapter in ``output`` is replaced.

    Returns:
        The plain LoRA, with the approximation error of each module.

    Raises:
        AdapterError: The adapter does not fit the base, changes more than linear modules, or the result answers
            differently.
        ConfigError: A rank, base or place that is not allowed, or too little GPU memory.
        DataError: Rows that cannot be asked.
        PublishError: The disk refused. Nothing was written.
    """
    require_packages()
    check = check or Check()
    check_rank(rank)
    adapters = AdapterRegistry(registry, base=base)
    source = find_source(adapter, adapters)
    found = common_base([source], base)
    place = place_of(output, publish, adapters, overwrite)
    place.check(found, [source])
    with contained(), place.draft() as draft:
        tokenizer = load_tokenizer(found.path)
        peft = load_adapters(found, [source])
        answers = Answers.of(peft, tokenizer, check, source)
        factors, modules = _approximate(found, merge_in(peft, source), source, rank)
        del peft
        with saving(draft):
            write_lora(draft, factors, rank, found, source.dtype)
        result = find_source(draft, adapters)
        agreement = answers.compare(load_adapters(found, [result]), tokenizer)
        agreement.require(check, source.name)
        facts = {"rank": rank, "error": total(modules).error, "agreement": [asdict(agreement)]}
        with saving(draft):
            write_metadata(draft, record("plain LoRA", [source], found, **facts))
        folder, revision = place.accept(draft, found)
    return PlainLora(folder, revision, found, source, rank, modules, agreement)


def _approximate(
    base: Base, merged: Any, source: Source, rank: int
) -> "tuple[dict[str, Factors], dict[str, Approximation]]":
    import torch

    factors, modules = {}, {}
    kind = getattr(torch, source.dtype)
    for module, change in _changes(load_model(base.path, dtype="auto"), merged, source):
        b, a = truncate(change, rank)
        rest = change - b.to(kind).float() @ a.to(kind).float()
        factors[module] = (b.cpu(), a.cpu())
        modules[module] = Approximation(float(change.norm()), float(rest.norm()))
    if not modules:
        raise AdapterError(f"{source.folder}: it changes nothing of base {base.name!r}. It was not trained.")
    return factors, modules


def _changes(plain: Any, merged: Any, source: Source) -> "Iterator[tuple[str, torch.Tensor]]":
    """Linear modules that differ, and by what: (outputs, inputs), float32."""
    import torch

    linear = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    before = dict(plain.named_parameters(remove_duplicate=False))
    after = dict(merged.named_parameters(remove_duplicate=False))
    changed = {name: weight for name, weight in after.items() if not _is_same(before.get(name), weight)}
    if others := sorted(changed.keys() - linear):
        raise AdapterError(
            f"{source.folder}: it changes {others[0]!r} ({len(others)} such in all), which LoRA on linear modules "
            "cannot hold. Merge it into the base: dspy-lora merge ADAPTER --into-base --output FOLDER."
        )
    for name, weight in changed.items():
        yield name.removesuffix(".weight"), weight.detach() - before[name].detach().float()


def _is_same(before: "torch.Tensor | None", after: "torch.Tensor") -> bool:
    return before is not None and before.shape == after.shape and bool((before.float() == after).all())


def truncate(change: "torch.Tensor", rank: int) -> "Factors":
    """The nearest matrix of a rank, as two factors with the singular values shared between them.

    Args:
        change: (outputs, inputs).
        rank: Largest rank of the result; less where the matrix is smaller.

    Returns:
        B (outputs, rank) and A (rank, inputs).
    """
    import torch

    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
