"""What is computed: one file per architecture, discovered by existing."""

import importlib
import pkgutil
from functools import cache

from ..errors import UnsupportedModel
from .base import Model


@cache
def architectures() -> dict[str, type[Model]]:
    """Every architecture by its GGUF name (`general.architecture`)."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("base", "blocks"):
            members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            found |= {m.arch: m for m in members if isinstance(m, type) and issubclass(m, Model) and m is not Model}
    return found


def for_gguf(arch: str) -> type[Model]:
    """The architecture of a GGUF; UnsupportedModel lists those there are."""
    if arch not in architectures():
        raise UnsupportedModel(f"architecture '{arch}' is not supported (supported: {', '.join(sorted(architectures()))})")
    return architectures()[arch]


def for_hub(model_type: str) -> type[Model]:
    """The architecture of a checkpoint's `model_type`; UnsupportedModel lists those there are."""
    types = {hub: model for model in architectures().values() for hub in model.hub_types}
    if model_type not in types:
        raise UnsupportedModel(f"model_type '{model_type}' is not supported (supported: {', '.join(sorted(types))})")
    return types[model_type]
