"""What is in the file: the mapped GGUF (reader, metadata), tensor names (names) and expert records (layout)."""

from .metadata import Metadata
from .reader import GGUFFile, TensorInfo

__all__ = ["GGUFFile", "Metadata", "TensorInfo"]
