"""A section of a fleet's file that `config` carries along, and another room reads."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class OpenSection(BaseModel):
    """Frozen; any key may be in it. What there is, `model_extra` has."""

    model_config = ConfigDict(frozen=True, extra="allow")
