"""Several adapters of one base combined into one plain LoRA, by PEFT's methods."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.checks import check_adapter
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.adapters.revision import Revision
from dspy_lora.config import LARGEST_RANK
from dspy_lora.errors import AdapterError, ConfigError, near
from dspy_lora.merging.agreement import Agreement, Answers, Check
from dspy_lora.merging.lora_folder import write_lora
from dspy_lora.merging.model import contained, load_adapters, load_tokenizer, require_packages
from dspy_lora.merging.place import place_of, saving, write_metadata
from dspy_lora.merging.plain_lora import check_rank
from dspy_lora.merging.source import Source, common_base, find_source, record

if TYPE_CHECKING:
    from dspy_lora.merging.lora_folder import Factors

# PEFT's combination_type, and what it does. Those without svd act on A and B apart and keep the rank (cat adds ranks
# up); those with svd act on their product.
METHODS = {
    "linear": "weighted sum of A and of B: fast, and only roughly the sum of the adapters",
    "cat": "A and B one after another: exactly the weighted sum; ranks add up",
    "svd": "weighted sum of the products, cut off behind --rank singular values",
    "ties": "TIES (Yadav et al. 2023): largest values, majority sign, mean of those that agree",
    "ties_svd": "TIES on the products",
    "dare_linear": "DARE (Yu et al. 2024): random values dropped, the others scaled up, weighted sum",
    "dare_linear_svd": "DARE on the products",
    "dare_ties": "DARE, then TIES' majority sign",
    "dare_ties_svd": "the same on the products",
    "magnitude_prune": "largest values, weighted sum",
    "magnitude_prune_svd": "the same on the products",
}
DENSITY = 0.5


@dataclass(frozen=True)
class MergedAdapter:
    """Several adapters as one.

    Attributes:
        folder: Where it lies.
        revision: The published revision; None where it was written to a folder.
        base: The base.
        sources: The adapters that it was made from.
        method: How.
        weights: Weight of each adapter.
        density: Share of the values that were kept; None for a method that keeps all.
        rank: Its rank.
        agreements: The merged adapter against each of ``sources``.
    """

    folder: Path
    revision: Revision | None
    base: Base
    sources: tuple[Source, ...]
    method: str
    weights: tuple[float, ...]
    density: float | None
    rank: int
    agreements: tuple[Agreement, ...]


@dataclass(frozen=True)
class _Recipe:
    method: str
    weights: list[float]
    density: float | None
    rank: int
    seed: int


def merge_adapters(
    adapters: Sequence[str | Path],
    *,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    publish: str | None = None,
    base: str | None = None,
    registry: str | Path | None = None,
    check: Check | Sequence[Check] | None = None,
    overwrite: bool = False,
) -> MergedAdapter:
    """Merges adapters of one base into one plain LoRA.

    Args:
        adapters: Two or more: folders, or names in the registry. Each must be one that vLLM serves.
        method: One of ``METHODS``.
        weights: Weight of each adapter; None weighs each with 1.
        density: Share of the values that TIES, DARE and magnitude pruning keep, above 0 and up to 1; None keeps half.
        rank: Rank of the result, for methods with svd: 1, 8, 16, 32, 64, 128, 256, 320 or 512. None takes the largest
            of the adapters' ranks.
        seed: Decides which values DARE drops.
        output: The folder to write; or
        publish: the name to publish it under.
        base: The base model; None takes the configuration's, else the one that the first adapter names.
        registry: Folder of published adapters; None takes the configuration's.
        check: How the merged adapter's answers are compared with each adapter's own: one for all, or one for each.
        overwrite: Whether an existing model or adapter in ``output`` is replaced.

    Returns:
        The merged adapter.

    Raises:
        AdapterError: Adapters of different bases, one that vLLM does not serve, or a result that answers differently
            from one of them.
        ConfigError: A method, weights, density, rank, seed, base or place that is not allowed, or too little memory of
            the GPU.
        DataError: Rows that cannot be asked.
        PublishError: The disk refused. Nothing was written.
    """
    require_packages()
    scales = _check_arguments(adapters, method, weights, density, rank, seed)
    checks = _checks(check, len(adapters))
    found_in = AdapterRegistry(registry, base=base)
    sources = tuple(find_source(adapter, found_in) for adapter in adapters)
    found = common_base(sources, base)
    place = place_of(output, publish, found_in, overwrite)
    place.check(found, sources)
    for source in sources:
        check_adapter(source.folder, found, LARGEST_RANK)
    kept = (DENSITY if density is None else density) if _prunes(method) else None
    recipe = _Recipe(method, scales, kept, _rank(sources, method, rank), seed)
    with contained(), place.draft() as draft:
        agreements = _merge(recipe, sources, found, checks, draft, found_in)
        facts = asdict(recipe) | {"agreement": [asdict(agreement) for agreement in agreements]}
        with saving(draft):
            write_metadata(draft, record("several adapters", sources, found, **facts))
        folder, revision = place.accept(draft, found)
    return MergedAdapter(folder, revision, found, sources, method, tuple(scales), kept, recipe.rank, agreements)


def _merge(
    recipe: _Recipe,
    sources: tuple[Source, ...],
    base: Base,
    checks: Sequence[Check],
    draft: Path,
    registry: AdapterRegistry,
) -> tuple[Agreement, ...]:
    """Writes the merged adapter, and asks it what each of the adapters was asked before.

    Raises:
        AdapterError: It answers differently from one of them.
    """
    tokenizer = load_tokenizer(base.path)
    peft = load_adapters(base, sources)
    answers = []
    for number, (source, check) in enumerate(zip(sources, checks, strict=True)):
        peft.set_adapter(str(number))
        answers.append(Answers.of(peft, tokenizer, check, source))
    factors = _combine(peft, recipe)
    del peft
    with saving(draft):
        write_lora(draft, factors, recipe.rank, base, _dtype(sources))
    model = load_adapters(base, [find_source(draft, registry)])
    agreements = tuple(each.compare(model, tokenizer) for each in answers)
    for agreement, check, source in zip(agreements, checks, sources, strict=True):
        agreement.require(check, source.name)
    return agreements


def _prunes(method: str) -> bool:
    return method.startswith(("ties", "dare", "magnitude"))


def _check_arguments(
    adapters: Sequence[str | Path],
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    seed: int,
) -> list[float]:
    """Refuses settings that do not go together; returns the weights."""
    if len(adapters) < 2:
        raise ConfigError(f"{len(adapters)} adapter(s) to merge: give two or more, or merge one into its base.")
    if method not in METHODS:
        raise ConfigError(f"no method {method!r}. {near(method, METHODS)}")
    if weights is not None and len(weights) != len(adapters):
        raise ConfigError(f"{len(weights)} weights for {len(adapters)} adapters: give one for each, or none.")
    if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
        raise ConfigError(f"weights = {list(weights)!r}: each is a finite number, and one at least is not 0.")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed!r}: it is a whole number from 0 up to 2**64 - 1.")
    if density is not None and not _prunes(method):
        raise ConfigError(f"density = {density!r}: method {method!r} keeps all values. Leave density out.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density = {density!r}: it is the share of values kept, above 0 and up to 1.")
    if rank is not None:
        check_rank(rank)
        if not method.endswith("svd"):
            raise ConfigError(
                f"rank = {rank!r}: method {method!r} cannot choose its rank. Leave rank out, or take one with svd: "
                f"{', '.join(name for name in METHODS if name.endswith('svd'))}."
            )
    return [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]


def _checks(check: Check | Sequence[Check] | None, count: int) -> list[Check]:
    if check is None or isinstance(check, Check):
        return [check or Check()] * count
    if len(check) != count:
        raise ConfigError(f"{len(check)} checks for {count} adapters: give one for each, or one for all.")
    return list(check)


def _rank(sources: Sequence[Source], method: str, rank: int | None) -> int:
    """The result's rank."""
    ranks = [source.config["r"] for source in sources]
    patterned = [source.name for source in sources if source.config.get("rank_pattern")]
    if method.endswith("svd"):
        largest = max(*ranks, *(r for source in sources for r in (source.config.get("rank_pattern") or {}).values()))
        return rank or largest
    if patterned:
        raise AdapterError(f"{patterned[0]!r} has modules of several ranks (rank_pattern). Take a method with svd.")
    if method == "cat":
        if sum(ranks) > LARGEST_RANK:
            raise ConfigError(f"the ranks add up to {sum(ranks)}, above vLLM's {LARGEST_RANK}. Take method 'svd'.")
        return sum(ranks)
    if len(set(ranks)) > 1:
        raise AdapterError(
            f"method {method!r} needs adapters of one rank, these have {ranks}. Take {method + '_svd'!r}."
            if method != "linear"
            else f"method 'linear' needs adapters of one rank, these have {ranks}. Take 'cat' or 'svd'."
        )
    return int(ranks[0])


def _combine(peft: Any, recipe: _Recipe) -> "dict[str, Factors]":
    """Lets PEFT combine the adapters, and takes B and A out of the layers.

    PEFT copies use_rslora from the first adapter while it chooses alpha for plain scaling, so the new adapter would act
    sqrt(rank) times too strongly; ``write_lora`` writes the factors with a scaling of 1.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(recipe.seed)
    names = [str(number) for number in range(len(recipe.weights))]
    for name in names:
        _name_modules(peft, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning will be performed")
        try:
            peft.add_weighted_adapter(
                names,
                recipe.weights,
                "merged",
                combination_type=recipe.method,
                density=recipe.density,
                svd_rank=recipe.rank,
                svd_full_matrices=False,
            )
        except ValueError as exc:
            raise AdapterError(f"PEFT cannot combine these adapters: {exc}") from exc
    return {
        name: (layer.lora_B["merged"].weight.detach().cpu(), layer.lora_A["merged"].weight.detach().cpu())
        for name, layer in peft.base_model.model.named_modules()
        if isinstance(layer, LoraLayer) and "merged" in layer.lora_A
    }


def _name_modules(peft: Any, adapter: str) -> None:
    """Has an adapter's configuration name the modules that it is on, each in full, and limit them by nothing else.

    PEFT puts the new adapter on the modules that all configurations name, within the limits of the first alone, and
    takes no regular expressions beside lists.
    """
    from peft.tuners.lora import LoraLayer

    modules = peft.base_model.model.named_modules()
    config = peft.peft_config[adapter]
    config.target_modules = {
        name for name, layer in modules if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None


def _dtype(sources: Sequence[Source]) -> str:
    """The number format that holds all of the adapters' own."""
    kinds = {source.dtype for source in sources}
    return kinds.pop() if len(kinds) == 1 else "float32"
