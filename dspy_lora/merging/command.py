"""``dspy-lora merge``: an adapter into its base, several into one, or one into a plain LoRA."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspy_lora.config import load_config
from dspy_lora.errors import ConfigError
from dspy_lora.merging.agreement import LEAST_AGREEMENT, Agreement, Check
from dspy_lora.merging.combined import DENSITY, METHODS, MergedAdapter, merge_adapters
from dspy_lora.merging.merged_base import MergedBase, merge_into_base
from dspy_lora.merging.plain_lora import PlainLora, to_plain_lora
from dspy_lora.merging.source import Source
from dspy_lora.training.data import read_rows

DEFAULT_METHOD = "cat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora merge``."""
    parser.add_argument("adapter", nargs="+", help="folders, or names in the registry (legal, legal@REVISION)")
    parser.add_argument("--into-base", action="store_true", help="merge one adapter into its base, in 16 bit")
    parser.add_argument(
        "--rank", type=int, help="rank of the plain LoRA (1, 8, 16, 32, 64, 128, 256, 320, 512); of several: svd only"
    )
    parser.add_argument("--method", help=f"how several are merged: {', '.join(METHODS)} (default: {DEFAULT_METHOD})")
    parser.add_argument("--weights", type=float, nargs="+", help="weight of each adapter (default: 1 each)")
    parser.add_argument(
        "--density",
        type=float,
        help=f"share of values that ties*, dare_* and magnitude_prune* keep (default: {DENSITY})",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what dare_* drop (default: 0)")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--output", type=Path, metavar="FOLDER", help="write the result to this folder")
    goal.add_argument("--publish", metavar="NAME", help="publish the resulting adapter under this name")
    parser.add_argument("--overwrite", action="store_true", help="replace a model or adapter in FOLDER")
    parser.add_argument("--registry", metavar="FOLDER", help="the registry (default: as configured, else ./adapters)")
    parser.add_argument("--base-model", metavar="MODEL", help="the base (default: as configured, else the adapter's)")
    parser.add_argument(
        "--data", type=Path, nargs="+", help="rows (.jsonl) to compare answers on, one file or one for each adapter"
    )
    parser.add_argument("--domain", nargs="+", help="the task of the rows, one or one for each adapter")
    parser.add_argument("--rows", type=int, default=100, help="rows that are answered, the first ones (default: 100)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens an answer may take (default: 64)")
    parser.add_argument(
        "--least-agreement",
        type=float,
        default=LEAST_AGREEMENT,
        help=f"share of equal answers below which nothing is written (default: {LEAST_AGREEMENT})",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora merge`` and prints what was compared.

    Returns:
        The exit status, 0.

    Raises:
        AdapterError: Adapters that cannot be merged, or a result that answers differently.
        ConfigError: Settings that are not allowed or do not go together.
        DataError: Rows that are missing or malformed.
        PublishError: The disk refused. Nothing was written.
    """
    _check_flags(args)
    common: dict[str, Any] = {"base": args.base_model, "registry": args.registry, "overwrite": args.overwrite}
    checks = _checks(args)
    if args.into_base:
        _print_base(merge_into_base(args.adapter[0], args.output, check=checks[0], **common))
    elif len(args.adapter) == 1:
        place = {"output": args.output, "publish": args.publish}
        _print_plain(to_plain_lora(args.adapter[0], args.rank, check=checks[0], **place, **common))
    else:
        merged = merge_adapters(
            args.adapter,
            method=args.method or DEFAULT_METHOD,
            weights=args.weights,
            density=args.density,
            rank=args.rank,
            seed=args.seed,
            output=args.output,
            publish=args.publish,
            check=checks if len(checks) > 1 else checks[0],
            **common,
        )
        _print_merged(merged)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    several = {"--method": args.method, "--weights": args.weights, "--density": args.density}
    given = [flag for flag, value in several.items() if value is not None]
    if len(args.adapter) == 1 and given:
        raise ConfigError(
            f"{given[0]} is for several adapters, and one was given. Leave it out, or name more adapters."
        )
    if args.into_base:
        if len(args.adapter) > 1:
            raise ConfigError("--into-base takes one adapter. Merge several into one first, then that into the base.")
        if args.publish is not None or args.rank is not None:
            raise ConfigError("--into-base writes a model, not an adapter: give --output, without --publish or --rank.")
    elif len(args.adapter) == 1 and args.rank is None:
        raise ConfigError(
            "one adapter: give --into-base, or --rank for a plain LoRA of that rank; or name more adapters."
        )


def _checks(args: argparse.Namespace) -> list[Check]:
    """One check for all adapters, or one for each."""
    count = max(len(args.data or ()), len(args.domain or ()), 1)
    for flag, values in (("--data", args.data), ("--domain", args.domain)):
        if values is not None and len(values) not in (1, len(args.adapter)):
            raise ConfigError(
                f"{flag} got {len(values)} values for {len(args.adapter)} adapters: one, or one for each."
            )
    if args.data and not args.domain:
        raise ConfigError("--data needs --domain: the domain's task says what is asked about a row.")
    config = load_config()
    return [_check(args, config, _nth(args.data, n), _nth(args.domain, n)) for n in range(count)]


def _nth(values: Sequence[Any] | None, n: int) -> Any:
    return values and values[n if len(values) > 1 else 0]


def _check(args: argparse.Namespace, config: Any, data: Path | None, domain: str | None) -> Check:
    signature = config.domain(domain).signature() if domain else None
    rows = read_rows(data, list(signature.input_fields)) if data and signature else None
    return Check(rows, signature, most=args.rows, max_tokens=args.max_tokens, least_agreement=args.least_agreement)


def _print_agreements(agreements: Sequence[tuple[Source, Agreement]]) -> None:
    width = max(len("answers as"), *(len(source.name) for source, _ in agreements))
    print(f"\n{'answers as':<{width}}  prompts  equal  largest log-prob difference")
    for source, each in agreements:
        print(f"{source.name:<{width}}  {each.prompts:>7}  {each.equal:>5.1%}  {each.largest_difference:.3g}")


def _print_base(merged: MergedBase) -> None:
    print(
        f"{merged.source.name} merged into {merged.base.name} ({merged.base.revision}). The base was loaded from its "
        f"stored weights, not in 4 bit{' as in its QLoRA training' if merged.source.in_4_bit else ''}; "
        f"written in {merged.dtype} (16 bit)."
    )
    _print_agreements([(merged.source, merged.agreement)])
    print(f"\nWritten: {merged.folder}")


def _print_plain(plain: PlainLora) -> None:
    print(f"{plain.source.name} as a plain LoRA of rank {plain.rank} for {plain.base.name} ({plain.base.revision})")
    rows = {**plain.modules, f"all {len(plain.modules)}": plain.total}
    width = max(map(len, rows))
    print(f"\n{'module':<{width}}  change (Frobenius)  relative error")
    for name, each in rows.items():
        print(f"{name:<{width}}  {each.norm:>18.4g}  {each.error:>14.3%}")
    _print_agreements([(plain.source, plain.agreement)])
    _print_place(plain)


def _print_merged(merged: MergedAdapter) -> None:
    density = f", density {merged.density:g}" if merged.density is not None else ""
    parts = " + ".join(f"{w:g} x {source.name}" for w, source in zip(merged.weights, merged.sources, strict=True))
    print(f"{parts} by {merged.method}{density}: rank {merged.rank}, for {merged.base.name} ({merged.base.revision})")
    _print_agreements(list(zip(merged.sources, merged.agreements, strict=True)))
    _print_place(merged)


def _print_place(result: PlainLora | MergedAdapter) -> None:
    what = f"Published {result.revision.ref}" if result.revision is not None else "Written"
    print(f"\n{what}: {result.folder}")
