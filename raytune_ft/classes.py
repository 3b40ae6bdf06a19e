"""The classes of a classifier: what its config says of them, and which bases are refused for a job's."""

import re
from collections.abc import Mapping
from typing import Any

from raytune_ft.errors import ModelError
from raytune_ft.spec import ModelSpec

_ANSWERLESS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification")
"""How architectures end that give no text. `AutoModelForCausalLM` would take some of them all the same."""
_CLASSIFIER = "ForSequenceClassification"


def classes_config(spec: ModelSpec) -> dict[str, Any]:
    """What the config of a classifier says of its classes."""
    if not spec.labels:
        return {}
    return {
        "num_labels": len(spec.labels),
        "id2label": dict(enumerate(spec.labels)),
        "label2id": {label: at for at, label in enumerate(spec.labels)},
    }


def check_classes(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Refuse a base that gives no text where text is asked for, and one whose classes are others.

    Raises:
        ModelError: says which of the two.
    """
    (architecture, *_) = config.get("architectures") or [""]
    if not spec.labels and architecture.endswith(_ANSWERLESS):
        raise ModelError(
            f"model.path = {spec.path}: a {architecture} gives no text; to train a classifier, name its "
            "classes in model.labels"
        )
    own = list((config.get("id2label") or {}).values())
    named = any(not re.fullmatch(r"LABEL_[0-9]+", name) for name in own)
    if (
        named
        and architecture.endswith(_CLASSIFIER)
        and len(own) == len(spec.labels)
        and own != [*spec.labels]
    ):
        raise ModelError(
            f"model.path = {spec.path}: is a classifier with the classes {', '.join(own)}, and model.labels "
            f"names {', '.join(spec.labels)}; name its own in their order, or take the base it was made of"
        )


def check_head(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Refuse a head that a new one of another size would replace: transformers cannot, while it divides.

    Raises:
        ModelError: names both sizes.
    """
    (architecture, *_) = config.get("architectures") or [""]
    classes = len(config.get("id2label") or ()) or int(config.get("num_labels", 2))
    if architecture.endswith(_CLASSIFIER) and spec.labels and classes != len(spec.labels):
        raise ModelError(
            f"model.path = {spec.path}: is a classifier of {classes} classes, and model.labels names "
            f"{len(spec.labels)}; cluster.zero_stage = 3 cannot give it another head: use 1 or 2, or take "
            "the base it was made of"
        )
