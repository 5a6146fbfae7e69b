"""The models that a student comes from, and what their licences ask of it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

logger = logging.getLogger(__name__)

# What a licence asks of a model that was made with its model, by the Hub's identifiers.
_CONDITIONS = (
    (r"(^|-)nc(-|$)|non-?commercial|research|^apple-amlr|^deepfloyd", "does not allow commercial use"),
    (r"(^|-)nd(-|$)", "does not allow to share changed versions"),
    (r"^llama", "sets conditions for models that are made with its models' outputs (notice, name, acceptable use)"),
    (r"^gemma", "binds models that are distilled from its models to its own terms"),
    (r"rail", "passes its restrictions of use on to derived models"),
    (r"gpl|(^|-)sa(-|$)|^eupl|^osl|^ms-rl", "asks that derived works carry the same licence"),
    (r"^(other|unknown)$", "has terms of its own, which are not known here"),
)


@dataclass(frozen=True)
class Source:
    """A model that the student learned from or started from.

    Args:
        name: What to call it.
        hub_id: Its name on the Hub, where it is known to come from there.
        revision: Its commit where known, else the revision that was asked for.
        license: Identifier of its licence, where its card could be read.
        license_name: Name of a licence that has no identifier.
        license_link: Where that licence stands.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class License:
    """The student's licence, and what there is to say about it."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    notes: tuple[str, ...] = ()


def source_of(config: Any, name: str, revision: str | None = None) -> Source:
    """What is known about a model by its config.

    Only what was loaded from the Hub has a commit. A folder whose name looks like a Hub name has none.

    Args:
        config: The model's config, or `None`.
        name: What the model is called.
        revision: What was asked for.
    """
    path, commit = getattr(config, "_name_or_path", "") or "", getattr(config, "_commit_hash", None)
    hub_id = path if commit and not os.path.exists(path) and _is_repo_id(path) else None
    card = _card_data(path, hub_id, commit)
    return Source(
        Path(name).name if os.path.exists(name) else name,  # where it lies on this machine is nobody's business
        hub_id,
        commit if hub_id else revision,
        *(card.get(key) for key in ("license", "license_name", "license_link")),
    )


def inherited_license(given: str | None, sources: Sequence[Source]) -> License:
    """The given licence, or that of the sources: one that sets conditions before one that sets none.

    Warns in the log where a source's licence sets conditions.

    >>> inherited_license(None, [Source("teacher", license="mit")]).license
    'mit'
    >>> inherited_license(None, [Source("a", license="mit"), Source("b", license="cc-by-nc-4.0")]).notes
    ('`b` is under `cc-by-nc-4.0`, which does not allow commercial use.',)
    """
    notes = [
        f"`{source.name}` is under `{source.license_name or source.license}`, which {asked}."
        for source in sources
        if source.license and (asked := conditions(source.license))
    ]
    for note in notes:
        logger.warning("The student's licence: %s Read it before you publish the student.", note)
    notes += [f"The licence of `{source.name}` is not known here." for source in sources if not source.license]
    if given is not None:
        return License(given, notes=tuple(notes))
    known = sorted((s for s in sources if s.license), key=lambda s: conditions(s.license or "") is None)
    if not known:
        return License(notes=tuple(notes))
    first = known[0]
    return License(first.license, first.license_name, first.license_link, tuple(notes))


def conditions(license: str) -> str | None:
    """What a licence asks of derived models beyond naming its origin; `None` if nothing is known.

    >>> conditions("cc-by-nc-sa-4.0")
    'does not allow commercial use and asks that derived works carry the same licence'
    >>> conditions("apache-2.0") is None
    True
    """
    found = [asked for pattern, asked in _CONDITIONS if re.search(pattern, license.lower())]
    return " and ".join(found) or None


def _card_data(path: str, hub_id: str | None, commit: str | None) -> dict[str, Any]:
    """The metadata of a model's card: from its folder, the cache, or (unless offline) the Hub."""
    try:
        if hub_id is None:
            card = Path(path) / "README.md"
            return ModelCard.load(card).data.to_dict() if path and card.is_file() else {}
        cached = try_to_load_from_cache(hub_id, "README.md", revision=commit)
        if isinstance(cached, str):
            return ModelCard.load(cached).data.to_dict()
        if constants.HF_HUB_OFFLINE:
            return {}
        data = HfApi().model_info(hub_id, revision=commit, timeout=10).card_data
        return data.to_dict() if data is not None else {}
    except Exception:  # absent, unreachable or malformed: the card says that the licence is not known
        return {}


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
