"""What a device leaves its fleet with: its personal adapter, written, opened afresh and compared with the live one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import DeviceMemoryError, ExportError
from edge_runtime.trainer import Delivered

if TYPE_CHECKING:
    from edge_runtime.train.local import LocalTrainer, Ready
    from export.origin import Origin
    from export.subject import Subject

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 3, 16, 4
"""So few, because a small device computes them with little memory to spare."""


def deliver(trainer: LocalTrainer, folder: Path, *, base: str, names: Mapping[str, str], facts: Any) -> Delivered:
    """Export the personal adapter, load it into a fresh model, and compare logits in float32 on held-out examples.

    As a PEFT folder, where PEFT has the family; else in the runtime's own format. Where the base has directions beside
    it that it regained, a second folder, named after the precision, has them stacked under a LoRA adapter: an engine
    that quantises the base alike needs both, and one that has it in 16 bits the adapter alone.

    Args:
        trainer: whose live model has the adapter; it is released.
        folder: what was there is replaced.
        base: the base model, as the device's owner names it.
        names: the `fleet` and the `device`, for the card.
        facts: what the device has written down of its fleet's life, see `Client`; None for nothing.

    Raises:
        ExportError: it could not be written, or does not compute what the live model computes.
    """
    from edge_runtime.train.exhaustion import bearing
    from export import get, verify
    from export.folders import scratch
    from export.making import make
    from export.subject import Subject
    from profiles.families import family

    ready = trainer.ready
    family_name, prepared, scaling = ready.spec.family, ready.base.prepared, ready.spec.scaling
    about = _origin(ready, base, names, facts or {})
    prompts = tuple(example.input_ids[:PROMPT_TOKENS] for example in ready.held_out[:PROMPTS])
    form = "peft" if "peft" in family(family_name).exports else "native"
    try:
        with bearing("verifying the personal adapter"), scratch(folder.parent) as beside:
            known = verify.reference_of(ready.live, prompts, beside, count=ANSWER_TOKENS)
            subject = Subject(trainer.personal(), scaling, str(prepared.folder), prepared, family_name)
            del ready
            # A small device has no room for two models: the live one goes before the fresh one comes.
            trainer.release()
            # What `edge-runtime export` reads again, whatever else there is.
            more = None if family_name == "lora" else lambda part: get("native").write(subject, part)
            made = [make(form, subject, folder, about, known, force=True, more=more)]
            if prepared.regained and family_name == "lora":
                alike = folder.with_name(f"{folder.name}-{prepared.precision}")
                made.append(make(form, _for_quantised(subject), alike, about, known, force=True))
    except DeviceMemoryError as error:
        # A smaller plan would not help: what is verified is the base itself.
        raise ExportError(
            f"{error}; what was written, if it was, is in {folder}.unverified; free memory and start again"
        ) from error
    return Delivered(str(folder), max(one.parity.distance.max_logit_diff if one.parity else 0.0 for one in made))


def _for_quantised(subject: Subject) -> Subject:
    """The adapter with what its base regained stacked under it, of the base without that."""
    from edge_runtime.train import regaining

    prepared = subject.prepared
    if prepared is None:
        raise ExportError("what a base regained lies in its folder; expected a prepared base, found none")
    whole = regaining.stacked(subject.adapter, prepared.folder)
    return replace(subject, adapter=whole, prepared=replace(prepared, regained=0))


def _origin(ready: Ready, base: str, names: Mapping[str, str], facts: Mapping[str, Any]) -> Origin:
    """Where the adapter comes from, without a word of the data itself."""
    from edge_runtime.train.source import resolve
    from export.licence import licence_of
    from export.origin import Origin
    from export.reading import base_named

    return Origin(
        base=base_named(base),
        fingerprint=ready.base.prepared.fingerprint,
        precision=ready.base.prepared.precision,
        licence=licence_of(resolve(base)),
        kind="personal",
        family=ready.spec.family,
        data=f"{len(ready.train)} examples of its own; {len(ready.held_out)} more were held out",
        **{**names, **facts},
    )
