"""What may happen to a playbook: four operations, each on few bullets, never a rewrite of the whole."""

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

import pydantic

Words = Annotated[str, pydantic.AfterValidator(lambda text: " ".join(text.split())), pydantic.Field(min_length=1)]
Id = Annotated[Words, pydantic.AfterValidator(lambda id: id.strip("[]"))]  # some LMs copy the listing's brackets
Count = Annotated[
    int, pydantic.Field(ge=0, le=1_000_000_000)
]  # so that sums have no more digits than the file may have


class _Operation(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Add(_Operation):
    """A new bullet.

    The same text in the same section is the same bullet: adding it again changes nothing, or brings it back where it
    was removed.

    Attributes:
        section: Where it belongs.
        text: One rule, fact or hint.
    """

    op: Literal["ADD"] = "ADD"
    section: Words
    text: Words


class Update(_Operation):
    """Another text for a bullet, or counts on top of its counters, or both.

    Attributes:
        id: The bullet.
        text: Its new text; None keeps the old one.
        helpful: How often it was seen to help.
        harmful: How often it was seen to mislead.
    """

    op: Literal["UPDATE"] = "UPDATE"
    id: Id
    text: Words | None = None
    helpful: Count = 0
    harmful: Count = 0


class Merge(_Operation):
    """Several bullets that say the same become one, which takes all their counters.

    Attributes:
        ids: The bullets, two at least; the first id in the alphabet survives, and the others go on meaning it.
        text: What the one says.
    """

    op: Literal["MERGE"] = "MERGE"
    ids: tuple[Id, ...] = pydantic.Field(min_length=2)
    text: Words


class Remove(_Operation):
    """A bullet leaves the prompt; the playbook still knows it, and its counters.

    Attributes:
        id: The bullet.
    """

    op: Literal["REMOVE"] = "REMOVE"
    id: Id


Delta: TypeAlias = Annotated[Add | Update | Merge | Remove, pydantic.Field(discriminator="op")]

_ORDER = (Add, Update, Merge, Remove)


def ordered(deltas: Iterable[Delta]) -> list[Delta]:
    """A batch in the one order in which it is carried out, whoever proposed what first.

    By kind (ADD, UPDATE, MERGE, REMOVE), then by content; so of two new texts for one bullet the last in the alphabet
    stays. A REMOVE of a bullet that the batch merges is left out: the merge was the removal.
    """
    batch = list(deltas)
    merged = {id for delta in batch if isinstance(delta, Merge) for id in delta.ids}
    kept = [delta for delta in batch if not (isinstance(delta, Remove) and delta.id in merged)]
    return sorted(kept, key=lambda delta: (_ORDER.index(type(delta)), delta.model_dump_json()))


def named(delta: Delta) -> tuple[str, ...]:
    """The ids of the bullets that an operation needs."""
    if isinstance(delta, Merge):
        return delta.ids
    return () if isinstance(delta, Add) else (delta.id,)
