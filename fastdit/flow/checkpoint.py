"""A flow model's file says how to sample it: the transport's arguments beside the weights.

fastdit.save_model(model, path, metadata=transport_metadata(transport))
transport = load_transport(path)
"""

from __future__ import annotations

import inspect
import json
import os

from fastdit.flow.transport import Transport, create_transport

KEY = "transport"


def transport_metadata(transport: Transport | None) -> dict[str, str]:
    """What `save_model(..., metadata=...)` keeps of a transport; of None, a diffusion, nothing."""
    return {} if transport is None else {KEY: json.dumps(transport.config)}


def load_transport(path: str | os.PathLike[str]) -> Transport | None:
    """The transport that the model in `path` was trained with; None where the file names none: a
    diffusion's, or SiT's own, which do not say.

    Raises:
        CheckpointError: it is not a transport's arguments.
        FileNotFoundError: no such path.
    """
    from fastdit.checkpoint import CheckpointError, read_metadata

    text = read_metadata(path).get(KEY)
    if text is None:
        return None
    try:
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            raise ValueError(f"got {arguments!r}")
        inspect.signature(create_transport).bind(**arguments)
        return create_transport(**arguments)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the transport inside: {error}") from error
