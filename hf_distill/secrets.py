"""Keeping access tokens out of what is written: checkpoints, cards, logs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def without_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that may hold an access token, at any depth of dictionaries.

    A `True` stays: it asks for the token that the machine has, and holds none.

    >>> without_tokens({"dtype": "bfloat16", "token": "hf_x", "inner": {"use_auth_token": "hf_x", "tokens": 3}})
    {'dtype': 'bfloat16', 'inner': {'tokens': 3}}
    """
    kept = {name: value for name, value in settings.items() if not (_is_token(name) and isinstance(value, str))}
    return {name: without_tokens(v) if isinstance(v, Mapping) else v for name, v in kept.items()}


@contextmanager
def saved_without_tokens(holder: Any) -> Iterator[None]:
    """While it lasts, whoever pickles `holder.args` gets a copy without tokens; all else sees the arguments.

    Trainer pickles its arguments into every folder that it saves or uploads, `hub_token` included.
    """
    args = holder.args
    holder.args = _PickledWithoutTokens(args)
    try:
        yield
    finally:
        holder.args = args


class _PickledWithoutTokens:
    """Arguments that leave their tokens behind when they are pickled."""

    def __init__(self, args: Any) -> None:
        self.__dict__["_args"] = args

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pickle asks for it, and so does isinstance
        return type(self.__dict__["_args"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_args"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_args"], name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        args = copy.copy(self.__dict__["_args"])
        for name, value in list(vars(args).items()):
            if _is_token(name) and isinstance(value, str):
                setattr(args, name, None)
            elif isinstance(value, dict):
                setattr(args, name, without_tokens(value))
        return args.__reduce_ex__(protocol)


def _is_token(name: Any) -> bool:
    return isinstance(name, str) and (name == "token" or name.endswith("_token"))
