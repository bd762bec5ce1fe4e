"""``LoRALM(domain="auto")``: the adapter for a call, chosen by what the call asks."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from dspy import lm15

from dspy_lora.adapters.revision import Revision
from dspy_lora.detection.classifier import DomainClassifier

NAME = "auto"
_MARK = re.compile(r"\[\[ ## \w+ ## \]\]|</?\w+>")
# What DSPy's adapters end a prompt with; a text of the user's may hold such words too, before it.
_CLOSING = re.compile(r"(.*)\n\nRespond with (?:the corresponding output fields|a JSON object).*", re.DOTALL)


class AutoRoute:
    """Chooses a model string for a request, by its last user message alone: each turn of a conversation anew.

    Args:
        classifier: Says which domain the question is of.
        models: Model string of each domain that has an adapter; that of the base model alone under None.
        revisions: Those adapters: a copy in another process asks for them, whatever was published since.
    """

    def __init__(
        self, classifier: DomainClassifier, models: Mapping[str | None, str], revisions: Iterable[Revision] = ()
    ) -> None:
        self.classifier, self.models, self.revisions = classifier, dict(models), tuple(revisions)
        refs = [model.rpartition("/")[2] for domain, model in self.models.items() if domain is not None]
        known = json.dumps([sorted(refs), classifier.fingerprint])
        #: The route's own name; it changes with the adapters and the classifier, as DSPy's cache wants it.
        self.ref = f"{NAME}@{hashlib.sha256(known.encode()).hexdigest()[:12]}"

    def __call__(self, request: lm15.Request) -> str:
        """The model string that answers: an adapter's, or the base model's where no domain is clear enough."""
        asked = question(request)
        domain = self.classifier.choose(asked).domain if asked else None
        return self.models.get(domain, self.models[None])


def question(request: lm15.Request) -> str:
    """The last user message without what DSPy's adapters write around the fields."""
    text = next((message.text for message in reversed(request.messages) if message.role == "user"), None) or ""
    return _MARK.sub(" ", _CLOSING.sub(r"\1", text)).strip()
